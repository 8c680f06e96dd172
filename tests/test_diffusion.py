"""Networks, schedule, sampler and matching loss against formulas written a second time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import simpo_mujoco
from simpo_mujoco import (
    Args,
    cosine_schedule,
    init_mlp,
    init_state,
    matching_loss,
    mish,
    mlp,
    q_values,
    sample,
    sample_actions,
    velocity,
)

T = 3
ARGS = Args(num_samples=4, diffusion_steps=T, sampling_steps=T, eps_kl=0.5, hidden_dim=16)


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
    """vel at [obs | at | embedding of t + 1], each row by itself; t counts from 0."""
    freq = 10_000.0 ** -np.linspace(0, 1, 8)
    phase = (np.broadcast_to(t, at.shape[:-1])[..., None] + 1.0) * freq
    embedding = naive_mlp(theta["time"], np.concatenate([np.sin(phase), np.cos(phase)], axis=-1))
    obs = np.broadcast_to(np.asarray(obs)[:, None], (*at.shape[:-1], obs.shape[-1]))
    return naive_mlp(theta["net"], np.concatenate([obs, at, embedding], axis=-1))


@functools.cache
def tiny_state():
    """Networks for 5 observations and 2 actions, with random biases: zeros would hide a fault."""
    state = init_state(ARGS, 5, 2, jax.random.key(0))
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
    vel = jax.jit(lambda at, t: velocity(theta, obs, T)(at, t))
    for t in (0, 1, T - 1):
        expected = naive_velocity(theta, obs, at, t)
        np.testing.assert_allclose(vel(at, t), expected, rtol=1e-4, atol=1e-5)
    t = np.random.default_rng(5).integers(T, size=(6, 4))
    expected = naive_velocity(theta, obs, at, t)
    np.testing.assert_allclose(vel(at, t), expected, rtol=1e-4, atol=1e-5)


# ---- schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 100])
def test_schedule_is_table_4_with_the_posterior_of_ddpm(steps):
    schedule = [x.astype(np.float64) for x in cosine_schedule(steps)]
    t, alpha, sigma, coef_a0, coef_last, coef_at, std = schedule
    assert all(x.shape == (steps,) for x in schedule)
    assert (t == np.arange(steps)).all() and not coef_last.any()
    f = [np.cos((t / steps + 0.008) / 1.008 * np.pi / 2) ** 2 for t in range(steps + 1)]
    np.testing.assert_allclose(alpha[:-1] ** 2, np.array(f[1:-1]) / f[0], rtol=1e-5)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-6)

    bar = alpha**2
    before = np.append(1.0, bar[:-1])
    beta = 1 - bar / before
    assert beta[-1] == pytest.approx(0.999, rel=1e-4)  # f(T) = 0 would make it 1
    # q(a_{t-1} | a_t, a0): the product of N(sqrt(before) a0, 1 - before) and the step's likelihood
    precision = 1 / (1 - before[1:]) + (1 - beta[1:]) / beta[1:]
    np.testing.assert_allclose(std[1:], precision**-0.5, rtol=1e-3)
    expected = before[1:] ** 0.5 / (1 - before[1:]) / precision
    np.testing.assert_allclose(coef_a0[1:], expected, rtol=1e-3)
    expected = (1 - beta[1:]) ** 0.5 / beta[1:] / precision
    np.testing.assert_allclose(coef_at[1:], expected, rtol=1e-3)
    assert (coef_a0[0], coef_at[0], std[0]) == (pytest.approx(1, abs=1e-6), 0, 0)
    # one step back from q(a_t | a0) is q(a_{t-1} | a0)
    np.testing.assert_allclose(coef_a0 + coef_at * alpha, before**0.5, rtol=1e-5)
    np.testing.assert_allclose(std**2 + coef_at**2 * sigma**2, 1 - before, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("levels", [1, 2, 7, 20])
def test_levels_visited_are_distinct_and_hold_both_ends(levels):
    every = cosine_schedule(levels)
    for visited in range(1, levels + 1):
        schedule = cosine_schedule(levels, visited, "ddim")
        t = schedule.t
        assert len(t) == visited and (np.diff(t) > 0).all() and t[-1] == levels - 1
        assert t[0] == 0 or visited == 1
        np.testing.assert_array_equal(schedule.alpha, every.alpha[t])
        np.testing.assert_array_equal(schedule.sigma, every.sigma[t])
    assert (cosine_schedule(20, 5).t == [0, 2, 7, 12, 19]).all()


@pytest.mark.parametrize("visited", [1, 2, 5, 20])
def test_deterministic_steps_are_those_of_the_papers(visited):
    """DDIM by the noise it keeps, DPM-Solver++(2M) in the exponential form of its Algorithm 2."""
    rng = np.random.default_rng(14)
    at, a0, last = rng.normal(size=(3, visited))
    ddim, dpm2 = (
        type(schedule)(*np.float64(schedule))
        for schedule in (cosine_schedule(20, visited, name) for name in ("ddim", "dpm2"))
    )
    step = lambda s: s.coef_a0 * a0 + s.coef_last * last + s.coef_at * at  # noqa: E731
    assert not (ddim.std.any() or dpm2.std.any() or ddim.coef_last.any())
    alpha, sigma = np.append(1.0, ddim.alpha), np.append(0.0, ddim.sigma)
    noise = (at - alpha[1:] * a0) / sigma[1:]
    np.testing.assert_allclose(step(ddim), alpha[:-1] * a0 + sigma[:-1] * noise, atol=1e-5)
    with np.errstate(divide="ignore"):
        log_snr = np.log(alpha / sigma)
    expected = []
    for i in range(visited):
        h = log_snr[i] - log_snr[i + 1]
        mix = a0[i]
        if 0 < i < visited - 1:
            r = (log_snr[i + 1] - log_snr[i + 2]) / h
            mix = (1 + 1 / (2 * r)) * a0[i] - last[i] / (2 * r)
        expected.append(sigma[i] / sigma[i + 1] * at[i] - alpha[i] * np.expm1(-h) * mix)
    np.testing.assert_allclose(step(dpm2), expected, atol=1e-5)


# ---- sampler ----------------------------------------------------------------------------------


def exact_velocity(schedule, means, stds, masses):
    """v = alpha E[noise | a_t] - sigma E[a0 | a_t] of a mixture of round Gaussians [K, d]."""
    alpha, sigma = jnp.asarray(schedule.alpha), jnp.asarray(schedule.sigma)

    def vel(at, t):
        al, si = alpha[t], sigma[t]
        variance = al**2 * stds**2 + si**2  # [K]
        offset = at[..., None, :] - (al * means).reshape((1,) * (at.ndim - 1) + means.shape)
        per_mode = lambda x: x.reshape((1,) * (at.ndim - 1) + (-1,))  # noqa: E731
        log_p = -0.5 * (offset**2).sum(-1) / per_mode(variance) + per_mode(
            jnp.log(masses) - at.shape[-1] / 2 * jnp.log(variance)
        )
        share = jax.nn.softmax(log_p, axis=-1)[..., None]
        gain = per_mode(al * stds**2 / variance)[..., None]
        mean = means.reshape((1,) * (at.ndim - 1) + means.shape)
        a0 = (share * (mean + gain * offset)).sum(-2)
        return al * (at - al * a0) / si - si * a0

    return vel


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm2"])
@pytest.mark.parametrize(
    "means,stds,masses",
    [
        ([[0.3]], [0.15], [1.0]),
        ([[-0.5], [0.6]], [0.1, 0.05], [0.3, 0.7]),
        ([[-0.5, -0.5], [0.5, 0.0], [-0.2, 0.6]], [0.1, 0.05, 0.15], [0.5, 0.2, 0.3]),
    ],
)
def test_sampler_recovers_a_mixture_from_its_exact_velocity(means, stds, masses, sampler):
    means, stds, masses = (np.float32(x) for x in (means, stds, masses))
    levels = 200 if sampler == "dpm2" else 1000  # in the limit of many steps
    schedule, count = cosine_schedule(levels, sampler=sampler), 12_000
    vel = exact_velocity(schedule, means, stds, masses)
    draw = jax.jit(lambda key: sample(vel, schedule, (count, 1, means.shape[1]), key))
    a0 = np.asarray(draw(jax.random.key(6)), np.float64)[:, 0]
    assert np.abs(a0).max() <= 1
    mode = np.argmin(((a0[:, None] - means) ** 2).sum(-1) / stds**2, axis=-1)
    for k in range(len(means)):
        ours = a0[mode == k]
        assert len(ours) / count == pytest.approx(masses[k], abs=0.015)
        np.testing.assert_allclose(ours.mean(0), means[k], atol=0.008)
        np.testing.assert_allclose(ours.std(0), stds[k], rtol=0.07)
    mean = (masses[:, None] * means).sum(0)
    covariance = np.diag(np.full(means.shape[1], (masses * stds**2).sum()))
    covariance += (means - mean).T @ np.diag(masses) @ (means - mean)
    np.testing.assert_allclose(a0.mean(0), mean, atol=0.016)
    np.testing.assert_allclose(np.cov(a0.T).reshape(covariance.shape), covariance, atol=0.01)


def moments_after(schedule, mean, std):
    """Mean and std of the samples for data N(mean, std^2): every step is linear in a_t and in the
    a0 predicted before it."""
    m, cov = np.zeros(2), np.diag([1.0, 0.0])  # of (a_t, last)
    for _, alpha, sigma, coef_a0, coef_last, coef_at, noise in np.float64(schedule).T[::-1]:
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)  # E[a0 | a_t] = mean + gain (...)
        rest = mean - gain * alpha * mean
        step = np.array([[coef_a0 * gain + coef_at, coef_last], [gain, 0]])
        m = step @ m + np.array([coef_a0 * rest, rest])
        cov = step @ cov @ step.T + np.diag([noise**2, 0])
    return m[0], cov[0, 0] ** 0.5


@pytest.mark.parametrize("sampler,visited", [("ddpm", 20), ("ddpm", 6), ("ddim", 5), ("dpm2", 5)])
def test_sampler_is_the_linear_recursion_for_one_gaussian(sampler, visited):
    """With few steps too: for N(0.2, 0.15^2) every step is linear, its moments follow exactly."""
    mean, std = 0.2, 0.15
    schedule = cosine_schedule(20, visited, sampler)
    exact = exact_velocity(cosine_schedule(20), *map(np.float32, ([[mean]], [std], [1.0])))
    a0 = jax.jit(lambda key: sample(exact, schedule, (60_000, 1, 1), key))(jax.random.key(6))
    m, s = moments_after(schedule, mean, std)
    assert float(a0.mean()) == pytest.approx(m, abs=0.002)
    assert float(a0.std()) == pytest.approx(s, rel=0.01)


def test_five_second_order_steps_keep_more_spread_than_twenty_of_ddpm():
    for std in (0.5, 0.3, 0.1):
        few, many = cosine_schedule(20, 5, "dpm2"), cosine_schedule(20)
        assert moments_after(many, 0, std)[1] < moments_after(few, 0, std)[1] < std


def test_sampler_clips_the_predicted_action():
    """A prediction outside the range ends on its edge, at every number of steps."""
    for steps in (1, 4):
        schedule = cosine_schedule(steps)
        alpha, sigma = jnp.asarray(schedule.alpha), jnp.asarray(schedule.sigma)

        def vel(at, t, alpha=alpha, sigma=sigma):  # predicts a0 = 3, -3 and 0.25
            a0 = jnp.broadcast_to(jnp.float32([3, -3, 0.25]).reshape(1, 1, 3), at.shape)
            return (alpha[t] * at - a0) / sigma[t]

        a0 = sample(vel, schedule, (5, 2, 3), jax.random.key(7))
        expected = np.broadcast_to(np.float32([1, -1, 0.25]), (5, 2, 3))
        np.testing.assert_allclose(a0, expected, atol=1e-5)


def test_sample_actions_shape_range_and_randomness():
    obs = random_batch()[0]
    draw = jax.jit(functools.partial(sample_actions, ARGS))
    theta = init_state(ARGS, 5, 2, jax.random.key(0)).theta  # fresh: hardly clipped yet
    a0 = np.asarray(draw(theta, obs, jax.random.key(8)))
    assert a0.shape == (6, 4, 2) and np.abs(a0).max() <= 1
    assert a0.std(axis=1).min() > 1e-3  # the N samples of a state differ
    again = draw(theta, obs, jax.random.key(8))
    other = draw(theta, obs, jax.random.key(9))
    np.testing.assert_array_equal(a0, again)
    assert np.abs(a0 - other).max() > 1e-2


# ---- matching loss ----------------------------------------------------------------------------


def test_matching_loss_equals_a_second_evaluation(monkeypatch):
    """The a_t and t that the network is asked at give the noise back, and so the whole loss."""
    asked = []

    def recording(theta, obs, num_steps):
        vel = velocity(theta, obs, num_steps)

        def record(at, t):
            asked.append((np.float64(at), np.asarray(t)))
            return vel(at, t)

        return record

    monkeypatch.setattr(simpo_mujoco, "velocity", recording)
    theta, (obs, a0, w) = tiny_state().theta, random_batch(10, b=200)
    loss = matching_loss(theta, ARGS, obs, a0, w, jax.random.key(11))
    [(at, t)] = asked
    schedule = cosine_schedule(T)
    alpha, sigma = (
        np.float64(schedule.alpha)[t][..., None],
        np.float64(schedule.sigma)[t][..., None],
    )
    noise = (at - alpha * a0) / sigma
    error = naive_velocity(theta, obs, at, t) - (alpha * noise - sigma * a0)
    expected = np.mean(w * np.sum(error**2, axis=-1))
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    # t is uniform on all T steps, the noise standard normal, both anew for each sample
    assert t.shape == (200, 4) and noise.shape == (200, 4, 2)
    np.testing.assert_allclose(np.bincount(t.ravel()) / t.size, 1 / T, atol=0.06)
    assert abs(noise.mean()) < 0.1 and noise.std() == pytest.approx(1, abs=0.08)
    assert abs(np.corrcoef(noise.reshape(-1, 2).T)[0, 1]) < 0.15
    assert abs(np.corrcoef(noise[:, 0, 0], noise[:, 1, 0])[0, 1]) < 0.25
    assert len(np.unique(noise)) == noise.size


def test_a_negative_weight_repels():
    """A step down the loss raises the error of a sample of negative weight, and the reverse."""
    theta, (obs, a0, _) = tiny_state().theta, random_batch()
    loss = jax.jit(lambda theta, w: matching_loss(theta, ARGS, obs, a0, w, jax.random.key(12)))
    gradient = jax.jit(jax.grad(loss))
    only = np.zeros((6, 4), np.float32)
    only[2, 1] = 1
    for sign in (-1, 1):
        grads = gradient(theta, sign * only)
        stepped = jax.tree.map(lambda p, g: p - 1e-2 * g, theta, grads)
        change = float(loss(stepped, only) - loss(theta, only))
        assert change * sign < -1e-5, (sign, change)


def test_signed_matching_reaches_the_closed_form_of_eq_8(monkeypatch):
    """A table of velocities over (t, bin of a_t), trained by gradient descent on the real loss
    with signed weights, reaches E[w v | a_t] / E[w | a_t] wherever E[w | a_t] > 0; where it is
    negative the same descent drives the velocity away from it (section 3.4, case II)."""
    actions = np.float64([-0.7, -0.1, 0.3, 0.8])
    w = np.float64([-0.6, 0.5, 1.7, 2.4])  # mean 1, one sample repels
    edges = np.linspace(-2.4, 2.4, 17)
    schedule = [np.float64(x)[:, None, None] for x in cosine_schedule(T)[1:3]]

    # Exact: a_t in [lo, hi] means that the noise of a0 is in [lo - alpha a0, hi - alpha a0] / sigma
    alpha, sigma = schedule  # [T, 1, 1] against bins [1, K, 1] and actions [1, 1, 4]
    low, high = ((x[None, :, None] - alpha * actions) / sigma for x in (edges[:-1], edges[1:]))
    p = norm.cdf(high) - norm.cdf(low)  # P(a_t in bin | a0)
    moment = norm.pdf(low) - norm.pdf(high)  # E[noise; a_t in bin | a0]
    mass = np.mean(w * p, axis=-1)
    flow = np.mean(w * (alpha * moment - sigma * actions * p), axis=-1)
    exact = flow / mass
    plain = np.mean(alpha * moment - sigma * actions * p, axis=-1) / np.mean(p, axis=-1)

    def table_velocity(table, obs, num_steps):
        def vel(at, t):
            index = jnp.searchsorted(jnp.float32(edges), at[..., 0]) - 1
            inside = (index >= 0) & (index < len(edges) - 1)
            return jnp.where(inside, table[t, index], 0.0)[..., None]

        return vel

    monkeypatch.setattr(simpo_mujoco, "velocity", table_velocity)
    count = 200_000
    obs = jnp.zeros((1, 1))
    a0 = jnp.tile(jnp.float32(actions), count)[None, :, None]
    weight = jnp.tile(jnp.float32(w), count)[None]

    @jax.jit
    def train(table, rate, steps=150):
        gradient = jax.grad(matching_loss)
        descend = lambda table, _: (  # noqa: E731
            table - rate * gradient(table, ARGS, obs, a0, weight, jax.random.key(13)),
            None,
        )
        return jax.lax.scan(descend, table, length=steps)[0]

    table = np.asarray(train(jnp.zeros(exact.shape), 5.0))
    assert table.shape == (T, 16)
    solid = mass > 0.03
    assert solid.sum() > 20
    np.testing.assert_allclose(table[solid], exact[solid], atol=0.06)
    assert np.abs(exact - plain)[solid].max() > 0.5  # the unweighted flow would not pass
    repelled = mass < -0.002
    assert repelled.sum() >= 3
    assert (table[repelled] * exact[repelled] < 0).all()  # away from it, from the start at 0
