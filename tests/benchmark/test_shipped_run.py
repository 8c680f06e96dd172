"""benchmark/mujoco/halfcheetah: the shipped run returns what its table says."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def test_the_shipped_run_returns_what_its_table_says(tmp_path):
    """Up to rounding, which after hundreds of steps moves single episodes by some
    percent."""
    run = shutil.copytree(ROOT / "benchmark/mujoco/halfcheetah", tmp_path / "run")
    command = [sys.executable, ROOT / "simpo_mujoco.py", "--evaluate", run]
    subprocess.run(command, check=True)
    told = np.loadtxt(run / "eval.csv", delimiter=",", skiprows=1)[-20:]
    played = np.loadtxt(run / "evaluate.csv", delimiter=",", skiprows=1)
    np.testing.assert_array_equal(told[:, [0, 1, 3]], played[:, [0, 1, 3]])
    np.testing.assert_allclose(told[:, 2], played[:, 2], rtol=0.15)
    np.testing.assert_allclose(told[:, 2].mean(), played[:, 2].mean(), rtol=0.03)
