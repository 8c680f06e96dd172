"""benchmark/bandit/field.py: section 3.4 against quadrature in float64 and against samples."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

from bandit import field  # noqa: E402

from simpo_bandit import LANDSCAPES, Args  # noqa: E402

ESCAPE, LAM = LANDSCAPES["escape"], Args.lam


def exact_weight(neg_clip):
    """w(a0) of eq. (11) in float64, nu by root search under quadrature."""
    z = np.linspace(-7, 7, 20_001)
    mass = norm.pdf(z) / norm.pdf(z).sum()

    def reward(a):
        m, h, s = (np.float64(x)[:, None] for x in ESCAPE[:3])
        return np.sum(h * np.exp(-(((a - m) / s) ** 2) / 2), axis=0)

    nodes = reward(ESCAPE.mean + ESCAPE.std * z)
    mean = mass @ nodes
    std = np.sqrt(mass @ (nodes - mean) ** 2)
    nodes = (nodes - mean) / std
    nu = brentq(lambda nu: mass @ np.maximum((nodes - nu) / LAM, neg_clip) - 1, -50, 50)
    return lambda a: np.maximum(((reward(a) - mean) / std - nu) / LAM, neg_clip)


@pytest.mark.parametrize("neg_clip", [0.0, -0.2])
def test_target_weights(neg_clip):
    target = field.make_target(LAM, ESCAPE, neg_clip)
    assert float(target.mass @ target.w) == pytest.approx(1, abs=5e-3)
    expected = exact_weight(neg_clip)(np.float64(target.a0))
    np.testing.assert_allclose(target.w, expected, atol=0.01 * expected.max())
    assert float(target.w.min()) == np.float32(neg_clip)


@pytest.mark.parametrize("neg_clip", [0.0, -0.6])
def test_closed_form_is_the_least_squares_fit(neg_clip):
    """Eq. (8) against the best constant in narrow bins of a_t; no best where E[w|a_t] < 0."""
    rng, width, t = np.random.default_rng(0), 0.05, 0.2
    a0 = rng.normal(ESCAPE.mean, ESCAPE.std, 1_500_000)
    noise = rng.normal(size=a0.size)
    w = exact_weight(neg_clip)(a0)
    index = np.floor(((1 - t) * a0 + t * noise + 4) / width).astype(int)
    keep = (index >= 0) & (index < 160)
    index, w, vel = index[keep], w[keep], (noise - a0)[keep]
    count, quadratic, linear, square = (
        np.bincount(index, x, minlength=160) for x in (np.ones_like(w), w, w * vel, (w * vel) ** 2)
    )  # loss = quadratic v^2 - 2 linear v + ...
    target = field.make_target(LAM, ESCAPE, neg_clip)
    centres = np.float32(-4 + width * (np.arange(160) + 0.5))
    found, mean_w = field.closed_form(target, centres, np.float32(t))
    good = (count > 3000) & (mean_w > 0.25)
    quotient, deviation = linear[good] / quadratic[good], np.sqrt(square[good]) / quadratic[good]
    error = np.abs(quotient - found[good]) / (0.02 + deviation)
    assert good.sum() > 15 and np.ptp(found[good]) > 1
    assert error.max() < 6 and error.mean() < 1.2
    marked = (count > 3000) & (mean_w < -0.05)
    assert (quadratic[marked] < 0).all() and marked.any() == (neg_clip < 0)


@pytest.mark.parametrize("neg_clip", [0.0, -0.2])
def test_samples_miss_the_signed_density_by_its_negative_mass(neg_clip):
    """Remark 3.6 where rho_t >= 0: eq. (8) carries N(0, 1) to rho_t of eq. (10)."""
    width, target = 0.05, field.make_target(LAM, ESCAPE, neg_clip, num_nodes=501)
    times = np.linspace(1, 0.1, 136, dtype=np.float32)
    path = np.asarray(field.flow_path(field.closed_form_velocity, target, times, 4000))
    edges = np.linspace(-5, 5, 201)
    centres, z = (edges[1:] + edges[:-1]) / 2, np.linspace(-7, 7, 2001)
    a0, mass = ESCAPE.mean + ESCAPE.std * z, norm.pdf(z) / norm.pdf(z).sum()
    signed = mass * exact_weight(neg_clip)(a0)
    for k in (60, 105, 135):  # t = 0.6, 0.3, 0.1
        rho = norm.pdf(centres[:, None], (1 - times[k]) * a0, times[k]) @ signed
        found = field.path_density(target, jnp.asarray(centres), times[k])
        np.testing.assert_allclose(found, rho, atol=0.02)
        negative = np.maximum(-rho, 0).sum() * width
        share = np.histogram(path[k], edges)[0] / 4000
        assert np.abs(share - rho * width).sum() / 2 == pytest.approx(negative, abs=0.015)
    assert negative > 0.05 if neg_clip else negative == 0
