"""`update`: compiled once, its schedule and targets, sharding, and probe problems it must solve."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from simpo_mujoco import (
    POLICY_METRICS,
    Args,
    act,
    act_seeds,
    init_state,
    noise_std,
    optimisers,
    q_values,
    sample_actions,
    shardings,
    stack_seeds,
    take_seed,
    update,
    update_policy,
    update_seeds,
)

OBS, ACT = 3, 2
TINY = Args(
    num_samples=4,
    sampling_steps=3,
    eps_kl=0.5,
    hidden_dim=16,
    batch_size=32,
    learning_starts=100,
    total_timesteps=200,  # 20 updates of 5 environments
    policy_delay=3,
    noise_steps=40,
    tau=0.1,
    neg_clip=-0.05,
    num_devices=1,
)


def places(args):
    """Sharding of whole arrays, and of a single seed's batch [B, .]."""
    states, batches = shardings(args)
    return states.step, NamedSharding(batches.mesh, PartitionSpec("devices"))


def fresh(args, obs_dim=OBS, act_dim=ACT):
    """State and key on the devices of `args`, as the script sets them up, and a batch's place."""
    whole, split = places(args)
    keys = jax.random.split(jax.random.key(args.seed), 2)
    make = jax.jit(init_state, static_argnums=(0, 1, 2))
    state, key = jax.device_put((make(args, obs_dim, act_dim, keys[0]), keys[1]), whole)
    return state, key, split


def random_rows(seed, b=32):
    """Rows [obs | next_obs | act | reward | terminated] of a replay."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(b, 2 * OBS + ACT + 2))
    rows[:, 2 * OBS : 2 * OBS + ACT] = rng.uniform(-1, 1, (b, ACT))
    rows[:, -1] = rng.random(b) < 0.2
    return rows.astype(np.float32)


@functools.cache
def history(num_devices=1):
    """States before and after each of 9 updates (as numpy), their metrics, and how many programs
    were compiled for the updates and for as many actions."""
    args = dataclasses.replace(TINY, num_devices=num_devices)
    state, key, split = fresh(args)
    state = state._replace(log_lam=state.log_lam - 8)  # small, so that weights are signed
    before = update._cache_size(), act._cache_size()
    states, metrics = [jax.device_get(state)], []
    for step in range(9):
        act(args, True, state, np.full((5, OBS), step, np.float32), key, np.int32(step))
        state, values = update(args, state, jax.device_put(random_rows(step), split), key)
        states.append(jax.device_get(state))
        metrics.append({name: float(value) for name, value in values.items()})
    return states, metrics, (update._cache_size() - before[0], act._cache_size() - before[1])


def moved(a, b):
    return any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def assert_trees_close(a, b, **tolerance):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


# ---- one program, its schedule and targets ----------------------------------------------------


def test_update_and_act_compile_once():
    """No step, value or state of the run makes jax trace again, on one device or two."""
    assert history(1)[2] == (1, 1)
    assert history(2)[2] == (1, 1)


def test_metrics_are_finite_and_the_state_keeps_its_form():
    states, metrics, _ = history()
    for values in metrics:
        assert all(np.isfinite(value) for value in values.values()), values
    assert set(POLICY_METRICS) < set(metrics[0])
    shape = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)  # noqa: E731
    assert shape(states[0]) == shape(states[-1])
    assert [int(state.step) for state in states] == list(range(10))
    first = metrics[0]
    assert first["lam"] == pytest.approx(float(np.exp(states[1].log_lam)))
    assert 0 < first["w_negative"] < 1 and first["w_max"] > 1 and 1 < first["ess"] < 4


@pytest.mark.parametrize("weighting", ["qvpo", "wd1"])
def test_samples_of_equal_value_are_no_divergence(weighting):
    """All weights of a state are then 0 where their mean is not 1; the metrics stay finite."""
    args = dataclasses.replace(TINY, weighting=weighting, neg_clip=0.0)
    state, key, _ = fresh(args)
    flat = [[*net[:-1], jax.tree.map(jnp.zeros_like, net[-1])] for net in state.critics]
    a0 = jnp.full((8, 4, ACT), 0.5)
    _, metrics = update_policy(args, state._replace(critics=flat), jnp.zeros((8, OBS)), a0, key)
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert metrics["w_max"] == metrics["ess"] == 0


def test_policy_and_lam_move_on_every_policy_delay():
    states, metrics, _ = history()
    for step, (old, new) in enumerate(zip(states[:-1], states[1:], strict=True)):
        due = step % TINY.policy_delay == 0
        assert moved(old.critics, new.critics)
        for name in ("theta", "theta_opt", "log_lam"):
            assert moved(getattr(old, name), getattr(new, name)) == due, (step, name)
        assert any(metrics[step][name] for name in POLICY_METRICS) == due


def test_targets_follow_the_new_networks_by_tau():
    states, _, _ = history()
    follow = lambda rate: lambda old, new: (1 - rate) * old + rate * new  # noqa: E731
    for old, new in zip(states[:-1], states[1:], strict=True):
        expected = jax.tree.map(follow(TINY.tau), old.critics_target, new.critics)
        assert_trees_close(new.critics_target, expected, rtol=1e-6, atol=1e-7)
    assert moved(states[-1].critics, states[-1].critics_target)


def linear_critic(slope, level):
    """A network whose value is level + slope x the first action, by the linear part of Mish."""
    h = TINY.hidden_dim
    unit = lambda rows, columns: np.zeros((rows, columns), np.float32)  # noqa: E731
    first, middle, last = unit(OBS + ACT, h), unit(h, h), unit(h, 1)
    first[OBS, 0], middle[0, 0], last[0, 0] = 1, 1, slope
    lift = np.zeros(h, np.float32)
    lift[0] = 30  # where mish(x) = x
    biases = lift, 0 * lift, 0 * lift, np.float32([level - 30 * slope])
    weights = first, middle, middle, last
    return [{"w": w, "b": b} for w, b in zip(weights, biases, strict=True)]


def test_critic_target_by_hand():
    """r + gamma (1 - end) Q', with Q' the smaller *target* critic at the best of N samples, best
    by the smaller *online* critic."""

    def q_target(online, target, ended=0.0):
        state, key, split = fresh(TINY)
        state = state._replace(
            critics=[linear_critic(*x) for x in online],
            critics_target=[linear_critic(*x) for x in target],
        )
        rows = random_rows(1)
        rows[:, -2:] = 2.0, ended
        state = jax.device_put(state, places(TINY)[0])
        return float(update(TINY, state, jax.device_put(rows, split), key)[1]["q_target"])

    reward, flat = 2.0 * TINY.reward_scale, [(0, 0), (0, 0)]
    assert q_target(flat, [(0, 7), (0, 5)]) == pytest.approx(reward + TINY.gamma * 5, rel=1e-5)
    assert q_target(flat, [(0, 7), (0, 5)], ended=1.0) == pytest.approx(reward, rel=1e-5)
    action = [(1, 0), (1, 0)]  # the target critics read the chosen action off
    high, low, mixed = (
        (q_target(online, action) - reward) / TINY.gamma
        for online in ([(1, 0), (1, 9)], [(-1, 0), (-1, 9)], [(1, 0), (-1, -9)])
    )
    assert high > 0.2 and low < -0.2  # of four samples, the largest and the smallest
    assert mixed == pytest.approx(low, abs=1e-3)  # the smaller critic decides


@pytest.mark.parametrize("total,starts,envs,delay", [(1100, 100, 5, 2), (103, 100, 1, 1)])
def test_learning_rate_ends_with_the_budget(total, starts, envs, delay):
    """The policy's rate goes from policy_lr to policy_lr_end in a line over all its updates."""
    args = dataclasses.replace(
        TINY, total_timesteps=total, learning_starts=starts, num_envs=envs, policy_delay=delay
    )
    updates = (total - starts) // envs
    assert args.num_updates == updates
    adam, _ = optimisers(args)

    def step(opt, _):  # with a gradient of 1 for ever, Adam's step is the rate
        change, opt = adam.update(jnp.ones(()), opt)
        return opt, -change

    _, rates = jax.lax.scan(step, adam.init(jnp.ones(())), length=updates // delay + 1)
    expected = np.linspace(args.policy_lr, args.policy_lr_end, updates // delay + 1)
    np.testing.assert_allclose(rates, expected, rtol=1e-4)


def test_noise_falls_in_a_line_and_stays():
    """From noise_start to noise_end over noise_steps environment steps, whatever the budget."""
    args = dataclasses.replace(TINY, noise_start=0.5, noise_end=0.1, noise_steps=1000)
    for update_number, std in ((0, 0.5), (50, 0.4), (100, 0.3), (200, 0.1), (5000, 0.1)):
        assert float(noise_std(args, update_number)) == pytest.approx(std, rel=1e-5)
    metrics = history()[1]
    falls = TINY.noise_start - (TINY.noise_start - TINY.noise_end) * np.arange(9) * 5 / 40
    expected = np.maximum(falls, TINY.noise_end)
    np.testing.assert_allclose([m["noise"] for m in metrics], expected, rtol=1e-5)


def test_sharding_over_two_devices_changes_nothing():
    """The batch split over two devices gives the states of one, but for the order of sums."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    (one, metrics_one, _), (two, metrics_two, _) = history(1), history(2)
    whole, split = places(dataclasses.replace(TINY, num_devices=2))
    assert len(whole.device_set) == 2
    placed = jax.device_put(random_rows(0), split)
    assert [shard.data.shape[0] for shard in placed.addressable_shards] == [16, 16]
    for a, b in zip(one, two, strict=True):
        assert_trees_close(a, b, rtol=1e-3, atol=2e-5)
    for a, b in zip(metrics_one, metrics_two, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("num_seeds,num_devices", [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_seeds_side_by_side_are_those_alone(num_seeds, num_devices):
    """`update_seeds` and `act_seeds` compile once and give each seed's own states and actions, with
    whole seeds on a device (2 on 2) and with every batch split (3 on 2)."""
    if len(jax.devices()) < num_devices:
        pytest.skip("needs two devices")
    args = dataclasses.replace(TINY, num_seeds=num_seeds, num_devices=num_devices)
    state_place, batches = shardings(args)
    alone = [fresh(dataclasses.replace(TINY, seed=seed)) for seed in range(num_seeds)]
    keys = jax.device_put(jnp.stack([key for _, key, _ in alone]), state_place.step)
    states = [state for state, *_ in alone]
    state = jax.device_put(stack_seeds(states), state_place)
    sizes = update_seeds._cache_size(), act_seeds._cache_size()
    for step in range(5):
        rows = np.stack([random_rows(10 * step + k) for k in range(num_seeds)])
        obs = np.full((num_seeds, 5, OBS), 0.1 * step, np.float32)
        actions = act_seeds(args, state, obs, keys, np.int32(step))
        placed = jax.device_put(rows, batches)
        axis = 0 if num_seeds % num_devices == 0 and num_seeds > 1 else 1
        part = placed.addressable_shards[0].data.shape[axis]
        assert part * num_devices == rows.shape[axis]
        state, metrics = update_seeds(args, state, placed, keys)
        for k, (_, key, split) in enumerate(alone):
            one = act(TINY, True, states[k], obs[k], key, np.int32(step))
            np.testing.assert_allclose(actions[k], one, atol=2e-4)
            states[k], values = update(TINY, states[k], jax.device_put(rows[k], split), key)
            ours = {name: float(x[k]) for name, x in metrics.items()}
            theirs = {name: float(x) for name, x in values.items()}
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    for k in range(num_seeds):
        assert_trees_close(take_seed(state, k), states[k], rtol=1e-3, atol=5e-5)
    if num_seeds > 1:
        assert moved(take_seed(state, 0).theta, take_seed(state, 1).theta)
    assert (update_seeds._cache_size() - sizes[0], act_seeds._cache_size() - sizes[1]) == (1, 1)


# ---- probe problems ---------------------------------------------------------------------------

PROBE = Args(
    num_samples=8,
    diffusion_steps=4,
    sampling_steps=4,
    eps_kl=1.0,
    hidden_dim=24,
    batch_size=64,
    learning_starts=100,
    total_timesteps=100 + 5 * 600,
    noise_steps=5 * 600,
    gamma=0.5,
    tau=0.05,
    critic_lr=3e-3,
    policy_lr=3e-3,
    policy_lr_end=1e-3,
    reward_scale=0.5,
    num_devices=1,
    neg_clip=-0.05,
)


def solve(draw, steps=600):
    """The state after `steps` updates on batches of draw(rng, B) -> obs, next_obs, act, r, end."""
    state, key, split = fresh(PROBE, 1, 1)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        columns = draw(rng, PROBE.batch_size)
        rows = np.stack([np.broadcast_to(x, PROBE.batch_size) for x in columns], axis=1)
        state, _ = update(PROBE, state, jax.device_put(rows.astype(np.float32), split), key)
    return state


def values_at(state, obs):
    """Both critics at observations [K], averaged over actions -> [2, K]."""
    actions = np.linspace(-0.9, 0.9, 9, dtype=np.float32)
    actions = np.broadcast_to(actions[None, :, None], (len(obs), 9, 1))
    return np.asarray(q_values(state.critics, np.float32(obs)[:, None], actions)).mean(axis=-1)


def test_probe_value_one():
    """One step, reward 1, end: the value is 1 in scaled reward."""
    state = solve(lambda rng, b: (0, 0, rng.uniform(-1, 1, b), 1, 1), steps=300)
    np.testing.assert_allclose(values_at(state, [0.0]), 0.5, atol=0.02)


def test_probe_value_of_the_observation():
    """One step, reward = observation."""

    def draw(rng, b):
        obs = rng.choice([-1.0, 1.0], b)
        return obs, 0, rng.uniform(-1, 1, b), obs, 1

    state = solve(draw, steps=300)
    np.testing.assert_allclose(values_at(state, [-1.0, 1.0]), [[-0.5, 0.5]] * 2, atol=0.03)


def test_probe_discount_and_bootstrapping():
    """0 -> 1 -> end with reward 1 at the end: gamma, then 1. And 2 -> 2 for ever with reward 1,
    never terminated, as a truncated episode is: 1 / (1 - gamma)."""

    def draw(rng, b):
        obs = rng.integers(3, size=b)
        next_obs = np.array([1, 0, 2])[obs]
        return obs, next_obs, rng.uniform(-1, 1, b), obs > 0, obs == 1

    values = values_at(solve(draw), [0.0, 1.0, 2.0])
    np.testing.assert_allclose(values, [[0.25, 0.5, 1.0]] * 2, atol=0.05)


def test_probe_best_action_of_each_observation():
    """Reward -(a - a*)^2 with a* = +-0.6 by observation: the policy, not only its best sample,
    comes to a*."""

    def draw(rng, b):
        obs, action = rng.choice([-1.0, 1.0], (2, b))
        action = rng.uniform(-1, 1, b)
        return obs, rng.choice([-1.0, 1.0], b), action, -4 * (action - 0.6 * obs) ** 2, 1

    obs = np.float32([[-1.0]] * 200 + [[1.0]] * 200)
    goal = np.repeat([-0.6, 0.6], 200)
    draw_actions = jax.jit(sample_actions, static_argnums=0)

    def policy(state):
        best = act(PROBE, False, state, obs, jax.random.key(1), np.int32(0))
        samples = draw_actions(PROBE, state.theta, obs, jax.random.key(2))
        return np.asarray(best)[:, 0], np.asarray(samples)[..., 0]

    best, samples = policy(solve(draw))
    np.testing.assert_allclose(best.reshape(2, 200).mean(axis=1), [-0.6, 0.6], atol=0.1)
    np.testing.assert_allclose(samples.reshape(2, -1).mean(axis=1), [-0.6, 0.6], atol=0.15)
    assert np.abs(best - goal).mean() < 0.1 < np.abs(policy(fresh(PROBE, 1, 1)[0])[0] - goal).mean()
    assert np.abs(samples - goal[:, None]).mean() < 0.3


def test_exploration_adds_the_noise_of_the_schedule():
    """act(explore=True) is the best sample plus noise_std, clipped; without it there is none."""
    state, key, _ = fresh(PROBE, 1, 1)
    obs = np.zeros((4000, 1), np.float32)
    quiet, again, noisy, other = (
        np.asarray(act(PROBE, explore, state, obs, key, np.int32(step)))
        for explore, step in ((False, 3), (False, 3), (True, 3), (True, 4))
    )
    np.testing.assert_array_equal(quiet, again)
    assert np.abs(noisy - other).max() > 0.1 and max(np.abs(noisy).max(), np.abs(quiet).max()) <= 1
    inside = np.abs(quiet) < 0.2  # where clipping hardly matters
    assert inside.sum() > 50
    assert (noisy - quiet)[inside].std() == pytest.approx(PROBE.noise_start, rel=0.15)
