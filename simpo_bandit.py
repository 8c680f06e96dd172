"""SiMPO on a one-dimensional bandit: figures 2 and 3 of the paper.

    python simpo_bandit.py     # 20 seeds, one to two minutes on two cores

Paper: arXiv 2603.10250, section 5.1. One state, one action in [-2, 2], a flow policy
and many seeds at once. Every epoch samples N actions, weights them by their reward (w
may be negative) and refits the policy to them (eq. 7). Copy this file and common.py.

Time runs from t = 0 (action) to t = 1 (noise), with a_t = (1 - t) a0 + t noise and
velocity = noise - a0. Shapes: S seeds, N samples of a seed, H hidden units. Where the
paper is silent, or we depart from it:
1. Rewards are standardised; lam is a constant, or follows its dual with --eps-kl.
2. Noise that falls to 0 is added to the samples that the policy is refitted to.
   Without it every policy collapses at once.
3. The clip l of Lin. Neg. starts at -0.6, not -0.05, and rises to 0 over half of the
   run. Gradients are clipped, since negative weights leave the loss without a bound.
"""

import dataclasses
import functools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from scipy.stats import sem

from common import solve_nu, update_lam

BOX = 2.0  # actions are clipped to [-BOX, BOX]
GRID = np.linspace(-BOX, BOX, 4001, dtype=np.float32)
SAMPLING_STEPS = 20  # of Euler's method, from t = 1 to 0
FINAL_SAMPLES = 1024  # of a trained policy
DIVERGED = 3  # exit code of a run whose numbers are not finite
LANDSCAPES_OF = {"2": ["escape"], "3": ["broad", "sharp"]}  # the paper's figures
EPOCHS_OF = {"2": 200, "3": 100}

# what a seed's key is folded with, for three independent streams
INIT = 0
TRAIN = 1
FINAL = 2


@dataclasses.dataclass(frozen=True)
class Args:
    # --- Experiment ---
    figure: Literal["2", "3", "all"] = "all"  # figure of the paper
    seed: int = 1  # first seed; each is a policy and samples of its own
    num_seeds: int = 20  # S, trained at once
    run_dir: str | None = None  # default: runs/bandit__simpo_bandit__{seed}__{time}
    # --- Weights of the samples ---
    weighting: Literal["all", "exp", "linear", "square"] = "all"  # g in eq. (9)
    neg_clip: float | None = None  # l, eq. (11); default: figure 2's Lin. Neg. at -0.6
    neg_until: float = 0.5  # share of the epochs over which l rises to 0; inf: it stays
    lam: float = 0.25  # lambda in eq. (9), in standard deviations of the N rewards
    eps_kl: float | None = None  # nats, eq. (30): lam starts at --lam, follows its dual
    # --- Flow policy ---
    num_samples: int = 64  # N, samples of an epoch
    noise: float = 0.4  # std of the noise on the samples at first; falls linearly to 0
    hidden_dim: int = 64  # H, of the 2 hidden layers
    # --- Optimisation ---
    epochs: int | None = None  # default: 200 for figure 2, 100 for figure 3
    grad_steps: int = 32  # gradient steps of an epoch, each on all N samples
    grad_clip: float = 1.0  # largest norm of a gradient; inf: no clip
    policy_lr: float = 2e-3  # Adam's rate

    def __post_init__(self):
        neg_clip = self.neg_clip or 0.0
        rules = {
            "--lam, --policy-lr, --grad-clip and --neg-until must be above 0": (
                min(self.lam, self.policy_lr, self.grad_clip, self.neg_until) > 0
            ),
            "--num-seeds, --hidden-dim and --grad-steps must be at least 1": (
                min(self.num_seeds, self.hidden_dim, self.grad_steps) >= 1
            ),
            "--epochs must be at least 1": self.epochs is None or self.epochs >= 1,
            "--num-samples must be at least 2": self.num_samples >= 2,
            "--noise must be at least 0": self.noise >= 0,
            "--seed must be in [0, 2^32 - S]": 0 <= self.seed <= 2**32 - self.num_seeds,
            "--eps-kl must be in (0, log N)": (
                self.eps_kl is None or 0 < self.eps_kl < math.log(self.num_samples)
            ),
            "--neg-clip must be at most 0": neg_clip <= 0,
            "--neg-clip is not for exp": neg_clip == 0 or self.weighting != "exp",
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(rule)  # tyro shows it as an error of usage


# ---- rewards -------------------------------------------------------------------------
class Landscape(NamedTuple):
    """A reward R(a) = sum_i height_i exp(-((a - middle_i) / width)^2 / 2) of two bumps,
    the higher one last, and the Gaussian that the policy starts as. The paper shows its
    rewards only as pictures."""

    middle: tuple
    height: tuple
    width: tuple
    start_mean: float
    start_std: float

    def reward(self, a):
        """R(a), elementwise."""
        total = 0.0
        for i in range(2):
            scaled = (a - self.middle[i]) / self.width[i]
            total += self.height[i] * jnp.exp(-(scaled**2) / 2)
        return total


BROAD = Landscape(
    middle=(-1.0, 1.0),
    height=(1.0, 1.0),
    width=(0.7, 0.7),
    start_mean=0.0,
    start_std=0.6,
)
LANDSCAPES = {
    "escape": Landscape(
        middle=(-1.0, 1.5),
        height=(0.7, 1.0),
        width=(0.4, 0.4),
        start_mean=-1.0,
        start_std=0.8,
    ),
    "broad": BROAD,
    "sharp": BROAD._replace(width=(0.03, 0.03)),
}


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


def mlp(layers, x):
    for layer in layers[:-1]:
        x = mish(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


# ---- flow ----------------------------------------------------------------------------
def flow_velocity(theta, a_t, t):
    """The policy: a_t [...] and t, a scalar or [...] in (0, 1] -> velocity [...]."""
    t = jnp.broadcast_to(t, a_t.shape)
    features = (a_t, 2 * t - 1, jnp.cos(2 * jnp.pi * t), jnp.sin(2 * jnp.pi * t))
    return mlp(theta, jnp.stack(features, axis=-1))[..., 0]


def flow_sample(theta, num_samples, key):
    """Euler steps of da/dt = velocity, t from 1 to 0 -> a0 [num_samples] in the box."""

    def euler(a_t, t):
        # repulsion can blow the velocity up (section 3.4, case II)
        a0 = jnp.clip(a_t - t * flow_velocity(theta, a_t, t), -1e3, 1e3)
        return a_t - (a_t - a0) / t / SAMPLING_STEPS, None

    times = jnp.arange(SAMPLING_STEPS, 0, -1) / SAMPLING_STEPS
    a0, _ = jax.lax.scan(euler, jax.random.normal(key, (num_samples,)), times)
    return jnp.clip(a0, -BOX, BOX)


# ---- weights -------------------------------------------------------------------------
METHODS = {  # name in the CSV files: name in the paper, colour in the figures
    "linear": ("Linear", "tab:blue"),
    "square": ("Square", "tab:purple"),
    "exp": ("Exp", "tab:green"),
    "linear_neg": ("Lin. Neg.", "tab:red"),
    "square_neg": ("Sqr. Neg.", "tab:orange"),
}


def figure_curves(args, figure):
    """[(weighting, l)] of a figure's curves: the paper's, or the one of --weighting."""
    neg_clip = args.neg_clip
    if args.weighting != "all":
        return [(args.weighting, neg_clip or 0.0)]
    if neg_clip is None and figure == "2":
        neg_clip = -0.6  # differs from paper: (3)
    curves = [("linear", 0.0), ("square", 0.0), ("exp", 0.0)]
    if neg_clip:
        curves.append(("linear", neg_clip))
    return curves


def sample_weights(weighting, neg_clip, q, lam):
    """Eq. (9): q [N] and lam [], in the same units -> w [N] of mean 1."""
    q = q - jnp.max(q)
    if weighting == "exp":  # Example 3.1
        return len(q) * jax.nn.softmax(q / lam)
    power = 2 if weighting == "square" else 1
    y = (q - solve_nu(q, lam, power, neg_clip)) / lam
    return jnp.maximum(jnp.sign(y) * jnp.abs(y) ** power, neg_clip)  # eq. (11)


# ---- update --------------------------------------------------------------------------
class State(NamedTuple):
    """Everything that training changes."""

    theta: list  # velocity network
    opt: optax.OptState
    log_lam: jax.Array


def flow_optimiser(args):
    clip = optax.clip_by_global_norm(args.grad_clip)  # differs from paper: (3)
    return optax.chain(clip, optax.adam(args.policy_lr))


def flow_loss(theta, a0, w, key):
    """Reweighted matching, eq. (7), at uniform t in [0, 1]: a0 [N], w [N] or 1."""
    k_t, k_noise = jax.random.split(key)
    t = jax.random.uniform(k_t, a0.shape)
    noise = jax.random.normal(k_noise, a0.shape)
    velocity = flow_velocity(theta, (1 - t) * a0 + t * noise, t)
    return jnp.mean(w * (velocity - (noise - a0)) ** 2)


def fit_flow(theta, opt, optimiser, draw, num_steps, key):
    """num_steps gradient steps of `flow_loss` on (a0, w) = draw(key) -> theta, opt."""

    def step(carry, i):
        theta, opt = carry
        k_draw, k_loss = jax.random.split(jax.random.fold_in(key, i))
        a0, w = draw(k_draw)
        grads = jax.grad(flow_loss)(theta, a0, w, k_loss)
        updates, opt = optimiser.update(grads, opt)
        return (optax.apply_updates(theta, updates), opt), None

    carry, _ = jax.lax.scan(step, (theta, opt), jnp.arange(num_steps))
    return carry


@functools.partial(jax.jit, static_argnames="args")
def init_states(args, landscape, keys):
    """A State for each of keys [S], with a leading axis S: policies that unweighted
    matching has fitted to the landscape's initial Gaussian."""
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, 1000))

    def draw(key):
        z = jax.random.normal(key, (256,))
        return landscape.start_mean + landscape.start_std * z, 1.0

    def init(key):
        k_net, k_fit = jax.random.split(jax.random.fold_in(key, INIT))
        theta = init_mlp(k_net, [4, args.hidden_dim, args.hidden_dim, 1])
        theta, _ = fit_flow(theta, adam.init(theta), adam, draw, 1000, k_fit)
        return State(
            theta=theta,
            opt=flow_optimiser(args).init(theta),
            log_lam=jnp.log(args.lam),
        )

    return jax.vmap(init)(keys)


@functools.partial(jax.jit, static_argnames="args")
def train_epoch(args, landscape, states, keys, epoch, epochs):
    """Algorithm 1, epoch number `epoch` of `epochs`, for all seeds: states and keys
    have a leading axis S -> states, samples [S, N] of their policies before it."""
    progress = epoch / epochs
    neg_clip = 0.0
    if args.neg_clip:  # differs from paper: (3), it rises to 0
        neg_clip = args.neg_clip * jnp.maximum(1 - progress / args.neg_until, 0.0)

    def train(state, key):
        key = jax.random.fold_in(jax.random.fold_in(key, TRAIN), epoch)
        k_sample, k_noise, k_fit = jax.random.split(key, 3)
        theta, opt, log_lam = state

        # stage I: samples and their weights
        a0 = flow_sample(theta, args.num_samples, k_sample)
        noise = args.noise * (1 - progress) * jax.random.normal(k_noise, a0.shape)
        noisy = jnp.clip(a0 + noise, -BOX, BOX)  # differs from paper: (2)
        reward = landscape.reward(noisy)
        # differs from paper: (1); jax.nn.standardize would cancel in float32
        q = (reward - reward.mean()) / jnp.sqrt(reward.var() + 1e-12)
        w = sample_weights(args.weighting, neg_clip, q, jnp.exp(log_lam))
        if args.eps_kl is not None:
            log_lam, _ = update_lam(log_lam, q, args.eps_kl, lr=0.2)  # few epochs

        # stage II: matching
        def draw(_):
            return noisy, w

        adam = flow_optimiser(args)
        theta, opt = fit_flow(theta, opt, adam, draw, args.grad_steps, k_fit)
        return State(theta, opt, log_lam), a0

    return jax.vmap(train)(states, keys)


# ---- evaluation ----------------------------------------------------------------------
@jax.jit
def final_samples(states, keys):
    """Samples [S, FINAL_SAMPLES] of S policies."""

    def sample(theta, key):
        return flow_sample(theta, FINAL_SAMPLES, jax.random.fold_in(key, FINAL))

    return jax.vmap(sample)(states.theta, keys)


def train_curve(args, landscape, states, keys, epochs):
    """Trains S policies -> regret [epochs + 1, S] before each epoch and at the end, and
    the final samples [S, FINAL_SAMPLES], which give the last row."""
    rewards = []
    for epoch in range(epochs):
        states, a0 = train_epoch(args, landscape, states, keys, epoch, epochs)
        rewards.append(landscape.reward(a0).mean(axis=1))
    final = final_samples(states, keys)
    rewards.append(landscape.reward(final).mean(axis=1))
    regret = float(landscape.reward(GRID).max()) - np.array(rewards)
    if np.isnan(regret).any():
        print(f"error: {args.weighting} diverged; lower --policy-lr", file=sys.stderr)
        raise SystemExit(DIVERGED)
    return regret, final


def summarise(landscape, regret, final):
    """Regret [epochs + 1, S], final samples [S, FINAL_SAMPLES] -> a row of summary.csv:
    at_best, final_regret, final_se, mean_regret, mean_se, final_spread.

    at_best is the share of seeds whose last regret is nearer to the best optimum's than
    to the lower one's; nan where both are best."""
    lower, best = landscape.height
    last = regret[-1]
    at_best = np.mean(last < (best - lower) / 2) if lower < best else math.nan
    average = regret.mean(axis=0)
    return (
        at_best,
        last.mean(),
        sem(last),
        average.mean(),
        sem(average),
        np.median(final.std(axis=1)),
    )


# ---- figures -------------------------------------------------------------------------
def draw_figure(path, regrets, starts):
    """A row for each landscape: regrets {landscape: {method: regret [epochs + 1, S]}}
    and samples of the initial policies {landscape: [any]}."""
    fig = Figure((10, 3.6 * len(regrets)), layout="constrained")
    axes = fig.subplots(len(regrets), 2, squeeze=False)
    for i, name in enumerate(regrets):
        left, right = axes[i]
        left.set(
            title=name,
            xlabel="action a",
            ylabel="density of the initial policy,\nclipped to the box (grey)",
        )
        left.hist(starts[name], bins=50, density=True, color="0.8")
        reward = left.twinx()  # an axis of its own
        reward.plot(GRID, LANDSCAPES[name].reward(GRID), color="black")
        reward.set(ylabel="reward R(a) (black)", ylim=0)

        right.set_prop_cycle(linestyle=["-", "--", ":", "-"])
        for method, regret in regrets[name].items():
            label, colour = METHODS[method]
            mean = regret.mean(axis=1)
            error = sem(regret, axis=1)
            right.plot(mean, label=label, color=colour)
            right.fill_between(
                range(len(mean)), mean - error, mean + error, color=colour, alpha=0.2
            )
        right.set(
            title=f"{regret.shape[1]} seeds, +- standard error",
            xlabel="epoch",
            ylabel="regret max R - E R",
            yscale="linear" if name == "escape" else "log",
        )
        right.legend()
    fig.savefig(path)


# ---- main ----------------------------------------------------------------------------
def create_run_dir(args):
    """A new folder with args.json and versions.json."""
    default = f"runs/bandit__simpo_bandit__{args.seed}__{int(time.time())}"
    run_dir = Path(args.run_dir or default)
    try:
        run_dir.mkdir(parents=True)
    except OSError as error:
        reason = f"--run-dir {run_dir}: {error.strerror}"
        raise SystemExit(f"error: {reason}") from None
    git = f"git -C '{Path(__file__).parent}' rev-parse HEAD"
    status, commit = subprocess.getstatusoutput(git)
    versions = {"jax": jax.__version__, "commit": None if status else commit}
    (run_dir / "args.json").write_text(json.dumps(vars(args), indent=2))
    (run_dir / "versions.json").write_text(json.dumps(versions, indent=2))
    return run_dir


def main():
    # --- Flags, files and the keys of the seeds ---
    jax.config.update("jax_default_matmul_precision", "float32")
    args = tyro.cli(Args)
    run_dir = create_run_dir(args)
    curves = (run_dir / "curves.csv").open("w", buffering=1)  # a line at once
    print("landscape,method,seed,epoch,regret", file=curves)
    header = (
        "landscape,method,seeds,"
        "at_best,final_regret,final_se,mean_regret,mean_se,final_spread"
    )
    summary = [header]
    print(f"run folder {run_dir}\n{header}")
    seeds = args.seed + np.arange(args.num_seeds, dtype=np.uint32)
    keys = jax.vmap(jax.random.key)(seeds)

    for figure in LANDSCAPES_OF if args.figure == "all" else [args.figure]:
        epochs = args.epochs or EPOCHS_OF[figure]
        regrets = {}
        starts = {}
        for name in LANDSCAPES_OF[figure]:
            # --- Initial policies ---
            landscape = LANDSCAPES[name]
            states = init_states(args, landscape, keys)
            starts[name] = np.ravel(final_samples(states, keys))

            # --- Train all seeds of a method, and write its curve ---
            regrets[name] = {}
            for weighting, neg_clip in figure_curves(args, figure):
                method = f"{weighting}_neg" if neg_clip else weighting
                curve = dataclasses.replace(
                    args, weighting=weighting, neg_clip=neg_clip
                )
                regret, final = train_curve(curve, landscape, states, keys, epochs)
                regrets[name][method] = regret
                for (i, epoch), value in np.ndenumerate(regret.T):
                    print(
                        f"{name},{method},{seeds[i]},{epoch},{value:.6f}", file=curves
                    )
                numbers = [f"{x:.4f}" for x in summarise(landscape, regret, final)]
                row = f"{name},{method},{args.num_seeds},{','.join(numbers)}"
                summary.append(row)
                print(row, flush=True)

        # --- Draw ---
        draw_figure(run_dir / f"figure{figure}.png", regrets, starts)

    # --- Write the summary, which only a complete run has ---
    (run_dir / "summary.csv").write_text("\n".join(summary) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the run folder has the finished curves")
