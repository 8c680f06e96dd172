"""SiMPO on a one-dimensional bandit: figures 2 and 3 of the paper and its section 3.4.

    python simpo_bandit.py

Paper: arXiv 2603.10250, section 5.1. Copy this file and common.py. 20 seeds take a minute or two on
two cores. Time runs from t = 0 (action) to t = 1 (noise), a_t = (1 - t) a0 + t noise and
vel = noise - a0. Legend: S seeds, N samples. Rewards (the paper has only pictures of them), with
b(a; m, s) = exp(-(a - m)^2 / (2 s^2)) and a in [-2, 2]:
    escape  R = 0.7 b(a; -1, 0.4) + b(a; 1.5, 0.4)   policy starts as N(-1, 0.8^2)
    broad   R = b(a; -1, 0.7) + b(a; 1, 0.7)         policy starts as N(0, 0.6^2)
    sharp   R = b(a; -1, 0.03) + b(a; 1, 0.03)       policy starts as N(0, 0.6^2)
Where the paper is silent, or we depart from it:
1. Rewards are standardised; lam is a constant, or follows its dual with --eps-kl.
2. Gaussian noise on the samples the policy is refitted to falls to 0 over the run; without it any
   policy collapses to a point within some epochs.
3. The clip l of Lin. Neg. starts at -0.6, not -0.05, and rises to 0 over half of the run. Gradients
   are clipped, since with negative weights the loss has no lower bound.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import platform
import re
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

# One XLA device per core and the batch split over them: XLA threads a single CPU device badly.
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    flag = f"--xla_force_host_platform_device_count={min(cores, 8)}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from common import solve_nu, update_lam

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

BOX = 2.0  # actions are clipped to [-BOX, BOX]
FINAL_SAMPLES = 1024  # for each seed, of the trained policy
INIT, TRAIN, FINAL = range(3)  # what a seed's key is folded with, for three independent streams
LABELS = {"linear": "Linear", "square": "Square", "exp": "Exp", "linear_neg": "Lin. Neg."}


class UsageError(Exception):
    """Bad input. `main` prints it as one line and exits with code 2."""


class Diverged(Exception):
    """The run cannot go on: a quantity is not finite or has exploded."""


# ---- Args -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args:
    # --- weighting ---
    weighting: Literal["all", "exp", "linear", "square", "wd1"] = "all"
    """g in eq. (9); all draws the curves of the paper's figure"""
    neg_clip: float | None = None
    """l in eq. (11) at the first epoch, in units of w; default -0.6 for the Lin. Neg. of figure 2,
    -0.2 for the field, else none; beside --weighting linear or square, that one's own"""
    neg_until: float = 0.5
    """fraction of the epochs over which l rises to 0, linearly; inf keeps it constant"""
    # --- run ---
    figure: Literal["2", "3", "field", "all"] = "all"
    """figure of the paper, or the velocity fields of section 3.4"""
    seed: int = 1
    """first seed; each seed is a policy and samples of its own"""
    num_seeds: int = 20
    """seeds, trained at once"""
    run_dir: str | None = None
    """folder of this run; default runs/bandit__simpo_bandit__{seed}__{time}"""
    # --- env ---
    landscape: Literal["escape", "broad", "sharp"] | None = None
    """one reward of figures 2 and 3; default all of --figure"""
    # --- lam ---
    lam: float = 0.25
    """lambda in eq. (9), in standard deviations of the N rewards"""
    eps_kl: float | None = None
    """epsilon in eq. (30), nats: lam starts at --lam and follows its dual; below log N"""
    # --- diffusion ---
    num_samples: int = 64
    """N, samples an epoch"""
    sampling_steps: int = 20
    """Euler steps of the ODE from t = 1 to 0"""
    noise: float = 0.4
    """std of the noise on the samples trained on at the first epoch; falls to 0, linearly"""
    policy_lr: float = 2e-3
    """Adam's rate"""
    # --- budget ---
    epochs: int | None = None
    """refits of the policy to its own samples; default 200 for escape, 100 for broad and sharp"""
    grad_steps: int = 32
    """gradient steps an epoch, on all N samples"""
    hidden_dim: int = 64
    """H, units of both hidden layers"""

    def __post_init__(self):
        log_n = math.log(max(self.num_samples, 1))
        clipped = ("all", "linear", "square")
        figure = {"escape": "2", "broad": "3", "sharp": "3"}.get(self.landscape, self.figure)
        for names, ok, rule in (
            ("num_seeds sampling_steps grad_steps hidden_dim", lambda x: x >= 1, "at least 1"),
            ("epochs", lambda x: x is None or x >= 1, "at least 1"),
            ("noise", lambda x: 0 <= x < math.inf, "finite and at least 0"),
            ("lam policy_lr", lambda x: 0 < x < math.inf, "finite and above 0"),
            ("neg_until", lambda x: x > 0, "above 0"),
            ("seed", lambda x: 0 <= x <= 2**32 - self.num_seeds, "at least 0, the last < 2^32"),
            ("num_samples", lambda x: x >= 2, "at least 2, for weights to compare"),
            ("eps_kl", lambda x: x is None or 0 < x < log_n, f"in (0, log N), log N = {log_n:.3f}"),
            ("neg_clip", lambda x: x is None or -math.inf < x <= 0, "finite and at most 0"),
            ("neg_clip", lambda x: not x or self.weighting in clipped, f"0 for {self.weighting}"),
            ("weighting", lambda x: x == "all" or self.figure != "field", "all for the field"),
            ("landscape", lambda x: self.figure in ("all", figure), f"left to --figure {figure}"),
            ("landscape", lambda x: x is None or self.figure != "field", "left out with field"),
        ):
            for name in names.split():
                value = getattr(self, name)
                if not ok(value):
                    raise UsageError(f"--{name.replace('_', '-')} must be {rule}, got {value}")


class Method(NamedTuple):
    """One curve; what `weights` reads."""

    weighting: str
    neg_clip: float
    power: None = None

    @property
    def name(self):
        return self.weighting + ("_neg" if self.neg_clip else "")


def methods(args, figure):
    """The curves of a figure: the paper's, or the one that --weighting asks for."""
    if args.weighting != "all":
        return [Method(args.weighting, args.neg_clip or 0.0)]
    default = -0.6 if figure == "2" else 0.0
    neg_clip = default if args.neg_clip is None else args.neg_clip
    signed = [Method("linear", neg_clip)] if neg_clip else []
    return [Method(weighting, 0.0) for weighting in ("linear", "square", "exp")] + signed


# ---- networks ---------------------------------------------------------------------------------


@jax.checkpoint  # the backward pass keeps x alone; it is memory-bound on a CPU
def mish(x):
    """x tanh(softplus(x)) with one exp and one division; e^20 is inf for float32's purposes."""
    e = jnp.exp(jnp.minimum(x, 20.0))
    n = e * (e + 2)
    return x * (n / (n + 2))


def init_mlp(key, sizes):
    """List of {"w" [in, out], "b" [out]}: truncated normal of variance 1/in, and zeros."""
    init = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = zip(sizes[:-1], sizes[1:], strict=True)
    return [{"w": init(k, s), "b": jnp.zeros(s[1])} for k, s in zip(keys, shapes, strict=True)]


def dense(layer, x):
    return x @ layer["w"] + layer["b"].reshape((1,) * (x.ndim - 1) + (-1,))


def mlp(layers, x):
    """Mish between layers, none after the last. x [..., in] -> [..., out]."""
    for layer in layers[:-1]:
        x = mish(dense(layer, x))
    return dense(layers[-1], x)


# ---- flow -------------------------------------------------------------------------------------


def flow_velocity(theta, at, t):
    """The policy: vel at at [...] and t, a scalar or [...] in (0, 1] -> [...]."""
    t = jnp.broadcast_to(t, at.shape)
    features = (at, 2 * t - 1, jnp.cos(2 * jnp.pi * t), jnp.sin(2 * jnp.pi * t))
    return mlp(theta, jnp.stack(features, axis=-1))[..., 0]


def flow_sample(args, theta, num_samples, key):
    """Euler steps of da/dt = vel from t = 1 to 0 -> a0 [num_samples] in the box.

    The a0 that a step heads for is bounded by 1000, so that a velocity that the repulsion has blown
    up (section 3.4, case II) gives a large number, not an overflow.
    """

    def euler(at, t):
        a0 = jnp.clip(at - t * flow_velocity(theta, at, t), -1e3, 1e3)
        return at - (at - a0) / t / args.sampling_steps, None

    times = jnp.arange(args.sampling_steps, 0, -1) / args.sampling_steps
    a0, _ = jax.lax.scan(euler, jax.random.normal(key, (num_samples,)), times)
    return jnp.clip(a0, -BOX, BOX)


# ---- weights ----------------------------------------------------------------------------------


def weights(args, q, lam):
    """w [B, N] of eq. (9) from q [B, N] and lam [] in reward units, no gradient.

    Mean 1 over N for exp, linear, square and power; 0 for wd1; not normalised for qvpo.
    """
    n, q = q.shape[-1], jax.lax.stop_gradient(q - jnp.max(q, axis=-1, keepdims=True))
    if args.weighting == "exp":  # Example 3.1
        return n * jax.nn.softmax(q / lam, axis=-1)
    if args.weighting == "qvpo":  # twice Example 3.2: lam 1/2, but g(y) = y as in Table 1
        return jax.nn.relu(q - jnp.mean(q, axis=-1, keepdims=True)) / 0.5
    if args.weighting == "wd1":  # Example 3.4
        adv = jax.nn.standardize(q, axis=-1, epsilon=1e-12)
        return n * (jax.nn.softmax(adv, axis=-1) - jax.nn.softmax(-adv, axis=-1))
    power = {"linear": 1, "square": 2, "power": args.power}[args.weighting]
    y = (q - solve_nu(q, lam, power, args.neg_clip)) / lam
    # differs from paper: the clip of eq. (11) for powers other than 1
    return jnp.maximum(jnp.sign(y) * jnp.abs(y) ** power, args.neg_clip)


# ---- losses and update ------------------------------------------------------------------------


class Learner(NamedTuple):
    """Everything that training changes."""

    theta: list  # velocity network
    opt: optax.OptState
    log_lam: jax.Array


def flow_optimiser(args):
    """Adam on gradients of norm 1 at most: negative weights can make the loss fall without end."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(args.policy_lr))


def flow_loss(theta, a0, w, key):
    """Reweighted matching, eq. (7): a0 [N], w [N]; t uniform on [0, 1]."""
    k_t, k_noise = jax.random.split(key)
    t, noise = jax.random.uniform(k_t, a0.shape), jax.random.normal(k_noise, a0.shape)
    vel = flow_velocity(theta, (1 - t) * a0 + t * noise, t)
    return jnp.mean(w * (vel - (noise - a0)) ** 2)


def fit_flow(theta, opt, optimiser, draw, num_steps, key):
    """num_steps gradient steps of `flow_loss` on (a0, w) = draw(key) -> theta, opt."""

    def step(carry, i):
        theta, opt = carry
        k_draw, k_loss = jax.random.split(jax.random.fold_in(key, i))
        updates, opt = optimiser.update(jax.grad(flow_loss)(theta, *draw(k_draw), k_loss), opt)
        return (optax.apply_updates(theta, updates), opt), None

    return jax.lax.scan(step, (theta, opt), jnp.arange(num_steps))[0]


def init_learner(args, landscape, key):
    """A policy fitted to the landscape's initial Gaussian by unweighted matching."""
    k_net, k_fit = jax.random.split(jax.random.fold_in(key, INIT))

    def draw(key):
        return landscape.mean + landscape.std * jax.random.normal(key, (256,)), jnp.ones(256)

    theta = init_mlp(k_net, [4, args.hidden_dim, args.hidden_dim, 1])
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, 1000))
    theta, _ = fit_flow(theta, adam.init(theta), adam, draw, 1000, k_fit)
    return Learner(theta, flow_optimiser(args).init(theta), jnp.log(args.lam))


@functools.partial(jax.jit, static_argnums=0)
def init_learners(args, landscape, keys):
    """`init_learner` for S seeds at once: keys [S] -> a Learner with a leading axis S."""
    return jax.vmap(lambda key: init_learner(args, landscape, key))(keys)


def train_epoch(args, method, landscape, learner, key, progress):
    """Algorithm 1 for one seed; progress in [0, 1) is the share of epochs done.

    -> learner, metrics of the policy before the update: {name: scalar}.
    """
    k_sample, k_noise, k_fit = jax.random.split(key, 3)
    a0 = flow_sample(args, learner.theta, args.num_samples, k_sample)
    metrics = {"regret": landscape.best() - landscape.reward(a0).mean(), "spread": a0.std()}
    noise = args.noise * (1 - progress) * jax.random.normal(k_noise, a0.shape)
    a0 = jnp.clip(a0 + noise, -BOX, BOX)
    r = landscape.reward(a0)
    q = (r - r.mean()) / jnp.sqrt(r.var() + 1e-12)  # jax.nn.standardize cancels: E r^2 - (E r)^2
    if method.neg_clip:
        fade = jnp.maximum(1 - progress / args.neg_until, 0.0)
        method = method._replace(neg_clip=method.neg_clip * fade)
    w = weights(method, q, jnp.exp(learner.log_lam))
    log_lam = learner.log_lam
    if args.eps_kl is not None:
        log_lam, _ = update_lam(log_lam, q, args.eps_kl, lr=0.2)  # few epochs
    theta, opt = fit_flow(
        learner.theta, learner.opt, flow_optimiser(args), lambda _: (a0, w), args.grad_steps, k_fit
    )
    return Learner(theta, opt, log_lam), metrics


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train_epochs(args, method, num_epochs, landscape, learners, keys, epoch, epochs):
    """num_epochs of `train_epoch` from number `epoch` of `epochs`, for S seeds at once.

    learners and keys have a leading axis S -> learners, metrics {name: [num_epochs, S]}.
    """

    def one(learner, key, i):
        key = jax.random.fold_in(jax.random.fold_in(key, TRAIN), i)
        return train_epoch(args, method, landscape, learner, key, i / epochs)

    def scanned(learners, i):
        return jax.vmap(one, in_axes=(0, 0, None))(learners, keys, i)

    return jax.lax.scan(scanned, learners, epoch + jnp.arange(num_epochs))


# ---- replay and envs --------------------------------------------------------------------------


class Landscape(NamedTuple):
    """Reward of two bumps at m, of height h and width s, and the Gaussian the policy starts as."""

    m: np.ndarray  # [2], the higher bump last
    h: np.ndarray  # [2]
    s: np.ndarray  # [2]
    mean: np.ndarray
    std: np.ndarray

    def reward(self, a):
        """R(a), a [...]."""
        bumps = [h * jnp.exp(-(((a - m) / s) ** 2) / 2) for m, h, s in zip(*self[:3], strict=True)]
        return bumps[0] + bumps[1]

    def best(self):
        """max R over the box, on a grid of step 0.001."""
        return self.reward(jnp.linspace(-BOX, BOX, 4001)).max()


def make_landscape(m, h, s, mean, std):
    return Landscape(*(np.float32(x) for x in (m, h, s, mean, std)))


LANDSCAPES = {
    "escape": make_landscape((-1, 1.5), (0.7, 1), (0.4, 0.4), -1, 0.8),
    "broad": make_landscape((-1, 1), (1, 1), (0.7, 0.7), 0, 0.6),
    "sharp": make_landscape((-1, 1), (1, 1), (0.03, 0.03), 0, 0.6),
}
FIGURES = {"2": ("escape",), "3": ("broad", "sharp")}


# ---- evaluate ---------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def final_samples(args, learners, keys):
    """Samples [S, FINAL_SAMPLES] of S policies."""

    def draw(theta, key):
        return flow_sample(args, theta, FINAL_SAMPLES, jax.random.fold_in(key, FINAL))

    return jax.vmap(draw)(learners.theta, keys)


def seed_keys(args):
    """Keys [S] of the seeds, sharded over as many devices as divide them."""
    keys = jnp.stack([jax.random.key(args.seed + i) for i in range(args.num_seeds)])
    devices = jax.devices() if jax.devices()[0].platform == "cpu" else jax.devices()[:1]
    count = next(n for n in range(len(devices), 0, -1) if args.num_seeds % n == 0)
    mesh = jax.sharding.Mesh(np.array(devices[:count]), ("seed",))
    return jax.device_put(keys, NamedSharding(mesh, PartitionSpec("seed")))


def train_curve(args, method, landscape, learners, keys, epochs, bar, stop=()):
    """Trains S policies -> regret [epochs + 1, S] before each epoch and at the end, and the final
    samples [S, FINAL_SAMPLES], which give the last row. Exits once `stop` holds a signal."""
    chunk = next(n for n in range(min(20, epochs), 0, -1) if epochs % n == 0)
    regret = []
    for epoch in range(0, epochs, chunk):
        learners, metrics = train_epochs(
            args, method, chunk, landscape, learners, keys, np.int32(epoch), np.float32(epochs)
        )
        regret.append(np.asarray(metrics["regret"]))
        bar.set_postfix_str(f"spread {np.median(metrics['spread'][-1]):.3f}")
        bar.update(chunk)
        if stop:
            raise SystemExit(128 + stop[0])
    samples = np.asarray(final_samples(args, learners, keys))
    last = landscape.best() - landscape.reward(samples).mean(axis=1)
    regret = np.concatenate([*regret, last[None]])
    if not np.isfinite(regret).all():
        raise Diverged(f"the regret of {method.name} is not finite; lower --policy-lr")
    return regret, samples


class Target(NamedTuple):
    """The signed measure w pi_old on M nodes, for quadrature."""

    a0: jax.Array  # [M], evenly spaced
    mass: jax.Array  # [M], of pi_old, sums to 1
    w: jax.Array  # [M], mean 1 under mass


def make_target(args, landscape, neg_clip, num_nodes=2001):
    """Stage I without sampling error: eq. (11) under the landscape's initial Gaussian."""
    z = jnp.linspace(-6, 6, num_nodes)
    mass = jax.nn.softmax(-(z**2) / 2)
    a0 = landscape.mean + landscape.std * z
    return Target(a0, mass, target_weight(args, landscape, neg_clip, a0))


def target_weight(args, landscape, neg_clip, a0, num_nodes=4096):
    """w of eq. (11) at a0 [A]; nu, mean and std of R come from nodes of equal mass of pi_old."""
    quantiles = jax.scipy.special.ndtri((jnp.arange(num_nodes) + 0.5) / num_nodes)
    reward = landscape.reward(landscape.mean + landscape.std * quantiles)
    mean, std = reward.mean(), reward.std()
    nu = solve_nu((reward - mean) / std, args.lam, 1, neg_clip)
    return jnp.maximum(((landscape.reward(a0) - mean) / std - nu) / args.lam, neg_clip)


def closed_form(target, at, t):
    """Eq. (8) and its denominator: at [A], t in (0, 1] -> vel [A], E[w | a_t] [A].

    Where E[w | a_t] <= 0 the loss has no minimum (section 3.4, case II) and vel means nothing.
    """
    a0, mass, w = (x[None] for x in target)  # [1, M]
    noise = (at[:, None] - (1 - t) * a0) / t  # [A, M]
    posterior = jax.nn.softmax(jnp.log(mass) - noise**2 / 2, axis=-1)  # p(a0 | a_t)
    mean_w = jnp.sum(posterior * w, axis=-1)
    return jnp.sum(posterior * w * (noise - a0), axis=-1) / mean_w, mean_w


def path_density(target, a, t):
    """rho_t of eq. (10) at a [A], t in (0, 1]; negative where the signed measure is."""
    kernel = jnp.exp(-(((a[:, None] - (1 - t) * target.a0[None]) / t) ** 2) / 2)
    return kernel @ (target.w * target.mass) / (t * math.sqrt(2 * math.pi))


@functools.partial(jax.jit, static_argnums=(0, 3))
def flow_path(vel, params, times, num_particles):
    """Euler along times [K], from 1 downwards, of the quantiles of N(0, 1) -> [K, particles];
    vel(params, a, t)."""

    def euler(at, step):
        t, dt = step
        return jnp.clip(at - dt * vel(params, at, t), -1e3, 1e3), at

    start = jax.scipy.special.ndtri((jnp.arange(num_particles) + 0.5) / num_particles)
    steps = (times[:-1], times[:-1] - times[1:])
    last, path = jax.lax.scan(euler, start, steps)
    return jnp.concatenate([path, last[None]])


def closed_form_velocity(target, at, t):
    """`closed_form` at many particles, read off a grid of step 0.01 in [-5, 5]."""
    grid = jnp.linspace(-5, 5, 1001)
    return jnp.interp(at, grid, closed_form(target, grid, t)[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def fit_target(args, num_steps, landscape, target, learner, key):
    """The learner's network, refitted by `flow_loss` to the target on fresh samples of pi_old."""

    def draw(key):
        a0 = landscape.mean + landscape.std * jax.random.normal(key, (512,))
        return a0, jnp.interp(a0, target.a0, target.w)

    optimiser = flow_optimiser(dataclasses.replace(args, policy_lr=1e-3))
    opt = optimiser.init(learner.theta)
    return fit_flow(learner.theta, opt, optimiser, draw, num_steps, key)[0]


# ---- checkpoint and log -----------------------------------------------------------------------


def open_run_dir(args):
    """Makes the run folder with args.json and versions.json; refuses one that is in use."""
    name = f"bandit__simpo_bandit__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.run_dir or f"runs/{name}")
    packages = ("jax", "jaxlib", "optax", "numpy", "matplotlib")
    versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if any(run_dir.iterdir()):
            raise UsageError(f"--run-dir {run_dir} is not empty")
        for file, content in (("args", dataclasses.asdict(args)), ("versions", versions)):
            (run_dir / f"{file}.json").write_text(json.dumps(content, indent=2))
    except OSError as error:
        raise UsageError(f"--run-dir {run_dir}: {error.strerror}") from None
    return run_dir


def append_rows(path, header, rows):
    """Adds rows of strings to a CSV file, under its header."""
    lines = [",".join(row) for row in rows]
    with path.open("a") as file:
        file.write("\n".join(lines if file.tell() else [header, *lines]) + "\n")


def curve_rows(landscape, method, first_seed, regret):
    """Rows landscape, method, seed, epoch, regret of one curve; regret [epochs + 1, S]."""
    for i, curve in enumerate(regret.T):
        for epoch, value in enumerate(curve):
            yield landscape, method, str(first_seed + i), str(epoch), f"{value:.6f}"


def mean_and_se(x):
    """Mean over seeds, the last axis of x [..., S], and its standard error; 0 for one seed."""
    ddof = min(x.shape[-1] - 1, 1)
    return x.mean(axis=-1), x.std(axis=-1, ddof=ddof) / math.sqrt(x.shape[-1])


def curve_summary(landscape, regret, samples):
    """{column: number} of one curve: regret [epochs + 1, S], final samples [S, FINAL_SAMPLES].

    at_best is the share of seeds whose mean final reward is nearer to the best than to the lower
    optimum; nan where both optima are equally good. se is `mean_and_se`'s.
    """
    lower = landscape.h[1] - landscape.h[0]
    final, final_se = mean_and_se(regret[-1])
    mean, mean_se = mean_and_se(regret.mean(axis=0))
    return {
        "at_best": np.mean(regret[-1] < lower / 2) if lower else math.nan,
        "final_regret": final,
        "final_se": final_se,
        "mean_regret": mean,
        "mean_se": mean_se,
        "final_spread": np.median(samples.std(axis=1)),
    }


def save_figure(fig, run_dir, name):
    """Writes {name}.png and {name}.pdf and closes the figure."""
    for suffix in ("png", "pdf"):
        fig.savefig(run_dir / f"{name}.{suffix}", dpi=80, bbox_inches="tight")
    plt.close(fig)


def draw_curves(run_dir, figure, curves, starts):
    """Figure 2 or 3: a row for each landscape, {landscape: {method: regret}}; starts holds samples
    of the initial policies [any]."""
    fig, axes = plt.subplots(len(curves), 2, figsize=(9, 3.2 * len(curves)), squeeze=False)
    a = np.linspace(-BOX, BOX, 1001)
    colours = {name: f"C{i}" for i, name in enumerate(LABELS)}
    for (left, right), (landscape, methods) in zip(axes, curves.items(), strict=True):
        left.plot(a, LANDSCAPES[landscape].reward(a), color="black", label="reward R(a)")
        bins = np.linspace(-BOX, BOX, 61)
        left.hist(
            starts[landscape].ravel(), bins, density=True, color="0.8", label="initial policy"
        )
        left.set(xlabel="action a", title=landscape)
        left.legend()
        for name, regret in methods.items():
            mean, se = mean_and_se(regret)
            (line,) = right.plot(mean, color=colours.get(name), label=LABELS.get(name, name))
            band = mean - se, mean + se
            right.fill_between(range(len(mean)), *band, color=line.get_color(), alpha=0.25, lw=0)
        right.set(xlabel="epoch", ylabel="max R - E R", ylim=(0, None))
        right.set_title(
            f"expected simple regret, {regret.shape[1]} seeds, +- standard error", size=10
        )
        right.legend()
    fig.tight_layout()
    save_figure(fig, run_dir, f"figure{figure}")


FIELD_STEPS = 300  # gradient steps of the network in the field figure
FIELD_TIMES = np.append(np.linspace(1, 0, 250, endpoint=False), 0).astype(np.float32)  # 1 .. 0


def draw_field(args, run_dir):
    """Section 3.4 on the landscape `escape`: eq. (8), a network trained by eq. (7), eq. (10).

    Writes field.png, field.pdf and field.csv, whose rows compare at times t the density rho_t of
    eq. (10) with particles that follow the closed form and the network: negative_mass is that of
    rho_t, tv_* are total variation distances.
    """
    landscape, neg_clip = LANDSCAPES["escape"], -0.2 if args.neg_clip is None else args.neg_clip
    k_init, k_fit = jax.random.split(jax.random.key(args.seed))
    learner = jax.jit(init_learner, static_argnums=0)(args, landscape, k_init)
    fig, axes = plt.subplots(2, 3, figsize=(13, 7))
    a, rows = np.linspace(-3, 3, 241), []
    for (exact, fitted, density), clip in zip(axes, (0.0, neg_clip), strict=True):
        target = make_target(args, landscape, clip)
        theta = fit_target(args, FIELD_STEPS, landscape, target, learner, k_fit)
        vel, mean_w = jax.lax.map(lambda t, x=target: closed_form(x, a, t), FIELD_TIMES[:-1])
        network = jax.lax.map(lambda t, x=theta: flow_velocity(x, jnp.asarray(a), t), FIELD_TIMES)
        paths = {
            "closed_form": flow_path(closed_form_velocity, target, FIELD_TIMES, 4000),
            "network": flow_path(flow_velocity, theta, FIELD_TIMES, 4000),
        }
        rows += field_rows(f"{clip:g}", target, paths)
        titles = f"eq. (8), l = {clip:g}", f"network, {FIELD_STEPS} steps, l = {clip:g}"
        panels = zip((exact, fitted), (vel, network[:-1]), paths.values(), titles, strict=True)
        for axis, field, path, title in panels:
            image = axis.pcolormesh(
                FIELD_TIMES[:-1], a, field.T, cmap="RdBu_r", vmin=-4, vmax=4, rasterized=True
            )
            axis.plot(FIELD_TIMES, path[:, 100::200], color="black", lw=0.5)
            if clip:
                axis.contourf(
                    FIELD_TIMES[:-1], a, mean_w.T, [-9, 0], colors="none", hatches=["////"]
                )
                axis.contour(FIELD_TIMES[:-1], a, mean_w.T, [0], colors="black", linewidths=1)
            axis.set(xlabel="t", ylabel="$a_t$", ylim=(-3, 3), title=title)
            fig.colorbar(image, ax=axis, label="velocity")
        rho = path_density(target, a, FIELD_TIMES[-5])
        density.plot(a, rho, color="black", label=f"eq. (10), t = {FIELD_TIMES[-5]:.3f}")
        for (name, path), colour in zip(paths.items(), ("C0", "C1"), strict=True):
            bins = np.linspace(-3, 3, 121)
            label = f"samples, {name.replace('_', ' ')}"
            density.hist(path[-5], bins, density=True, color=colour, alpha=0.5, label=label)
        density.axhline(0, color="0.7", lw=0.5)
        density.set(
            xlabel="a",
            title="density",
            ylim=(1.5 * float(min(rho.min(), -0.05)), 1.3 * float(rho.max())),
        )
        density.legend(fontsize=8)
    fig.tight_layout()
    save_figure(fig, run_dir, "field")
    header = "neg_clip,t,negative_mass,tv_closed_form,tv_network"
    append_rows(run_dir / "field.csv", header, rows)


def field_rows(label, target, paths, width=0.05):
    """Rows of field.csv for one target; paths are {name: [times, particles]}."""
    edges = np.arange(-5, 5 + width / 2, width)
    for k in range(25, 250, 25):
        rho = np.asarray(path_density(target, (edges[1:] + edges[:-1]) / 2, FIELD_TIMES[k]))
        row = [label, f"{FIELD_TIMES[k]:.3f}", f"{np.maximum(-rho, 0).sum() * width:.4f}"]
        for path in paths.values():
            share = np.histogram(path[k], edges)[0] / path.shape[1]
            outside = 1 - share.sum()
            row.append(f"{(np.abs(share - rho * width).sum() + outside) / 2:.4f}")
        yield tuple(row)


# ---- main -------------------------------------------------------------------------------------


def parse_flags(**kwargs):
    """Args from the command line; an error of tyro's, a box of text, becomes one line."""
    with contextlib.redirect_stderr(io.StringIO()) as box:
        try:
            return tyro.cli(Args, **kwargs)
        except SystemExit as error:
            if not error.code:  # --help
                raise
            text = box.getvalue().partition("\n")[2]  # after the title
            raise UsageError(" ".join(re.sub("[\u2500-\u257f]|-{4,}", " ", text).split())) from None


def watch_signals():
    """The list to which SIGINT and SIGTERM add their number; a second one ends the program."""
    received = []

    def note(signum, _):
        if received:
            raise SystemExit(128 + signum)
        received.append(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, note)
    return received


def landscapes(args, figure):
    """Names of the landscapes of figure 2 or 3 that the arguments ask for."""
    drawn = args.figure in (figure, "all")
    return [name for name in FIGURES[figure] if drawn and args.landscape in (name, None)]


def num_epochs(args, landscape):
    return args.epochs or (200 if landscape == "escape" else 100)


def train_figure(args, figure, run_dir, keys, bar, stop):
    """Trains the curves of figure 2 or 3; writes them, their summary and the figure."""
    curves, starts = {}, {}
    for name in landscapes(args, figure):
        landscape, curves[name] = LANDSCAPES[name], {}
        learners = init_learners(args, landscape, keys)
        starts[name] = np.asarray(final_samples(args, learners, keys))
        for method in methods(args, figure):
            bar.set_description(f"{name} {method.name}")
            regret, samples = train_curve(
                args, method, landscape, learners, keys, num_epochs(args, name), bar, stop
            )
            curves[name][method.name] = regret
            rows = curve_rows(name, method.name, args.seed, regret)
            append_rows(run_dir / "curves.csv", "landscape,method,seed,epoch,regret", rows)
            numbers = curve_summary(landscape, regret, samples)
            row = name, method.name, str(args.num_seeds), *(f"{x:.4f}" for x in numbers.values())
            header = ",".join(("landscape", "method", "seeds", *numbers))
            append_rows(run_dir / "summary.csv", header, [row])
    draw_curves(run_dir, figure, curves, starts)


def run_figures(args):
    """Everything that one command asks for."""
    run_dir, keys = open_run_dir(args), seed_keys(args)
    print(f"run folder  {run_dir}", flush=True)
    stop, figures = watch_signals(), [figure for figure in FIGURES if landscapes(args, figure)]
    total = sum(
        num_epochs(args, name) * len(methods(args, figure))
        for figure in figures
        for name in landscapes(args, figure)
    )
    with tqdm(total=total, unit="epoch", disable=None) as bar:
        for figure in figures:
            train_figure(args, figure, run_dir, keys, bar, stop)
    if not args.landscape and args.figure in ("field", "all"):
        draw_field(args, run_dir)
    if figures:
        for line in (run_dir / "summary.csv").read_text().splitlines():
            print("".join(f"{cell:>14s}" for cell in line.split(",")))


def bandit():
    try:
        run_figures(parse_flags())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(bandit())
