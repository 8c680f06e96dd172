"""The weights w of each --weighting: value, mean, clip, order, and what must not change them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
POWER_CASES = [name for name in CASES if name not in ("exp", "qvpo", "wd1")]
pytestmark = pytest.mark.usefixtures("quick_compiler")
each_case = pytest.mark.parametrize("name", CASES)
jit_weights = jax.jit(weights, static_argnums=0)


def args_of(name):
    return Args(num_samples=N, **CASES[name])


def power_of(name):
    args = args_of(name)
    return {"linear": 1, "square": 2, "power": args.power}[args.weighting]


def random_q(offset=0.0):
    """[8, N] on a grid of 1/64, so that adding an integer is exact in float32; with ties."""
    q = np.round(np.random.default_rng(0).normal(size=(8, N)) * 64) / 64
    q[:, 4] = q[:, 5]
    return np.float32(q + offset)


def expected(name, q, lam):
    """The weights in float64, by the table of the algorithm's page."""
    q = np.asarray(q, np.float64)
    if name == "exp":
        return N * softmax(q / lam, axis=-1)
    if name == "qvpo":
        return np.maximum(q - q.mean(axis=-1, keepdims=True), 0) / 0.5
    if name == "wd1":
        adv = (q - q.mean(axis=-1, keepdims=True)) / q.std(axis=-1, keepdims=True)
        return N * (softmax(adv, axis=-1) - softmax(-adv, axis=-1))
    power, neg_clip = power_of(name), args_of(name).neg_clip

    def g(y):
        return np.maximum(np.sign(y) * np.abs(y) ** power, neg_clip)

    def solve(row):
        nu = brentq(lambda nu: g((row - nu) / lam).mean() - 1, row.min() - 1e3, row.max())
        return g((row - nu) / lam)

    return np.array([solve(row) for row in q])


@each_case
def test_values(name):
    q = random_q()
    for lam in (0.1, 1.0, 10.0):
        w = jit_weights(args_of(name), q, jnp.float32(lam))
        assert w.shape == q.shape and w.dtype == jnp.float32
        np.testing.assert_allclose(w, expected(name, q, lam), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("name", POWER_CASES)
def test_the_smallest_weight_is_the_clip(name):
    """Where samples are cut off, the smallest weight is exactly l; nowhere is it smaller."""
    neg_clip = np.float32(args_of(name).neg_clip)
    w = np.asarray(jit_weights(args_of(name), random_q(), jnp.float32(0.1)))
    np.testing.assert_array_equal(w.min(axis=-1), neg_clip)
    wide = np.asarray(jit_weights(args_of(name), random_q(), jnp.float32(100.0)))
    assert wide.min() > 0.5  # a large lam: nothing is cut off


@each_case
def test_mean_order_shift_and_ties(name):
    """Mean 1 (wd1: 0) also far from 0; w does not move with q, and equal samples weigh equally."""
    args, lam, q = args_of(name), jnp.float32(0.3), random_q()
    w = np.asarray(jit_weights(args, q, lam))
    np.testing.assert_array_equal(w[:, 4], w[:, 5])
    np.testing.assert_array_equal(jit_weights(args, q + 4096, lam), w)
    if name != "qvpo":
        mean = np.float64(jit_weights(args, q - 1e4, jnp.float32(0.01))).mean(axis=-1)
        np.testing.assert_allclose(mean, 0 if name == "wd1" else 1, atol=1e-4)
    flat = np.asarray(jit_weights(args, np.full_like(q, 7.0), lam))
    np.testing.assert_allclose(flat, 0.0 if name in ("qvpo", "wd1") else 1.0, atol=1e-6)


@each_case
def test_no_gradient_flows(name):
    """The weights are constants of the policy's loss."""

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.grad, argnums=1)
    def gradient(args, q):
        return jnp.sum(weights(args, q, jnp.float32(0.5)) * jnp.arange(N)[None] + q)

    np.testing.assert_array_equal(gradient(args_of(name), random_q()), 1.0)


def test_the_papers_variants_by_hand():
    """Linear, Square and their negative variants (Tables 2 and 3) on four samples, lam = 1."""
    far, near = np.float32([[0, 0, 0, 10]]), np.float32([[0, 0.5, 0.5, 1]])
    for weighting in ("linear", "square"):
        for neg_clip, w in ((0.0, [0, 0, 0, 4]), (-0.05, [-0.05, -0.05, -0.05, 4.15])):
            args = Args(weighting=weighting, neg_clip=neg_clip, num_samples=4)
            np.testing.assert_allclose(jit_weights(args, far, jnp.float32(1)), [w], atol=1e-5)
    # nothing is cut off: y = z + (0, .5, .5, 1), mean y^2 = (z + .5)^2 + 1/8 = 1
    y = np.sqrt(7 / 8) - 0.5 + near[0].astype(np.float64)
    for weighting, w in (("linear", [0.5, 1, 1, 1.5]), ("square", y**2)):
        args = Args(weighting=weighting, num_samples=4)
        np.testing.assert_allclose(jit_weights(args, near, jnp.float32(1)), [w], atol=1e-5)
