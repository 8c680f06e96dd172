"""Converts a checkpoint of DRAKES (Wang et al. 2024a): its generator or its oracle.

    pip install -r dna/requirements.txt
    python -m dna.convert_drakes pretrained.ckpt drakes.safetensors
    python -m dna.convert_drakes reward_oracle_ft.ckpt oracle_ft.safetensors

The first is for `simpo_dna.py --pretrained`, the second for `--oracle enformer:FILE`.
torch reads the file with weights_only=True, which runs nothing that the file names.
Objects of other packages (omegaconf's, in the hyper-parameters) become empty ones, so
that these packages are not needed. Tensors are mapped from the disk, optimiser states
never read.
"""

import dataclasses
import warnings
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

from dna.files import named_leaves, save_tree

TOKENS = 5  # A C G T mask


@dataclasses.dataclass(frozen=True)
class Args:
    checkpoint: tyro.conf.Positional[Path]  # of the generator or of an oracle
    out: tyro.conf.Positional[Path]  # the safetensors file to write
    weights: Literal["raw", "ema"] = "raw"  # of a Lightning checkpoint; DRAKES uses raw
    data: str = "gosai_all.csv"  # training set, which simpo_dna.py will ask for


class Stub:
    """Stands for every object that is no tensor, number, string or container."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def read_checkpoint(path):
    """The tree that torch.save wrote."""
    try:
        import torch
    except ModuleNotFoundError:
        raise SystemExit("error: pip install -r dna/requirements.txt") from None
    serialization = torch.serialization
    try:
        names = serialization.get_unsafe_globals_in_checkpoint(path)
        stubs = [(Stub, name) for name in names]
        with warnings.catch_warnings(), serialization.safe_globals(stubs):
            warnings.simplefilter("ignore")
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file makes torch raise many kinds
        reason = ascii(str(error).strip().partition("\n")[0])[:120]
        what = f"{path} is no checkpoint by torch.save"
        raise SystemExit(f"error: {what}: {reason}") from None
    return tree if isinstance(tree, dict) else {}


class Source(NamedTuple):
    """Tensors of one network in a checkpoint, taken out one by one."""

    path: Path
    prefix: str  # of the names, dropped in the keys
    tensors: dict


def has_shape(tensor, shape):
    """Whether a tensor has this shape, in which None is any number above 0."""
    found = getattr(tensor, "shape", None)
    if not isinstance(found, tuple):
        return False
    pairs = zip_longest(found, shape, fillvalue=0)
    return all(n > 0 and want in (n, None) for n, want in pairs)


def take(source, name, *shape):
    """The float32 array of a tensor, which leaves the source; None is any number."""
    tensor = source.tensors.pop(name, None)
    what = f"{source.path}: tensor {ascii(source.prefix + name)}"
    if not has_shape(tensor, shape):
        found = tuple(getattr(tensor, "shape", ()))
        expected = str(shape).replace("None", "*")
        raise SystemExit(f"error: {what} has shape {found}; expected {expected}")
    size = tensor.numel() * tensor.element_size()
    if size > source.path.stat().st_size:  # a repeated number
        raise SystemExit(f"error: {what} is larger than the file")
    array = tensor.detach().float().numpy()
    if not np.isfinite(array).all():
        raise SystemExit(f"error: {what} is not finite")
    return array


def take_layer(source, name, *shape):
    """A convolution [out, in, K], linear layer [out, in] or norm [out] -> {w, b}."""
    w = take(source, f"{name}.weight", *shape)
    b = take(source, f"{name}.bias", w.shape[0])
    return {"w": w.T, "b": b}


def take_pointwise(source, name, outputs, inputs):
    """A convolution of width 1 as a linear layer."""
    layer = take_layer(source, name, outputs, inputs, 1)
    return {"w": layer["w"][0], "b": layer["b"]}


def count(source, prefix):
    """Number of modules in the list `prefix`."""
    modules = set()
    for name in source.tensors:
        if name.startswith(prefix):
            modules.add(name.removeprefix(prefix).split(".")[0])
    return len(modules)


# ---- the generator -------------------------------------------------------------------
def take_generator(source):
    """theta of simpo_dna.py; layers and channels come from the tensors."""
    num_layers = count(source, "convs.")
    if num_layers < 5 or num_layers % 5:
        found = f"{num_layers} layers; expected a multiple of 5"
        raise SystemExit(f"error: {source.path} has {found}")
    first = take_layer(source, "linear", None, TOKENS, 9)
    c = first["b"].shape[0]

    # sigma = 0: the embedding is [sin 0 | cos 0] = [0 | 1]
    embed = take_layer(source, "time_embedder.1", c, c)
    cos_part = embed["w"][c // 2 :].sum(axis=0)
    embedding = np.maximum(cos_part + embed["b"], 0)

    layers = []
    for i in range(num_layers):
        time = take_layer(source, f"time_layers.{i}.dense", c, c)
        layer = {
            "conv": take_layer(source, f"convs.{i}", c, c, 9),
            "time": embedding @ time["w"] + time["b"],
            "norm": take_layer(source, f"norms.{i}", c),
        }
        layers.append(layer)
    head = [
        take_pointwise(source, "final_conv.0", c, c),
        take_pointwise(source, "final_conv.2", TOKENS, c),
    ]
    return {"first": first, "layers": layers, "head": head}


# ---- the oracle ----------------------------------------------------------------------
def take_norm_conv(source, name, outputs, inputs, width):
    """Batch norm as scale and shift from its running statistics; the convolution."""
    norm = f"{name}.norm.layer"
    mean = take(source, f"{norm}.running_mean", inputs)
    variance = take(source, f"{norm}.running_var", inputs)
    w = take(source, f"{norm}.weight", inputs)
    b = take(source, f"{norm}.bias", inputs)
    w = w / np.sqrt(np.maximum(variance, 0) + 1e-5)
    return {
        "norm": {"w": w, "b": b - mean * w},
        "conv": take_layer(source, f"{name}.conv", outputs, inputs, width),
    }


def take_stage(source, i, inputs):
    """Stage i of the convolution tower; before stage 0 there is the stem."""
    name = f"embedding.conv_tower.blocks.{i}"
    stage = {}
    if i:
        stage["wide"] = take_norm_conv(source, f"{name}.0", None, inputs, 5)
        inputs = stage["wide"]["conv"]["b"].shape[0]
    stage["point"] = take_norm_conv(source, f"{name}.1", inputs, inputs, 1)
    pool = f"{name}.1.pool.layer.to_attn_logits.weight"
    pool = take(source, pool, inputs, inputs, 1, 1)
    stage["pool"] = pool[:, :, 0, 0].T
    return stage


def take_block(source, i, c):
    """Block i of the transformer on c channels; its tensors tell heads and sizes."""
    name = f"embedding.transformer_tower.blocks.{i}"
    mha = f"{name}.mha"
    content_bias = take(source, f"{mha}.rel_content_bias", 1, None, 1, None)
    content_bias = content_bias[0, :, 0]
    heads, size = content_bias.shape
    position_bias = take(source, f"{mha}.rel_pos_bias", 1, heads, 1, size)
    block = {
        "norm": take_layer(source, f"{name}.norm.layer", c),
        "content_bias": content_bias,
        "position_bias": position_bias[0, :, 0],
        "query": take(source, f"{mha}.to_q.weight", heads * size, c).T,
        "key": take(source, f"{mha}.to_k.weight", heads * size, c).T,
        "value": take(source, f"{mha}.to_v.weight", None, c).T,
        "rel": take(source, f"{mha}.to_rel_k.weight", heads * size, None).T,
    }
    values = block["value"].shape[1]
    features = block["rel"].shape[0]
    if values % heads or features % 6:
        found = f"{values} values and {features} relative features"
        expected = f"expected multiples of {heads} and 6"
        raise SystemExit(f"error: {source.path}: {mha} has {found}; {expected}")
    block["out"] = take_layer(source, f"{mha}.to_out", c, values)

    up = f"{name}.ffn.dense1"
    down = f"{name}.ffn.dense2"
    block["mlp_norm"] = take_layer(source, f"{up}.norm.layer", c)
    block["up"] = take_layer(source, f"{up}.linear", None, c)
    hidden = block["up"]["b"].shape[0]
    block["down"] = take_layer(source, f"{down}.linear", c, hidden)
    return block


def take_oracle(source):
    """params of `enformer` in dna/enformer.py."""
    stages = count(source, "embedding.conv_tower.blocks.")
    depth = count(source, "embedding.transformer_tower.blocks.")
    stem = take_layer(source, "embedding.conv_tower.blocks.0.0", None, 4, 15)
    c = stem["b"].shape[0]
    tower = []
    for i in range(stages):
        stage = take_stage(source, i, c)
        c = stage["point"]["conv"]["b"].shape[0]
        tower.append(stage)
    transformer = [take_block(source, i, c) for i in range(depth)]
    pointwise = take_norm_conv(source, "embedding.pointwise_conv", None, c, 1)
    c = pointwise["conv"]["b"].shape[0]
    return {
        "stem": stem,
        "tower": tower,
        "transformer": transformer,
        "pointwise": pointwise,
        "head": take_pointwise(source, "head.channel_transform.conv.layer", None, c),
    }


# ---- main ----------------------------------------------------------------------------
def find_tensors(tree, prefix, weights, path):
    """{name without prefix: tensor} of one network in a checkpoint, perhaps empty."""
    state = tree.get("state_dict", tree)
    tensors = {}
    if isinstance(state, dict):
        for name, tensor in state.items():
            if isinstance(name, str) and name.startswith(prefix):
                tensors[name.removeprefix(prefix)] = tensor
    tensors.pop("time_embedder.0.W", None)  # has no gradient; it multiplies sigma = 0
    if tensors and weights == "ema":
        shadow = tree.get("ema", {}).get("shadow_params", [])
        if len(shadow) != len(tensors):
            raise SystemExit(f"error: {path} has no EMA of its weights")
        return dict(zip(tensors, shadow, strict=True))
    return tensors


def convert(path, weights="raw"):
    """-> "generator" or "enformer", its tree of arrays."""
    tree = read_checkpoint(path)
    for prefix in ("backbone.", "model."):
        tensors = find_tensors(tree, prefix, weights, path)
        if not tensors:
            continue
        source = Source(path, prefix, tensors)
        if prefix == "backbone.":
            kind = "generator"
            params = {"pretrained": take_generator(source)}
        else:
            kind = "enformer"
            params = take_oracle(source)
        for name in source.tensors:
            if not name.endswith("num_batches_tracked"):
                name = ascii(prefix + name)[:99]
                raise SystemExit(f"error: {path}: unexpected tensor {name}")
        return kind, params
    names = "backbone.* or model.*, as those of DRAKES"
    raise SystemExit(f"error: {path} has no tensors named {names}")


def main():
    args = tyro.cli(Args)
    kind, params = convert(args.checkpoint, args.weights)
    save_tree(args.out, params, kind, data=args.data)
    total = sum(leaf.size for leaf in named_leaves(params).values())
    print(f"{args.out}: {kind}, {total} parameters")


if __name__ == "__main__":
    main()
