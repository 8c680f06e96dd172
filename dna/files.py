"""Networks and checkpoints of simpo_dna.py as safetensors: named arrays and no code."""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


def named_leaves(tree):
    """{"layers.0.conv.w": leaf} of a pytree."""
    named = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        named[jax.tree_util.keystr(path, simple=True, separator=".")] = leaf
    return named


def save_tree(path, tree, kind, **meta):
    """The leaves of a pytree, and meta that JSON can hold.

    A run killed while it saves keeps its last file."""
    arrays = {}
    for name, leaf in named_leaves(tree).items():
        arrays[name] = np.asarray(leaf, order="C")
    meta = json.dumps({"kind": kind, **meta})
    temporary = path.with_suffix(".tmp")
    save_file(arrays, temporary, metadata={"simpo_dna": meta})
    temporary.replace(path)


def load_arrays(path, kind):
    """-> {name: array}, meta of a file that `save_tree` wrote with that kind."""
    if not Path(path).exists():
        raise SystemExit(f"error: {path} does not exist")
    arrays = {}
    try:
        with safe_open(path, "np") as file:
            meta = json.loads(file.metadata()["simpo_dna"])
            for name in file.keys():  # noqa: SIM118, a file is no dict
                arrays[name] = file.get_tensor(name)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        raise SystemExit(f"error: {path} is no safetensors file of simpo_dna") from None
    if meta["kind"] != kind:
        raise SystemExit(f"error: {path} is a {meta['kind']}, expected a {kind}")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise SystemExit(f"error: {path}: {name} is not finite")
    return arrays, meta


def nest(arrays):
    """{"a.0.b": array} -> {"a": [{"b": array}]}."""
    root = {}
    for name, array in arrays.items():
        *parents, last = name.split(".")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return with_lists(root)


def with_lists(node):
    """A tree of dicts, those with the keys "0", "1", ... turned into lists."""
    if not isinstance(node, dict):
        return node
    if "0" in node:
        return [with_lists(node[str(i)]) for i in range(len(node))]
    return {key: with_lists(child) for key, child in node.items()}


def fill(template, arrays, path):
    """The pytree `template` with the arrays of its names, of the same shapes."""
    names = named_leaves(template)
    leaves = []
    for name, leaf in names.items():
        if name not in arrays or arrays[name].shape != leaf.shape:
            raise SystemExit(f"error: {path}: expected {name} of shape {leaf.shape}")
        leaves.append(arrays[name].astype(leaf.dtype))
    more = arrays.keys() - names.keys()
    if more:
        raise SystemExit(f"error: {path}: unexpected {ascii(min(more))}")
    return jax.tree.unflatten(jax.tree.structure(template), leaves)
