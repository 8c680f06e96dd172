"""ship.py: what it leaves of a run evaluates as the run does."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
from conftest import ROOT

import simpo_mujoco as simpo

SHIP = ROOT / "benchmark" / "mujoco" / "ship.py"


def test_a_shipped_run_evaluates_as_the_run_does(env, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SHIP.parent)
    import ship

    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    args = simpo.Args(env_id="Pendulum-v1", num_samples=4, hidden_dim=32, run_dir=str(run))
    (run / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    (run / "versions.json").write_text("{}")
    state = simpo.init_state(args, 3, 1, jax.random.key(0))
    simpo.save(run / "checkpoint.npz", state, 7)
    simpo.write_rows(run / "eval.csv", np.array([[7.0, 0, -1, 200]]))
    command = [sys.executable, SHIP, run, out]
    refused = subprocess.run(command, env=env, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr == f"error: {run} is no complete run\n"
    ship.slim(run, out)
    assert json.loads((out / "args.json").read_text())["run_dir"] is None
    assert (out / "eval.csv").read_text() == (run / "eval.csv").read_text()
    assert (out / "checkpoint.npz").stat().st_size < (run / "checkpoint.npz").stat().st_size / 2
    for folder in (run, out):
        command = [sys.executable, ROOT / "simpo_mujoco.py", "--evaluate", folder]
        subprocess.run([*command, "--eval-episodes", "2"], env=env, check=True)
    assert (out / "evaluate.csv").read_text() == (run / "evaluate.csv").read_text()
