"""Converts a checkpoint of DRAKES (Wang et al. 2024a) for simpo_dna.py: generator or oracle.

    pip install -r dna/requirements.txt
    python -m dna.convert_drakes pretrained.ckpt drakes.npz               # for --pretrained
    python -m dna.convert_drakes reward_oracle_ft.ckpt oracle_ft.npz      # for enformer:FILE

torch reads the file with weights_only=True, which runs nothing that the file names. Objects of
other packages (omegaconf's, in the hyper-parameters) become empty ones, so that these packages are
not needed. Tensors are mapped from the disk, optimiser states never read.
"""

import dataclasses
import sys
import warnings
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

from dna.data import UsageError, named_leaves, save_arrays

TOKENS = 5  # A C G T mask


@dataclasses.dataclass(frozen=True)
class Args:
    checkpoint: tyro.conf.Positional[
        Path
    ]  # pretrained.ckpt, finetuned.ckpt or reward_oracle_*.ckpt
    out: tyro.conf.Positional[Path]  # the npz to write
    weights: Literal["raw", "ema"] = "raw"  # of a Lightning checkpoint; DRAKES itself uses raw
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
    """The tree that torch.save wrote; UsageError for anything but a file by torch.save."""
    try:
        import torch
    except ModuleNotFoundError:
        raise UsageError("needs pip install -r dna/requirements.txt") from None
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([(Stub, n) for n in names]),
        ):
            warnings.simplefilter("ignore")
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file makes torch raise many kinds
        reason = ascii(str(error).strip().partition("\n")[0])[:120]
        raise UsageError(f"{path} is no checkpoint by torch.save: {reason}") from None
    return tree if isinstance(tree, dict) else {}


class Source(NamedTuple):
    """Tensors of one network in a checkpoint, taken out one by one."""

    path: Path
    prefix: str  # of the names, dropped in the keys
    tensors: dict


def take(source, name, *shape):
    """The float32 array of a tensor, which leaves the source. None in shape is any number."""
    tensor, name = source.tensors.pop(name, None), ascii(source.prefix + name)
    found = tuple(getattr(tensor, "shape", ()))
    pairs = list(zip_longest(found, shape, fillvalue=0))
    expected = str(shape).replace("None", "*")
    if not isinstance(getattr(tensor, "shape", None), tuple) or not all(
        n > 0 and want in (n, None) for n, want in pairs
    ):
        raise UsageError(f"{source.path}: tensor {name} has shape {found}; expected {expected}")
    if tensor.numel() * tensor.element_size() > source.path.stat().st_size:  # a repeated number
        raise UsageError(f"{source.path}: tensor {name} is larger than the file")
    array = tensor.detach().float().numpy()
    if not np.isfinite(array).all():
        raise UsageError(f"{source.path}: tensor {name} is not finite")
    return array


def take_layer(source, name, *shape):
    """A convolution [out, in, K], linear layer [out, in] or norm [out] as {"w", "b"}."""
    w = take(source, f"{name}.weight", *shape)
    return {"w": w.T, "b": take(source, f"{name}.bias", w.shape[0])}


def count(source, prefix):
    """Number of modules in the list `prefix`."""
    names = (name.removeprefix(prefix) for name in source.tensors if name.startswith(prefix))
    return len({name.split(".")[0] for name in names})


def take_generator(source):
    """theta of simpo_dna.py; layers and channels come from the tensors."""
    num_layers = count(source, "convs.")
    theta = {"first": take_layer(source, "linear", None, TOKENS, 9), "layers": []}
    c = theta["first"]["b"].shape[0]
    if num_layers < 5 or num_layers % 5:
        raise UsageError(f"{source.path} has {num_layers} layers; expected a multiple of 5")
    embed = take_layer(source, "time_embedder.1", c, c)
    # sigma = 0: the embedding is [sin 0 | cos 0] = [0 | 1]
    embedding = np.maximum(embed["w"][c // 2 :].sum(axis=0) + embed["b"], 0)
    for i in range(num_layers):
        dense = take_layer(source, f"time_layers.{i}.dense", c, c)
        layer = {"conv": take_layer(source, f"convs.{i}", c, c, 9)}
        layer |= {"time": embedding @ dense["w"] + dense["b"]}
        theta["layers"].append(layer | {"norm": take_layer(source, f"norms.{i}", c)})
    head = [take_layer(source, f"final_conv.{i}", n, c, 1) for i, n in ((0, c), (2, TOKENS))]
    return theta | {"head": [{"w": layer["w"][0], "b": layer["b"]} for layer in head]}


def take_norm_conv(source, name, outputs, inputs, width):
    """Batch norm as scale and shift from its running statistics, and the convolution after it."""
    parts = ("weight", "bias", "running_mean", "running_var")
    w, b, mean, var = (take(source, f"{name}.norm.layer.{part}", inputs) for part in parts)
    w = w / np.sqrt(np.maximum(var, 0) + 1e-5)
    layer = take_layer(source, f"{name}.conv", outputs, inputs, width)
    return {"norm": {"w": w, "b": b - mean * w}, "conv": layer}


def take_stage(source, i, inputs):
    """Stage i of the convolution tower; stage 0 has the stem before it in place of "wide"."""
    name, stage = f"embedding.conv_tower.blocks.{i}", {}
    if i:
        stage["wide"] = take_norm_conv(source, f"{name}.0", None, inputs, 5)
        inputs = stage["wide"]["conv"]["b"].shape[0]
    stage["point"] = take_norm_conv(source, f"{name}.1", inputs, inputs, 1)
    pool = take(source, f"{name}.1.pool.layer.to_attn_logits.weight", inputs, inputs, 1, 1)
    return stage | {"pool": pool[:, :, 0, 0].T}


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
        raise UsageError(f"{source.path}: {mha} has {found}; expected multiples of {heads} and 6")
    block["out"] = take_layer(source, f"{mha}.to_out", c, values)
    block["mlp_norm"] = take_layer(source, f"{up}.norm.layer", c)
    block["up"] = take_layer(source, f"{up}.linear", None, c)
    return block | {"down": take_layer(source, f"{down}.linear", c, block["up"]["b"].shape[0])}


def take_oracle(source):
    """params of `enformer` in dna/oracles.py."""
    prefix = "embedding.{}_tower.blocks."
    stages, depth = (count(source, prefix.format(x)) for x in ("conv", "transformer"))
    stem = take_layer(source, prefix.format("conv") + "0.0", None, 4, 15)
    tower, c = [], stem["b"].shape[0]
    for i in range(stages):
        tower.append(take_stage(source, i, c))
        c = tower[-1]["point"]["conv"]["b"].shape[0]
    transformer = [take_block(source, i, c) for i in range(depth)]
    pointwise = take_norm_conv(source, "embedding.pointwise_conv", None, c, 1)
    c = pointwise["conv"]["b"].shape[0]
    head = take_layer(source, "head.channel_transform.conv.layer", None, c, 1)
    trunk = {"stem": stem, "tower": tower, "transformer": transformer, "pointwise": pointwise}
    return trunk | {"head": {"w": head["w"][0], "b": head["b"]}}


def convert(path, weights="raw"):
    """-> "generator" or "enformer", its parameters; UsageError for another network."""
    tree = read_checkpoint(path)
    state = tree.get("state_dict", tree)
    for prefix, kind, take_network in (
        ("backbone.", "generator", take_generator),
        ("model.", "enformer", take_oracle),
    ):
        tensors = {
            k.removeprefix(prefix): v
            for k, v in (state if isinstance(state, dict) else {}).items()
            if isinstance(k, str) and k.startswith(prefix)
        }
        if not tensors:
            continue
        tensors.pop("time_embedder.0.W", None)  # has no gradient; it multiplies sigma = 0
        if weights == "ema":
            shadow = tree.get("ema", {}).get("shadow_params", [])
            if len(shadow) != len(tensors):
                raise UsageError(f"{path} has no EMA of its weights")
            tensors = dict(zip(tensors, shadow, strict=True))
        source = Source(path, prefix, tensors)
        params = take_network(source)
        rest = [name for name in source.tensors if not name.endswith("num_batches_tracked")]
        if rest:
            raise UsageError(f"{path}: unexpected tensor {ascii(prefix + rest[0])[:99]}")
        return kind, params
    raise UsageError(f"{path} has no tensors named backbone.* or model.*, as DRAKES' have")


def main():
    args = tyro.cli(Args)
    try:
        kind, params = convert(args.checkpoint, args.weights)
        save_arrays(args.out, params, kind, **{"data": args.data} if kind == "generator" else {})
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {args.out}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    total = sum(leaf.size for leaf in named_leaves(params).values())
    print(f"{args.out}: {kind}, {total} parameters")


if __name__ == "__main__":
    main()
