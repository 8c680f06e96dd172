"""simpo_dmc.py: rewards, observations, ends of episodes, and whole runs."""

import ctypes.util
import json
import math
import re
import shutil
import signal

import numpy as np
import pytest
from conftest import ROOT, TINY, arrays_of, read_evals, run_main
from dm_control import suite
from dm_control.utils import rewards
from numpy.testing import assert_allclose, assert_array_equal

import simpo_dmc
from simpo_dmc import Args, DMControl, landscape, make_envs, step_envs

pytestmark = pytest.mark.usefixtures("quick_compiler")
CHEETAH = Args(num_envs=2)
WALKER = Args(domain="walker", num_envs=2)


def peer(args, seed):
    """dm_control's own environment, started as ours with reset(seed=seed)."""
    env = suite.load(args.domain, args.task, task_kwargs={"random": seed})
    return env, env.reset()


def flat(now):
    return np.float32([*now.observation["position"], *now.observation["velocity"]])


# ---- rewards -------------------------------------------------------------------------

SHAPES = {  # of v [m/s] and v* [m/s]
    "sqrt": lambda v, top: np.sqrt(v / top),
    "linear": lambda v, top: v / top,
    "square": lambda v, top: (v / top) ** 2,
    "exp": lambda v, top: np.exp(v - top),
}


def cheetah_reward(shape, physics):
    return shape(np.clip(physics.speed(), 0, 10), 10)


def walker_reward(shape, physics):
    """dm_control's formula with `shape` for its `move`; v* is 8 m/s."""
    move = shape(np.clip(physics.horizontal_velocity(), 0, 8), 8)
    height = physics.torso_height()
    standing = rewards.tolerance(height, bounds=(1.2, math.inf), margin=0.6)
    upright = (1 + physics.torso_upright()) / 2
    stand = (3 * standing + upright) / 4
    return stand * (5 * move + 1) / 6


@pytest.mark.parametrize("reward", SHAPES)
@pytest.mark.parametrize(
    "domain,plain_reward",
    [("cheetah", cheetah_reward), ("walker", walker_reward)],
)
def test_rewards_along_a_random_episode(domain, plain_reward, reward):
    """`linear` is dm_control's own; a push now and then leads through all speeds."""
    args = Args(domain=domain, reward=reward)
    env = DMControl(args)
    env.reset(seed=3)
    theirs, _ = peer(args, 3)
    rng = np.random.default_rng(0)
    found = []
    for step in range(300):
        if step % 20 == 0:
            push = rng.uniform(-2, 14)
            for physics in (env.env.physics, theirs.physics):
                physics.named.data.qvel["rootx"] = push
        action = rng.uniform(-1, 1, 6)
        now = theirs.step(action)
        _, ours, terminated, truncated, _ = env.step(action)
        expected = plain_reward(SHAPES[reward], theirs.physics)
        assert ours == pytest.approx(expected, abs=1e-12)
        if reward == "linear":
            assert ours == pytest.approx(now.reward, abs=1e-12)
        assert not terminated
        assert not truncated
        found.append(ours)
    assert min(found) < 0.05
    assert max(found) > 0.9


def test_the_stock_reward_is_the_task_s_own():
    assert landscape(CHEETAH, 5.0, 0.7) == 0.7


# ---- observations and episodes -------------------------------------------------------


def after_one_step(args):
    envs, obs_dim, _ = make_envs(args, 1)
    envs.reset(seed=1)
    [obs], *_ = step_envs(envs, np.linspace(-1, 1, 6)[None])
    assert obs.shape == (obs_dim,)
    assert obs.dtype == np.float32
    return obs, envs.envs[0].unwrapped.env.physics.data


def test_observations_of_cheetah():
    obs, data = after_one_step(CHEETAH)
    assert obs.shape == (17,)
    assert_array_equal(obs, np.float32([*data.qpos[1:], *data.qvel]))


def test_observations_of_walker():
    obs, data = after_one_step(WALKER)
    assert obs.shape == (24,)
    # the rows of xmat are bodies, the world first: xx xy xz yx ...
    orientations = data.xmat[1:, [0, 2]].ravel()
    expected = [*orientations, data.xpos[1, 2], *data.qvel]
    assert_array_equal(obs, np.float32(expected))


def test_the_time_limit_truncates_with_the_true_last_observation():
    """1000 steps of dm_control's own dynamics, never `terminated`."""
    args = Args(reward="sqrt", num_envs=2)
    rng = np.random.default_rng(1)
    envs, *_ = make_envs(args, 2)
    obs, _ = envs.reset(seed=5)
    again, _ = envs.reset(seed=5)
    assert_array_equal(obs, again)
    peers = []
    for i in range(2):
        env, first = peer(args, 5 + i)
        assert_array_equal(obs[i], flat(first))
        peers.append(env)

    for step in range(1000):
        a0 = rng.uniform(-1, 1, (2, 6)).astype(np.float32)
        next_obs, reward, terminated, ended, obs = step_envs(envs, a0)
        nows = []
        for env, action in zip(peers, np.float64(a0), strict=True):
            nows.append(env.step(action))
        speeds = [env.physics.speed() for env in peers]
        expected = np.sqrt(np.clip(speeds, 0, 10) / 10)
        assert_allclose(reward, expected, atol=1e-6)
        assert not terminated.any()
        assert (ended == (step == 999)).all()
    for i in range(2):
        assert nows[i].last()
        assert nows[i].discount == 1
        assert_allclose(next_obs[i], flat(nows[i]), atol=1e-4)
        assert (obs[i] != flat(nows[i])).any()  # the next episode's first
    envs.close()


@pytest.mark.parametrize("value", [np.nan, 1e12])
def test_a_physics_error_truncates(capsys, value):
    """The last state known is its own successor, reward 0, not terminated; one line."""
    env = DMControl(Args(reward="exp"))
    env.reset(seed=0)
    for _ in range(9):
        obs, *_ = env.step(np.zeros(6))
    env.env.physics.data.qvel[:] = value
    last, reward, terminated, truncated, _ = env.step(np.zeros(6))
    assert_array_equal(last, obs)
    assert (reward, terminated, truncated) == (0.0, False, True)
    err = capsys.readouterr().err
    assert re.fullmatch(r"warning: episode cut off: .*mjWARN_\w+\n", err)
    fresh, _ = env.reset(seed=3)
    _, first = peer(CHEETAH, 3)
    assert_array_equal(np.float32(fresh), flat(first))
    assert env.step(np.zeros(6))[2:4] == (False, False)


# ---- the script ----------------------------------------------------------------------

# its networks have the sizes of tiny_envs' kinds, and so the programs of those
PENDULUM = "--domain pendulum --task swingup --eval-episodes 1 --run-dir run".split()
RUN = [*TINY, *PENDULUM]
KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import simpo_dmc

def step(self, action, count=[], step=simpo_dmc.DMControl.step):
    count.append(1)
    if len(count) == 2 * 1000 + 1700:  # two evaluations, and training
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, action)

simpo_dmc.DMControl.step = step
simpo_dmc.main()
"""


def call(root, *flags):
    return run_main(simpo_dmc, *flags, cwd=root)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that kill -9 ended in step 1700."""
    from conftest import Script  # in a process of its own

    root = tmp_path_factory.mktemp("dmc")
    (root / "killed.py").write_text(KILLED)
    twin = Script(JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    code, out, err = twin.run(*RUN, cwd=root, script=root / "killed.py")
    assert code == -signal.SIGKILL, (out, err)
    assert arrays_of(root / "run")["env_step"] == 1200
    return root / "run"


@pytest.fixture(scope="module")
def resumed(killed, quick_compiler):
    code, _, err = call(killed.parent, "--resume", "run")
    assert code == 0, err
    return killed


def test_a_killed_run_is_continued_to_its_end(resumed):
    args = json.loads((resumed / "args.json").read_text())
    assert args["domain"] == "pendulum"
    assert args["reward"] == "stock"
    assert "dm_control" in json.loads((resumed / "versions.json").read_text())
    rows = read_evals(resumed)
    assert_array_equal(rows[:, 0], [0, 1200, 2400])
    assert (rows[:, 3] == 1000).all()
    assert np.isfinite(rows).all()
    assert arrays_of(resumed)["env_step"] == 2400
    assert not (resumed / "replay.dat").exists()


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="needs EGL to render")
def test_evaluate_with_a_film(resumed, tmp_path, twin):
    """30 steps without a screen, in a process that has not read MUJOCO_GL yet."""
    shutil.copytree(resumed, tmp_path / "run")
    (tmp_path / "short.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import simpo_dmc\n"
        "simpo_dmc.EVAL_STEPS = 30\n"
        "simpo_dmc.main()\n"
    )
    flags = "--evaluate run --eval-episodes 1 --capture-video".split()
    code, _, err = twin.run(*flags, cwd=tmp_path, script=tmp_path / "short.py")
    assert code == 0, err
    assert (tmp_path / "run" / "film-2400.mp4").stat().st_size > 5_000
    [row] = read_evals(tmp_path / "run", "evaluate.csv")
    assert list(row[[0, 1, 3]]) == [2400, 0, 30]


@pytest.mark.parametrize(
    "flags,mention,code",
    [
        ("--domain nonsense", "nonsense", 1),
        ("--domain walker --task fly", "fly", 1),
        ("--domain lqr --task lqr_2_1", "bounded", 1),
        ("--reward exp --domain walker --task walk", "--reward exp is for", 2),
        ("--reward linear --domain cartpole", "--reward linear is for", 2),
        ("--neg-clip 0.1", "--neg-clip", 2),
    ],
)
def test_bad_input_is_named(tmp_path, flags, mention, code):
    result = call(tmp_path, *flags.split())
    assert result[0] == code, result
    assert mention in result[2]
    assert "Traceback" not in result[2]
    assert list(tmp_path.iterdir()) == []
