"""benchmark/peers/peers.py: its clock, its reading of the recorder's files, and bad input."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from peers import peers


def test_a_program_is_charged_for_its_own_turns_alone():
    slices = np.array([[10.0, 12.0], [20.0, 25.0]])
    now = np.array([10.5, 12.0, 15.0, 21.0, 25.0])
    np.testing.assert_allclose(peers.own_seconds(slices, now), [0.5, 2.0, 2.0, 3.0, 7.0])


def test_all_but_our_evaluation_is_recorded(tmp_path, monkeypatch):
    """DPMD seeds its environments anywhere below 2^32."""
    monkeypatch.setenv("PEERS_TASK", "Pendulum-v1")
    monkeypatch.setenv("PEERS_DIR", str(tmp_path))
    make = importlib.import_module("peers.peers_env").make
    for seed in (1, 2**31, 2**31 + 1, 2**32 - 1):
        env = make()
        env.reset(seed=seed)
        for _ in range(200):
            env.step(env.action_space.sample())
    _, step, total = peers.read_log(tmp_path)
    assert step[-1] == 600 and np.isfinite(total).sum() == 3


def test_steps_of_several_environments_add_up(tmp_path):
    """Two files of cumulative steps; returns stand at the ends of episodes alone."""
    (tmp_path / "env-1-0.csv").write_text("1.0,10,\n3.0,30,7.5\n")
    (tmp_path / "env-1-1.csv").write_text("2.0,15,-1.0\n4.0,20,\n")
    now, step, total = peers.read_log(tmp_path)
    np.testing.assert_array_equal(now, [1, 2, 3, 4])
    np.testing.assert_array_equal(step, [10, 25, 45, 50])
    np.testing.assert_array_equal(total, [np.nan, -1.0, 7.5, np.nan])


def test_rate_leaves_the_start_out():
    """100 steps/s in the random phase and 10 s of compilation do not count; 20 steps/s does."""
    args = peers.Args(starts=1000, steps=5000)
    step = np.array([0.0, 1000.0, 1000.0, 5000.0])
    seconds = np.array([0.0, 10.0, 20.0, 220.0])
    settled, rate = peers.training_rate(args, step, seconds)
    assert settled == pytest.approx(20 + peers.SETTLE / 20) and rate == pytest.approx(20)
    assert np.isnan(peers.training_rate(args, step[:2], seconds[:2])).all()


@pytest.mark.parametrize(
    "flags,mention",
    [
        ("--programs nonsense", "nonsense"),
        ("--slice-seconds 0", "--slice-seconds"),
        ("--steps 5000", "--steps"),
        ("--report --run-dir missing", "--run-dir"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, mention):
    command = [sys.executable, str(ROOT / "benchmark" / "peers" / "peers.py"), *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1 and mention in done.stderr
    assert list(tmp_path.iterdir()) == []
