"""Replay, episodes and environments: nothing is lost, moved or mixed up at an episode's end."""

import dataclasses
import itertools

import mujoco
import numpy as np
import pytest

from simpo_mujoco import (
    EVAL_SEED,
    Args,
    Diverged,
    Replay,
    UsageError,
    make_env,
    make_envs,
    replay_shape,
    scale_action,
    step_envs,
)

ARGS = Args(num_envs=3, seed=5)


def with_env(env_id, **changes):
    return dataclasses.replace(ARGS, env_id=env_id, **changes)


# ---- replay -----------------------------------------------------------------------------------


def numbered(first, count):
    """Transitions that carry their number: obs [2], next_obs [2], act [1], reward, terminated."""
    number = np.arange(first, first + count)
    pair = np.stack([number, number + 0.25], axis=1)
    return pair, pair + 0.5, -number[:, None], 10.0 * number, number % 2 == 0


def fill(replay, count, num_envs=5):
    """Adds transitions up to the number `count`, as a run of num_envs environments does."""
    while replay.written < count:
        replay.add(*numbered(replay.written, num_envs))


def test_replay_keeps_whole_rows_in_order_and_wraps(tmp_path):
    replay = Replay(tmp_path / "replay.dat", (13, 7), limit=13)
    fill(replay, 10, num_envs=5)
    expected = np.concatenate([x.reshape(10, -1) for x in numbered(0, 10)], axis=1)
    np.testing.assert_array_equal(replay.rows[:10], np.float32(expected))
    fill(replay, 20, num_envs=5)  # 15..19 go over the end: rows 10..12 hold 10..12, then 0..6
    assert replay.written == 20
    np.testing.assert_array_equal(replay.rows[:, 0], [*range(13, 20), *range(7, 13)])


def test_replay_samples_the_last_rows_uniformly(tmp_path):
    replay = Replay(tmp_path / "replay.dat", (50, 7), limit=30)
    rng = np.random.default_rng(0)
    for count, oldest in ((5, 0), (20, 0), (30, 0), (45, 15), (170, 140)):
        fill(replay, count)
        batch = replay.sample(rng, 6000)
        assert batch.shape == (6000, 7) and batch.dtype == np.float32
        number, times = np.unique(batch[:, 0], return_counts=True)
        np.testing.assert_array_equal(number, np.arange(oldest, count))
        mean = 6000 / len(number)
        assert np.abs(times - mean).max() < 5 * np.sqrt(mean)
        whole = np.concatenate([x.reshape(count, -1) for x in numbered(0, count)], axis=1)
        np.testing.assert_array_equal(batch, np.float32(whole)[batch[:, 0].astype(int)])


def test_replay_samples_by_the_generator_alone(tmp_path):
    replay = Replay(tmp_path / "replay.dat", (50, 7), limit=30)
    fill(replay, 45)
    draws = [replay.sample(np.random.default_rng(seed), 64) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


@pytest.mark.parametrize("every", [0, 20, 33])
def test_rows_written_after_a_checkpoint_do_not_hide_sampled_ones(tmp_path, every):
    """A run killed within two checkpoint intervals goes on with the rows of its checkpoint."""
    args = dataclasses.replace(ARGS, num_envs=5, buffer_size=100, batch_size=10, learning_starts=10)
    args = dataclasses.replace(args, checkpoint_every=every, total_timesteps=3000)
    path, shape = tmp_path / "replay.dat", replay_shape(args, 2, 1)
    assert shape[1] == 7
    replay = Replay(path, shape, args.buffer_size)
    for saved in (50, 245, 1000):
        fill(replay, saved)
        # without regular checkpoints, this one stays the newest until the run ends
        killed = saved + 2 * (every + args.num_envs - 1) if every else args.total_timesteps
        fill(replay, killed)
        replay.rows.flush()
        replay = Replay(path, shape, args.buffer_size, saved)
        number = np.unique(replay.sample(np.random.default_rng(saved), 4000)[:, 0])
        np.testing.assert_array_equal(number, np.arange(max(saved - 100, 0), saved))


def test_replay_takes_disk_only_for_what_was_written(tmp_path):
    path = tmp_path / "replay.dat"
    replay = Replay(path, (1_000_000, 26), limit=1_000_000)
    replay.add(np.ones((5, 26), np.float32))
    replay.rows.flush()
    assert path.stat().st_size == 104_000_000
    assert path.stat().st_blocks * 512 < 1_000_000


def test_replay_of_another_size_or_none_is_refused(tmp_path):
    path = tmp_path / "replay.dat"
    with pytest.raises(UsageError, match="replay.dat"):
        Replay(path, (50, 7), 30, written=10)
    fill(Replay(path, (50, 7), 30), 20)
    with pytest.raises(UsageError, match="replay.dat"):
        Replay(path, (50, 8), 30, written=20)
    assert Replay(path, (50, 7), 30, written=20).sample(np.random.default_rng(0), 9)[0, 0] >= 0


# ---- stepping ---------------------------------------------------------------------------------


def simulate(args, index, actions):
    """The rows that environment `index` must leave: its own loop, reset by hand at each end.

    actions [L, d] in [-1, 1]. -> rows [L, 2 o + d + 2], and (return, length) of each episode.
    """
    env = make_env(args, index, args.seed, None)
    low, high = env.action_space.low, env.action_space.high
    obs, rows, episodes, total, length = env.reset()[0], [], [], 0.0, 0
    for a0 in actions:
        action = low + (a0 + 1) / 2 * (high - low)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rows.append(np.concatenate([obs, next_obs, a0, [reward, terminated]]))
        obs, total, length = next_obs, total + reward, length + 1
        if terminated or truncated:
            episodes.append((total, length))
            obs, total, length = env.reset()[0], 0.0, 0
    env.close()
    return np.float32(rows), episodes


@pytest.mark.parametrize(
    "env_id,steps,lengths",
    [
        ("Hopper-v4", 120, None),  # falls over: terminated
        ("tiny_envs:ShortHopper-v0", 40, {7}),  # cut off, now and then fallen
        ("Pendulum-v1", 430, {200}),  # only ever cut off
        ("tiny_envs:Both-v0", 20, {6}),  # ends and is cut off in one step
    ],
)
def test_stored_transitions_equal_a_simulation_of_each_environment(
    tmp_path, env_id, steps, lengths
):
    args = with_env(env_id)
    envs = make_envs(args, args.num_envs, args.seed)
    o, d = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    replay = Replay(tmp_path / "replay.dat", (steps * 3, 2 * o + d + 2), steps * 3)
    actions = np.random.default_rng(1).uniform(-1, 1, (steps, 3, d)).astype(np.float32)
    obs, ended = envs.reset()[0], []
    for a0 in actions:
        obs, done = step_envs(envs, replay, obs, a0)
        ended += done
    rows = np.array(replay.rows).reshape(steps, 3, -1)
    expected = [simulate(args, i, actions[:, i]) for i in range(3)]
    for i, (own, _) in enumerate(expected):
        np.testing.assert_array_equal(rows[:, i], own)
    np.testing.assert_allclose(
        sorted(ended), sorted(episode for _, own in expected for episode in own), rtol=1e-5
    )
    assert len(ended) >= 6
    if lengths:
        assert lengths <= {int(length) for _, length in ended}
    terminated = rows[..., -1]
    if env_id == "Pendulum-v1":
        assert not terminated.any()
    elif env_id == "Hopper-v4":
        assert terminated.sum() == len(ended)
    elif env_id == "tiny_envs:Both-v0":
        assert terminated.sum() == len(ended) == 9
    # the three environments are three streams
    assert len(np.unique(rows[0, :, 0])) == 3


def test_episodes_and_seeds_differ(tmp_path):
    """Each (seed, environment, episode) starts elsewhere; the same one starts alike."""
    args = with_env("Pendulum-v1")
    starts = set()
    for seed in (1, 2):
        for index in (0, 1):
            env, again = (make_env(args, index, seed, None) for _ in range(2))
            for _ in range(3):
                first, second = env.reset()[0], again.reset()[0]
                np.testing.assert_array_equal(first, second)
                starts.add(first.tobytes())
    assert len(starts) == 12


def test_evaluation_starts_are_none_of_training():
    """SeedSequence pads its words, so that a large seed can equal a small one of another index."""
    grid = itertools.product((0, 1, 2**32 - 1), range(4), range(4))
    training = {tuple(np.random.SeedSequence(x).generate_state(2)) for x in grid}
    ours = [[EVAL_SEED, i, 0] for i in range(4)]
    assert len(training) == 48
    assert not training & {tuple(np.random.SeedSequence(x).generate_state(2)) for x in ours}


def integration_state(env):
    """All that MuJoCo integrates, as one array."""
    model, data = env.unwrapped.model, env.unwrapped.data
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, state, kind)
    return state


def inside(env):
    """Clocks, statistics and random stream of a chain of wrappers."""
    found = {"stream": env.unwrapped.np_random.bit_generator.state}
    while hasattr(env, "env"):
        for name in ("_elapsed_steps", "episode_returns", "episode_lengths", "episode", "seed"):
            if name in vars(env):
                found[type(env).__name__ + name] = vars(env)[name]
        env = env.env
    return found


@pytest.mark.parametrize("env_id", ["Hopper-v4", "tiny_envs:ShortHopper-v0", "Walker2d-v4"])
def test_restore_brings_an_episode_back_bit_for_bit(env_id):
    args = with_env(env_id)
    env, twin = (make_env(args, 2, args.seed, None) for _ in range(2))
    rng = np.random.default_rng(3)
    action = lambda: rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)  # noqa: E731
    obs, _ = env.reset()
    for count in (0, 4, 23, 61):  # steps further, over several episodes
        for _ in range(count):
            obs, _, terminated, truncated, _ = env.step(action())
            if terminated or truncated:
                obs, _ = env.reset()
        twin.reset()  # wherever it was
        restored = twin.restore(env.episode, np.array(env.actions))
        np.testing.assert_array_equal(restored, obs)
        np.testing.assert_array_equal(integration_state(twin), integration_state(env))
        assert inside(twin) == inside(env)
        np.testing.assert_array_equal(np.array(twin.actions), np.array(env.actions))
    assert env.episode > 0 and "TimeLimit_elapsed_steps" in inside(env)
    for _ in range(30):  # and go on alike, into the next episode
        step = action()
        ours, theirs = env.step(step), twin.step(step)
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1:4] == theirs[1:4]
        if ours[2] or ours[3]:
            np.testing.assert_array_equal(env.reset()[0], twin.reset()[0])
    env.close(), twin.close()


def test_a_simulation_that_blows_up_truncates(tmp_path, monkeypatch, capsys):
    """MuJoCo goes back to its initial state in mid-episode, with finite numbers and no end."""
    monkeypatch.chdir(tmp_path)  # it writes a log
    env = make_env(with_env("HalfCheetah-v4"), 0, 0, None)
    env.reset()
    for _ in range(50):
        obs, *_ = env.step(np.zeros(6, np.float32))
    env.unwrapped.data.qvel[:] = 1e12
    last, reward, terminated, truncated, info = env.step(np.zeros(6, np.float32))
    np.testing.assert_array_equal(last, obs)
    assert (reward, terminated, truncated, info["episode"]["l"]) == (0, False, True, 51)
    assert capsys.readouterr().err.count("cut off") == 1
    env.reset()
    assert not any(env.step(np.zeros(6, np.float32))[3] for _ in range(50))


def test_scale_action_reaches_the_environments_range():
    for env_id, low, high, d in (("Humanoid-v4", -0.4, 0.4, 17), ("tiny_envs:Point-v0", -1, 3, 1)):
        envs = make_envs(with_env(env_id), 1, 0)
        edges = scale_action(envs, np.repeat(np.float32([[-1], [0], [0.5], [1]]), d, axis=1))
        expected = [low, (low + high) / 2, low + 0.75 * (high - low), high]
        assert edges.dtype == np.float32
        np.testing.assert_allclose(edges, np.repeat(np.float32(expected)[:, None], d, 1), rtol=1e-6)
        assert all(envs.single_action_space.contains(edge) for edge in edges)
        envs.close()


@pytest.mark.parametrize("field,name", [("nan_reward_at", "reward"), ("nan_obs_at", "observation")])
def test_a_value_that_is_not_finite_names_its_environment(tmp_path, field, name):
    envs = make_envs(with_env("tiny_envs:Point-v0"), 3, 0)
    setattr(envs.envs[1].unwrapped, field, 4)
    replay, obs = Replay(tmp_path / "replay.dat", (100, 9), 100), envs.reset()[0]
    for _ in range(3):
        obs, _ = step_envs(envs, replay, obs, np.zeros((3, 1)))
    with pytest.raises(Diverged, match=f"{name} of environment 1 "):
        step_envs(envs, replay, obs, np.zeros((3, 1)))
    assert np.isfinite(replay.rows).all()


@pytest.mark.parametrize(
    "env_id",
    ["Nonsense-v0", "no_such_module:Env-v0", "CartPole-v1", "Hopper-v99", "FrozenLake-v1"]
    + [f"tiny_envs:{name}-v0" for name in ("Unbounded", "Whole", "Image")],
)
def test_unsuitable_environments_are_refused_in_one_line(env_id):
    with pytest.raises(UsageError, match="--env-id") as caught:
        make_envs(with_env(env_id), 2, 0)
    assert env_id in str(caught.value) and "\n" not in str(caught.value)
