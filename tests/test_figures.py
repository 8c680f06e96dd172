"""What figures 4 and 5 and the table of DNA results make of run folders."""

import csv
import dataclasses
import json
import runpy

import numpy as np
import pytest
from conftest import ROOT
from tensorboardX import SummaryWriter

from simpo_dmc import Args


@pytest.fixture(scope="module")
def figure5():
    return runpy.run_path(str(ROOT / "benchmark" / "figure5.py"))


def write_run(root, reward, weighting, seed, returns, **changes):
    """A run folder whose eval.csv has two episodes a step, returns -+ 1; speeds are 0.1 of it."""
    run_dir = root / f"{reward}-{weighting}-{seed}"
    run_dir.mkdir()
    args = Args(reward=reward, weighting=weighting, seed=seed, run_dir=str(run_dir))
    (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(args) | changes))
    lines = ["step,episode,return,length,stock_return,speed"]
    for i, ret in enumerate(returns):
        for episode, delta in enumerate((-1, 1)):
            value = ret + delta
            lines.append(f"{100 * (i + 1)},{episode},{value},1000,{2 * value},{value / 10}")
    (run_dir / "eval.csv").write_text("\n".join(lines) + "\n")
    return run_dir


def test_scalars_of_a_run_that_was_killed_while_it_wrote(tmp_path):
    collect = runpy.run_path(str(ROOT / "benchmark" / "collect.py"))
    with SummaryWriter(str(tmp_path)) as log:
        for step in (1, 2):
            log.add_scalar("losses/spread", step / 10, step)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    for cut, steps in ((0, {1, 2}), (3, {1}), (20, {1})):
        path.write_bytes(whole[: len(whole) - cut])
        assert set(collect["read_scalars"](tmp_path, "losses/spread")) == steps


def draw(figure5, runs, out, column="return"):
    figure5["main"](figure5["Args"](runs=tuple(runs), out=out, column=column))
    assert out.read_bytes()[:4] == b"\x89PNG" and out.stat().st_size < 300_000
    return list(csv.DictReader(out.with_suffix(".csv").open()))


def test_figure5_has_mean_and_standard_error_over_seeds(figure5, tmp_path):
    runs = [
        write_run(tmp_path, "exp", "linear", 1, [10, 20, 60]),
        write_run(tmp_path, "exp", "linear", 2, [12, 26, 70]),
        write_run(tmp_path, "exp", "linear", 3, [20, 50]),  # still running
        write_run(tmp_path, "exp", "exp", 1, [5]),
        write_run(tmp_path, "sqrt", "linear", 1, [90]),
    ]
    rows = draw(figure5, runs, tmp_path / "figure.png")
    names = ["task", "reward", "weighting", "step", "seeds", "mean", "standard_error"]
    assert list(rows[0]) == names and all(row["task"] == "cheetah-run" for row in rows)
    found = {(r["reward"], r["weighting"], int(r["step"])): list(r.values())[4:] for r in rows}
    assert found.keys() == {
        ("sqrt", "linear", 100),
        ("exp", "linear", 100),
        ("exp", "linear", 200),
        ("exp", "exp", 100),
    }
    assert found["exp", "exp", 100] == ["1", "5.000000", ""]
    seeds, mean, error = map(float, found["exp", "linear", 200])
    assert (seeds, mean) == (3, 32)
    # deviations -12, -6, 18: variance (144 + 36 + 324) / 2 = 252, over 3 seeds
    assert error == pytest.approx(np.sqrt(252 / 3), abs=1e-6)
    speeds = draw(figure5, runs[3:], tmp_path / "speed.png", column="speed")
    assert [row["mean"] for row in speeds] == ["9.000000", "0.500000"]


def test_figure5_refuses_what_does_not_belong_together(figure5, tmp_path):
    one = write_run(tmp_path, "exp", "linear", 1, [1])
    other = write_run(tmp_path, "exp", "linear", 2, [1], num_samples=8)
    task = write_run(tmp_path, "exp", "exp", 2, [1], domain="walker")
    for runs, mention in (
        ([one, other], "num_samples"),
        ([one, task], "domain"),
        ([one, one], "seed 1"),
        ([one, tmp_path], "no evaluation"),
        ([], "no run folders"),
    ):
        with pytest.raises(SystemExit, match=mention):
            draw(figure5, runs, tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


def test_figure4_draws_the_rewards(tmp_path):
    figure4 = runpy.run_path(str(ROOT / "benchmark" / "figure4.py"))
    np.testing.assert_allclose(figure4["curve"]("cheetah", "square", [0, 5, 10]), [0, 0.25, 1])
    upright = [(5 * f + 1) / 6 for f in (0, 0.5, 1)]
    np.testing.assert_allclose(figure4["curve"]("walker", "sqrt", [0, 2, 8]), upright)
    figure4["main"](figure4["Args"](out=tmp_path / "figure4.png"))
    assert 1000 < (tmp_path / "figure4.png").stat().st_size < 300_000


def test_dna_table_has_medians_over_seeds_and_each_peer_once(tmp_path, capsys):
    dna_table = runpy.run_path(str(ROOT / "benchmark" / "dna_table.py"))
    for seed, scores in enumerate(((1.0, 5.0), (2.0, 9.0), (4.0, 6.0)), start=1):
        for method, score in zip(("exp", "linear"), scores, strict=True):
            run_dir = tmp_path / f"sites__{method}__{seed}"
            run_dir.mkdir()
            lines = ("method,ft,oracle_calls", "pretrained,0.5,0", f"simpo-{method},{score},5120")
            (run_dir / "metrics.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "sites__square__1").mkdir()  # still running
    out = tmp_path / "dna.csv"
    dna_table["main"](dna_table["Args"](runs=tuple(sorted(tmp_path.iterdir())), out=out))
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 9 and [r["ft"] for r in rows if r["method"] == "pretrained"] == ["0.5"] * 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| data | method | seeds | ft | oracle_calls |"
    assert "| sites | pretrained | 3 | 0.500 | 0 |" in lines
    assert "| sites | simpo-exp | 3 | 2.000 (1.000 to 4.000) | 5120 |" in lines
    assert "| sites | simpo-linear | 3 | 6.000 (5.000 to 9.000) | 5120 |" in lines
