"""`update`: recorded values, programs, targets, weighted samples, a probe problem."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from conftest import POINT
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

import simpo_mujoco
from simpo_mujoco import (
    Args,
    Batch,
    add_noise,
    best_action,
    init_state,
    named_leaves,
    policy_optimiser,
    sample_actions,
    update,
    update_critics,
    update_policy,
    weights,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")
ARGS = tyro.cli(Args, args=POINT)
OBS = 3
ACT = 1
B = ARGS.batch_size
N = ARGS.num_samples
H = ARGS.hidden_dim
LIFT = 30.0  # where mish(x) = x
KEY = jax.random.key(7)
DATA = Path(__file__).parent / "data"
fresh_state = jax.jit(init_state, static_argnums=(0, 1, 2))
draw_actions = jax.jit(sample_actions, static_argnums=(0, 3))


def places(count):
    """Shardings of the state and of a batch over so many devices."""
    devices = jax.devices()[:count]
    mesh = Mesh(devices, "batch")
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("batch"))
    return whole, split


def batch_of(x, next_x, act, reward, terminated):
    """A batch of scalars or [B]; an observation is [x, 0, 1]."""
    zero = np.zeros(B, np.float32)
    x = zero + np.float32(x)
    next_x = zero + np.float32(next_x)
    act = zero + np.float32(act)
    return Batch(
        obs=np.stack([x, zero, zero + 1], axis=1),
        next_obs=np.stack([next_x, zero, zero + 1], axis=1),
        act=act[:, None],
        reward=zero + np.float32(reward),
        terminated=zero + np.float32(terminated),
    )


def start(seed=0):
    """A state for ARGS."""
    return fresh_state(ARGS, OBS, ACT, jax.random.key(seed))


def random_batch(seed):
    rng = np.random.default_rng(seed)
    x, next_x, reward = rng.normal(size=(3, B))
    act = rng.uniform(-1, 1, B)
    return batch_of(x, next_x, act, reward, seed % 5 == 0)


def step(state, batch, count=1):
    """An update of the run's two programs -> state, metrics."""
    whole, split = places(count)
    with_policy = int(state.step) % ARGS.policy_delay == 0
    batch = jax.device_put(batch, split)
    state = jax.device_put(state, whole)
    return update(ARGS, with_policy, state, batch, KEY)


@functools.cache
def history(count):
    """States before and after each of 20 updates, metrics, programs compiled."""
    state = start()
    state = state._replace(log_lam=state.log_lam - 6)  # so that weights are signed
    before = update._cache_size()
    states = [jax.device_get(state)]
    metrics = []
    for i in range(20):
        state, values = step(state, random_batch(i), count)
        states.append(jax.device_get(state))
        metrics.append(jax.tree.map(float, values))
    return states, metrics, update._cache_size() - before


def moved(a, b):
    equal = jax.tree.map(np.array_equal, a, b)
    return not jax.tree.all(equal)


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(functools.partial(assert_allclose, **tolerance), a, b)


# ---- recorded values -----------------------------------------------------------------

# data/update_*.npz holds what the code of commit 923a669 computed: `init_state` from
# key 3, four updates of the batches in the file from log_lam = -4 with key 7, and then
# the actions at the first observations with that key at step 9, without and with noise;
# every second update is with the policy. That code did not clip noisy samples.
RECORDED = {
    "linear": {
        "neg_clip": -0.05,
        "num_samples": 4,
        "sampler": "dpm2",
        "act_samples": 4,
    },
    "exp": {
        "weighting": "exp",
        "num_samples": 8,
        "sampler": "ddpm",
        "act_samples": 8,
        "target_samples": 2,
    },
}


def add_noise_without_clip(args, a0, step, key):
    share = step * args.num_envs / (args.total_timesteps - args.learning_starts)
    std = args.noise_start ** (1 - share) * args.noise_end**share
    return a0 + std * jax.random.normal(key, a0.shape)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_updates_and_actions(monkeypatch, name):
    monkeypatch.setattr(simpo_mujoco, "add_noise", add_noise_without_clip)
    flags = {"env_id": "x", "hidden_dim": 12, "neg_clip": 0.0}
    noise = {"noise_start": 0.5, "noise_end": 0.2}
    args = dataclasses.replace(ARGS, **flags, **noise)
    args = dataclasses.replace(args, **RECORDED[name])
    with np.load(DATA / f"update_{name}.npz") as file:
        recorded = dict(file)
    state = fresh_state(args, 5, 2, jax.random.key(3))
    for leaf, value in named_leaves(state).items():
        if leaf.startswith((".theta[", ".critics[")):
            assert_allclose(value, recorded[f"init{leaf}"], rtol=1e-5)
    assert not moved(state.theta, state.theta_old)
    assert not moved(state.critics, state.critics_target)

    state = state._replace(log_lam=jnp.float32(-4))
    for i in range(4):
        batch = Batch(*(recorded[field][i] for field in Batch._fields))
        with_policy = i % 2 == 0
        state, metrics = update(args, with_policy, state, batch, KEY)
        for metric, value in metrics.items():
            expected = recorded[f"metric.{metric}"][i]
            assert_allclose(value, expected, rtol=2e-4, err_msg=metric)
        assert len(metrics) == (10 if with_policy else 3)
    for leaf, value in named_leaves(state).items():
        if "opt" not in leaf:
            expected = recorded[f"end{leaf}"]
            assert_allclose(value, expected, atol=1e-4, err_msg=leaf)

    obs = recorded["obs"][0]
    action = best_action(args, state, obs, args.act_samples, KEY, 9)
    assert_allclose(action, recorded["best_action"], atol=1e-3)
    action = best_action(args, state, obs, args.act_samples, KEY, 9, True)
    assert_allclose(action, recorded["noisy_action"], atol=1e-3)


# ---- programs, schedule, targets -----------------------------------------------------


def test_two_programs_and_finite_metrics():
    states, metrics, programs = history(1)
    assert programs == 2  # with the policy and without
    assert [int(state.step) for state in states] == list(range(21))
    for values in metrics:
        assert np.isfinite(list(values.values())).all(), values
    first = metrics[0]
    assert_allclose(first["lam"], np.exp(states[1].log_lam), rtol=1e-6)
    assert 0 < first["w_negative"] < 1
    assert 1 < first["ess"] < N


def test_what_moves_when():
    """Policy, lam and pi_old every policy_delay updates; the slow copies by tau."""
    states, metrics, _ = history(1)

    def follow(slow, fast):
        return (1 - ARGS.tau) * slow + ARGS.tau * fast

    for i in range(20):
        old = states[i]
        new = states[i + 1]
        due = i % ARGS.policy_delay == 0
        assert moved(old.theta, new.theta) == due, i
        assert moved(old.theta_opt, new.theta_opt) == due, i
        assert moved(old.theta_old, new.theta_old) == due, i
        assert moved(old.log_lam, new.log_lam) == due, i
        assert ("policy_loss" in metrics[i]) == due, i
        if due:
            expected = jax.tree.map(follow, old.theta_old, new.theta)
            assert_trees_close(new.theta_old, expected, rtol=1e-6, atol=1e-7)
        assert moved(old.critics, new.critics)
        assert new.critics_opt[0].count == 2 * (i + 1)
        expected = jax.tree.map(follow, old.critics_target, new.critics)
        assert_trees_close(new.critics_target, expected, rtol=1e-6, atol=1e-7)


def test_a_batch_split_over_two_devices_changes_nothing():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    _, split = places(2)
    placed = jax.device_put(random_batch(0).obs, split)
    for shard in placed.addressable_shards:
        assert len(shard.data) == B // 2
    states_one, metrics_one, _ = history(1)
    states_two, metrics_two, _ = history(2)
    for i in range(6):  # later Adam has amplified the rounding
        assert_trees_close(metrics_one[i], metrics_two[i], rtol=1e-2, atol=1e-4)
        after_one = states_one[i + 1]
        after_two = states_two[i + 1]
        assert_trees_close(after_one, after_two, rtol=2e-3, atol=2e-4)


def linear_critic(slope, level):
    """A network of value level + slope x action, by the linear part of Mish."""
    first = np.zeros((OBS + ACT, H))
    middle = np.zeros((H, H))
    last = np.zeros((H, 1))
    first[OBS, 0] = 1
    middle[0, 0] = 1
    last[0, 0] = slope
    lift = LIFT * (np.arange(H) == 0)
    zero = np.zeros(H)
    layers = [
        {"w": first, "b": lift},
        {"w": middle, "b": zero},
        {"w": middle, "b": zero},
        {"w": last, "b": np.array([level - LIFT * slope])},
    ]
    return jax.tree.map(np.float32, layers)


def critics_of(*lines):
    return [linear_critic(*line) for line in lines]


FLAT = critics_of((0, 0), (0, 0))
ACTION = critics_of((1, 0), (1, 0))  # reads the action off


@pytest.fixture
def fixed_samples(monkeypatch):
    """`sample_actions` gives the same four actions, other ones for each state."""
    rng = np.random.default_rng(8)
    a0 = np.float32(rng.uniform(-1, 1, (B, 4, ACT)))
    monkeypatch.setattr(simpo_mujoco, "sample_actions", lambda *_: jnp.asarray(a0))
    return a0


# programs compiled with other samples, noise or loss are not those of ARGS
OTHER = dataclasses.replace(ARGS, seed=99)


@functools.partial(jax.jit, static_argnums=0)
def critics_after(args, state, batch):
    return update_critics(args, state, batch, KEY)


def next_q(online, target, ended=0.0):
    """The target's Q', from the metric of the mean target."""
    state = start()
    state = state._replace(critics=online, critics_target=target)
    batch = batch_of(0.3, 0.3, 0.1, 2.0, ended)
    _, metrics = critics_after(OTHER, state, batch)
    return (float(metrics["q"]) - 2.0 * ARGS.reward_scale) / ARGS.gamma


def test_critic_target_by_hand(fixed_samples):
    """r + gamma (1 - end) Q', with Q' of the smaller target critic at the best of M
    samples of pi_old, the best by the smaller online critic."""
    assert ARGS.target_samples == 4
    levels = critics_of((0, 7), (0, 5))
    assert next_q(FLAT, levels) == pytest.approx(5, rel=1e-5)
    assert next_q(FLAT, levels, ended=1.0) == pytest.approx(0, abs=1e-5)
    high = fixed_samples.max(axis=1).mean()
    low = fixed_samples.min(axis=1).mean()
    rising = critics_of((1, 0), (1, 9))
    mixed = critics_of((1, 0), (-1, -9))  # the smaller one decides
    assert next_q(rising, ACTION) == pytest.approx(high, abs=1e-4)
    assert next_q(mixed, ACTION) == pytest.approx(low, abs=1e-4)


def test_critic_loss_is_that_of_the_second_step(fixed_samples):
    state = start()
    levels = critics_of((0, 5), (0, 5))  # the same target in every row
    state = state._replace(critics=ACTION, critics_target=levels)
    batch = batch_of(0.3, 0.3, 0.1, 2.0, 0.0)
    _, metrics = critics_after(OTHER, state, batch)
    target = 2.0 * ARGS.reward_scale + ARGS.gamma * 5
    first_loss = 2 * (0.1 - target) ** 2  # of both critics
    assert 0.5 * first_loss < float(metrics["critic_loss"]) < 0.99 * first_loss


def test_best_action_is_the_best_sample_by_the_smaller_critic():
    state = start()
    obs = random_batch(2).obs
    one = dataclasses.replace(OTHER, sampling_steps=2)
    best = {}
    for slope in (1, -1):
        critics = critics_of((slope, 0), (slope, 9))
        state = state._replace(critics=critics)
        action = best_action(one, state, obs, 8, KEY, 3)
        best[slope] = np.asarray(action)
    assert (best[1] > best[-1]).all()
    again = best_action(one, state, obs, 8, KEY, 3)
    later = best_action(one, state, obs, 8, KEY, 4)
    assert_array_equal(again, best[-1])
    assert (np.asarray(later) != best[-1]).any()  # a step has its own samples


def test_noise_on_actions(fixed_samples):
    """The best of noisy samples: by the moments of the maximum."""
    state = start()._replace(critics=ACTION)
    obs = random_batch(2).obs
    best = best_action(OTHER, state, obs, 4, KEY, 0)
    assert_array_equal(best, fixed_samples.max(axis=1))
    draws = []
    for i in range(60):
        draws.append(best_action(OTHER, state, obs, 4, KEY, i, True))
    draws = np.stack(draws)  # [60, B, 1]
    std = OTHER.noise_start
    rng = np.random.default_rng(0)
    noise = std * rng.normal(size=(20_000, 1, 4, ACT))
    noisy = np.clip(fixed_samples[:4] + noise, -1, 1)
    expected = noisy.max(axis=2)  # [20_000, 4, 1]
    mean = draws[:, :4].mean(axis=0)
    assert_allclose(mean, expected.mean(axis=0), atol=4 * std / np.sqrt(60))
    assert draws.max() == 1


def test_noise_falls_geometrically_over_the_run_and_is_clipped():
    a0 = jnp.zeros((20_000, 1))
    expected = {0: 0.3, 230: np.sqrt(0.3 * 0.1), 460: 0.1}
    for updates, std in expected.items():
        noisy = add_noise(ARGS, a0, jnp.int32(updates), KEY)
        assert float(noisy.std()) == pytest.approx(std, rel=0.02)
        assert abs(noisy.mean()) < 4 * std / np.sqrt(a0.size)
    assert (
        add_noise(ARGS, a0 + 1, 0, KEY).max(),
        add_noise(ARGS, a0 - 1, 0, KEY).min(),
    ) == (1, -1)
    without = dataclasses.replace(ARGS, noise_start=0.0, noise_end=0.0)
    for updates in (0, 9, 460):
        assert_array_equal(add_noise(without, a0, updates, KEY), a0)


# ---- the policy ----------------------------------------------------------------------


def policy_update(monkeypatch, args, state, obs):
    """update_policy with a loss that is the last bias -> state, metrics, and what the
    loss was asked with: obs, a0, w."""

    def loss_of_theta(theta, args, obs, a0, w, key):  # the real one is tested by itself
        asked.extend([obs, a0, w])
        return jnp.sum(theta["net"][-1]["b"])

    asked = []
    monkeypatch.setattr(simpo_mujoco, "matching_loss", loss_of_theta)

    def run(state):
        new, metrics = update_policy(args, state, obs, KEY)
        return new, metrics, asked

    return jax.jit(run)(state)


def test_the_policy_is_matched_to_weighted_samples(monkeypatch, fixed_samples):
    """At the batch's states, noisy, weighted by the smaller target critic."""
    state = start()
    state.theta["net"][-1]["b"] += 0.5
    # the mean of the target critics rises with the action, the smaller one falls
    critics = critics_of((3, 0), (-1, -99))
    state = state._replace(critics_target=critics)
    obs = random_batch(3).obs
    new, metrics, asked = policy_update(monkeypatch, ARGS, state, obs)
    states, a0, w = map(np.asarray, asked)

    assert_array_equal(states, obs)
    noise = a0 - fixed_samples
    inside = np.abs(a0) < 1
    assert 0.7 < inside.mean() < 1
    assert np.abs(a0).max() == 1  # noisy samples are clipped
    central = np.abs(fixed_samples) < 0.2  # where that is rare
    assert noise[central].std() == pytest.approx(ARGS.noise_start, rel=0.2)
    assert len(np.unique(noise[inside])) == inside.sum()

    q = -a0[..., 0]
    assert_allclose(w, weights(ARGS, q, jnp.float32(1)), atol=1e-3)
    spread = fixed_samples.std(axis=1).mean()  # without the noise
    assert float(metrics["spread"]) == pytest.approx(spread, rel=1e-3)
    assert float(metrics["policy_loss"]) == 0.5
    bias = float(new.theta["net"][-1]["b"][0])
    assert bias == pytest.approx(0.5 - ARGS.policy_lr, rel=1e-4)

    log_p = np.float64(jax.nn.log_softmax(q, axis=-1))  # lam was 1
    entropy = -np.sum(np.exp(log_p) * log_p, axis=-1)
    kl = np.mean(np.log(N) - entropy)
    assert float(metrics["kl"]) == pytest.approx(kl, rel=1e-3)
    expected = -0.05 * (ARGS.kl_bound - kl)
    assert float(new.log_lam) == pytest.approx(expected, rel=1e-3)


def test_the_samples_come_from_pi_old(monkeypatch):
    """Where theta is, or what it is, does not matter to them."""
    old = start()
    other = start(1)
    obs = random_batch(3).obs
    _, _, asked = policy_update(monkeypatch, ARGS, old, obs)
    moved_theta = old._replace(theta=other.theta)
    moved_old = old._replace(theta_old=other.theta)
    _, _, same = policy_update(monkeypatch, ARGS, moved_theta, obs)
    _, _, changed = policy_update(monkeypatch, ARGS, moved_old, obs)
    assert_array_equal(asked[1], same[1])
    assert np.abs(asked[1] - changed[1]).max() > 0.1


@pytest.mark.parametrize("weighting", ["qvpo", "wd1"])
def test_samples_of_equal_value_are_no_divergence(monkeypatch, weighting):
    """All weights of a state are 0, so that their mean is not 1; metrics are finite."""
    args = dataclasses.replace(ARGS, weighting=weighting, neg_clip=0.0)
    state = start()
    state = state._replace(critics_target=critics_of((0, 1), (0, 1)))
    obs = np.zeros((8, OBS), np.float32)
    _, metrics, _ = policy_update(monkeypatch, args, state, obs)
    assert np.isfinite(list(metrics.values())).all(), metrics
    assert metrics["ess"] == 0


@pytest.mark.parametrize(
    "total,starts,envs,delay",
    [(1100, 100, 5, 2), (1003, 101, 5, 3)],
)
def test_learning_rate_falls_in_a_line_over_the_updates(total, starts, envs, delay):
    """Also where the number of environments and the delay do not divide them."""
    args = dataclasses.replace(
        ARGS,
        total_timesteps=total,
        learning_starts=starts,
        num_envs=envs,
        policy_delay=delay,
    )
    learning = [x for x in range(0, total, envs) if x >= starts]
    updates = len(learning[::delay])  # of the policy
    adam = policy_optimiser(args)
    opt = adam.init(jnp.ones(()))
    rates = []
    for _ in range(updates):  # with a gradient of 1 for ever, Adam's step is the rate
        change, opt = adam.update(jnp.ones(()), opt)
        rates.append(-float(change))
    steps = np.diff(rates)
    assert rates[0] == pytest.approx(args.policy_lr, rel=1e-5)
    assert_allclose(steps, steps[0], rtol=1e-2)
    assert steps[0] < 0
    assert -1e-9 < rates[-1] - args.policy_lr_end < -1.01 * steps[0]


def test_probe_best_action_of_each_observation():
    """Reward -(a - a*)^2 with a* = +-0.6 by observation: the policy, not only its best
    sample, comes to a*."""
    rng = np.random.default_rng(0)
    state = start()
    for _ in range(400):
        x, next_x = rng.choice([-1.0, 1.0], (2, B))
        action = rng.uniform(-1, 1, B)
        reward = -4 * (action - 0.6 * x) ** 2
        state, _ = step(state, batch_of(x, next_x, action, reward, 1))
    x = np.repeat([-1.0, 1.0], 200)
    goal = 0.6 * x
    columns = [x, 0 * x, 0 * x + 1]
    obs = np.float32(np.stack(columns, axis=1))
    best = best_action(ARGS, state, obs, N, KEY)
    assert np.abs(best[:, 0] - goal).mean() < 0.1
    samples = np.asarray(draw_actions(ARGS, state.theta_old, obs, N, KEY))
    assert np.abs(samples[..., 0] - goal[:, None]).mean() < 0.3
    means = samples.reshape(2, -1).mean(axis=1)
    assert_allclose(means, [-0.6, 0.6], atol=0.15)
