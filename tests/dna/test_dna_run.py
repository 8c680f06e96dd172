"""What a run of simpo_dna.py writes, how it goes on, and what it refuses."""

import csv
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.spatial.distance import jensenshannon

import simpo_dna as sd
from dna.data import decode, encode, generate_data, read_data, shuffle_dinucleotides
from dna.metrics import kmer_counts
from dna.motifs import load_motifs, motif_hits, motif_score
from dna.oracles import load_oracle
from dna.runs import cut_rows

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = Path(__file__).parent / "fixtures"
LENGTH = 48
TINY = """
    --sampling-steps 8 --num-samples 8 --num-groups 4 --eps-kl 0.9 --checkpoint-every 4
    --data tiny.csv --score-column hepg2 --eval-samples 32
    --hidden-dim 16 --batch-size 16 --pretrain-steps 60 --pretrain-lr 5e-3
    --neg-clip -0.2 --neg-floor 0.05 --finetune-steps 3 --grad-steps 2
""".split()

# One argument before the flags, FUNCTION:COUNT, kills the run at its COUNT-th call.
KILLER = f"""
import os
import sys

sys.path.insert(0, {str(ROOT)!r})
import simpo_dna

name, count = sys.argv.pop(1).split(":")
function = getattr(simpo_dna, name)
calls = []

def watched(*args):
    calls.append(name)
    if len(calls) == int(count):
        os.kill(os.getpid(), 9)
    return function(*args)

setattr(simpo_dna, name, watched)
simpo_dna.main()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a training set, an oracle and the script that is killed."""
    root = tmp_path_factory.mktemp("dna")
    (root / "killer.py").write_text(KILLER)
    x = generate_data(400).x[:256, :LENGTH]
    with (root / "tiny.csv").open("w") as file:
        file.write("seq,hepg2,cell\n")
        for i, letters in enumerate(decode(x)):
            file.write(f"{letters},{i * 7 % 256},{'ab'[i % 2]}\n")
    (root / "reward.py").write_text(
        "def gc(seqs):\n    return [s.count('G') + s.count('C') for s in seqs]\n\n\n"
        "def same(seqs):\n    return [1] * len(seqs)\n\n\n"
        "def away(seqs):\n    raise RuntimeError('model server away')\n"
    )
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("jax-cache")


@pytest.fixture(scope="module")
def run(root, cache):
    """run(*flags) -> exit code, stdout, stderr of the script in its own process."""

    def run(*flags, kill=None, devices=1):
        env = os.environ | {
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_NUM_CPU_DEVICES": str(devices),
        }
        script = [root / "killer.py", kill] if kill else [ROOT / "simpo_dna.py"]
        command = [sys.executable, *script, *flags]
        end = subprocess.run(
            list(map(str, command)), cwd=root, env=env, capture_output=True, text=True
        )
        return end.returncode, end.stdout, end.stderr

    return run


@pytest.fixture(scope="module")
def whole(run, root):
    """A run to its end -> its folder and stdout."""
    code, out, err = run(*TINY, "--run-dir", "whole")
    assert code == 0, err
    return root / "whole", out


def table_of(run_dir):
    """{row: {column: number}} of metrics.csv."""
    table = {}
    for row in csv.DictReader((run_dir / "metrics.csv").open()):
        name = row.pop("method")
        table[name] = {column: float(value) for column, value in row.items()}
    return table


def samples_of(run_dir, name):
    """x [n, L] of a FASTA file and {key: [n]} of its records."""
    lines = (run_dir / f"{name}.fasta").read_text().splitlines()
    columns = {}
    for i, line in enumerate(lines[::2]):
        assert line.split()[0] == f">{name}_{i}"
        for key, value in re.findall(r"(\w+)=(\S+)", line):
            columns.setdefault(key, []).append(float(value))
    x = np.stack([encode(letters) for letters in lines[1::2]]).astype(np.int32)
    return x, columns


def curve_of(run_dir, phase="finetune"):
    return np.genfromtxt(run_dir / f"{phase}.csv", delimiter=",", names=True, ndmin=1)


FILES = """
    args.json versions.json pretrain.csv finetune.csv metrics.csv curves.png
    pretrained.fasta finetuned.fasta pretrained.safetensors finetuned.safetensors
    pretrain_checkpoint.safetensors finetune_checkpoint.safetensors
""".split()


def test_a_run_writes_its_folder(whole, root, run):
    run_dir, out = whole
    assert out.startswith("run folder  whole\ndevice      1 x cpu\n")
    assert "\nfinetune 3/3 q_median " in out  # tells without a terminal that it lives
    assert "\nreference   best 200 of 256 sequences by column hepg2\n" in out
    found = {path.name for path in run_dir.iterdir()}
    assert {name for name in found if not name.startswith("events.")} == set(FILES)
    args = json.loads((run_dir / "args.json").read_text())
    assert args["neg_clip"] == -0.2
    assert args["data"] == str(root / "tiny.csv")
    versions = json.loads((run_dir / "versions.json").read_text())
    assert {"jax", "commit"} < set(versions)
    pretrain = curve_of(run_dir, "pretrain")
    finetune = curve_of(run_dir)
    np.testing.assert_array_equal(pretrain["step"], [50, 60])
    np.testing.assert_array_equal(finetune["step"], [1, 2, 3])
    assert np.all(np.abs(pretrain["valid_nll"] - 1.386) < 0.1)  # of 24 sequences
    np.testing.assert_array_equal(np.isnan(finetune["nll"]), [False, True, False])
    assert finetune["nll"][0] == finetune["nll_pretrained"][0]
    assert finetune["nll"][2] != finetune["nll_pretrained"][2]
    assert finetune["w_negative"].max() > 0
    assert run("--resume", "whole")[:2] == (0, "whole is complete\n")


def test_the_table_follows_from_the_samples(whole, root):
    """Every number of metrics.csv from the FASTA files."""
    run_dir, _ = whole
    values = np.arange(256) * 7 % 256
    data = read_data(root / "tiny.csv")
    best = data.x[np.argsort(-values)[:200]].astype(np.int32)
    sets = {part: load_motifs(part=part) for part in ("ft", "eval", "control")}
    table = table_of(run_dir)
    assert list(table) == ["pretrained", "finetuned"]
    for name, calls in (("pretrained", 0), ("finetuned", 96)):
        x, columns = samples_of(run_dir, name)
        shuffled = shuffle_dinucleotides(x, np.random.default_rng(1))
        kmers = [kmer_counts(rows) for rows in (x, best)]
        shares = [counts / counts.sum() for counts in kmers]
        hits = [motif_hits(sets["control"], rows).mean(axis=0) for rows in (x, best)]
        log_ratio = np.log(hits[0] + 0.01) - np.log(hits[1] + 0.01)
        distances = [np.sum(a != b) for a, b in itertools.combinations(x, 2)]
        expected = {
            "log_lik": np.median(columns["loglik"]),
            "oracle_calls": calls,
            "judge_calls": calls * 2 // 3,  # not in the second of three iterations
            "js_6mer": jensenshannon(*shares, base=2) ** 2,
            "motif_ratio": np.abs(log_ratio).max(),
            "gc": np.isin(x, (1, 2)).mean(),
            "unique": len(np.unique(x, axis=0)) / 32,
            "distance": np.median(distances),
        }
        for part in ("ft", "eval"):
            q = motif_score(sets[part], x)
            np.testing.assert_allclose(columns[part], q, atol=1e-3)
            expected[part] = np.median(q)
            expected[f"{part}_shuffled"] = np.median(motif_score(sets[part], shuffled))
        assert table[name] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_kmers_by_hand():
    x = generate_data(5).x[:, :LENGTH]
    counts = {}
    for letters in decode(x):
        for i in range(LENGTH - 2):
            kmer = letters[i : i + 3]
            counts[kmer] = counts.get(kmer, 0) + 1
    kmers = [a + b + c for a in "ACGT" for b in "ACGT" for c in "ACGT"]
    want = [counts.get(kmer, 0) for kmer in kmers]
    np.testing.assert_array_equal(kmer_counts(x, k=3), want)


def test_killed_ends_bit_identical(whole, root, run):
    """kill -9 between two checkpoints of pretraining and within an iteration."""
    assert run(*TINY, "--run-dir", "killed", kill="pretrain_step:11")[0] == -9
    assert run("--resume", "killed", kill="finetune_step:4")[0] == -9
    assert run("--resume", "killed")[0] == 0
    for name in ("pretrain.csv", "finetune.csv", "metrics.csv", "finetuned.fasta"):
        ours = (root / "killed" / name).read_bytes()
        assert ours == (root / "whole" / name).read_bytes(), name
    for name in ("finetuned.safetensors", "finetune_checkpoint.safetensors"):
        ours = load_file(root / "killed" / name)
        theirs = load_file(root / "whole" / name)
        assert ours.keys() == theirs.keys()
        for key, array in ours.items():
            np.testing.assert_array_equal(array, theirs[key], err_msg=f"{name} {key}")


def test_the_number_of_devices_does_not_matter(whole, root, run):
    """Nor whether pretraining was a run of its own."""
    model = "whole/pretrained.safetensors"
    flags = TINY[: TINY.index("--hidden-dim")] + TINY[TINY.index("--neg-clip") :]
    code, out, err = run(*flags, "--pretrained", model, "--run-dir", "four", devices=4)
    assert code == 0, err
    assert "\ndevice      4 x cpu\n" in out
    ours = curve_of(root / "four")
    theirs = curve_of(root / "whole")
    for name in ours.dtype.names:
        np.testing.assert_allclose(
            ours[name], theirs[name], rtol=1e-4, atol=1e-4, err_msg=name
        )


def test_a_finished_run_is_prolonged(whole, root, run):
    """Its rows stay, and its first model remains the reference."""
    run_dir, _ = whole
    shutil.copytree(run_dir, root / "longer")
    code, _, err = run("--resume", "longer", "--finetune-steps", 5)
    assert code == 0, err
    rows = (root / "longer" / "finetune.csv").read_text()
    assert rows.startswith((run_dir / "finetune.csv").read_text())
    assert curve_of(root / "longer")["step"].tolist() == [1, 2, 3, 4, 5]
    assert table_of(root / "longer")["finetuned"]["oracle_calls"] == 5 * 32
    assert json.loads((root / "longer/args.json").read_text())["finetune_steps"] == 5
    message = run("--resume", "longer", "--finetune-steps", 3)[2]
    assert message == "error: --finetune-steps of that run is 5, and may grow\n"
    name = "pretrained.safetensors"
    assert (run_dir / name).read_bytes() == (root / "longer" / name).read_bytes()


def test_a_tuned_model_keeps_its_reference(whole, root, run):
    """As the start of another run, whose KL and likelihoods are to the first model."""
    run_dir, _ = whole
    flags = TINY[: TINY.index("--hidden-dim")]
    flags += ["--finetune-steps", 1, "--grad-steps", 1, "--run-dir", "again"]
    code, _, err = run(*flags, "--pretrained", run_dir / "finetuned.safetensors")
    assert code == 0, err
    assert curve_of(root / "again")["kl_pretrained"] > 0  # before the first step
    table = table_of(root / "again")
    assert list(table) == ["pretrained", "finetuned"]
    assert [row["oracle_calls"] for row in table.values()] == [0, 32]
    old = load_file(run_dir / "finetuned.safetensors")
    new = load_file(root / "again" / "finetuned.safetensors")
    for name, array in old.items():
        same = np.array_equal(array, new[name])
        assert same == name.startswith("pretrained.") or "time" in name


def test_designs_keep_their_template(whole, run):
    """And are written once each, best first, with the scores of both oracles."""
    run_dir, _ = whole
    template = "ACGT" + "N" * 40 + "TTTT"
    command = [sys.executable, "-m", "dna.generate", str(run_dir)]
    command += ["--num", "40", "--template", template]
    end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    rows = list(csv.DictReader((run_dir / "designs.csv").open()))
    (run_dir / "designs.csv").unlink()
    sequences = [row["sequence"] for row in rows]
    assert len(set(sequences)) == len(rows) > 30
    for letters in sequences:
        assert len(letters) == LENGTH
        assert letters.startswith("ACGT") and letters.endswith("TTTT")
    x = np.stack([encode(letters) for letters in sequences]).astype(np.int32)
    for part in ("ft", "eval"):
        found = [float(row[part]) for row in rows]
        want = motif_score(load_motifs(part=part), x)
        np.testing.assert_allclose(found, want, atol=1e-3)
    best_first = [float(row["ft"]) for row in rows]
    assert best_first == sorted(best_first, reverse=True)
    command[-1] = "ACGX"
    end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert end.stderr == "error: --template must have the letters A, C, G, T and N\n"


def test_files_of_drakes_and_a_judge_of_your_own(root, run):
    oracle = f"enformer:{FIXTURES / 'enformer.safetensors'}"
    flags = TINY[: TINY.index("--hidden-dim")]
    flags += ["--pretrained", FIXTURES / "drakes.raw.safetensors"]
    flags += ["--oracle", oracle, "--oracle-column", 1, "--eval-oracle", "reward:gc"]
    flags += ["--finetune-steps", 1, "--grad-steps", 1, "--eval-samples", 1]
    code, _, err = run(*flags, "--run-dir", "drakes")
    assert code == 0, err
    score = load_oracle(oracle, column=1)
    for name in table_of(root / "drakes"):
        x, columns = samples_of(root / "drakes", name)
        assert x.shape == (1, LENGTH)
        assert columns["ft"] == pytest.approx(score(x), rel=1e-3, abs=1e-4)
        assert columns["eval"] == [np.isin(x, (1, 2)).sum()]


# ---- what is refused -----------------------------------------------------------------
@pytest.fixture
def call(monkeypatch, capsys, root):
    """call(line) -> exit code or message, stdout, stderr of main() in this process."""
    monkeypatch.chdir(root)
    handler = signal.getsignal(signal.SIGINT)

    def call(line):
        monkeypatch.setattr("sys.argv", ["simpo_dna.py", *line.split()])
        try:
            sd.main()
            code = 0
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGINT, handler)


BAD_FLAGS = {
    "--eps-kl 3.5": "log N), 3.466",
    "--num-samples 1": "at least 2",
    "--neg-clip 0.1": "at most 0",
    "--neg-clip -0.1 --weighting exp": "is for linear, square and power",
    "--neg-floor 0.1": "is for negative weights",
    "--grad-steps 0": "--grad-steps must be above 0",
    "--finetune-lr nan": "--finetune-lr must be above 0",
    "--num-layers 7": "multiple of 5",
    "--oracle reward:gc": "--eval-oracle must be given",
    "--score-column k562": "needs --data",
    "--weighting square2": "square2",
    "--pretrained a.safetensors --hidden-dim 8": "its own size",
    "--unknown 1": "--unknown",
}


@pytest.mark.parametrize("line", BAD_FLAGS)
def test_bad_flags_are_errors_of_usage(line, call):
    code, _, err = call(line)
    assert code == 2
    text = " ".join(re.sub("[^ -~]", " ", err).split())
    assert BAD_FLAGS[line] in text


DRAKES = f"{FIXTURES}/drakes.raw.safetensors"
ENFORMER = f"enformer:{FIXTURES}/enformer.safetensors --eval-oracle motif"
BAD_INPUT = {
    "--pretrained absent": "absent does not exist",
    "--data absent.csv": "absent.csv: ",
    "--pretrained tiny.csv --data tiny.csv": "tiny.csv is no safetensors file",
    f"--pretrained {DRAKES}": "was trained on gosai_all.csv; --data must be",
    "--oracle motif:tiny.csv --eval-oracle motif": "motif:tiny.csv: ",
    "--oracle enformer:absent --eval-oracle motif": "absent does not exist",
    f"--oracle enformer:{DRAKES} --eval-oracle motif": "is a generator",
    f"--oracle {ENFORMER} --oracle-column 3": "--oracle-column 3, but",
    "--oracle absent:f --eval-oracle motif": "No module named 'absent'",
    "--oracle reward:absent --eval-oracle motif": "AttributeError",
    "--oracle reward:same --eval-oracle motif": "the ft oracle gives 8 training",
    "--eval-oracle reward:same": "the held_out oracle gives 8 training",
    "--eval-oracle reward:away": "RuntimeError: model server away",
    "--data tiny.csv --score-column k562": "no column k562, but seq, hepg2, cell",
    "--data tiny.csv --run-dir used": "used: File exists",
    "--resume absent": "absent is no run folder",
    "--resume used --seed 1": "--resume takes only --track",
}


@pytest.mark.parametrize("line", BAD_INPUT)
def test_bad_input_is_one_line(line, call, root):
    (root / "used").mkdir(exist_ok=True)
    code, out, _ = call(line)
    assert isinstance(code, str)
    assert code.startswith("error: ")
    assert code.isprintable()
    assert BAD_INPUT[line] in code
    assert out == ""
    assert not (root / "runs").exists()


def folder_of(run_dir, tmp_path, **changes):
    """A copy of a run folder with other flags in its args.json; None takes one out."""
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    (copy / "metrics.csv").unlink()
    args = json.loads((copy / "args.json").read_text())
    for name, value in changes.items():
        args[name] = value
        if value is None:
            del args[name]
    (copy / "args.json").write_text(json.dumps(args))
    return copy


def test_a_folder_of_another_version_is_refused(whole, call, tmp_path):
    run_dir, _ = whole
    copy = folder_of(run_dir, tmp_path, replay=None, distributed=False)
    commit = json.loads((run_dir / "versions.json").read_text())["commit"]
    message, _, _ = call(f"--resume {copy}")
    assert message.startswith(f"error: {copy}")
    for mention in ("replay", "distributed", str(commit)):
        assert mention in message


def test_another_training_set_is_refused(whole, call, tmp_path, monkeypatch):
    """Also from another folder, where a file of the same name lies."""
    run_dir, _ = whole
    copy = folder_of(run_dir, tmp_path)
    other = tmp_path / "tiny.csv"
    shutil.copy(run_dir.parent / "tiny.csv", other)
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(f"--resume {copy}")
    assert code == 0
    assert "reference   best 200 of 256" in out
    (copy / "metrics.csv").unlink()
    text = other.read_text().replace("hepg2", "k562,hepg2").replace(",", ",1,", 1)
    other.write_text(text.replace("seq,1,k562", "seq,k562"))
    args = json.loads((copy / "args.json").read_text())
    (copy / "args.json").write_text(json.dumps(args | {"data": str(other)}))
    message, _, _ = call(f"--resume {copy}")
    assert message.startswith(f"error: {other}")


def test_a_folder_in_use_is_refused(whole, call, tmp_path):
    run_dir, _ = whole
    copy = folder_of(run_dir, tmp_path)
    with (copy / "args.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        message, _, _ = call(f"--resume {copy}")
    assert message == f"error: another process trains in {copy}"


CUT = {  # a CSV as a killed run left it, and what is kept up to step 2
    "": None,
    "step,lo": None,
    "step,loss\n": "step,loss\n",
    "step,loss\n1,0.5\n2,0.4\n3,0.3\n12,0.2\n": "step,loss\n1,0.5\n2,0.4\n",
    "step,loss\n1,0.5\n2": "step,loss\n1,0.5\n",
    "step,loss\n1,0.5\n2,0.": "step,loss\n1,0.5\n",
}


@pytest.mark.parametrize("text", CUT)
def test_rows_behind_the_checkpoint_are_cut_off(text, tmp_path):
    path = tmp_path / "finetune.csv"
    path.write_text(text)
    cut_rows(path, 2)
    assert (path.read_text() if path.exists() else None) == CUT[text]


def test_a_constant_score_is_no_reference(call, root):
    text = (root / "tiny.csv").read_text().splitlines()
    rows = ["seq,act"] + [line.split(",")[0] + ",1" for line in text[1:]]
    (root / "const.csv").write_text("\n".join(rows) + "\n")
    model = "--pretrained whole/pretrained.safetensors --run-dir const"
    flags = "--data const.csv --score-column act --finetune-steps 0 --eval-samples 8"
    message, _, _ = call(f"{model} {flags} --sampling-steps 2")
    assert message == "error: column act gives every sequence the same score"
