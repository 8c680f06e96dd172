"""Files of DRAKES (Wang et al. 2024a, arXiv 2410.13643) for simpo_dna.py: generator, oracle.

The reader takes torch checkpoints apart without torch and without running anything they name; the
oracle is gReLU's Enformer in jax.numpy. Needed only beside --pretrained FILE.ckpt and
--oracle enformer:FILE.
Legend: B sequences, L positions, C and H channels, K kernel width, n positions in the transformer.
"""

import math
import pickletools
import struct
import zipfile
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TOKENS = 5  # A C G T mask
STORAGES = {  # torch's storage classes and the numbers in them, little-endian
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "bool",
}
MAX_PICKLE = 2**28  # bytes of data.pkl; the published ones have less than 1 MB
# what a damaged file may raise on the way
DAMAGE = (ValueError, LookupError, TypeError, NotImplementedError, OverflowError, MemoryError)
LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f920")  # of torch's format before 1.6


class BadFile(Exception):
    """A file that is not what was expected, said in one line."""


# ---- oracle -----------------------------------------------------------------------------------


def dense(layer, x):
    return x @ layer["w"] + layer["b"].reshape((1,) * (x.ndim - 1) + (-1,))


def conv(layer, x, dilation=1):
    """x [B, L, in] with w [K, in, out] -> [B, L, out]; zeros beyond both ends."""
    numbers, dilation = ("NWC", "WIO", "NWC"), (dilation,)
    y = jax.lax.conv_general_dilated(
        x, layer["w"], (1,), "SAME", rhs_dilation=dilation, dimension_numbers=numbers
    )
    return y + layer["b"][None, None]


def short_conv(layer, x):
    """`conv` for L < K as one matmul; XLA for CPUs takes 300 times longer for such a conv."""
    (_, length, _), width = x.shape, layer["w"].shape[0]
    x = jnp.pad(x, ((0, 0), (width // 2, width // 2), (0, 0)))
    windows = jnp.concatenate([x[:, i : i + length] for i in range(width)], axis=-1)
    return dense({"w": layer["w"].reshape(windows.shape[-1], -1), "b": layer["b"]}, windows)


def layer_norm(norm, x):
    x = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
    return x * norm["w"][None, None] + norm["b"][None, None]


def gelu(x):
    return x * jax.nn.sigmoid(1.702 * x)


def norm_gelu_conv(block, x):
    """Batch norm with its running statistics (folded into a scale and a shift), gelu, conv."""
    norm, layer = block["norm"], block["conv"]
    x = gelu(x * norm["w"][None, None] + norm["b"][None, None])
    return (short_conv if x.shape[1] < layer["w"].shape[0] else conv)(layer, x)


def attention_pool(w, x):
    """Softmax-weighted mean of each pair of positions, by channel: [B, L, C] -> [B, ceil(L/2), C].

    The last position of an odd length has no partner and stays as it is.
    """
    b, length, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, length % 2), (0, 0))).reshape(b, -1, 2, c)
    exists = (jnp.arange(x.shape[1] * 2) < length).reshape(1, -1, 2, 1)
    return jnp.sum(x * jax.nn.softmax(jnp.where(exists, x @ w, -jnp.inf), axis=2), axis=2)


def position_features(n, size):
    """Enformer's features of the distances -(n - 1)..n - 1, a numpy constant [2n - 1, size].

    A third each of exponentials, central masks and gamma densities, then all with the sign.
    """
    k, distance = size // 6, np.arange(-n + 1, n)[:, None]
    d = np.abs(distance)
    exponential = 0.5 ** (d / 2 ** np.linspace(3, math.log2(n), k))
    mask = d < 2.0 ** np.arange(1, k + 1) - 1
    mean, std = np.linspace(n / k, n, k), n / (2 * k)
    shape, rate = (mean / std) ** 2, mean / std**2  # shape >= 4: the density is 0 at 0
    log_norm = np.array([math.lgamma(s) for s in shape]) - shape * np.log(rate)
    density = np.exp((shape - 1) * np.log(np.maximum(d, 1e-300)) - rate * d - log_norm) + 1e-8
    gamma = density / density.max(axis=-1, keepdims=True)
    features = np.concatenate([exponential, mask, gamma], axis=-1)
    return np.concatenate([features, np.sign(distance) * features], axis=-1).astype(np.float32)


def attention(block, x):
    """Self-attention with Transformer-XL's relative positions: [B, n, C] -> [B, n, C]."""
    b, n, _ = x.shape
    heads, size = block["content_bias"].shape
    q, k, v = ((x @ block[w]).reshape(b, n, heads, -1) for w in ("query", "key", "value"))
    q = q / math.sqrt(size)
    rel = jnp.asarray(position_features(n, block["rel"].shape[0])) @ block["rel"]
    rel = rel.reshape(-1, heads, size)  # [2n - 1, heads, size]
    content = jnp.einsum("bihd,bjhd->bhij", q + block["content_bias"][None, None], k)
    position = jnp.einsum("bihd,mhd->bhim", q + block["position_bias"][None, None], rel)
    index = jnp.arange(n)[None] - jnp.arange(n)[:, None] + n - 1  # of the distance j - i
    position = jnp.take_along_axis(position, index[None, None], axis=-1)
    weight = jax.nn.softmax(content + position, axis=-1)
    return dense(block["out"], jnp.einsum("bhij,bjhd->bihd", weight, v).reshape(b, n, -1))


def enformer(params, x):
    """The DRAKES reward oracle: tokens [B, L] or one-hot [B, L, 4] -> [B, 3] hepg2, k562, sknsh.

    gReLU's EnformerPretrainedModel in evaluation; no activation after the head (MSE regression).
    """
    x = jax.nn.one_hot(x, 4) if x.ndim == 2 else x
    x = conv(params["stem"], x)
    for stage in params["tower"]:
        x = norm_gelu_conv(stage["wide"], x) if "wide" in stage else x
        x = attention_pool(stage["pool"], x + norm_gelu_conv(stage["point"], x))
    for block in params["transformer"]:
        x = x + attention(block, layer_norm(block["norm"], x))
        h = dense(block["up"], layer_norm(block["mlp_norm"], x))
        x = x + dense(block["down"], jax.nn.relu(h))
    x = gelu(norm_gelu_conv(params["pointwise"], x))
    return jnp.mean(dense(params["head"], x), axis=1)


# ---- checkpoints ------------------------------------------------------------------------------


class Storage(NamedTuple):
    """Numbers of a torch file, not yet read."""

    path: Path
    entry: zipfile.ZipInfo
    dtype: str  # of STORAGES
    size: int  # numbers


class Tensor(NamedTuple):
    """A strided view of a storage; strides and offset in numbers."""

    storage: Storage
    offset: int
    shape: tuple
    strides: tuple


class Name(NamedTuple):
    """A class or function that a pickle names: the name alone, "module name"."""

    name: str


class Inert:
    """Stands for every object that the reader does not make."""


INERT = Inert()
REBUILD_TENSOR = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")
REBUILD_PARAMETER = (
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state",
)


def is_count(x):
    return type(x) is int and 0 <= x < 2**48


def rebuild(function, args):
    """What a pickle's call `function(*args)` stands for. Nothing is called, whatever it names."""
    name = function.name if isinstance(function, Name) else None
    args = args if isinstance(args, tuple) else ()
    if name == "collections OrderedDict" and not args:
        return {}
    if name in REBUILD_TENSOR and len(args) >= 4 and isinstance(args[0], Storage):
        storage, offset, shape, strides = args[:4]
        if isinstance(shape, tuple) and isinstance(strides, tuple):
            numbers = (offset, *shape, *strides)
            if len(shape) == len(strides) <= 8 and all(map(is_count, numbers)):
                return Tensor(storage, offset, shape, strides)
    if name in REBUILD_PARAMETER and args and isinstance(args[0], Tensor):
        return args[0]
    return INERT


def parse_pickle(data, find_storage):
    """The dicts, lists, tuples, numbers and strings of a pickle; any other object is INERT.

    pickletools decodes the opcodes and this function keeps the stack; unlike pickle.Unpickler it
    never imports or calls. A dict keeps the entries under strings alone.
    """
    stack, marks, memo = [], [], {}

    def pop(count):
        items = stack[len(stack) - count :]
        if len(items) < count:
            raise IndexError("stack underflow")
        del stack[len(stack) - count :]
        return items

    def pop_mark():
        return pop(max(len(stack) - marks.pop(), 0))

    def add(target, items, in_pairs):
        if in_pairs and isinstance(target, dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((key, value) for key, value in pairs if isinstance(key, str))
        elif not in_pairs and isinstance(target, list):
            target.extend(items)
        return target

    for op, arg, _ in pickletools.genops(data):
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "POP":
                pop(1)
            case "POP_MARK":
                pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list}.get(op.name, tuple)())
            case "TUPLE" | "LIST":
                stack.append((tuple if op.name == "TUPLE" else list)(pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(op.name[-1]))))
            case "DICT":
                stack.append(add({}, pop_mark(), True))
            case "APPEND" | "SETITEM":
                items = pop(1 if op.name == "APPEND" else 2)
                add(stack[-1], items, op.name == "SETITEM")
            case "APPENDS" | "SETITEMS":
                items = pop_mark()
                add(stack[-1], items, op.name == "SETITEMS")
            case "GLOBAL":
                stack.append(Name(arg))
            case "STACK_GLOBAL":
                names = pop(2)
                stack.append(Name(" ".join(names)))
            case "REDUCE" | "NEWOBJ":
                stack.append(rebuild(*pop(2)))
            case "BUILD":
                pop(1)  # the state; the object stays as it is
            case "BINPERSID":
                stack.append(find_storage(*pop(1)))
            case _ if op.arg and not op.stack_before and op.stack_after:  # a literal
                stack.append(arg)
            case _:  # sets, INST, OBJ, NEWOBJ_EX, buffers
                before = op.stack_before
                if pickletools.markobject in before:
                    pop_mark()
                    before = before[: before.index(pickletools.markobject)]
                pop(len(before))
                stack.append(INERT)
    raise ValueError("no STOP")


def read_entry(path, entry, start, size):
    """`size` bytes from `start` of an uncompressed zip entry; the check sum is not read."""
    if start + size > entry.file_size:
        raise ValueError("beyond the entry")
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
        file.seek(name + extra + start, 1)
        data = file.read(size)
    if signature != b"PK\3\4" or len(data) < size:
        raise ValueError("no such entry")
    return data


def open_zip(path):
    """The entries of a torch file by name, all uncompressed and no larger than the file."""
    try:
        with path.open("rb") as file:
            head = file.read(len(LEGACY_MAGIC))
        if head == LEGACY_MAGIC:
            raise BadFile(f"{path} has torch's format before 1.6; expected the zip format")
        if head[:4] != b"PK\3\4":
            raise BadFile(f"{path} is not a torch checkpoint; expected a zip file by torch.save")
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or 'an I/O error'}") from None
    except (zipfile.BadZipFile, struct.error, *DAMAGE):
        raise BadFile(f"{path} is damaged or cut short; expected a complete zip file") from None
    for entry in entries.values():
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise BadFile(f"{path} is compressed or encrypted; expected a file by torch.save")
        if entry.file_size > path.stat().st_size:
            raise BadFile(f"{path} is damaged; expected entries no larger than the file")
    return entries


def read_torch(path):
    """The tree that torch.save wrote, tensors as `Tensor`; runs nothing that the file names.

    Anything but a torch zip file is a BadFile.
    """
    path = Path(path)
    entries = open_zip(path)
    end = "/data.pkl"
    roots = [x.removesuffix(end) for x in entries if x.endswith(end) and x.count("/") == 1]
    if len(roots) != 1:
        raise BadFile(f"{path} is no torch checkpoint; expected one data.pkl in the zip file")

    def find_storage(pid):
        """The storage of torch's persistent id ("storage", class, key, device, numbers)."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and isinstance(pid[1], Name)):
            return INERT
        kind, key, size = pid[1].name.removeprefix("torch "), pid[2], pid[4]
        entry = entries.get(f"{roots[0]}/data/{key}") if isinstance(key, str) else None
        if kind not in STORAGES or entry is None or not is_count(size):
            return INERT
        return Storage(path, entry, STORAGES[kind], size)

    try:
        order = entries.get(f"{roots[0]}/byteorder")
        if order and read_entry(path, order, 0, min(order.file_size, 16)) != b"little":
            raise BadFile(f"{path} is big-endian; expected the byte order 'little'")
        entry = entries[f"{roots[0]}{end}"]
        if entry.file_size > MAX_PICKLE:
            raise BadFile(f"{path}: data.pkl is too large; expected at most {MAX_PICKLE} bytes")
        return parse_pickle(read_entry(path, entry, 0, entry.file_size), find_storage)
    except (struct.error, OSError, *DAMAGE):
        raise BadFile(f"{path}: data.pkl is damaged; expected a pickle by torch.save") from None


def read_tensor(tensor, name):
    """The numpy array of a `Tensor`, bfloat16 as float32; reads only the bytes it spans."""
    (path, entry, dtype, size), offset, shape, strides = tensor
    raw = np.dtype({"bfloat16": "<u2", "bool": "u1"}.get(dtype, dtype))
    count = math.prod(shape)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    span = last + 1 - offset if count else 0
    if max(count, offset + span) > size or size * raw.itemsize > entry.file_size:
        raise BadFile(f"{path}: tensor {name} is damaged; expected it to fit its storage")
    try:
        data = read_entry(path, entry, offset * raw.itemsize, span * raw.itemsize)
    except (struct.error, OSError, *DAMAGE):
        raise BadFile(f"{path}: tensor {name} is damaged; expected a complete file") from None
    steps = [stride * raw.itemsize for stride in strides]
    view = np.lib.stride_tricks.as_strided(np.frombuffer(data, raw), shape, steps)
    if dtype == "bfloat16":  # the upper half of a float32
        return np.asarray(view.astype(np.uint32) << 16, np.uint32).view(np.float32)
    return view.astype(bool) if dtype == "bool" else view.copy()


class Source(NamedTuple):
    """Tensors of one network in a checkpoint, taken out one by one."""

    path: Path
    prefix: str  # of the names, dropped in the keys
    tensors: dict


def open_network(path, state, prefix):
    """The `Source` of the entries of `state` whose names start with prefix."""
    state = state if isinstance(state, dict) else {}
    tensors = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if not tensors:
        raise BadFile(f"{path} has no tensors named {prefix}*; expected a checkpoint of DRAKES")
    return Source(path, prefix, tensors)


def take(source, name, *shape):
    """The float32 array of a tensor, which leaves the source. None in shape is any number."""
    tensor, name = source.tensors.pop(name, None), source.prefix + name
    expected = str(shape).replace("None", "*")
    if not isinstance(tensor, Tensor):
        raise BadFile(f"{source.path}: tensor {name} is missing; expected shape {expected}")
    pairs = list(zip_longest(tensor.shape, shape, fillvalue=0))
    if not all(n > 0 and want in (n, None) for n, want in pairs):
        found = f"tensor {name} has shape {tensor.shape}"
        raise BadFile(f"{source.path}: {found}; expected {expected}")
    array = read_tensor(tensor, name).astype(np.float32)
    if not np.isfinite(array).all():
        raise BadFile(f"{source.path}: tensor {name} is not finite; expected numbers")
    return array


def take_layer(source, name, *shape):
    """A convolution [out, in, K], linear layer [out, in] or norm [out] as {"w", "b"}."""
    w = take(source, f"{name}.weight", *shape)
    return {"w": jnp.asarray(w.T), "b": jnp.asarray(take(source, f"{name}.bias", w.shape[0]))}


def count(source, prefix):
    """Number of modules in the list `prefix`."""
    names = (name.removeprefix(prefix) for name in source.tensors if name.startswith(prefix))
    return len({name.split(".")[0] for name in names})


def check_empty(source):
    """Refuses a network with more tensors than were taken: it would compute something else."""
    rest = [name for name in source.tensors if not name.endswith("num_batches_tracked")]
    if rest:
        found = f"unexpected tensor {ascii(source.prefix + rest[0])[:99]}"
        raise BadFile(f"{source.path}: {found}; expected the networks of DRAKES alone")


def load_generator(path, weights="raw"):
    """theta of DRAKES' pretrained.ckpt or of a bare state_dict; weights "raw" or "ema".

    DRAKES itself always uses the raw weights. Layers and H come from the tensors.
    """
    path = Path(path)
    tree = read_torch(path)
    tree = tree if isinstance(tree, dict) else {}
    source = open_network(path, tree.get("state_dict", tree), "backbone.")
    source.tensors.pop("time_embedder.0.W", None)  # has no gradient; it multiplies sigma = 0
    if weights == "ema":
        ema = tree.get("ema")
        shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
        if not isinstance(shadow, list) or len(shadow) != len(source.tensors):
            expected = f"expected {len(source.tensors)} tensors ema.shadow_params"
            raise BadFile(f"{path} has no EMA of its weights; {expected}")
        source = source._replace(tensors=dict(zip(source.tensors, shadow, strict=True)))
    num_layers = count(source, "convs.")
    theta = {"first": take_layer(source, "linear", None, TOKENS, 9)}
    h = theta["first"]["b"].shape[0]
    if num_layers < 5 or num_layers % 5:
        raise BadFile(f"{path} has {num_layers} layers; expected a multiple of 5")
    embed = take_layer(source, "time_embedder.1", h, h)
    # sigma = 0: the embedding is [sin 0 | cos 0] = [0 | 1]
    embedding = jax.nn.relu(embed["w"][h // 2 :].sum(axis=0) + embed["b"])
    theta["layers"] = []
    for i in range(num_layers):
        time = take_layer(source, f"time_layers.{i}.dense", h, h)
        layer = {"conv": take_layer(source, f"convs.{i}", h, h, 9), "time": dense(time, embedding)}
        theta["layers"].append(layer | {"norm": take_layer(source, f"norms.{i}", h)})
    head = [take_layer(source, f"final_conv.{i}", n, h, 1) for i, n in ((0, h), (2, TOKENS))]
    theta["head"] = [{"w": layer["w"][0], "b": layer["b"]} for layer in head]
    check_empty(source)
    return theta


def take_norm_conv(source, name, outputs, inputs, width):
    """Batch norm as scale and shift from its running statistics, and the convolution after it."""
    norm = f"{name}.norm.layer"
    parts = ("weight", "bias", "running_mean", "running_var")
    w, b, mean, var = (take(source, f"{norm}.{part}", inputs) for part in parts)
    w = w / np.sqrt(np.maximum(var, 0) + 1e-5)
    layer = take_layer(source, f"{name}.conv", outputs, inputs, width)
    return {"norm": {"w": jnp.asarray(w), "b": jnp.asarray(b - mean * w)}, "conv": layer}


def take_stage(source, i, inputs):
    """Stage i of the convolution tower; stage 0 has the stem before it in place of "wide"."""
    name, stage = f"embedding.conv_tower.blocks.{i}", {}
    if i:
        stage["wide"] = take_norm_conv(source, f"{name}.0", None, inputs, 5)
        inputs = stage["wide"]["conv"]["b"].shape[0]
    stage["point"] = take_norm_conv(source, f"{name}.1", inputs, inputs, 1)
    pool = take(source, f"{name}.1.pool.layer.to_attn_logits.weight", inputs, inputs, 1, 1)
    return stage | {"pool": jnp.asarray(pool[:, :, 0, 0].T)}


def take_block(source, i, c):
    """Block i of the transformer on c channels; heads and sizes come from its tensors."""
    name = f"embedding.transformer_tower.blocks.{i}"
    mha, up, down = f"{name}.mha", f"{name}.ffn.dense1", f"{name}.ffn.dense2"
    block = {"norm": take_layer(source, f"{name}.norm.layer", c)}
    content_bias = take(source, f"{mha}.rel_content_bias", 1, None, 1, None)[0, :, 0]
    heads, size = content_bias.shape
    position_bias = take(source, f"{mha}.rel_pos_bias", 1, heads, 1, size)[0, :, 0]
    block |= {"content_bias": content_bias, "position_bias": position_bias}
    for key, tensor in (("query", "to_q"), ("key", "to_k")):
        block[key] = take(source, f"{mha}.{tensor}.weight", heads * size, c).T
    block["value"] = take(source, f"{mha}.to_v.weight", None, c).T
    block["rel"] = take(source, f"{mha}.to_rel_k.weight", heads * size, None).T
    values, features = block["value"].shape[1], block["rel"].shape[0]
    if values % heads or features % 6:
        found = f"{values} values and {features} relative features"
        raise BadFile(f"{source.path}: {mha} has {found}; expected multiples of {heads} and 6")
    block["out"] = take_layer(source, f"{mha}.to_out", c, values)
    block["mlp_norm"] = take_layer(source, f"{up}.norm.layer", c)
    block["up"] = take_layer(source, f"{up}.linear", None, c)
    block["down"] = take_layer(source, f"{down}.linear", c, block["up"]["b"].shape[0])
    return jax.tree.map(jnp.asarray, block)


def load_oracle(path):
    """params of `enformer` from a gReLU checkpoint; optimiser states are not read."""
    path, prefix = Path(path), "embedding.{}_tower.blocks."
    tree = read_torch(path)
    tree = tree if isinstance(tree, dict) else {}
    source = open_network(path, tree.get("state_dict", tree), "model.")
    stages, depth = (count(source, prefix.format(x)) for x in ("conv", "transformer"))
    stem = take_layer(source, prefix.format("conv") + "0.0", None, 4, 15)
    tower, c = [], stem["b"].shape[0]
    for i in range(stages):
        tower.append(take_stage(source, i, c))
        c = tower[-1]["point"]["conv"]["b"].shape[0]
    transformer = [take_block(source, i, c) for i in range(depth)]
    pointwise = take_norm_conv(source, "embedding.pointwise_conv", None, c, 1)
    c = pointwise["conv"]["b"].shape[0]
    head = take_layer(source, "head.channel_transform.conv.layer", 3, c, 1)
    check_empty(source)
    head["w"] = head["w"][0]
    trunk = {"stem": stem, "tower": tower, "transformer": transformer, "pointwise": pointwise}
    return trunk | {"head": head}
