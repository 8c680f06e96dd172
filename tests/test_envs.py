"""Replay, episodes and environments: nothing is lost, moved or mixed up."""

import dataclasses
import re

import gymnasium as gym
import numpy as np
import pytest
import tiny_envs
from conftest import POINT, run_main, stop_after
from numpy.testing import assert_allclose, assert_array_equal

import simpo_mujoco
from simpo_mujoco import (
    EVAL_SEED,
    Args,
    Batch,
    add_transitions,
    make_env,
    make_envs,
    open_replay,
    require_finite,
    sample_batch,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")
ARGS = Args(num_envs=3, seed=5)


def with_env(kind, **changes):
    return dataclasses.replace(ARGS, env_id=f"tiny_envs:{kind}-v0", **changes)


# ---- replay --------------------------------------------------------------------------


def numbered(number):
    """Transitions that carry their number: observations [., 2], actions [., 1]."""
    obs = np.stack([number, number + 0.25], axis=1)
    return Batch(
        obs=obs,
        next_obs=obs + 0.5,
        act=-number[:, None],
        reward=10 * number,
        terminated=number % 2 == 0,
    )


def test_replay_samples_whole_rows_of_the_last_ones_uniformly(tmp_path):
    args = dataclasses.replace(ARGS, buffer_size=30)
    replay = open_replay(args, tmp_path / "replay.dat", 2, 1, "w+")
    rng = np.random.default_rng(0)
    for step in range(0, 170, 5):
        add_transitions(replay, step, numbered(step + np.arange(5.0)))
        count = step + 5
        if count not in (5, 20, 30, 45, 170):
            continue
        batch = sample_batch(replay, count, rng, 6000)
        number, times = np.unique(batch.obs[:, 0], return_counts=True)
        assert_array_equal(number, np.arange(max(count - 30, 0), count))
        mean = 6000 / len(number)
        assert np.abs(times - mean).max() < 5 * np.sqrt(mean)
        expected = numbered(batch.obs[:, 0])
        for ours, theirs in zip(batch, expected, strict=True):
            assert ours.dtype == np.float32
            assert_array_equal(ours, theirs)


def test_replay_is_reopened_as_it_was(tmp_path):
    args = dataclasses.replace(ARGS, buffer_size=30)
    replay = open_replay(args, tmp_path / "replay.dat", 2, 1, "w+")
    add_transitions(replay, 0, numbered(np.arange(20.0)))
    replay.flush()
    again = open_replay(args, tmp_path / "replay.dat", 2, 1, "r+")
    assert_array_equal(again, replay)
    draws = []
    for seed in (1, 1, 2):
        rng = np.random.default_rng(seed)
        draws.append(sample_batch(again, 20, rng, 64).obs)
    assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


# ---- episodes as the trainer stores them ---------------------------------------------

STEPS = 60  # of each of the five environments
LENGTH = {"Short": 7, "Both": 6, "Lists": 9}  # of an episode; else 50


def stored(kind, root):
    """A run of random actions that Ctrl-C ends -> its rows [STEPS, 5], and the seeds
    of the first training episodes."""
    flags = [*POINT, "--learning-starts", 2000, "--eval-episodes", 1]
    flags += ["--env-id", f"tiny_envs:{kind}-v0", "--run-dir", root / kind]
    stop_after(LENGTH.get(kind, 50) + 5 * STEPS + 1)  # the first ones evaluate
    tiny_envs.Point.seeds.clear()
    code, out, err = run_main(simpo_mujoco, *flags, cwd=root)
    assert code == 1 and "stopped" in err, (out, err)
    args = Args(buffer_size=600)
    replay = open_replay(args, root / kind / "replay.dat", 3, 1, "r")
    assert not replay[5 * STEPS :]["obs"].any()
    seeds = [seed for seed in tiny_envs.Point.seeds if seed != EVAL_SEED]
    return replay[: 5 * STEPS].reshape(STEPS, 5), seeds


def simulate(kind, seed, actions):
    """The transitions that an environment must leave, reset by hand at each end."""
    env = getattr(tiny_envs, kind, tiny_envs.Point)()
    low = env.action_space.low
    high = env.action_space.high
    obs = np.array(env.reset(seed=seed)[0])
    transitions = []
    for a0 in actions:
        action = low + (a0 + 1) / 2 * (high - low)
        action = np.clip(action, low, high).astype(env.act_dtype)
        next_obs, reward, terminated, *_ = env.step(action)
        next_obs = np.array(next_obs)
        transitions.append((obs, next_obs, a0, np.squeeze(reward), terminated))
        obs = next_obs
        if terminated or env.clock == LENGTH.get(kind, 50):
            obs = np.array(env.reset()[0])
    columns = zip(*transitions, strict=True)
    return Batch(*(np.float32(np.stack(column)) for column in columns))


@pytest.mark.parametrize("kind", ["Point", "Short", "Both", "Lists", "Narrow", "Wide"])
def test_stored_transitions_equal_a_simulation(tmp_path, kind):
    """Cut off, terminated, both at once; rewards of shape (1,), integer flags, any
    info; actions that rounding would lead out of their space; a float64 space."""
    rows, seeds = stored(kind, tmp_path)
    assert len(set(seeds)) == 5
    for i in range(5):
        expected = simulate(kind, seeds[i], rows["act"][:, i])
        for name, values in expected._asdict().items():
            ours = rows[name][:, i]
            assert_allclose(ours, values, rtol=1e-5, atol=1e-6)
    assert rows["terminated"].sum() == (50 if kind == "Both" else 0)
    assert rows["act"].min() < -0.95
    assert rows["act"].max() > 0.95
    if kind == "Point":  # the same dynamics with one buffer for all observations
        one_buffer, _ = stored("OneBuffer", tmp_path)
        assert_array_equal(one_buffer, rows)


# ---- environments as they come -------------------------------------------------------


@pytest.mark.parametrize("env_id", ["tiny_envs:Point-v0", "Pendulum-v1"])
def test_a_seed_gives_its_starts(env_id):
    envs = make_envs(dataclasses.replace(ARGS, env_id=env_id), 3)
    starts = [envs.reset(seed=seed)[0] for seed in (3, EVAL_SEED, 3, EVAL_SEED)]
    assert_array_equal(starts[0], starts[2])
    assert_array_equal(starts[1], starts[3])
    assert len(np.unique(np.concatenate(starts[:2])[:, 0])) == 6
    envs.close()


@pytest.mark.parametrize(
    "kind,scale",
    [("Whole", 255), ("Bytes", 255), ("Halves", 1e5)],
)
def test_observations_of_other_types_become_float32(kind, scale):
    env = make_env(with_env(kind))
    obs, _ = env.reset(seed=3)
    last = env.step(np.float32([0.5]))[0]
    plain = env.unwrapped
    assert obs.dtype == last.dtype == env.observation_space.dtype == np.float32
    assert_allclose(last, np.float32(plain.observe()))
    assert 1 < np.abs(obs[0]) <= 5 * scale
    assert np.isfinite(last).all()


def test_seeds_are_small_enough_for_a_c_library():
    """Those of an evaluation, here of 20 environments."""
    envs = make_envs(with_env("CSeed"), 20)
    envs.reset(seed=EVAL_SEED)
    envs.close()


@pytest.fixture
def ball_xml(tmp_path, monkeypatch):
    path = tmp_path / "ball.xml"
    path.write_text(tiny_envs.BALL)
    monkeypatch.setattr(tiny_envs.Rebuild, "path", str(path))


def test_a_simulation_made_again_at_reset_keeps_its_episodes(ball_xml):
    """A new MjData starts at time 0, before the last step of the one that it was."""
    env = make_env(with_env("Rebuild"))
    for _ in range(3):
        env.reset(seed=1)
        episode_return = 0.0
        for step in range(50):
            _, reward, terminated, truncated, _ = env.step(np.zeros(1))
            episode_return += reward
            assert not terminated
            assert truncated == (step == 49)
        assert episode_return == 50
    env.close()


def test_films_follow_the_body_where_a_camera_does(ball_xml):
    env = make_env(dataclasses.replace(ARGS, env_id="HalfCheetah-v4"))
    camera = env.unwrapped.mujoco_renderer.camera_id
    assert env.unwrapped.model.camera(camera).name == "track"
    env = make_env(with_env("Rebuild"))
    assert env.unwrapped.mujoco_renderer.camera_id == -1  # the free camera


def test_what_mujoco_does_to_a_simulation_is_not_changed(tmp_path, monkeypatch):
    """A state set in mid-episode, back in time, ends no episode."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
    env = make_env(dataclasses.replace(ARGS, env_id="HalfCheetah-v4"))
    env.reset(seed=0)
    plain = gym.make("HalfCheetah-v4")
    plain.reset(seed=0)
    for step in range(30):
        for one in (env, plain):
            if step == 9:
                one.unwrapped.data.time = 0.0
                one.unwrapped.data.qvel[:] = 1e12
        ours = env.step(np.full(6, 0.1))
        theirs = plain.step(np.full(6, 0.1, np.float32))
        assert_allclose(ours[0], np.float32(theirs[0]), rtol=1e-3, atol=1e-3)
        assert ours[1] == pytest.approx(theirs[1], rel=1e-3, abs=1e-3)
        assert ours[2:4] == theirs[2:4] == (False, False)
    env.close()
    plain.close()


# ---- what is refused -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
@pytest.mark.parametrize("name", ["action", "observation", "reward"])
def test_a_value_that_is_not_finite_in_float32_is_named(capsys, name, value):
    arrays = {key: np.zeros((3, 2)) for key in ("action", "observation", "reward")}
    require_finite(4, **arrays)
    arrays[name][1, 1] = value
    with pytest.raises(SystemExit) as end:
        require_finite(4, **arrays)
    assert end.value.code == 3
    err = capsys.readouterr().err
    assert err == f"error: {name} is not finite at step 4\n"


@pytest.mark.parametrize(
    "env_id,mention",
    [
        ("Nonsense-v0", "NameNotFound"),
        ("no_such_module:Env-v0", "ModuleNotFoundError"),
        ("../x:Foo", "Error"),
        ("CartPole-v1", "Discrete"),
        ("tiny_envs:Unbounded-v0", "bounded"),
        ("tiny_envs:HalfBounded-v0", "bounded"),
        ("tiny_envs:WholeActions-v0", "int64"),
        ("tiny_envs:Image-v0", "(2, 2)"),
        ("tiny_envs:Grid-v0", "(2, 2)"),
        ("tiny_envs:Goal-v0", "goal"),
        ("tiny_envs:MissingFile-v0", "FileNotFoundError"),
        ("tiny_envs:TwoLines-v0", "KeyError"),
    ],
)
def test_unsuitable_environments_are_refused_in_one_line(env_id, mention):
    """Whatever a constructor raises, with the type of it."""
    with pytest.raises(SystemExit) as end:
        make_envs(dataclasses.replace(ARGS, env_id=env_id), 2)
    message = end.value.code
    assert re.fullmatch(r"error: cannot make \S+: \w+: .*", message), message
    assert mention in message
