"""dna/files.py: models and checkpoints read back, and files that are refused."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import simpo_dna
from dna.files import load_arrays, nest, save_tree

THETA = simpo_dna.init_generator(jax.random.key(0), 4, 5)


def test_a_model_is_read_back(tmp_path):
    path = tmp_path / "x.safetensors"
    tuned = jax.tree.map(lambda leaf: leaf + 1, THETA)
    models = {"pretrained": THETA, "finetuned": tuned}
    save_tree(path, models, "generator", data="mine.csv")
    found, meta = simpo_dna.load_generator(path)
    assert meta["data"] == "mine.csv"
    assert jax.tree.structure(found) == jax.tree.structure(models)
    jax.tree.map(np.testing.assert_array_equal, found, models)


def test_a_checkpoint_is_read_back(tmp_path):
    """With scalars, tuples of the optimiser, and a transposed array."""
    path = tmp_path / "x.safetensors"
    tree = {"a": [np.float32(3)], "b": (np.arange(6).reshape(2, 3).T,)}
    save_tree(path, tree, "checkpoint", step=7)
    arrays, meta = load_arrays(path, "checkpoint")
    assert meta["step"] == 7
    found = nest(arrays)
    np.testing.assert_array_equal(found["a"][0], 3)
    np.testing.assert_array_equal(found["b"][0], tree["b"][0])


def damage(kind, path):
    """Writes a model with a fault."""
    tree = jax.tree.map(np.array, THETA)
    if kind == "not finite":
        tree["head"][0]["b"][0] = np.nan
    elif kind == "expected pretrained.head.0.b":
        tree["head"][0]["b"] = np.zeros(1, np.float32)
    elif kind == "has 6 layers":
        tree["layers"].append(tree["layers"][0])
    elif kind == "expected pretrained.layers.2.norm":
        del tree["layers"][2]["norm"]
    elif kind == "unexpected 'pretrained.more'":
        tree["more"] = np.zeros(1)
    elif kind == "no whole generator":
        tree = {"first": tree["first"]}
    kinds = {"is a checkpoint": "checkpoint"}
    models = {"pretrained": tree}
    save_tree(path, models, kinds.get(kind, "generator"), data=None)
    content = path.read_bytes()
    if kind == "no safetensors file of simpo_dna, cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "no safetensors file of simpo_dna, flipped":
        path.write_bytes(b"\xff" * 8 + content[8:])
    elif kind == "no safetensors file of simpo_dna, text":
        path.write_text("seq\nACGT\n")
    elif kind == "no safetensors file of simpo_dna, foreign":
        save_file({"x": np.zeros(3)}, path)


KINDS = [
    "not finite",
    "expected pretrained.head.0.b",
    "has 6 layers",
    "expected pretrained.layers.2.norm",
    "unexpected 'pretrained.more'",
    "no whole generator",
    "is a checkpoint",
    "no safetensors file of simpo_dna, cut",
    "no safetensors file of simpo_dna, flipped",
    "no safetensors file of simpo_dna, text",
    "no safetensors file of simpo_dna, foreign",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_model_is_one_line(kind, tmp_path):
    path = tmp_path / "x.safetensors"
    damage(kind, path)
    with pytest.raises(SystemExit) as error:
        simpo_dna.load_generator(path)
    message = str(error.value)
    assert message.startswith(f"error: {path}")
    assert message.isprintable()
    assert kind.split(",")[0] in message
