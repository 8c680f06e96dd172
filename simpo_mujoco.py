"""SiMPO on MuJoCo: online RL of a diffusion policy by signed reweighted matching (Table 2).

    python simpo_mujoco.py --env-id Hopper-v4 --neg-clip -0.05
    python simpo_mujoco.py --resume runs/NAME       # after an interruption of any kind

Paper: arXiv 2603.10250, Algorithm 1, section 5.2, Table 4. Copy this file and common.py to use it.
Diffusion time t counts T noise levels upwards: a_t = alpha_t a0 + sigma_t noise and
velocity = alpha_t noise - sigma_t a0. Shapes: B states, N samples a state, o observation, d action,
E environments, H hidden units. 1M steps, 30,000 of them random, make 194,000 updates; paper: 200k.

Where the paper is silent, or we depart from it (docs/mujoco.md has the numbers that decided):
1. The N samples come from a slow copy of the policy, pi_old, which also acts and is evaluated, by
   steps of variance beta_t: by the posterior's and its newest self a spread of 0.20 fell to 0.02.
2. Noise that falls from 0.5 to 0.2 is added to them and to actions (Walker2d at 500k: 4,310; to 0.1
   in 30 % of the run: 780). The smaller target critic weights; squared error is bounded.
3. Critic targets take the best of 4 next actions, actions the best of 8, evaluations the best of N.
4. Critics take two steps a batch, copies follow at 0.02: HalfCheetah at 100k 3,772, before 1,681.
5. Every power is clipped, in eq. (11) the linear weight; lam's step is in log space, with a floor.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import imageio.v2 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from tensorboardX import SummaryWriter
from tqdm import tqdm

from common import solve_nu, update_lam

warnings.filterwarnings("ignore", ".*out of date|os.fork")  # the paper's tasks are v4; a film forks
EPISODE_LIMIT = 10_000  # steps of an evaluation episode that nothing else ends


@dataclasses.dataclass(frozen=True)
class Args:
    env_id: str = "Hopper-v4"  # Gymnasium id; module:Name-v0 is looked for in the working directory
    seed: int = 1
    # weights of the samples
    weighting: Literal["exp", "linear", "square", "power", "qvpo", "wd1"] = "linear"  # g in eq. (9)
    neg_clip: float = 0.0  # l in eq. (11): smallest weight; 0 keeps w >= 0, Lin. Neg. is -0.05
    eps_kl: float | None = None  # nats, eq. (30); default 43 % of log N: the paper's 1.5 at N = 32
    power: float = 1.5  # p of --weighting power: w = sign(y) |y|^p
    # diffusion policy
    num_samples: int = 32  # N, weighted samples a state
    diffusion_steps: int = 20  # T, noise levels
    sampling_steps: int = 20  # noise levels that the sampler visits, each a call of the network
    sampler: Literal["ddpm", "dpm2"] = "ddpm"  # dpm2 is deterministic and good with six steps
    target_samples: int = 4  # M: the critics' target takes the best of M next actions
    act_samples: int = 8  # the action taken is the best of so many; an evaluation's, of N
    noise_start: float = 0.5  # std of Gaussian noise on the samples weighted or acted with
    noise_end: float = 0.2  # the same at the last update; geometric in between (or both 0)
    target_action: Literal["best", "mean"] = "best"  # study: of the M next actions
    taken_action: Literal["best", "mean"] = "best"  # study: of act_samples; noise comes after a mean
    clip_noisy: bool = False  # study: samples with noise are clipped to [-1, 1]
    critic_norm: bool = False  # study: LayerNorm without parameters before each Mish of the critics
    updates_per_step: int = 1  # study: of each vector step
    shared_samples: bool = False  # study: pi_old's samples at next_obs serve target and refit
    bf16_sampler: bool = False  # study: hidden products of the sampler in bfloat16
    stop_at: int = 0  # study: end here, with the schedules of total_timesteps
    error_bound: float = 5.0  # on the squared error of an action dimension; ends a repulsion
    # optimisation
    policy_lr: float = 3e-4  # at the first update, then linearly to
    policy_lr_end: float = 3e-5  # at the last one
    critic_lr: float = 3e-4
    critic_steps: int = 2  # of an update, on one batch and its targets, as the authors' DPMD takes
    gamma: float = 0.99  # discount
    tau: float = 0.02  # rate at which the target critics and pi_old follow
    reward_scale: float = 0.2
    batch_size: int = 256  # B
    policy_delay: int = 2  # updates of the critics for one of the policy
    hidden_dim: int = 256  # H, units of each of the 3 hidden layers of policy and critics
    # run
    total_timesteps: int = 1_000_000  # environment steps, over all environments
    learning_starts: int | None = None  # random steps first; default 30_000 or a tenth of the run
    num_envs: int = 5  # environments; one update for each step of all of them
    buffer_size: int = 1_000_000  # the most recent transitions, which batches are drawn from
    eval_every: int = 50_000  # environment steps between evaluations
    eval_episodes: int = 20  # run at once, from the same starts every time
    checkpoint_every: int = 25_000  # environment steps; new episodes begin at each checkpoint
    capture_video: bool = False  # film the first episode of every evaluation
    track: bool = False  # mirror the TensorBoard log to Weights & Biases
    run_dir: str | None = None  # default: runs/{env_id}__simpo_mujoco__{seed}__{time}
    resume: str | None = None  # run folder to continue with its own flags
    evaluate: str | None = None  # run folder to evaluate instead of training

    def __post_init__(self):
        log_n = math.log(max(self.num_samples, 2))
        if self.eps_kl is None:
            object.__setattr__(self, "eps_kl", round(1.5 / math.log(32) * log_n, 6))
        if self.learning_starts is None:
            object.__setattr__(self, "learning_starts", min(30_000, -(-self.total_timesteps // 10)))
        for name, x in vars(self).items():
            least = 1 if type(x) is int and name not in ("seed", "stop_at") else 0
            if type(x) in (int, float) and name != "neg_clip" and not x >= least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {x}")
        first_learning_step = self.learning_starts + self.num_envs
        clipped = self.weighting in ("linear", "square", "power")
        for ok, rule in (  # tyro prints a ValueError as an error of usage
            (self.neg_clip <= 0, "--neg-clip must be at most 0"),
            (clipped or not self.neg_clip, f"--neg-clip is not for --weighting {self.weighting}"),
            (max(self.gamma, self.tau) <= 1, "--gamma and --tau must be at most 1"),
            (self.num_samples > 1, "--num-samples must be at least 2, for weights to compare"),
            (0 < self.eps_kl < log_n, f"--eps-kl must be in (0, log N = {log_n:.3f})"),
            (1 < self.sampling_steps <= self.diffusion_steps, "--sampling-steps must be in [2, T]"),
            (first_learning_step <= self.total_timesteps, "--total-timesteps leaves no update"),
            (self.checkpoint_every <= self.buffer_size, "--checkpoint-every exceeds --buffer-size"),
            ("://" not in (self.run_dir or ""), "--run-dir must be a local folder"),
            (not self.track or find_spec("wandb"), "--track needs pip install wandb"),
        ):
            if not ok:
                raise ValueError(rule)


# ---- networks ----------------------------------------------------------------------------------
@jax.checkpoint  # the backward pass computes it again: it is memory-bound on a CPU
def mish(x):
    """x tanh(softplus(x)), with one exp and one division."""
    e = jnp.exp(jnp.minimum(x, 20.0))
    n = e * (e + 2)
    return x * (n / (n + 2))


def init_mlp(key, sizes):
    """[{"w": [in, out], "b": [out]}, ...]: truncated normal of variance 1 / in, and zeros."""
    init, keys = jax.nn.initializers.lecun_normal(), jax.random.split(key, len(sizes) - 1)
    layers = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [{"w": init(k, (n_in, n_out)), "b": jnp.zeros(n_out)} for k, n_in, n_out in layers]


def mlp(layers, x):
    for layer in layers[:-1]:
        w = layer["w"]  # float32, or the bfloat16 of --bf16-sampler
        x = mish(jnp.matmul(x.astype(w.dtype), w, preferred_element_type=jnp.float32) + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def q_values(critics, obs, act, normed=False):
    """Both critics: obs [B, o], act [B, N, d] -> [2, B, N]."""

    def q_value(net):
        w_obs, w_act = jnp.split(net[0]["w"], [obs.shape[-1]])  # obs @ w_obs: once, not N times
        obs_part = (obs @ w_obs + net[0]["b"])[:, None]  # [B, 1, H]
        if not normed:
            return mlp(net[1:], mish(obs_part + act @ w_act))[..., 0]
        x = mish(jax.nn.standardize(obs_part + act @ w_act, epsilon=1e-5))
        for layer in net[1:-1]:
            x = mish(jax.nn.standardize(x @ layer["w"] + layer["b"], epsilon=1e-5))
        return (x @ net[-1]["w"] + net[-1]["b"])[..., 0]

    return jnp.stack([q_value(net) for net in critics])


def policy_velocity(theta, obs, num_levels):
    """The policy at fixed states: obs [B, o] -> velocity(a_t [B, N, d], t [] or [B, N]) [B, N, d].
    Of its net's first layer, on [obs | a_t | embedding of t], all but a_t's part is made here."""
    first, *rest = theta["net"]
    o, d = obs.shape[-1], rest[-1]["b"].shape[0]
    w_obs, w_act, w_time = jnp.split(first["w"], [o, o + d])
    obs_part = (obs @ w_obs + first["b"])[:, None]  # [B, 1, H]
    phase = jnp.outer(jnp.arange(1.0, num_levels + 1), 10_000.0 ** -jnp.linspace(0, 1, 8))
    embedding = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)  # [T, 16]
    time_part = mlp(theta["time"], embedding) @ w_time  # [T, H]

    def velocity(a_t, t):
        return mlp(rest, mish(obs_part + a_t @ w_act + time_part[t]))

    return velocity


# ---- diffusion ---------------------------------------------------------------------------------
def cosine_alpha_bar(num_levels):
    """Table 4: alpha_t^2 = 1 - sigma_t^2 at the T levels, falling (Nichol and Dhariwal, eq. 17)."""
    f = np.cos((np.arange(num_levels + 1) / num_levels + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))


def sampler_steps(sampler, num_levels, num_visited):
    """The levels visited, upwards and denser at low noise, and the step down from each of them:
        a_next = coef_a0 a0 + coef_last (a0 predicted one level above) + coef_at a_t + std noise.

    ddpm: Ho et al. (2006.11239) with variance beta_t, none in the last step. dpm2: Lu et al.
    (2211.01095), DPM-Solver++(2M). -> the level's index, alpha, sigma and the coefficients."""
    i = np.arange(num_visited)
    t = np.round(i + (num_levels - num_visited) * (i / (num_visited - 1)) ** 1.7).astype(np.int32)
    bar = cosine_alpha_bar(num_levels)[t]
    bar_next = np.append(1.0, bar[:-1])
    alpha, sigma, std, extrapolate = np.sqrt(bar), np.sqrt(1 - bar), 0 * bar, 0 * bar
    coef_at = np.sqrt(1 - bar_next) / sigma
    if sampler == "ddpm":
        coef_at *= coef_at * alpha / np.sqrt(bar_next)
        std[1:] = np.sqrt(1 - bar / bar_next)[1:]
    else:
        h = -np.diff(np.log(alpha / sigma))
        extrapolate[1:-1] = h[:-1] / h[1:] / 2  # the first step and the last are of first order
    coef_a0 = np.sqrt(bar_next) - alpha * coef_at
    rows = (alpha, sigma, (1 + extrapolate) * coef_a0, -extrapolate * coef_a0, coef_at, std)
    return t, *(row.astype(np.float32) for row in rows)


def sample_actions(args, theta, obs, num_samples, key):
    """Samples of the policy: obs [B, o] -> a0 [B, N, d] in [-1, 1]."""
    if args.bf16_sampler:
        first, *hidden, last = theta["net"]
        hidden = [layer | {"w": layer["w"].astype(jnp.bfloat16)} for layer in hidden]
        theta = theta | {"net": [first, *hidden, last]}
    velocity = policy_velocity(theta, obs, args.diffusion_steps)
    shape = len(obs), num_samples, theta["net"][-1]["b"].shape[0]
    k_start, k_steps = jax.random.split(key)

    def denoise(carry, level):
        (a_t, last_a0), (t, alpha, sigma, coef_a0, coef_last, coef_at, std) = carry, level
        a0 = jnp.clip(alpha * a_t - sigma * velocity(a_t, t), -1, 1)
        a_t = coef_a0 * a0 + coef_last * last_a0 + coef_at * a_t
        if args.sampler == "ddpm":
            a_t += std * jax.random.normal(jax.random.fold_in(k_steps, t), shape)
        return (a_t, a0), None

    levels = sampler_steps(args.sampler, args.diffusion_steps, args.sampling_steps)
    start = jax.random.normal(k_start, shape), jnp.zeros(shape)
    return jax.lax.scan(denoise, start, levels, reverse=True)[0][1]  # the last a0 predicted


# ---- weights -----------------------------------------------------------------------------------
def weights(args, q, lam):
    """Eq. (9): q [B, N] and lam [], in reward units -> w [B, N] of mean 1 over N; no gradient."""
    n, q = q.shape[-1], jax.lax.stop_gradient(q - jnp.max(q, axis=-1, keepdims=True))
    if args.weighting == "exp":  # Example 3.1
        return n * jax.nn.softmax(q / lam, axis=-1)
    if args.weighting == "qvpo":  # Example 3.2, but w = y as in Table 1; not normalised
        return jax.nn.relu(q - jnp.mean(q, axis=-1, keepdims=True)) / 0.5
    if args.weighting == "wd1":  # Example 3.4; mean 0
        advantage = jax.nn.standardize(q, axis=-1, epsilon=1e-12)
        return n * (jax.nn.softmax(advantage, axis=-1) - jax.nn.softmax(-advantage, axis=-1))
    power = {"linear": 1, "square": 2, "power": args.power}[args.weighting]
    y = (q - solve_nu(q, lam, power, args.neg_clip)) / lam
    return jnp.maximum(jnp.sign(y) * jnp.abs(y) ** power, args.neg_clip)


# ---- update ------------------------------------------------------------------------------------
class State(NamedTuple):
    """Everything that training changes on the device. The first three play a trained policy."""

    theta_old: dict  # pi_old of Algorithm 1, which is sampled: it follows theta slowly
    critics: list  # two networks
    step: jax.Array  # updates of the critics so far
    theta: dict | None = None  # policy: its "net", and "time", the embedding of t
    critics_target: list | None = None
    theta_opt: optax.OptState | None = None
    critics_opt: optax.OptState | None = None
    log_lam: jax.Array | None = None


def optimisers(args):
    """Adam for the policy, its rate annealed over the run (Table 4), and for the critics."""
    updates = (args.total_timesteps - args.learning_starts) // args.num_envs
    updates *= args.updates_per_step
    steps = max(math.ceil(updates / args.policy_delay) - 1, 1)  # from the first rate to the last
    policy_lr = optax.linear_schedule(args.policy_lr, args.policy_lr_end, steps)
    return optax.adam(policy_lr), optax.adam(args.critic_lr)


def init_state(args, obs_dim, act_dim, key):
    k_net, k_time, *k_critics = jax.random.split(key, 4)
    hidden, embedding = [args.hidden_dim] * 3, 16
    net = init_mlp(k_net, [obs_dim + act_dim + embedding, *hidden, act_dim])
    theta = {"net": net, "time": init_mlp(k_time, [embedding, 2 * embedding, embedding])}
    critics = [init_mlp(k, [obs_dim + act_dim, *hidden, 1]) for k in k_critics]
    copies = jax.tree.map(jnp.copy, (theta, critics))  # donated buffers must not be shared
    opts = [adam.init(x) for adam, x in zip(optimisers(args), (theta, critics), strict=True)]
    return State(copies[0], critics, jnp.int32(0), theta, copies[1], *opts, jnp.zeros(()))


def noise_std(args, step):
    """Std of the noise on samples of pi_old after `step` updates."""
    share = step * args.num_envs / args.updates_per_step / (args.total_timesteps - args.learning_starts)
    return args.noise_start ** (1 - share) * args.noise_end**share


# lam for which KL(softmax(q / lam) || uniform) of n standardised normal q is 43 % of log n
STANDARD_LAM = {4: 0.696, 8: 0.564}


@functools.partial(jax.jit, static_argnums=(0, 3, 6, 7))
def best_action(args, state, obs, num_samples, key, step=0, noisy=False, choice="best"):
    """An action from some samples of pi_old: obs [B, o] -> [B, d]. best: by the smaller critic;
    mean: under the weights of eq. (9); standardised: the same of q standardised per state."""
    k_sample, k_noise = jax.random.split(jax.random.fold_in(key, step))
    a0 = sample_actions(args, state.theta_old, obs, num_samples, k_sample)
    std = noise_std(args, state.step)
    if noisy and choice == "best":
        a0 += std * jax.random.normal(k_noise, a0.shape)
        if args.clip_noisy:
            a0 = jnp.clip(a0, -1, 1)
    return choose(args, state, obs, a0, choice, std if noisy else 0.0, k_noise)


def choose(args, state, obs, a0, choice, std=0.0, key=None):
    q = q_values(state.critics, obs, a0, args.critic_norm).min(axis=0)
    if choice == "best":
        best = jnp.argmax(q, axis=-1)
        return jnp.take_along_axis(a0, best[:, None, None], axis=1)[:, 0]
    lam = jnp.exp(state.log_lam)
    if choice == "standardised":
        q, lam = jax.nn.standardize(q, axis=-1, epsilon=1e-12), STANDARD_LAM[q.shape[-1]]
    action = jnp.mean(weights(args, q, lam)[..., None] * a0, axis=1)
    if key is not None:
        action += std * jax.random.normal(key, action.shape)
    return jnp.clip(action, -1, 1)


def matching_loss(theta, args, obs, a0, w, key):
    """Reweighted matching, eq. (7), at uniform t: obs [B, o], a0 [B, N, d], w [B, N]."""
    k_t, k_noise = jax.random.split(key)
    t = jax.random.randint(k_t, w.shape, 0, args.diffusion_steps)
    alpha_bar = jnp.asarray(cosine_alpha_bar(args.diffusion_steps), jnp.float32)[t][..., None]
    alpha, sigma = jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)
    noise = jax.random.normal(k_noise, a0.shape)
    velocity = policy_velocity(theta, obs, args.diffusion_steps)(alpha * a0 + sigma * noise, t)
    error = (velocity - (alpha * noise - sigma * a0)) ** 2
    return jnp.mean(w * jnp.sum(jnp.minimum(error, args.error_bound), axis=-1))


def update_policy(args, state, obs, key, a0=None):
    """Samples of pi_old, their weights, lam by its dual, and matching -> state, metrics."""
    k_sample, k_noise, k_loss = jax.random.split(key, 3)
    if a0 is None:
        a0 = sample_actions(args, state.theta_old, obs, args.num_samples, k_sample)
    spread = a0.std(axis=1).mean()
    a0 += noise_std(args, state.step) * jax.random.normal(k_noise, a0.shape)
    if args.clip_noisy:
        a0 = jnp.clip(a0, -1, 1)
    q = q_values(state.critics_target, obs, a0, args.critic_norm).min(axis=0)  # [B, N]
    w = weights(args, q, jnp.exp(state.log_lam))
    log_lam, kl = update_lam(state.log_lam, q, args.eps_kl)
    loss, grads = jax.value_and_grad(matching_loss)(state.theta, args, obs, a0, w, k_loss)
    updates, opt = optimisers(args)[0].update(grads, state.theta_opt)
    theta = optax.apply_updates(state.theta, updates)
    old = optax.incremental_update(theta, state.theta_old, args.tau)
    ess = jnp.sum(jnp.abs(w), axis=-1) ** 2 / jnp.maximum(jnp.sum(w**2, axis=-1), 1e-30)
    metrics = {"policy_loss": loss, "policy_grad_norm": optax.tree.norm(grads), "kl": kl}
    metrics |= {"lam": jnp.exp(log_lam), "ess": ess.mean(), "spread": spread}
    metrics |= {"w_max": w.max(), "w_negative": jnp.mean(w < 0)}
    return state._replace(theta=theta, theta_old=old, theta_opt=opt, log_lam=log_lam), metrics


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def update(args, with_policy, state, batch, key):
    """One iteration of Algorithm 1 on replay rows [B, 2 o + d + 2] -> state, metrics {name: []}.
    The state passed in is donated: its arrays must not be used afterwards."""
    d = state.theta["net"][-1]["b"].shape[0]
    o = (batch.shape[-1] - d - 2) // 2
    obs, next_obs, act, reward, terminated = jnp.split(batch, np.cumsum([o, o, d, 1]), axis=-1)
    k_next, k_policy = jax.random.split(jax.random.fold_in(key, state.step))

    shared = None
    if args.shared_samples:
        count = args.num_samples if with_policy else args.target_samples
        shared = sample_actions(args, state.theta_old, next_obs, count, k_next)
        few = shared[:, : args.target_samples]
        next_act = choose(args, state, next_obs, few, args.target_action)
    else:
        next_act = best_action(
            args, state, next_obs, args.target_samples, k_next, choice=args.target_action
        )
    next_q = q_values(state.critics_target, next_obs, next_act[:, None], args.critic_norm).min(axis=0)
    target = args.reward_scale * reward + args.gamma * (1 - terminated) * next_q  # [B, 1]

    def critic_loss(critics):
        q = q_values(critics, obs, act[:, None], args.critic_norm)  # [2, B, 1]
        return jnp.mean((q - target) ** 2, axis=(1, 2)).sum()

    critics, critics_opt = state.critics, state.critics_opt
    for _ in range(args.critic_steps):
        loss, grads = jax.value_and_grad(critic_loss)(critics)
        updates, critics_opt = optimisers(args)[1].update(grads, critics_opt)
        critics = optax.apply_updates(critics, updates)
    critics_target = optax.incremental_update(critics, state.critics_target, args.tau)
    metrics = {"q": target.mean(), "critic_loss": loss, "critic_grad_norm": optax.tree.norm(grads)}
    state = state._replace(critics=critics, critics_target=critics_target, critics_opt=critics_opt)
    if with_policy:  # every policy_delay updates
        state, policy_metrics = update_policy(
            args, state, next_obs if args.shared_samples else obs, k_policy, shared
        )
        metrics |= policy_metrics
    return state._replace(step=state.step + 1), metrics


# ---- environments and replay -------------------------------------------------------------------
class Checked(gym.Wrapper):
    """Takes actions in [-1, 1] and returns fresh float32 arrays, for an environment may reuse its
    own. A simulation that blew up, which MuJoCo starts again without a word, is truncated: its last
    state follows itself with reward 0, and so bootstraps."""

    def __init__(self, env, index):
        super().__init__(env)
        obs, act, self.index, self.steps = env.observation_space, env.action_space, index, 0
        self.data = env.unwrapped.data if hasattr(env.unwrapped, "mujoco_renderer") else None
        if self.data and env.unwrapped.model.ncam:
            env.unwrapped.mujoco_renderer.camera_id = 0  # follows; Gymnasium 1.4's own does not
        flat = all(isinstance(x, gym.spaces.Box) and len(x.shape) == 1 for x in (obs, act))
        bound = np.abs([act.low, act.high]).max(initial=0) if flat else np.inf  # dm_control's: 1e10
        if not (flat and act.dtype.kind == "f" and act.shape[0] and bound < 1e10):
            env.close()
            fail(f"needs flat spaces and bounded actions, not {obs}, {act}; see FlattenObservation")

    def read(self, name, value, shape):
        value = np.array(value, np.float64)
        if value.shape != shape or not (abs(value) <= np.finfo(np.float32).max).all():
            what = "not finite in float32" if value.shape == shape else f"of shape {value.shape}"
            fail(f"{name} of environment {self.index} after {self.steps} steps is {what}", 1)
        return value.astype(np.float32)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            np.random.seed(seed)  # some environments draw from numpy's global generator
        obs, _ = self.env.reset(seed=seed, options=options)
        self.obs = self.read("first observation", obs, self.observation_space.shape)
        return self.obs, {}

    def step(self, a0):
        self.steps, space = self.steps + 1, self.env.action_space
        a0 = self.read("action", a0, space.shape).astype(space.dtype)
        action = np.clip(space.low + (a0 + 1) / 2 * (space.high - space.low), space.low, space.high)
        before = self.data.time if self.data else None
        obs, reward, terminated, truncated, _ = self.env.step(action)
        if self.data and self.data.time <= before:
            print("warning: episode cut off: the simulation is unstable", file=sys.stderr)
            return self.obs, 0.0, False, True, {}
        self.obs = self.read("observation", obs, self.observation_space.shape)
        reward = self.read("reward", reward[0] if np.shape(reward) == (1,) else reward, ())
        return self.obs, float(reward), bool(terminated), bool(truncated), {}


def make_env(args, index, film):
    return Checked(gym.make(args.env_id, disable_env_checker=True, **film), index)


def make_envs(args, evaluation=False):
    """Environments stepped in turn, to train or evaluate. A step that ends an episode returns the
    next one's first observation; its own last one is in infos["final_obs"]."""
    film = {"render_mode": "rgb_array"} if evaluation and args.capture_video else {}
    count = args.eval_episodes if evaluation else args.num_envs
    thunks = [functools.partial(make_env, args, i, film if i == 0 else {}) for i in range(count)]
    try:
        return gym.vector.SyncVectorEnv(thunks, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    except (gym.error.Error, ImportError, RuntimeError, TypeError, ValueError) as error:
        fail(f"cannot make the environment{' for --capture-video' if film else ''}: {error}")


class Replay:
    """The last buffer_size transitions [obs | next_obs | act | reward | terminated], in a file of
    twice that, so that a resumed run finds every row it may still sample."""

    def __init__(self, args, path, width, written):
        rows = min(2 * args.buffer_size, args.total_timesteps) + args.num_envs
        try:
            if not written:  # a disk too full is known now, not in hours
                np.zeros((rows, width), np.float32).tofile(path)
            self.rows = np.memmap(path, np.float32, "r+", shape=(rows, width))
        except (OSError, MemoryError) as error:
            fail(f"no replay {path}, {rows * width * 4e-9:.2f} GB (none once complete): {error}")
        self.limit, self.written = args.buffer_size, written

    def add(self, *columns):
        rows = np.concatenate([x.reshape(len(x), -1) for x in columns], axis=1)
        self.rows[(self.written + np.arange(len(rows))) % len(self.rows)] = rows
        self.written += len(rows)

    def sample(self, rng, batch_size):
        age = rng.integers(min(self.written, self.limit), size=batch_size)
        return self.rows[(self.written - 1 - age) % len(self.rows)]


# ---- evaluation and checkpoints ----------------------------------------------------------------
def evaluate(args, envs, state, key, step, run_dir, stop, choice="best"):
    """An episode of each environment, best of N, the same starts every time, the first one filmed.
    -> rows [E, 4] of eval.csv: step, episode, return, length. Exits once `stop` is not empty."""
    (obs, _), count, film = envs.reset(seed=2**31), envs.num_envs, None  # training: below 2**30
    returns, lengths, running = np.zeros(count), np.zeros(count), np.ones(count, bool)
    for t in range(EPISODE_LIMIT):
        try:
            if t == 0 and args.capture_video:
                fps = envs.envs[0].metadata.get("render_fps", 30)
                film = imageio.get_writer(run_dir / f"film-{step}.mp4", fps=fps)
            if film and running[0]:
                film.append_data(envs.envs[0].render())
        except Exception as error:  # of a driver, an encoder, a full disk
            if t == 0 and (step == 0 or args.evaluate):  # before any training
                fail(f"--capture-video: {type(error).__name__}: {error}")
            print(f"warning: no film: {error}", file=sys.stderr)
            film = None
        a0 = best_action(args, state, obs, args.num_samples, key, t, False, choice)
        obs, reward, terminated, truncated, _ = envs.step(np.asarray(a0))
        returns, lengths = returns + reward * running, lengths + running
        running &= ~(terminated | truncated)
        if stop:
            sys.exit(128 + stop[0])
        if not running.any():
            break
    if film:
        film.close()
    return np.column_stack([np.full(count, step), np.arange(count), returns, lengths])


def write_rows(path, rows):
    """Adds an evaluation to a CSV file, in the place of rows from its step on -> its summary."""
    old = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2) if path.exists() else rows[:0]
    both, header = np.concatenate([old[old[:, 0] < rows[0, 0]], rows]), "step,episode,return,length"
    np.savetxt(path.with_suffix(".tmp"), both, "%d,%d,%.6f,%d", header=header, comments="")
    path.with_suffix(".tmp").replace(path)
    return f"step {rows[0, 0]:.0f}: return {rows[:, 2].mean():.1f} +- {rows[:, 2].std():.1f}"


def save(path, state, step):
    """Plain arrays, atomically: a run killed while it saves keeps its last checkpoint."""
    leaves = {jax.tree_util.keystr(k): np.asarray(x) for k, x in jax.tree.leaves_with_path(state)}
    np.savez(path.with_suffix(".tmp.npz"), **leaves, env_step=step)
    path.with_suffix(".tmp.npz").replace(path)


def load(path, template):
    """-> state with the tree and shapes of `template`, environment step."""
    names = [jax.tree_util.keystr(k) for k, _ in jax.tree.leaves_with_path(template)]
    try:
        with np.load(path) as file:
            arrays, step = [file[name] for name in names], int(file["env_step"])
        if [x.shape for x in arrays] != [x.shape for x in jax.tree.leaves(template)]:
            raise ValueError("its networks have other sizes")
        return jax.device_put(jax.tree.unflatten(jax.tree.structure(template), arrays)), step
    except Exception as error:  # a damaged file can raise anything
        fail(f"no usable checkpoint in {path}: {error}")


# ---- main --------------------------------------------------------------------------------------
def fail(message, code=2):
    """One line, and an exit code: 2 for bad usage, 1 for a run that cannot go on."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(code)


def parse_args():
    """-> args, and the folder of --resume or --evaluate, whose flags are then the defaults."""
    args = tyro.cli(Args)
    if not (folder := args.resume or args.evaluate):
        return args, None
    try:
        saved = Args(**json.loads((Path(folder) / "args.json").read_text()))
    except (OSError, TypeError, ValueError) as error:
        fail(f"{folder} is no run folder: {error}")
    args = tyro.cli(Args, default=saved)
    free = "resume capture_video track eval_every eval_episodes checkpoint_every".split()
    for name, value in vars(saved).items() if args.resume else ():
        if getattr(args, name) != value and name not in free:
            fail(f"--{name.replace('_', '-')} must stay {value}: the run and its schedules need it")
    if not os.access(folder, os.W_OK):
        fail(f"{folder} is read-only")
    return args, Path(folder)


def create_run_dir(args, suffix=""):
    """A folder that no other run has, with args.json and versions.json."""
    name = f"{args.env_id}__simpo_mujoco__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}{suffix}"
    run_dir = Path(args.run_dir or "runs/" + name.replace("/", "-").replace(":", "-"))
    try:
        run_dir.mkdir(parents=True)
    except OSError as error:
        if isinstance(error, FileExistsError) and not args.run_dir:
            return create_run_dir(args, f"{suffix}+")
        fail(f"--run-dir {run_dir}: {error.strerror}; --resume goes on with a run")
    versions = {x: version(x) for x in ("jax", "optax", "numpy", "gymnasium", "mujoco")}
    versions["commit"] = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD")
    (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
    (run_dir / "versions.json").write_text(json.dumps(versions, indent=2))
    return run_dir


def train(args, run_dir, envs, replay, state, keys, step, stop):
    """The loop of Algorithm 1. At each checkpoint new episodes begin and the generator is seeded
    anew, as in a run resumed from there, so that the two are equal bit for bit."""
    k_act, k_update, k_eval = keys
    devices = jax.devices()  # a batch is split over all cores, or stays on one GPU
    count = math.gcd(len(devices), args.batch_size) if devices[0].platform == "cpu" else 1
    mesh = jax.sharding.Mesh(np.array(devices[:count]), ("batch",))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    split = NamedSharding(mesh, PartitionSpec("batch"))
    print(f"run folder {run_dir}, on {count} x {devices[0].device_kind}", flush=True)
    if args.track:
        import wandb

        wandb.init(project="simpo", id=run_dir.name, resume="allow", sync_tensorboard=True)
    log = SummaryWriter(str(run_dir), purge_step=step + 1)
    log.add_text("args", "\n".join(f"    {name}: {x}" for name, x in vars(args).items()))
    bar, clock, speed, first = tqdm(disable=True), None, "", True
    logged, latest = 0, {}
    start = updates = int(state.step)
    while True:
        done = step >= (args.stop_at or args.total_timesteps)
        evaluation_due = done or step % args.eval_every < args.num_envs
        if first or stop or evaluation_due or step % args.checkpoint_every < args.num_envs:
            replay.rows.flush()
            save(run_dir / "checkpoint.npz", state, step)
            if stop:
                sys.exit(128 + stop[0])
            if evaluation_due:
                with contextlib.closing(make_envs(args, evaluation=True)) as others:
                    rows = evaluate(args, others, state, k_eval, step, run_dir, stop)
                bar.write(write_rows(run_dir / "eval.csv", rows) + speed)
                log.add_scalar("charts/eval_return", rows[:, 2].mean(), step)
                for choice in ("mean", "standardised"):
                    with contextlib.closing(make_envs(args, evaluation=True)) as others:
                        rows = evaluate(args, others, state, k_eval, step, run_dir, stop, choice)
                    bar.write(f"{choice}: " + write_rows(run_dir / f"eval_{choice}.csv", rows))
            if done:
                break
            rng = np.random.default_rng([args.seed, step])
            (obs, _), returns, first = envs.reset(seed=int(rng.integers(2**30))), 0.0, False

        # act and update; the device goes on with the update while the environments step
        learning = step >= args.learning_starts
        if learning:
            if updates == start:
                bar.write("compiling, which takes a minute; Ctrl-C is answered after it")
            a0 = best_action(
                args, state, obs, args.act_samples, k_act, step, True, args.taken_action
            )
            for _ in range(args.updates_per_step):
                batch = jax.device_put(replay.sample(rng, args.batch_size), split)
                with_policy = updates % args.policy_delay == 0
                state, metrics = update(args, with_policy, state, batch, k_update)
                updates += 1
                latest |= metrics
            a0 = np.asarray(a0)
        else:
            a0 = rng.uniform(-1, 1, envs.action_space.shape).astype(np.float32)
        next_obs, reward, terminated, truncated, infos = envs.step(a0)
        last_obs, returns, step = next_obs.copy(), returns + reward, step + args.num_envs
        for i in np.flatnonzero(terminated | truncated):
            last_obs[i] = infos["final_obs"][i]
            log.add_scalar("charts/episodic_return", returns[i], step)
            returns[i] = 0
        replay.add(obs, last_obs, a0, reward, terminated)  # truncation bootstraps: not stored
        obs = next_obs
        bar.update(args.num_envs)

        if learning and clock is None and updates - start >= args.policy_delay:  # all is compiled
            bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=None)
            clock, clock_step = time.time(), step
        elif clock and (updates - 1) // (200 * args.policy_delay) > logged:
            logged = (updates - 1) // (200 * args.policy_delay)
            for name, value in latest.items():  # reading one waits for the device
                log.add_scalar(f"losses/{name}", float(value), step)
                if not math.isfinite(value) or name.endswith("grad_norm") and value > 1e6:
                    fail(f"diverged: {name} is {value:.3g} at step {step}", 1)
            sps = (step - clock_step) / (time.time() - clock)
            log.add_scalar("charts/SPS", sps, step)
            hours, first_time = (args.total_timesteps - step) / sps / 3600, not speed
            speed = f", {sps:.0f} steps a second, {hours:.1f} hours left"
            if first_time:
                bar.write(f"step {step}{speed}")
    log.close()
    Path(replay.rows.filename).unlink()  # only a resumed run needs it


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # --help | head ends quietly
    sys.path.append(os.getcwd())  # for --env-id module:Name-v0
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_default_matmul_precision", "float32")  # a GPU would keep ten bits
    if jax.config.jax_num_cpu_devices < 0:  # XLA threads one CPU device badly: make one a core
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", cores)
    args, run_dir = parse_args()
    if args.capture_video and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen
    stop, step = [], 0
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: stop.append(signum))
    with contextlib.closing(make_envs(args, evaluation=bool(args.evaluate))) as envs:
        k_init, *keys = jax.random.split(jax.random.key(args.seed), 4)
        (o,), (d,) = envs.single_observation_space.shape, envs.single_action_space.shape
        state = init_state(args, o, d, k_init)
        if args.evaluate:  # a checkpoint may lack what only training needs
            state = State(state.theta_old, state.critics, state.step)
        if run_dir:
            state, step = load(run_dir / "checkpoint.npz", state)
        if not args.evaluate:
            run_dir = run_dir or create_run_dir(args)
            replay = Replay(args, run_dir / "replay.dat", 2 * o + d + 2, step)
            return train(args, run_dir, envs, replay, state, keys, step, stop)
        rows = evaluate(args, envs, state, keys[2], step, run_dir, stop)
    print(write_rows(run_dir / "evaluate.csv", rows))


if __name__ == "__main__":
    main()
