"""The normaliser nu(s) and the dual of lam, against independent oracles in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.special import logsumexp

from common import LAM_MIN, LAM_SHARE, solve_nu, solve_nu_for, update_lam

POWERS = [(1, -0.05), (2, 0.0), (0.5, 0.0), (1.5, -1.0), (2, -0.05), (3, 0.0)]  # and neg_clip
GENERAL = {  # name: g on numpy arrays, g on jax arrays
    "exp": (np.exp, jnp.exp),
    "tanh": tuple(lambda y, xp=xp: 20 * xp.tanh(y / 10) + 0.25 for xp in (np, jnp)),
    "leaky": tuple(lambda y, xp=xp: xp.where(y > 0, y, 0.1 * y) for xp in (np, jnp)),
}


def signed_power(y, power, neg_clip, xp=np):
    return xp.maximum(xp.sign(y) * xp.abs(y) ** power, neg_clip)


@functools.partial(jax.jit, static_argnums=(2, 3))
def power_weights(q, lam, power, neg_clip):
    """w as `weights` forms it: q shifted by its maximum first."""
    q = q - q.max(axis=-1, keepdims=True)
    y = (q - solve_nu(q, lam, power, neg_clip)) / lam
    return signed_power(y, power, neg_clip, jnp)


@functools.partial(jax.jit, static_argnums=2)
def weights_for(q, lam, g):
    q = q - q.max(axis=-1, keepdims=True)
    return g((q - solve_nu_for(q, lam, g)) / lam)


def oracle_nu(row, lam, g):
    """nu of one state by Brent's method in float64; g maps numpy arrays."""
    y, lo, hi = (row - row.max()) / lam, -1.0, 1.0
    while np.mean(g(y + lo)) > 1:
        lo *= 2
    while np.mean(g(y + hi)) < 1:
        hi *= 2
    u = brentq(lambda u: np.mean(g(y + u)) - 1, lo, hi, xtol=1e-14, rtol=1e-14)
    return row.max() - lam * u


def oracle_weights(q, lam, g):
    rows = np.asarray(q, np.float64)
    return np.array([g((row - oracle_nu(row, lam, g)) / lam) for row in rows])


def random_q(seed, shape=(12, 16), offset=0.0, spread=1.0):
    """Float32 values; row 0 is all equal, row 1 has ties, row 2 one outlier."""
    q = np.random.default_rng(seed).normal(size=shape)
    q[0], q[1], q[2, 0] = q[0, 0], np.round(q[1]), 30
    return np.float32(offset + spread * q)


@pytest.mark.parametrize("power,neg_clip", POWERS)
def test_power_weights_equal_brents_method(power, neg_clip):
    q = random_q(1)
    for lam in (0.1, 1.0, 5.0):
        expected = oracle_weights(q, lam, lambda y: signed_power(y, power, neg_clip))
        w = power_weights(q, lam, power, neg_clip)
        tol = 2e-5 if power >= 1 else 2e-3  # a power below 1 is steep at 0
        np.testing.assert_allclose(w, expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("name", GENERAL)
def test_any_weighting_equals_brents_method(name):
    q, (g, g_jax) = random_q(3), GENERAL[name]
    for lam in (0.1, 1.0, 5.0):
        w = weights_for(q, lam, g_jax)
        np.testing.assert_allclose(w, oracle_weights(q, lam, g), rtol=2e-5, atol=2e-5)


def whole_range(n):
    """q [cases, n] and lam [cases, 1] over the range the solver promises, ties included."""
    rows, lams, rng = [], [], np.random.default_rng(n)
    for offset in (-1e4, 0.0, 1e4):
        for spread in (1e-3, 1.0, 1e3):
            for lam in (1e-3, 0.1, 1.0, 1e3):
                x = rng.normal(size=n)
                shapes = x, np.round(x), 0 * x, x**3, np.append(x[1:], 1e3)
                rows += [offset + spread * shape for shape in shapes]
                lams += [lam] * len(shapes)
    return np.float32(rows), np.float32(lams)[:, None]


@pytest.mark.parametrize("weighting", [(1, -0.05), (2, 0.0), "exp"])
def test_mean_weight_is_one_over_the_whole_range(weighting):
    """|q| to 1e4, spread 1e-3 to 1e3, lam 1e-3 to 1e3, N to 4096, ties: mean 1 to 1e-4."""
    for n in (1, 4096):
        case = whole_range(n)
        w = weights_for(*case, jnp.exp) if weighting == "exp" else power_weights(*case, *weighting)
        assert np.abs(np.asarray(w, np.float64).mean(axis=-1) - 1).max() < 1e-4, n


def test_theorem_3_5_target_measure_never_lowers_the_mean_of_q():
    """Increasing g, negative values included: mean(w q) >= mean(q), strictly where q differs."""
    for seed, (_, g) in enumerate(GENERAL.values()):
        q = random_q(seed + 100, shape=(200, 16), offset=40 * (seed % 2) - 20)
        for lam in (0.2, 1.0):
            w = np.asarray(weights_for(q, lam, g), np.float64)
            np.testing.assert_allclose(w.mean(axis=-1), 1, atol=1e-4)
            gain = np.mean(w * q, axis=-1) - np.mean(np.float64(q), axis=-1)
            assert gain[0] > -1e-3 and gain[1:].min() > 0.01  # row 0 is of equal samples
            assert (w.min() < 0) == (g is not jnp.exp)  # a signed measure


def differences(row, lam, g, step=1e-6):
    """d nu / d q [N] and d nu / d lam by central differences of the oracle."""

    def slope(dq, dlam):
        above, below = (oracle_nu(row + s * dq, lam + s * dlam, g) for s in (step, -step))
        return (above - below) / (2 * step)

    return np.array([slope(dq, 0) for dq in np.eye(len(row))]), slope(np.zeros(len(row)), 1)


def check_gradients(solve, g, rows):
    """solve(q, lam) -> nu against finite differences, reverse and forward mode."""

    @jax.jit
    def both(q, lam, direction):
        backward = jax.grad(lambda *x: solve(*x).sum(), (0, 1))(q, lam)
        forward = jax.jvp(lambda q: solve(q, lam), (q,), (direction,))[1]
        return backward, forward

    direction = np.random.default_rng(0).normal(size=rows.shape).astype(np.float32)
    for lam in (0.2, 1.0):
        lams = np.full((len(rows), 1), lam, np.float32)
        (by_q, by_lam), forward = both(rows, lams, direction)
        expected = [differences(np.float64(row), float(lams[0, 0]), g) for row in rows]
        np.testing.assert_allclose(by_q, [x for x, _ in expected], atol=2e-4)
        np.testing.assert_allclose(by_lam[:, 0], [x for _, x in expected], rtol=1e-3)
        np.testing.assert_allclose(forward[:, 0], (by_q * direction).sum(axis=-1), atol=1e-5)
        np.testing.assert_allclose(by_q.sum(axis=-1), 1, rtol=1e-5)  # nu moves with q


@pytest.mark.parametrize("power,neg_clip", [(1, -0.05), (2, 0.0), (2, -0.05), (3, 0.0)])
def test_gradients_of_the_power_weights(power, neg_clip):
    check_gradients(
        lambda q, lam: solve_nu(q, lam, power, neg_clip),
        lambda y: signed_power(y, power, neg_clip),
        random_q(9, (5, 7))[3:],
    )


@pytest.mark.parametrize("name", GENERAL)
def test_gradients_of_any_weighting(name):
    g, g_jax = GENERAL[name]
    check_gradients(lambda q, lam: solve_nu_for(q, lam, g_jax), g, random_q(10, (5, 7))[3:])


# ---- update_lam -------------------------------------------------------------------------------


def dual(lam, q, eps_kl):
    """Eq. (30) averaged over states, in float64."""
    q = np.asarray(q, np.float64)
    return np.mean(lam * eps_kl + lam * logsumexp(q / lam, axis=-1) - lam * np.log(q.shape[-1]))


def kl_to_uniform(lam, q):
    log_p = np.asarray(q, np.float64) / lam
    log_p = log_p - logsumexp(log_p, axis=-1, keepdims=True)
    return np.mean(np.log(q.shape[-1]) + np.sum(np.exp(log_p) * log_p, axis=-1))


@jax.jit
def run_dual(q, eps_kl, lr):
    """2,000 steps from lam = 1 -> lam, the KL before each step."""
    log_lam, kl = jax.lax.scan(
        lambda log_lam, _: update_lam(log_lam, q, eps_kl, lr), jnp.zeros(()), length=2000
    )
    return jnp.exp(log_lam), kl


@pytest.mark.parametrize("lam,eps_kl", [(0.2, 1.5), (1.0, 0.1), (7.0, 1.5)])
def test_lam_step_is_the_gradient_of_eq_30(lam, eps_kl):
    """The step on log lam is -lr d/dlam of eq. (30): the chain rule's factor lam is left out."""
    q, step = random_q(6), 1e-6
    gradient = (dual(lam + step, q, eps_kl) - dual(lam - step, q, eps_kl)) / (2 * step)
    new, kl = update_lam(np.log(lam), q, eps_kl, 0.5)
    assert new.shape == kl.shape == ()
    np.testing.assert_allclose((np.log(lam) - new) / 0.5, gradient, atol=2e-5)
    np.testing.assert_allclose(kl, kl_to_uniform(lam, q), atol=2e-6)


@pytest.mark.parametrize("eps_kl", [0.2, 1.5, 3.0])  # log 32 = 3.47
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
def test_lam_reaches_the_minimum_of_the_dual_at_any_scale_of_q(eps_kl, scale):
    """There the KL is its bound."""
    q = random_q(7, (20, 32), spread=scale)[3:]
    lam, kl = run_dual(q, eps_kl, 0.15 / eps_kl)
    assert abs(kl[-1] - eps_kl) < 1e-4
    bounds = np.log(1e-3 * scale), np.log(1e3 * scale)
    best = minimize_scalar(
        lambda x: dual(np.exp(x), q, eps_kl) / scale, bounds=bounds, method="bounded"
    )
    assert lam == pytest.approx(np.exp(best.x), rel=5e-3)


def test_lam_is_safe_in_float32_for_large_q():
    """q / lam is 3e6 here, where float32 is no finer than 0.25; differences of q are exact."""
    lam = np.float32(0.003)
    q = random_q(8, (6, 32), offset=-1e4, spread=0.01)
    log_lam, kl = update_lam(jnp.log(lam), q, 1.5, 1.0)  # without jit, which would hide a rounding
    expected = kl_to_uniform(np.float64(lam), q)
    np.testing.assert_allclose(kl, expected, rtol=1e-4)
    np.testing.assert_allclose(log_lam, np.log(lam) - (1.5 - expected), rtol=1e-4)


def test_equal_samples_leave_everything_finite():
    """KL is 0 and drives lam down to LAM_MIN; there any q has weights of mean 1, and lam returns to
    at least its share of the spread in one step."""
    q = random_q(12, (4, 32), spread=1e3)
    lam, kl = run_dual(np.full((4, 32), 5.0, np.float32), 1.0, 0.5)
    assert lam == pytest.approx(LAM_MIN, rel=1e-4) and np.abs(kl).max() < 1e-6
    for power in (1, 2):
        w = np.asarray(power_weights(q, lam, power, 0.0), np.float64)
        np.testing.assert_allclose(w.mean(axis=-1), 1, atol=1e-4)
    log_lam, kl = update_lam(jnp.log(lam), q, 1.0)
    share = np.float64(q).std(axis=-1).mean() * LAM_SHARE
    assert np.exp(log_lam) == pytest.approx(share, rel=1e-3) and np.isfinite(kl)
