"""diagnose.py on a policy at its first weights, saved as a run saves it."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

import simpo_mujoco as simpo


@pytest.mark.parametrize("sign", [1, -1])
def test_critics_are_held_against_each_other_and_the_truth(env, tmp_path, sign):
    """The second critic is sign times the first."""
    args = simpo.Args(env_id="Pendulum-v1", num_samples=4, hidden_dim=32)
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    state = simpo.init_state(args, 3, 1, jax.random.key(0))
    *layers, last = state.critics[0]
    second = [*layers, jax.tree.map(lambda x: sign * x, last)]
    state = state._replace(critics=[state.critics[0], second])
    simpo.save(tmp_path / "checkpoint.npz", state, 7)
    command = [sys.executable, ROOT / "benchmark" / "mujoco" / "diagnose.py", tmp_path]
    out = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    head, _, *lines = out.splitlines()
    mean = float(head.split()[3])
    assert head.startswith("step 7: return -") and head.endswith("length 200")
    table = np.array([line.split() for line in lines[:5]], float)
    np.testing.assert_array_equal(table[:, 0], range(0, 200, 40))
    assert np.all(np.abs(table[:, 1]) < 1)  # of critics that know nothing
    assert sign == 1 or np.all(table[:, 1] < 0)  # the smaller one
    # 0.2 times the reward of a step, over the 100 steps that the discount looks ahead
    assert 0.5 < table[0, 2] / (0.2 * mean / 200 * 87) < 1.5 and table[-1, 2] > table[0, 2]
    values = {name: float(value) for name, value in map(str.split, lines[5:])}
    assert list(values) == ["spread", "q_std", "disagreement", "agreement"]
    assert 0 < values["spread"] < 1 and values["q_std"] > 0 and values["agreement"] == sign
    assert (values["disagreement"] > 0) == (sign == -1)


def test_a_folder_without_a_run_is_one_line(env, tmp_path):
    command = [sys.executable, ROOT / "benchmark" / "mujoco" / "diagnose.py", tmp_path]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 2 and "is no run folder" in run.stderr and run.stderr.count("\n") == 1
