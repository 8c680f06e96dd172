"""SiMPO on DNA: fine-tune a masked diffusion model of 200-bp sequences on a reward (Table 3).

    python simpo_dna.py --weighting square --neg-clip -1
    python simpo_dna.py --oracle mymodule:score --eval-oracle mymodule:held_out --data mine.csv
    python simpo_dna.py --resume runs/NAME

Paper: arXiv 2603.10250, section 5.3. To use it elsewhere, copy this file, common.py and dna/. The
first command pretrains a small model on generated sequences and fine-tunes it on a motif score, in
five minutes on two cores; on the files of DRAKES (Wang et al. 2024a) it is the paper's experiment.
Time runs from t = 0 (sequence) to t = 1 (all masked) in T steps; a base is masked by t with chance
m_t = (1 - 1e-3) t. Legend: B sequences, G groups of N samples, L bases, C channels; x [B, L] holds
0..3 = A C G T and 4 = mask, x0 is a sequence without masks, q the oracle's score.

Where the paper is silent, or we depart from it:
1. There is no state: one group of N samples of the current model stands for one state.
2. lam takes LAM_STEPS steps of its dual in every iteration, since there are few iterations.
3. The clip of eq. (11) also applies to the square weight ("Sqr. Neg.").
4. Each gradient step draws from the last R iterations; on the newest alone the model drifts.
5. Optional: --neg-floor bounds what negative weights do, --kl-weight holds the model near the
   pretrained one. Neither is in the paper.
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
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats
from tensorboardX import SummaryWriter
from tqdm import tqdm

from common import solve_nu, update_lam
from dna.data import (
    UsageError,
    fill,
    generate_data,
    load_arrays,
    nest,
    read_data,
    save_arrays,
    shuffle_dinucleotides,
    write_fasta,
)
from dna.oracles import conv, dense, layer_norm, load_motifs, load_oracle, motif_hits

jax.config.update("jax_enable_x64", False)  # also where JAX_ENABLE_X64 is set

MASK = 4
LAM_STEPS = 20  # steps of the dual of lam in an iteration
LOG_EVERY, VALID = 50, 256  # steps of pretraining; sequences held out from it
MAX_REFERENCE = 20_000  # sequences that the held-out oracle scores for the reference
DILATIONS = (1, 1, 4, 16, 64)  # each num_layers // 5 times in a row


@dataclasses.dataclass(frozen=True)
class Args:
    # experiment
    seed: int = 1  # of the network, the order of the data and all sampling
    run_dir: str | None = None  # default: runs/dna__{seed}__{time}
    resume: str | None = None  # run folder to go on with, bit for bit; its flags are taken
    pretrained: str | None = None  # start from it: an npz of a run or of dna/convert_drakes.py
    pretrain_only: bool = False  # stop after pretraining; its pretrained.npz is for --pretrained
    score: str | None = None  # file of sequences: print their scores as CSV, and stop
    verify_oracle: str | None = None  # column of --data: print how the oracles agree, and stop
    eval_samples: int = 640  # sequences of each row of the table
    checkpoint_every: int = 100  # steps of pretraining; in fine-tuning it is every iteration
    num_devices: int | None = None  # that share a batch; default as many as divide it
    distributed: bool = False  # one process of several: Slurm, Open MPI, or three variables JAX_*
    track: bool = False  # mirror the TensorBoard log to Weights & Biases
    # data and rewards
    data: str | None = None  # training set, CSV or FASTA; default generated sequences
    drop_bad_rows: bool = False  # leave out the rows of --data that are errors otherwise
    score_column: str | None = None  # of --data: its best are the reference of the correlations
    oracle: str = "motif"  # optimised: motif[:FILE.json], enformer:FILE.npz or MODULE:FUNCTION
    eval_oracle: str | None = None  # held-out judge of the same form; default motif for motif
    oracle_column: int = 0  # of an oracle with several outputs; of Enformer's, 0 is HepG2
    # weights of the samples
    weighting: Literal["exp", "linear", "square", "wd1", "uniform"] = "linear"  # g in eq. (9)
    neg_clip: float = 0.0  # l in eq. (11): smallest weight; 0 is w >= 0
    neg_floor: float = 0.0  # a negative weight no longer lowers p(x0_i | x_t) below it
    eps_kl: float = 1.5  # eq. (30): KL of softmax(q / lam) to uniform, in nats; below log N
    kl_weight: float = 0.0  # of KL to the pretrained model, per base, in the loss
    # diffusion model
    num_samples: int = 32  # N, samples of a group
    num_groups: int = 4  # G, groups of an iteration
    sampling_steps: int = 32  # T, of the sampler and of the likelihood (DRAKES 128)
    hidden_dim: int = 32  # C, channels; --pretrained has its own (DRAKES 128)
    num_layers: int = 5  # residual layers, a multiple of 5 (DRAKES 20)
    # optimisation
    pretrain_steps: int = 2400
    batch_size: int = 64  # sequences of a step of pretraining
    pretrain_lr: float = 2e-3  # Adam's rate after a tenth of the steps; falls to 0 by a cosine
    finetune_steps: int = 200  # iterations of SiMPO; the last one is reported
    grad_steps: int = 8  # of an iteration, each on G N of the replayed sequences
    replay: int = 8  # R, iterations whose sequences are replayed
    finetune_lr: float = 2e-3  # Adam's rate at the first step; falls linearly to 0

    def __post_init__(self):
        counts = "eval_samples checkpoint_every num_groups sampling_steps hidden_dim pretrain_steps"
        counts = f"{counts} batch_size grad_steps replay".split()
        power = self.weighting in ("linear", "square")
        negative = self.neg_clip < 0 or self.weighting == "wd1"
        log_n = math.log(max(self.num_samples, 1))
        tuned = self.pretrained and (self.pretrain_steps, self.hidden_dim, self.num_layers)
        for ok, rule in (  # tyro prints a ValueError as a usage error
            (0 <= self.seed < 2**32, "--seed must be in [0, 2^32)"),
            (self.num_samples >= 2, "--num-samples must be at least 2, for weights to compare"),
            (0 < self.eps_kl < log_n, f"--eps-kl must be in (0, log N), log N = {log_n:.3f}"),
            (-math.inf < self.neg_clip <= 0, "--neg-clip must be finite and at most 0"),
            (power or not self.neg_clip, "--neg-clip needs --weighting linear or square"),
            (0 <= self.neg_floor < 1, "--neg-floor must be in [0, 1)"),
            (negative or not self.neg_floor, "--neg-floor does nothing with weights >= 0"),
            (0 <= self.kl_weight < math.inf, "--kl-weight must be finite and at least 0"),
            (self.num_layers % 5 == 0 < self.num_layers, "--num-layers must be a multiple of 5"),
            (self.finetune_steps >= 0, "--finetune-steps must be at least 0"),
            (0 < self.pretrain_lr < math.inf, "--pretrain-lr must be finite and above 0"),
            (0 < self.finetune_lr < math.inf, "--finetune-lr must be finite and above 0"),
            (self.oracle_column >= 0, "--oracle-column must be at least 0"),
            (":" in self.oracle or self.oracle == "motif", "--oracle must be motif or KIND:NAME"),
            (
                self.eval_oracle or self.oracle == "motif",
                "--eval-oracle must be given beside your --oracle: a judge that is not optimised",
            ),
            (self.data or not self.score_column, "--score-column needs --data"),
            (self.data or not self.verify_oracle, "--verify-oracle needs --data"),
            (not (self.pretrain_only and self.pretrained), "--pretrain-only trains from nothing"),
            (tuned in (None, (2400, 32, 5)), "--pretrained has its own size and is not pretrained"),
            *((getattr(self, c) >= 1, f"--{c.replace('_', '-')} must be >= 1") for c in counts),
        ):
            if not ok:
                raise ValueError(rule)

    @property
    def held_out(self):
        return self.eval_oracle or "motif"

    @property
    def method(self):
        """Name of the fine-tuned row and its FASTA: simpo-linear, simpo-linear_neg0.2."""
        notes = {"neg": -self.neg_clip, "floor": self.neg_floor, "kl": self.kl_weight}
        notes = (f"_{key}{value:g}" for key, value in notes.items() if value)
        return f"simpo-{self.weighting}" + "".join(notes)


# ---- networks ----------------------------------------------------------------------------------


def init_generator(key, hidden_dim, num_layers):
    """theta of the DRAKES generator: lecun normal weights, zero biases, also those of the time.

    num_layers is a multiple of 5. "time" [C] of a layer stands for the original's time embedding,
    a constant because the original sets sigma to 0.
    """
    init, c = jax.nn.initializers.lecun_normal(), hidden_dim
    keys = iter(jax.random.split(key, num_layers + 3))

    def layer(*shape):
        return {"w": init(next(keys), shape), "b": jnp.zeros(shape[-1])}

    def residual():
        norm = {"w": jnp.ones(c), "b": jnp.zeros(c)}
        return {"conv": layer(9, c, c), "norm": norm, "time": jnp.zeros(c)}

    layers = [residual() for _ in range(num_layers)]
    first, head = layer(9, MASK + 1, c), [layer(c, c), layer(c, MASK + 1)]
    return {"first": first, "layers": layers, "head": head}


def logits(theta, x):
    """The DRAKES generator at sigma = 0: tokens x [B, L] -> logits [B, L, 5], not normalised."""
    x = jax.nn.relu(conv(theta["first"], jax.nn.one_hot(x, MASK + 1)))
    for i, layer in enumerate(theta["layers"]):
        h = layer_norm(layer["norm"], x + layer["time"][None, None])
        dilation = DILATIONS[i * len(DILATIONS) // len(theta["layers"])]
        x = x + jax.nn.relu(conv(layer["conv"], h, dilation))
    first, last = theta["head"]
    return dense(last, jax.nn.relu(dense(first, x)))


# ---- diffusion ---------------------------------------------------------------------------------


def mask_chance(t):
    """m_t of the log-linear noise: a base is masked by time t."""
    return (1 - 1e-3) * t


def log_probs(theta, x):
    """SUBS: log p(x0 | x_t) [B, L, 4], without a mask; a point mass where x [B, L] is a base."""
    free = jax.nn.log_softmax(logits(theta, x)[..., :MASK], axis=-1)
    known = jnp.where(x[..., None] == jnp.arange(MASK)[None, None], 0.0, -1e6)
    return jnp.where((x == MASK)[..., None], free, known)


def times(num_steps):
    """The sampler's t from 1 to 1e-5 [T + 1]."""
    return jnp.linspace(1, 1e-5, num_steps + 1)


def unmask(log_p, x, t, s, key):
    """One draw of x_s given x_t = x [B, L] and log p(x0 | x_t) [B, L, 4]; s < t."""
    m_t, m_s = mask_chance(t), mask_chance(s)
    stay = jnp.full((*x.shape, 1), jnp.log(m_s))
    log_q = jnp.concatenate([log_p + jnp.log(m_t - m_s), stay], axis=-1)
    drawn = jnp.argmax(log_q + jax.random.gumbel(key, log_q.shape), axis=-1)
    return jnp.where(x == MASK, drawn.astype(x.dtype), x)


@functools.partial(jax.jit, static_argnums=1)
def sample_sequences(theta, num_steps, x, key):
    """Ancestral sampling from x [B, L], all masks, in T steps and a last argmax. -> x0 [B, L]."""

    def step(x, i):
        return unmask(log_probs(theta, x), x, ts[i], ts[i + 1], jax.random.fold_in(key, i)), None

    ts = times(num_steps)
    x, _ = jax.lax.scan(step, x, jnp.arange(num_steps))
    return jnp.argmax(log_probs(theta, x), axis=-1)


@functools.partial(jax.jit, static_argnums=1)
def log_likelihood(theta, num_steps, x0, key):
    """App-Log-Lik of x0 [B, L], nats a sequence [B]: the sampler's bound, one draw for each t."""

    def step(total, i):
        m_t, m_s = mask_chance(ts[i]), mask_chance(ts[i + 1])
        hidden = jax.random.uniform(jax.random.fold_in(key, i), x0.shape) < m_t
        log_p = log_probs(theta, jnp.where(hidden, MASK, x0))
        log_p = jnp.take_along_axis(log_p, x0[..., None], axis=-1)[..., 0]
        return total + jnp.sum(hidden * log_p, axis=-1) * (m_t - m_s) / m_t, None

    ts = times(num_steps)
    return jax.lax.scan(step, jnp.zeros(x0.shape[0]), jnp.arange(num_steps))[0]


def mask_at_random(x0, key):
    """x0 [B, L] -> x_t, which bases it hides, t [B, 1], stratified over the batch in (1e-3, 1)."""
    k_t, k_order, k_mask = jax.random.split(key, 3)
    b = x0.shape[0]
    t = (jax.random.permutation(k_order, b) + jax.random.uniform(k_t, (b,))) / b
    t = (t * (1 - 1e-3) + 1e-3)[:, None]
    hidden = jax.random.uniform(k_mask, x0.shape) < mask_chance(t)
    return jnp.where(hidden, MASK, x0), hidden, t


def subs_loss(theta, x0, w, key, neg_floor=0.0):
    """Weighted SUBS loss, nats a base: x0 [B, L], w [B] -> []. With w = 1 its expectation is at
    least the mean of -log p(x0) / L.

    Where w < 0, a base of p(x0_i | x_t) < neg_floor adds nothing to the gradient, so that the loss
    is bounded below.
    """
    x_t, hidden, t = mask_at_random(x0, key)
    log_p = jnp.take_along_axis(log_probs(theta, x_t), x0[..., None], axis=-1)[..., 0]
    bounded = jnp.maximum(log_p, jnp.log(neg_floor))
    log_p = jnp.where((w < 0)[:, None], bounded, log_p)
    return -jnp.mean(w[:, None] * hidden * log_p / t)


def kl_to(theta_pretrained, theta, x0, key):
    """KL of the model to the pretrained one, nats a base, where x0 [B, L] are its samples: that of
    the sampler's law of masks and bases, which bounds the KL of the sequences."""
    x_t, hidden, t = mask_at_random(x0, key)
    log_p, log_p_pretrained = log_probs(theta, x_t), log_probs(theta_pretrained, x_t)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_p_pretrained), axis=-1)
    return jnp.mean(hidden * kl / t)


# ---- weights -----------------------------------------------------------------------------------


def group_weights(args, q, lam):
    """Eq. (9): q [G, N] and lam, in reward units -> w [G, N], mean 1 over N (wd1: 0)."""
    n, q = q.shape[-1], jax.lax.stop_gradient(q - jnp.max(q, axis=-1, keepdims=True))
    if args.weighting == "uniform":  # the control: the reward is not used
        return jnp.ones_like(q)
    if args.weighting == "exp":  # Example 3.1, RL-D2
        return n * jax.nn.softmax(q / lam, axis=-1)
    if args.weighting == "wd1":  # Example 3.4
        adv = jax.nn.standardize(q, axis=-1, epsilon=1e-12)
        return n * (jax.nn.softmax(adv, axis=-1) - jax.nn.softmax(-adv, axis=-1))
    power = {"linear": 1, "square": 2}[args.weighting]
    y = (q - solve_nu(q, lam, power, args.neg_clip)) / lam
    return jnp.maximum(jnp.sign(y) * jnp.abs(y) ** power, args.neg_clip)  # eq. (11)


@functools.partial(jax.jit, static_argnums=0)
def weigh(args, log_lam, q):
    """Stage I: scores q [G, N] -> w [G, N], the new log lam, metrics {name: scalar}."""
    for _ in range(LAM_STEPS):
        log_lam, kl = update_lam(log_lam, q, args.eps_kl)
    w = group_weights(args, q, jnp.exp(log_lam))
    ess = jnp.sum(jnp.abs(w), axis=-1) ** 2 / jnp.maximum(jnp.sum(w**2, axis=-1), 1e-30)
    metrics = {"q_spread": jnp.mean(jnp.std(q, axis=-1)), "lam": jnp.exp(log_lam), "kl": kl}
    metrics |= {"w_max": w.max(), "w_negative": jnp.mean(w < 0), "ess": ess.mean()}
    return w, log_lam, metrics


# ---- update ------------------------------------------------------------------------------------


class TrainState(NamedTuple):
    """Everything that training changes on the device."""

    theta: dict
    opt: optax.OptState
    log_lam: jax.Array
    step: jax.Array  # gradient steps done
    replay: tuple = ()  # in fine-tuning x0 [R G N, L] and w [R G N], the newest last


def optimiser(args, phase):
    """Adam on gradients of norm 1 at most."""
    rate = optax.linear_schedule(args.finetune_lr, 0.0, args.finetune_steps * args.grad_steps)
    if phase == "pretrain":
        warm_up = max(args.pretrain_steps // 10, 1)
        peak, steps = args.pretrain_lr, max(args.pretrain_steps, warm_up + 1)
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, warm_up, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def init_state(args, phase, theta, length=0):
    zero, rows = jnp.zeros((), jnp.int32), args.replay * args.num_groups * args.num_samples
    replay = np.zeros((rows, length), np.int32), np.zeros(rows, np.float32)
    replay = replay if phase == "finetune" else ()
    return TrainState(theta, optimiser(args, phase).init(theta), jnp.zeros(()), zero, replay)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def refit(args, phase, state, theta_pretrained, x0, w, key):
    """One gradient step of the weighted loss on x0 [B, L], w [B]. -> state, loss, gradient norm."""

    def loss_of(theta):
        loss = subs_loss(theta, x0, w, key, args.neg_floor)
        if phase == "finetune" and args.kl_weight:
            loss += args.kl_weight * kl_to(theta_pretrained, theta, x0, key)
        return loss

    key = jax.random.fold_in(key, state.step)
    loss, grads = jax.value_and_grad(loss_of)(state.theta)
    updates, opt = optimiser(args, phase).update(grads, state.opt)
    theta = optax.apply_updates(state.theta, updates)
    return state._replace(theta=theta, opt=opt, step=state.step + 1), loss, optax.tree.norm(grads)


valid_nll = jax.jit(subs_loss)


@jax.jit
def bounds(theta, theta_pretrained, x0, key):
    """Of samples x0 [B, L]: -log p under both models, nats a base, and KL, nats a sequence."""
    nll, nll_pretrained = (
        subs_loss(model, x0, jnp.ones(x0.shape[0]), key) for model in (theta, theta_pretrained)
    )
    kl = x0.shape[1] * kl_to(theta_pretrained, theta, x0, key)
    return {"nll": nll, "nll_pretrained": nll_pretrained, "kl_pretrained": kl}


def finetune(args, state, theta_pretrained, oracles, masks, key):
    """One iteration of SiMPO from masks [G N, L]: sample, weigh, grad_steps steps of stage II.

    -> state, metrics {name: scalar}. The held-out oracle is logged and not used. The gradient
    steps are calls of their own: XLA's CPU compiler makes the gradient of a convolution 90 times
    slower inside a loop.
    """
    whole = NamedSharding(masks.sharding.mesh, PartitionSpec())
    k_sample, k_bound, k_refit = jax.random.split(jax.random.fold_in(key, state.step), 3)
    step, replay, state = int(fetch(state.step)), fetch(state.replay), state._replace(replay=())
    x0 = sample_sequences(state.theta, args.sampling_steps, masks, k_sample)
    metrics = bounds(state.theta, theta_pretrained, x0, k_bound)
    x0 = fetch(x0)
    q, q_eval = (score(args, oracle, x0, masks.sharding) for oracle in oracles)
    metrics |= {"q_median": np.median(q), "q_max": q.max(), "eval_median": np.median(q_eval)}
    groups = place(q.reshape(args.num_groups, args.num_samples), whole)
    w, log_lam, weight_metrics = weigh(args, state.log_lam, groups)
    # the newest sequences push the oldest out of the replay; the first ones fill it
    new = x0, fetch(w).reshape(-1)
    if step == 0:
        replay = tuple(np.resize(part, old.shape) for part, old in zip(new, replay, strict=True))
    else:
        both = zip(new, replay, strict=True)
        replay = tuple(np.concatenate([old[len(part) :], part]) for part, old in both)
    rng, losses, norms = np.random.default_rng([args.seed, 2, step]), [], []
    state = state._replace(log_lam=log_lam)
    for _ in range(args.grad_steps):
        rows = rng.choice(len(replay[1]), len(masks), replace=False)
        batch = place([part[rows] for part in replay], masks.sharding)
        state, loss, norm = refit(args, "finetune", state, theta_pretrained, *batch, k_refit)
        losses.append(loss)
        norms.append(norm)
    metrics |= weight_metrics | {"loss": sum(losses) / len(losses)}
    return state._replace(replay=replay), metrics | {"grad_norm": jnp.stack(norms).max()}


# ---- evaluation --------------------------------------------------------------------------------


class Judge(NamedTuple):
    """What sequences are measured with: both oracles, other motifs, a model, a reference."""

    ft: NamedTuple
    eval: NamedTuple
    motifs: dict  # of factors that no embedded oracle uses
    theta: dict  # the pretrained model
    kmers: np.ndarray  # of the reference, [64]
    hits: np.ndarray  # [F]


def in_batches(args, f, x, split):
    """f(x[i : i + G N], batch number) over host integers x [n, L], the last batch filled up."""
    out, size = [], args.num_samples * args.num_groups
    for i in range(0, len(x), size):
        part = x[np.minimum(np.arange(i, i + size), len(x) - 1)].astype(np.int32)
        out.append(fetch(f(place(part, split), i // size)))
    return np.concatenate(out)[: len(x)]


def score(args, oracle, x, split):
    """The oracle's score of host integers x [n, L] -> [n]. One process calls a host function."""
    if oracle.params is not None:
        return in_batches(args, lambda part, _: oracle.apply(oracle.params, part), x, split)
    q = np.zeros(len(x), np.float32) if jax.process_index() else oracle.apply(x)
    return np.asarray(multihost_utils.broadcast_one_to_all(q)) if jax.process_count() > 1 else q


def sample(args, theta, num, length, key, split):
    """num sequences of the model [num, L]."""

    def draw(masks, i):
        return sample_sequences(theta, args.sampling_steps, masks, jax.random.fold_in(key, i))

    return in_batches(args, draw, np.full((num, length), MASK), split)


def likelihoods(args, theta, x, key, split):
    """App-Log-Lik of x [n, L] under a model, nats a sequence [n]."""

    def bound(part, i):
        return log_likelihood(theta, args.sampling_steps, part, jax.random.fold_in(key, i))

    return in_batches(args, bound, x, split)


def kmer_counts(x):
    """Counts of the 64 3-mers over x [n, L]."""
    x = x.astype(np.int64)
    return np.bincount((16 * x[:, :-2] + 4 * x[:, 1:-1] + x[:, 2:]).ravel(), minlength=64)


def count_hits(args, motifs, x, split):
    """Sites of each motif, summed over x [n, L] -> [F]."""
    return in_batches(args, lambda part, _: motif_hits(motifs, part), x, split).sum(axis=0)


def make_judge(args, data, theta, oracles, shards):
    """The reference is the best 0.1 % of the data, at least 200 sequences, by --score-column or,
    without it, by the held-out oracle on at most MAX_REFERENCE of them, drawn at random."""
    whole, split = shards
    motifs, x = place(load_motifs(part="control"), whole), data.x
    if args.score_column:
        value, by = np.array(data.values, float), f"column {args.score_column}"
    else:
        drawn = np.random.default_rng([args.seed, 3]).permutation(len(x))[:MAX_REFERENCE]
        x, by = x[np.sort(drawn)], f"held-out oracle {args.held_out}"
        value = score(args, oracles[1], x, split)
    best = x[np.argsort(-value, kind="stable")[: max(len(x) // 1000, 200)]]
    if not jax.process_index():
        print(f"reference   best {len(best)} of {len(x)} sequences by {by}", flush=True)
    return Judge(*oracles, motifs, theta, kmer_counts(best), count_hits(args, motifs, best, split))


def measure(args, judge, x, calls, key, split):
    """Of sequences x [n, L]: {column: [n]} for their FASTA, and {column: number}, a table row.

    ft and eval are medians of the oracles (Pred-Activity), those behind _shuffled of a shuffle of
    every sequence that keeps its pairs of bases; log_lik is that of App-Log-Lik under the
    pretrained model in nats a sequence.
    """
    values = {"ft": score(args, judge.ft, x, split), "eval": score(args, judge.eval, x, split)}
    values["loglik"] = likelihoods(args, judge.theta, x, key, split)
    mixed = shuffle_dinucleotides(x, np.random.default_rng(args.seed))
    row = {}
    for name, oracle in (("ft", judge.ft), ("eval", judge.eval)):
        row[name] = np.median(values[name])
        row[f"{name}_shuffled"] = np.median(score(args, oracle, mixed, split))
    row["corr_3mer"] = stats.pearsonr(kmer_counts(x), judge.kmers).statistic
    hits = count_hits(args, judge.motifs, x, split)
    row["corr_motif"] = stats.spearmanr(hits, judge.hits).statistic if np.ptp(hits) else math.nan
    row["log_lik"] = np.median(values["loglik"])
    row["gc"] = np.mean((x == 1) | (x == 2))
    row["unique"] = len(np.unique(x, axis=0)) / len(x)
    return values, {name: float(value) for name, value in row.items()} | {"oracle_calls": calls}


def write_table(table, path):
    """Writes {method: row} as CSV, at once: its presence says that the run is complete; prints."""
    columns = list(next(iter(table.values())))
    lines = [",".join(("method", *columns))]
    lines += [",".join((name, *(f"{v:.6g}" for v in row.values()))) for name, row in table.items()]
    path.with_suffix(".tmp").write_text("\n".join(lines) + "\n")
    path.with_suffix(".tmp").replace(path)
    wide = max(map(len, table)) + 2
    print("method".ljust(wide) + "".join(name.rjust(14) for name in columns))
    for name, row in table.items():
        cells = (f"{v:14.{0 if k == 'oracle_calls' else 3}f}" for k, v in row.items())
        print(name.ljust(wide) + "".join(cells))


def verify_oracle(args, data, oracles, split):
    """Prints how both oracles agree with a column of the data, on --eval-samples rows drawn at
    random: correlations, or the AUC if it has two labels, the last in order the positive one."""
    rows = np.random.default_rng(args.seed).permutation(len(data.x))[: args.eval_samples]
    values, labels = np.array(data.values)[rows], sorted(set(data.values))
    for name, oracle in zip(("ft", "eval"), oracles, strict=True):
        q = score(args, oracle, data.x[rows], split)
        if len(labels) == 2:
            high = values == labels[1]
            auc = stats.mannwhitneyu(q[high], q[~high]).statistic / (high.sum() * (~high).sum())
            result = f"AUC of {labels[1]} against {labels[0]} {auc:.3f}"
        else:
            try:
                column = values.astype(float)
            except ValueError as error:
                raise UsageError(f"--verify-oracle {args.verify_oracle}: {error}") from None
            pearson, spearman = stats.pearsonr(q, column), stats.spearmanr(q, column)
            result = f"Pearson {pearson.statistic:.3f}, Spearman {spearman.statistic:.3f}"
        if not jax.process_index():
            print(f"{name} oracle, {len(rows)} sequences: {result}")


def score_file(args, oracles, theta, key, split):
    """Prints name, ft, eval and, with a model, loglik of each sequence of --score as CSV."""
    data = read_data(args.score, None, args.drop_bad_rows, training=False)
    columns = [score(args, oracle, data.x, split) for oracle in oracles]
    columns += [likelihoods(args, theta, data.x, key, split)] if theta else []
    if not jax.process_index():
        print("name,ft,eval" + (",loglik" if theta else ""))
        for name, *row in zip(data.names, *columns, strict=True):
            print(",".join((name, *(f"{value:.6g}" for value in row))))


# ---- checkpoints and devices -------------------------------------------------------------------


def load_theta(args, path):
    """-> theta, meta (method, data) of a generator's npz; UsageError for anything else."""
    arrays, meta = load_arrays(path, "generator")
    try:
        tree = nest(arrays)
        sizes = tree["first"]["b"].shape[0], len(tree["layers"])
    except (KeyError, TypeError, IndexError, AttributeError):
        raise UsageError(f"{path} is no generator of simpo_dna: layers are missing") from None
    template = jax.eval_shape(lambda: init_generator(jax.random.key(0), *sizes))
    meta["method"] = str(meta.get("method", "pretrained")).replace("/", "-")  # names a file
    if sizes[1] % 5:
        raise UsageError(f"{path} has {sizes[1]} layers; expected a multiple of 5")
    if meta.setdefault("data", None) and not (args.data or args.score):
        raise UsageError(f"{path} was trained on {meta['data']}; --data must be that file")
    return fill(template, arrays, path), meta


def start_distributed():
    """Joins the other processes; before anything else asks JAX for a device."""
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    count, index = (int(os.environ[name]) if name in os.environ else None for name in names)
    try:
        jax.distributed.initialize(num_processes=count, process_id=index)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--distributed: {' '.join(str(error).split())}") from None


def make_shards(args):
    """The devices of all processes that share a batch -> sharding of whole and of split arrays."""
    devices, count = jax.devices(), args.num_devices
    sizes = args.batch_size, args.num_groups * args.num_samples
    if count is None:
        count = math.gcd(len(devices), *sizes)
    if not 1 <= count <= len(devices) or any(size % count for size in sizes):
        rule = f"at most {len(devices)} here and divide --batch-size and G N, {sizes}"
        raise UsageError(f"--num-devices must be {rule}, got {count}")
    if jax.process_count() > 1 and count != len(devices):
        raise UsageError(f"--distributed needs batches {sizes} that {len(devices)} devices divide")
    mesh = jax.sharding.Mesh(np.array(devices[:count]), ("batch",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))


def place(tree, sharding):
    """Host arrays, the same on every process, onto the devices."""

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def fetch(tree):
    """Device arrays, wherever their parts are, as host arrays on every process."""

    def get(x):
        is_spread = isinstance(x, jax.Array) and not x.is_fully_addressable
        return multihost_utils.process_allgather(x, tiled=True) if is_spread else np.asarray(x)

    return jax.tree.map(get, tree)


# ---- main --------------------------------------------------------------------------------------


def parse_args():
    """-> args, the run folder to go on with or None. --resume takes its flags as defaults; beside
    it only those that say where to run may differ."""
    if {"--help", "-h"} & set(sys.argv) and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
    args = tyro.cli(Args)
    if not args.resume:
        return args, None
    try:
        saved = json.loads((Path(args.resume) / "args.json").read_text())
        saved = Args(**saved | {"distributed": False, "num_devices": None})
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(f"--resume {args.resume} is no run folder: {error}") from None
    run_dir, args = Path(args.resume), dataclasses.replace(tyro.cli(Args, default=saved), resume="")
    free = {"resume": "", "distributed": args.distributed, "num_devices": args.num_devices}
    free |= {"track": args.track, "checkpoint_every": args.checkpoint_every}
    if args != dataclasses.replace(saved, **free):
        pairs = zip(vars(args).items(), vars(saved).values(), strict=True)
        differing = [k for (k, new), old in pairs if new != old and k not in free]
        raise UsageError(f"--{differing[0].replace('_', '-')} must stay beside --resume")
    return args, run_dir


def make_run_dir(args):
    """Makes the run folder, with a suffix where another run has its default name."""
    name = f"runs/dna__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    if jax.process_index():  # the first process alone writes
        return Path(args.run_dir or name)
    packages = {p: version(p) for p in ("jax", "jaxlib", "optax", "numpy", "scipy")}
    packages["commit"] = subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD")
    content = {"args": dataclasses.asdict(args), "versions": packages}
    for suffix in ("", *(f"-{i}" for i in range(1, 1000))):
        run_dir = Path(args.run_dir or name + suffix)
        try:
            run_dir.mkdir(parents=True)
            for file, values in content.items():
                (run_dir / f"{file}.json").write_text(json.dumps(values, indent=2))
            return run_dir
        except FileExistsError:
            if args.run_dir:
                break
        except OSError as error:
            raise UsageError(f"--run-dir {run_dir}: {error.strerror}") from None
    raise UsageError(f"--run-dir {run_dir} exists; --resume continues a run")


def train(args, run_dir, phase, state, step_once, whole):
    """Goes on from the phase's checkpoint, if there is one, to its end -> theta.

    step_once(state, step, due) -> state, metrics {name: scalar}, which are read where due.
    """
    first, total, every, log_every, shown = {
        "pretrain": (0, args.pretrain_steps, args.checkpoint_every, LOG_EVERY, "valid_nll"),
        "finetune": (args.pretrain_steps, args.finetune_steps, 1, 1, "q_median"),
    }[phase]
    path, step, names, curve = run_dir / f"{phase}_checkpoint.npz", 0, [], []
    if path.exists():
        arrays, meta = load_arrays(path, f"{phase} checkpoint")
        step, names, curve = meta["step"], meta["names"], arrays.pop("['curve']").tolist()
        state = fill({"state": state}, arrays, path)["state"]
    state, lead = place(state, whole), not jax.process_index()
    log = SummaryWriter(str(run_dir), purge_step=first + step + 1) if lead else None
    if lead:
        log.add_text("args", "\n".join(f"    {name}: {x}" for name, x in vars(args).items()))
    bar = tqdm(total=total, initial=step, desc=phase, disable=None if lead else True)
    while step < total:
        due = (step + 1) % log_every == 0 or step + 1 == total
        state, metrics = step_once(state, step, due)
        step += 1
        bar.update()
        if due:
            metrics = {name: float(value) for name, value in fetch(metrics).items()}
            names = list(metrics)
            curve.append([step, *metrics.values()])
            line = f"{shown} {metrics[shown]:.3f}"
            bar.set_postfix_str(line)
            if lead and bar.disable and (step % max(total // 20, log_every) == 0 or step == total):
                print(f"{phase} {step}/{total} {line}", flush=True)
            for name, value in metrics.items() if lead else ():
                log.add_scalar(f"losses/{name}", value, first + step)
            if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
                raise FloatingPointError(f"{bad[0]} is not finite at step {step} of {phase}")
        if step % every == 0 or step == total:
            content = fetch({"state": state, "curve": np.array(curve, np.float64)})
            if lead and curve:
                header = ",".join(("step", *names))
                np.savetxt(run_dir / f"{phase}.csv", curve, "%.8g", ",", header=header, comments="")
            if lead:
                save_arrays(path, content, f"{phase} checkpoint", step=step, names=names)
    bar.close()
    if lead:
        log.close()
    return state.theta


def pretrain(args, run_dir, data, key, shards):
    """Trains a generator on the data, but for VALID sequences; -> theta."""
    whole, split = shards
    k_init, k_refit, k_valid = jax.random.split(key, 3)
    theta = init_generator(k_init, args.hidden_dim, args.num_layers)
    order = np.random.default_rng([args.seed, 0]).permutation(len(data.x))
    num_valid = split.num_devices * max(min(VALID, len(order) // 10) // split.num_devices, 1)
    valid = place(data.x[order[:num_valid]].astype(np.int32), split)
    ones, w = (
        place(np.ones(num_valid, np.float32), split),
        place(np.ones(args.batch_size, np.float32), split),
    )

    def step_once(state, step, due):
        rng = np.random.default_rng([args.seed, 1, step])
        batch = data.x[rng.choice(order[num_valid:], args.batch_size)].astype(np.int32)
        state, loss, norm = refit(args, "pretrain", state, None, place(batch, split), w, k_refit)
        nll = valid_nll(state.theta, valid, ones, k_valid) if due else None
        return state, {"valid_nll": nll, "pretrain_loss": loss, "pretrain_grad_norm": norm}

    return train(args, run_dir, "pretrain", init_state(args, "pretrain", theta), step_once, whole)


def run_finetuning(args, run_dir, theta, oracles, length, key, shards):
    """SiMPO from the pretrained theta; -> the last theta."""
    whole, split = shards
    masks = place(np.full((args.num_groups * args.num_samples, length), MASK, np.int32), split)

    def step_once(state, step, due):
        return finetune(args, state, theta, oracles, masks, key)

    state = init_state(args, "finetune", jax.tree.map(jnp.copy, theta), length)
    return train(args, run_dir, "finetune", state, step_once, whole)


def draw_curves(run_dir):
    """curves.png: scores, likelihoods and weights over the iterations of finetune.csv."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curve = np.genfromtxt(run_dir / "finetune.csv", delimiter=",", names=True, ndmin=1)
    panels = {
        "score of the samples": ("q_median", "q_max", "eval_median"),
        "bound on -log p, nats a base": ("nll", "nll_pretrained"),
        "weights": ("ess", "w_max"),
    }
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.5))
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            axis.plot(curve["step"], curve[name], label=name)
        axis.set(xlabel="iteration", title=title)
        axis.legend()
    fig.savefig(run_dir / "curves.png", dpi=80, bbox_inches="tight")
    plt.close(fig)


def load_data(args):
    column = args.verify_oracle or args.score_column
    if args.data is None:
        return generate_data()
    return read_data(args.data, column, args.drop_bad_rows, numbers=not args.verify_oracle)


def run(args, run_dir):
    """Pretrains, fine-tunes and measures, each unless the run folder has it."""
    if args.distributed:
        start_distributed()
    lead, shards = not jax.process_index(), make_shards(args)
    whole, split = shards
    seed_keys = jax.jit(lambda seed: jax.random.split(jax.random.key(seed), 3), out_shardings=whole)
    k_pretrain, k_finetune, k_table = seed_keys(np.uint32(args.seed))
    theta, meta = load_theta(args, args.pretrained) if args.pretrained else (None, {})
    specs = (args.oracle, "ft"), (args.held_out, "eval")
    oracles = [load_oracle(*spec, args.oracle_column) for spec in specs]
    oracles = [o._replace(params=place(o.params, whole)) if o.params else o for o in oracles]
    if args.score:
        return score_file(args, oracles, theta and place(theta, whole), k_table, split)
    data = load_data(args)
    if args.verify_oracle:
        return verify_oracle(args, data, oracles, split)
    run_dir = run_dir or make_run_dir(args)
    if (run_dir / "metrics.csv").exists():
        return print(f"{run_dir} is complete")
    if lead:
        print(f"run folder  {run_dir}")
        print(f"device      {split.num_devices} x {jax.devices()[0].device_kind}", flush=True)
    if args.track and lead:
        try:
            import wandb
        except ImportError:
            raise UsageError("--track needs Weights & Biases: pip install wandb") from None
        wandb.init(project="simpo", name=run_dir.name, config=vars(args), sync_tensorboard=True)
    path = run_dir / "pretrained.npz"
    if path.exists():
        theta, meta = load_theta(args, path)
    elif theta is None:
        theta, meta = pretrain(args, run_dir, data, k_pretrain, shards), {"data": args.data}
    theta = place(fetch(theta), whole)
    meta = {"method": meta.get("method", "pretrained"), "data": meta["data"]}
    if lead and not path.exists():
        save_arrays(path, fetch(theta), "generator", **meta)
    if args.pretrain_only:
        return
    length, n = data.x.shape[1], args.eval_samples
    calls = args.finetune_steps * args.num_groups * args.num_samples
    models = {meta["method"]: (theta, 0)}
    if args.finetune_steps:
        tuned = run_finetuning(args, run_dir, theta, oracles, length, k_finetune, shards)
        name = args.method + ("_again" if args.method in models else "")
        models[name] = tuned, calls
        if lead:
            path = run_dir / "finetuned.npz"
            save_arrays(path, fetch(tuned), "generator", method=name, data=meta["data"])
            draw_curves(run_dir)
    judge, table = make_judge(args, data, theta, oracles, shards), {}
    for i, (name, (model, used)) in enumerate(models.items()):
        k_draw, k_measure = jax.random.split(jax.random.fold_in(k_table, i))
        x = sample(args, model, n, length, k_draw, split)
        values, table[name] = measure(args, judge, x, used, k_measure, split)
        if lead:
            write_fasta(run_dir / f"{name}.fasta", name, x, values)
    if lead:
        write_table(table, run_dir / "metrics.csv")


def main():
    jax.config.update("jax_default_matmul_precision", "float32")  # a GPU would keep ten bits
    if jax.config.jax_num_cpu_devices < 0:  # XLA threads one CPU device badly: make one a core
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", min(cores, 8))
    try:
        run(*parse_args())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f"error: diverged: {error}")
    except KeyboardInterrupt:
        print("stopped; --resume goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
