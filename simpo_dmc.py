"""SiMPO on DeepMind Control: simpo_mujoco.py with the rewards of figures 4 and 5.

    python simpo_dmc.py --reward exp --reward-scale 20 --total-timesteps 300000

Section 5.2 of arXiv 2603.10250, with Algorithm 1 and the settings of its Table 4. One
million steps take two to three hours on two cores. To use it, copy this file and
common.py. README.md has the results.
`diff simpo_mujoco.py simpo_dmc.py` shows what is special to it.

Noise levels t = 0 .. T - 1 rise, with a_t = alpha_t a0 + sigma_t noise and
velocity = alpha_t noise - sigma_t a0. Shapes: B states, N samples of a state,
o observation, d action, H hidden units.

Where the paper is silent, or we depart from it (evidence: docs/mujoco.md):
1. Samples come from a slow copy of the policy, pi_old, which also acts and serves the
   critic targets.
2. Gaussian noise that falls over the run is added to the weighted samples and to the
   actions taken in training, which are then clipped to [-1, 1].
3. Critic targets take the best of 2 next actions, acting and evaluation the best of 8.
4. Critics take two steps on a batch; target critics and pi_old follow at rate 0.02.
5. The clip l, --neg-clip, is for weights of mean 1 and for every power; in eq. (11) it
   clips the linear weight.
6. The squared error of each dimension is bounded.
7. The smaller of two target critics weights the samples.
8. N = 8 and a deterministic sampler of four steps. `--num-samples 32 --sampler ddpm
   --sampling-steps 20` has the paper's N and T, and takes seven times as long.
9. Appendix F.2 prints rewards that fall with speed; ours rise, as its text says.
"""

import argparse
import dataclasses
import fcntl
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import imageio
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from dm_control.rl.control import PhysicsError
from tensorboardX import SummaryWriter
from tqdm import tqdm

from common import solve_nu, update_lam

TOP_SPEED = {"cheetah-run": 10.0, "walker-run": 8.0}  # v*, m/s: App. F.2, dm_control
EMBEDDING = 16  # size of the embedding of t
EVAL_SEED = 1_073_741_824  # of evaluations; training draws its seeds below
EVAL_STEPS = 10_000  # ends an evaluation episode that nothing else ends
LOG_EVERY = 2_000  # environment steps between rows of losses


@dataclasses.dataclass(frozen=True)
class Args:
    # --- Experiment ---
    domain: str = "cheetah"  # of the DeepMind Control Suite
    task: str = "run"  # of the domain
    reward: Literal["stock", "sqrt", "linear", "square", "exp"] = "stock"  # App. F.2
    seed: int = 1  # of networks, actions, batches and training episodes
    total_timesteps: int = 1_000_000  # environment steps, over all environments
    num_envs: int = 5  # environments stepped together; one update for each joint step
    eval_every: int = 25_000  # environment steps between saves, each with an evaluation
    eval_episodes: int = 20  # episodes of an evaluation, always from the same starts
    run_dir: str | None = None  # default: runs/{env_id}__simpo_dmc__{seed}__{time}
    resume: str | None = None  # run folder to continue, with its own flags
    evaluate: str | None = None  # run folder to evaluate instead of training
    capture_video: bool = False  # film the first episode of every evaluation
    track: bool = False  # mirror TensorBoard to Weights & Biases
    # --- Weights of the samples ---
    weighting: Literal["exp", "linear", "square", "power", "qvpo", "wd1"] = "linear"
    neg_clip: float = 0.0  # l in eq. (11): smallest weight; Lin. Neg. is -0.05
    eps_kl: float | None = None  # nats, eq. (30); default 43 % of log N: 1.5 at N = 32
    power: float = 1.5  # p of --weighting power: w = sign(y) |y|^p
    num_samples: int = 8  # N, weighted samples of a state
    # --- Diffusion policy ---
    diffusion_steps: int = 20  # T, noise levels that the policy is trained on
    sampling_steps: int = 4  # noise levels that the sampler visits
    sampler: Literal["ddpm", "dpm2"] = "dpm2"  # ancestral, or of second order
    target_samples: int = 2  # M: critic targets take the best of M next actions
    act_samples: int = 8  # act and evaluate with the best of this many samples
    noise_start: float = 0.3  # std of the noise on samples and actions, first update
    noise_end: float = 0.1  # the same at the last update; geometric in between
    error_bound: float = 5.0  # on the squared error of each action dimension
    # --- Optimisation ---
    policy_lr: float = 3e-4  # Adam's rate for the policy at the first update
    policy_lr_end: float = 3e-5  # the same at the last update; linear in between
    critic_lr: float = 3e-4  # Adam's rate for the critics, constant
    critic_steps: int = 2  # Adam steps of the critics on each batch and its targets
    gamma: float = 0.99  # discount
    tau: float = 0.02  # rate at which target critics and pi_old follow, when updated
    reward_scale: float = 0.2  # factor on the rewards that the critics see
    batch_size: int = 256  # B
    buffer_size: int = 1_000_000  # most recent transitions that batches are drawn from
    learning_starts: int = 30_000  # environment steps of random actions first
    policy_delay: int = 2  # updates of the critics per update of the policy
    hidden_dim: int = 256  # H, of each of the 3 hidden layers of policy and critics

    @property
    def env_id(self):
        return f"{self.domain}-{self.task}"

    @property
    def kl_bound(self):
        """Bound on the KL of the weights, eq. (30), in nats."""
        if self.eps_kl is None:
            return 1.5 * math.log(self.num_samples, 32)
        return self.eps_kl

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) in (int, float) and name != "neg_clip":
                least = 1 if type(value) is int and name != "seed" else 0
                if not value >= least:
                    raise ValueError(f"--{name} must be at least {least}")
        shapes = " and ".join(TOP_SPEED)
        rules = {
            f"--reward {self.reward} is for {shapes}": (
                self.reward == "stock" or self.env_id in TOP_SPEED
            ),
            "--seed must be below 2^32": self.seed < 2**32,
            "--sampling-steps must be in [2, --diffusion-steps]": (
                2 <= self.sampling_steps <= self.diffusion_steps
            ),
        }
        if not self.evaluate:  # rules of training
            rules |= {
                "--neg-clip must be at most 0": self.neg_clip <= 0,
                "--neg-clip is for linear, square and power": (
                    not self.neg_clip or self.weighting in ("linear", "square", "power")
                ),
                "--eps-kl must be below the log of --num-samples": (
                    self.kl_bound < math.log(self.num_samples)
                ),
                "--total-timesteps must be at least --learning-starts + --num-envs": (
                    self.learning_starts + self.num_envs <= self.total_timesteps
                ),
            }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(rule)  # tyro shows it as an error of usage


# ---- networks ------------------------------------------------------------------------
@jax.checkpoint  # recomputed in the backward pass: it is memory-bound on a CPU
def mish(x):
    """x tanh(softplus(x)), with one exp and one division."""
    e = jnp.exp(jnp.minimum(x, 20.0))
    n = e * (e + 2)
    return x * (n / (n + 2))


def init_mlp(key, sizes):
    """[{"w": [in, out], "b": [out]}, ...]: weights of variance 1 / in, zero biases."""
    init = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    layers = []
    for k, n_in, n_out in zip(keys, sizes, sizes[1:]):
        layers.append({"w": init(k, (n_in, n_out)), "b": jnp.zeros(n_out)})
    return layers


def forward(layers, *inputs):
    """An MLP of joined inputs: obs [B, 1, o], act [B, N, d] -> [B, N, out].

    The first layer multiplies each input separately, so obs once and not N times."""
    first, *others = layers
    splits = np.cumsum([x.shape[-1] for x in inputs])[:-1]
    blocks = jnp.split(first["w"], splits)
    x = sum((x @ w for x, w in zip(inputs, blocks)), first["b"])
    for layer in others:
        x = mish(x) @ layer["w"] + layer["b"]
    return x


def q_values(critics, obs, act):
    """Both critics: obs [B, o], act [B, N, d] -> [2, B, N]."""
    obs = obs[:, None]  # [B, 1, o]
    return jnp.stack([forward(net, obs, act)[..., 0] for net in critics])


def policy_velocity(args, theta, obs, a_t, t):
    """obs [B, o], noisy actions a_t [B, N, d], levels t [] or [B, N] -> [B, N, d]."""
    frequency = 10_000.0 ** -jnp.linspace(0, 1, EMBEDDING // 2)
    phase = jnp.outer(jnp.arange(1.0, args.diffusion_steps + 1), frequency)
    embedding = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
    time = forward(theta["time"], embedding)  # [T, EMBEDDING]
    return forward(theta["net"], obs[:, None], a_t, time[t])


# ---- diffusion -----------------------------------------------------------------------
# These three functions are the path from data to noise. docs/extending.md has those of
# a flow: velocity = noise - a0.
def schedule(num_levels):
    """alpha [T] and sigma [T], cosine as in Table 4 (Nichol and Dhariwal, eq. 17)."""
    s = (np.arange(num_levels + 1) / num_levels + 0.008) / 1.008
    f = np.cos(s * np.pi / 2) ** 2
    alpha_bar = np.cumprod(np.maximum(f[1:] / f[:-1], 0.001))  # of 1 - beta_t
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def to_velocity(a0, noise, alpha, sigma):
    return alpha * noise - sigma * a0


def to_a0(a_t, velocity, alpha, sigma):
    return alpha * a_t - sigma * velocity


class Level(NamedTuple):
    """The sampler's step down from a noise level:

    a_next = coef_a0 a0 + coef_last (a0 predicted one level above) + coef_at a_t
             + std noise."""

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    coef_a0: np.ndarray
    coef_last: np.ndarray
    coef_at: np.ndarray
    std: np.ndarray


def sampler_levels(args):
    """The levels visited, upwards, as arrays in one Level. Low noise has more of them.

    ddpm is Ho et al. (2006.11239) with variance beta_t, without noise in the last step;
    dpm2 is DPM-Solver++(2M), Lu et al. (2211.01095)."""
    i = np.arange(args.sampling_steps)
    skipped = args.diffusion_steps - args.sampling_steps
    # distinct levels from 0 to T - 1; 1.7 was found by trial
    t = np.round(i + skipped * (i / i[-1]) ** 1.7).astype(np.int32)

    alpha, sigma = np.array(schedule(args.diffusion_steps))[:, t]
    alpha_next = np.append(1.0, alpha[:-1])
    sigma_next = np.append(0.0, sigma[:-1])

    # a_next = coef_at a_t + coef_a0 D, where D is a0, or for dpm2 a0 extrapolated:
    # D = a0 + extrapolate (a0 - last a0)
    std = np.zeros_like(alpha)
    extrapolate = np.zeros_like(alpha)
    if args.sampler == "ddpm":
        ratio = alpha / alpha_next
        std = np.sqrt(sigma**2 - (ratio * sigma_next) ** 2) * (i > 0)
        coef_at = ratio * (sigma_next / sigma) ** 2
    else:
        log_ratio_steps = -np.diff(np.log(alpha / sigma))
        # the first and the last step are of first order
        extrapolate[1:-1] = log_ratio_steps[:-1] / log_ratio_steps[1:] / 2
        coef_at = sigma_next / sigma
    coef_a0 = alpha_next - alpha * coef_at
    return Level(
        t=t,
        alpha=alpha,
        sigma=sigma,
        coef_a0=coef_a0 * (1 + extrapolate),
        coef_last=-coef_a0 * extrapolate,
        coef_at=coef_at,
        std=std,
    )


def sample_actions(args, theta, obs, num_samples, key):
    """Samples of the policy: obs [B, o] -> a0 [B, N, d] in [-1, 1]."""
    act_dim = theta["net"][-1]["b"].size
    shape = (len(obs), num_samples, act_dim)
    k_start, k_steps = jax.random.split(key)

    def denoise(carry, level):
        a_t, last_a0 = carry
        velocity = policy_velocity(args, theta, obs, a_t, level.t)
        a0 = to_a0(a_t, velocity, level.alpha, level.sigma)
        a0 = jnp.clip(a0, -1, 1)
        a_t = level.coef_a0 * a0 + level.coef_last * last_a0 + level.coef_at * a_t
        if args.sampler == "ddpm":
            k_step = jax.random.fold_in(k_steps, level.t)
            a_t += level.std * jax.random.normal(k_step, shape)
        return (a_t, a0), None

    start = (jax.random.normal(k_start, shape), jnp.zeros(shape))
    levels = sampler_levels(args)
    (_, a0), _ = jax.lax.scan(denoise, start, levels, reverse=True)
    return a0


# ---- weights -------------------------------------------------------------------------
def weights(args, q, lam):
    """Eq. (9): q [..., N] and lam [], in reward units -> w [..., N].

    The mean over N is 1, but for qvpo and wd1."""
    n = q.shape[-1]
    q = jax.lax.stop_gradient(q - jnp.max(q, axis=-1, keepdims=True))
    if args.weighting == "exp":  # Example 3.1
        return n * jax.nn.softmax(q / lam, axis=-1)
    if args.weighting == "qvpo":  # Example 3.2 with lam = 0.5; not normalised
        return jax.nn.relu(q - jnp.mean(q, axis=-1, keepdims=True)) / 0.5
    if args.weighting == "wd1":  # Example 3.4; mean 0
        advantage = jax.nn.standardize(q, axis=-1, epsilon=1e-12)
        good = jax.nn.softmax(advantage, axis=-1)
        bad = jax.nn.softmax(-advantage, axis=-1)
        return n * (good - bad)
    power = {"linear": 1, "square": 2, "power": args.power}[args.weighting]
    y = (q - solve_nu(q, lam, power, args.neg_clip)) / lam
    # differs from paper: every power is clipped (5)
    return jnp.maximum(jnp.sign(y) * jnp.abs(y) ** power, args.neg_clip)


# ---- update --------------------------------------------------------------------------
class Batch(NamedTuple):
    """B transitions. terminated is 0 at time limits, where targets bootstrap."""

    obs: np.ndarray  # [B, o]
    next_obs: np.ndarray  # [B, o]
    act: np.ndarray  # [B, d]
    reward: np.ndarray  # [B]
    terminated: np.ndarray  # [B]


class State(NamedTuple):
    """What training changes on the device; theta_old and critics choose actions."""

    theta: dict  # policy: its "net", and "time", the embedding of t
    theta_old: dict  # pi_old of Algorithm 1, a slow copy of theta (1)
    critics: list  # two networks
    critics_target: list
    theta_opt: optax.OptState
    critics_opt: optax.OptState
    log_lam: jax.Array
    step: jax.Array  # updates so far, each of which steps the critics


def policy_optimiser(args):
    """Adam whose rate falls linearly over the run (Table 4)."""
    updates = (args.total_timesteps - args.learning_starts) // args.num_envs
    return optax.adam(
        optax.linear_schedule(
            args.policy_lr, args.policy_lr_end, updates // args.policy_delay
        )
    )


def init_state(args, obs_dim, act_dim, key):
    k_net, k_time, k_critic1, k_critic2 = jax.random.split(key, 4)
    hidden = [args.hidden_dim] * 3
    theta = {
        "net": init_mlp(k_net, [obs_dim + act_dim + EMBEDDING, *hidden, act_dim]),
        "time": init_mlp(k_time, [EMBEDDING, 2 * EMBEDDING, EMBEDDING]),
    }
    sizes = [obs_dim + act_dim, *hidden, 1]
    critics = [init_mlp(k_critic1, sizes), init_mlp(k_critic2, sizes)]
    state = State(
        theta=theta,
        theta_old=theta,
        critics=critics,
        critics_target=critics,
        theta_opt=policy_optimiser(args).init(theta),
        critics_opt=optax.adam(args.critic_lr).init(critics),
        log_lam=jnp.float32(0),
        step=jnp.int32(0),
    )
    return jax.tree.map(jnp.copy, state)  # `update` donates: no array may serve twice


def add_noise(args, a0, updates, key):
    """Samples of pi_old with the noise of exploration after so many updates (2)."""
    share = updates * args.num_envs / (args.total_timesteps - args.learning_starts)
    std = args.noise_start ** (1 - share) * args.noise_end**share
    noise = jax.random.normal(key, a0.shape)
    return jnp.clip(a0 + std * noise, -1, 1)


@functools.partial(jax.jit, static_argnums=(0, 3, 6))
def best_action(args, state, obs, num_samples, key, draw=0, noisy=False):
    """Of samples of pi_old the best by the smaller critic: obs [B, o] -> a0 [B, d].

    Each number `draw` has its own samples."""
    k_sample, k_noise = jax.random.split(jax.random.fold_in(key, draw))
    a0 = sample_actions(args, state.theta_old, obs, num_samples, k_sample)
    if noisy:
        a0 = add_noise(args, a0, state.step, k_noise)
    q = q_values(state.critics, obs, a0).min(axis=0)
    best = q.argmax(axis=-1)
    return jax.vmap(lambda samples, i: samples[i])(a0, best)


def update_critics(args, state, batch, key):
    """critic_steps steps towards r + gamma Q'(next_obs, best of M next actions)."""
    # differs from paper: pi_old's (1) best of M (3), several steps on one batch (4)
    next_act = best_action(args, state, batch.next_obs, args.target_samples, key)
    next_q = q_values(state.critics_target, batch.next_obs, next_act[:, None])
    discount = args.gamma * (1 - batch.terminated[:, None])
    target = args.reward_scale * batch.reward[:, None] + discount * next_q.min(axis=0)

    def critic_loss(critics):
        q = q_values(critics, batch.obs, batch.act[:, None])  # [2, B, 1]
        return jnp.mean((q - target) ** 2, axis=(1, 2)).sum()

    critics = state.critics
    opt = state.critics_opt
    for _ in range(args.critic_steps):
        loss, grads = jax.value_and_grad(critic_loss)(critics)
        updates, opt = optax.adam(args.critic_lr).update(grads, opt)
        critics = optax.apply_updates(critics, updates)
    critics_target = optax.incremental_update(critics, state.critics_target, args.tau)

    metrics = {
        "q": target.mean(),
        "critic_loss": loss,
        "critic_grad_norm": optax.tree.norm(grads),
    }
    state = state._replace(
        critics=critics,
        critics_target=critics_target,
        critics_opt=opt,
    )
    return state, metrics


def matching_loss(theta, args, obs, a0, w, key):
    """Reweighted matching, eq. (7), t uniform: obs [B, o], a0 [B, N, d], w [B, N]."""
    k_t, k_noise = jax.random.split(key)
    t = jax.random.randint(k_t, w.shape, 0, args.diffusion_steps)
    noise = jax.random.normal(k_noise, a0.shape)
    alpha, sigma = jnp.float32(schedule(args.diffusion_steps))[:, t, None]

    a_t = alpha * a0 + sigma * noise
    velocity = policy_velocity(args, theta, obs, a_t, t)
    error = (velocity - to_velocity(a0, noise, alpha, sigma)) ** 2
    # differs from paper: bounded (6); else w < 0 gains without end by pushing away
    error = jnp.minimum(error, args.error_bound)
    return jnp.mean(w * jnp.sum(error, axis=-1))


def update_policy(args, state, obs, key):
    """A step of Algorithm 1 at states obs [B, o] -> state, metrics."""
    k_sample, k_noise, k_loss = jax.random.split(key, 3)

    # Stage I: samples of pi_old and their weights under the signed target measure
    a0 = sample_actions(args, state.theta_old, obs, args.num_samples, k_sample)
    spread = a0.std(axis=1).mean()
    # differs from paper: noise on the samples (2)
    a0 = add_noise(args, a0, state.step, k_noise)
    # differs from paper: the smaller of two critics (7)
    q = q_values(state.critics_target, obs, a0).min(axis=0)  # [B, N]
    w = weights(args, q, jnp.exp(state.log_lam))
    log_lam, kl = update_lam(state.log_lam, q, args.kl_bound)

    # Stage II: the policy is matched to the weighted samples
    loss, grads = jax.value_and_grad(matching_loss)(
        state.theta, args, obs, a0, w, k_loss
    )
    updates, opt = policy_optimiser(args).update(grads, state.theta_opt)
    theta = optax.apply_updates(state.theta, updates)
    # differs from paper: pi_old follows slowly (1)
    theta_old = optax.incremental_update(theta, state.theta_old, args.tau)

    w_squares = jnp.maximum(jnp.sum(w**2, axis=-1), 1e-30)
    metrics = {
        "policy_loss": loss,
        "policy_grad_norm": optax.tree.norm(grads),
        "kl": kl,
        "lam": jnp.exp(log_lam),
        "ess": jnp.mean(jnp.sum(jnp.abs(w), axis=-1) ** 2 / w_squares),
        "spread": spread,
        "w_negative": jnp.mean(w < 0),
    }
    state = state._replace(
        theta=theta,
        theta_old=theta_old,
        theta_opt=opt,
        log_lam=log_lam,
    )
    return state, metrics


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def update(args, with_policy, state, batch, key):
    """One iteration: critics, and the policy if asked -> state, metrics {name: []}.

    `state` is donated: its arrays must not be used afterwards."""
    k_next, k_policy = jax.random.split(jax.random.fold_in(key, state.step))
    state, metrics = update_critics(args, state, batch, k_next)
    if with_policy:  # every policy_delay updates
        state, policy_metrics = update_policy(args, state, batch.obs, k_policy)
        metrics |= policy_metrics
    return state._replace(step=state.step + 1), metrics


# ---- environments and replay ---------------------------------------------------------
def landscape(args, speed, stock):
    """--reward at a speed in m/s, in the place of dm_control's own reward `stock`.

    That is u = speed / v* in cheetah-run and stand (5 u + 1) / 6 in walker-run."""
    if args.reward == "stock":
        return stock
    top_speed = TOP_SPEED[args.env_id]
    # differs from paper: |v - v*| as printed falls with speed (9)
    u = np.clip(speed / top_speed, 0.0, 1.0)
    shape = {
        "sqrt": np.sqrt(u),
        "linear": u,
        "square": u**2,
        "exp": np.exp(top_speed * (u - 1)),
    }[args.reward]
    if args.domain == "cheetah":
        return shape
    return stock * (5 * shape + 1) / (5 * u + 1)


class DMControl(gym.Env):
    """A dm_control task with flat observations. A PhysicsError truncates the episode:
    its last transition repeats the observation, with reward 0, and bootstraps."""

    def __init__(self, args):
        from dm_control import suite  # reads MUJOCO_GL when it is imported

        self.args = args
        flat = {"flat_observation": True}
        self.env = suite.load(args.domain, args.task, environment_kwargs=flat)
        self.metadata = {"render_fps": round(1 / self.env.control_timestep())}
        name = "horizontal_velocity" if args.domain == "walker" else "speed"
        self.speed = getattr(self.env.physics, name, lambda: 0.0)
        spec = self.env.action_spec()
        assert np.max(spec.maximum) < 1e9, "actions must be bounded"
        obs = self.env.observation_spec()["observations"]
        self.action_space = gym.spaces.Box(spec.minimum, spec.maximum, dtype=float)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, obs.shape)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.env.task.random.seed(seed)
        self.obs = self.env.reset().observation["observations"]
        return self.obs, {}

    def step(self, action):
        try:
            now = self.env.step(action)
        except PhysicsError as error:
            print(f"warning: episode cut off: {error}", file=sys.stderr)
            return self.obs, 0.0, False, True, {}
        self.obs = now.observation["observations"]
        reward = landscape(self.args, float(self.speed()), now.reward)
        terminated = now.last() and now.discount == 0  # 1 at a time limit
        return self.obs, reward, terminated, now.last() and not terminated, {}

    def render(self):
        return self.env.physics.render(480, 480, camera_id=0)


def make_envs(args, count, film=False):  # dm_control can always film
    """-> environments stepped in turn, size o of an observation, size d of an action.

    Observations are float32, actions lie in [-1, 1]."""

    def make():
        env = gym.wrappers.DtypeObservation(DMControl(args), np.float32)
        return gym.wrappers.RescaleAction(env, -1.0, 1.0)

    try:
        envs = gym.vector.SyncVectorEnv(
            [make] * count, autoreset_mode=gym.vector.AutoresetMode.DISABLED
        )
        [obs_dim] = envs.single_observation_space.shape
        [act_dim] = envs.single_action_space.shape
    except Exception as error:  # a constructor can raise anything
        raise SystemExit(
            f"error: cannot use {args.env_id}: {error!r};"
            " observations must be flat, actions flat, bounded and real"
        )
    return envs, obs_dim, act_dim


def step_envs(envs, a0):
    """a0 [E, d] -> next_obs [E, o], reward, terminated, ended (each [E]), obs [E, o].

    Where an episode ended a new one begins, and obs is its first observation; elsewhere
    obs is next_obs."""
    next_obs, reward, terminated, truncated, _ = envs.step(a0)
    require_finite(action=a0, observation=next_obs, reward=reward)
    obs = next_obs
    ended = terminated | truncated
    if ended.any():
        obs, _ = envs.reset(options={"reset_mask": ended})
    return next_obs, reward, terminated, ended, obs


def require_finite(**arrays):
    """Ends the run if an array is not finite in float32."""
    for name, array in arrays.items():
        if not (np.abs(array) < 3e38).all():
            print(f"error: {name} is not finite", file=sys.stderr)
            raise SystemExit(3)


def sample_batch(replay, step, rng, batch_size):
    """A Batch of the transitions that `step` environment steps have left."""
    rows = replay[rng.integers(min(step, len(replay)), size=batch_size)]
    return Batch(*(rows[name] for name in Batch._fields))


# ---- evaluation and checkpoints ------------------------------------------------------
def evaluate(args, envs, state, key, step, path, note=""):
    """An episode in each environment, from the same starts every time -> mean return.

    Prints it, adds a row per episode to the CSV at `path`, films the first if asked."""
    obs, _ = envs.reset(seed=EVAL_SEED)
    returns, lengths = np.zeros((2, envs.num_envs))
    running = np.ones(envs.num_envs, bool)
    frames = []
    for t in range(EVAL_STEPS):
        if args.capture_video and running[0]:
            frames.append(envs.envs[0].render())
        a0 = np.asarray(best_action(args, state, obs, args.act_samples, key, t))
        _, reward, _, ended, obs = step_envs(envs, a0)
        returns += reward * running
        lengths += running
        running &= ~ended
        if not running.any():
            break
    tqdm.write(f"step {step}: return {returns.mean():.1f} +- {returns.std():.1f}{note}")
    if args.capture_video:
        fps = envs.envs[0].metadata.get("render_fps", 30)
        imageio.mimsave(path.with_name(f"film-{step}.mp4"), frames, fps=fps)

    # rows of this step and later ones are dropped: a resumed run writes them again
    rows = path.read_text().splitlines()[1:] if path.exists() else []
    rows = [row for row in rows if int(row.split(",")[0]) < step]
    for i in range(envs.num_envs):
        rows.append(f"{step},{i},{returns[i]:.9g},{lengths[i]:.0f}")
    path.write_text("\n".join(["step,episode,return,length", *rows, ""]))
    return returns.mean()


def named_leaves(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def save(path, state, step):
    """Plain arrays; a run killed while it saves keeps its last checkpoint."""
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **named_leaves(state), env_step=step)
    temporary.replace(path)


def load(path, state):
    """-> state, environment step. What the file lacks keeps its value in `state`: a
    shipped checkpoint holds only what acting needs."""
    old = named_leaves(state)
    with np.load(path) as file:
        arrays = old | dict(file)
    leaves = [jnp.reshape(arrays[name], x.shape) for name, x in old.items()]
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    return state, int(arrays["env_step"])


# ---- main ----------------------------------------------------------------------------
def read_args(folder):
    """The flags of a run, from its folder."""
    path = Path(folder) / "args.json"
    saved = json.loads(path.read_text())
    differing = set(saved) ^ set(vars(Args()))
    if differing:
        commit = json.loads(path.with_name("versions.json").read_text())["commit"]
        raise SystemExit(
            f"error: {folder} is of another script or version, commit {commit};"
            f" flags that differ: {', '.join(sorted(differing))}"
        )
    return Args(**saved)


def parse_args():
    """The command line; beside --resume or --evaluate the flags of that run hold."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", "--evaluate", dest="folder")
    known, others = parser.parse_known_args()
    default = None if known.folder is None else read_args(known.folder)
    args = tyro.cli(Args, default=default)
    if args.resume and set(others) - {"--track", "--capture-video"}:
        raise SystemExit("error: --resume takes only --track and --capture-video")
    return args


def make_run_dir(args):
    """A new folder for the files of a run."""
    script = Path(__file__)
    now = time.strftime("%Y%m%d-%H%M%S")
    name = f"{args.env_id}__{script.stem}__{args.seed}__{now}".replace(":", "-")
    run_dir = Path(args.run_dir or f"runs/{name}")
    run_dir.mkdir(parents=True)
    versions = {package.name: package.version for package in distributions()}
    status, commit = subprocess.getstatusoutput(
        f"git -C '{script.parent}' rev-parse HEAD"
    )
    versions["commit"] = None if status else commit
    versions["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    (run_dir / "args.json").write_text(json.dumps(vars(args), indent=2))
    (run_dir / "versions.json").write_text(json.dumps(versions, indent=2))
    return run_dir


def shardings(args):
    """-> shardings of a state, which lies on every device, and of a batch, split over
    the most devices of a CPU that divide it, or on one GPU.

    XLA threads one CPU device badly, so every core is made a device."""
    if jax.config.jax_num_cpu_devices < 0:  # the user has not chosen
        cores = os.cpu_count()
        if hasattr(os, "sched_getaffinity"):  # Linux: those this process may use
            cores = len(os.sched_getaffinity(0))
        jax.config.update("jax_num_cpu_devices", cores)
    most = jax.device_count() if jax.default_backend() == "cpu" else 1
    count = max(n for n in range(1, most + 1) if not args.batch_size % n)
    mesh = jax.sharding.Mesh(jax.devices()[:count], "batch")
    whole = jax.NamedSharding(mesh, jax.P())
    split = jax.NamedSharding(mesh, jax.P("batch"))
    return whole, split


def main():
    # --- Flags and devices ---
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512")  # faster
    jax.config.update("jax_default_matmul_precision", "float32")
    args = parse_args()
    if args.capture_video and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # films without a screen
    whole, split = shardings(args)

    # --- Environments and state ---
    eval_envs, obs_dim, act_dim = make_envs(
        args, args.eval_episodes, args.capture_video
    )
    k_init, k_act, k_update, k_eval = jax.random.split(jax.random.key(args.seed), 4)
    state = init_state(args, obs_dim, act_dim, k_init)
    step = 0
    folder = args.resume or args.evaluate
    if folder:
        run_dir = Path(folder)
        state, step = load(run_dir / "checkpoint.npz", state)
    else:
        run_dir = make_run_dir(args)

    # --- Nothing to train ---
    if args.evaluate:
        evaluate(args, eval_envs, state, k_eval, step, run_dir / "evaluate.csv")
        print(f"evaluate.csv and films are in {run_dir}")
        return
    replay_path = run_dir / "replay.dat"
    if args.resume and not replay_path.exists():
        print(f"{run_dir} is complete, or has no replay; --evaluate plays it")
        return

    # --- Replay: the last transitions, rows of a file with the fields of Batch ---
    lock = (run_dir / "args.json").open()  # held while this file is open
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"error: another process trains in {run_dir}")
    sizes = (obs_dim, obs_dim, act_dim, (), ())
    fields = [(name, np.float32, x) for name, x in zip(Batch._fields, sizes)]
    replay = np.memmap(
        replay_path, fields, "r+" if args.resume else "w+", shape=args.buffer_size
    )
    state = jax.device_put(state, whole)

    # --- Logging ---
    stopped = f"stopped; continue with --resume {run_dir}"
    signal.signal(signal.SIGINT, lambda *_: sys.exit(stopped))  # Ctrl-C
    if args.track:
        import wandb

        wandb.init(
            project="simpo",
            id=run_dir.name,
            resume="allow",
            config=vars(args),
            sync_tensorboard=True,
        )
    writer = SummaryWriter(run_dir, purge_step=step + 1)  # hides later events
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=None)
    bar.write(f"run folder {run_dir}, on {split.num_devices} x {jax.devices()[0]}")
    episodes = []  # returns of training episodes
    training_return = np.nan  # mean of the last 20
    metrics = {}

    # --- Start the episodes; those of a resumed run are new ---
    envs, *_ = make_envs(args, args.num_envs)
    rng = np.random.default_rng([args.seed, step])
    obs, _ = envs.reset(seed=int(rng.integers(EVAL_SEED)))
    returns, lengths = np.zeros((2, args.num_envs))  # of the episodes that run

    while True:
        # --- Save and evaluate ---
        done = step >= args.total_timesteps
        if done or step % args.eval_every < args.num_envs:
            replay.flush()
            writer.flush()
            save(run_dir / "checkpoint.npz", state, step)
            score = evaluate(
                args,
                eval_envs,
                state,
                k_eval,
                step,
                run_dir / "eval.csv",
                f", of training episodes {training_return:.1f}",
            )
            writer.add_scalar("charts/eval_return", score, step)
        if done:
            break

        # --- Act, and update while the environments step ---
        if step >= args.learning_starts:
            a0 = best_action(
                args, state, obs, args.act_samples, k_act, step, noisy=True
            )
            batch = sample_batch(replay, step, rng, args.batch_size)
            batch = jax.device_put(batch, split)
            with_policy = step // args.num_envs % args.policy_delay == 0
            state, new_metrics = update(args, with_policy, state, batch, k_update)
            metrics |= new_metrics
            a0 = np.asarray(a0)  # waits for the action, while the update runs
        else:
            a0 = rng.uniform(-1, 1, (args.num_envs, act_dim)).astype(np.float32)

        # --- Step the environments ---
        last_obs = obs
        next_obs, reward, terminated, ended, obs = step_envs(envs, a0)
        index = (step + np.arange(args.num_envs)) % args.buffer_size
        replay[index] = list(zip(last_obs, next_obs, a0, reward, terminated))
        returns += reward
        lengths += 1
        step += args.num_envs
        bar.update(args.num_envs)

        # --- Log ---
        if ended.any():
            episodes += list(returns[ended])
            training_return = np.mean(episodes[-20:])
            writer.add_scalar("charts/episodic_return", returns[ended].mean(), step)
            writer.add_scalar("charts/episodic_length", lengths[ended].mean(), step)
            returns[ended] = lengths[ended] = 0

        if metrics and step % LOG_EVERY < args.num_envs:
            metrics = jax.device_get(metrics)
            require_finite(**metrics)
            for name, value in metrics.items():
                writer.add_scalar(f"losses/{name}", value, step)
            bar.set_postfix(training_return=training_return)

    # --- End ---
    writer.close()
    replay_path.unlink()  # only a resumed run needs it
    print(f"done: eval.csv, checkpoint.npz and TensorBoard events are in {run_dir}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ImportError) as error:  # of folders, or of --track without wandb
        sys.exit(f"error: {error}")
