"""simpo_dmc.py: rewards, observations, ends of episodes, and the script as its users run it."""

import copy
import ctypes.util
import json
import math
import re
import shutil
import signal

import numpy as np
import pytest
from conftest import ROOT, TINY, arrays_of, assert_same_end, read_evals, run_main
from dm_control import suite
from dm_control.utils import rewards

import simpo_dmc
from simpo_dmc import Args, DMControl, landscape, make_env, make_envs

pytestmark = pytest.mark.usefixtures("quick_compiler")
CHEETAH, WALKER = Args(num_envs=2), Args(domain="walker", num_envs=2)


def peer(args, seed):
    """dm_control's own environment, started as ours with reset(seed=seed)."""
    env = suite.load(args.domain, args.task, task_kwargs={"random": seed})
    return env, env.reset()


def flat(now):
    return np.float32([*now.observation["position"], *now.observation["velocity"]])


# ---- rewards ----------------------------------------------------------------------------------

SHAPES = {"sqrt": np.sqrt, "linear": np.float64, "square": np.square}  # of v / v*
REWARDS = [(d, r) for d in ("cheetah", "walker") for r in ("sqrt", "linear", "square", "exp")]


def plain_reward(domain, reward, physics):
    """Of cheetah-run, and of walker-run by dm_control's formula with the shape in the place of
    `move`; v* is 10 and 8 m/s."""
    top, speed = (10, physics.speed) if domain == "cheetah" else (8, physics.horizontal_velocity)
    v = np.clip(speed(), 0, top)
    move = np.exp(v - top) if reward == "exp" else SHAPES[reward](v / top)
    if domain == "cheetah":
        return move
    standing = rewards.tolerance(physics.torso_height(), bounds=(1.2, math.inf), margin=0.6)
    return (3 * standing + (1 + physics.torso_upright()) / 2) / 4 * (5 * move + 1) / 6


@pytest.mark.parametrize("domain,reward", REWARDS)
def test_rewards_along_a_random_episode(domain, reward):
    """`linear` is dm_control's own; a push now and then leads through all speeds."""
    args = Args(domain=domain, reward=reward)
    env, (theirs, _), rng, found = DMControl(args), peer(args, 3), np.random.default_rng(0), []
    env.reset(seed=3)
    for step in range(300):
        if step % 20 == 0:
            push = rng.uniform(-2, 14)
            for physics in (env.env.physics, theirs.physics):
                physics.named.data.qvel["rootx"] = push
        action = rng.uniform(-1, 1, 6)
        now = theirs.step(action)
        _, ours, *ends, _ = env.step(action)
        assert ours == pytest.approx(plain_reward(domain, reward, theirs.physics), abs=1e-12)
        assert reward != "linear" or ours == pytest.approx(now.reward, abs=1e-12, rel=0)
        assert ends == [False, False]
        found.append(ours)
    assert min(found) < 0.05 and max(found) > 0.9
    assert landscape(CHEETAH, 5.0, 0.7) == 0.7


# ---- observations and episodes ----------------------------------------------------------------


def test_observations_have_the_documented_order():
    for args, size in ((CHEETAH, 17), (WALKER, 24)):
        env = make_env(args, 0, {})
        env.reset(seed=1)
        obs, data = env.step(np.linspace(-1, 1, 6))[0], env.unwrapped.env.physics.data
        head = data.qpos[1:]
        if args is WALKER:  # the rows of xmat are bodies, the world first: xx xy xz yx ...
            head = [*data.xmat[1:, [0, 2]].ravel(), data.xpos[1, 2]]
        np.testing.assert_array_equal(obs, np.float32([*head, *data.qvel]))
        assert obs.shape == env.observation_space.shape == (size,)


def test_the_time_limit_truncates_with_the_true_last_observation():
    """1000 steps of dm_control's own dynamics, never `terminated`; a seed gives one start."""
    args, rng = Args(reward="sqrt", num_envs=2), np.random.default_rng(1)
    envs, peers = make_envs(args), [peer(args, 5 + i) for i in range(2)]
    obs, again = envs.reset(seed=5)[0], envs.reset(seed=5)[0]
    np.testing.assert_array_equal(obs, again)
    np.testing.assert_array_equal(obs, [flat(first) for _, first in peers])
    for step in range(1000):
        a0 = rng.uniform(-1, 1, (2, 6)).astype(np.float32)
        obs, reward, terminated, truncated, infos = envs.step(a0)
        nows = [env.step(np.float64(a)) for (env, _), a in zip(peers, a0, strict=True)]
        speeds = [env.physics.speed() for env, _ in peers]
        np.testing.assert_allclose(reward, np.sqrt(np.clip(speeds, 0, 10) / 10), atol=1e-6)
        assert not terminated.any() and (truncated == (step == 999)).all()
    assert all(now.last() and now.discount == 1 for now in nows)
    for i, now in enumerate(nows):
        np.testing.assert_array_equal(infos["final_obs"][i], flat(now))
        assert (obs[i] != flat(now)).any()  # the next episode's first
    envs.close()


@pytest.mark.parametrize("value", [np.nan, 1e12])
def test_a_physics_error_truncates(capsys, value):
    """The last state known is its own successor, reward 0, not terminated; one line."""
    env = make_env(Args(reward="exp"), 0, {})
    env.reset(seed=0)
    for _ in range(9):
        obs, *_ = env.step(np.zeros(6))
    env.unwrapped.env.physics.data.qvel[:] = value
    last, *ends, _ = env.step(np.zeros(6))
    np.testing.assert_array_equal(last, obs)
    assert ends == [0.0, False, True]
    assert re.fullmatch(r"warning: episode cut off: .*mjWARN_\w+\n", capsys.readouterr().err)
    fresh, (_, first) = env.reset(seed=3)[0], peer(CHEETAH, 3)
    np.testing.assert_array_equal(fresh, flat(first))
    assert env.step(np.zeros(6))[2:4] == (False, False)


# ---- the script -------------------------------------------------------------------------------

RUN = "--domain pendulum --task swingup --eval-every 2400 --num-envs 5 --run-dir run".split()
RUN = [*TINY, *RUN]  # its networks have the sizes of tiny_envs' kinds
KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import simpo_dmc

def step(self, action, count=[], step=simpo_dmc.DMControl.step):
    count.append(1)
    if len(count) == 2 * 1000 + 1700:  # the evaluation at step 0, then training
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, action)

simpo_dmc.DMControl.step = step
simpo_dmc.main()
"""
SHORT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import simpo_dmc

simpo_dmc.EPISODE_LIMIT = 30
simpo_dmc.main()
"""


def call(root, *flags):
    root.mkdir(exist_ok=True)
    return run_main(simpo_dmc, *flags, cwd=root)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quick_compiler):
    """The folder of an undisturbed run."""
    root = tmp_path_factory.mktemp("dmc")
    code, out, err = call(root, *RUN)
    assert code == 0, err
    assert "step 0: return " in out and "step 2400: return " in out
    return root / "run"


def test_a_run_writes_its_folder(whole):
    args = json.loads((whole / "args.json").read_text())
    assert (args["domain"], args["task"], args["reward"]) == ("pendulum", "swingup", "stock")
    assert "dm_control" in json.loads((whole / "versions.json").read_text())
    rows = read_evals(whole)
    np.testing.assert_array_equal(rows[:, :2], [[0, 0], [0, 1], [2400, 0], [2400, 1]])
    assert (rows[:, 3] == 1000).all() and np.isfinite(rows).all()


def test_killed_and_resumed_ends_bit_identical(whole, tmp_path, twin):
    (tmp_path / "killed.py").write_text(KILLED)
    code, out, err = twin.run(*RUN, cwd=tmp_path, script=tmp_path / "killed.py")
    assert code == -signal.SIGKILL, (out, err)
    assert arrays_of(tmp_path / "run")["env_step"] == 1500
    code, out, err = call(tmp_path, "--resume", "run")
    assert code == 0, err
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="needs EGL to render")
def test_evaluate_with_a_film(whole, tmp_path, twin):
    """30 steps without a screen, in a process of its own, where MUJOCO_GL is not yet read."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "short.py").write_text(SHORT)
    flags = "--evaluate run --eval-episodes 1 --capture-video".split()
    code, out, err = twin.run(*flags, cwd=tmp_path, script=tmp_path / "short.py")
    assert code == 0, err
    assert (tmp_path / "run" / "film-2400.mp4").stat().st_size > 5_000
    assert list(read_evals(tmp_path / "run", "evaluate.csv")[0, [0, 1, 3]]) == [2400, 0, 30]


BAD = {
    "--domain nonsense": "nonsense",
    "--task fly --domain walker": "fly",
    "--reward exp --domain walker --task walk": "--reward",
    "--reward linear --domain cartpole --task balance": "--reward",
    "--domain lqr --task lqr_2_1": "bounded",
    "--neg-clip 0.1": "--neg-clip",
}


@pytest.mark.parametrize("line,mention", BAD.items())
def test_bad_input_names_its_flag(tmp_path, line, mention):
    code, out, err = call(tmp_path, *line.split())
    assert code == 2 and mention in err and "Traceback" not in err, err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_renderer_is_one_line(tmp_path, twin):
    twin = copy.copy(twin)
    twin.env = twin.env | {"MUJOCO_GL": "nonsense"}
    code, out, err = twin.run(*RUN, cwd=tmp_path, script=ROOT / "simpo_dmc.py")
    assert code == 2 and "MUJOCO_GL" in err and "Traceback" not in err, err
