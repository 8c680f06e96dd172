"""SiMPO on DNA: fine-tune a masked diffusion model of sequences on a reward (Table 3).

    python simpo_dna.py --weighting square --neg-clip -1
    python simpo_dna.py --oracle mymodule:score --eval-oracle mymodule:judge
    python simpo_dna.py --resume runs/NAME

Paper: arXiv 2603.10250, section 5.3. The first command pretrains a small model on
generated sequences and fine-tunes it on a motif score, in five minutes on two cores.
To use it, copy this file, common.py and dna/.

Time runs from t = 0, a sequence, to t = 1, masks; a base is masked at t with chance
m_t = 0.999 t. Shapes: B sequences, G groups of N samples, L bases, C channels;
x [B, L] holds 0..3 = A C G T and 4 = mask, x0 no mask; q is a score.

Where the paper is silent, or we depart from it (see docs/dna.md):
1. There is no state: one group of N samples of the current model stands for one state.
2. lam takes LAM_STEPS steps of its dual in an iteration, as there are few of these.
3. A gradient step draws from the last R iterations, not from the newest alone.
4. Optional: --neg-floor bounds what negative weights do, --kl-weight anchors the model.
5. Every power can be clipped at l, in eq. (11) only the linear weight.
"""

import dataclasses
import functools
import math
import os
import signal
import sys
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from common import solve_nu, update_lam
from dna.data import generate_data, read_data, write_fasta
from dna.devices import in_batches, make_layout, use_all_cores
from dna.files import fill, load_arrays, nest, save_tree
from dna.layers import conv, dense, layer_norm
from dna.metrics import make_reference, measure, write_table
from dna.oracles import Oracles, check_oracles, load_oracle
from dna.runs import Phase, draw_curves, lock, make_run_dir, parse_args, track

MASK = 4
LAM_STEPS = 20  # steps of the dual of lam in an iteration
LOG_EVERY = 50  # steps of pretraining between rows of losses
PRETRAINED = "pretrained.safetensors"
VALID = 256  # sequences held out from pretraining
DILATIONS = (1, 1, 4, 16, 64)  # each num_layers // 5 times in a row
NEW_MODEL = (2400, 32, 5)  # default pretrain_steps, hidden_dim and num_layers
MAY_BE_0 = "seed oracle_column neg_clip neg_floor kl_weight finetune_steps".split()
JUDGE_EVERY = 10  # iterations between rows with the held-out score and the bounds


@dataclasses.dataclass(frozen=True)
class Args:
    # --- Experiment ---
    seed: int = 1  # of the network, the order of the data and all sampling
    run_dir: str | None = None  # default: runs/dna__{seed}__{time}
    resume: str | None = None  # run folder to continue, with its own flags
    pretrained: str | None = None  # start from this model, of a run or of DRAKES
    pretrain_only: bool = False  # stop after pretraining
    eval_samples: int = 640  # sequences of each row of the table
    checkpoint_every: int = (
        100  # steps of pretraining; fine-tuning saves each iteration
    )
    track: bool = False  # mirror TensorBoard to Weights & Biases
    # --- Data and rewards ---
    data: str | None = None  # training set, CSV or FASTA; default: generated sequences
    data_sha256: tyro.conf.Suppress[str | None] = None  # of that file, set by the run
    drop_bad_rows: bool = False  # leave out rows of --data that are errors otherwise
    seq_column: str | None = None  # of --data; default: seq or sequence
    score_column: str | None = None  # of --data; its best rows are the reference
    oracle: str = "motif"  # optimised: motif[:FILE], enformer:FILE or MODULE:FUNCTION
    eval_oracle: str | None = None  # held-out judge; needed unless --oracle is motif
    oracle_column: int = (
        0  # of an oracle with several outputs; of Enformer's, 0 is HepG2
    )
    # --- Weights of the samples ---
    weighting: Literal["exp", "linear", "square", "power", "qvpo", "wd1", "uniform"] = (
        "linear"  # g in eq. (9)
    )
    power: float = 1.5  # p of --weighting power: w = sign(y) |y|^p
    neg_clip: float = 0.0  # l in eq. (11): smallest weight; 0 is w >= 0
    neg_floor: float = 0.0  # negative weights skip bases of p(x0_i | x_t) below it
    eps_kl: float = 1.5  # nats, eq. (30): KL of softmax(q / lam) to uniform
    kl_weight: float = 0.0  # of the KL to the pretrained model, per base, in the loss
    # --- Diffusion model ---
    num_samples: int = 32  # N, samples of a group
    num_groups: int = 4  # G, groups of an iteration
    sampling_steps: int = 32  # T, of sampler and likelihood; DRAKES has 128
    hidden_dim: int = 32  # C, channels of a new model; DRAKES has 128
    num_layers: int = 5  # residual layers of a new model; DRAKES has 20
    # --- Optimisation ---
    pretrain_steps: int = 2400
    batch_size: int = 64  # B, sequences of a step of pretraining
    pretrain_lr: float = 2e-3  # Adam's after a tenth of the steps; falls by a cosine
    finetune_steps: int = 200  # iterations of SiMPO; the last model is reported
    grad_steps: int = 8  # of an iteration, each on G N of the replayed sequences
    replay: int = 8  # R, iterations whose sequences are replayed
    finetune_lr: float = 2e-3  # Adam's rate at the first step; falls linearly to 0

    def __post_init__(self):
        has_clip = self.weighting in ("linear", "square", "power")
        has_negative = self.neg_clip < 0 or self.weighting == "wd1"
        size = (self.pretrain_steps, self.hidden_dim, self.num_layers)
        log_n = math.log(max(self.num_samples, 1))
        rules = {
            "--seed must be in [0, 2^32)": 0 <= self.seed < 2**32,
            "--num-samples must be at least 2": self.num_samples >= 2,
            f"--eps-kl must be in (0, log N), {log_n:.3f}": 0 < self.eps_kl < log_n,
            "--neg-clip must be at most 0": -math.inf < self.neg_clip <= 0,
            "--neg-clip is for linear, square and power": has_clip or not self.neg_clip,
            "--neg-floor must be in [0, 1)": 0 <= self.neg_floor < 1,
            "--neg-floor is for negative weights": has_negative or not self.neg_floor,
            "--kl-weight must be at least 0": 0 <= self.kl_weight < math.inf,
            "--finetune-steps must be at least 0": self.finetune_steps >= 0,
            "--oracle-column must be at least 0": self.oracle_column >= 0,
            "--num-layers must be a multiple of 5": self.num_layers % 5 == 0,
            "--eval-oracle must be given beside --oracle: a judge is not optimised": (
                self.eval_oracle is not None or self.oracle == "motif"
            ),
            "--score-column needs --data": self.data or not self.score_column,
            "--pretrained has its own size": not self.pretrained or size == NEW_MODEL,
            "--pretrain-only trains from nothing": (
                not self.pretrained or not self.pretrain_only
            ),
        }
        for field in dataclasses.fields(self):
            if field.type in (int, float) and field.name not in MAY_BE_0:
                rule = f"--{field.name.replace('_', '-')} must be above 0"
                rules[rule] = 0 < getattr(self, field.name) < math.inf
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(rule)  # tyro shows it as an error of usage


# ---- networks ------------------------------------------------------------------------
def init_generator(key, hidden_dim, num_layers):
    """theta of the DRAKES generator: lecun normal weights, zero biases.

    num_layers is a multiple of 5. "time" [C] of a layer stands for the time embedding
    of the original, a constant because the original sets sigma to 0.
    """
    init = jax.nn.initializers.lecun_normal()
    keys = iter(jax.random.split(key, num_layers + 3))

    def layer(*shape):
        w = init(next(keys), shape)
        return {"w": w, "b": jnp.zeros(shape[-1])}

    layers = []
    for _ in range(num_layers):
        layers.append(
            {
                "conv": layer(9, hidden_dim, hidden_dim),
                "norm": {"w": jnp.ones(hidden_dim), "b": jnp.zeros(hidden_dim)},
                "time": jnp.zeros(hidden_dim),
            }
        )
    first = layer(9, MASK + 1, hidden_dim)
    head = [layer(hidden_dim, hidden_dim), layer(hidden_dim, MASK + 1)]
    return {"first": first, "layers": layers, "head": head}


def logits(theta, x):
    """The DRAKES generator at sigma = 0: x [B, L] -> [B, L, 5], not normalised."""
    x = jax.nn.one_hot(x, MASK + 1)
    x = jax.nn.relu(conv(theta["first"], x))
    num_layers = len(theta["layers"])
    for i, layer in enumerate(theta["layers"]):
        h = layer_norm(layer["norm"], x + layer["time"][None, None])
        dilation = DILATIONS[i * len(DILATIONS) // num_layers]
        x = x + jax.nn.relu(conv(layer["conv"], h, dilation))
    first, last = theta["head"]
    return dense(last, jax.nn.relu(dense(first, x)))


# ---- diffusion -----------------------------------------------------------------------
def mask_chance(t):
    """m_t of the log-linear noise: the chance that a base is masked at time t."""
    return (1 - 1e-3) * t


def log_probs(theta, x):
    """log p(x0 | x_t = x) [B, L, 4]; a point mass where x [B, L] is a base."""
    free = jax.nn.log_softmax(logits(theta, x)[..., :MASK])
    is_base = x[..., None] == jnp.arange(MASK)[None, None]
    known = jnp.where(is_base, 0.0, -1e6)
    return jnp.where((x == MASK)[..., None], free, known)


def log_prob_of(theta, x0, x_t):
    """log p(x0_i | x_t) of each base: x0 [B, L], x_t [B, L] -> [B, L]."""
    log_p = log_probs(theta, x_t)
    return jnp.take_along_axis(log_p, x0[..., None], axis=-1)[..., 0]


def times(num_steps):
    """The t of the sampler, from 1 to 1e-5: [T + 1]."""
    return jnp.linspace(1, 1e-5, num_steps + 1)


def unmask(log_p, x, t, s, key):
    """One draw of x_s given x_t = x [B, L] and log p(x0 | x_t) [B, L, 4]; s < t."""
    m_t = mask_chance(t)
    m_s = mask_chance(s)
    stay = jnp.full((*x.shape, 1), jnp.log(m_s))
    leave = log_p + jnp.log(m_t - m_s)
    log_q = jnp.concatenate([leave, stay], axis=-1)
    noise = jax.random.gumbel(key, log_q.shape)
    drawn = jnp.argmax(log_q + noise, axis=-1)
    return jnp.where(x == MASK, drawn.astype(x.dtype), x)


@functools.partial(jax.jit, static_argnums=1)
def sample_sequences(theta, num_steps, x, key):
    """Ancestral sampling from x [B, L], masks or bases: T steps and an argmax."""
    ts = times(num_steps)

    def step(x, i):
        k_step = jax.random.fold_in(key, i)
        log_p = log_probs(theta, x)
        return unmask(log_p, x, ts[i], ts[i + 1], k_step), None

    x, _ = jax.lax.scan(step, x, jnp.arange(num_steps))
    return jnp.argmax(log_probs(theta, x), axis=-1)


@functools.partial(jax.jit, static_argnums=1)
def log_likelihood(theta, num_steps, x0, key):
    """App-Log-Lik of x0 [B, L], nats a sequence [B]: the bound of the sampler, with one
    draw of masks for each t."""
    ts = times(num_steps)

    def step(total, i):
        m_t = mask_chance(ts[i])
        m_s = mask_chance(ts[i + 1])
        k_step = jax.random.fold_in(key, i)
        hidden = jax.random.uniform(k_step, x0.shape) < m_t
        log_p = log_prob_of(theta, x0, jnp.where(hidden, MASK, x0))
        log_p = jnp.sum(hidden * log_p, axis=-1)
        return total + log_p * (m_t - m_s) / m_t, None

    total = jnp.zeros(x0.shape[0])
    total, _ = jax.lax.scan(step, total, jnp.arange(num_steps))
    return total


def mask_at_random(x0, key):
    """x0 [B, L] -> x_t, the bases it hides, t [B, 1] stratified in (1e-3, 1)."""
    k_t, k_order, k_mask = jax.random.split(key, 3)
    b = x0.shape[0]
    order = jax.random.permutation(k_order, b)
    t = (order + jax.random.uniform(k_t, (b,))) / b
    t = (t * (1 - 1e-3) + 1e-3)[:, None]
    hidden = jax.random.uniform(k_mask, x0.shape) < mask_chance(t)
    return jnp.where(hidden, MASK, x0), hidden, t


def subs_loss(theta, x0, w, key, neg_floor=0.0):
    """Weighted SUBS loss, eq. (7), nats a base: x0 [B, L], w [B] -> [].

    With w = 1 its expectation is at least the mean of -log p(x0) / L. Where w < 0, a
    base of p(x0_i | x_t) < neg_floor adds nothing to the gradient, so that the loss is
    bounded below.
    """
    x_t, hidden, t = mask_at_random(x0, key)
    log_p = log_prob_of(theta, x0, x_t)
    bounded = jnp.maximum(log_p, jnp.log(neg_floor))
    log_p = jnp.where((w < 0)[:, None], bounded, log_p)
    return -jnp.mean(w[:, None] * hidden * log_p / t)


def kl_to(theta_pretrained, theta, x0, key):
    """Estimate of the KL of the model to the pretrained one, nats a base: of their laws
    of masks and bases. x0 [B, L]: samples of the model; in the loss, replayed ones."""
    x_t, hidden, t = mask_at_random(x0, key)
    log_p = log_probs(theta, x_t)
    log_p_pretrained = log_probs(theta_pretrained, x_t)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_p_pretrained), axis=-1)
    return jnp.mean(hidden * kl / t)


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


@functools.partial(jax.jit, static_argnums=0)
def weigh(args, log_lam, q):
    """Stage I: scores q [G, N] -> w [G, N], the new log lam, metrics {name: []}."""
    for _ in range(LAM_STEPS):
        log_lam, kl = update_lam(log_lam, q, args.eps_kl)
    lam = jnp.exp(log_lam)
    if args.weighting == "uniform":  # the control: the reward is not used
        w = jnp.ones_like(q)
    else:
        w = weights(args, q, lam)
    size = jnp.maximum(jnp.abs(w), 1e-30)
    share = size / jnp.sum(size, axis=-1, keepdims=True)
    entropy = -jnp.sum(share * jnp.log(share), axis=-1)
    metrics = {
        "q_spread": jnp.mean(jnp.std(q, axis=-1)),
        "lam": lam,
        "kl": kl,
        "w_max": w.max(),
        "w_negative": jnp.mean(w < 0),
        "w_kl": math.log(q.shape[-1]) - jnp.mean(entropy),
        "ess": jnp.mean(1 / jnp.sum(share**2, axis=-1)),
    }
    return w, log_lam, metrics


# ---- update --------------------------------------------------------------------------
class State(NamedTuple):
    """Everything that training changes on the device."""

    theta: dict
    opt: optax.OptState
    log_lam: jax.Array
    step: jax.Array  # gradient steps so far


class Replay(NamedTuple):
    """The sequences of the last R iterations on the host, the newest last."""

    x0: np.ndarray  # [R G N, L]
    w: np.ndarray  # [R G N]


def pretrain_optimiser(args):
    warm_up = max(args.pretrain_steps // 10, 1)
    steps = max(args.pretrain_steps, warm_up + 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, args.pretrain_lr, warm_up, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def finetune_optimiser(args):
    steps = args.finetune_steps * args.grad_steps
    rate = optax.linear_schedule(args.finetune_lr, 0.0, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def init_state(optimiser, theta):
    return State(
        theta=theta,
        opt=optimiser.init(theta),
        log_lam=jnp.zeros(()),
        step=jnp.int32(0),
    )


def descend(optimiser, state, loss_of):
    """A step of Adam on loss_of(theta) -> state, loss, norm of the gradient."""
    loss, grads = jax.value_and_grad(loss_of)(state.theta)
    updates, opt = optimiser.update(grads, state.opt)
    theta = optax.apply_updates(state.theta, updates)
    state = state._replace(theta=theta, opt=opt, step=state.step + 1)
    return state, loss, optax.tree.norm(grads)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def pretrain_step(args, state, x0, w, key):
    """A step on data x0 [B, L] of weights w [B], all 1 -> state, metrics {name: []}."""
    key = jax.random.fold_in(key, state.step)
    loss_of = functools.partial(subs_loss, x0=x0, w=w, key=key)
    state, loss, grad_norm = descend(pretrain_optimiser(args), state, loss_of)
    return state, {"pretrain_loss": loss, "pretrain_grad_norm": grad_norm}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def finetune_step(args, state, theta_pretrained, batch, key):
    """Stage II: a step of reweighted matching on rows of the replay
    -> state, loss, norm of the gradient."""
    key = jax.random.fold_in(key, state.step)

    def loss_of(theta):
        loss = subs_loss(theta, batch.x0, batch.w, key, args.neg_floor)
        if args.kl_weight:
            loss += args.kl_weight * kl_to(theta_pretrained, theta, batch.x0, key)
        return loss

    return descend(finetune_optimiser(args), state, loss_of)


@jax.jit
def bounds(theta, theta_pretrained, x0, key):
    """Of samples x0 [B, L]: bounds on -log p under both models, nats a base, and an
    estimate of the KL of the models, nats a sequence."""
    w = jnp.ones(x0.shape[0])
    return {
        "nll": subs_loss(theta, x0, w, key),
        "nll_pretrained": subs_loss(theta_pretrained, x0, w, key),
        "kl_pretrained": x0.shape[1] * kl_to(theta_pretrained, theta, x0, key),
    }


def push(replay, newest, first):
    """The newest sequences push the oldest out; the first ones fill the replay."""
    parts = []
    for old, new in zip(replay, newest, strict=True):
        kept = np.resize(new, old.shape) if first else old
        parts.append(np.concatenate([kept[len(new) :], new]))
    return Replay(*parts)


def iterate(args, state, replay, theta_pretrained, oracles, layout, key, judged=True):
    """One iteration of Algorithm 1 -> state, replay, metrics {name: scalar}.

    What is judged, by bounds and the held-out oracle, is logged and not used. Gradient
    steps are calls of their own: XLA's CPU compiler makes gradients of convolutions 90
    times slower in a loop.
    """
    k_sample, k_bound, k_refit = jax.random.split(
        jax.random.fold_in(key, state.step), 3
    )
    step = int(state.step)

    # --- Stage I: sample and weigh ---
    masks = np.full_like(replay.x0[: layout.size], MASK)
    masks = jax.device_put(masks, layout.split)
    samples = sample_sequences(state.theta, args.sampling_steps, masks, k_sample)
    x0 = np.asarray(samples)
    metrics = {}
    if judged:
        metrics = bounds(state.theta, theta_pretrained, samples, k_bound)
        metrics["eval_median"] = np.median(oracles.held_out(x0))
    q = oracles.ft(x0)
    groups = jax.device_put(q.reshape(args.num_groups, args.num_samples), layout.whole)
    w, log_lam, weight_metrics = weigh(args, state.log_lam, groups)
    newest = Replay(x0, np.asarray(w).reshape(-1))
    replay = push(replay, newest, first=step == 0)

    # --- Stage II: match the replayed sequences ---
    state = state._replace(log_lam=log_lam)
    rng = np.random.default_rng([args.seed, 2, step])
    losses = []
    grad_norms = []
    for _ in range(args.grad_steps):
        rows = rng.choice(len(replay.w), layout.size, replace=False)
        batch = Replay(replay.x0[rows], replay.w[rows])
        batch = jax.device_put(batch, layout.split)
        state, loss, grad_norm = finetune_step(
            args, state, theta_pretrained, batch, k_refit
        )
        losses.append(loss)
        grad_norms.append(grad_norm)

    metrics |= {
        "q_median": np.median(q),
        "q_max": q.max(),
        **weight_metrics,
        "loss": sum(losses) / len(losses),
        "grad_norm": jnp.stack(grad_norms).max(),
    }
    return state, replay, metrics


# ---- the phases of a run -------------------------------------------------------------
valid_nll = jax.jit(subs_loss)


def pretrain(args, run_dir, x, layout, key):
    """Trains a generator on data x [n, L], but for VALID sequences -> theta."""
    k_init, k_step, k_valid = jax.random.split(key, 3)
    theta = init_generator(k_init, args.hidden_dim, args.num_layers)
    state = init_state(pretrain_optimiser(args), theta)
    phase = Phase(run_dir, "pretrain", args.pretrain_steps, "valid_nll")
    state = jax.device_put(phase.start(state), layout.whole)

    order = np.random.default_rng([args.seed, 0]).permutation(len(x))
    num_valid = min(VALID, len(order) // 10) // layout.num_devices
    num_valid = max(num_valid, 1) * layout.num_devices
    valid = x[order[:num_valid]].astype(np.int32)
    valid = jax.device_put(valid, layout.split)
    valid_w = jax.device_put(np.ones(num_valid, np.float32), layout.split)
    w = jax.device_put(np.ones(args.batch_size, np.float32), layout.split)
    while phase.step < args.pretrain_steps:
        rng = np.random.default_rng([args.seed, 1, phase.step])
        rows = rng.choice(order[num_valid:], args.batch_size)
        batch = jax.device_put(x[rows].astype(np.int32), layout.split)
        state, metrics = pretrain_step(args, state, batch, w, k_step)
        phase.advance()
        done = phase.step == args.pretrain_steps
        if done or phase.step % LOG_EVERY == 0:
            nll = valid_nll(state.theta, valid, valid_w, k_valid)
            phase.write({"valid_nll": nll, **metrics})
        if done or phase.step % args.checkpoint_every == 0:
            phase.save(state)
    phase.end()
    return state.theta


def is_judged(args, iteration):
    return iteration % JUDGE_EVERY == 0 or iteration == args.finetune_steps - 1


def finetune(args, run_dir, theta, theta_pretrained, length, oracles, layout, key):
    """SiMPO from theta, on sequences of `length` bases -> the last theta."""
    theta = jax.tree.map(jnp.copy, theta)  # finetune_step donates its state
    state = init_state(finetune_optimiser(args), theta)
    rows = args.replay * layout.size
    replay = Replay(
        x0=np.zeros((rows, length), np.int32),
        w=np.zeros(rows, np.float32),
    )
    phase = Phase(
        run_dir, "finetune", args.finetune_steps, "q_median", first=args.pretrain_steps
    )
    state, replay = phase.start((state, replay))
    state = jax.device_put(state, layout.whole)
    while phase.step < args.finetune_steps:
        judged = is_judged(args, phase.step)
        state, replay, metrics = iterate(
            args, state, replay, theta_pretrained, oracles, layout, key, judged
        )
        phase.advance()
        phase.write(metrics)
        phase.save((state, replay))
    phase.end()
    return state.theta


def sample(args, theta, start, layout, key):
    """Sequences of the model from start [n, L], masks or bases, on the host."""

    def draw(masks, i):
        k_batch = jax.random.fold_in(key, i)
        return sample_sequences(theta, args.sampling_steps, masks, k_batch)

    return in_batches(draw, start, layout)


def likelihoods(args, theta, x, layout, key):
    """App-Log-Lik of x [n, L] under a model, nats a sequence [n]."""

    def bound(batch, i):
        k_batch = jax.random.fold_in(key, i)
        return log_likelihood(theta, args.sampling_steps, batch, k_batch)

    return in_batches(bound, x, layout)


# ---- main ----------------------------------------------------------------------------
def load_generator(path):
    """Models of a run or of dna/convert_drakes.py -> {name: theta}, {data, length}.

    Beside "pretrained" there is "finetuned", if the file holds a tuned model and the
    one it was tuned from; data names the training set, length its number of bases.
    """
    arrays, meta = load_arrays(path, "generator")
    try:
        tree = nest(arrays)
        hidden_dim = len(tree["pretrained"]["first"]["b"])
        num_layers = len(tree["pretrained"]["layers"])
    except (KeyError, TypeError):
        raise SystemExit(f"error: {path} is no whole generator") from None
    if num_layers % 5:
        raise SystemExit(f"error: {path} has {num_layers} layers, no multiple of 5")
    key = jax.random.key(0)
    template = jax.eval_shape(lambda: init_generator(key, hidden_dim, num_layers))
    return fill(dict.fromkeys(tree, template), arrays, path), meta


def load_data(args):
    """-> the training set, and the flags with its path and checksum.

    A resumed run, whose flags have a checksum, refuses another file."""
    if args.data is None:
        return generate_data(), args
    path = os.path.abspath(args.data)
    data = read_data(path, args.score_column, args.seq_column, args.drop_bad_rows)
    if args.data_sha256 not in (None, data.sha256):
        raise SystemExit(f"error: {path} is not the file that this run began with")
    return data, dataclasses.replace(args, data=path, data_sha256=data.sha256)


def main():
    # --- Flags and devices ---
    use_all_cores()
    args = parse_args(Args)
    layout = make_layout(args.num_groups * args.num_samples, args.batch_size)
    key = jax.random.key(np.uint32(args.seed))
    keys = jax.device_put(jax.random.split(key, 3), layout.whole)
    k_pretrain, k_finetune, k_table = keys

    # --- Data, oracles and a model that is given ---
    data, args = load_data(args)
    length = data.x.shape[1]
    oracles = Oracles(
        ft=load_oracle(args.oracle, "ft", args.oracle_column, layout),
        held_out=load_oracle(
            args.eval_oracle or "motif", "eval", args.oracle_column, layout
        ),
    )
    check_oracles(oracles, data.x[:: len(data.x) // 8][:8])
    models = {}
    meta = {"data": args.data, "length": length}
    source = args.pretrained
    if args.resume and (Path(args.resume) / PRETRAINED).exists():
        source = Path(args.resume) / PRETRAINED
    if source:
        models, model_meta = load_generator(source)
        meta["data"] = model_meta["data"]
        if meta["data"] and not args.data:
            what = f"{source} was trained on {meta['data']}"
            raise SystemExit(f"error: {what}; --data must be that file")

    # --- Run folder ---
    if args.resume:
        run_dir = Path(args.resume)
    else:
        run_dir = make_run_dir(args, f"dna__{args.seed}")
    if (run_dir / "metrics.csv").exists():
        print(f"{run_dir} is complete")
        return
    _lock = lock(run_dir)
    stopped = f"stopped; continue with --resume {run_dir}"
    signal.signal(signal.SIGINT, lambda *_: sys.exit(stopped))  # Ctrl-C
    if args.track:
        track(args, run_dir)
    print(f"run folder  {run_dir}")
    print(
        f"device      {layout.num_devices} x {jax.devices()[0].device_kind}", flush=True
    )

    # --- Pretraining ---
    if not models:
        models["pretrained"] = pretrain(args, run_dir, data.x, layout, k_pretrain)
    if source != run_dir / PRETRAINED:
        save_tree(run_dir / PRETRAINED, models, "generator", **meta)
    if args.pretrain_only:
        return
    models = jax.device_put(models, layout.whole)
    theta_pretrained = models["pretrained"]

    # --- Fine-tuning ---
    if args.finetune_steps:
        theta = models.get("finetuned", theta_pretrained)
        models["finetuned"] = finetune(
            args, run_dir, theta, theta_pretrained, length, oracles, layout, k_finetune
        )
        path = run_dir / "finetuned.safetensors"
        save_tree(path, models, "generator", **meta)
        draw_curves(run_dir)

    # --- Table ---
    reference = make_reference(args, data, oracles.held_out, layout)
    judged = sum(is_judged(args, i) for i in range(args.finetune_steps))
    masks = np.full((args.eval_samples, length), MASK)
    table = {}
    for i, name in enumerate(sorted(models, reverse=True)):  # the pretrained one first
        k_draw, k_measure = jax.random.split(jax.random.fold_in(k_table, i))
        x = sample(args, models[name], masks, layout, k_draw)
        loglik = likelihoods(args, theta_pretrained, x, layout, k_measure)
        values, row = measure(reference, oracles, x, loglik, args.seed)
        row["oracle_calls"] = i * args.finetune_steps * layout.size
        row["judge_calls"] = i * judged * layout.size
        write_fasta(run_dir / f"{name}.fasta", name, x, values)
        table[name] = row
    write_table(table, run_dir / "metrics.csv")


if __name__ == "__main__":
    main()
