"""dna/score.py: scores as CSV, agreement with a column, and oracles that misbehave."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dna import score
from dna.data import decode, generate_data
from dna.motifs import load_motifs, motif_score

pytestmark = pytest.mark.usefixtures("quick_compiler")
ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(__file__).parent / "fixtures" / "finetuned.raw.safetensors"
X = generate_data(64).x[:, :60]
LETTERS = decode(X)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(*flags) -> exit code or message, stdout, stderr of main()."""
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        monkeypatch.setattr("sys.argv", ["score.py", *map(str, flags)])
        try:
            score.main()
            code = 0
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return call


def scores_of(part):
    return np.asarray(motif_score(load_motifs(part=part), X.astype(np.int32)))


def write_csv(path, column):
    with path.open("w") as file:
        file.write("seq,act\n")
        for letters, value in zip(LETTERS, column, strict=True):
            file.write(f"{letters},{value}\n")


def test_scores_keep_names_with_commas(call, tmp_path):
    """Rows that are dropped are counted on stderr, beside the table."""
    names = [f"chr1:{i},000-{i},060" for i in range(64)]
    with (tmp_path / "x.fa").open("w") as file:
        for name, letters in zip(names, LETTERS, strict=True):
            file.write(f">{name} words\n{letters}\n")
        file.write(f">bad\n{LETTERS[0][:-1]}N\n")
    code, out, err = call("x.fa", "--drop-bad-rows", "--model", MODEL)
    assert code == 0
    assert err == "x.fa: 1 of 65 sequences dropped\n"
    header, *rows = csv.reader(out.splitlines())
    assert header == ["name", "ft", "eval", "loglik"]
    assert [row[0] for row in rows] == names
    numbers = np.array([row[1:] for row in rows], float)
    np.testing.assert_allclose(numbers[:, 0], scores_of("ft"), atol=1e-3)
    np.testing.assert_allclose(numbers[:, 1], scores_of("eval"), atol=1e-3)
    assert np.all(numbers[:, 2] < -20)
    message, out, _ = call("x.fa")
    assert message.startswith("error: x.fa: line 129 has the letter 'N'")
    assert out == ""


def test_a_pipe_is_read_once(tmp_path):
    write_csv(tmp_path / "x.csv", range(64))
    command = [sys.executable, "-m", "dna.score", "/dev/stdin"]
    with (tmp_path / "x.csv").open() as file:
        cat = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE)
        end = subprocess.run(
            command, cwd=ROOT, stdin=cat.stdout, capture_output=True, text=True
        )
        cat.stdout.close()
        cat.wait()
    assert end.returncode == 0, end.stderr
    assert len(end.stdout.splitlines()) == 65


def test_agreement_with_a_column(call, tmp_path):
    values = np.arange(64) * 7 % 64
    write_csv(tmp_path / "x.csv", values)
    _, out, _ = call("x.csv", "--column", "act")
    for line, part in zip(out.splitlines(), ("ft", "eval"), strict=True):
        q = scores_of(part)
        pearson = stats.pearsonr(q, values).statistic
        spearman = stats.spearmanr(q, values).statistic
        correlations = f"Pearson {pearson:.3f}, Spearman {spearman:.3f}"
        assert line == f"{part} oracle, 64 sequences: {correlations}"


@pytest.mark.parametrize("labels", ["ab", ["9", "10"], ["-1", "1.5"]])
def test_the_larger_of_two_labels_is_the_positive_one(labels, call, tmp_path):
    """By number where both are: 10 is more than 9."""
    write_csv(tmp_path / "x.csv", [labels[i % 2] for i in range(64)])
    _, out, _ = call("x.csv", "--column", "act")
    for line, part in zip(out.splitlines(), ("ft", "eval"), strict=True):
        q = scores_of(part)
        area = np.mean(q[1::2, None] > q[None, ::2])
        assert line.endswith(f"AUC of {labels[1]} against {labels[0]} {area:.3f}")


@pytest.mark.parametrize("column", [["1"] * 64, ["a", "b", "c", "d"] * 16])
def test_a_column_without_order_is_one_line(column, call, tmp_path):
    write_csv(tmp_path / "x.csv", column)
    message, out, _ = call("x.csv", "--column", "act")
    assert message == "error: act has neither two labels nor different numbers"
    assert out == ""


ORACLES = """
import numpy as np

class Tensor:
    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert a cuda tensor")

def count(seqs): return [s.count("G") for s in seqs]
def columns(seqs): return [[0, s.count("G")] for s in seqs]
def generator(seqs): return (s.count("G") for s in seqs)
def mapping(seqs): return {s: s.count("G") for s in seqs}
def text(seqs): return [str(s.count("G")) for s in seqs]
def nothing(seqs): return None
def raises(seqs): raise RuntimeError("model server away")
def ragged(seqs): return [[1.0], [2.0, 3.0]] * (len(seqs) // 2)
def tensor(seqs): return Tensor()
def short(seqs): return [1.0]
def imaginary(seqs): return np.ones(len(seqs)) * 1j
def huge(seqs): return np.full(len(seqs), 1e300)
def nan(seqs): return [float("nan")] + [1.0] * (len(seqs) - 1)
def indices(x): return (x == 2).sum(axis=1)
indices.takes_indices = True
number = 3
"""
BAD_ORACLES = {
    "generator": "returned object of shape ()",
    "mapping": "returned object of shape ()",
    "text": "expected 32 numbers",
    "nothing": "expected 32 numbers",
    "raises": "RuntimeError: model server away",
    "ragged": "ValueError: ",
    "tensor": "TypeError: can't convert a cuda tensor",
    "short": "returned float64 of shape (1,), expected 32 numbers",
    "imaginary": "returned complex128",
    "huge": f"not finite for {LETTERS[0]}",
    "nan": f"not finite for {LETTERS[0]}",
    "number": "is no function",
    "absent": "AttributeError: ",
}


@pytest.fixture
def oracles(tmp_path, monkeypatch):
    (tmp_path / "my_oracles.py").write_text(ORACLES)
    (tmp_path / "broken.py").write_text("raise OSError('no weights')\n")
    write_csv(tmp_path / "x.csv", range(64))
    yield
    sys.modules.pop("my_oracles", None)


@pytest.mark.parametrize("name", ["count", "indices"])
def test_an_oracle_of_your_own(name, call, oracles):
    """In calls of --batch-size sequences."""
    _, out, _ = call("x.csv", "--oracle", f"my_oracles:{name}", "--batch-size", 30)
    found = [float(row["ft"]) for row in csv.DictReader(out.splitlines())]
    assert found == [letters.count("G") for letters in LETTERS]
    flags = ("--oracle", "my_oracles:columns", "--oracle-column", 1)
    _, out, _ = call("x.csv", *flags)
    assert found == [float(row["ft"]) for row in csv.DictReader(out.splitlines())]


@pytest.mark.parametrize("name", BAD_ORACLES)
def test_a_bad_oracle_is_one_line(name, call, oracles):
    spec = f"my_oracles:{name}"
    message, out, _ = call("x.csv", "--oracle", spec, "--batch-size", 32)
    assert message.startswith(f"error: oracle {spec}")
    assert message.isprintable()
    assert BAD_ORACLES[name] in message
    assert out == ""


def test_a_module_that_raises_is_one_line(call, oracles):
    message, _, _ = call("x.csv", "--oracle", "broken:f")
    assert message == "error: oracle broken:f: OSError: no weights"


# Two outputs: the share of C, and that of G before T.
MODEL_OF_TORCH = """
import torch

class Model(torch.nn.Module):
    def forward(self, x):
        pairs = x[:, 2, :-1] * x[:, 3, 1:]
        return torch.stack([x[:, 1].mean(dim=1), pairs.mean(dim=1)], dim=1)

model = Model().eval()
"""


def test_a_pytorch_model_is_an_oracle(call, tmp_path, monkeypatch):
    """By the block in dna/README.md, which is saved as the module."""
    pytest.importorskip("torch")
    (tmp_path / "my_model.py").write_text(MODEL_OF_TORCH)
    page = (ROOT / "dna" / "README.md").read_text()
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "torch_oracle.py").write_text(block)
    write_csv(tmp_path / "x.csv", range(64))

    flags = ("--oracle", "torch_oracle:score", "--oracle-column", 1)
    code, out, _ = call("x.csv", *flags)
    assert code == 0
    found = [float(row["ft"]) for row in csv.DictReader(out.splitlines())]
    for letters, q in zip(LETTERS, found, strict=True):
        assert q == pytest.approx(letters.count("GT") / 59, abs=1e-4)
