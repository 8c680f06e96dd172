"""Networks, schedule, sampler and matching loss against formulas written again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import simpo_mujoco
from simpo_mujoco import (
    Args,
    forward,
    init_mlp,
    init_state,
    matching_loss,
    mish,
    policy_velocity,
    q_values,
    sample_actions,
    sampler_levels,
    schedule,
    to_a0,
    to_velocity,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")
T = 3
BOUND = 5.0
ARGS = Args(
    num_samples=4,
    diffusion_steps=T,
    sampling_steps=T,
    sampler="ddpm",
    hidden_dim=16,
    error_bound=BOUND,
)


def naive_mish(x):
    x = np.asarray(x, np.float64)
    return x * np.tanh(np.logaddexp(0, x))


def naive_mlp(layers, x):
    """Mish between layers, in float64, on inputs joined beforehand."""
    *hidden, last = jax.tree.map(np.float64, layers)
    for layer in hidden:
        x = naive_mish(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def join(*parts):
    return np.concatenate(parts, axis=-1)


def each_sample(obs, a0):
    """obs [B, o], a0 [B, N, d] -> [B, N, o]."""
    _, n, _ = a0.shape
    return np.repeat(obs[:, None], n, axis=1)


def naive_velocity(theta, obs, a_t, t):
    """The network at [obs | a_t | embedding of t + 1], each row by itself."""
    frequency = 10_000.0 ** -np.linspace(0, 1, 8)
    t = np.broadcast_to(t, a_t.shape[:-1])[..., None]
    phase = (t + 1.0) * frequency
    time = naive_mlp(theta["time"], join(np.sin(phase), np.cos(phase)))
    return naive_mlp(theta["net"], join(each_sample(obs, a_t), a_t, time))


@functools.cache
def tiny_state():
    """Networks for 5 observations and 2 actions, with random biases as well: zeros
    would hide a fault."""
    make = jax.jit(init_state, static_argnums=(0, 1, 2))
    state = make(ARGS, 5, 2, jax.random.key(0))
    rng = np.random.default_rng(1)

    def shake(x):
        noise = rng.normal(scale=0.3, size=x.shape)
        return x + np.float32(noise)

    return state._replace(
        theta=jax.tree.map(shake, state.theta),
        critics=jax.tree.map(shake, state.critics),
    )


def random_batch(seed=2, b=6, n=4):
    """-> obs [B, 5], a0 [B, N, 2], w [B, N]."""
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(b, 5))
    a0 = rng.uniform(-1, 1, (b, n, 2))
    w = rng.normal(size=(b, n))
    return np.float32(obs), np.float32(a0), np.float32(w)


# ---- networks ------------------------------------------------------------------------


def test_mish_and_its_gradient():
    ends = [-1e4, -100, -88, 88, 100, 1e4, 1e20]
    x = join(np.linspace(-30, 30, 601), np.float32(ends)).astype(np.float32)
    assert_allclose(mish(x), naive_mish(x), rtol=2e-6, atol=1e-12)
    slope = jax.vmap(jax.grad(mish))(x)
    x = np.float64(x)
    tanh = np.tanh(np.logaddexp(0, x))
    sigmoid = np.exp(-np.logaddexp(0, -x))
    expected = tanh + x * (1 - tanh**2) * sigmoid
    assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)


def test_networks_and_their_initialisation():
    layers = init_mlp(jax.random.key(3), [40, 300, 200, 7])
    shapes = [layer["w"].shape for layer in layers]
    assert shapes == [(40, 300), (300, 200), (200, 7)]
    for layer in layers:
        assert not layer["b"].any()
        std = len(layer["w"]) ** -0.5
        assert_allclose(layer["w"].std(), std, rtol=0.05)
    rng = np.random.default_rng(4)
    x = np.float32(rng.normal(size=(2, 5, 40)))
    expected = naive_mlp(layers, x)
    assert_allclose(forward(layers, x), expected, rtol=1e-4, atol=1e-5)
    parts = np.split(x, [3, 10], axis=-1)
    assert_allclose(forward(layers, *parts), expected, rtol=1e-4, atol=1e-5)


def test_q_values_are_plain_networks_of_obs_and_act():
    critics = tiny_state().critics
    obs, act, _ = random_batch()
    inputs = join(each_sample(obs, act), act)
    expected = np.stack([naive_mlp(net, inputs) for net in critics])[..., 0]
    assert np.abs(expected[0] - expected[1]).min() > 1e-4  # two networks
    q = q_values(critics, obs, act)
    assert_allclose(q, expected, rtol=1e-4, atol=1e-5)


def test_velocity_is_a_plain_network_of_obs_action_and_time():
    theta = tiny_state().theta
    obs, a_t, _ = random_batch()
    velocity = jax.jit(policy_velocity, static_argnums=0)
    each = np.random.default_rng(5).integers(T, size=(6, 4))
    for t in (0, 1, T - 1, each):
        expected = naive_velocity(theta, obs, a_t, t)
        ours = velocity(ARGS, theta, obs, a_t, t)
        assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


# ---- schedule and sampler ------------------------------------------------------------


def levels_of(sampler, num_levels, visited):
    args = dataclasses.replace(
        ARGS,
        sampler=sampler,
        diffusion_steps=num_levels,
        sampling_steps=visited,
    )
    return sampler_levels(args)


@pytest.mark.parametrize("num_levels", [1, 2, 5, 20, 100])
def test_schedule_is_table_4(num_levels):
    alpha, sigma = schedule(num_levels)
    s = np.arange(num_levels + 1) / num_levels
    f = np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2
    bar = alpha**2
    assert_allclose(bar[:-1], f[1:-1] / f[0], rtol=1e-6)
    assert_allclose(bar + sigma**2, 1, rtol=1e-12)
    before_last = np.append(1.0, bar)[-2]
    assert_allclose(bar[-1], 0.001 * before_last)  # f would end at 0: beta is bounded


def test_velocity_and_a0_are_inverses_at_every_level():
    rng = np.random.default_rng(13)
    a0, noise = rng.normal(size=(2, 20))
    alpha, sigma = schedule(20)
    a_t = alpha * a0 + sigma * noise
    velocity = to_velocity(a0, noise, alpha, sigma)
    assert_allclose(to_a0(a_t, velocity, alpha, sigma), a0, atol=1e-12)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm2"])
def test_levels_visited_are_distinct_and_hold_both_ends(sampler):
    for num_levels in (2, 7, 20, 100):
        alpha, sigma = schedule(num_levels)
        for visited in range(2, num_levels + 1):
            levels = levels_of(sampler, num_levels, visited)
            for values in levels:
                assert values.shape == (visited,)
            assert (np.diff(levels.t) > 0).all()
            assert levels.t[0] == 0
            assert levels.t[-1] == num_levels - 1
            assert_array_equal(levels.alpha, alpha[levels.t])
            assert_array_equal(levels.sigma, sigma[levels.t])
    levels = levels_of(sampler, 20, 5)
    assert_array_equal(levels.t, [0, 2, 7, 12, 19])


def step_down(levels, a0, last, a_t):
    return levels.coef_a0 * a0 + levels.coef_last * last + levels.coef_at * a_t


@pytest.mark.parametrize("visited", [2, 6, 20])
def test_ddpm_steps_are_those_of_the_paper(visited):
    """The product of q(a_s | a0) and q(a_t | a_s), with s the level visited next."""
    rng = np.random.default_rng(14)
    a_t, a0, last = rng.normal(size=(3, visited))
    levels = levels_of("ddpm", 20, visited)
    bar = levels.alpha**2
    bar_next = np.append(1.0, bar[:-1])
    beta = 1 - bar / bar_next
    with np.errstate(divide="ignore", invalid="ignore"):  # the last step is exact
        precision = 1 / (1 - bar_next) + (1 - beta) / beta
        from_a0 = bar_next**0.5 / (1 - bar_next) * a0
        from_a_t = (1 - beta) ** 0.5 / beta * a_t
        mean = (from_a0 + from_a_t) / precision
    expected = np.append(a0[0], mean[1:])
    assert_allclose(step_down(levels, a0, last, a_t), expected, atol=1e-5)
    std = np.append(0, beta[1:] ** 0.5)
    assert_allclose(levels.std, std, atol=1e-6)


@pytest.mark.parametrize("visited", [2, 6, 20])
def test_dpm2_steps_are_those_of_the_paper(visited):
    """Algorithm 2 in its exponential form, of first order at both ends."""
    rng = np.random.default_rng(14)
    a_t, a0, last = rng.normal(size=(3, visited))
    levels = levels_of("dpm2", 20, visited)
    alpha = np.append(1.0, levels.alpha)
    sigma = np.append(0.0, levels.sigma)
    with np.errstate(divide="ignore"):
        log_snr = np.log(alpha / sigma)
    expected = []
    for i in range(visited):
        h = log_snr[i] - log_snr[i + 1]
        mix = a0[i]
        if 0 < i < visited - 1:
            r = (log_snr[i + 1] - log_snr[i + 2]) / h
            mix = a0[i] + (a0[i] - last[i]) / (2 * r)
        ratio = sigma[i] / sigma[i + 1]
        expected.append(ratio * a_t[i] - alpha[i] * np.expm1(-h) * mix)
    assert_allclose(step_down(levels, a0, last, a_t), expected, atol=1e-5)
    assert not levels.std.any()


def exact_velocity(num_levels, mean, std):
    """alpha E[noise | a_t] - sigma E[a0 | a_t] of a Gaussian in one dimension."""
    alphas, sigmas = jnp.float32(schedule(num_levels))

    def velocity(a_t, t):
        alpha = alphas[t]
        sigma = sigmas[t]
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        a0 = mean + gain * (a_t - alpha * mean)
        noise = (a_t - alpha * a0) / sigma
        return alpha * noise - sigma * a0

    return velocity


def draw(monkeypatch, velocity, count, seed=6, **flags):
    """sample_actions, with this velocity for the network's -> a0 [count]."""
    args = dataclasses.replace(ARGS, **flags)
    monkeypatch.setattr(
        simpo_mujoco,
        "policy_velocity",
        lambda args, theta, obs, a_t, t: velocity(a_t, t),
    )
    theta = {"net": [{"b": np.zeros(1)}]}
    obs = np.zeros((1, 1))
    sample = jax.jit(lambda key: sample_actions(args, theta, obs, count, key))
    return np.float64(sample(jax.random.key(seed))).reshape(count)


def moments_after(levels, mean, std):
    """Mean and std of the last a0 predicted for data N(mean, std^2): every step is
    linear in a_t and in the a0 predicted before it."""
    moment = np.zeros(2)  # of (a_t, last a0)
    cov = np.diag([1.0, 0.0])
    for i in reversed(range(len(levels.t))):
        alpha = levels.alpha[i]
        sigma = levels.sigma[i]
        coef_a0 = levels.coef_a0[i]
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        rest = mean - gain * alpha * mean  # E[a0 | a_t] = gain a_t + rest
        row = [coef_a0 * gain + levels.coef_at[i], levels.coef_last[i]]
        step = np.array([row, [gain, 0]])
        moment = step @ moment + np.array([coef_a0 * rest, rest])
        noise = np.diag([levels.std[i] ** 2, 0])
        cov = step @ cov @ step.T + noise
    return moment[1], cov[1, 1] ** 0.5


@pytest.mark.parametrize("sampler,visited", [("ddpm", 20), ("ddpm", 6), ("dpm2", 6)])
def test_sampler_is_the_linear_recursion_for_one_gaussian(
    monkeypatch, sampler, visited
):
    """For N(0.2, 0.15^2) every step is linear, and its moments follow exactly."""
    flags = {"sampler": sampler, "diffusion_steps": 20, "sampling_steps": visited}
    velocity = exact_velocity(20, 0.2, 0.15)
    a0 = draw(monkeypatch, velocity, 60_000, **flags)
    mean, std = moments_after(levels_of(sampler, 20, visited), 0.2, 0.15)
    assert a0.mean() == pytest.approx(mean, abs=0.002)
    assert a0.std() == pytest.approx(std, rel=0.01)
    assert (std > 0.15) == (sampler == "ddpm")  # dpm2 narrows a policy that is refitted
    again = draw(monkeypatch, velocity, 60_000, **flags)
    other = draw(monkeypatch, velocity, 60_000, seed=7, **flags)
    assert_array_equal(again, a0)
    assert abs(np.corrcoef(other, a0)[0, 1]) < 0.02


@pytest.mark.parametrize("num_levels", [2, 4])
@pytest.mark.parametrize("predicted,expected", [(3, 1), (-3, -1), (0.25, 0.25)])
def test_sampler_clips_the_predicted_action(
    monkeypatch, num_levels, predicted, expected
):
    alpha, sigma = jnp.float32(schedule(num_levels))

    def velocity(a_t, t):
        return (alpha[t] * a_t - predicted) / sigma[t]

    flags = {"diffusion_steps": num_levels, "sampling_steps": num_levels}
    a0 = draw(monkeypatch, velocity, 5, **flags)
    assert_allclose(a0, expected, atol=1e-5)


# ---- matching loss -------------------------------------------------------------------


def test_matching_loss_equals_a_second_evaluation(monkeypatch):
    """The a_t and t that the network is asked at give the noise back, and so all."""
    asked = []

    def recording(args, theta, obs, a_t, t):
        asked.append((np.float64(a_t), np.asarray(t)))
        return policy_velocity(args, theta, obs, a_t, t)

    monkeypatch.setattr(simpo_mujoco, "policy_velocity", recording)
    theta = tiny_state().theta
    obs, a0, w = random_batch(10, b=200)
    loss = matching_loss(theta, ARGS, obs, a0, w, jax.random.key(11))
    [(a_t, t)] = asked
    alphas, sigmas = schedule(T)
    alpha = alphas[t][..., None]
    sigma = sigmas[t][..., None]
    noise = (a_t - alpha * a0) / sigma
    target = alpha * noise - sigma * a0
    error = (naive_velocity(theta, obs, a_t, t) - target) ** 2
    assert 0.02 < np.mean(error > BOUND) < 0.5  # each dimension has its own bound
    error = np.minimum(error, BOUND).sum(axis=-1)
    expected = np.mean(w * error)
    assert float(loss) == pytest.approx(expected, rel=1e-4)

    # t is uniform on all T levels, the noise standard normal, new for each sample
    shares = np.bincount(t.ravel()) / t.size
    assert_allclose(shares, np.full(T, 1 / T), atol=0.06)
    assert abs(noise.mean()) < 0.1
    assert noise.std() == pytest.approx(1, abs=0.08)
    assert len(np.unique(noise)) == noise.size == 200 * 4 * 2
