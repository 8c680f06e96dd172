"""README's table and Status say what table2.csv does, from complete runs alone."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TASKS = "HalfCheetah", "Humanoid", "Ant", "Walker2d", "Hopper", "Swimmer"
METHODS = {"linear_neg": "ours, Lin. Neg.", "linear": "ours, Linear"}


def cells(name):
    lines = (ROOT / "README.md").read_text().splitlines()
    (line,) = [x for x in lines if x.startswith(f"| {name} |")]
    return [x.strip() for x in line.split("|")[2:-1]]


@pytest.mark.parametrize("method", METHODS)
def test_our_row_is_the_last_evaluation_of_each_run(method):
    with (ROOT / "benchmark/mujoco/table2.csv").open(newline="") as file:
        rows = [x for x in csv.DictReader(file) if x["method"] == method and x["step"] == "1000000"]
    for task, cell in zip(TASKS, cells(METHODS[method]), strict=True):
        returns = [float(x["return"]) for x in rows if x["task"] == f"{task}-v4"]
        assert len(returns) == (20 if cell else 0), task
        assert not cell or int(cell) == round(np.mean(returns)), task


def test_status_says_what_the_table_says():
    text = (ROOT / "README.md").read_text().split("**Status.**")[1].split("DNA's table")[0]
    _, linear_neg, linear = re.split(r"with Lin\. Neg\.|with Linear", " ".join(text.split()))
    for name, said in (("ours, Lin. Neg.", linear_neg), ("ours, Linear", linear)):
        found = re.findall(rf"({'|'.join(TASKS)})\b[^(;]*? at ([\d,]+)", said)
        table = {task: cell for task, cell in zip(TASKS, cells(name), strict=True) if cell}
        assert {task: number.rstrip(",").replace(",", "") for task, number in found} == table
