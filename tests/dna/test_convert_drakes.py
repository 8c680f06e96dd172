"""dna/convert_drakes.py: checkpoints of DRAKES, and hostile or damaged ones.

They need torch (pip install -r dna/requirements.txt), and are left out without it;
make_fixtures.py made the checkpoints from the original classes.
"""

import collections
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dna import convert_drakes
from dna.files import load_arrays, save_tree

torch = pytest.importorskip("torch")
FIXTURES = Path(__file__).parent / "fixtures"
CONVERTED = {
    ("pretrained", "raw"): "drakes.raw",
    ("pretrained", "ema"): "drakes.ema",
    ("finetuned", "raw"): "finetuned.raw",
    ("oracle", "raw"): "enformer",
}


def refused(path, *words):
    with pytest.raises(SystemExit) as error:
        convert_drakes.convert(path)
    message = str(error.value)
    assert message.startswith(f"error: {path}")
    assert message.isprintable()
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("name,weights", CONVERTED)
def test_conversion_of_the_originals(name, weights, tmp_path):
    """omegaconf and pathlib objects included; what the other tests read."""
    kind, tree = convert_drakes.convert(FIXTURES / f"{name}.ckpt", weights)
    save_tree(tmp_path / "x", tree, kind, data="gosai_all.csv")
    ours, meta = load_arrays(tmp_path / "x", kind)
    path = FIXTURES / f"{CONVERTED[name, weights]}.safetensors"
    theirs, their_meta = load_arrays(path, kind)
    assert meta == their_meta
    assert ours.keys() == theirs.keys()
    for key, array in ours.items():
        np.testing.assert_allclose(array, theirs[key], rtol=0, atol=1e-6)


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
def test_no_call_of_a_pickle_is_made(index, tmp_path):
    """Neither a refused checkpoint nor one that is read runs anything."""
    target, path = tmp_path / "run", tmp_path / "x.ckpt"
    evil = list(hostile(target))[index]
    state = torch.load(FIXTURES / "finetuned.ckpt", weights_only=True)
    torch.save({"evil": evil, "state_dict": state}, path)
    try:
        assert convert_drakes.convert(path)[0] == "generator"
    except SystemExit as error:
        assert str(error).isprintable()
    assert not target.exists()
    if index < 4:  # the pickle would have worked
        pickle.loads(pickle.dumps(evil))
        assert target.exists()


@pytest.mark.parametrize("fraction", [0, 0.001, 0.5, 0.999])
def test_a_damaged_checkpoint_is_one_line(fraction, tmp_path):
    data, path = (FIXTURES / "pretrained.ckpt").read_bytes(), tmp_path / "x.ckpt"
    path.write_bytes(data[: int(fraction * len(data))])
    refused(path, "no checkpoint")
    flipped = bytearray(data)
    flipped[100 + int(3000 * fraction)] ^= 255  # in data.pkl
    path.write_bytes(flipped)
    try:
        convert_drakes.convert(path)
    except SystemExit as error:
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
def test_a_wrong_network_is_refused(change, words, tmp_path):
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


def test_other_files_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="no EMA"):
        convert_drakes.convert(FIXTURES / "finetuned.ckpt", "ema")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "backbone.*")
    with zipfile.ZipFile(tmp_path / "y.ckpt", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
    refused(tmp_path / "y.ckpt")
    refused(FIXTURES / "oracle.npz")
    refused(tmp_path / "absent.ckpt")


def test_without_torch_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"pip install -r dna/requirements\.txt"):
        convert_drakes.convert(FIXTURES / "finetuned.ckpt")
