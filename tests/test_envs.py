"""Replay, episodes and environments: nothing is lost, moved or mixed up."""

import dataclasses
import re

import gymnasium as gym
import numpy as np
import pytest
import tiny_envs
from conftest import POINT, open_replay, run_main, stop_after
from numpy.testing import assert_allclose, assert_array_equal

import simpo_mujoco
from simpo_mujoco import (
    EVAL_SEED,
    Args,
    Batch,
    make_envs,
    require_finite,
    sample_batch,
    step_envs,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")
ARGS = Args(num_envs=3, seed=5)


def with_env(kind, **changes):
    return dataclasses.replace(ARGS, env_id=f"tiny_envs:{kind}-v0", **changes)


# ---- replay --------------------------------------------------------------------------


@pytest.mark.parametrize("step", [5, 20, 30, 45])
def test_batches_are_whole_rows_drawn_uniformly_from_what_was_written(step):
    """Of 30 rows, each of which carries its number."""
    fields = [("obs", "f4", 2), ("next_obs", "f4", 2), ("act", "f4", 1)]
    fields += [("reward", "f4"), ("terminated", "f4")]
    replay = np.zeros(30, fields)
    number = np.arange(30)
    replay["obs"] = number[:, None] + [0, 0.25]
    replay["next_obs"] = replay["obs"] + 0.5
    replay["act"] = -number[:, None]
    replay["reward"] = 10 * number
    replay["terminated"] = number % 2
    batch = sample_batch(replay, step, np.random.default_rng(0), 6000)
    number, times = np.unique(batch.obs[:, 0], return_counts=True)
    assert_array_equal(number, np.arange(min(step, 30)))
    mean = 6000 / len(number)
    assert np.abs(times - mean).max() < 5 * np.sqrt(mean)
    rows = replay[np.int32(batch.obs[:, 0])]
    for name, values in batch._asdict().items():
        assert values.dtype == np.float32
        assert_array_equal(values, rows[name])
    again = sample_batch(replay, step, np.random.default_rng(0), 6000)
    assert_array_equal(again.obs, batch.obs)


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
    replay = open_replay(root / kind)
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


@pytest.mark.parametrize("kind", ["Point", "Short", "Both", "Lists", "Narrow"])
def test_stored_transitions_equal_a_simulation(tmp_path, kind):
    """Cut off, terminated, both at once; rewards of shape (1,), integer flags, any
    info; actions that rounding would lead out of their space."""
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
    envs, *_ = make_envs(dataclasses.replace(ARGS, env_id=env_id), 3)
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
    envs, *_ = make_envs(with_env(kind), 1)
    [obs], _ = envs.reset(seed=3)
    [last], *_ = step_envs(envs, np.float32([[0.5]]))
    plain = envs.envs[0].unwrapped
    assert obs.dtype == last.dtype == np.float32
    assert_allclose(last, np.float32(plain.observe()))
    assert 1 < np.abs(obs[0]) <= 5 * scale
    assert np.isfinite(last).all()


def test_seeds_are_small_enough_for_a_c_library():
    """Those of an evaluation, here of 20 environments."""
    envs, *_ = make_envs(with_env("CSeed"), 20)
    envs.reset(seed=EVAL_SEED)
    envs.close()


@pytest.fixture
def ball_xml(tmp_path, monkeypatch):
    path = tmp_path / "ball.xml"
    path.write_text(tiny_envs.BALL)
    monkeypatch.setattr(tiny_envs.Rebuild, "path", str(path))


def test_a_simulation_made_again_at_reset_keeps_its_episodes(ball_xml):
    """A new MjData starts at time 0, before the last step of the one that it was."""
    envs, *_ = make_envs(with_env("Rebuild"), 1)
    envs.reset(seed=1)
    for step in range(150):
        _, reward, terminated, ended, _ = step_envs(envs, np.zeros((1, 1)))
        assert reward == 1
        assert not terminated
        assert ended == (step % 50 == 49)
    envs.close()


def test_films_follow_the_body_where_a_camera_does(ball_xml):
    for args, camera in (
        (dataclasses.replace(ARGS, env_id="HalfCheetah-v4"), "track"),
        (with_env("Rebuild"), None),
    ):
        envs, *_ = make_envs(args, 1)
        env = envs.envs[0].unwrapped
        if camera:
            number = env.mujoco_renderer.camera_id
            assert env.model.camera(number).name == camera
        else:
            assert env.mujoco_renderer.camera_id == -1  # the free camera


def test_what_mujoco_does_to_a_simulation_is_not_changed(tmp_path, monkeypatch):
    """A state set in mid-episode, back in time, ends no episode."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
    envs, *_ = make_envs(dataclasses.replace(ARGS, env_id="HalfCheetah-v4"), 1)
    envs.reset(seed=0)
    plain = gym.make("HalfCheetah-v4")
    plain.reset(seed=0)
    for step in range(30):
        for one in (envs.envs[0], plain):
            if step == 9:
                one.unwrapped.data.time = 0.0
                one.unwrapped.data.qvel[:] = 1e12
        next_obs, reward, _, ended, _ = step_envs(envs, np.full((1, 6), 0.1))
        theirs = plain.step(np.full(6, 0.1, np.float32))
        assert_allclose(next_obs[0], np.float32(theirs[0]), rtol=1e-3, atol=1e-3)
        assert reward == pytest.approx(theirs[1], rel=1e-3, abs=1e-3)
        assert theirs[2:4] == (False, False)
        assert not ended
    envs.close()
    plain.close()


# ---- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
@pytest.mark.parametrize("name", ["action", "observation", "reward"])
def test_a_value_that_is_not_finite_in_float32_is_named(capsys, name, value):
    arrays = {key: np.zeros((3, 2)) for key in ("action", "observation", "reward")}
    require_finite(**arrays)
    arrays[name][1, 1] = value
    with pytest.raises(SystemExit) as end:
        require_finite(**arrays)
    assert end.value.code == 3
    err = capsys.readouterr().err
    assert err == f"error: {name} is not finite\n"


@pytest.mark.parametrize(
    "env_id,mention",
    [
        ("Nonsense-v0", "NameNotFound"),
        ("no_such_module:Env-v0", "ModuleNotFoundError"),
        ("../x:Foo", "Error"),
        ("CartPole-v1", "actions must be real"),
        ("tiny_envs:Unbounded-v0", "infinity bounds"),
        ("tiny_envs:HalfBounded-v0", "infinity bounds"),
        ("tiny_envs:WholeActions-v0", "actions must be real"),
        ("tiny_envs:Image-v0", "ValueError"),
        ("tiny_envs:Grid-v0", "ValueError"),
        ("tiny_envs:Goal-v0", "Dict"),
        ("tiny_envs:MissingFile-v0", "FileNotFoundError"),
        ("tiny_envs:TwoLines-v0", "KeyError"),
    ],
)
def test_unsuitable_environments_are_refused_in_one_line(env_id, mention):
    """Whatever a constructor raises, with the type of it."""
    with pytest.raises(SystemExit) as end:
        make_envs(dataclasses.replace(ARGS, env_id=env_id), 2)
    message = end.value.code
    assert re.fullmatch(r"error: cannot use \S+: \w+\(.*\); .* real", message), message
    assert mention in message
