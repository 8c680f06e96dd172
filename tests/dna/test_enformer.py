"""dna/enformer.py against outputs of the original PyTorch oracle of DRAKES.

make_fixtures.py made the outputs, dna/convert_drakes.py the parameters."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dna.enformer import enformer, position_features, short_conv
from dna.files import load_arrays, nest
from dna.layers import conv
from dna.oracles import load_oracle

pytestmark = pytest.mark.usefixtures("quick_compiler")
FIXTURES = Path(__file__).parent / "fixtures"
CONVERTED = FIXTURES / "enformer.safetensors"


@pytest.fixture(scope="module")
def original():
    with np.load(FIXTURES / "oracle.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def params():
    arrays, _ = load_arrays(CONVERTED, "enformer")
    return nest(arrays)


@pytest.mark.parametrize("length", [200, 128, 611])
def test_oracle_agrees_with_the_original(params, original, length):
    x = jnp.asarray(original[f"x{length}"], jnp.int32)
    want = original[f"y{length}"]
    scale = np.abs(want).max(axis=0)
    assert np.all(want.std(axis=0) > 0.1 * scale)  # it depends on the sequence
    got = jax.jit(enformer)(params, x)
    error = np.abs(got - want).max(axis=0)
    assert np.all(error < 1e-4 * scale)
    score = load_oracle(f"enformer:{CONVERTED}", column=2)
    q = score(np.asarray(x))
    np.testing.assert_allclose(q, got[:, 2], rtol=1e-4, atol=1e-3)


def test_every_parameter_of_the_oracle_matters(params, original):
    x = jnp.asarray(original["x200"], jnp.int32)

    def loss(params):
        return jnp.sum(enformer(params, x) ** 2)

    grads = jax.jit(jax.grad(loss))(params)
    for path, grad in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(grad).all(), name
        assert np.abs(grad).max() > 1e-6, name


def test_position_features_agree_with_the_original(original):
    """At the published size; its gamma densities have float32's rounding of lgamma."""
    got = position_features(5, 192)
    want = original["positions"]
    error = np.abs(got - want).max(axis=0)
    exact = np.r_[0:64, 96:160]  # exponentials and masks
    assert np.all(error < 5e-4)
    assert np.all(error[exact] < 1e-6)


@pytest.mark.parametrize("length", [1, 4])
def test_short_convolution_is_the_convolution(length):
    rng = np.random.default_rng(0)
    layer = {
        "w": jnp.float32(rng.normal(size=(5, 3, 7))),
        "b": jnp.arange(7.0),
    }
    x = jnp.float32(rng.normal(size=(2, length, 3)))
    got = short_conv(layer, x)
    want = conv(layer, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
