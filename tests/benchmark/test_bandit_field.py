"""benchmark/bandit/field.py: section 3.4 against float64 quadrature and samples."""

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from benchmark.bandit import field

ESCAPE = field.ESCAPE
BOTH = pytest.mark.parametrize("neg_clip", [0.0, -0.2])


def reward(a):
    """R(a) in float64."""
    lower = norm.pdf(a, -1, 0.4)
    best = norm.pdf(a, 1.5, 0.4)
    top = norm.pdf(0, scale=0.4)
    return (0.7 * lower + best) / top


def exact_weights(neg_clip, a0):
    """w(a0) of eq. (11), with nu by a search under quadrature."""
    z = np.linspace(-7, 7, 20_001)
    nodes = ESCAPE.start_mean + ESCAPE.start_std * z
    rewards = reward(nodes)
    mass = norm.pdf(z)
    mass /= mass.sum()
    mean = mass @ rewards
    std = np.sqrt(mass @ (rewards - mean) ** 2)

    def weights(rewards, nu):
        q = (rewards - mean) / std
        return np.maximum((q - nu) / field.LAM, neg_clip)

    nu = brentq(lambda nu: mass @ weights(rewards, nu) - 1, -50, 50)
    return weights(reward(a0), nu)


@BOTH
def test_weights_of_the_target(neg_clip):
    target = field.make_target(neg_clip)
    assert float(target.mass @ target.w) == pytest.approx(1, abs=5e-3)
    expected = exact_weights(neg_clip, np.float64(target.a0))
    np.testing.assert_allclose(target.w, expected, atol=0.01 * expected.max())
    assert float(target.w.min()) == np.float32(neg_clip)


@pytest.mark.parametrize("neg_clip", [0.0, -0.6])
def test_the_closed_form_is_the_least_squares_fit(neg_clip):
    """Eq. (8) against the best constant v in narrow bins of a_t, where the loss is
    quadratic v^2 - 2 linear v + ...; there is no best one where E[w | a_t] < 0."""
    t = 0.2
    rng = np.random.default_rng(0)
    a0 = rng.normal(ESCAPE.start_mean, ESCAPE.start_std, 1_500_000)
    noise = rng.normal(size=a0.size)
    w = exact_weights(neg_clip, a0)
    velocity = noise - a0
    edges = np.linspace(-4, 4, 161)
    a_t = (1 - t) * a0 + t * noise

    def sums(values):
        return np.histogram(a_t, edges, weights=values)[0]

    count = sums(np.ones_like(w))
    quadratic = sums(w)
    linear = sums(w * velocity)
    squares = sums((w * velocity) ** 2)
    target = field.make_target(neg_clip)
    middles = np.float32(edges[:-1] + 0.025)
    found, mean_w = field.closed_form(target, middles, np.float32(t))

    good = (count > 3000) & (mean_w > 0.25)
    assert good.sum() > 15
    assert np.ptp(found[good]) > 1
    with np.errstate(invalid="ignore"):  # empty bins
        best = linear / quadratic
        error = np.sqrt(squares) / np.abs(quadratic)
    distance = np.abs(best - found) / (0.02 + error)
    distance = distance[good]
    assert distance.max() < 6
    assert distance.mean() < 1.2

    case_2 = (count > 3000) & (mean_w < -0.05)
    assert (quadratic[case_2] < 0).all()
    assert case_2.any() == (neg_clip < 0)


@BOTH
def test_particles_miss_the_signed_density_by_its_negative_mass(neg_clip):
    """Remark 3.6 where rho_t >= 0: eq. (8) carries N(0, 1) to rho_t of eq. (10)."""
    z = np.linspace(-7, 7, 2001)
    a0 = ESCAPE.start_mean + ESCAPE.start_std * z
    mass = norm.pdf(z)
    mass /= mass.sum()
    signed = mass * exact_weights(neg_clip, a0)
    target = field.make_target(neg_clip)
    path = field.flow_path(field.closed_form_velocity, target)
    for k in (100, 175, 225):  # t = 0.6, 0.3, 0.1
        t = field.TIMES[k]
        middles = field.MIDDLES[:, None]
        rho = norm.pdf(middles, (1 - t) * a0, t) @ signed
        np.testing.assert_allclose(field.path_density(target, t), rho, atol=0.02)
        negative = np.maximum(-rho, 0).sum() * field.WIDTH
        distance = field.total_variation(rho, path[k])
        assert distance == pytest.approx(negative, abs=0.015)
    assert (negative > 0.05) == (neg_clip < 0)


def test_total_variation_counts_what_left_the_bins():
    """Half of the mass stands where rho is 0, half far outside."""
    rho = np.zeros(200)
    rho[:100] = 0.2  # mass 1 in [-5, 0]
    particles = np.repeat([2.0, 1e3], field.PARTICLES // 2)
    assert field.total_variation(rho, particles) == pytest.approx(1)
    inside = np.linspace(-5, 0, field.PARTICLES, endpoint=False) + 1e-4
    assert field.total_variation(rho, inside) == pytest.approx(0, abs=1e-3)
