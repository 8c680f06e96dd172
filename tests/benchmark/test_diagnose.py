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
    flags = json.dumps(dataclasses.asdict(args))
    (tmp_path / "args.json").write_text(flags)
    state = simpo.init_state(args, 3, 1, jax.random.key(0))
    first = state.critics[0]
    last = jax.tree.map(lambda x: sign * x, first[-1])
    second = [*first[:-1], last]
    state = state._replace(critics=[first, second])
    simpo.save(tmp_path / "checkpoint.npz", state, 7)

    command = [sys.executable, "-m", "benchmark.mujoco.diagnose", str(tmp_path)]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    values = {}
    steps = []
    for row in csv.DictReader(out.stdout.splitlines()):
        name, step, value = row.values()
        if name == "q":
            steps.append(int(step))
        values.setdefault(name, float(value))  # of several steps, at the first
    assert values["trained"] == 7
    assert values["length"] == 200
    assert steps == [0, 40, 80, 120, 160]
    # 0.2 times the reward of a step, over the 87 steps that the discount looks ahead
    expected = 0.2 * values["return"] / 200 * 87
    assert 0.5 < values["followed"] / expected < 1.5
    assert values["agreement"] == pytest.approx(sign)
    assert (values["disagreement"] > 0) == (sign == -1)
    assert 0 < values["spread"] < 1
