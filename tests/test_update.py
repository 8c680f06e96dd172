"""`update`: its programs, schedule, targets and weighted samples, two devices, a probe problem."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from conftest import POINT
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import simpo_mujoco
from simpo_mujoco import (
    Args,
    best_action,
    init_state,
    noise_std,
    optimisers,
    sample_actions,
    update,
    update_policy,
    weights,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")
ARGS, OBS, ACT = tyro.cli(Args, args=POINT), 3, 1
B, N, H, LIFT = ARGS.batch_size, ARGS.num_samples, ARGS.hidden_dim, 30.0
KEY = jax.random.key(7)
POLICY = "theta", "theta_opt", "log_lam"
fresh_state = jax.jit(init_state, static_argnums=(0, 1, 2))
draw_actions = jax.jit(sample_actions, static_argnums=(0, 3))


def places(count):
    """Shardings of the state and of a batch over so many devices."""
    mesh = Mesh(np.array(jax.devices()[:count]), ("batch",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))


def rows(obs, next_obs, act, reward, terminated):
    """Replay rows [B, 9] of columns that are scalars or [B]; observations are [x, 0, 1]."""
    x, y, *rest = (np.broadcast_to(c, B) for c in (obs, next_obs, act, reward, terminated))
    return np.float32([x, 0 * x, 1 + 0 * x, y, 0 * y, 1 + 0 * y, *rest]).T


def random_rows(seed):
    rng = np.random.default_rng(seed)
    return rows(*rng.normal(size=(2, B)), rng.uniform(-1, 1, B), rng.normal(size=B), seed % 5 == 0)


def step(state, batch, count=1, delay=ARGS.policy_delay):
    """An update of the run's two programs -> state, metrics."""
    whole, split = places(count)
    with_policy = int(state.step) % delay == 0
    batch, state = jax.device_put(batch, split), jax.device_put(state, whole)
    return update(ARGS, with_policy, state, batch, KEY)


@functools.cache
def history(count):
    """States before and after each of 20 updates, their metrics, and the programs compiled."""
    state, before = fresh_state(ARGS, OBS, ACT, jax.random.key(0)), update._cache_size()
    state = state._replace(log_lam=state.log_lam - 6)  # small, so that weights are signed
    states, metrics = [jax.device_get(state)], []
    for i in range(20):
        state, values = step(state, random_rows(i), count)
        states.append(jax.device_get(state))
        metrics.append({name: float(value) for name, value in values.items()})
    return states, metrics, update._cache_size() - before


def moved(a, b):
    return any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def assert_trees_close(a, b, **tolerance):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


# ---- programs, schedule, targets --------------------------------------------------------------


def test_two_programs_and_finite_metrics():
    states, metrics, programs = history(1)
    assert programs == 2  # with the policy and without: nothing else makes jax trace again
    assert [int(state.step) for state in states] == list(range(21))
    assert all(np.isfinite(value) for values in metrics for value in values.values())
    first = metrics[0]
    assert first["lam"] == pytest.approx(float(np.exp(states[1].log_lam)))
    assert 0 < first["w_negative"] < 1 < first["w_max"] and 1 < first["ess"] < N


def test_what_moves_when():
    """Policy, lam and pi_old every policy_delay updates; the slow copies by tau."""
    states, metrics, _ = history(1)
    for i, (old, new) in enumerate(zip(states[:-1], states[1:], strict=True)):
        due = i % ARGS.policy_delay == 0
        assert all(moved(getattr(old, x), getattr(new, x)) == due for x in POLICY), i
        assert ("policy_loss" in metrics[i]) == due
        follow = lambda x, y: (1 - ARGS.tau) * x + ARGS.tau * y  # noqa: E731
        expected = jax.tree.map(follow, old.theta_old, new.theta) if due else old.theta_old
        assert moved(old.theta_old, new.theta_old) == due
        assert_trees_close(new.theta_old, expected, rtol=1e-6, atol=1e-7)
        expected = jax.tree.map(follow, old.critics_target, new.critics)
        assert moved(old.critics, new.critics) and new.critics_opt[0].count == 2 * (i + 1)
        assert_trees_close(new.critics_target, expected, rtol=1e-6, atol=1e-7)


def test_a_batch_split_over_two_devices_changes_nothing():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    (one, metrics_one, _), (two, metrics_two, _) = history(1), history(2)
    placed = jax.device_put(random_rows(0), places(2)[1])
    assert [shard.data.shape[0] for shard in placed.addressable_shards] == [B // 2] * 2
    for a, b in zip(one[:7], two[:7], strict=True):  # later Adam has amplified the rounding
        assert_trees_close(a, b, rtol=2e-3, atol=2e-4)
    for a, b in zip(metrics_one[:6], metrics_two[:6], strict=True):
        assert a == pytest.approx(b, rel=1e-2, abs=1e-4)


def linear_critic(slope, level):
    """A network of value level + slope x action, by the linear part of Mish."""
    first, middle, last = np.zeros((OBS + ACT, H)), np.zeros((H, H)), np.zeros((H, 1))
    first[OBS, 0], middle[0, 0], last[0, 0] = 1, 1, slope
    lift = LIFT * (np.arange(H) == 0)  # where mish(x) = x
    biases = lift, 0 * lift, 0 * lift, [level - LIFT * slope]
    layers = zip((first, middle, middle, last), biases, strict=True)
    return [{"w": np.float32(w), "b": np.float32(b)} for w, b in layers]


def critics_of(*lines):
    return [linear_critic(*line) for line in lines]


def test_critic_target_by_hand():
    """r + gamma (1 - end) Q', Q' the smaller *target* critic at the best of M samples of pi_old,
    best by the smaller *online* critic."""
    state = fresh_state(ARGS, OBS, ACT, jax.random.key(0))

    def next_q(online, target, ended=0.0):
        critics = {"critics": critics_of(*online), "critics_target": critics_of(*target)}
        zero = jax.tree.map(jnp.zeros_like, state.theta)
        copy = jax.tree.map(jnp.copy, state)._replace(theta=zero, step=jnp.int32(1), **critics)
        metrics = step(copy, rows(0.3, 0.3, 0.1, 2.0, ended))[1]
        q, loss = float(metrics["q"]), float(metrics["critic_loss"])
        if not any(slope for slope, _ in target):  # the same target in every row
            errors = [(slope * 0.1 + offset - q) ** 2 for slope, offset in online]
            assert 0.5 * sum(errors) < loss < 0.99 * sum(errors)  # that of the second step
        return (q - 2.0 * ARGS.reward_scale) / ARGS.gamma

    flat, action = [(0, 0), (0, 0)], [(1, 0), (1, 0)]  # the latter reads the chosen action off
    assert next_q(flat, [(0, 7), (0, 5)]) == pytest.approx(5, rel=1e-5)
    assert next_q(flat, [(0, 7), (0, 5)], ended=1.0) == pytest.approx(0, abs=1e-5)
    obs, m = np.float32([[0.3, 0, 1]] * B), ARGS.target_samples
    k_next, _ = jax.random.split(jax.random.fold_in(KEY, 1))
    k_sample, k_noise = jax.random.split(jax.random.fold_in(k_next, 0))
    a0 = np.asarray(draw_actions(ARGS, state.theta_old, obs, m, k_sample))
    assert m == 4 and a0.max() - a0.min() > 0.5
    high, low = a0.max(axis=1).mean(), a0.min(axis=1).mean()
    assert next_q([(1, 0), (1, 9)], action) == pytest.approx(high, abs=1e-4)
    assert next_q([(1, 0), (-1, -9)], action) == pytest.approx(low, abs=1e-4)  # the smaller decides
    state = state._replace(critics=critics_of(*action), step=jnp.int32(60))
    best = best_action(ARGS, state, obs, m, k_next)
    np.testing.assert_array_equal(best, a0.max(axis=1))
    a0 = a0 + noise_std(ARGS, 60) * np.asarray(jax.random.normal(k_noise, a0.shape))
    best = best_action(ARGS, state, obs, m, k_next, noisy=True)  # as actions are taken
    np.testing.assert_allclose(best, a0.max(axis=1), atol=1e-5)
    assert np.max(best) > 1.05  # the noise is not clipped


def test_noise_falls_geometrically_over_the_run():
    std = [float(noise_std(ARGS, step)) for step in (0, 230, 460)]
    np.testing.assert_allclose(std, [0.5, 0.1**0.5, 0.2], rtol=1e-5)
    without = dataclasses.replace(ARGS, noise_start=0.0, noise_end=0.0)
    assert noise_std(without, 0) == noise_std(without, 9) == noise_std(without, 460) == 0


def test_the_policy_is_matched_to_weighted_samples_of_pi_old(monkeypatch):
    """At the batch's states, noisy, weighted by the smaller target critic; the loss is theta's."""
    args, state = ARGS, fresh_state(ARGS, OBS, ACT, jax.random.key(0))
    older = fresh_state(ARGS, OBS, ACT, jax.random.key(1)).theta
    state.theta["net"][-1]["b"] += 0.5
    # the mean of the target critics rises with the action, and the smaller one falls
    state = state._replace(theta_old=older, critics_target=critics_of((3, 0), (-1, -99)))
    obs, seen = random_rows(3)[:, :OBS], []

    def loss_of_theta(theta, args, obs, a0, w, key):  # the real one is tested by itself
        seen.extend([obs, a0, w])
        return jnp.sum(theta["net"][-1]["b"])

    monkeypatch.setattr(simpo_mujoco, "matching_loss", loss_of_theta)
    new, metrics, *rest = jax.jit(lambda x: (*update_policy(args, x, obs, KEY), *seen))(state)
    states, a0, w = map(np.asarray, rest)
    k_sample, k_noise, _ = jax.random.split(KEY, 3)
    plain = np.asarray(draw_actions(ARGS, older, obs, N, k_sample))
    noise = args.noise_start * np.asarray(jax.random.normal(k_noise, plain.shape))
    np.testing.assert_array_equal(states, obs)
    np.testing.assert_allclose(a0, plain + noise, atol=2e-4)
    assert np.abs(a0).max() > 1.05  # the noise is not clipped
    q = -a0[..., 0]
    np.testing.assert_allclose(w, weights(args, q, jnp.float32(1)), atol=1e-3)
    assert float(metrics["policy_loss"]) == 0.5
    assert float(new.theta["net"][-1]["b"][0]) == pytest.approx(0.5 - args.policy_lr, rel=1e-4)
    assert float(metrics["spread"]) == pytest.approx(plain.std(axis=1).mean(), rel=1e-3)
    log_p = np.asarray(jax.nn.log_softmax(q, axis=-1), np.float64)  # lam was 1
    kl = np.mean(np.log(N) + np.sum(np.exp(log_p) * log_p, axis=-1))
    assert float(metrics["kl"]) == pytest.approx(kl, rel=1e-3)
    assert float(new.log_lam) == pytest.approx(-0.05 * (args.eps_kl - kl), rel=1e-3)


@pytest.mark.parametrize("weighting", ["qvpo", "wd1"])
def test_samples_of_equal_value_are_no_divergence(monkeypatch, weighting):
    """All weights of a state are then 0 where their mean is not 1; the metrics stay finite."""
    args = dataclasses.replace(ARGS, weighting=weighting, neg_clip=0.0, sampling_steps=2)
    state = fresh_state(ARGS, OBS, ACT, jax.random.key(0))
    state = state._replace(critics_target=critics_of((0, 1), (0, 1)))
    zero_loss = lambda theta, *_: 0.0 * theta["net"][0]["b"].sum()  # noqa: E731
    monkeypatch.setattr(simpo_mujoco, "matching_loss", zero_loss)
    metrics = jax.jit(lambda state: update_policy(args, state, np.zeros((8, OBS)), KEY)[1])(state)
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert metrics["w_max"] == metrics["ess"] == 0


@pytest.mark.parametrize("total,starts,envs,delay", [(1100, 100, 5, 2), (1003, 101, 5, 3)])
def test_learning_rate_ends_with_the_last_update_of_the_policy(total, starts, envs, delay):
    """From policy_lr to policy_lr_end in a line, also where E and the delay do not divide."""
    flags = {"total_timesteps": total, "learning_starts": starts, "num_envs": envs}
    args = dataclasses.replace(ARGS, **flags, policy_delay=delay)
    updates = len([x for x in range(0, total, envs) if x >= starts][::delay])  # of the policy
    adam, opt, rates = optimisers(args)[0], optimisers(args)[0].init(jnp.ones(())), []
    for _ in range(updates):  # with a gradient of 1 for ever, Adam's step is the rate
        change, opt = adam.update(jnp.ones(()), opt)
        rates.append(-float(change))
    line = np.linspace(args.policy_lr, args.policy_lr_end, updates)
    np.testing.assert_allclose(rates, line, rtol=1e-4)


def test_probe_best_action_of_each_observation():
    """Reward -(a - a*)^2 with a* = +-0.6 by observation: the policy, not only its best sample,
    comes to a*."""

    def draw(rng):
        obs, action = rng.choice([-1.0, 1.0], B), rng.uniform(-1, 1, B)
        return obs, rng.choice([-1.0, 1.0], B), action, -4 * (action - 0.6 * obs) ** 2, 1

    goal, state = np.repeat([-0.6, 0.6], 200), fresh_state(ARGS, OBS, ACT, jax.random.key(0))
    rng = np.random.default_rng(0)
    for _ in range(400):
        state, _ = step(state, rows(*draw(rng)))
    obs = np.float32([[np.sign(x), 0, 1] for x in goal])
    best = np.asarray(best_action(ARGS, state, obs, N, KEY))[:, 0]
    samples = np.asarray(draw_actions(ARGS, state.theta_old, obs, N, KEY))[..., 0]
    assert np.abs(best - goal).mean() < 0.1
    assert np.abs(samples - goal[:, None]).mean() < 0.3
    np.testing.assert_allclose(samples.reshape(2, -1).mean(axis=1), [-0.6, 0.6], atol=0.15)
