"""ship.py: what it leaves of a run evaluates as the run does."""

import dataclasses
import json
import shutil
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


def test_the_shipped_run_returns_what_its_table_says(env, tmp_path):
    """Up to rounding, which after hundreds of steps moves single episodes by some percent."""
    run = shutil.copytree(ROOT / "benchmark" / "mujoco" / "halfcheetah", tmp_path / "run")
    command = [sys.executable, ROOT / "simpo_mujoco.py", "--evaluate", run]
    subprocess.run(command, env=env, check=True)
    tables = [np.loadtxt(run / x, delimiter=",", skiprows=1) for x in ("eval.csv", "evaluate.csv")]
    told, played = tables[0][-20:], tables[1]
    np.testing.assert_array_equal(told[:, [0, 1, 3]], played[:, [0, 1, 3]])
    np.testing.assert_allclose(told[:, 2], played[:, 2], rtol=0.15)
    np.testing.assert_allclose(told[:, 2].mean(), played[:, 2].mean(), rtol=0.03)


def test_films_of_mujoco_follow_the_robot():
    args = simpo.Args(env_id="HalfCheetah-v4", capture_video=True, eval_episodes=2)
    envs = simpo.make_envs(args, evaluation=True)
    assert envs.envs[0].unwrapped.mujoco_renderer.camera_id == 0
    assert envs.envs[0].unwrapped.model.camera(0).name == "track"
    envs.close()
    envs = simpo.make_envs(dataclasses.replace(args, env_id="InvertedPendulum-v4"), evaluation=True)
    assert envs.envs[0].unwrapped.mujoco_renderer.camera_id == -1  # it has none of its own
    envs.close()
