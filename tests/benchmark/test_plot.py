"""benchmark/plot.py: the mean over seeds, the looks of curves, the limits of panels."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmark import plot
from benchmark.results import COLOURS, PUBLISHED, group_runs, read_runs

ROOT = Path(__file__).resolve().parents[2]


def write_table(path, rows):
    """Rows "task method seed step return"."""
    lines = ["task,method,seed,step,return"]
    lines += [",".join(row.split()) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def draw(path, x="step", paper=False, note=""):
    curves = group_runs(read_runs([path], x=x))
    return plot.draw(curves, x, "return", paper, note)


def average_of(path):
    ((name, runs),) = group_runs(read_runs([path])).items()
    return plot.average(runs, name)


def test_the_mean_begins_and_ends_where_all_seeds_have_values(tmp_path):
    rows = [f"a exp 1 {step} {step + 1}" for step in range(0, 60, 10)]
    rows += [f"a exp 2 {step} {step + 3}" for step in range(20, 50, 10)]
    x, mean, low, high = average_of(write_table(tmp_path / "a.csv", rows))
    np.testing.assert_array_equal(x, [20, 30, 40])
    np.testing.assert_allclose(mean, x + 2)
    np.testing.assert_allclose(low, x + 1)
    np.testing.assert_allclose(high, x + 3)


def test_the_band_is_the_interval_of_the_mean(tmp_path):
    """Near 1.96 standard errors for 40 normal values."""
    values = np.random.default_rng(0).normal(size=40)
    rows = [f"a exp {seed} 10 {value}" for seed, value in enumerate(values)]
    _, _, low, high = average_of(write_table(tmp_path / "a.csv", rows))
    expected = 1.96 * values.std(ddof=1) / np.sqrt(40)
    np.testing.assert_allclose((high - low) / 2, expected, rtol=0.1)


def test_rows_out_of_order_are_drawn_in_order(tmp_path):
    rows = ["a exp 1 20 2", "a exp 1 0 0", "a exp 1 10 1"]
    (axis,) = draw(write_table(tmp_path / "a.csv", rows)).axes
    np.testing.assert_array_equal(axis.lines[0].get_xdata(), [0, 10, 20])
    np.testing.assert_array_equal(axis.lines[0].get_ydata(), [0, 1, 2])


def test_one_evaluation_is_a_marker(tmp_path):
    (axis,) = draw(write_table(tmp_path / "a.csv", ["a exp 1 0 5"])).axes
    assert axis.lines[0].get_marker() == "o"


def test_thirty_methods_have_thirty_looks(tmp_path):
    rows = [f"a choice={i} 1 {step} {i}" for i in range(27) for step in (0, 1)]
    rows += [f"a {name} 1 {step} 9" for name in ("exp", "linear") for step in (0, 1)]
    path = write_table(tmp_path / "a.csv", rows)
    text = path.read_text().replace("return\n", "return,older\n").replace(" ", ",")
    lines = [line if "older" in line else line + "," for line in text.splitlines()]
    lines += ["a,linear,2,0,8,yes", "a,linear,2,1,8,yes"]
    path.write_text("\n".join(lines) + "\n")
    (axis,) = draw(path).axes
    looks = {(str(line.get_color()), line.get_linestyle()) for line in axis.lines}
    assert len(axis.lines) == len(looks) == 30
    assert (COLOURS["Exp"], "-") in looks
    assert {(COLOURS["Linear"], "-"), (COLOURS["Linear"], ":")} < looks


def test_no_dashed_line_lies_on_a_frame():
    """The figure of Table 2, whose values of the paper are often the highest."""
    figure = draw(ROOT / "benchmark/mujoco/table2.csv", paper=True, note="one seed")
    assert len(figure.axes) == 6
    for axis in figure.axes:
        low, high = axis.get_ylim()
        dashed = {}
        for line in axis.lines:
            share = (np.array(line.get_ydata()) - low) / (high - low)
            assert share.min() > 0.05
            assert share.max() < 0.95
            if line.get_linestyle() == "--":
                dashed[line.get_color()] = line.get_ydata()[0]
        task = axis.get_title()
        methods = {"grey": "TD3", "tab:blue": "Linear", "tab:red": "Lin. Neg."}
        for colour, name in methods.items():
            assert dashed[colour] == PUBLISHED["paper", name][task][0]
    assert [text.get_text() for text in figure.axes[0].texts] == ["one seed"]


def test_a_figure_as_a_user_makes_it(tmp_path):
    command = [sys.executable, "-m", "benchmark.plot"]
    peers = ROOT / "benchmark/peers/peers.csv"
    out = tmp_path / "new" / "peers.png"
    flags = [peers, "--x", "minutes", "--out", out]
    subprocess.run([*command, *flags], cwd=ROOT, check=True)
    assert out.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "flags, mention",
    [
        ("none.csv", "none.csv"),
        ("a.csv --y losses/q", "a.csv has no column losses/q"),
        ("a.csv --out a.xyz", "xyz"),
        ("a.csv --y step --paper", "--paper has returns only"),
        ("a.csv b.csv", "two runs of a, Exp have seed 1"),
        ("apart.csv", "the seeds of a, Exp have no x in common"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(flags, mention, tmp_path):
    write_table(tmp_path / "a.csv", ["a exp 1 0 5"])
    write_table(tmp_path / "b.csv", ["a exp 1 7 6"])
    write_table(tmp_path / "apart.csv", ["a exp 1 0 5", "a exp 2 7 6"])
    done = subprocess.run(
        [sys.executable, "-m", "benchmark.plot", *flags.split()],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert mention in done.stderr
    assert done.stderr.count("\n") == 1
