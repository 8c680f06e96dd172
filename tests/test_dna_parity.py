"""The networks of DRAKES against the original PyTorch ones; the converter against hostile files.

fixtures/make_dna_fixtures.py made the files from the original classes. The npz beside them are
what dna/convert_drakes.py makes of the checkpoints; that it does is tested where torch is installed
(pip install -r dna/requirements.txt).
"""

import collections
import os
import pickle
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simpo_dna
from dna import convert_drakes, oracles
from dna.data import UsageError, load_arrays, named_leaves, nest, save_arrays

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "dna"
GENERATORS = [("pretrained", "raw"), ("pretrained", "ema"), ("finetuned", "raw")]


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """Most of the time of this file is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def fixture(name):
    with np.load(FIXTURES / f"{name}.npz") as file:
        return dict(file)


def generator(name):
    return simpo_dna.load_theta(simpo_dna.Args(data="x"), FIXTURES / f"{name}.npz")[0]


# ---- networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "weights"), GENERATORS)
def test_generator_agrees_with_the_original(name, weights):
    """Also that the folded time bias of every fifth layer matters."""
    data, theta = fixture(name), generator(f"{name}.{weights}")
    x, want = jnp.asarray(data["x"], jnp.int32), data[weights]
    np.testing.assert_allclose(jax.jit(simpo_dna.logits)(theta, x), want, rtol=1e-5, atol=2e-5)
    masked = want[data["x"] == 4]  # logits differ between positions that hold the same token
    assert len(masked) > 10 and np.all(masked.std(axis=0) > 0.05)
    for i in range(0, len(theta["layers"]), 5):
        without = jax.tree.map(jnp.asarray, theta)
        without["layers"][i]["time"] *= 0
        assert np.abs(jax.jit(simpo_dna.logits)(without, x) - want).max() > 1e-3
    assert np.abs(fixture("pretrained")["raw"] - fixture("pretrained")["ema"]).max() > 0.1


def test_a_fresh_generator_at_full_size_is_that_of_drakes():
    loaded, fresh = generator("pretrained.raw"), simpo_dna.init_generator(jax.random.key(0), 6, 20)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (loaded, fresh)]
    assert shapes[0] == shapes[1]
    weights = [w for name, w in named_leaves(fresh).items() if "'w'" in name and "norm" not in name]
    assert len(weights) == 23 and len({float(w.ravel()[0]) for w in weights}) == 23  # own keys
    key = jax.random.key(0)
    theta = jax.eval_shape(lambda: simpo_dna.init_generator(key, 128, 20))
    # without the time embedder, and a bias in place of each time layer's matrix and bias
    embedder = 64 + 128 * 128 + 128
    count = sum(x.size for x in jax.tree.leaves(theta))
    assert count + embedder + 20 * 128 * 128 == 3_326_661
    std = float(fresh["layers"][3]["conv"]["w"].std())
    assert abs(std * np.sqrt(9 * 6) - 1) < 0.15


def test_dilations():
    """Each layer of a 5-layer generator sees exactly 9 positions, its dilation apart."""
    fresh, f = simpo_dna.init_generator(jax.random.key(0), 8, 5), jax.jit(simpo_dna.logits)
    fresh["first"]["w"] = fresh["first"]["w"].at[np.arange(9) != 4].set(0)
    x = jnp.zeros((1, 700), jnp.int32)
    for layer, dilation in enumerate((1, 1, 4, 16, 64)):
        theta = jax.tree.map(jnp.copy, fresh)
        for i, other in enumerate(theta["layers"]):
            other["conv"]["w"] *= i == layer
            other["conv"]["b"] += 5.0  # every unit is on
        change = f(theta, x.at[0, 350].set(1)) - f(theta, x)
        changed = np.flatnonzero(np.abs(change[0]).max(axis=-1) > 1e-6)
        assert set(changed) == {350 + dilation * i for i in range(-4, 5)}


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


# ---- converter ---------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def refused(path, *words):
    with pytest.raises(UsageError) as error:
        convert_drakes.convert(path)
    message = str(error.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 400, message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("name", "weights"), [*GENERATORS, ("oracle", "raw")])
def test_conversion_of_the_originals(torch, name, weights, tmp_path):
    """omegaconf and pathlib objects included; byte for byte the npz that the other tests read."""
    kind, tree = convert_drakes.convert(FIXTURES / f"{name}.ckpt", weights)
    path = FIXTURES / ("enformer.npz" if name == "oracle" else f"{name}.{weights}.npz")
    save_arrays(tmp_path / "x.npz", tree, kind, data="gosai_all.csv")
    (ours, meta), (theirs, other) = (load_arrays(x, kind) for x in (tmp_path / "x.npz", path))
    assert ours.keys() == theirs.keys() and meta == other
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def hostile(target):
    shell, code = f"touch {target}", f"open({str(target)!r}, 'w')"
    yield Evil(os.system, shell)
    yield Evil(eval, code)
    yield Evil(exec, code)
    yield Evil(open, str(target), "w")
    yield [({"a": Evil(getattr, Evil(__import__, "os"), "system")},), Evil(eval, code)]
    yield collections.OrderedDict([("a", Evil(eval, code))])


@pytest.mark.parametrize("index", range(6))
def test_no_call_of_a_pickle_is_made(torch, index, tmp_path):
    """Neither a refused checkpoint nor one that is read runs anything."""
    target, path = tmp_path / "run", tmp_path / "x.ckpt"
    evil = list(hostile(target))[index]
    state = torch.load(FIXTURES / "finetuned.ckpt", weights_only=True)
    torch.save({"evil": evil, "state_dict": state}, path)
    try:
        assert convert_drakes.convert(path)[0] == "generator"
    except UsageError as error:
        assert str(error).isprintable()
    assert not target.exists()
    if index < 4:  # the pickle would have worked
        pickle.loads(pickle.dumps(evil))
        assert target.exists()


@pytest.mark.parametrize("fraction", [0, 0.001, 0.5, 0.999])
def test_a_damaged_checkpoint_is_one_line(torch, fraction, tmp_path):
    data, path = (FIXTURES / "pretrained.ckpt").read_bytes(), tmp_path / "x.ckpt"
    path.write_bytes(data[: int(fraction * len(data))])
    refused(path, "no checkpoint")
    flipped = bytearray(data)
    flipped[100 + int(3000 * fraction)] ^= 255  # in data.pkl
    path.write_bytes(flipped)
    try:
        convert_drakes.convert(path)
    except UsageError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"linear.bias": None}, ["linear.bias", "shape ()", "(4,)"]),
        ({"linear.bias": (3,)}, ["linear.bias", "(3,)"]),
        ({"linear.weight": (10**6, 5, 9)}, ["larger than the file"]),
        ({"linear.weight": np.nan}, ["not finite"]),
        ({"convs.4.weight": None, "convs.4.bias": None}, ["4 layers", "multiple of 5"]),
        ({"cls_embedder.weight": (4, 4)}, ["unexpected", "cls_embedder"]),
    ],
)
def test_a_wrong_network_is_refused(torch, change, words, tmp_path):
    state = dict(torch.load(FIXTURES / "finetuned.ckpt", weights_only=True))
    for name, value in change.items():
        name = f"backbone.{name}"
        if value is None:
            state.pop(name)
        elif isinstance(value, tuple):
            state[name] = torch.zeros(1).expand(value)  # one number, repeated
        else:
            state[name] = torch.full_like(state[name], value)
    torch.save(state, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", *words)


def test_other_files_are_refused(torch, tmp_path):
    with pytest.raises(UsageError, match="no EMA"):
        convert_drakes.convert(FIXTURES / "finetuned.ckpt", "ema")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "backbone.*")
    with zipfile.ZipFile(tmp_path / "y.ckpt", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
    refused(tmp_path / "y.ckpt")
    refused(FIXTURES / "oracle.npz")
    refused(tmp_path / "absent.ckpt")
