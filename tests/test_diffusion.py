"""Networks, schedule, sampler and matching loss against formulas written a second time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simpo_mujoco
from simpo_mujoco import (
    Args,
    cosine_alpha_bar,
    init_mlp,
    init_state,
    matching_loss,
    mish,
    mlp,
    policy_velocity,
    q_values,
    sample_actions,
    sampler_steps,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")
T, BOUND = 3, 5.0
ARGS = Args(num_samples=4, diffusion_steps=T, sampling_steps=T, hidden_dim=16, error_bound=BOUND)


def naive_mish(x):
    x = np.asarray(x, np.float64)
    return x * np.tanh(np.logaddexp(0, x))


def naive_mlp(layers, x):
    """Mish between layers, in float64, on inputs joined beforehand."""
    for i, layer in enumerate(layers):
        x = x @ np.float64(layer["w"]) + np.float64(layer["b"])
        x = naive_mish(x) if i < len(layers) - 1 else x
    return x


def naive_velocity(theta, obs, at, t):
    """The network at [obs | a_t | embedding of t + 1], each row by itself; t counts from 0."""
    freq = 10_000.0 ** -np.linspace(0, 1, 8)
    phase = (np.broadcast_to(t, at.shape[:-1])[..., None] + 1.0) * freq
    embedding = naive_mlp(theta["time"], np.concatenate([np.sin(phase), np.cos(phase)], axis=-1))
    obs = np.broadcast_to(np.asarray(obs)[:, None], (*at.shape[:-1], obs.shape[-1]))
    return naive_mlp(theta["net"], np.concatenate([obs, at, embedding], axis=-1))


@functools.cache
def tiny_state():
    """Networks for 5 observations and 2 actions, with random biases: zeros would hide a fault."""
    state = jax.jit(init_state, static_argnums=(0, 1, 2))(ARGS, 5, 2, jax.random.key(0))
    rng = np.random.default_rng(1)
    shake = lambda x: x + rng.normal(scale=0.3, size=x.shape).astype(np.float32)  # noqa: E731
    return state._replace(
        theta=jax.tree.map(shake, state.theta), critics=jax.tree.map(shake, state.critics)
    )


def random_batch(seed=2, b=6, n=4):
    rng = np.random.default_rng(seed)
    obs, a0 = rng.normal(size=(b, 5)), rng.uniform(-1, 1, (b, n, 2))
    return np.float32(obs), np.float32(a0), np.float32(rng.normal(size=(b, n)))


# ---- networks ---------------------------------------------------------------------------------


def test_mish_and_its_gradient():
    x = np.concatenate([np.linspace(-30, 30, 601), [-1e4, -100, -88, 88, 100, 1e4, 1e20]])
    x = np.float32(x)
    y, slope = mish(x), jax.vmap(jax.grad(mish))(x)
    np.testing.assert_allclose(y, naive_mish(x), rtol=2e-6, atol=1e-12)
    x = x.astype(np.float64)
    tanh, sigmoid = np.tanh(np.logaddexp(0, x)), np.exp(-np.logaddexp(0, -x))
    np.testing.assert_allclose(slope, tanh + x * (1 - tanh**2) * sigmoid, rtol=1e-5, atol=1e-6)


def test_mlp_and_its_initialisation():
    layers = init_mlp(jax.random.key(3), [40, 300, 200, 7])
    assert [layer["w"].shape for layer in layers] == [(40, 300), (300, 200), (200, 7)]
    for layer in layers:
        assert not layer["b"].any()
        assert float(layer["w"].std()) == pytest.approx(layer["w"].shape[0] ** -0.5, rel=0.05)
    x = np.random.default_rng(4).normal(size=(2, 5, 40)).astype(np.float32)
    np.testing.assert_allclose(mlp(layers, x), naive_mlp(layers, x), rtol=1e-4, atol=1e-5)


def test_q_values_are_plain_networks_of_obs_and_act():
    critics, (obs, act, _) = tiny_state().critics, random_batch()
    joined = np.concatenate([np.broadcast_to(obs[:, None], (6, 4, 5)), act], axis=-1)
    expected = np.stack([naive_mlp(net, joined)[..., 0] for net in critics])
    assert np.abs(expected[0] - expected[1]).min() > 1e-4  # two networks, not one twice
    np.testing.assert_allclose(q_values(critics, obs, act), expected, rtol=1e-4, atol=1e-5)


def test_velocity_is_a_plain_network_of_obs_action_and_time():
    theta, (obs, at, _) = tiny_state().theta, random_batch()
    vel = jax.jit(lambda at, t: policy_velocity(theta, obs, T)(at, t))
    for t in (0, 1, T - 1):
        expected = naive_velocity(theta, obs, at, t)
        np.testing.assert_allclose(vel(at, t), expected, rtol=1e-4, atol=1e-5)
    t = np.random.default_rng(5).integers(T, size=(6, 4))
    expected = naive_velocity(theta, obs, at, t)
    np.testing.assert_allclose(vel(at, t), expected, rtol=1e-4, atol=1e-5)


# ---- schedule and sampler ---------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2, 5, 20, 100])
def test_alpha_bar_is_table_4(levels):
    bar = cosine_alpha_bar(levels)
    f = [np.cos((t / levels + 0.008) / 1.008 * np.pi / 2) ** 2 for t in range(levels + 1)]
    np.testing.assert_allclose(bar[:-1], np.array(f[1:-1]) / f[0], rtol=1e-6)
    assert bar[-1] == pytest.approx(0.001 * [1, *bar][-2], rel=1e-6)  # f(T) = 0 would make it 0


@pytest.mark.parametrize("sampler", ["ddpm", "dpm2"])
def test_levels_visited_are_distinct_and_hold_both_ends(sampler):
    for levels in (2, 7, 20, 100):
        bar = cosine_alpha_bar(levels)
        for visited in range(2, levels + 1):
            t, alpha, sigma, *_ = steps = sampler_steps(sampler, levels, visited)
            assert all(x.shape == (visited,) for x in steps)
            assert (np.diff(t) > 0).all() and t[0] == 0 and t[-1] == levels - 1
            np.testing.assert_allclose(alpha**2, bar[t], rtol=1e-5)
            np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)
    assert (sampler_steps(sampler, 20, 5)[0] == [0, 2, 7, 12, 19]).all()


@pytest.mark.parametrize("visited", [2, 6, 20])
def test_steps_are_those_of_the_papers(visited):
    """DDPM by the product of q(a_s | a0) and q(a_t | a_s), for the level s visited next, with the
    std sqrt(beta_t) but for the last step; DPM-Solver++(2M) in the exponential form of its paper's
    Algorithm 2, of first order in its first step and its last."""
    rng = np.random.default_rng(14)
    at, a0, last = rng.normal(size=(3, visited))
    ddpm, dpm2 = (np.float64(sampler_steps(name, 20, visited)) for name in ("ddpm", "dpm2"))
    step = lambda x: x[3] * a0 + x[4] * last + x[5] * at  # noqa: E731
    bar = cosine_alpha_bar(20)[ddpm[0].astype(int)]
    bar_next = np.append(1.0, bar[:-1])
    beta = 1 - bar / bar_next
    with np.errstate(divide="ignore", invalid="ignore"):  # the last step's precision is infinite
        precision = 1 / (1 - bar_next) + (1 - beta) / beta
        mean = bar_next**0.5 / (1 - bar_next) * a0 + (1 - beta) ** 0.5 / beta * at
        expected = np.append(a0[0], (mean / precision)[1:])
    np.testing.assert_allclose(step(ddpm), expected, atol=1e-5)
    np.testing.assert_allclose(ddpm[6], np.append(0, beta[1:] ** 0.5), atol=1e-6)

    alpha, sigma = np.append(1.0, dpm2[1]), np.append(0.0, dpm2[2])
    with np.errstate(divide="ignore"):
        log_snr = np.log(alpha / sigma)
    expected = []
    for i in range(visited):
        h, mix = log_snr[i] - log_snr[i + 1], a0[i]
        if 0 < i < visited - 1:
            r = (log_snr[i + 1] - log_snr[i + 2]) / h
            mix = (1 + 1 / (2 * r)) * a0[i] - last[i] / (2 * r)
        expected.append(sigma[i] / sigma[i + 1] * at[i] - alpha[i] * np.expm1(-h) * mix)
    np.testing.assert_allclose(step(dpm2), expected, atol=1e-5)
    assert not dpm2[6].any()


def exact_velocity(levels, mean, std):
    """alpha E[noise | a_t] - sigma E[a0 | a_t] of a Gaussian in one dimension."""
    bar = np.float32(cosine_alpha_bar(levels))

    def velocity(at, t):
        alpha, sigma = jnp.sqrt(jnp.asarray(bar)[t]), jnp.sqrt(1 - jnp.asarray(bar)[t])
        a0 = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (at - alpha * mean)
        return alpha * (at - alpha * a0) / sigma - sigma * a0

    return velocity


def draw(monkeypatch, velocity, count, seed=6, **flags):
    """sample_actions with another velocity in the place of the network's -> a0 [count]."""
    args = dataclasses.replace(ARGS, **flags)
    monkeypatch.setattr(simpo_mujoco, "policy_velocity", lambda *_: velocity)
    theta = {"net": [{"b": np.zeros(1)}]}
    sample = jax.jit(lambda key: sample_actions(args, theta, np.zeros((1, 1)), count, key))
    return np.asarray(sample(jax.random.key(seed)), np.float64).reshape(count)


def moments_after(sampler, visited, mean, std):
    """Mean and std of the last a0 predicted for data N(mean, std^2) and T = 20: every step is
    linear in a_t and in the a0 predicted before it."""
    m, cov = np.zeros(2), np.diag([1.0, 0.0])  # of (a_t, last a0)
    steps = np.float64(sampler_steps(sampler, 20, visited)).T
    for _, alpha, sigma, coef_a0, coef_last, coef_at, noise in steps[::-1]:
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)  # E[a0 | a_t] = mean + gain (...)
        rest = mean - gain * alpha * mean
        step = np.array([[coef_a0 * gain + coef_at, coef_last], [gain, 0]])
        m = step @ m + np.array([coef_a0 * rest, rest])
        cov = step @ cov @ step.T + np.diag([noise**2, 0])
    return m[1], cov[1, 1] ** 0.5


@pytest.mark.parametrize("sampler,visited", [("ddpm", 20), ("ddpm", 6), ("dpm2", 6)])
def test_sampler_is_the_linear_recursion_for_one_gaussian(monkeypatch, sampler, visited):
    """With few steps too: for N(0.2, 0.15^2) every step is linear, its moments follow exactly."""
    flags = {"sampler": sampler, "diffusion_steps": 20, "sampling_steps": visited}
    a0 = draw(monkeypatch, exact_velocity(20, 0.2, 0.15), 60_000, **flags)
    mean, std = moments_after(sampler, visited, 0.2, 0.15)
    assert a0.mean() == pytest.approx(mean, abs=0.002)
    assert a0.std() == pytest.approx(std, rel=0.01)
    assert (std > 0.15) == (sampler == "ddpm")  # dpm2 narrows a policy that is refitted
    again, other = (
        draw(monkeypatch, exact_velocity(20, 0.2, 0.15), 60_000, seed, **flags) for seed in (6, 7)
    )
    np.testing.assert_array_equal(again, a0)
    assert abs(np.corrcoef(other, a0)[0, 1]) < 0.02


@pytest.mark.parametrize("levels", [2, 4])
def test_sampler_clips_the_predicted_action(monkeypatch, levels):
    """A prediction outside the range ends on its edge, at every number of steps."""
    bar = np.float32(cosine_alpha_bar(levels))
    for predicted, expected in ((3.0, 1.0), (-3.0, -1.0), (0.25, 0.25)):

        def velocity(at, t, a0=predicted):
            alpha_bar = jnp.asarray(bar)[t]
            return (jnp.sqrt(alpha_bar) * at - a0) / jnp.sqrt(1 - alpha_bar)

        a0 = draw(monkeypatch, velocity, 5, diffusion_steps=levels, sampling_steps=levels)
        np.testing.assert_allclose(a0, expected, atol=1e-5)


# ---- matching loss ----------------------------------------------------------------------------


def test_matching_loss_equals_a_second_evaluation(monkeypatch):
    """The a_t and t that the network is asked at give the noise back, and so the whole loss."""
    asked = []

    def recording(theta, obs, num_steps):
        vel = policy_velocity(theta, obs, num_steps)

        def record(at, t):
            asked.append((np.float64(at), np.asarray(t)))
            return vel(at, t)

        return record

    monkeypatch.setattr(simpo_mujoco, "policy_velocity", recording)
    theta, (obs, a0, w) = tiny_state().theta, random_batch(10, b=200)
    loss = matching_loss(theta, ARGS, obs, a0, w, jax.random.key(11))
    [(at, t)] = asked
    bar = cosine_alpha_bar(T)[t][..., None]
    alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
    noise = (at - alpha * a0) / sigma
    error = (naive_velocity(theta, obs, at, t) - (alpha * noise - sigma * a0)) ** 2
    assert 0.02 < np.mean(error > BOUND) < 0.5  # each dimension of an action has its own bound
    expected = np.mean(w * np.sum(np.minimum(error, BOUND), axis=-1))
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    # t is uniform on all T steps, the noise standard normal, both anew for each sample
    np.testing.assert_allclose(np.bincount(t.ravel()) / t.size, 1 / T, atol=0.06)
    assert abs(noise.mean()) < 0.1 and noise.std() == pytest.approx(1, abs=0.08)
    assert len(np.unique(noise)) == noise.size == 200 * 4 * 2
