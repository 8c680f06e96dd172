"""benchmark/results.py: what it gathers and refuses, and its table."""

import csv
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboardX import SummaryWriter

from benchmark import results

ROOT = Path(__file__).resolve().parents[2]
HEADER = "task,method,seed,step,episode,return,length\n"


def write_run(folder, commit="aaaaaaa1", steps=(0, 1000), value=5.0, **flags):
    """A run folder of 1000 steps, with two episodes a step that return value -+ 1."""
    folder.mkdir(parents=True)
    args = {
        "env_id": "Hopper-v4",
        "seed": 1,
        "weighting": "linear",
        "neg_clip": 0.0,
        "total_timesteps": 1000,
        "track": False,
        "run_dir": str(folder),
    }
    versions = {"commit": commit, "devices": "1 x cpu", "jax": "0.10.2"}
    rows = ["step,episode,return,length"]
    for step in steps:
        rows += [f"{step},0,{value - 1},9", f"{step},1,{value + 1},9"]
    (folder / "args.json").write_text(json.dumps(args | flags))
    (folder / "versions.json").write_text(json.dumps(versions))
    (folder / "eval.csv").write_text("\n".join(rows) + "\n")
    return folder


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def refusal(function, *args, capsys):
    """The one line that it prints on stderr while it ends with code 2."""
    with pytest.raises(SystemExit) as end:
        function(*args)
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# ---- collect -------------------------------------------------------------------------
def test_a_row_for_each_episode_and_for_each_run(tmp_path):
    write_run(tmp_path / "Hopper-v4__choice__2", seed=2)
    write_run(tmp_path / "mine", neg_clip=-0.05, tau=0.1)
    out = tmp_path / "out.csv"
    results.collect((tmp_path / "mine", tmp_path / "Hopper-v4__choice__2", ROOT), out)
    heads = [list(row.values())[:5] for row in read(out)]
    assert heads == [
        ["Hopper-v4", "choice", "2", "0", "0"],
        ["Hopper-v4", "choice", "2", "0", "1"],
        ["Hopper-v4", "choice", "2", "1000", "0"],
        ["Hopper-v4", "choice", "2", "1000", "1"],
        ["Hopper-v4", "linear_neg", "1", "0", "0"],
        ["Hopper-v4", "linear_neg", "1", "0", "1"],
        ["Hopper-v4", "linear_neg", "1", "1000", "0"],
        ["Hopper-v4", "linear_neg", "1", "1000", "1"],
    ]
    _, row = read(tmp_path / "out.runs.csv")
    flags = (
        "--env-id Hopper-v4 --seed 1 --weighting linear --neg-clip -0.05"
        " --total-timesteps 1000 --tau 0.1"
    )
    assert row == {
        "task": "Hopper-v4",
        "method": "linear_neg",
        "seed": "1",
        "status": "done",
        "step": "1000",
        "commit": "aaaaaaa",
        "devices": "1 x cpu",
        "hours": "",
        "jax": "0.10.2",
        "flags": flags,
    }


def test_a_run_stays_until_its_successor_is_complete(tmp_path):
    out = tmp_path / "table2.csv"
    old = write_run(tmp_path / "old", commit="old", value=1)
    other = write_run(tmp_path / "other", commit="old", value=2, neg_clip=-0.05)
    results.collect((old, other), out)
    assert "older" not in read(out)[0]

    new = write_run(tmp_path / "new", commit="new", value=3)
    (new / "replay.dat").touch()  # it is not complete
    results.collect((new,), out)
    returns = {row["method"]: float(row["return"]) for row in read(out)}
    assert returns == {"linear": 2, "linear_neg": 3}
    assert {row["older"] for row in read(out)} == {"yes"}

    (new / "replay.dat").unlink()
    results.collect((new,), out)
    rows = read(out)
    assert [row["older"] for row in rows] == [""] * 4 + ["yes"] * 4
    assert [float(row["return"]) for row in rows[:2]] == [2, 4]
    names = [run.method for run in results.read_runs([out])]
    assert names == ["Linear", "Lin. Neg., older trainer"]
    assert [row["commit"] for row in read(tmp_path / "table2.runs.csv")] == [
        "new",
        "old",
    ]


def test_two_folders_of_one_run_are_refused(tmp_path, capsys):
    folders = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    err = refusal(results.collect, folders, tmp_path / "out.csv", capsys=capsys)
    assert "both hold Hopper-v4 linear 1" in err
    assert not (tmp_path / "out.csv").exists()


def test_the_task_of_a_run_is_that_of_its_flags(tmp_path):
    """One task whether started by hand or by run.py, which writes / and : as -."""
    folder = write_run(tmp_path / "my-Own-Env-v0__choice__1", env_id="my:Own/Env-v0")
    head = {"task": "my:Own/Env-v0", "method": "choice", "seed": 1}
    assert results.identify(folder) == head
    by_hand = write_run(tmp_path / "my-Own-Env-v0__simpo_mujoco__1__20260101-000000")
    assert results.identify(by_hand) == head | {"task": "Hopper-v4", "method": "linear"}


@pytest.mark.parametrize("text", ["[]", "3", '{"env_id": "a", "total_timesteps": 9}'])
def test_json_of_something_else_is_no_run(text, tmp_path):
    other = write_run(tmp_path / "other")
    (other / "args.json").write_text(text)
    run = write_run(tmp_path / "run")
    (run / "versions.json").write_text(text)
    results.collect((other, run), tmp_path / "out.csv")
    (row,) = read(tmp_path / "out.runs.csv")
    assert (row["task"], row["commit"], row["status"]) == ("Hopper-v4", "", "done")


def test_a_folder_that_is_not_there_is_refused(tmp_path, capsys):
    folders = write_run(tmp_path / "good"), tmp_path / "typo"
    err = refusal(results.collect, folders, tmp_path / "out.csv", capsys=capsys)
    assert "typo does not exist" in err


def test_a_step_that_is_no_number_is_refused(tmp_path, capsys):
    folder = write_run(tmp_path / "run", steps=(0, "xx"))
    err = refusal(results.collect, (folder,), tmp_path / "out.csv", capsys=capsys)
    assert "run/eval.csv: step is xx" in err


def test_rows_of_runs_without_a_description_are_not_dropped(tmp_path, capsys):
    out = write_table(tmp_path / "out.csv", {"Ant-v4": [1]})
    (tmp_path / "out.runs.csv").write_text("task,method,seed\n")
    before = out.read_text()
    new = write_run(tmp_path / "new")
    err = refusal(results.collect, (new,), out, capsys=capsys)
    assert "out.runs.csv lacks runs of" in err
    assert out.read_text() == before


def test_complete_is_what_made_its_last_evaluation(tmp_path):
    assert results.is_complete(write_run(tmp_path / "whole"))
    assert not results.is_complete(write_run(tmp_path / "short", steps=(0, 500)))
    assert not results.is_complete(write_run(tmp_path / "new", steps=()))
    assert not results.is_complete(tmp_path)


def test_hours_are_those_of_work(tmp_path):
    """Of each of two TensorBoard files; zeros and garbage at the end are no time."""
    for hours in (1, 2):
        with SummaryWriter(str(tmp_path), filename_suffix=str(hours)) as writer:
            end = time.time() + 3600 * hours
            writer.add_scalar("losses/q", 1.0, 5, walltime=end)
    paths = sorted(tmp_path.glob("events.*"))
    assert len(paths) == 2
    assert results.hours_of(tmp_path) == 3
    paths[0].write_bytes(paths[0].read_bytes() + bytes(4096))
    garbage = b"\x04" + bytes(11) + b"\xff" * 8  # of a length that is there
    paths[1].write_bytes(paths[1].read_bytes() + garbage)
    assert results.hours_of(tmp_path) == 3


# ---- files ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, mention",
    [
        ("Hopper-v4,linear,1,0,0,5,9,1\n", "line 2: other cells than the header"),
        ("Hopper-v4,linear,1,0,0,5\n", "line 2: other cells than the header"),
        ('Hopper-v4,linear,1,0,0,"5,9\n', "unexpected end of data"),
        ("Hopper-v4,linear,1,0,0,5,9\n" * 2, "two rows for Hopper-v4 Linear 1"),
        (
            "Hopper-v4,linear,1,0,0,much,9\n",
            "return is much, which is no finite number",
        ),
        ("Hopper-v4,linear,1,0,0,nan,9\n", "return is nan, which is no finite number"),
        ("Hopper-v4,linear,1.2,0,0,5,9\n", "seed 1.2 is no integer"),
        ("", "no evaluations"),
    ],
)
def test_what_does_not_fit_is_refused(text, mention, tmp_path, capsys):
    path = tmp_path / "table.csv"
    path.write_text(HEADER + text)
    assert mention in refusal(results.read_runs, [path], capsys=capsys)


@pytest.mark.parametrize(
    "header, mention",
    [
        (HEADER.replace("length", "return"), "two columns of one name"),
        (HEADER.replace("method", "name"), "no column method"),
        (HEADER.replace("return", "reward"), "no column return"),
    ],
)
def test_columns_that_lack_or_repeat_are_refused(header, mention, tmp_path, capsys):
    path = tmp_path / "table.csv"
    path.write_text(header + "Hopper-v4,linear,1,0,0,5,9\n")
    assert mention in refusal(results.read_runs, [path], capsys=capsys)


def test_without_a_column_of_episodes_a_step_has_one_row(tmp_path, capsys):
    path = tmp_path / "table.csv"
    path.write_text("task,method,seed,step,return\n" + "a,linear,1,10,5\n" * 2)
    assert "two rows for" in refusal(results.read_runs, [path], capsys=capsys)


def test_rows_out_of_order_and_of_a_spreadsheet(tmp_path):
    """A byte order mark, CRLF, seeds as 1.0, no newline at the end."""
    path = tmp_path / "table.csv"
    rows = ["a,linear,1.0,20,0,3,9", "a,linear,1,10,0,1,9", "a,linear,1,10,1,2,9"]
    text = "\r\n".join([HEADER.strip(), *rows])
    path.write_text("\ufeff" + text, encoding="utf-8", newline="")
    (run,) = results.read_runs([path])
    assert run.seed == 1
    np.testing.assert_array_equal(run.x, [10, 20])
    np.testing.assert_array_equal(run.y, [1.5, 3])


def test_another_encoding_is_refused(tmp_path, capsys):
    path = tmp_path / "table.csv"
    path.write_text(HEADER + "a,linear,1,10,0,5,9\n", encoding="utf-16")
    assert "is not UTF-8" in refusal(results.read_runs, [path], capsys=capsys)


def test_rows_without_a_step_are_passed_over(tmp_path):
    """A table of MuJoCo and DNA together."""
    path = tmp_path / "mixed.csv"
    rows = "a,linear,1,10,0,5,9,\ngenerated,linear,1,,,,,2.5\n"
    path.write_text(HEADER.replace("length", "length,ft") + rows)
    (run,) = results.read_runs([path])
    assert (run.task, run.y[0]) == ("a", 5)


def test_two_rows_of_one_evaluation_are_refused(tmp_path, capsys):
    path = tmp_path / "table.csv"
    path.write_text(HEADER + "a,linear,1,10,0,5,9\na,linear,1,10,0,7,9\n")
    assert "two rows for a Linear 1" in refusal(
        results.read_runs, [path], capsys=capsys
    )


# ---- tables --------------------------------------------------------------------------
def write_table(path, values, step=1_000_000, method="linear", length=1000):
    """{task: last return of each seed}, behind an evaluation that does not count."""
    lines = []
    for task, seeds in values.items():
        for seed, value in enumerate(seeds):
            lines.append(f"{task},{method},{seed},10,0,1e6,{length}\n")
            lines.append(f"{task},{method},{seed},{step},0,{value - 1},{length}\n")
            lines.append(f"{task},{method},{seed},{step},1,{value + 1},{length}\n")
    path.write_text(HEADER + "".join(lines))
    return path


def show(*flags):
    command = [sys.executable, "-m", "benchmark.results", "show", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_ours_stand_beside_the_papers(tmp_path):
    one = write_table(tmp_path / "a.csv", {"Hopper-v4": [2000, 4000], "Ant-v4": [1, 3]})
    two = write_table(tmp_path / "b.csv", {"Hopper-v4": [30]}, 500, "exp")
    lines = show(one, two).stdout.splitlines()
    assert lines[0].startswith("Ours: environment steps x seeds are 1,000,000 x 2")
    assert "| method |  | Ant | Hopper |" in lines
    assert "| Linear | paper | 5984 +- 179 | 2637 +- 370 |" in lines
    assert "| SimbaV2 | SimbaV2's page | 7429 | 4054 |" in lines
    assert "| Linear | ours | 2 +- 1.41 | 3000 +- 1414 |" in lines
    assert "| Exp | ours |  | 30 (500 x 1) |" in lines


def test_lengths_have_no_published_rows(tmp_path):
    path = write_table(tmp_path / "a.csv", {"Hopper-v4": [2000, 4000]})
    out = show(path, "--column", "length").stdout
    assert "| Linear | ours | 1000 +- 0 |" in out
    assert "paper" not in out


def test_a_seed_that_is_behind_does_not_count(tmp_path):
    path = tmp_path / "a.csv"
    rows = ["a,exp,1,10,0,100,9", "a,exp,2,10,0,200,9", "a,exp,3,5,0,900,9"]
    path.write_text(HEADER + "\n".join(rows))
    assert "| Exp | ours | 150 +- 71 |" in show(path).stdout


def test_two_settings_are_not_one_seed(tmp_path):
    """Two tables of one method and seed, evaluated at steps of their own."""
    one = write_table(tmp_path / "a.csv", {"Hopper-v4": [1]}, step=20)
    two = write_table(tmp_path / "b.csv", {"Hopper-v4": [2]}, step=30)
    done = show(one, two)
    assert done.returncode == 2
    assert done.stderr == "error: two runs of Hopper-v4, Linear have seed 0\n"


def test_curves_are_named_after_the_flags_in_which_runs_differ(tmp_path):
    folders = [
        write_run(tmp_path / "1", seed=1, tau=0.1),
        write_run(tmp_path / "2", seed=2, tau=0.1, eval_every=7),
        write_run(tmp_path / "3", seed=1, tau=0.2),
        write_run(tmp_path / "4", seed=1, tau=0.2, neg_clip=-0.05),
    ]
    curves = results.group_runs(results.read_runs(folders))
    seeds = {name: [run.seed for run in runs] for (_, name), runs in curves.items()}
    assert seeds == {
        "Linear, tau 0.1": [1, 2],
        "Linear, tau 0.2": [1],
        "Lin. Neg.": [1],
    }


def test_a_table_knows_the_flags_of_its_runs(tmp_path):
    """Two seeds of two settings are two curves, from the CSV as from the folders."""
    one = write_run(tmp_path / "1", seed=1, tau=0.1)
    two = write_run(tmp_path / "2", seed=2, tau=0.2)
    out = tmp_path / "out.csv"
    results.collect((one, two), out)
    curves = results.group_runs(results.read_runs([out]))
    names = [name for _, name in curves]
    assert names == ["Linear, tau 0.1", "Linear, tau 0.2"]
    three = write_run(tmp_path / "3", seed=3, tau=0.2, eval_every=7)
    curves = results.group_runs(results.read_runs([out, three]))
    seeds = [[run.seed for run in runs] for runs in curves.values()]
    assert seeds == [[1], [2, 3]]


def test_the_shipped_run_is_one_of_the_table(tmp_path):
    """Its rows in table2.csv, as `collect` reads them from its folder."""
    folder = shutil.copytree(ROOT / "benchmark/mujoco/halfcheetah", tmp_path / "run")
    results.collect((folder,), tmp_path / "out.csv")
    head = {"task": "HalfCheetah-v4", "method": "linear_neg", "seed": "1"}
    table = read(ROOT / "benchmark/mujoco/table2.csv")
    assert read(tmp_path / "out.csv") == [x for x in table if head.items() <= x.items()]
