"""The oracle of DRAKES, Enformer, against the original PyTorch one: make_fixtures.py made the
outputs, dna/convert_drakes.py the npz."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dna import oracles
from dna.data import load_arrays, nest

FIXTURES = Path(__file__).parent / "fixtures"


def fixture(name):
    with np.load(FIXTURES / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def params():
    return nest(load_arrays(FIXTURES / "enformer.npz", "enformer")[0])


@pytest.mark.parametrize("length", [200, 128, 611])
def test_oracle_agrees_with_the_original(params, length):
    data = fixture("oracle")
    x, want = jnp.asarray(data[f"x{length}"], jnp.int32), data[f"y{length}"]
    got, scale = jax.jit(oracles.enformer)(params, x), np.abs(want).max(axis=0)
    assert np.all(want.std(axis=0) > 0.1 * scale)  # it depends on the sequence
    np.testing.assert_allclose(got / scale[None], want / scale[None], rtol=0, atol=1e-4)
    column = oracles.load_oracle(f"enformer:{FIXTURES / 'enformer.npz'}", column=2)
    np.testing.assert_allclose(column.apply(column.params, x), got[:, 2], rtol=1e-6)


def test_every_parameter_of_the_oracle_matters(params):
    x = jnp.asarray(fixture("oracle")["x200"], jnp.int32)
    grads = jax.jit(jax.grad(lambda params: jnp.sum(oracles.enformer(params, x) ** 2)))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-6, jax.tree_util.keystr(path)


def test_position_features_agree_with_the_original():
    """At the published size; the original's gamma densities have float32's rounding of lgamma."""
    got, want = oracles.position_features(5, 192), fixture("oracle")["positions"]
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-4)
    exact = np.r_[0:64, 96:160]  # exponentials and masks
    np.testing.assert_allclose(got[:, exact], want[:, exact], rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [1, 4])
def test_short_convolution_is_the_convolution(length):
    k_w, k_b, k_x = jax.random.split(jax.random.key(0), 3)
    layer = {"w": jax.random.normal(k_w, (5, 3, 7)), "b": jax.random.normal(k_b, (7,))}
    x = jax.random.normal(k_x, (2, length, 3))
    got = oracles.short_conv(layer, x)
    np.testing.assert_allclose(got, oracles.conv(layer, x), rtol=1e-5, atol=1e-5)
