"""benchmark/dna/: baselines, table and figure of a run of seconds."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import simpo_dna
from benchmark.dna import baselines, results
from dna.data import REWARD, decode, encode, generate_data
from dna.motifs import load_motifs, motif_score

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("quick_compiler")
TINY = """
    --data tiny.csv --weighting exp --hidden-dim 8 --pretrain-steps 10 --batch-size 16
    --num-groups 1 --grad-steps 1 --finetune-steps 12 --eval-samples 64
    --sampling-steps 4 --run-dir tiny__exp__1
""".split()


def rows_of(path):
    rows = csv.DictReader(path.open())
    return {row["method"]: row for row in rows}


def samples_of(path):
    """x [n, L] of a FASTA file."""
    letters = path.read_text().splitlines()[1::2]
    return np.stack([encode(line) for line in letters]).astype(np.int32)


@pytest.fixture(scope="module")
def root(tmp_path_factory, quick_compiler):
    """A folder with a run that has baselines, and its copy as another method."""
    root = tmp_path_factory.mktemp("dna")
    x = generate_data(200).x[:, :60]
    (root / "tiny.csv").write_text("\n".join(["seq", *decode(x), ""]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "argv", ["simpo_dna.py", *TINY])
        simpo_dna.main()
        shutil.copytree("tiny__exp__1", "tiny__square__1")
        baselines.main(Path("tiny__exp__1"))
    return root


def test_baselines_search_and_are_measured_as_the_models_are(root):
    run = root / "tiny__exp__1"
    found = rows_of(run / "baselines.csv")
    models = rows_of(run / "metrics.csv")
    untrained = float(models["pretrained"]["ft"])
    assert list(found) == ["best-of-6", "smc"]
    for name, row in found.items():
        assert row.keys() == models["pretrained"].keys()
        x = samples_of(run / f"{name}.fasta")
        assert x.shape == (64, 60)
        for part in ("ft", "eval"):
            want = np.median(motif_score(load_motifs(part=part), x))
            assert float(row[part]) == pytest.approx(want, abs=1e-3)
        assert float(row["ft"]) > untrained + 0.1
    calls = 12 * 32
    assert found["best-of-6"]["oracle_calls"] == str(calls)  # as many as fine-tuning
    assert models["finetuned"]["oracle_calls"] == str(calls)
    assert found["smc"]["oracle_calls"] == str(4 * 64)


def test_populations_are_resampled_alone():
    """By exp(log_w): what is far below the others of its own 64 leaves."""
    log_w = np.full(128, -50.0)
    log_w[[3, 5]] = 0, np.log(3)
    log_w[64:] = -1000
    log_w[100] = -900
    rows = baselines.resample(np.random.default_rng(0), log_w)
    assert set(rows[:64]) == {3, 5}
    assert np.mean(rows[:64] == 5) == pytest.approx(0.75, abs=0.15)
    assert set(rows[64:]) == {100}


def test_the_table_and_the_figure(root, tmp_path, capsys):
    runs = (root / "tiny__exp__1", root / "tiny__square__1")
    results.main(results.Args(runs, out=tmp_path))
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    methods = ["pretrained", "exp", "best-of-6", "smc", "square"]  # the untrained once
    assert [row["method"] for row in rows] == methods
    top = json.loads(REWARD.read_text())["eval"]["top"]
    curve = np.genfromtxt(runs[0] / "finetune.csv", delimiter=",", names=True)
    for row in rows:
        share = float(row["eval"]) / top
        assert float(row["top_share"]) == pytest.approx(share, rel=1e-3)
        is_tuned = row["method"] in ("exp", "square")
        assert np.isfinite(float(row["kl_pretrained"])) == is_tuned
    assert float(rows[1]["w_kl"]) == pytest.approx(curve["w_kl"][-1], rel=1e-3)
    out = capsys.readouterr().out.splitlines()
    assert out == results.table_lines(rows)
    rows = list(csv.DictReader((tmp_path / "curves.csv").open()))
    steps = [row["step"] for row in rows]
    assert steps == ["1", "11", "12"] * 2  # the judged ones
    last = curve["eval_median"][-1]
    assert float(rows[2]["eval_median"]) == pytest.approx(last, rel=1e-3)
    assert rows[2]["method"] == "exp"
    assert rows[3]["method"] == "square"
    assert (tmp_path / "divergence.png").stat().st_size > 5000


def test_the_table_has_medians_and_ranges():
    rows = []
    for value in ("3", "1", "2.5"):
        row = dict.fromkeys(results.PRINTED, value)
        row["data"] = "sites"
        row["method"] = "exp"
        row["w_kl"] = "nan"
        rows.append(row)
    header, _, line = results.table_lines(rows)
    names = header.split(" | ")
    cells = line.split(" | ")
    cells = dict(zip(names, cells, strict=True))
    assert cells["seeds"] == "3"
    assert cells["eval"] == "2.50 (1.00 to 3.00)"
    assert cells["gc"] == "2.50"
    assert cells["w_kl"] == "-"


def test_the_page_shows_the_table():
    """Every row of table.csv, as the script prints it."""
    page = (ROOT / "docs" / "dna.md").read_text()
    with (ROOT / "benchmark" / "dna" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    for line in results.table_lines(rows)[2:]:
        assert line in page


@pytest.mark.parametrize("name", ["mine", "a__b__1"])
def test_a_folder_that_does_not_fit_is_one_line(name, tmp_path):
    """No name of three parts, or no complete run."""
    (tmp_path / name).mkdir()
    with pytest.raises(SystemExit, match="is no complete DATA__METHOD__SEED"):
        results.main(results.Args((tmp_path / name,)))
