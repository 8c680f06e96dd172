"""The weights w of each --weighting: value, mean, clip, order and invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import brentq
from scipy.special import softmax

from simpo_mujoco import Args, weights

N = 16
CASES = {
    "exp": {"weighting": "exp"},
    "linear": {"weighting": "linear"},
    "square": {"weighting": "square"},
    "power": {"weighting": "power", "power": 1.5},
    "lin_neg": {"weighting": "linear", "neg_clip": -0.05},
    "sqr_neg": {"weighting": "square", "neg_clip": -0.05},
    "power_neg": {"weighting": "power", "power": 3.0, "neg_clip": -0.5},
    "qvpo": {"weighting": "qvpo"},
    "wd1": {"weighting": "wd1"},
}
POWER_CASES = [
    "linear",
    "square",
    "power",
    "lin_neg",
    "sqr_neg",
    "power_neg",
]
pytestmark = pytest.mark.usefixtures("quick_compiler")
each_case = pytest.mark.parametrize("name", CASES)
jit_weights = jax.jit(weights, static_argnums=0)


def args_of(name):
    return Args(num_samples=N, **CASES[name])


def power_of(name):
    args = args_of(name)
    powers = {
        "linear": 1,
        "square": 2,
        "power": args.power,
    }
    return powers[args.weighting]


def random_q():
    """[8, N] on a grid of 1/64, so that adding an integer is exact; with ties."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(8, N))
    q = np.round(q * 64) / 64
    q[:, 4] = q[:, 5]
    return np.float32(q)


def advantage(q):
    return q - q.mean(axis=-1, keepdims=True)


def solve_row(row, lam, g):
    """Weights g(y) of mean 1 for one state, by Brent's method in float64."""

    def excess(nu):
        y = (row - nu) / lam
        return g(y).mean() - 1

    nu = brentq(excess, row.min() - 1e3, row.max())
    return g((row - nu) / lam)


def expected_weights(name, q, lam):
    """The weights in float64, by the table of the algorithm's page."""
    q = np.asarray(q, np.float64)
    if name == "exp":
        return N * softmax(q / lam, axis=-1)
    if name == "qvpo":
        return np.maximum(advantage(q), 0) / 0.5
    if name == "wd1":
        scaled = advantage(q) / q.std(axis=-1, keepdims=True)
        good = softmax(scaled, axis=-1)
        bad = softmax(-scaled, axis=-1)
        return N * (good - bad)
    power = power_of(name)
    neg_clip = args_of(name).neg_clip

    def g(y):
        w = np.sign(y) * np.abs(y) ** power
        return np.maximum(w, neg_clip)

    rows = [solve_row(row, lam, g) for row in q]
    return np.array(rows)


@pytest.mark.parametrize("lam", [0.1, 1.0, 10.0])
@each_case
def test_values(name, lam):
    q = random_q()
    w = jit_weights(args_of(name), q, jnp.float32(lam))
    assert w.shape == q.shape
    assert w.dtype == jnp.float32
    expected = expected_weights(name, q, lam)
    assert_allclose(w, expected, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("name", POWER_CASES)
def test_the_smallest_weight_is_the_clip(name):
    """Where samples are cut off, the smallest weight is l exactly, never below."""
    args = args_of(name)
    w = jit_weights(args, random_q(), jnp.float32(0.1))
    smallest = np.min(w, axis=-1)
    assert_array_equal(smallest, np.float32(args.neg_clip))


@pytest.mark.parametrize("name", POWER_CASES)
def test_a_large_lam_cuts_nothing_off(name):
    w = jit_weights(args_of(name), random_q(), jnp.float32(100.0))
    assert w.min() > 0.5


@each_case
def test_equal_samples_of_a_state_weigh_equally(name):
    w = jit_weights(args_of(name), random_q(), jnp.float32(0.3))
    assert_array_equal(w[:, 4], w[:, 5])


@each_case
def test_weights_do_not_move_with_q(name):
    args = args_of(name)
    lam = jnp.float32(0.3)
    q = random_q()
    w = jit_weights(args, q, lam)
    assert_array_equal(jit_weights(args, q + 4096, lam), w)


@pytest.mark.parametrize("name", [*POWER_CASES, "exp", "wd1"])
def test_the_mean_also_holds_far_from_zero(name):
    q = random_q() - 1e4
    w = jit_weights(args_of(name), q, jnp.float32(0.01))
    mean = np.float64(w).mean(axis=-1)
    expected = 0 if name == "wd1" else 1
    assert_allclose(mean, expected, atol=1e-4)


@each_case
def test_a_state_of_equal_samples_has_equal_weights(name):
    q = np.full((8, N), 7.0, np.float32)
    w = jit_weights(args_of(name), q, jnp.float32(0.3))
    expected = 0 if name in ("qvpo", "wd1") else 1
    assert_allclose(w, expected, atol=1e-6)


@each_case
def test_no_gradient_flows(name):
    """The weights are constants of the policy's loss."""

    def loss(q):
        w = weights(args_of(name), q, jnp.float32(0.5))
        cost = jnp.broadcast_to(jnp.arange(N), w.shape)
        return jnp.sum(w * cost + q)

    gradient = jax.jit(jax.grad(loss))
    assert_array_equal(gradient(random_q()), 1.0)


# ---- by hand -------------------------------------------------------------------------
def weights_of_one_state(weighting, neg_clip, q):
    """lam = 1 -> w [N]."""
    args = Args(weighting=weighting, neg_clip=neg_clip, num_samples=len(q))
    q = jnp.array([q], jnp.float32)
    w = jit_weights(args, q, jnp.float32(1))
    return w[0]


@pytest.mark.parametrize("weighting", ["linear", "square"])
def test_one_sample_far_above_the_rest(weighting):
    """Linear, Square and their negative variants (Tables 2 and 3)."""
    q = [0, 0, 0, 10]
    w = weights_of_one_state(weighting, 0.0, q)
    assert_allclose(w, [0, 0, 0, 4], atol=1e-5)
    w = weights_of_one_state(weighting, -0.05, q)
    assert_allclose(w, [-0.05, -0.05, -0.05, 4.15], atol=1e-5)


def test_linear_with_nothing_cut_off():
    w = weights_of_one_state("linear", 0.0, [0, 0.5, 0.5, 1])
    assert_allclose(w, [0.5, 1, 1, 1.5], atol=1e-5)


def test_square_with_nothing_cut_off():
    """y = z + q with mean y^2 = (z + 1/2)^2 + 1/8 = 1."""
    q = np.array([0, 0.5, 0.5, 1])
    z = np.sqrt(7 / 8) - 0.5
    w = weights_of_one_state("square", 0.0, q)
    assert_allclose(w, (z + q) ** 2, atol=1e-5)
