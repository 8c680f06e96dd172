"""benchmark/speed/ as a user calls it."""

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def call(module, *flags):
    command = [sys.executable, "-m", f"benchmark.speed.{module}", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_part_is_timed():
    tiny = "--hidden-dim 8 --num-samples 2 --sampling-steps 2 --batch-size 16".split()
    done = call("parts", "--env-id", "Hopper-v4", *tiny, "--repeats", 3)
    rows = {x["quantity"]: x for x in csv.DictReader(done.stdout.splitlines())}
    parts = {"update", "act", "host", "iteration"}
    assert rows.keys() == parts | {"cpu", "device", "jax", "commit"}, done.stderr
    for name in parts:
        low, middle, high = (float(rows[name][x]) for x in ("min", "median", "max"))
        assert 0 < low <= middle <= high


def test_a_folder_without_the_authors_programs_is_one_line(tmp_path):
    done = call("authors", tmp_path)
    assert done.returncode == 2
    assert "has no dpmd; see benchmark/speed/setup_authors.sh" in done.stderr
    assert done.stderr.count("\n") == 1
