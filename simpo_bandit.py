"""SiMPO on a one-dimensional bandit: figures 2 and 3 of the paper (arXiv 2603.10250, section 5.1).

    python simpo_bandit.py        # 20 seeds, a minute or two on two cores; writes runs/NAME

Copy this file and common.py. Time runs from t = 0 (action) to t = 1 (noise), a_t = (1 - t) a0 +
t noise and vel = noise - a0. Legend: S seeds, N samples. Rewards (the paper has only pictures of
them), with b(a; m, s) = exp(-(a - m)^2 / (2 s^2)) and a in [-2, 2]:
    escape  R = 0.7 b(a; -1, 0.4) + b(a; 1.5, 0.4)   policy starts as N(-1, 0.8^2)
    broad   R = b(a; -1, 0.7) + b(a; 1, 0.7)         policy starts as N(0, 0.6^2)
    sharp   R = b(a; -1, 0.03) + b(a; 1, 0.03)       policy starts as N(0, 0.6^2)
That Lin. Neg. leaves the lower optimum of figure 2 depends on a clip of -0.4 or less that ends
within the run, and on noise. With the paper's clip of -0.05 it does here what Linear does.
Where the paper is silent, or we depart from it:
1. Rewards are standardised; lam is a constant, or follows its dual with --eps-kl.
2. Noise on the samples the policy is refitted to, falling to 0; else any policy collapses at once.
3. The clip l of Lin. Neg. starts at -0.6, not -0.05, and rises to 0 over half of the run. Gradients
   are clipped, since with negative weights the loss has no lower bound.
"""

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

from common import solve_nu, update_lam

BOX = 2.0  # actions are clipped to [-BOX, BOX]
SAMPLING_STEPS = 20  # of Euler's method, from t = 1 to 0
FINAL_SAMPLES = 1024  # for each seed, of the trained policy
SUMMARY = "at_best,final_regret,final_se,mean_regret,mean_se,final_spread"
INIT, TRAIN, FINAL = range(3)  # what a seed's key is folded with, for three independent streams


@dataclasses.dataclass(frozen=True)
class Args:
    figure: Literal["2", "3", "all"] = "all"  # figure of the paper
    seed: int = 1  # first seed; each is a policy and samples of its own
    num_seeds: int = 20  # S, trained at once
    # weights of the samples
    weighting: Literal["all", "exp", "linear", "square"] = "all"  # g in eq. (9)
    neg_clip: float | None = None  # l in eq. (11) at first; default -0.6 for figure 2's Lin. Neg.
    neg_until: float = 0.5  # share of the epochs over which l rises to 0, linearly; inf: it stays
    lam: float = 0.25  # lambda in eq. (9), in standard deviations of the N rewards
    eps_kl: float | None = None  # nats, eq. (30): lam starts at --lam and follows its dual
    # flow policy
    num_samples: int = 64  # N, samples an epoch
    noise: float = 0.4  # std of the noise on the samples trained on, at first; falls to 0, linearly
    hidden_dim: int = 64  # H, units of each of the 2 hidden layers
    # optimisation
    epochs: int | None = None  # refits of the policy; default 200 for escape, 100 for the others
    grad_steps: int = 32  # gradient steps an epoch, on all N samples
    policy_lr: float = 2e-3  # Adam's rate
    run_dir: str | None = None  # default: runs/bandit__simpo_bandit__{seed}__{time}

    def __post_init__(self):
        counts = self.num_seeds, self.hidden_dim, self.grad_steps, self.epochs or 1
        rates, clip = (self.lam, self.policy_lr, self.neg_until), self.neg_clip or 0.0
        eps_kl, log_n = self.eps_kl, math.log(max(self.num_samples, 1))
        for ok, rule in (  # tyro prints a ValueError as an error of usage
            (min(counts) > 0 and self.epochs != 0, "counts must be at least 1"),
            (self.num_samples > 1, "--num-samples must be at least 2, for weights to compare"),
            (0 <= self.seed <= 2**32 - self.num_seeds, "--seed must be at least 0, all below 2^32"),
            (all(x > 0 for x in rates), "--lam, --policy-lr and --neg-until must be above 0"),
            (0 <= self.noise < math.inf, "--noise must be finite and at least 0"),
            (eps_kl is None or 0 < eps_kl < log_n, f"--eps-kl must be in (0, log N = {log_n:.3f})"),
            (-math.inf < clip <= 0, "--neg-clip must be finite and at most 0"),
            (not clip or self.weighting != "exp", "--neg-clip is for linear and square"),
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
        x = mish(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


# ---- flow --------------------------------------------------------------------------------------


def flow_velocity(theta, at, t):
    """The policy: vel at at [...] and t, a scalar or [...] in (0, 1] -> [...]."""
    t = jnp.broadcast_to(t, at.shape)
    features = (at, 2 * t - 1, jnp.cos(2 * jnp.pi * t), jnp.sin(2 * jnp.pi * t))
    return mlp(theta, jnp.stack(features, axis=-1))[..., 0]


def flow_sample(theta, num_samples, key):
    """Euler steps of da/dt = vel from t = 1 to 0 -> a0 [num_samples] in the box. The a0 that a step
    heads for is bounded: repulsion can blow the velocity up (section 3.4, case II)."""

    def euler(at, t):
        a0 = jnp.clip(at - t * flow_velocity(theta, at, t), -1e3, 1e3)
        return at - (at - a0) / t / SAMPLING_STEPS, None

    times = jnp.arange(SAMPLING_STEPS, 0, -1) / SAMPLING_STEPS
    a0, _ = jax.lax.scan(euler, jax.random.normal(key, (num_samples,)), times)
    return jnp.clip(a0, -BOX, BOX)


# ---- weights -----------------------------------------------------------------------------------


def sample_weights(weighting, neg_clip, q, lam):
    """w [N] of eq. (9), of mean 1, from q [N] and lam [], both in the units of q."""
    q = q - jnp.max(q)
    if weighting == "exp":  # Example 3.1
        return len(q) * jax.nn.softmax(q / lam)
    power = {"linear": 1, "square": 2}[weighting]
    y = (q - solve_nu(q, lam, power, neg_clip)) / lam
    return jnp.maximum(jnp.sign(y) * jnp.abs(y) ** power, neg_clip)  # eq. (11), if linear


def methods(args, figure):
    """{name: Args} of a figure's curves: the paper's, or the one that --weighting asks for."""
    if args.weighting != "all":
        return {args.weighting + "_neg" * bool(args.neg_clip): args}
    clip = (-0.6 if figure == "2" else 0.0) if args.neg_clip is None else args.neg_clip
    curves = {"linear": 0.0, "square": 0.0, "exp": 0.0} | ({"linear_neg": clip} if clip else {})
    copy = functools.partial(dataclasses.replace, args)
    return {x: copy(weighting=x.removesuffix("_neg"), neg_clip=y) for x, y in curves.items()}


# ---- update ------------------------------------------------------------------------------------


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


@functools.partial(jax.jit, static_argnums=0)
def init_learners(args, landscape, keys):
    """A policy for each of keys [S], fitted to the landscape's initial Gaussian by unweighted
    matching -> a Learner with a leading axis S."""
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, 1000))

    def draw(key):
        return landscape.mean + landscape.std * jax.random.normal(key, (256,)), jnp.ones(256)

    def init(key):
        k_net, k_fit = jax.random.split(jax.random.fold_in(key, INIT))
        theta = init_mlp(k_net, [4, args.hidden_dim, args.hidden_dim, 1])
        theta, _ = fit_flow(theta, adam.init(theta), adam, draw, 1000, k_fit)
        return Learner(theta, flow_optimiser(args).init(theta), jnp.log(args.lam))

    return jax.vmap(init)(keys)


@functools.partial(jax.jit, static_argnums=0)
def train_epoch(args, landscape, learners, keys, epoch, epochs):
    """Algorithm 1, epoch number `epoch` of `epochs`, for S seeds at once: learners and keys have a
    leading axis S -> learners, the samples [S, N] of their policies before the update."""
    progress = epoch / epochs
    fade = jnp.maximum(1 - progress / args.neg_until, 0.0)
    neg_clip = args.neg_clip * fade if args.neg_clip else 0.0

    def train(learner, key):
        key = jax.random.fold_in(jax.random.fold_in(key, TRAIN), epoch)
        k_sample, k_noise, k_fit = jax.random.split(key, 3)
        a0 = flow_sample(learner.theta, args.num_samples, k_sample)
        noise = args.noise * (1 - progress) * jax.random.normal(k_noise, a0.shape)
        noisy = jnp.clip(a0 + noise, -BOX, BOX)
        r = landscape.reward(noisy)
        q = (r - r.mean()) / jnp.sqrt(r.var() + 1e-12)  # jax.nn.standardize cancels in float32
        theta, opt, log_lam = learner
        w = sample_weights(args.weighting, neg_clip, q, jnp.exp(log_lam))
        if args.eps_kl is not None:
            log_lam, _ = update_lam(log_lam, q, args.eps_kl, lr=0.2)  # few epochs
        adam, num_steps = flow_optimiser(args), args.grad_steps
        theta, opt = fit_flow(theta, opt, adam, lambda _: (noisy, w), num_steps, k_fit)
        return Learner(theta, opt, log_lam), a0

    return jax.vmap(train)(learners, keys)


# ---- rewards and evaluation --------------------------------------------------------------------


class Landscape(NamedTuple):
    """Reward of two bumps and the Gaussian that the policy starts as; all of float32."""

    m: np.ndarray  # [2], middles, that of the higher bump last
    h: np.ndarray  # [2], heights
    s: np.ndarray  # [2], widths
    mean: np.ndarray
    std: np.ndarray

    def reward(self, a):
        """R(a), a [...]."""
        bumps = [h * jnp.exp(-(((a - m) / s) ** 2) / 2) for m, h, s in zip(*self[:3], strict=True)]
        return bumps[0] + bumps[1]

    def best(self):
        """max R over the box, on a grid of step 0.001."""
        return self.reward(jnp.linspace(-BOX, BOX, 4001)).max()


LANDSCAPES = {
    "escape": Landscape(*map(np.float32, ((-1, 1.5), (0.7, 1), (0.4, 0.4), -1, 0.8))),
    "broad": Landscape(*map(np.float32, ((-1, 1), (1, 1), (0.7, 0.7), 0, 0.6))),
    "sharp": Landscape(*map(np.float32, ((-1, 1), (1, 1), (0.03, 0.03), 0, 0.6))),
}
FIGURES = {"2": {"escape": 200}, "3": {"broad": 100, "sharp": 100}}  # landscape: epochs


@jax.jit
def final_samples(learners, keys):
    """Samples [S, FINAL_SAMPLES] of S policies."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, FINAL))(keys)
    return jax.vmap(flow_sample, in_axes=(0, None, 0))(learners.theta, FINAL_SAMPLES, keys)


def seed_keys(args):
    """Keys [S] of the seeds, split over the devices."""
    keys = jnp.stack([jax.random.key(args.seed + i) for i in range(args.num_seeds)])
    mesh = jax.sharding.Mesh(jax.devices()[: math.gcd(jax.device_count(), len(keys))], ("seed",))
    return jax.device_put(keys, NamedSharding(mesh, PartitionSpec("seed")))


def train_curve(args, landscape, learners, keys, epochs):
    """Trains S policies -> regret [epochs + 1, S] before each epoch and at the end, and the final
    samples [S, FINAL_SAMPLES], which give the last row."""
    path = []
    for epoch in tqdm(range(epochs), args.weighting, unit="epoch", leave=False, disable=None):
        learners, a0 = train_epoch(args, landscape, learners, keys, epoch, epochs)
        path.append(np.asarray(a0))
    final = np.asarray(final_samples(learners, keys))
    rewards = [landscape.reward(a0).mean(axis=-1) for a0 in (np.array(path), final[None])]
    regret = np.asarray(landscape.best() - np.concatenate(rewards))
    if not np.isfinite(regret).all():
        fail(f"the regret of {args.weighting} is not finite; lower --policy-lr", code=1)
    return regret, final


def standard_error(x):
    """Over the seeds, the last axis of x [..., S]; nan for one seed."""
    num = x.shape[-1]
    return x.std(axis=-1, ddof=1) / math.sqrt(num) if num > 1 else x.mean(axis=-1) * math.nan


def curve_summary(landscape, regret, samples):
    """SUMMARY of one curve: regret [epochs + 1, S], final samples [S, FINAL_SAMPLES].

    at_best is the share of seeds whose mean final reward is nearer to the best than to the lower
    optimum; nan where both optima are equally good.
    """
    gap, average = landscape.h[1] - landscape.h[0], regret.mean(axis=0)
    at_best = np.mean(regret[-1] < gap / 2) if gap else math.nan
    final = regret[-1].mean(), standard_error(regret[-1])
    return at_best, *final, average.mean(), standard_error(average), np.median(samples.std(axis=1))


LABELS = {  # names in the paper, and colours
    "exp": ("Exp", "tab:green"),
    "linear": ("Linear", "tab:blue"),
    "square": ("Square", "tab:purple"),
    "linear_neg": ("Lin. Neg.", "tab:red"),
    "square_neg": ("Sqr. Neg.", "tab:orange"),
}


def draw_curves(path, curves, starts):
    """Figure 2 or 3 from {landscape: {method: regret}}, a row for each landscape, and samples of
    the initial policies {landscape: [any]}."""
    fig = Figure((9, 3.2 * len(curves) + 0.4), layout="constrained")
    a, axes = np.linspace(-BOX, BOX, 1001), fig.subplots(len(curves), 2, squeeze=False)
    for (left, right), (landscape, methods) in zip(axes, curves.items(), strict=True):
        left.plot(a, LANDSCAPES[landscape].reward(a), color="black", label="reward R(a)")
        left.hist(starts[landscape], a[::20], density=True, color="0.8", label="initial policy")
        left.set(xlabel="action a", title=landscape)
        for name, regret in methods.items():
            label, colour = LABELS[name]
            mean, se = regret.mean(axis=1), standard_error(regret)
            right.plot(mean, color=colour, label=label)
            right.fill_between(range(len(mean)), mean - se, mean + se, color=colour, alpha=0.25)
        title = f"{regret.shape[1]} seeds, +- standard error" if regret.shape[1] > 1 else "one seed"
        right.set(xlabel="epoch", ylabel="regret max R - E R", ylim=(0, None), title=title)
    handles = [x for axis in axes[0] for x in axis.get_legend_handles_labels()[0]]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    for suffix in (".png", ".pdf"):
        fig.savefig(path.with_suffix(suffix), dpi=80)


# ---- main --------------------------------------------------------------------------------------


def fail(message, code=2):
    """One line, and an exit code: 2 for bad usage, 1 for a run that cannot go on."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(code)


def make_run_dir(args):
    """A folder that no other run has, with args.json and versions.json."""
    name = f"bandit__simpo_bandit__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    versions = {x: version(x) for x in ("jax", "optax", "numpy", "matplotlib")}
    versions["commit"] = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD")
    for suffix in ["", *(f"-{i}" for i in range(2, 100))]:
        run_dir = Path(args.run_dir or f"runs/{name}{suffix}")
        try:
            run_dir.mkdir(parents=True)
            (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2))
            (run_dir / "versions.json").write_text(json.dumps(versions, indent=2))
            return run_dir
        except OSError as error:
            if args.run_dir or not isinstance(error, FileExistsError):
                fail(f"--run-dir {run_dir}: {error.strerror}")


def train_figure(args, figure, run_dir, rows, table):
    """Trains the curves of figure 2 or 3 and draws them; adds to the lines of both CSV files."""
    curves, starts, keys = {}, {}, seed_keys(args)
    for name, epochs in FIGURES[figure].items():
        landscape, curves[name] = LANDSCAPES[name], {}
        learners, epochs = init_learners(args, landscape, keys), args.epochs or epochs
        starts[name] = np.ravel(final_samples(learners, keys))
        for label, curve in methods(args, figure).items():
            regret, samples = train_curve(curve, landscape, learners, keys, epochs)
            curves[name][label] = regret
            for (seed, epoch), value in np.ndenumerate(regret.T):
                rows.append(f"{name},{label},{args.seed + seed},{epoch},{value:.6f}")
            numbers = (f"{x:.4f}" for x in curve_summary(landscape, regret, samples))
            table.append(",".join((name, label, str(args.num_seeds), *numbers)))
            print(table[-1].replace(",", "\t").expandtabs(14), flush=True)
    draw_curves(run_dir / f"figure{figure}", curves, starts)


def main():
    for name in {"SIGINT", "SIGPIPE"} & {*dir(signal)}:  # Ctrl-C and `--help | head` end quietly
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_default_matmul_precision", "float32")  # a GPU would keep ten bits
    if jax.config.jax_num_cpu_devices < 0:  # XLA threads one CPU device badly: make one a core
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", cores)
    args = tyro.cli(Args)
    run_dir = make_run_dir(args)
    rows, table = ["landscape,method,seed,epoch,regret"], ["landscape,method,seeds," + SUMMARY]
    print(f"run folder {run_dir}", table[0].replace(",", "\t").expandtabs(14), sep="\n", flush=True)
    for figure in FIGURES if args.figure == "all" else [args.figure]:
        train_figure(args, figure, run_dir, rows, table)
    (run_dir / "curves.csv").write_text("\n".join(rows) + "\n")
    (run_dir / "summary.csv").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
