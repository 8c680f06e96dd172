"""speed.py as a user calls it: every part is timed, here and in another checkout."""

import csv
import shutil
import subprocess
import sys

from conftest import ROOT


def test_every_part_is_timed_beside_another_checkout(env, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("simpo_mujoco.py", "common.py"):
        shutil.copy(ROOT / name, other)
    flags = "--shapes", "Hopper-v4", "--settings", "tiny", "--repeats", "2", "--vs", "other"
    command = [sys.executable, ROOT / "benchmark" / "speed" / "speed.py", *flags]
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    rows = list(csv.DictReader((tmp_path / "speed.csv").open()))
    values = {row["quantity"]: row for row in rows}
    names = [f"{who}_{x}" for who in ("ours", "other") for x in "update act host iteration".split()]
    assert {"cpu", "device", "jax", "commit", "ratio", *names} == values.keys()
    for name in (*names, "ratio"):
        low, middle, high = (float(values[name][x]) for x in ("min", "median", "max"))
        assert 0 < low <= middle <= high


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    command = [sys.executable, ROOT / "benchmark" / "speed" / "speed.py", "--vs", tmp_path]
    end = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert end.returncode == 2 and "has no simpo_mujoco.py" in end.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_without_the_authors_programs_is_refused(tmp_path):
    command = [sys.executable, ROOT / "benchmark" / "speed" / "authors.py", "--peers", tmp_path]
    end = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert end.returncode == 2 and "has no dpmd; see benchmark/peers/setup.sh" in end.stderr
    assert not list(tmp_path.iterdir())
