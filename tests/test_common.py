"""The normaliser nu(s) and the dual of lam, against independent oracles in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import brentq, minimize_scalar
from scipy.special import logsumexp

from common import LAM_MIN, LAM_SHARE, solve_nu, solve_nu_for, update_lam

# power and neg_clip
POWERS = [
    (1, -0.05),
    (2, 0.0),
    (0.5, 0.0),
    (1.5, -1.0),
    (2, -0.05),
    (3, 0.0),
]


def tanh(y, xp):
    return 20 * xp.tanh(y / 10) + 0.25


def leaky(y, xp):
    return xp.where(y > 0, y, 0.1 * y)


def exp(y, xp):
    return xp.exp(y)


GENERAL = [exp, tanh, leaky]  # g(y, numpy or jax.numpy)


def signed_power(y, power, neg_clip, xp=np):
    w = xp.sign(y) * xp.abs(y) ** power
    return xp.maximum(w, neg_clip)


@functools.partial(jax.jit, static_argnames=("power", "neg_clip"))
def power_weights(q, lam, power, neg_clip):
    """w as `weights` forms it: q shifted by its maximum first."""
    q = q - q.max(axis=-1, keepdims=True)
    nu = solve_nu(q, lam, power, neg_clip)
    y = (q - nu) / lam
    return signed_power(y, power, neg_clip, jnp)


@functools.partial(jax.jit, static_argnames="g")
def weights_for(q, lam, g):
    q = q - q.max(axis=-1, keepdims=True)
    g = functools.partial(g, xp=jnp)
    nu = solve_nu_for(q, lam, g)
    return g((q - nu) / lam)


def oracle_nu(row, lam, g):
    """nu of one state by Brent's method in float64; g maps numpy arrays."""
    y = (row - row.max()) / lam

    def excess(u):
        return np.mean(g(y + u)) - 1

    lo = -1.0
    while excess(lo) > 0:
        lo *= 2
    hi = 1.0
    while excess(hi) < 0:
        hi *= 2
    u = brentq(excess, lo, hi, xtol=1e-14, rtol=1e-14)
    return row.max() - lam * u


def oracle_weights(q, lam, g):
    w = []
    for row in np.asarray(q, np.float64):
        nu = oracle_nu(row, lam, g)
        w.append(g((row - nu) / lam))
    return np.array(w)


def random_q(seed, shape=(12, 16), offset=0.0, spread=1.0):
    """Float32 values; row 0 is all equal, row 1 has ties, row 2 one outlier."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=shape)
    q[0] = q[0, 0]
    q[1] = np.round(q[1])
    q[2, 0] = 30
    return np.float32(offset + spread * q)


def mean(x):
    """The mean over the N samples, in float64."""
    x = np.asarray(x, np.float64)
    return x.mean(axis=-1)


# ---- weights -------------------------------------------------------------------------
@pytest.mark.parametrize("lam", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("power,neg_clip", POWERS)
def test_power_weights_equal_brents_method(power, neg_clip, lam):
    q = random_q(1)
    g = functools.partial(signed_power, power=power, neg_clip=neg_clip)
    expected = oracle_weights(q, lam, g)
    w = power_weights(q, lam, power, neg_clip)
    tol = 2e-5 if power >= 1 else 2e-3  # a power below 1 is steep at 0
    assert_allclose(w, expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("lam", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("g", GENERAL)
def test_any_weighting_equals_brents_method(g, lam):
    q = random_q(3)
    w = weights_for(q, lam, g)
    g_numpy = functools.partial(g, xp=np)
    expected = oracle_weights(q, lam, g_numpy)
    assert_allclose(w, expected, rtol=2e-5, atol=2e-5)


def shapes_of_q(rng, n):
    """Rows of n values at scale 1: plain, with ties, equal, heavy tails, an outlier."""
    x = rng.normal(size=n)
    return [
        x,
        np.round(x),
        0 * x,
        x**3,
        np.append(x[1:], 1e3),
    ]


def whole_range(n):
    """q [cases, n] and lam [cases, 1] over the range the solver promises."""
    rng = np.random.default_rng(n)
    scales = itertools.product(
        [-1e4, 0.0, 1e4],  # offset
        [1e-3, 1.0, 1e3],  # spread
        [1e-3, 0.1, 1.0, 1e3],  # lam
    )
    all_q = []
    all_lam = []
    for offset, spread, lam in scales:
        for shape in shapes_of_q(rng, n):
            all_q.append(offset + spread * shape)
            all_lam.append([lam])
    return np.float32(all_q), np.float32(all_lam)


@pytest.mark.parametrize("n", [1, 4096])
@pytest.mark.parametrize("weighting", [(1, -0.05), (2, 0.0), exp])
def test_mean_weight_is_one_over_the_whole_range(weighting, n):
    """|q| to 1e4, spread and lam 1e-3 to 1e3, N to 4096, ties: mean 1 to 1e-4."""
    q, lam = whole_range(n)
    if weighting is exp:
        w = weights_for(q, lam, exp)
    else:
        w = power_weights(q, lam, *weighting)
    assert_allclose(mean(w), 1, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lam", [0.2, 1.0])
@pytest.mark.parametrize("offset", [-20, 20])
@pytest.mark.parametrize("g", GENERAL)
def test_theorem_3_5_target_measure_never_lowers_the_mean_of_q(g, offset, lam):
    """For increasing g, mean(w q) >= mean(q), and greater where the samples differ."""
    q = random_q(100, shape=(200, 16), offset=offset)
    w = weights_for(q, lam, g)
    assert_allclose(mean(w), 1, atol=1e-4)
    signed = w.min() < 0
    assert signed == (g is not exp)

    w = np.asarray(w, np.float64)
    gain = mean(w * q) - mean(q)
    assert gain[0] > -1e-3  # equal samples
    assert gain[1:].min() > 0.01


def test_nu_is_infinite_where_the_weighting_stays_on_one_side_of_one():
    q = random_q(11)
    nu = solve_nu_for(q, 1.0, lambda y: jnp.tanh(y) / 2)
    assert_array_equal(nu, -np.inf)
    nu = solve_nu_for(q, 1.0, lambda y: jnp.tanh(y) / 2 + 2)
    assert_array_equal(nu, np.inf)


# ---- gradients -----------------------------------------------------------------------
def oracle_gradients(row, lam, g, step=1e-6):
    """d nu / d q [N] and d nu / d lam by central differences of the oracle."""
    by_q = []
    for unit in np.eye(len(row)):
        above = oracle_nu(row + step * unit, lam, g)
        below = oracle_nu(row - step * unit, lam, g)
        by_q.append((above - below) / (2 * step))
    above = oracle_nu(row, lam + step, g)
    below = oracle_nu(row, lam - step, g)
    by_lam = (above - below) / (2 * step)
    return np.array(by_q), by_lam


def check_gradients(solve, g, q):
    """solve(q, lam) -> nu against finite differences, in reverse and forward mode."""

    def total(q, lam):
        return solve(q, lam).sum()

    @jax.jit
    def forward(q, lam, direction):
        solve_q = functools.partial(solve, lam=lam)
        _, slope = jax.jvp(solve_q, [q], [direction])
        return slope

    reverse = jax.grad(total, argnums=(0, 1))
    reverse = jax.jit(reverse)
    rng = np.random.default_rng(0)
    direction = np.float32(rng.normal(size=q.shape))
    for lam in np.float32([0.2, 1.0]):
        lams = np.full((len(q), 1), lam)
        by_q, by_lam = reverse(q, lams)
        for i, row in enumerate(np.float64(q)):
            expected_q, expected_lam = oracle_gradients(row, float(lam), g)
            assert_allclose(by_q[i], expected_q, atol=2e-4)
            assert_allclose(by_lam[i], expected_lam, rtol=1e-3)
        slope = forward(q, lams, direction)
        expected = np.sum(by_q * direction, axis=-1)
        assert_allclose(slope[:, 0], expected, atol=1e-5)
        # nu moves with q
        assert_allclose(np.sum(by_q, axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("neg_clip", [0.0, -0.05])
@pytest.mark.parametrize("power", [1, 2, 3])
def test_gradients_of_the_power_weights(power, neg_clip):
    weighting = {"power": power, "neg_clip": neg_clip}
    solve = functools.partial(solve_nu, **weighting)
    g = functools.partial(signed_power, **weighting)
    q = random_q(9, shape=(5, 7))
    check_gradients(solve, g, q[3:])


@pytest.mark.parametrize("g", GENERAL)
def test_gradients_of_any_weighting(g):
    g_jax = functools.partial(g, xp=jnp)
    g_numpy = functools.partial(g, xp=np)
    solve = functools.partial(solve_nu_for, g=g_jax)
    q = random_q(10, shape=(5, 7))
    check_gradients(solve, g_numpy, q[3:])


# ---- dual of lam ---------------------------------------------------------------------
def dual(lam, q, eps_kl):
    """Eq. (30) averaged over states, in float64."""
    q = np.asarray(q, np.float64)
    n = q.shape[-1]
    log_mean = logsumexp(q / lam, axis=-1) - np.log(n)
    return np.mean(lam * eps_kl + lam * log_mean)


def kl_to_uniform(lam, q):
    """KL(softmax(q / lam) || uniform) averaged over states, in float64."""
    logits = np.asarray(q, np.float64) / lam
    log_p = logits - logsumexp(logits, axis=-1, keepdims=True)
    p = np.exp(log_p)
    entropy = -np.sum(p * log_p, axis=-1)
    n = q.shape[-1]
    return np.mean(np.log(n) - entropy)


@jax.jit
def run_dual(q, eps_kl, lr):
    """2,000 steps from lam = 1 -> lam, the KL before each step."""

    def step(log_lam, _):
        return update_lam(log_lam, q, eps_kl, lr)

    log_lam, kl = jax.lax.scan(step, jnp.zeros(()), length=2000)
    return jnp.exp(log_lam), kl


@pytest.mark.parametrize("eps_kl", [0.1, 1.5])
@pytest.mark.parametrize("lam", [0.2, 1.0, 7.0])
def test_lam_step_is_the_gradient_of_eq_30(lam, eps_kl):
    """The step on log lam is -lr d/dlam of eq. (30), without the chain rule's lam."""
    q = random_q(6)
    h = 1e-6
    above = dual(lam + h, q, eps_kl)
    below = dual(lam - h, q, eps_kl)
    gradient = (above - below) / (2 * h)

    log_lam = np.log(lam)
    new, kl = update_lam(log_lam, q, eps_kl, lr=0.5)
    assert new.shape == ()
    assert kl.shape == ()
    assert_allclose((log_lam - new) / 0.5, gradient, atol=2e-5)
    assert_allclose(kl, kl_to_uniform(lam, q), atol=2e-6)


@pytest.mark.parametrize("eps_kl", [0.2, 1.5, 3.0])  # log 32 = 3.47
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
def test_lam_reaches_the_minimum_of_the_dual_at_any_scale_of_q(eps_kl, scale):
    """There the KL is its bound."""
    q = random_q(7, shape=(20, 32), spread=scale)
    q = q[3:]
    lam, kl = run_dual(q, eps_kl, 0.15 / eps_kl)
    assert abs(kl[-1] - eps_kl) < 1e-4

    def dual_of_log(log_lam):
        return dual(np.exp(log_lam), q, eps_kl) / scale

    bounds = np.log([1e-3 * scale, 1e3 * scale])
    best = minimize_scalar(dual_of_log, bounds=bounds, method="bounded")
    assert lam == pytest.approx(np.exp(best.x), rel=5e-3)


def test_lam_is_safe_in_float32_for_large_q():
    """q / lam is 3e6, where float32 has steps of 0.25; differences of q are exact."""
    lam = np.float32(0.003)
    q = random_q(8, shape=(6, 32), offset=-1e4, spread=0.01)
    expected_kl = kl_to_uniform(np.float64(lam), q)
    expected = np.log(lam) - (1.5 - expected_kl)
    # without jit, which would hide a rounding
    log_lam, kl = update_lam(jnp.log(lam), q, 1.5, lr=1.0)
    assert_allclose(kl, expected_kl, rtol=1e-4)
    assert_allclose(log_lam, expected, rtol=1e-4)


@pytest.fixture(scope="module")
def lam_of_equal_samples():
    """Where lam ends if all samples of a state are equal: the KL is 0 throughout."""
    q = np.full((4, 32), 5.0, np.float32)
    lam, kl = run_dual(q, 1.0, 0.5)
    assert np.abs(kl).max() < 1e-6
    return lam


def test_equal_samples_drive_lam_to_its_minimum(lam_of_equal_samples):
    assert lam_of_equal_samples == pytest.approx(LAM_MIN, rel=1e-4)


@pytest.mark.parametrize("power", [1, 2])
def test_weights_have_mean_one_at_the_smallest_lam(power, lam_of_equal_samples):
    q = random_q(12, shape=(4, 32), spread=1e3)
    w = power_weights(q, lam_of_equal_samples, power, 0.0)
    assert_allclose(mean(w), 1, atol=1e-4)


def test_lam_returns_from_its_minimum_in_one_step(lam_of_equal_samples):
    """It is at least its share of the spread of q."""
    q = random_q(12, shape=(4, 32), spread=1e3)
    log_lam, kl = update_lam(jnp.log(lam_of_equal_samples), q, 1.0)
    spread = np.std(q, axis=-1, dtype=np.float64)
    lam_min = LAM_SHARE * spread.mean()
    assert np.exp(log_lam) == pytest.approx(lam_min, rel=1e-3)
    assert np.isfinite(kl)
