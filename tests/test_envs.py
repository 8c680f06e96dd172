"""Replay, episodes and environments: nothing is lost, moved or mixed up at an episode's end."""

import contextlib
import dataclasses

import numpy as np
import pytest
import tiny_envs
from conftest import POINT, assert_refused, pairs, run_main, stop_after

import simpo_mujoco
from simpo_mujoco import Args, Replay, make_env, make_envs

pytestmark = pytest.mark.usefixtures("quick_compiler")
ARGS = Args(num_envs=3, seed=5)


def with_env(env_id, **changes):
    return dataclasses.replace(ARGS, env_id=env_id, **changes)


@contextlib.contextmanager
def ends_with(capsys, code, *mentions):
    with pytest.raises(SystemExit) as end:
        yield
    assert_refused((end.value.code, "", capsys.readouterr().err), *mentions, code=code)


# ---- replay -----------------------------------------------------------------------------------


def replay_args(**flags):
    flags = {"total_timesteps": 3000, "num_envs": 5, "learning_starts": 10} | flags
    return dataclasses.replace(ARGS, **{"checkpoint_every": flags["buffer_size"]} | flags)


def fill(replay, count, num_envs=5):
    """Adds transitions that carry their number, up to `count` of them, some environments' at once:
    obs [2], next_obs [2], act [1], reward, terminated."""
    while replay.written < count:
        number = np.arange(replay.written, replay.written + num_envs)
        pair = np.stack([number, number + 0.25], axis=1)
        replay.add(pair, pair + 0.5, -number[:, None], 10.0 * number, number % 2 == 0)


def test_replay_samples_whole_rows_of_the_last_ones_uniformly(tmp_path):
    replay = Replay(replay_args(buffer_size=30), tmp_path / "replay.dat", 7, 0)
    rng = np.random.default_rng(0)
    for count, oldest in ((5, 0), (20, 0), (30, 0), (45, 15), (170, 140)):
        fill(replay, count)
        batch = replay.sample(rng, 6000)
        assert batch.shape == (6000, 7) and batch.dtype == np.float32
        number, times = np.unique(batch[:, 0], return_counts=True)
        np.testing.assert_array_equal(number, np.arange(oldest, count))
        mean = 6000 / len(number)
        assert np.abs(times - mean).max() < 5 * np.sqrt(mean)
        n = batch[:, 0]
        columns = n, n + 0.25, n + 0.5, n + 0.75, -n, 10 * n, n % 2 == 0
        np.testing.assert_array_equal(batch, np.stack(columns, axis=1))
    draws = [replay.sample(np.random.default_rng(seed), 64) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


@pytest.mark.parametrize("num_envs", [5, 3])
@pytest.mark.parametrize("every", [33, 100])
def test_rows_written_after_a_checkpoint_do_not_hide_sampled_ones(tmp_path, every, num_envs):
    """A run killed before its next checkpoint goes on with the rows of its last one."""
    args = replay_args(buffer_size=100, checkpoint_every=every, num_envs=num_envs)
    steps = range(0, 3000, num_envs)
    saves = [step for step in steps if step % every < num_envs]
    for i in (1, 2, 3, 7):
        replay = Replay(args, tmp_path / "replay.dat", 7, 0)
        fill(replay, saves[i + 1], num_envs)  # killed just before it is saved
        replay.rows.flush()
        replay = Replay(args, tmp_path / "replay.dat", 7, saves[i])
        number = np.unique(replay.sample(np.random.default_rng(0), 4000)[:, 0])
        np.testing.assert_array_equal(number, np.arange(max(saves[i] - 100, 0), saves[i]))


def test_replay_takes_its_disk_at_the_start_or_is_refused(tmp_path, capsys):
    """A memory-mapped file that finds the disk full later dies of SIGBUS."""
    path = tmp_path / "replay.dat"
    size = Replay(replay_args(buffer_size=1500), path, 700, 0).rows.nbytes
    assert size == path.stat().st_size <= path.stat().st_blocks * 512
    path.unlink()
    with ends_with(capsys, 2, "replay", str(path)):  # no run without its rows
        Replay(replay_args(buffer_size=1500), path, 700, 30)
    with ends_with(capsys, 2, "replay", "GB", str(path)):  # 60 TB
        Replay(replay_args(buffer_size=10**13, total_timesteps=3 * 10**11), path, 50, 0)


# ---- episodes as the trainer stores them ------------------------------------------------------

STEPS = 60  # of each of the five environments


def stored(kind, root):
    """A run of random actions that a SIGTERM ends -> its rows [STEPS, 5, 9] and its output."""
    flags = "--total-timesteps 2400 --learning-starts 2000 --checkpoint-every 600".split()
    flags += ["--eval-episodes", 1, "--env-id", f"tiny_envs:{kind}-v0", "--run-dir", root / kind]
    stop_after(5 * STEPS + episode_length(kind))  # of the evaluation at step 0
    code, out, err = run_main(simpo_mujoco, *POINT, *flags, cwd=root)
    assert code == 143, (out, err)
    rows = np.fromfile(root / kind / "replay.dat", np.float32).reshape(-1, 9)
    assert not rows[5 * STEPS :].any()
    return rows[: 5 * STEPS].reshape(STEPS, 5, 9)


def episode_length(kind):
    return {"Short": 7, "Both": 6, "Lists": 9}.get(kind, 50)


def simulate(kind, index, actions):
    """The rows that an environment must leave: its own loop, reset by hand at each end."""
    env = getattr(tiny_envs, kind, tiny_envs.Point)()
    first_seed = int(np.random.default_rng([1, 0]).integers(2**30))  # of (seed, step)
    obs, rows = np.array(env.reset(seed=first_seed + index)[0]), []
    low, high = env.action_space.low, env.action_space.high
    for a0 in actions:
        action = np.clip(low + (a0 + 1) / 2 * (high - low), low, high).astype(env.act_dtype)
        next_obs, reward, terminated, *_ = env.step(action)
        rows.append([*obs, *next_obs, *a0, np.squeeze(reward), terminated])
        obs = np.array(next_obs)
        if terminated or env.clock == episode_length(kind):
            obs = np.array(env.reset()[0])
    return np.float32(rows)


@pytest.mark.parametrize("kind", ["Point", "Short", "Both", "Lists", "Narrow", "Wide"])
def test_stored_transitions_equal_a_simulation_of_each_environment(tmp_path, kind):
    """Cut off, terminated, both at once; rewards of shape (1,), integer flags and any info; actions
    that rounding would lead out of their space, and a float64 space."""
    rows = stored(kind, tmp_path)
    for i in range(5):
        expected = simulate(kind, i, rows[:, i, 6:7])
        np.testing.assert_allclose(rows[:, i], expected, rtol=1e-5, atol=1e-6)
    assert rows[..., -1].sum() == (50 if kind == "Both" else 0)
    assert len(np.unique(rows[0, :, 0])) == 5  # five streams
    assert rows[..., 6].min() < -0.95 and rows[..., 6].max() > 0.95
    if kind == "Point":  # the same dynamics with one buffer for all observations
        np.testing.assert_array_equal(stored("OneBuffer", tmp_path), rows)


def test_a_run_of_two_seeds_starts_elsewhere_and_evaluations_never_do():
    for env_id in ("tiny_envs:Point-v0", "tiny_envs:GlobalRandom-v0", "Pendulum-v1"):
        envs = make_envs(with_env(env_id))
        starts = [envs.reset(seed=seed)[0] for seed in (3, 2**31, 3, 2**31, 2**30)]
        np.testing.assert_array_equal(starts[0], starts[2])
        np.testing.assert_array_equal(starts[1], starts[3])
        assert len(np.unique(np.concatenate(starts)[:, 0])) == 9, env_id
        envs.close()


# ---- what is refused, what is cut off ---------------------------------------------------------


@pytest.mark.filterwarnings("error")  # the message is the only line
@pytest.mark.parametrize("value", [np.nan, 1e39])
@pytest.mark.parametrize("kind", ["reset", "observation", "reward"])
def test_a_value_that_is_not_finite_in_float32_names_its_place(monkeypatch, capsys, kind, value):
    envs = make_envs(with_env("tiny_envs:Nan-v0"))
    for name, x in (("value", value), ("kind", kind), ("after", 4)):
        monkeypatch.setattr(tiny_envs.Nan, name, 0.0 if name == "value" else x)
    envs.reset(seed=0)
    monkeypatch.setattr(envs.envs[1].unwrapped, "value", value, raising=False)
    if kind == "reset":
        with ends_with(capsys, 1, "first observation", "environment 1", "not finite"):
            envs.reset(seed=0)
        return
    for _ in range(3):
        envs.step(np.zeros((3, 1), np.float32))
    with ends_with(capsys, 1, f"{kind} of environment 1", "4 steps", "not finite"):
        envs.step(np.zeros((3, 1), np.float32))


@pytest.mark.parametrize("kind,mention", [("TwoRewards", "reward"), ("WrongObs", "observation")])
def test_a_value_of_another_shape_is_named(capsys, kind, mention):
    envs = make_envs(with_env(f"tiny_envs:{kind}-v0"))
    with ends_with(capsys, 1, mention, "(2,)"):
        envs.reset(seed=0)
        envs.step(np.zeros((3, 1), np.float32))


REFUSED = """
    Nonsense-v0 => Nonsense | no_such_module:Env-v0 => no_such_module | ../x:Foo => environment
    CartPole-v1 => Discrete | tiny_envs:Unbounded-v0 => bounded | tiny_envs:Whole-v0 => int64
    tiny_envs:HalfBounded-v0 => bounded | tiny_envs:NoAction-v0 => (0,)
    tiny_envs:Image-v0 => (2, 2) | tiny_envs:Goal-v0 => FlattenObservation
"""


@pytest.mark.parametrize("env_id,mention", pairs(REFUSED))
def test_unsuitable_environments_are_refused_in_one_line(capsys, env_id, mention):
    before = tiny_envs.Point.opened - tiny_envs.Point.closed
    with ends_with(capsys, 2, mention):
        make_envs(with_env(env_id))
    assert tiny_envs.Point.opened - tiny_envs.Point.closed == before  # it was closed


def test_a_simulation_that_blows_up_truncates(tmp_path, monkeypatch, capsys):
    """MuJoCo goes back to its initial state in mid-episode, with finite numbers and no end."""
    monkeypatch.chdir(tmp_path)  # it writes a log
    env = make_env(with_env("HalfCheetah-v4"), 0, {})
    env.reset()
    for _ in range(9):
        obs, *_ = env.step(np.zeros(6, np.float32))
    env.unwrapped.data.qvel[:] = 1e12
    last, reward, terminated, truncated, _ = env.step(np.zeros(6, np.float32))
    np.testing.assert_array_equal(last, obs)
    assert (reward, terminated, truncated) == (0, False, True)
    assert capsys.readouterr().err.count("cut off") == 1
    env.reset()
    assert not any(env.step(np.zeros(6, np.float32))[3] for _ in range(50))
    env.close()
