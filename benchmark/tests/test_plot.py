"""plot.py and report.py: what makes a curve, its mean and interval, and the tables' numbers."""

import csv
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import paper
import plot
import pytest
import report
import results
import tyro
from conftest import ROOT
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary


def write_run(root, env_id="Hopper-v4", seed=1, weighting="linear", neg_clip=0.0, y=(1, 2), **more):
    """A run folder with two episodes at each of the steps 100, 200, ..., returns y -+ 1."""
    folder = root / f"run-{len(list(root.iterdir()))}"
    folder.mkdir()
    args = {"env_id": env_id, "seed": seed, "weighting": weighting, "neg_clip": neg_clip}
    args |= {"run_dir": str(folder), "eval_every": 100 * seed} | more
    (folder / "args.json").write_text(json.dumps(args))
    lines = [
        f"{100 * (i + 1)},{episode},{value + 2 * episode - 1},9"
        for i, value in enumerate(y)
        for episode in (0, 1)
    ]
    (folder / "eval.csv").write_text("\n".join(("step,episode,return,length", *lines)) + "\n")
    return folder


def load(folders, *flags):
    args = tyro.cli(plot.Args, args=[*map(str, folders), *flags])
    return [run for folder in args.runs for run in plot.read_folder(args, folder)]


def labels(folders):
    """{label: seeds}."""
    curves = plot.label(load(folders))
    look = plot.styles(curves)
    return {look[key][2]: sorted(run.seed for run in runs) for key, runs in curves.items()}


# ---- curves ------------------------------------------------------------------------------------


def test_tables_beside_run_folders_are_passed_over(tmp_path):
    """plot.py runs/table2/*, where run.py leaves results.csv and results.runs.csv too."""
    root = tmp_path / "runs"
    root.mkdir()
    write_run(root)
    write_run(root, seed=2)
    results.write_results(list(root.iterdir()), root / "results.csv")
    plot.cli([*map(str, sorted(root.iterdir())), "--out", str(tmp_path / "all")])
    plot.cli([str(root / "results.csv"), "--out", str(tmp_path / "table")])
    assert {x.name for x in tmp_path.glob("*.png")} == {"all.png", "table.png"}


def test_curves_are_named_after_the_flags_in_which_runs_differ(tmp_path):
    same = [write_run(tmp_path, seed=seed, tau=0.1) for seed in (1, 2)]
    assert labels(same) == {"Linear": [1, 2]}
    neg = write_run(tmp_path, neg_clip=-0.05, tau=0.1)
    assert labels([*same, neg]) == {"Linear": [1, 2], "Lin. Neg.": [1]}
    clip = write_run(tmp_path, neg_clip=-0.1, tau=0.1)
    assert labels([*same, neg, clip]) == {
        "Linear": [1, 2],
        "Lin. Neg., neg_clip -0.05": [1],
        "Lin. Neg., neg_clip -0.1": [1],
    }
    tau = write_run(tmp_path, tau=0.2)
    assert labels([*same, tau]) == {"tau 0.1": [1, 2], "tau 0.2": [1]}


def test_a_method_has_one_colour_everywhere(tmp_path):
    runs = [
        write_run(tmp_path, weighting=weighting, neg_clip=clip, tau=tau)
        for weighting, clip in (("exp", 0), ("linear", 0), ("linear", -0.05), ("square", -1))
        for tau in (0.1, 0.2)
    ]
    for some in (runs, runs[2:]):
        look = plot.styles(plot.label(load(some)))
        assert all(colour == paper.COLOURS[name] for (name, _), (colour, *_) in look.items())
        assert len({(colour, str(style)) for colour, style, _ in look.values()}) == len(some)


def test_mean_and_interval_over_seeds(tmp_path):
    runs = load(write_run(tmp_path, seed=i, y=y) for i, y in enumerate(([1, 6, 9], [3, 6], [5, 6])))
    x, mean, low, high = plot.average(runs)
    np.testing.assert_array_equal(x, [100, 200])  # one run is still short of 300
    np.testing.assert_allclose(mean, [3, 6])
    np.testing.assert_allclose([low[1], high[1]], 6)
    # of the 27 equal draws of three seeds the lowest and the highest, 1/27 each, end the interval
    assert (low[0], high[0]) == (1, 5)
    many = [runs[0]._replace(y=np.full(2, y)) for y in np.random.default_rng(0).normal(size=40)]
    many = [run._replace(x=np.arange(2)) for run in many]
    _, _, low, high = plot.average(many)
    std = np.std([run.y[0] for run in many], ddof=1)
    np.testing.assert_allclose((high - low) / 2, 1.96 * std / np.sqrt(40), rtol=0.1)
    x, mean, low, high = plot.average(runs[:1])
    assert len(x) == 3 and (low == mean).all() and (high == mean).all()


def write_events(path, start, values):
    """An event file begun at `start`, s, with {step: (seconds from there, value)} of losses/q."""
    events = [Event(wall_time=start, file_version="brain.Event:2")]
    for step, (seconds, value) in values.items():
        summary = Summary(value=[Summary.Value(tag="losses/q", simple_value=value)])
        events.append(Event(wall_time=start + seconds, step=step, summary=summary))
    texts = [event.SerializeToString() for event in events]
    path.write_bytes(b"".join(struct.pack("<Q4x", len(x)) + x + bytes(4) for x in texts))


def test_events_of_a_run_that_was_killed_and_resumed(tmp_path):
    """The break of a day is no work, and what was logged after the checkpoint is logged again."""
    folder = write_run(tmp_path)
    first, second = (folder / f"events.out.tfevents.{i}" for i in (1, 2))
    write_events(first, 1000, {5: (3600, 0.5), 10: (7200, 0.7), 12: (8000, 9), 15: (9000, 9)})
    first.write_bytes(first.read_bytes()[:-3])  # killed while it wrote step 15
    write_events(second, 100_000, {12: (60, 0.8), 15: (90, 1), 20: (3600, 2)})
    tags, seconds, steps = plot.read_events(folder)
    assert tags["losses/q"] == pytest.approx({5: 0.5, 10: 0.7, 12: 0.8, 15: 1, 20: 2})
    assert steps.tolist() == [5, 10, 12, 15, 20]
    assert seconds.tolist() == [3600, 7200, 8000, 8090, 11600]
    (run,) = load([folder], "--y", "losses/q", "--x", "hours")
    np.testing.assert_allclose(run.x * 3600, seconds)
    np.testing.assert_allclose(run.y, [0.5, 0.7, 0.8, 1, 2])
    with SummaryWriter(str(tmp_path)) as log:
        log.add_scalar("losses/q", 3, 7)
    assert plot.read_events(tmp_path)[0] == {"losses/q": {7: 3}}


def test_figures_of_folders_and_of_a_csv(tmp_path):
    """As a user calls it; a folder without results and a file beside the runs are passed over."""
    runs = tmp_path / "runs"
    runs.mkdir()
    for seed in (1, 2):
        for task in ("Hopper-v4", "Own-v0"):
            write_run(runs, task, seed, "square", -1.0)
    (runs / "logs").mkdir()
    (runs / "plot.png").touch()
    command = [sys.executable, ROOT / "benchmark" / "plot.py"]
    subprocess.run([*command, *runs.iterdir(), "--y", "length"], cwd=tmp_path, check=True)
    table = tmp_path / "table.csv"
    table.write_text("task,method,seed,step,episode,return\n" + "Hopper-v4,exp,1,0,0,5\n" * 2)
    flags = table, "--paper", "--out", tmp_path / "v1.0"
    subprocess.run([*command, *flags], cwd=tmp_path, check=True)
    for name in ("runs/plot", "v1.0"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (tmp_path / f"{name}.pdf").read_bytes()[:5] == b"%PDF-"


def test_the_papers_values_stand_in_the_figure(tmp_path):
    args = plot.Args((), paper=True)
    runs = load([write_run(tmp_path), write_run(tmp_path, "Own-v0")])
    one, other = plot.draw(args, runs).axes
    heights = {line.get_ydata()[0]: line.get_color() for line in one.lines if line.get_ls() == "--"}
    assert heights == {3387: "grey", 2637: "tab:blue"}  # Hopper-v4: TD3 and Linear of Table 2
    assert len(other.lines) == 1


@pytest.mark.parametrize(
    "flags,mention",
    [
        ("run-0 --y speed", "--y speed is none of step, episode, return, length"),
        ("run-0 --y losses/q", "--y losses/q"),
        ("run-0 --x hours", "no TensorBoard log"),
        ("run-0 run-1", "have one seed"),
        ("none", "no evaluations in none"),
        ("none.csv", "none.csv"),
        ("bad.csv", "no learning curves"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(tmp_path, flags, mention, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    write_run(tmp_path)
    Path("bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit) as end:
        plot.cli(flags.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert mention in err and not Path("runs").exists()


# ---- tables ------------------------------------------------------------------------------------


def write_table(path, values, steps=1_000_000):
    """{(task, method): value of each seed}, with an earlier evaluation that does not count."""
    with path.open("w") as file:
        writer = csv.writer(file)
        writer.writerow("task method seed step episode return length".split())
        for (task, method), seeds in values.items():
            for seed, value in enumerate(seeds):
                for step, delta in ((10, 1e6), (steps, -1), (steps, 1)):
                    writer.writerow([task, method, seed, step, 0, value + delta, 9])
    return path


def test_table2_stands_beside_the_papers(tmp_path):
    spread = np.array([0.8, 0.9, 1, 1.1, 1.2])  # standard deviation sqrt(0.1 / 4)
    ours = {
        ("Hopper-v4", "linear"): paper.BEST["Hopper-v4"] * spread,
        ("Ant-v4", "linear"): paper.BEST["Ant-v4"] * spread,
        ("Ant-v4", "exp"): 2 * paper.BEST["Ant-v4"] * spread,
    }
    short = write_table(tmp_path / "b.csv", {("Hopper-v4", "exp"): [300, 300]}, 50_000)
    last = report.read([write_table(tmp_path / "a.csv", ours), short], "return")
    lines = report.report(last)
    assert "| Linear | paper | 5984 +- 179 | 2637 +- 370 |" in lines
    assert "| Linear | here | 5984 +- 946 | 3387 +- 536 |" in lines
    assert "| Exp | here | 11968 +- 1892 | 300 +- 0 (50,000 x 2) |" in lines
    assert "| SimbaV2 | published | 7429 | 4054 |" in lines
    assert lines[0].startswith("Here 1,000,000 environment steps and 5 seed(s)")
    assert "Normalised returns after 1,000,000 steps: Ant-v4." in lines
    (line,) = (line for line in lines if line.startswith("| Exp | 2.000 ("))
    assert line.endswith(f"| {5071 / 5984:.3f} |")


def test_tasks_that_are_not_the_papers(tmp_path):
    values = {("cheetah-run-exp", "square"): [3.0], ("walker-run", "square"): [4.0]}
    lines = report.report(report.read([write_table(tmp_path / "a.csv", values)], "return"))
    assert "| Square | here | 3.00 | 4.00 |" in lines and not any("paper" in x for x in lines)


def test_interquartile_mean_and_interval_are_those_of_rliable():
    """Numbers of rliable 1.2.0 on this table of five seeds and six tasks: get_interval_estimates
    with 50,000 draws, aggregate_iqm and aggregate_mean; 10,000 draws of ours are as near."""
    scores = np.array(
        [
            [2.374, 1.813, 1.378, 0.292, 1.561, 4.741],
            [0.532, 0.514, 2.843, 5.175, 3.396, 5.938],
            [0.577, 4.497, 1.646, 1.223, 6.171, 4.290],
            [0.284, 1.640, 1.387, 2.721, 8.439, 4.631],
            [0.566, 2.032, 1.685, 3.169, 5.452, 0.768],
        ]
    )
    for statistic, expected in (
        (report.iqm, (2.3534, 1.6659, 3.0508)),
        (np.mean, (2.7244, 2.1832, 3.2669)),
    ):
        text = report.with_interval(list(scores.T), statistic)
        point, low, high = (float(x.strip("()")) for x in text.replace("to ", "").split())
        assert point == pytest.approx(expected[0], abs=1e-3)
        assert (low, high) == pytest.approx(expected[1:], abs=0.03)
    assert report.with_interval([np.array([1.0]), np.array([2.0, 4.0])], np.mean) == "2.333"


def test_report_prints_and_refuses(tmp_path):
    table = write_table(tmp_path / "a.csv", {("Ant-v4", "exp"): [1.0]})
    command = [sys.executable, str(ROOT / "benchmark" / "report.py")]
    done = subprocess.run([*command, table], capture_output=True, text=True, check=True)
    assert "| Exp | here | 1.00 |" in done.stdout
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    for name in ("b.csv", "none.csv"):
        end = subprocess.run([*command, tmp_path / name], capture_output=True, text=True)
        assert end.returncode == 2 and end.stderr.count("\n") == 1 and name in end.stderr


def test_a_seed_that_is_behind_does_not_count():
    last = {("Own-v0", "Exp"): {1: (10, 100.0), 2: (10, 200.0), 3: (5, 900.0)}}
    texts, budget = report.cells(last)
    assert texts == {("Own-v0", "Exp"): "150 +- 71"} and "10 environment steps and 2 " in budget
