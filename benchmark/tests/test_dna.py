"""benchmark/dna/: peers, table and figure of a run of seconds."""

import csv
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

TINY = """
    --data tiny.csv --weighting exp --hidden-dim 8 --pretrain-steps 10 --batch-size 16
    --num-groups 1 --grad-steps 1 --finetune-steps 6 --eval-samples 32 --sampling-steps 4
""".split()


def rows_of(path):
    return {row["method"]: row for row in csv.DictReader(path.open())}


def test_peers_table_and_divergence_of_a_run(env, tmp_path):
    letters = np.random.default_rng(0).choice(list("ACGT"), (200, 60))
    (tmp_path / "tiny.csv").write_text("seq\n" + "".join("".join(x) + "\n" for x in letters))
    first, second = "tiny__exp__1", "tiny__linear_neg0.05__1"

    def python(script, *flags):
        command = [sys.executable, ROOT / script, *flags]
        return subprocess.run(command, cwd=tmp_path, env=env, check=True, stdout=subprocess.PIPE)

    python("simpo_dna.py", "--run-dir", first, *TINY)
    python("benchmark/dna/peers.py", first)
    row, peers = rows_of(tmp_path / first / "metrics.csv"), rows_of(tmp_path / first / "peers.csv")
    assert list(peers) == ["best-of-n", "smc"]
    assert float(peers["best-of-n"]["ft"]) > float(row["pretrained"]["ft"]) + 0.5
    assert peers["best-of-n"]["oracle_calls"] == row["simpo-exp"]["oracle_calls"] == "192"
    assert peers["smc"]["oracle_calls"] == str(5 * 32)  # before the first step and after each
    assert float(peers["smc"]["ft"]) > float(row["pretrained"]["ft"])
    assert (tmp_path / first / "smc.fasta").read_text().count(">") == 32

    shutil.copytree(tmp_path / first, tmp_path / second)
    table = python("benchmark/dna/table.py", first, second, "--out", "table.csv").stdout.decode()
    assert "| tiny | best-of-n | 1 |" in table
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    methods = [(x["data"], x["seed"], x["method"]) for x in rows]
    expected = "pretrained", "exp", "best-of-n", "smc", "linear_neg0.05"  # the first once
    assert methods == [("tiny", "1", x) for x in expected]
    assert all((float(x["kl_pretrained"]) >= 0) == (x["method"] in expected[1::3]) for x in rows)
    python("benchmark/dna/divergence.py", first, second, "--out", "d.png", "--csv", "d.csv")
    rows = list(csv.DictReader((tmp_path / "d.csv").open()))
    assert [x["method"] for x in rows] == ["exp"] * 6 + ["linear_neg0.05"] * 6
    assert (tmp_path / "d.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("script", "mentions"),
    [
        ("table.py", ("none of the folders", "DATA__METHOD__SEED")),
        ("divergence.py", ("none of the folders", "DATA__METHOD__SEED")),
        ("peers.py", ["has no pretrained.npz"]),
        ("motifs.py", ["has no metrics.csv"]),
    ],
)
def test_folders_that_do_not_fit_are_one_line(script, mentions, env, tmp_path):
    (tmp_path / "mine").mkdir()
    for word in mentions:
        command = [sys.executable, ROOT / "benchmark/dna" / script, "mine"]
        run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert run.returncode == 2 and word in run.stderr and run.stderr.count("\n") == 1
        for name in "metrics.csv", "finetune.csv":
            (tmp_path / "mine" / name).write_text("method\npretrained\n")


def test_methods_look_as_in_the_other_figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark" / "dna")
    from divergence import look

    looks = [tuple(look(x).values()) for x in ("exp", "linear_neg0.05", "square_neg1_floor")]
    assert looks[0] == ("tab:green", "-", "Exp")
    assert looks[1] == ("tab:red", "--", "Lin. Neg. -0.05")
    assert looks[2] == ("tab:orange", ":", "Sqr. Neg. -1 floor")
    assert look("uniform")["color"] == "black" and look("square_anchor")["label"] == "Square anchor"
