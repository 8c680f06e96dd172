"""The networks of DRAKES against the original PyTorch ones, the reader against hostile files.

fixtures/make_dna_fixtures.py made the files from the original classes; no test needs torch.
"""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import drakes
import simpo_dna

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "dna"
GENERATORS = [("pretrained", "raw"), ("pretrained", "ema"), ("finetuned", "raw")]


def fixture(name):
    with np.load(FIXTURES / f"{name}.npz") as file:
        return dict(file)


def refused(function, *args):
    """The message of the BadFile that the call raises; one line that says what was expected."""
    with pytest.raises(drakes.BadFile) as error:
        function(*args)
    message = str(error.value)
    assert message.isprintable() and len(message) < 400 and "expected" in message, message
    return message


# ---- torch files made by hand -----------------------------------------------------------------


class Call:
    """Pickles as the call function(*args), with a state and items if there are any."""

    def __init__(self, function, *args, state=None, pairs=None):
        self.call = (function, args, state, None, iter(pairs) if pairs else None)

    def __reduce__(self):
        return self.call


class Fake:
    """Pickles as a global name without that module being there."""

    def __init__(self, module, name):
        self.name = (module, name)


class Saved(tuple):
    """Pickles as torch's persistent id."""


class Pickler(pickle._Pickler):  # the Python one, whose save can be overridden
    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, Fake):
            return super().save(obj, save_persistent_id)
        self.write(pickle.GLOBAL + "{}\n{}\n".format(*obj.name).encode())

    def persistent_id(self, obj):
        return tuple(obj) if isinstance(obj, Saved) else None

    def save_reduce(self, func, args, *rest, **kwargs):
        if not isinstance(func, Fake):
            return super().save_reduce(func, args, *rest, **kwargs)
        state, _, pairs = (*rest, None, None, None)[:3]
        self.save(func)
        self.save(args)
        self.write(pickle.REDUCE)
        self._batch_setitems(pairs or iter(()))
        if state is not None:
            self.save(state)
            self.write(pickle.BUILD)


def dumps(tree):
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(tree)
    return file.getvalue()


def write_zip(path, data, storages=(), compression=zipfile.ZIP_STORED, **entries):
    """A torch file with data.pkl and data/0, data/1, ... of these bytes."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        for name, content in entries.items():
            file.writestr(f"archive/{name}", content)
        for i, storage in enumerate(storages):
            file.writestr(f"archive/data/{i}", storage)
    return path


def storage(key, kind, size):
    return Saved(("storage", Fake("torch", kind), str(key), "cpu", size))


def tensor(key, kind, size, shape, strides=None, offset=0):
    strides = strides or tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    args = (storage(key, kind, size), offset, shape, strides, False, OrderedDict())
    return Call(Fake("torch._utils", "_rebuild_tensor_v2"), *args)


def read(path, name="x"):
    return drakes.read_tensor(drakes.read_torch(path)[name], name)


# ---- networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "weights"), GENERATORS)
def test_generator_agrees_with_the_original(name, weights):
    data = fixture(name)
    theta = drakes.load_generator(FIXTURES / f"{name}.ckpt", weights)
    got = jax.jit(simpo_dna.logits)(theta, jnp.asarray(data["x"], jnp.int32))
    want = data[weights]
    assert got.dtype == jnp.float32 and got.shape == (*data["x"].shape, 5)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    # the agreement means something: logits differ between positions that hold the same token
    masked = want[data["x"] == 4]
    assert len(masked) > 10 and np.all(masked.std(axis=0) > 0.05)


def test_raw_and_ema_weights_differ():
    data = fixture("pretrained")
    assert np.abs(data["raw"] - data["ema"]).max() > 0.1


@pytest.mark.parametrize("layer", [0, 7, 19])
def test_generator_depends_on_the_folded_time_bias(layer):
    data = fixture("pretrained")
    theta = drakes.load_generator(FIXTURES / "pretrained.ckpt")
    theta["layers"][layer]["time"] *= 0
    got = simpo_dna.logits(theta, jnp.asarray(data["x"], jnp.int32))
    assert np.abs(got - data["raw"]).max() > 1e-3


def test_fresh_generator_has_the_shapes_of_a_loaded_one():
    loaded = drakes.load_generator(FIXTURES / "pretrained.ckpt")
    fresh = simpo_dna.init_generator(jax.random.key(0), 6, 20)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (loaded, fresh)]
    assert shapes[0] == shapes[1]
    convs = [layer["conv"]["w"] for layer in fresh["layers"]] + [fresh["first"]["w"]]
    assert len({float(w.sum()) for w in convs}) == 21  # no key is used twice
    assert all(not layer["time"].any() for layer in fresh["layers"])


def test_fresh_generator_at_full_size_has_the_parameters_of_drakes():
    theta = simpo_dna.init_generator(jax.random.key(0), 128, 20)
    # without the time embedder, and a bias in place of each time layer's matrix and bias
    embedder = 64 + 128 * 128 + 128
    count = sum(x.size for x in jax.tree.leaves(theta))
    assert count + embedder + 20 * 128 * 128 == 3_326_661
    std = float(theta["layers"][3]["conv"]["w"].std())
    assert abs(std * np.sqrt(9 * 128) - 1) < 0.05
    x = jax.random.randint(jax.random.key(1), (2, 50), 0, 5)
    spread = simpo_dna.logits(theta, x).std(axis=(0, 1))
    assert np.all((spread > 0.05) & (spread < 5))


@pytest.mark.parametrize("num_layers", [0, 4, 12, -5])
def test_layers_of_the_generator_come_in_fives(num_layers):
    with pytest.raises(simpo_dna.UsageError, match=f"multiple of 5, got {num_layers}$"):
        simpo_dna.Args(num_layers=num_layers)


@pytest.mark.parametrize("layer", range(5))
def test_dilations(layer):
    """A layer of a 5-layer generator sees exactly 9 positions, its dilation apart."""
    theta = simpo_dna.init_generator(jax.random.key(0), 8, 5)
    dilation = (1, 1, 4, 16, 64)[layer]
    for i, other in enumerate(theta["layers"]):
        other["conv"]["w"] *= i == layer
        other["conv"]["b"] += 5.0  # every unit is on
    theta["first"]["w"] = theta["first"]["w"].at[np.arange(9) != 4].set(0)
    x = jnp.zeros((1, 700), jnp.int32)
    change = simpo_dna.logits(theta, x.at[0, 350].set(1)) - simpo_dna.logits(theta, x)
    changed = np.flatnonzero(np.abs(change[0]).max(axis=-1) > 1e-6)
    assert set(changed) == {350 + dilation * i for i in range(-4, 5)}


@pytest.mark.parametrize("length", [1, 2, 4, 5, 9])
def test_short_convolution_is_the_convolution(length):
    k_w, k_b, k_x = jax.random.split(jax.random.key(0), 3)
    layer = {"w": jax.random.normal(k_w, (5, 3, 7)), "b": jax.random.normal(k_b, (7,))}
    x = jax.random.normal(k_x, (2, length, 3))
    got = drakes.short_conv(layer, x)
    np.testing.assert_allclose(got, drakes.conv(layer, x), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def oracle():
    return drakes.load_oracle(FIXTURES / "oracle.ckpt")


@pytest.mark.parametrize("length", [200, 128, 611])
def test_oracle_agrees_with_the_original(oracle, length):
    data = fixture("oracle")
    x, want = jnp.asarray(data[f"x{length}"], jnp.int32), data[f"y{length}"]
    got = jax.jit(drakes.enformer)(oracle, x)
    scale = np.abs(want).max(axis=0)
    assert np.all(want.std(axis=0) > 0.1 * scale)  # it depends on the sequence
    np.testing.assert_allclose(got / scale[None], want / scale[None], rtol=0, atol=1e-4)


def test_oracle_takes_one_hot_and_agrees_across_batches(oracle):
    data = fixture("oracle")
    one_hot = jax.nn.one_hot(jnp.asarray(data["x128"][:1], jnp.int32), 4)
    got = jax.jit(drakes.enformer)(oracle, one_hot)
    np.testing.assert_allclose(got, data["y128"][:1], rtol=1e-4, atol=1e-3)


def test_every_parameter_of_the_oracle_matters(oracle):
    x = jnp.asarray(fixture("oracle")["x200"], jnp.int32)
    grads = jax.jit(jax.grad(lambda params: jnp.sum(drakes.enformer(params, x) ** 2)))(oracle)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-6, jax.tree_util.keystr(path)


def test_position_features_agree_with_the_original():
    """At the published size; the original's gamma densities have float32's rounding of lgamma."""
    got, want = drakes.position_features(5, 192), fixture("oracle")["positions"]
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-4)
    exact = np.r_[0:64, 96:160]  # exponentials and masks
    np.testing.assert_allclose(got[:, exact], want[:, exact], rtol=0, atol=1e-6)


def test_odd_lengths_keep_their_last_position():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    w = jax.random.normal(jax.random.key(1), (3, 3))
    pooled = drakes.attention_pool(w, x)
    np.testing.assert_allclose(pooled[:, 2], x[:, 4], rtol=1e-6)
    weight = jax.nn.softmax(x[:, 2:4] @ w, axis=1)
    np.testing.assert_allclose(pooled[:, 1], (weight * x[:, 2:4]).sum(axis=1), rtol=1e-5)


# ---- the reader -------------------------------------------------------------------------------

KINDS = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
}


@pytest.mark.parametrize("kind", KINDS)
def test_reader_is_exact_to_the_bit(tmp_path, kind):
    """All bit patterns, NaN included, through contiguous, strided, shared and empty views."""
    dtype = np.dtype(KINDS[kind])
    raw = np.random.default_rng(0).bytes(24 * dtype.itemsize)
    array = np.frombuffer(raw, dtype)
    tree = {
        "x": tensor(0, kind, 24, (2, 3, 4)),
        "transposed": tensor(0, kind, 24, (4, 3, 2), (1, 4, 12)),
        "part": tensor(0, kind, 24, (2, 2), (12, 2), offset=5),
        "repeated": tensor(0, kind, 24, (3, 4), (0, 1), offset=20),
        "scalar": tensor(0, kind, 24, (), offset=23),
        "empty": tensor(0, kind, 24, (0, 3)),
    }
    path = write_zip(tmp_path / "x.ckpt", dumps(tree), [raw])
    blocks = array.reshape(2, 3, 4)
    want = {
        "x": blocks,
        "transposed": blocks.transpose(2, 1, 0),
        "part": array[[[5, 7], [17, 19]]],
        "repeated": np.stack([array[20:]] * 3),
        "scalar": array[23],
        "empty": np.zeros((0, 3), dtype),
    }
    for name in tree:
        got = read(path, name)
        assert got.dtype == dtype and got.shape == want[name].shape
        assert got.tobytes() == want[name].tobytes(), name


def test_reader_knows_bool_and_bfloat16(tmp_path):
    values = np.array([1.0, -2.5, 0.0078125, np.inf, -0.0, 3e38], np.float32)
    upper = (values.view(np.uint32) >> 16).astype("<u2")
    tree = {
        "x": tensor(0, "BFloat16Storage", 6, (3, 2), (1, 3)),
        "flag": tensor(1, "BoolStorage", 3, (3,)),
        "scalar": tensor(0, "BFloat16Storage", 6, (), offset=1),
    }
    path = write_zip(tmp_path / "x.ckpt", dumps(tree), [upper.tobytes(), b"\1\0\1"])
    want = (upper.astype(np.uint32) << 16).view(np.float32).reshape(2, 3).T
    assert read(path).dtype == np.float32 and read(path).tobytes() == want.tobytes()
    assert read(path, "flag").dtype == bool and read(path, "flag").tolist() == [True, False, True]
    assert read(path, "scalar") == -2.5 and read(path, "scalar").shape == ()


def test_reader_takes_parameters_numbers_and_strings(tmp_path):
    inner = tensor(0, "FloatStorage", 2, (2,))
    tree = {
        "x": Call(Fake("torch._utils", "_rebuild_parameter"), inner, True, OrderedDict()),
        "ordered": OrderedDict(a=1, b=[2.5, None, (True, "c")]),
        "nested": {"epoch": 10**20, 3: "dropped"},
    }
    path = write_zip(tmp_path / "x.ckpt", dumps(tree), [np.float32([4, 5]).tobytes()])
    got = drakes.read_torch(path)
    assert read(path).tolist() == [4, 5]
    assert got["ordered"] == {"a": 1, "b": [2.5, None, (True, "c")]}
    assert got["nested"] == {"epoch": 10**20}


@pytest.mark.parametrize("protocol", range(6))
def test_reader_takes_every_protocol(tmp_path, protocol):
    tree = {"a": [1, -2, 2**40, 1.5, "ä", b"bytes", (), (1,), (1, 2, 3, 4)], "b": {"c": None}}
    path = write_zip(tmp_path / "x.ckpt", pickle.dumps(tree, protocol))
    if protocol < 3:  # bytes are a call there
        tree["a"][5] = drakes.INERT
    assert drakes.read_torch(path) == tree


def test_original_checkpoint_is_read_without_its_optimiser(monkeypatch):
    """Only data.pkl, byteorder and the tensors of the network are read, each once."""
    reads = []
    read_entry = drakes.read_entry

    def record(path, entry, start, size):
        reads.append(entry.filename)
        return read_entry(path, entry, start, size)

    monkeypatch.setattr(drakes, "read_entry", record)
    drakes.load_generator(FIXTURES / "pretrained.ckpt")
    with zipfile.ZipFile(FIXTURES / "pretrained.ckpt") as file:
        storages = [name for name in file.namelist() if "/data/" in name]
    assert len(storages) == 129 + 128 + 40 * 3  # state_dict, EMA, AdamW of the convolutions
    assert len(reads) == len(set(reads)) == 128 + 2


# ---- hostile files ----------------------------------------------------------------------------


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def hostile_calls(target):
    """Objects that run code, or try to, when pickle loads them; `target` would appear."""
    shell, code = f"touch {target}", f"open({str(target)!r}, 'w')"
    yield "system", Evil(os.system, shell)
    yield "eval", Evil(eval, code)
    yield "exec", Evil(exec, code)
    yield "open", Evil(open, str(target), "w")
    yield "nested", [({"a": Evil(getattr, Evil(__import__, "os"), "system")},), Evil(eval, code)]
    yield "argument", Call(Fake("torch._utils", "_rebuild_parameter"), Evil(os.system, shell), 1)
    yield "called result", Call(Fake("torch", "device"), Evil(eval, code), state=Evil(eval, code))
    yield "ordered", Call(Fake("collections", "OrderedDict"), [["a", Evil(eval, code)]])


def raw_pickles(target):
    """Pickles written by hand for opcodes that pickle's own writer does not produce."""
    shell = f"touch {target}".encode()
    yield "INST", b"(S'" + shell + b"'\nios\nsystem\n."
    yield "OBJ", b"(cos\nsystem\nS'" + shell + b"'\no."
    yield "NEWOBJ", b"\x80\x02cos\nsystem\nX" + struct.pack("<I", len(shell)) + shell + b"\x85\x81."
    yield "NEWOBJ_EX", b"\x80\x04cos\nsystem\n)}\x92."
    yield (
        "STACK_GLOBAL",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c%c%s\x85R." % (len(shell), shell),
    )
    yield "BUILD a class", b"\x80\x02ccollections\nOrderedDict\n}X\x01\0\0\0aK\x01sb."
    yield "EXT", b"\x80\x02\x82\x01)R."
    yield "PERSID", b"Pstorage\n."
    yield "set", b"\x80\x04\x8f(K\x01\x90."
    yield "frozenset", b"\x80\x04(K\x01\x91."
    yield "buffers", b"\x80\x05\x97\x98."


CALLS = [name for name, _ in hostile_calls("")]
RAW = [name for name, _ in raw_pickles("")]


@pytest.mark.parametrize("name", CALLS)
def test_no_call_of_a_pickle_is_made(tmp_path, name):
    target, raw = tmp_path / "run", np.float32([1]).tobytes()
    evil = dict(hostile_calls(target))[name]
    tree = {"evil": evil, "x": tensor(0, "FloatStorage", 1, (1,))}
    path = write_zip(tmp_path / "x.ckpt", dumps(tree), [raw])
    assert read(path).tolist() == [1] and not target.exists()
    if name in ("system", "eval", "exec", "open"):  # the pickle would have worked
        pickle.loads(pickle.dumps(evil))
        assert target.exists()


@pytest.mark.parametrize("name", RAW)
def test_no_opcode_calls(tmp_path, name):
    target = tmp_path / "run"
    data = dict(raw_pickles(target))[name]
    path = write_zip(tmp_path / "x.ckpt", data)
    tree = drakes.read_torch(path)
    assert not target.exists()
    assert tree is drakes.INERT or isinstance(tree, drakes.Name | int | str)
    refused(drakes.load_generator, path)
    refused(drakes.load_oracle, path)


def test_names_of_a_pickle_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "spy.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    tree = {"a": Call(Fake("spy", "f"), 1), "b": Fake("spy", "g")}
    got = drakes.read_torch(write_zip(tmp_path / "x.ckpt", dumps(tree)))
    assert got == {"a": drakes.INERT, "b": drakes.Name("spy g")}


BROKEN_PICKLES = {
    "empty": b"",
    "no stop": b"\x80\x02}",
    "underflow": b"\x80\x02R.",
    "pops nothing": b"0.",
    "only stop": b".",
    "no mark": b"\x80\x02K\x01u.",
    "mark below": b"\x80\x02K\x01(00t.",
    "odd items": b"\x80\x02}(K\x01u.",
    "no memo": b"\x80\x02h\x07.",
    "unknown opcode": b"\x80\x02\xff.",
    "short string": b"\x80\x02X\xff\xff\xff\x7fa.",
    "huge string": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fa.",
    "huge long": b"\x80\x02\x8b\xff\xff\xff\x7f\1.",
    "negative long": b"\x80\x02\x8b\xff\xff\xff\xff\1.",
    "decimal long": b"L" + b"9" * 100_000 + b"L\n.",
    "not text": b"\x80\x02X\1\0\0\0\xff.",
    "names are no strings": b"\x80\x04K\1K\2\x93.",
}


@pytest.mark.parametrize("name", BROKEN_PICKLES)
def test_broken_pickle_is_refused(tmp_path, name):
    path = write_zip(tmp_path / "x.ckpt", BROKEN_PICKLES[name])
    assert str(path) in refused(drakes.read_torch, path)


BOMBS = {
    "deep tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep key": b"\x80\x02})" + b"\x85" * 200_000 + b"K\1s.",
    "deep shape": b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",
    "memo": b"\x80\x02K\1r\xff\xff\xff\xff.",
    "doubling": b"\x80\x02K\1" + b"2\x86" * 100 + b".",
    "itself": b"\x80\x02]q\0h\0a.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_harmless(tmp_path, name):
    """Nesting, sharing and memo numbers take no more stack or memory than the file has bytes."""
    path = write_zip(tmp_path / "x.ckpt", BOMBS[name])
    drakes.read_torch(path)
    refused(drakes.load_generator, path)


def generator_file(path, **change):
    """A valid 5-layer generator of width 4 with some of its tensors replaced."""
    h, shapes = 4, {"linear": (4, 5, 9), "time_embedder.1": (4, 4)}
    for i in range(5):
        shapes |= {f"convs.{i}": (h, h, 9), f"time_layers.{i}.dense": (h, h), f"norms.{i}": (h,)}
    shapes |= {"final_conv.0": (h, h, 1), "final_conv.2": (5, h, 1)}
    tree = {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tree[f"backbone.{name}.weight"] = tensor(0, "FloatStorage", 400, shape)
        tree[f"backbone.{name}.bias"] = tensor(0, "FloatStorage", 400, shape[:1])
        assert size <= 400
    for name, value in change.items():
        tree[f"backbone.{name}"] = value
    tree = {name: value for name, value in tree.items() if value is not None}
    numbers = np.linspace(-1, 1, 400, dtype=np.float32)
    broken = np.full(400, np.nan, np.float32)
    return write_zip(path, dumps(tree), [numbers.tobytes(), broken.tobytes()])


def test_generator_of_shared_storages_is_read(tmp_path):
    theta = drakes.load_generator(generator_file(tmp_path / "x.ckpt"))
    assert theta["first"]["w"].shape == (9, 5, 4) and len(theta["layers"]) == 5


def huge(shape, strides, offset=0, size=400):
    return tensor(0, "FloatStorage", size, shape, strides, offset)


DAMAGED = {
    "beyond storage": huge((4, 5, 9), (450, 9, 1)),
    "offset beyond": huge((4, 5, 9), (45, 9, 1), offset=300),
    "size beyond the file": huge((4, 5, 9), (450, 9, 1), size=10_000),
    "repeated": huge((4, 5, 9), (0, 0, 0), size=100),
    "negative offset": huge((4, 5, 9), (45, 9, 1), offset=-4),
    "negative stride": huge((4, 5, 9), (-45, 9, 1), offset=300),
    "huge shape": huge((2**40, 5, 9), (0, 0, 0)),
    "huge numbers": huge((10**4000, 5, 9), (0, 0, 0)),
    "huge product": huge((2**40,) * 30, (0,) * 30),
    "many dimensions": huge((1,) * 100, (1,) * 100),
    "negative shape": huge((-4, -5, 9), (45, 9, 1)),
    "fewer strides": huge((4, 5, 9), (9, 1)),
    "no numbers": huge((4, "5", 9), (45, 9, 1)),
    "bools": huge((True, 5, 9), (45, 9, 1)),
    "no tuple": huge([4, 5, 9], (45, 9, 1)),
    "negative size": huge((4, 5, 9), (45, 9, 1), size=-1),
    "outside": tensor("../../../../etc/passwd", "FloatStorage", 400, (4, 5, 9)),
    "no storage": tensor(7, "FloatStorage", 400, (4, 5, 9)),
    "unknown kind": tensor(0, "ComplexFloatStorage", 400, (4, 5, 9)),
    "a number": 3,
    "a dict": {"a": 1},
    "missing": None,
    "no id": Call(Fake("torch._utils", "_rebuild_tensor_v2"), Saved(("storage",)), 0, (4,), (1,)),
    "odd id": Call(Fake("torch._utils", "_rebuild_tensor_v2"), Saved((1, 2, 3, 4, 5)), 0, (), ()),
    "empty dimension": huge((0, 5, 9), (45, 9, 1)),
    "other shape": huge((4, 9, 5), (45, 5, 1)),
    "not finite": tensor(1, "FloatStorage", 400, (4, 5, 9)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_tensor_is_named(tmp_path, name):
    path = generator_file(tmp_path / "x.ckpt", **{"linear.weight": DAMAGED[name]})
    message = refused(drakes.load_generator, path)
    assert "backbone.linear.weight" in message and str(path) in message


def test_storage_size_is_not_believed(tmp_path):
    """One number repeated 10^12 times would take 4 TB."""
    tree = {"x": tensor(0, "FloatStorage", 10**12, (10**12,), (0,))}
    path = write_zip(tmp_path / "x.ckpt", dumps(tree), [b"1234"])
    assert "fit its storage" in refused(read, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"convs.3.weight": None, "convs.3.bias": None}, ["4 layers", "multiple of 5"]),
        ({"norms.2.bias": None}, ["backbone.norms.2.bias", "missing", "(4,)"]),
        ({"norms.2.bias": huge((3,), (1,))}, ["backbone.norms.2.bias", "(3,)", "(4,)"]),
        ({"cls_embedder.weight": huge((4, 4), (4, 1))}, ["cls_embedder"]),
        ({"a\nb": huge((4, 4), (4, 1))}, ["unexpected", "\\n"]),
    ],
)
def test_wrong_generator_is_refused(tmp_path, change, words):
    message = refused(drakes.load_generator, generator_file(tmp_path / "x.ckpt", **change))
    assert all(word in message for word in words), message


def test_bare_state_dict_has_no_ema():
    assert "EMA" in refused(drakes.load_generator, FIXTURES / "finetuned.ckpt", "ema")


def test_short_ema_is_refused(tmp_path):
    path = generator_file(tmp_path / "bare.ckpt")
    with zipfile.ZipFile(path) as file:
        numbers = file.read("archive/data/0")
    state = {"backbone.linear.weight": huge((4, 5, 9), (45, 9, 1))}
    tree = {"state_dict": state, "ema": {"shadow_params": []}}
    path = write_zip(tmp_path / "x.ckpt", dumps(tree), [numbers])
    assert "expected 1 tensors" in refused(drakes.load_generator, path, "ema")


def test_the_two_kinds_of_checkpoint_are_not_mixed_up():
    assert "backbone." in refused(drakes.load_generator, FIXTURES / "oracle.ckpt")
    assert "model." in refused(drakes.load_oracle, FIXTURES / "pretrained.ckpt")


def rewrite(path, out, drop=(), change=None):
    """A copy of a fixture without some entries, or with the bytes of some changed."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = (change or {}).get(name.split("/", 1)[1], old.read(name))
            if name.split("/", 1)[1] not in drop:
                new.writestr(name, data)
    return out


def test_missing_and_short_storages_of_the_oracle_are_named(tmp_path):
    first = "model.embedding.conv_tower.blocks.0.0.weight"
    path = rewrite(FIXTURES / "oracle.ckpt", tmp_path / "a.ckpt", drop=["data/0"])
    message = refused(drakes.load_oracle, path)
    assert first in message and "missing" in message and "(*, 4, 15)" in message
    path = rewrite(FIXTURES / "oracle.ckpt", tmp_path / "b.ckpt", change={"data/0": b"1234"})
    message = refused(drakes.load_oracle, path)
    assert first in message and "storage" in message


@pytest.mark.parametrize("order", [b"big", b"", b"little endian and more"])
def test_big_endian_file_is_refused(tmp_path, order):
    source = FIXTURES / "finetuned.ckpt"
    path = rewrite(source, tmp_path / "x.ckpt", change={"byteorder": order})
    assert "byte order" in refused(drakes.load_generator, path)
    path = rewrite(source, tmp_path / "y.ckpt", drop=["byteorder"])  # torch before 2.1
    drakes.load_generator(path)


OTHER_FILES = {
    "empty": b"",
    "one byte": b"P",
    "html": b"<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title></html>",
    "legacy": bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + b"\x80\x02M\xe9\x03.",
    "pickle": pickle.dumps({"state_dict": 1}),
    "head of a zip": b"PK\3\4" + b"\0" * 100,
    "npz": (FIXTURES / "oracle.npz").read_bytes(),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_file_is_refused(tmp_path, name):
    path = tmp_path / "x.ckpt"
    path.write_bytes(OTHER_FILES[name])
    for load in (drakes.read_torch, drakes.load_generator, drakes.load_oracle):
        message = refused(load, path)
        assert str(path) in message
    assert ("before 1.6" in message) == (name == "legacy")


def test_absent_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(drakes.BadFile, match="cannot be read"):
            drakes.read_torch(path)


@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.6, 0.9, 0.999])
def test_truncated_file_is_refused(tmp_path, fraction):
    data = (FIXTURES / "pretrained.ckpt").read_bytes()
    path = tmp_path / "x.ckpt"
    path.write_bytes(data[: int(fraction * len(data))])
    assert "cut short" in refused(drakes.load_generator, path)


def test_two_archives_in_one_are_refused(tmp_path):
    path = write_zip(tmp_path / "x.ckpt", dumps({}))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other/data.pkl", dumps({}))
    assert "one data.pkl" in refused(drakes.read_torch, path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_zip_bomb_is_refused(tmp_path, compression):
    path = write_zip(tmp_path / "x.ckpt", dumps({}), [bytes(10_000_000)], compression)
    assert path.stat().st_size < 100_000
    assert "compressed" in refused(drakes.read_torch, path)


def test_entry_that_claims_more_than_the_file_is_refused(tmp_path):
    """Sizes of the zip directory are not believed beyond the size of the file."""
    path = generator_file(tmp_path / "x.ckpt")
    data = path.read_bytes()
    old, new = (struct.pack("<II", n, n) for n in (1600, 2**31))
    assert data.count(old) == 4  # two storages, each in its own header and in the directory
    path.write_bytes(data.replace(old, new))
    assert "larger than the file" in refused(drakes.read_torch, path)


def test_flipped_bytes_never_escape(tmp_path):
    """Whatever one byte of the file is changed to: arrays or a BadFile, nothing else."""
    source = generator_file(tmp_path / "source.ckpt").read_bytes()
    rng, path, kinds = np.random.default_rng(0), tmp_path / "x.ckpt", set()
    for _ in range(400):
        data = bytearray(source)
        # half of the changes in data.pkl, at the start; half anywhere
        end = rng.choice([3_000, len(data)])
        data[rng.integers(end)] = rng.integers(256)
        path.write_bytes(data)
        try:
            drakes.load_generator(path)
            kinds.add("read")
        except drakes.BadFile as error:
            assert str(error).isprintable() and len(str(error)) < 400
            kinds.add("refused")
    assert kinds == {"read", "refused"}
