"""benchmark/mujoco/diagnose.py on a policy at its first weights."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import simpo_mujoco as simpo
from benchmark.mujoco import diagnose

ROOT = Path(__file__).resolve().parents[2]


def test_followed_returns_end_with_their_episode():
    args = simpo.Args(gamma=0.5, reward_scale=2.0)
    reward = np.ones((3, diagnose.EPISODES))
    running = np.ones((3, diagnose.EPISODES), bool)
    running[2, 0] = False
    followed = diagnose.followed_returns(args, reward, running)
    np.testing.assert_allclose(followed[:, 0], [3, 2, 0])
    np.testing.assert_allclose(followed[:, 1], [3.5, 3, 2])


@pytest.mark.parametrize("sign", [1, -1])
def test_critics_are_held_against_each_other(tmp_path, sign):
    """The second critic is sign times the first."""
    args = simpo.Args(env_id="Pendulum-v1", num_samples=4, hidden_dim=16)
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    state = simpo.init_state(args, 3, 1, jax.random.key(0))
    *layers, last = state.critics[0]
    second = [*layers, jax.tree.map(lambda x: sign * x, last)]
    state = state._replace(critics=[state.critics[0], second])
    simpo.save(tmp_path / "checkpoint.npz", state, 7)
    command = [sys.executable, "-m", "benchmark.mujoco.diagnose", str(tmp_path)]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    rows = list(csv.DictReader(out.stdout.splitlines()))
    values = {(row["quantity"], row["from_step"]): float(row["value"]) for row in rows}
    assert values["trained", ""] == 7
    assert values["length", ""] == 200
    assert [int(step) for name, step in values if name == "q"] == [*range(0, 200, 40)]
    # 0.2 times the reward of a step, over the 87 steps that the discount looks ahead
    expected = 0.2 * values["return", ""] / 200 * 87
    assert 0.5 < values["followed", "0"] / expected < 1.5
    assert values["agreement", ""] == pytest.approx(sign)
    assert (values["disagreement", ""] > 0) == (sign == -1)
    assert 0 < values["spread", ""] < 1
