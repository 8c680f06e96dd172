"""The normaliser nu(s) and the dual of lam, against independent oracles in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.special import logsumexp

from common import LAM_MAX, LAM_MIN, solve_nu, solve_nu_for, update_lam

jit_solve_nu = jax.jit(solve_nu, static_argnums=(2, 3))
jit_update_lam = jax.jit(update_lam)
POWERS = [0.5, 1, 1.5, 2, 3]
CLIPS = [0.0, -0.05, -1.0]


def signed_power(y, power, neg_clip, xp=np):
    return xp.maximum(xp.sign(y) * xp.abs(y) ** power, neg_clip)


@functools.partial(jax.jit, static_argnums=(2, 3))
def power_weights(q, lam, power, neg_clip):
    """w as simpo_mujoco.weights forms it: q shifted by its maximum first."""
    q = q - q.max(axis=-1, keepdims=True)
    y = (q - solve_nu(q, lam, power, neg_clip)) / lam
    return signed_power(y, power, neg_clip, jnp)


@functools.partial(jax.jit, static_argnums=2)
def weights_for(q, lam, g):
    q = q - q.max(axis=-1, keepdims=True)
    return g((q - solve_nu_for(q, lam, g)) / lam)


def oracle_weights(q, lam, g):
    """w of each row of q [B, N] by Brent's method in float64; g maps numpy arrays."""
    out = []
    for row in np.asarray(q, np.float64):
        y = (row - row.max()) / lam
        lo, hi = -1.0, 1.0
        while np.mean(g(y + lo)) > 1:
            lo *= 2
        while np.mean(g(y + hi)) < 1:
            hi *= 2
        u = brentq(lambda u, y=y: np.mean(g(y + u)) - 1, lo, hi, xtol=1e-13, rtol=1e-13)
        out.append(g(y + u))
    return np.array(out)


def random_q(seed, shape=(12, 16), offset=0.0, spread=1.0):
    """Float32 values; row 0 is all equal, row 1 has ties, row 2 one outlier, if there are three."""
    q = np.random.default_rng(seed).normal(size=shape)
    if q.ndim == 2 and len(q) > 2:
        q[0], q[1], q[2, 0] = q[0, 0], np.round(q[1]), 30
    return np.float32(offset + spread * q)


# ---- solve_nu ---------------------------------------------------------------------------------


@pytest.mark.parametrize("neg_clip", CLIPS)
@pytest.mark.parametrize("lam", [0.03, 0.5, 1.0, 20.0])
def test_linear_weights_are_the_simplex_projection(lam, neg_clip):
    q, n = random_q(0), 16
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        project = optax.projections.projection_simplex
        scale = n * lam * (1 - neg_clip)
        rows = [project(jnp.asarray(row, jnp.float64), scale=scale) for row in q]
        expected = np.array(rows) / lam + neg_clip
    w = power_weights(q, lam, 1, neg_clip)
    np.testing.assert_allclose(w, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("neg_clip", CLIPS)
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("lam", [0.1, 1.0, 5.0])
def test_power_weights_equal_brents_method(lam, power, neg_clip):
    q = random_q(1)
    expected = oracle_weights(q, lam, lambda y: signed_power(y, power, neg_clip))
    w = power_weights(q, lam, power, neg_clip)
    # a power below 1 is steep at 0, where an error of y grows: compare y as well as w
    tol = 2e-5 if power >= 1 else 2e-3
    np.testing.assert_allclose(w, expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("power", [1, 2, 3])
def test_nu_moves_with_q_and_scales_with_it(power):
    """nu(c q + b, c lam) = c nu(q, lam) + b, and nu is returned in units of q."""
    q = np.round(random_q(2) * 64) / 64
    nu = jit_solve_nu(q, 0.5, power, -0.1)
    assert nu.shape == (12, 1) and nu.dtype == jnp.float32
    np.testing.assert_allclose(jit_solve_nu(4 * q + 8, 2.0, power, -0.1), 4 * nu + 8, atol=1e-5)
    y = (np.float64(q) - np.float64(nu)) / 0.5
    np.testing.assert_allclose(signed_power(y, power, -0.1).mean(axis=-1), 1, atol=1e-5)


GENERAL = {  # name: g on numpy arrays, g on jax arrays
    "exp": (np.exp, jnp.exp),
    "tanh": tuple(lambda y, xp=xp: 20 * xp.tanh(y / 10) + 0.25 for xp in (np, jnp)),
    "leaky": tuple(lambda y, xp=xp: xp.where(y > 0, y, 0.1 * y) for xp in (np, jnp)),
}


@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize("lam", [0.1, 1.0, 5.0])
def test_any_weighting_equals_brents_method(name, lam):
    q = random_q(3)
    expected = oracle_weights(q, lam, GENERAL[name][0])
    w = weights_for(q, lam, GENERAL[name][1])
    np.testing.assert_allclose(w, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("power,neg_clip", [(1, 0.0), (1, -0.2), (2, 0.0)])
def test_general_solver_agrees_with_the_closed_forms(power, neg_clip):
    q = random_q(4)
    bisected = jax.jit(solve_nu_for, static_argnums=2)(
        q, 0.7, lambda y: signed_power(y, power, neg_clip, jnp)
    )
    exact = jit_solve_nu(q, 0.7, power, neg_clip)
    np.testing.assert_allclose(bisected, exact, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("neg_clip", [0.0, -0.05])
@pytest.mark.parametrize("power", POWERS)
def test_mean_weight_is_one_over_the_whole_range(power, neg_clip):
    """|q| to 1e4, spread 1e-3 to 1e3, lam 1e-3 to 1e3, N to 4096, ties: mean 1 to 1e-4."""
    # powers below 1 are infinitely steep at y = 0: there one float32 step of nu is seen in w
    tol = 1e-4 if power >= 1 else 5e-3
    for n in (1, 2, 33, 4096):
        w = np.asarray(power_weights(*whole_range(n), power, neg_clip), np.float64)
        assert np.abs(w.mean(axis=-1) - 1).max() < tol, n


def test_mean_weight_of_the_general_solver_over_the_whole_range():
    for n in (1, 33, 4096):
        w = np.asarray(weights_for(*whole_range(n), jnp.exp), np.float64)
        assert np.abs(w.mean(axis=-1) - 1).max() < 1e-4, n


@pytest.mark.parametrize("power,neg_clip", [(1, -0.05), (2, 0.0), (3, -0.05)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_leading_shapes_and_lam(lead, power, neg_clip):
    """Each state is solved by itself; lam is one number or one for each state."""
    rng = np.random.default_rng(5)
    q = rng.normal(size=(*lead, 8)).astype(np.float32)
    lam = rng.uniform(0.2, 2, (*lead, 1)).astype(np.float32)
    nu = jit_solve_nu(q, lam, power, neg_clip)
    assert nu.shape == (*lead, 1)
    for i in np.ndindex(lead):
        alone = jit_solve_nu(q[i], float(lam[i][0]), power, neg_clip)
        assert alone.shape == (1,)
        np.testing.assert_allclose(nu[i], alone, rtol=1e-6, atol=1e-6)
    one, each = 0.7, np.full((*lead, 1), 0.7, np.float32)
    nus = (jit_solve_nu(q, lam, power, neg_clip) for lam in (one, each))
    np.testing.assert_allclose(*nus, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("power,neg_clip", [(1, -0.05), (2, 0.0), (2, -0.05)])
def test_jit_traces_once_and_vmap_agrees(power, neg_clip):
    traces = []

    @jax.jit
    def solve(q, lam):
        traces.append(1)
        return solve_nu(q, lam, power, neg_clip)

    one_by_one = jax.jit(jax.vmap(lambda q, lam: solve_nu(q, lam, power, neg_clip), (0, None)))
    for seed, lam in enumerate((0.1, 1.0, 10.0)):
        q = random_q(seed)
        nu = solve(q, lam)
        np.testing.assert_allclose(one_by_one(q, lam), nu, rtol=1e-5, atol=1e-5)
        if seed == 0:  # without jit
            np.testing.assert_allclose(solve_nu(q, lam, power, neg_clip), nu, rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


@jax.jit
def table_weights(q, lam, knots, values):
    """Weights of the increasing g through (knots, values), of slope 1 outside them."""

    def g(y):
        inside = jnp.interp(y, knots, values)
        return inside + jnp.minimum(y - knots[0], 0) + jnp.maximum(y - knots[-1], 0)

    return weights_for(q, lam, g)


@pytest.mark.parametrize("offset", [-20, 0, 20])
def test_theorem_3_5_target_measure_never_lowers_the_mean_of_q(offset):
    """Random increasing g, negative values included: mean(w q) >= mean(q), w of mean 1."""
    lowest = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        knots = np.sort(rng.uniform(-4, 4, 9)).astype(np.float32)
        values = np.cumsum(rng.exponential(1, 9)).astype(np.float32)
        values += np.float32(1) - values[rng.integers(3, 6)]  # passes 1
        q = random_q(seed + 100, offset=offset, spread=rng.uniform(0.5, 3))
        w = np.asarray(table_weights(q, 0.8, knots, values), np.float64)
        np.testing.assert_allclose(w.mean(axis=-1), 1, atol=2e-5)
        gain = np.mean(w * q, axis=-1) - np.mean(np.float64(q), axis=-1)
        assert gain.min() > -1e-3  # equal samples: 20 times the rounding of the mean
        assert gain[2:].min() > 0.01  # strictly, where q differs
        lowest.append(w.min())
    assert np.mean(np.array(lowest) < 0) > 0.8  # signed measures, in most of the cases


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


@pytest.mark.parametrize("lam", [0.2, 1.0, 7.0])
@pytest.mark.parametrize("eps_kl", [0.1, 1.5])
def test_lam_step_is_the_gradient_of_eq_30(lam, eps_kl):
    """The step on log lam is -lr d/dlam of eq. (30): the chain rule's factor lam is left out."""
    q = random_q(6)

    @jax.jit
    @jax.grad
    def gradient(lam):
        lse = jax.nn.logsumexp(q / lam, axis=-1)
        return jnp.mean(lam * eps_kl + lam * lse - lam * jnp.log(q.shape[-1]))

    new, kl = jit_update_lam(np.log(lam), q, eps_kl, 0.5)
    assert new.shape == kl.shape == ()
    np.testing.assert_allclose((np.log(lam) - new) / 0.5, gradient(lam), atol=2e-5)
    np.testing.assert_allclose(kl, kl_to_uniform(lam, q), atol=2e-6)


@pytest.mark.parametrize("eps_kl", [0.2, 1.5])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_lam_reaches_the_bound_and_the_minimum_of_the_dual(eps_kl, scale):
    q = random_q(7, (20, 32))[3:] * np.float32(scale)
    lam, kl = run_dual(q, eps_kl, 0.05)
    assert abs(kl[-1] - eps_kl) < 1e-4
    best = minimize_scalar(
        lambda x: dual(np.exp(x), q, eps_kl) / scale,
        bounds=(np.log(1e-3 * scale), np.log(1e3 * scale)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert lam == pytest.approx(np.exp(best.x), rel=2e-3)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_lam_is_safe_in_float32_for_large_q(offset):
    """q / lam is 3e6 here, where float32 is no finer than 0.25; differences of q are exact."""
    lam = np.float32(0.003)
    q = random_q(8, (6, 32), offset=offset, spread=0.01)
    log_lam, kl = update_lam(jnp.log(lam), q, 1.5, 1.0)  # without jit, which would hide a rounding
    expected = kl_to_uniform(np.float64(lam), q)
    np.testing.assert_allclose(kl, expected, rtol=1e-4)
    np.testing.assert_allclose(log_lam, np.log(lam) - (1.5 - expected), rtol=1e-4)


def test_lam_stays_in_its_bounds():
    """All samples equal (KL 0) drive lam down for ever, samples far apart drive it up."""
    for q, bound in ((np.full((1, 8), 5.0), LAM_MIN), (1e7 * np.arange(8.0)[None], LAM_MAX)):
        lam, kl = run_dual(np.float32(q), 1.0, 0.5)
        assert lam == pytest.approx(bound, rel=1e-5) and np.isfinite(kl).all()
