"""SiMPO on DNA: fine-tune a masked diffusion model of 200-bp sequences on a reward (Table 3).

    python simpo_dna.py --weighting square --neg-clip -1

Paper: arXiv 2603.10250, section 5.3. Copy this file, common.py, drakes.py and data/. In ten
minutes on two cores it pretrains a small model on generated sequences and fine-tunes it on a motif
score; on the files of DRAKES (Wang et al. 2024a) it is the paper's experiment. Time runs from t = 0
(sequence) to t = 1 (all masked) in T steps; a base is masked by t with chance m_t = (1 - 1e-3) t.
Legend: B sequences, G groups of N samples, L bases, C channels; x [B, L] holds 0..3 = A C G T and
4 = mask, x0 is a sequence without masks, q the oracle's score.

Where the paper is silent, or we depart from it:
1. There is no state: one group of N samples of the current model stands for one state.
2. lam takes LAM_STEPS steps of its dual in every iteration, since there are few iterations.
3. -log p has no lower bound under negative weights; they stop at p(x0_i | x_t) = --neg-floor.
4. The clip of eq. (11) also applies to the square weight ("Sqr. Neg.").
5. Stage II replays the last R iterations; on the newest alone the model drifts by itself.
"""

import contextlib
import csv
import dataclasses
import functools
import gzip
import io
import json
import math
import os
import platform
import re
import signal
import sys
import time
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
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

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.patches import PathPatch
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from scipy import stats
from tensorboardX import SummaryWriter
from tqdm import tqdm

from common import solve_nu, update_lam
from drakes import BadFile, enformer, load_generator, load_oracle

SCRIPT = "simpo_dna"
PACKAGES = ("jax", "jaxlib", "optax", "numpy", "scipy", "matplotlib")  # of versions.json
GRAD_NORM_LIMIT = 1e6  # a run past it has diverged
BASES, MASK = "ACGT", 4
MOTIFS = Path(__file__).with_name("data") / "motif_reward.json"
LAM_STEPS = 20  # steps of the dual of lam in an iteration
SMC_TEMPERATURE = 0.5  # of the potential exp(q / temperature), DRAKES' alpha
PRETRAIN_LOG_EVERY, VALID = 50, 256  # steps; sequences held out from pretraining
DILATIONS = (1, 1, 4, 16, 64)  # each num_layers // 5 times in a row


class UsageError(Exception):
    """Bad input. `main` prints it as one line and exits with code 2."""


class Diverged(Exception):
    """The run cannot go on: a quantity is not finite or has exploded."""


# ---- Args -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args:
    # --- weighting ---
    weighting: Literal["exp", "linear", "square", "wd1"] = "linear"
    """g in eq. (9); exp is RL-D2, wd1 Example 3.4"""
    neg_clip: float = 0.0
    """l in eq. (11), in units of w; 0 keeps w >= 0"""
    neg_floor: float = 0.05
    """negative weights stop lowering p(x0_i | x_t) here; 0 lets them go on"""
    # --- run ---
    seed: int = 1
    """seed of the network, the order of the data and all sampling"""
    run_dir: str | None = None
    """folder of this run; default runs/dna__{script}__{seed}__{time}"""
    resume: str | None = None
    """run folder to go on with, bit for bit; takes its arguments from there"""
    pretrain_only: bool = False
    """stop after pretraining; its pretrained.npz is for --pretrained"""
    verify_oracle: str | None = None
    """correlate the oracles with this column of --data, on --eval-samples rows, and stop"""
    compare: bool = True
    """add best-of-N and SMC, from the pretrained model, to the table"""
    eval_samples: int = 640
    """sequences of each row of the table"""
    checkpoint_every: int = 100
    """pretraining steps between two checkpoints; in fine-tuning one is written every iteration"""
    num_devices: int | None = None
    """XLA devices that share a batch; default as many of them all as divide it"""
    distributed: bool = False
    """one process of several: Slurm, Open MPI, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID"""
    track: bool = False
    """mirror the TensorBoard log to Weights & Biases (pip install wandb tensorboard)"""
    # --- env ---
    data: str | None = None
    """training sequences, CSV with a column seq (or sequence) or FASTA, may be gzipped; default
    generated ones"""
    score_column: str = "hepg2"
    """measured activity in --data, by which the reference of the correlations is chosen; without
    it the held-out oracle's score"""
    drop_bad_rows: bool = False
    """leave out sequences with other letters than ACGT, of another length, empty or repeated"""
    oracle: str = "motif"
    """reward that is fine-tuned on: motif, or enformer:FILE, a checkpoint of DRAKES"""
    eval_oracle: str | None = None
    """held-out judge of the same kind; default motif beside --oracle motif"""
    # --- lam ---
    eps_kl: float = 1.5
    """epsilon in eq. (30), nats: KL(softmax(q / lam) || uniform); below log N"""
    # --- diffusion ---
    num_samples: int = 32
    """N, samples of a group"""
    num_groups: int = 4
    """G, groups of an iteration"""
    sampling_steps: int = 128
    """T, steps of the sampler and of the likelihood"""
    # --- generator ---
    pretrained: str | None = None
    """start from it: pretrained.npz or finetuned.npz of a run, or a checkpoint of DRAKES"""
    weights: Literal["raw", "ema"] = "raw"
    """which weights of a Lightning checkpoint; DRAKES itself uses raw"""
    hidden_dim: int | None = None
    """C, channels; default 32, or those of --pretrained (DRAKES has 128)"""
    num_layers: int | None = None
    """residual layers, a multiple of 5; default 5, or those of --pretrained (DRAKES has 20)"""
    # --- budget ---
    pretrain_steps: int = 2400
    """gradient steps of pretraining"""
    batch_size: int = 64
    """sequences of one of them"""
    pretrain_lr: float = 2e-3
    """Adam's rate after a tenth of them; falls to 0 by a cosine"""
    finetune_steps: int = 40
    """iterations of SiMPO: sample G N sequences, score, weigh, refit. The last one is reported"""
    grad_steps: int = 8
    """gradient steps of an iteration, each on G N of the replayed sequences"""
    replay: int = 8
    """R, iterations whose sequences are replayed; 1 is the newest alone"""
    finetune_lr: float = 2e-3
    """Adam's rate"""

    power = None  # for `weights`: there is no --power here

    def __post_init__(self):
        log_n = math.log(max(self.num_samples, 1))
        kinds = {spec.partition(":")[0] for spec in (self.oracle, self.eval_oracle or self.oracle)}
        counts = "eval_samples num_groups sampling_steps pretrain_steps batch_size grad_steps"
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        unused = [  # flags that something else leaves without effect
            (self.pretrained, "pretrain_steps pretrain_lr batch_size", "--pretrained"),
            (self.pretrain_only, "weighting neg_clip finetune_steps grad_steps", "--pretrain-only"),
            (self.pretrain_only, "oracle eval_oracle finetune_lr compare", "--pretrain-only"),
            (self.pretrain_only, "eval_samples neg_floor replay", "--pretrain-only"),
            (not self.data, "score_column drop_bad_rows", "the generated data"),
            (not (self.neg_clip or self.weighting == "wd1"), "neg_floor", "weights >= 0"),
        ]
        for names, ok, rule in (
            (f"{counts} replay checkpoint_every", lambda x: x >= 1, "at least 1"),
            ("finetune_steps", lambda x: x >= 0, "at least 0"),
            ("pretrain_lr finetune_lr", lambda x: 0 < x < math.inf, "finite and above 0"),
            ("seed", lambda x: 0 <= x < 2**32, "in [0, 2^32)"),
            ("num_samples", lambda x: x >= 2, "at least 2, for weights to compare"),
            ("eps_kl", lambda x: 0 < x < log_n, f"in (0, log N), log N = {log_n:.3f}"),
            ("neg_clip", lambda x: -math.inf < x <= 0, "finite and at most 0"),
            ("neg_floor", lambda x: 0 <= x < 1, "in [0, 1)"),
            (
                "neg_clip",
                lambda x: not x or self.weighting in ("linear", "square"),
                f"0 for {self.weighting}",
            ),
            ("num_devices hidden_dim", lambda x: x is None or x >= 1, "at least 1"),
            ("num_layers", lambda x: x is None or x >= 5 and x % 5 == 0, "a multiple of 5"),
            ("oracle", lambda x: is_oracle(x), "motif or enformer:FILE"),
            ("eval_oracle", lambda x: x is None or is_oracle(x), "motif or enformer:FILE"),
            (
                "eval_oracle",
                lambda x: len(kinds) == 1 and (x or self.oracle == "motif"),
                "of the kind of --oracle",
            ),
            ("weights", lambda x: x == "raw" or self.pretrained, "left out without --pretrained"),
            ("pretrain_only", lambda x: not (x and self.pretrained), "left out with --pretrained"),
            (
                "verify_oracle",
                lambda x: x is None or self.data,
                "beside --data, the file with that column",
            ),
            (
                "data",
                lambda x: x or not (self.pretrained or "").endswith(".ckpt"),
                "the training set of --pretrained, for the reference of the correlations",
            ),
        ):
            for name in names.split():
                value = getattr(self, name)
                if not ok(value):
                    raise UsageError(f"--{name.replace('_', '-')} must be {rule}, got {value}")
        for without_effect, names, cause in unused:
            for name in names.split() if without_effect else ():
                if getattr(self, name) != defaults[name]:
                    flag = "--" + name.replace("_", "-")
                    raise UsageError(f"{flag} must be left out with {cause}, where it does nothing")

    @property
    def held_out(self):
        """The oracle that judges."""
        return self.eval_oracle or "motif"

    @property
    def first_iteration(self):
        """Gradient steps before fine-tuning, where the log's steps go on."""
        return 0 if self.pretrained else self.pretrain_steps


def is_oracle(spec):
    kind, _, path = spec.partition(":")
    return spec == "motif" or kind == "enformer" and bool(path)


# ---- networks ---------------------------------------------------------------------------------


def dense(layer, x):
    return x @ layer["w"] + layer["b"].reshape((1,) * (x.ndim - 1) + (-1,))


def conv(layer, x, dilation=1):
    """x [B, L, in] with w [K, in, out] -> [B, L, out]; zeros beyond both ends."""
    numbers, dilation = ("NWC", "WIO", "NWC"), (dilation,)
    y = jax.lax.conv_general_dilated(
        x, layer["w"], (1,), "SAME", rhs_dilation=dilation, dimension_numbers=numbers
    )
    return y + layer["b"][None, None]


def layer_norm(norm, x):
    x = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
    return x * norm["w"][None, None] + norm["b"][None, None]


def init_generator(key, hidden_dim, num_layers):
    """theta of the DRAKES generator: lecun normal weights; zero biases, also those of the time.

    num_layers is a multiple of 5. "time" [H] of a layer stands for the original's time embedding,
    a constant because the original sets sigma to 0.
    """
    init, h = jax.nn.initializers.lecun_normal(), hidden_dim
    k_first, *k_head = jax.random.split(key, 3)
    k_layers = jax.random.split(jax.random.fold_in(key, 1), num_layers)

    def layer(key, *shape):
        return {"w": init(key, shape), "b": jnp.zeros(shape[-1])}

    def residual(key):
        norm = {"w": jnp.ones(h), "b": jnp.zeros(h)}
        return {"conv": layer(key, 9, h, h), "norm": norm, "time": jnp.zeros(h)}

    head = [layer(k_head[0], h, h), layer(k_head[1], h, MASK + 1)]
    layers = [residual(k) for k in k_layers]
    return {"first": layer(k_first, 9, MASK + 1, h), "layers": layers, "head": head}


def logits(theta, x):
    """The DRAKES generator at sigma = 0: tokens x [B, L] -> logits [B, L, 5], not normalised."""
    x = jax.nn.relu(conv(theta["first"], jax.nn.one_hot(x, MASK + 1)))
    for i, layer in enumerate(theta["layers"]):
        h = layer_norm(layer["norm"], x + layer["time"][None, None])
        dilation = DILATIONS[i * len(DILATIONS) // len(theta["layers"])]
        x = x + jax.nn.relu(conv(layer["conv"], h, dilation))
    first, last = theta["head"]
    return dense(last, jax.nn.relu(dense(first, x)))


def load_motifs(part):
    """The motif oracle "ft" or "eval": log-odds matrices of JASPAR as one kernel for both strands.

    w [W, 4, 2 F] is forward and reverse complement, zero beyond a motif's width [F].
    """
    motifs = json.loads(MOTIFS.read_text())[part]
    widths = [len(counts[0]) for counts in motifs["pfm_counts"]]
    w = np.zeros((max(widths), 4, 2, len(widths)), np.float32)
    for f, counts in enumerate(motifs["pfm_counts"]):
        log_odds = np.log(motif_shares(counts) / 0.25)
        w[: widths[f], :, 0, f], w[: widths[f], :, 1, f] = log_odds, log_odds[::-1, ::-1]
    names = ("mean", "sd", "w")
    columns = {name: np.asarray(motifs[name], np.float32) for name in names}
    return {"kernel": w.reshape(*w.shape[:2], -1), "width": np.array(widths), **columns}


def motif_shares(counts):
    """Counts [4, m] -> probability of each base at each position [m, 4], pseudocount 0.25."""
    counts = np.asarray(counts).T + 0.25
    return counts / counts.sum(axis=1, keepdims=True)


def motif_log_odds(motifs, x):
    """Log-odds against uniform bases of a site that starts at i: x [B, L] -> [B, L, 2, F].

    The axis of 2 is the strand; -inf where a site would end behind the sequence.
    """
    onehot = jax.nn.one_hot(x, 4)
    pad = ((0, motifs["kernel"].shape[0] - 1),)
    match = jax.lax.conv_general_dilated(
        onehot, motifs["kernel"], (1,), pad, dimension_numbers=("NWC", "WIO", "NWC")
    )
    fits = jnp.arange(x.shape[1])[:, None] <= x.shape[1] - motifs["width"][None]  # [L, F]
    match = match.reshape(*x.shape, 2, -1)
    return jnp.where(fits[None, :, None], match, -jnp.inf)


def motif_score(motifs, x):
    """Accessibility specificity, HepG2 against K562: x [B, L] -> [B].

    log-sum-exp over positions and strands, standardised, weighted. Not an enhancer's activity.
    """
    total = jax.nn.logsumexp(motif_log_odds(motifs, x), axis=(1, 2))
    w, bias = motifs["w"][:-1], motifs["w"][-1]
    return (total - motifs["mean"][None]) / motifs["sd"][None] @ w + bias


@jax.jit
def motif_hits(motifs, x):
    """Sites of each motif per sequence, of 80 % of its score's range or more: [B, L] -> [B, F]."""
    return jnp.sum(is_hit(motifs, motif_log_odds(motifs, x)), axis=(1, 2))


def is_hit(motifs, log_odds):
    """log_odds [B, L, 2, F] -> bool, above JASPAR's relative threshold of 80 %."""
    f = motifs["width"].shape[0]
    inside = jnp.arange(motifs["kernel"].shape[0])[:, None] < motifs["width"][None]  # [W, F]
    kernel = motifs["kernel"][..., :f]  # [W, 4, F]
    low, high = (jnp.sum(jnp.where(inside, g(kernel, 1), 0), 0) for g in (jnp.min, jnp.max))
    return log_odds >= (low + 0.8 * (high - low))[None, None, None]


@functools.partial(jax.jit, static_argnums=0)
def score(oracle, params, x):
    """The oracle's score of sequences x [B, L] -> [B]: the motif score, or Enformer's HepG2."""
    with jax.default_matmul_precision("highest"):  # a GPU's TF32 is too coarse for the oracle
        return motif_score(params, x) if oracle == "motif" else enformer(params, x)[:, 0]


# ---- diffusion --------------------------------------------------------------------------------


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
    return jnp.where(x == MASK, drawn, x)


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


@functools.partial(jax.jit, static_argnums=0)
def smc(args, theta, oracle, x, key):
    """Sequential Monte Carlo with the potential exp(q / SMC_TEMPERATURE): x [G N, L], all masks.

    q is that of one draw of x0 from p(x0 | x_t) at each step; a group is resampled (systematic)
    once its effective sample size is below N / 2, and last. Takes T oracle calls a sequence.
    """
    g, n = args.num_groups, args.num_samples

    def look_ahead(x, key):
        log_p = log_probs(theta, x)
        x0 = jnp.argmax(log_p + jax.random.gumbel(key, log_p.shape), axis=-1)
        return log_p, score(args.oracle, oracle, x0).reshape(g, n) / SMC_TEMPERATURE

    def step(carry, i):
        x, log_p, value, log_w = carry
        k_move, k_look, k_pick = jax.random.split(jax.random.fold_in(key, i), 3)
        x = unmask(log_p, x, ts[i], ts[i + 1], k_move)
        log_p, new_value = look_ahead(x, k_look)
        w = jax.nn.softmax(log_w + new_value - value, axis=-1)  # [G, N]
        low = 1 / jnp.sum(w**2, axis=-1, keepdims=True) < n / 2
        low |= i == args.sampling_steps - 1  # what is returned has equal weights
        points = (jnp.arange(n)[None] + jax.random.uniform(k_pick, (g, 1))) / n
        pick = jax.vmap(jnp.searchsorted)(jnp.cumsum(w, axis=-1), points)
        pick = jnp.where(low, jnp.minimum(pick, n - 1), jnp.arange(n)[None])
        flat = (pick + n * jnp.arange(g)[:, None]).reshape(-1)
        log_w = jnp.where(low, 0.0, jnp.log(w))
        return (x[flat], log_p[flat], new_value.reshape(-1)[flat].reshape(g, n), log_w), None

    ts, zeros = times(args.sampling_steps), jnp.zeros((g, n))
    carry = x, log_probs(theta, x), zeros, zeros  # potentials are taken against q = 0
    (x, log_p, _, _), _ = jax.lax.scan(step, carry, jnp.arange(args.sampling_steps))
    return jnp.argmax(log_p, axis=-1)


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


class TrainState(NamedTuple):
    """Everything that training changes on the device."""

    theta: dict
    opt: optax.OptState
    log_lam: jax.Array
    step: jax.Array  # gradient steps done
    replay: tuple = ()  # in fine-tuning x0 [R G N, L] and w [R G N], the newest last


def optimiser(args, phase):
    """Adam on gradients of norm 1 at most. In pretraining its rate is warmed up over a tenth of
    the steps and annealed to 0."""
    rate = args.finetune_lr
    if phase == "pretrain":
        warm_up = max(args.pretrain_steps // 10, 1)
        peak, steps = args.pretrain_lr, max(args.pretrain_steps, warm_up + 1)
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, warm_up, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


def new_state(args, phase, theta, length=0):
    zero, rows = jnp.zeros((), jnp.int32), args.replay * args.num_groups * args.num_samples
    replay = np.zeros((rows, length), np.int32), np.zeros(rows, np.float32)
    replay = replay if phase == "finetune" else ()
    return TrainState(theta, optimiser(args, phase).init(theta), jnp.zeros(()), zero, replay)


def subs_loss(theta, x0, w, key, neg_floor=0.0):
    """Weighted SUBS loss, nats a base: x0 [B, L], w [B] -> []. With w = 1 its expectation is at
    least the mean of -log p(x0) / L.

    t is stratified over the batch. Where w < 0, a base of p(x0_i | x_t) < neg_floor adds nothing
    to the gradient, so that the loss is bounded below.
    """
    k_t, k_order, k_mask = jax.random.split(key, 3)
    b = x0.shape[0]
    t = (jax.random.permutation(k_order, b) + jax.random.uniform(k_t, (b,))) / b
    t = (t * (1 - 1e-3) + 1e-3)[:, None]
    hidden = jax.random.uniform(k_mask, x0.shape) < mask_chance(t)
    log_p = log_probs(theta, jnp.where(hidden, MASK, x0))
    log_p = jnp.take_along_axis(log_p, x0[..., None], axis=-1)[..., 0]
    bounded = jnp.maximum(log_p, jnp.log(neg_floor))
    log_p = jnp.where((w < 0)[:, None], bounded, log_p)
    return -jnp.mean(w[:, None] * hidden * log_p / t)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def refit(args, phase, state, x0, w, key):
    """One gradient step of the weighted loss on x0 [B, L], w [B]. -> state, loss, gradient norm."""
    key = jax.random.fold_in(key, state.step)
    loss, grads = jax.value_and_grad(subs_loss)(state.theta, x0, w, key, args.neg_floor)
    updates, opt = optimiser(args, phase).update(grads, state.opt)
    theta = optax.apply_updates(state.theta, updates)
    return state._replace(theta=theta, opt=opt, step=state.step + 1), loss, optax.tree.norm(grads)


@functools.partial(jax.jit, static_argnums=0)
def weigh(args, state, theta_pretrained, oracle, x0, key):
    """Stage I for samples x0 [G N, L] of the current model: scores, lam, weights in groups.

    -> w [G N], the state with the new lam, metrics {name: scalar}.
    """
    q = score(args.oracle, oracle, x0).reshape(args.num_groups, args.num_samples)
    log_lam = state.log_lam
    for _ in range(LAM_STEPS):
        log_lam, kl = update_lam(log_lam, q, args.eps_kl)
    w = weights(args, q, jnp.exp(log_lam))
    ones = jnp.ones(x0.shape[0])
    ess = jnp.sum(jnp.abs(w), axis=-1) ** 2 / jnp.maximum(jnp.sum(w**2, axis=-1), 1e-30)
    metrics = {
        "q_median": jnp.median(q),
        "q_max": q.max(),
        "q_spread": jnp.mean(jnp.std(q, axis=-1)),
        "nll": subs_loss(state.theta, x0, ones, key),
        "nll_pretrained": subs_loss(theta_pretrained, x0, ones, key),
        "lam": jnp.exp(log_lam),
        "kl": kl,
        "w_max": w.max(),
        "w_negative": jnp.mean(w < 0),
        "ess": ess.mean(),
    }
    return w.reshape(-1), state._replace(log_lam=log_lam), metrics


def remember(replay, new, is_first):
    """Host arrays (x0, w), their oldest rows replaced by `new`; the first ones take all places."""
    if is_first:
        return tuple(np.resize(n, old.shape) for old, n in zip(replay, new, strict=True))
    return tuple(np.concatenate([old[len(n) :], n]) for old, n in zip(replay, new, strict=True))


def finetune(args, state, theta_pretrained, oracle, masks, key):
    """One iteration of SiMPO from masks [G N, L]: sample, weigh, grad_steps steps of stage II.

    -> state, metrics {name: scalar}. The steps are calls of their own, since XLA's CPU compiler
    makes the gradient of a convolution 90 times slower inside a loop.
    """
    k_sample, k_bound, k_refit = jax.random.split(jax.random.fold_in(key, state.step), 3)
    step, replay, state = int(fetch(state.step)), fetch(state.replay), state._replace(replay=())
    x0 = sample_sequences(state.theta, args.sampling_steps, masks, k_sample)
    w, state, metrics = weigh(args, state, theta_pretrained, oracle, x0, k_bound)
    replay = remember(replay, fetch((x0, w)), is_first=step == 0)
    rng, losses, norms = np.random.default_rng([args.seed, 2, step]), [], []
    for _ in range(args.grad_steps):
        rows = rng.choice(len(replay[1]), len(masks), replace=False)
        x0, w = place([part[rows] for part in replay], masks.sharding)
        state, loss, norm = refit(args, "finetune", state, x0, w, k_refit)
        losses.append(loss)
        norms.append(norm)
    metrics |= {"loss": sum(losses) / len(losses), "grad_norm": jnp.stack(norms).max()}
    return state._replace(replay=replay), metrics


# ---- replay and envs --------------------------------------------------------------------------


class Data(NamedTuple):
    """Sequences x [n, L] uint8, 0..3 = A C G T, and one value each of a column of the file."""

    x: np.ndarray
    values: list | None


def encode(letters):
    """Letters of any case -> uint8 of the same shape, 0..3 = A C G T, 255 for anything else."""
    table = np.full(256, 255, np.uint8)
    for i, base in enumerate(BASES):
        table[ord(base)] = table[ord(base.lower())] = i
    return table[np.frombuffer(letters.encode("latin-1", "replace"), np.uint8)]


def decode(x):
    """x [B, L] -> list of B strings."""
    return ["".join(BASES[i] for i in row) for row in np.asarray(x)]


def read_records(path, column):
    """Letters of each sequence of a CSV or FASTA file, and its text in `column` if there is one."""
    is_gzip = path.read_bytes()[:2] == b"\x1f\x8b"
    with (gzip.open if is_gzip else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        text = file.read()
    if text.startswith(">"):
        records = [record.partition("\n")[2] for record in text[1:].split("\n>")]
        return ["".join(record.split()) for record in records], None
    reader = csv.reader(io.StringIO(text))
    names = next(reader, [])
    seq = next((names.index(name) for name in ("seq", "sequence") if name in names), None)
    if seq is None:
        raise UsageError(
            f"--data {path}: expected FASTA, or CSV with a column seq or sequence, found the first "
            f"line {text[:60].partition(chr(10))[0]!r}"
        )
    rows = [row + [""] * (len(names) - len(row)) for row in reader if row]
    values = [row[names.index(column)] for row in rows] if column in names else None
    return [row[seq].strip() for row in rows], values


def read_data(path, column, drop_bad_rows=False):
    """Sequences of a file -> Data. UsageError for the first bad one, unless they are dropped.

    Bad are the empty ones, other letters than ACGT (in any case), a length unlike the first's, and
    repetitions.
    """
    try:
        letters, values = read_records(Path(path), column)
    except (OSError, UnicodeDecodeError, csv.Error, EOFError) as error:
        raise UsageError(f"--data {path}: {' '.join(str(error).split())}") from None
    length, first, good, rows = None, {}, [], []
    for i, seq in enumerate(letters):
        row = encode(seq)
        if not seq:
            fault = "is empty"
        elif (row == 255).any():
            fault = f"has the letter {seq[np.argmax(row == 255)]!r}, expected A, C, G and T alone"
        elif len(seq) != (length or len(seq)):
            fault = f"has {len(seq)} bases, the first one {length}"
        elif row.tobytes() in first:
            fault = f"repeats sequence {first[row.tobytes()]}"
        else:
            length, first[row.tobytes()] = len(seq), i + 1
            good.append(i)
            rows.append(row)
            continue
        if not drop_bad_rows:
            raise UsageError(f"--data {path}: sequence {i + 1} {fault}; --drop-bad-rows skips it")
    if len(rows) < 64:
        raise UsageError(f"--data {path} has {len(rows)} usable sequences, expected at least 64")
    if len(rows) < len(letters):
        print(f"{path}: {len(letters) - len(rows)} of {len(letters)} sequences dropped")
    return Data(np.stack(rows), values and [values[i] for i in good])


def as_numbers(values, path, column):
    """A column as floats; UsageError for the first text or nan in it."""
    numbers = []
    for i, value in enumerate(values):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            raise UsageError(f"--data {path}: {column} of sequence {i + 1} is {value!r}, no number")
    return np.array(numbers)


def generate_data(num=20_000, length=200):
    """The embedded training set: a Markov background of order 3 with sites planted in it.

    Like genomes it avoids CpG, varies in GC content and has clusters of sites of few factors: a
    sequence has three matrices of the ft and the eval set, drawn with repetition, and on average 6
    sites of these, on either strand. Half of the sequences take theirs among the factors with
    positive weight in the oracles, half among those with negative weight, one in seven from the
    others. Always the same set, whatever --seed.
    """
    rng = np.random.default_rng(0)
    shapes = ((4, 4), (4, 4, 4), (4, 4, 4, 4))  # what 1, 2 and 3 bases before add
    energy = sum(0.4 / order * rng.normal(size=s) for order, s in enumerate(shapes, start=1))
    energy[:, :, 1, 2] -= 1.4  # CpG
    gc = 0.4 * rng.normal(size=(num, 1)) * np.array([-1, 1, 1, -1])  # of each sequence
    x, context = np.zeros((length, num), np.uint8), rng.integers(64, size=num)
    for i, u in enumerate(rng.random((length, num))):
        cdf = np.cumsum(np.exp(energy.reshape(64, 4)[context] + gc), axis=1)
        x[i] = np.sum(u[:, None] > cdf[:, :3] / cdf[:, 3:], axis=1)
        context = (4 * context + x[i]) % 64
    x = np.ascontiguousarray(x.T)
    sets = json.loads(MOTIFS.read_text())
    sites = {sign: [] for sign in (1, -1)}  # cumulative shares [m, 4] of each matrix
    for part in sets.values():
        for counts, w in zip(part["pfm_counts"], part["w"][:-1], strict=True):
            sites[np.sign(w)].append(np.cumsum(motif_shares(counts), axis=1))
    for i, number in enumerate(2 + rng.poisson(4, num)):
        own = 1 if i % 2 else -1
        kinds = np.where(rng.random(3) < 1 / 7, -own, own)
        palette = [sites[kind][rng.integers(len(sites[kind]))] for kind in kinds]
        for j in rng.integers(3, size=number):
            site = np.sum(rng.random((len(palette[j]), 1)) > palette[j][:, :3], axis=1)
            start = rng.integers(length - len(site) + 1)
            x[i, start : start + len(site)] = site if rng.random() < 0.5 else 3 - site[::-1]
    return Data(x, None)


# ---- evaluate ---------------------------------------------------------------------------------


class Judge(NamedTuple):
    """What sequences are measured with: both oracles, motifs, the pretrained model, a reference."""

    ft: dict
    eval: dict
    motifs: tuple
    theta: dict
    kmers: np.ndarray  # of the reference, [64]
    hits: np.ndarray  # [F]


def in_batches(f, x, size, split):
    """f(x[i : i + size], i // size) over host integers x [n, L], the last batch filled up."""
    out = []
    for i in range(0, len(x), size):
        part = x[np.minimum(np.arange(i, i + size), len(x) - 1)].astype(np.int32)
        out.append(fetch(f(place(part, split), i // size)))
    return np.concatenate(out)[: len(x)]


def scores(args, oracle, params, x, split):
    """The oracle's score of x [n, L] -> [n]."""
    size = args.num_samples * args.num_groups
    return in_batches(lambda part, _: score(oracle.partition(":")[0], params, part), x, size, split)


def generate(args, theta, num, length, key, split):
    """num sequences of the model [num, L]."""
    masks = np.full((num, length), MASK)
    return in_batches(
        lambda x, i: sample_sequences(theta, args.sampling_steps, x, jax.random.fold_in(key, i)),
        masks,
        args.num_samples * args.num_groups,
        split,
    )


def kmer_counts(x):
    """Counts of the 64 3-mers over x [n, L]."""
    x = x.astype(np.int64)
    return np.bincount((16 * x[:, :-2] + 4 * x[:, 1:-1] + x[:, 2:]).ravel(), minlength=64)


def count_hits(args, motifs, x, split):
    """Sites of each motif of both sets, summed over x [n, L] -> [22]."""
    size = args.num_samples * args.num_groups
    hits = [in_batches(lambda part, _, m=m: motif_hits(m, part), x, size, split) for m in motifs]
    return np.concatenate(hits, axis=1).sum(axis=0)


def make_judge(args, data, theta, oracles, shards):
    """Reference of the correlations: the best 0.1 % of the data, at least 200 sequences, by its
    measured column or, without one, by the held-out oracle on at most 20,000 of them."""
    (ft, held_out), (whole, split) = oracles, shards
    motifs = place((load_motifs("ft"), load_motifs("eval")), whole)
    x, value = data
    if value is None:
        x = x[:20_000]
        value = scores(args, args.held_out, held_out, x, split)
    x = x[np.argsort(-value, kind="stable")[: max(len(x) // 1000, 200)]]
    return Judge(ft, held_out, motifs, theta, kmer_counts(x), count_hits(args, motifs, x, split))


def load_score(oracle, part):
    """Parameters of an oracle, "motif" or "enformer:FILE"; part is the motif oracle's set."""
    kind, _, path = oracle.partition(":")
    return load_motifs(part) if kind == "motif" else drakes_file(oracle, load_oracle, path)


def drakes_file(flag, load, *args):
    """load(*args), an error of the file as one of usage."""
    try:
        return load(*args)
    except BadFile as error:
        raise UsageError(f"{flag}: {error}") from None


COLUMNS = ("ft", "eval", "corr_3mer", "corr_motif", "log_lik", "gc", "unique", "oracle_calls")


def measure(args, judge, x, calls, key, split):
    """A row of the table for sequences x [n, L]: {column: number}.

    ft and eval are medians of the oracles (Pred-Activity), log_lik that of App-Log-Lik under the
    pretrained model in nats a sequence.
    """
    size = args.num_samples * args.num_groups
    log_lik = in_batches(
        lambda part, i: log_likelihood(
            judge.theta, args.sampling_steps, part, jax.random.fold_in(key, i)
        ),
        x,
        size,
        split,
    )
    values = (
        np.median(scores(args, args.oracle, judge.ft, x, split)),
        np.median(scores(args, args.held_out, judge.eval, x, split)),
        stats.pearsonr(kmer_counts(x), judge.kmers).statistic,
        stats.spearmanr(count_hits(args, judge.motifs, x, split), judge.hits).statistic,
        np.median(log_lik),
        np.mean((x == 1) | (x == 2)),
        len(np.unique(x, axis=0)) / len(x),
        calls,
    )
    return dict(zip(COLUMNS, map(float, values), strict=True))


def best_of(args, judge, calls, length, key, split):
    """The peer at equal oracle calls: eval_samples times the best of calls / eval_samples samples
    of the pretrained model. -> x [n, L], calls used."""
    n = max(calls // args.eval_samples, 1)
    x = generate(args, judge.theta, n * args.eval_samples, length, key, split)
    q = scores(args, args.oracle, judge.ft, x, split).reshape(-1, n)
    x = x.reshape(-1, n, length)
    return x[np.arange(len(x)), q.argmax(axis=1)], q.size


def run_smc(args, judge, length, key, split):
    """The peer without training: groups of N particles from the pretrained model. -> x, calls."""
    masks, size = np.full((args.eval_samples, length), MASK), args.num_samples * args.num_groups
    x = in_batches(
        lambda part, i: smc(args, judge.theta, judge.ft, part, jax.random.fold_in(key, i)),
        masks,
        size,
        split,
    )
    return x, -(-len(x) // size) * size * args.sampling_steps


def method_name(args):
    """Name of the fine-tuned row: simpo-linear, simpo-linear(-0.2)."""
    return f"simpo-{args.weighting}" + (f"({args.neg_clip:g})" if args.neg_clip else "")


def make_table(args, run_dir, judge, theta, length, key, split, stop):
    """Writes the samples of every row as FASTA; -> {row: (x, numbers)}, None if stopped."""
    n, calls = args.eval_samples, args.finetune_steps * args.num_groups * args.num_samples
    rows = {"pretrained": lambda k: (generate(args, judge.theta, n, length, k, split), 0)}
    if args.compare and calls:
        rows["best-of-n"] = lambda k: best_of(args, judge, calls, length, k, split)
        rows["smc"] = lambda k: run_smc(args, judge, length, k, split)
    if calls:
        rows[method_name(args)] = lambda k: (generate(args, theta, n, length, k, split), calls)
    table, lead = {}, jax.process_index() == 0
    place_of = {"pretrained": 1, "best-of-n": 2, "smc": 3}  # a row's key does not depend on others
    for name, draw in tqdm(rows.items(), "table", disable=None if lead else True):
        if stopped(stop):
            return None
        k_draw, k_measure = jax.random.split(jax.random.fold_in(key, place_of.get(name, 0)))
        x, used = draw(k_draw)
        table[name] = x, measure(args, judge, x, used, k_measure, split)
        if lead:
            records = (f">{name}_{j}\n{seq}\n" for j, seq in enumerate(decode(x)))
            (run_dir / f"{name}.fasta").write_text("".join(records))
    return table


def verify_oracle(args, data, split):
    """Prints how both oracles agree with a column of the data: correlations, or the AUC if it has
    two labels."""
    rows = np.random.default_rng(args.seed).permutation(len(data.x))[: args.eval_samples]
    values, labels = [data.values[i] for i in rows], sorted(set(data.values))
    if len(labels) != 2:
        column = as_numbers(values, args.data, args.verify_oracle)
    for name, oracle in (("ft", args.oracle), ("eval", args.held_out)):
        q = scores(args, oracle, load_score(oracle, name), data.x[rows], split)
        if len(labels) == 2:
            high = np.array([v == labels[0] for v in values])
            auc = stats.mannwhitneyu(q[high], q[~high]).statistic / (high.sum() * (~high).sum())
            result = f"AUC of {labels[0]} against {labels[1]} {auc:.3f}"
        else:
            pearson, spearman = stats.pearsonr(q, column), stats.spearmanr(q, column)
            result = f"Pearson {pearson.statistic:.3f}, Spearman {spearman.statistic:.3f}"
        print(f"{name} oracle {oracle}, {len(rows)} sequences: {result}")


# ---- checkpoint and log -----------------------------------------------------------------------


def named_leaves(state):
    """{name: array} of a pytree, as a checkpoint stores it."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {"state" + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def save_arrays(path, arrays, meta):
    """Writes arrays and meta, what JSON can hold, as npz without pickle, atomically; one process
    of several does."""
    if jax.process_index():
        return
    meta = np.frombuffer(json.dumps({"script": SCRIPT, **meta}).encode(), np.uint8)
    with path.with_suffix(".tmp").open("wb") as file:
        np.savez(file, **arrays, meta=meta)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".tmp").replace(path)


def load_arrays(path):
    """-> arrays, meta. UsageError for anything but a whole file of this script."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        if meta["script"] != SCRIPT:
            raise ValueError("written by another script")
        return arrays, meta
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} is no file of {SCRIPT}: {reason}") from None


def fill(template, arrays, path):
    """The pytree `template` with the arrays of those names."""
    names = named_leaves(template)
    for name, leaf in names.items():
        if name not in arrays or arrays[name].shape != leaf.shape:
            raise UsageError(f"{path}: expected {name} of shape {leaf.shape}")
    leaves = [arrays[name] for name in names]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def save_theta(path, theta):
    save_arrays(path, fetch(named_leaves(theta)), {"sizes": sizes_of(theta)})


def sizes_of(theta):
    """hidden_dim and num_layers of a generator."""
    return theta["first"]["w"].shape[-1], len(theta["layers"])


def load_theta(args, path):
    """A generator of ours (.npz) or of DRAKES; UsageError if the sizes asked for are others."""
    if Path(path).suffix == ".npz":
        if args.weights != "raw":
            raise UsageError(f"--weights must be raw for {path}, which holds one set, got ema")
        arrays, meta = load_arrays(Path(path))
        key = jax.random.key(0)
        template = jax.eval_shape(lambda: init_generator(key, *meta["sizes"]))
        theta = fill(template, arrays, path)
    else:
        theta = drakes_file("--pretrained", load_generator, path, args.weights)
    for name, size in zip(("hidden_dim", "num_layers"), sizes_of(theta), strict=True):
        if getattr(args, name) not in (None, size):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {getattr(args, name)}, but {path} has {size}")
    return theta


def new_run_dir(args):
    """Makes the run folder with args.json and versions.json; refuses one that is in use."""
    name = f"dna__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.run_dir or f"runs/{name}")
    versions = {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}}
    if jax.process_index():
        return run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if any(run_dir.iterdir()):
            raise UsageError(f"--run-dir {run_dir} is not empty; --resume goes on with a run")
        for file, content in (("args", dataclasses.asdict(args)), ("versions", versions)):
            (run_dir / f"{file}.json").write_text(json.dumps(content, indent=2))
    except OSError as error:
        raise UsageError(f"--run-dir {run_dir}: {error.strerror}") from None
    return run_dir


def open_log(args, run_dir, step):
    """TensorBoard writer of a run, mirrored to Weights & Biases with --track."""
    if args.track:
        import wandb

        wandb.init(project="simpo", name=run_dir.name, config=vars(args), sync_tensorboard=True)
    return SummaryWriter(str(run_dir), purge_step=step + 1)


def log_metrics(log, metrics, step):
    """Writes one update's metrics; Diverged names the first, in order of computation, to be off."""
    metrics = {name: float(value) for name, value in metrics.items()}
    for name, value in metrics.items():
        log.add_scalar(f"losses/{name}", value, step)
    for name, value in metrics.items():
        if not math.isfinite(value) or name.endswith("grad_norm") and value > GRAD_NORM_LIMIT:
            raise Diverged(f"{name} is {value:.3g}")


def save_figure(fig, run_dir, name):
    """Writes {name}.png and {name}.pdf and closes the figure."""
    for suffix in ("png", "pdf"):
        fig.savefig(run_dir / f"{name}.{suffix}", dpi=80, bbox_inches="tight")
    plt.close(fig)


def draw_training(run_dir):
    """curves.png: scores, likelihoods and weights over the iterations of finetune.csv."""
    curve = np.genfromtxt(run_dir / "finetune.csv", delimiter=",", names=True, ndmin=1)
    panels = {
        "score of the samples": ("q_median", "q_max"),
        "bound on -log p, nats a base": ("nll", "nll_pretrained"),
        "weights": ("ess", "w_max"),
    }
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.5))
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            axis.plot(curve["step"], curve[name], label=name)
        axis.set(xlabel="iteration", title=title)
        axis.legend()
    save_figure(fig, run_dir, "curves")


def draw_letter(axis, letter, x, y, height):
    """One letter of a logo, one unit wide, from y upwards."""
    glyph = TextPath((0, 0), letter, size=1)
    box = glyph.get_extents()
    fit = Affine2D().translate(-box.x0, -box.y0).scale(0.9 / box.width, height / box.height)
    colour = dict(zip(BASES, ("C2", "C0", "C1", "C3"), strict=True))[letter]
    fit = fit.translate(x, y) + axis.transData
    axis.add_patch(PathPatch(glyph, fc=colour, lw=0, transform=fit))


def draw_logo(axis, shares):
    """Sequence logo of shares [m, 4]; a position is as high as its information in bits."""
    bits = 2 + np.sum(shares * np.log2(np.maximum(shares, 1e-9)), axis=1)
    for i, (row, total) in enumerate(zip(shares, bits, strict=True)):
        y = 0.0
        for j in np.argsort(row):
            if row[j] * total > 0.01:
                draw_letter(axis, BASES[j], i, y, row[j] * total)
                y += row[j] * total
    axis.set(xlim=(0, len(shares)), ylim=(0, 2), xticks=[], yticks=[])


def site_shares(motifs, f, x):
    """Sites of motif f in x [n, L], turned to its strand -> their number, base shares [m, 4]."""
    width = int(motifs["width"][f])
    hit = np.asarray(is_hit(motifs, motif_log_odds(motifs, x.astype(np.int32))))[..., f]
    n, i, strand = np.nonzero(hit)
    sites = x[n[:, None], i[:, None] + np.arange(width)]
    sites = np.where(strand[:, None] == 1, 3 - sites[:, ::-1], sites)
    return len(n), np.mean(sites[..., None] == np.arange(4), axis=0) if len(n) else None


def draw_motifs(run_dir, before, after):
    """motifs.png: hits of every motif of both sets per 100 sequences, before and after, and logos
    of the sites behind them."""
    sets = json.loads(MOTIFS.read_text())
    fig, axes = plt.subplots(11, 8, figsize=(14, 11), width_ratios=[2, 3, 3, 3] * 2)
    for column, (part, motifs) in enumerate(sets.items()):
        params = load_motifs(part)
        for f, name in enumerate(motifs["names"]):
            bars, *logos = axes[f, 4 * column : 4 * column + 4]
            found = [site_shares(params, f, x) for x in (before, after)]
            rates = [100 * number / len(before) for number, _ in found]
            bars.barh((1, 0), rates, color=("0.7", "C0"))
            bars.set(yticks=(1, 0), xticks=[])
            bars.set_yticklabels([f"before {rates[0]:.0f}", f"after {rates[1]:.0f}"], fontsize=7)
            bars.set_title(f"{part}: {name}, w {motifs['w'][f]:+.2f}", fontsize=8, loc="left")
            for axis, shares in zip(
                logos,
                (motif_shares(motifs["pfm_counts"][f]), *(shares for _, shares in found)),
                strict=True,
            ):
                axis.set_axis_off()
                if shares is not None:
                    draw_logo(axis, shares)
            if not f:
                for axis, title in zip(logos, ("matrix", "before", "after"), strict=True):
                    axis.set_title(title, fontsize=8)
    fig.tight_layout()
    save_figure(fig, run_dir, "motifs")


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


def parse_command():
    """-> args, and the run folder to go on with or None.

    --resume takes every argument from the run folder; a flag beside it may only repeat it, but
    for those that say where to run.
    """
    args = parse_flags()
    if args.track and not (find_spec("wandb") and find_spec("tensorboard")):
        raise UsageError("--track needs Weights & Biases: pip install wandb tensorboard")
    if not args.resume:
        return args, None
    run_dir = Path(args.resume)
    try:
        saved = Args(**json.loads((run_dir / "args.json").read_text()) | {"distributed": False})
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--resume {run_dir} is not a run folder: {error}") from None
    args = dataclasses.replace(parse_flags(default=saved), resume=None)
    for field in dataclasses.fields(Args):
        value, old = getattr(args, field.name), getattr(saved, field.name)
        if value != old and field.name not in ("distributed", "num_devices"):
            flag = "--" + field.name.replace("_", "-")
            raise UsageError(f"{flag} {value} beside --resume, but the run has {old}")
    return args, run_dir


def start_distributed():
    """Joins the other processes; before anything else asks JAX for a device."""
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    count, index = (int(os.environ[name]) if name in os.environ else None for name in names)
    try:
        jax.distributed.initialize(num_processes=count, process_id=index)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--distributed: {' '.join(str(error).split())}") from None


def device_mesh(args):
    """The devices of all processes that share a batch -> sharding of whole and of split arrays."""
    devices, count = jax.devices(), args.num_devices
    sizes = args.batch_size, args.num_groups * args.num_samples
    if count is None:
        count = math.gcd(len(devices), *sizes)
    if count > len(devices) or any(size % count for size in sizes):
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


def stopped(stop):
    """Whether any process has been signalled; asked by all of them at once."""
    if jax.process_count() > 1:
        seen = multihost_utils.process_allgather(np.array(sum(stop[:1])))
        stop += [int(seen.max())] if seen.any() and not stop else []
    return bool(stop)


class Phase(NamedTuple):
    """Pretraining or fine-tuning, a loop of steps with a log and checkpoints."""

    name: str
    total: int  # steps
    first: int  # steps of the log before it
    log_every: int
    checkpoint_every: int
    shown: str  # metric beside the progress bar


def run_phase(args, run_dir, phase, state, step_once, whole, stop):
    """Goes on from the phase's checkpoint, if there is one, to its end -> theta; None if stopped.

    step_once(state, step, due) -> state, metrics {name: scalar}, which are read where due.
    """
    path, step, names, curve = run_dir / f"{phase.name}_checkpoint.npz", 0, (), []
    if path.exists():
        arrays, meta = load_arrays(path)
        state, curve = fill(state, arrays, path), arrays["curve"].tolist()
        step, names = meta["step"], meta["names"]
    state, lead = place(state, whole), not jax.process_index()
    logged = phase.first + step
    log = open_log(args, run_dir, logged) if lead else SummaryWriter(write_to_disk=False)

    def save():
        if lead and curve:
            style = {"header": ",".join(("step", *names)), "comments": "", "delimiter": ","}
            np.savetxt(run_dir / f"{phase.name}.csv", curve, "%.8g", **style)
        rows = {"curve": np.array(curve, np.float64)}
        save_arrays(path, fetch(named_leaves(state)) | rows, {"step": step, "names": names})

    bar = tqdm(total=phase.total, initial=step, desc=phase.name, disable=None if lead else True)
    while step < phase.total and not stopped(stop):
        due = (step + 1) % phase.log_every == 0 or step + 1 == phase.total
        state, metrics = step_once(state, step, due)
        step += 1
        bar.update()
        if due:
            metrics = {name: float(value) for name, value in fetch(metrics).items()}
            names = tuple(metrics)
            curve.append([step, *metrics.values()])
            bar.set_postfix_str(f"{phase.shown} {metrics[phase.shown]:.3f}")
            try:
                log_metrics(log, metrics, phase.first + step)
            except Diverged as error:
                raise Diverged(f"{error} at step {step} of {phase.name}") from None
        if step % phase.checkpoint_every == 0 or step == phase.total:
            save()
    bar.close()
    log.close()
    if step < phase.total:
        save()
        return None
    return state.theta


@jax.jit
def valid_nll(theta, x0, key):
    """The bound on -log p of x0 [B, L], nats a base."""
    return subs_loss(theta, x0, jnp.ones(x0.shape[0]), key)


def run_pretraining(args, run_dir, data, key, shards, stop):
    """Trains a generator on the data, but for VALID sequences; -> theta, or None if stopped."""
    whole, split = shards
    k_init, k_refit, k_valid = jax.random.split(key, 3)
    theta = init_generator(k_init, args.hidden_dim or 32, args.num_layers or 5)
    order = np.random.default_rng([args.seed, 0]).permutation(len(data.x))
    num_valid = split.num_devices * max(min(VALID, len(order) // 10) // split.num_devices, 1)
    valid = place(data.x[order[:num_valid]].astype(np.int32), split)
    w = place(np.ones(args.batch_size, np.float32), split)

    def step_once(state, step, due):
        rng = np.random.default_rng([args.seed, 1, step])
        batch = data.x[rng.choice(order[num_valid:], args.batch_size)].astype(np.int32)
        state, loss, norm = refit(args, "pretrain", state, place(batch, split), w, k_refit)
        nll = valid_nll(state.theta, valid, k_valid) if due else None
        return state, {"valid_nll": nll, "pretrain_loss": loss, "pretrain_grad_norm": norm}

    every = PRETRAIN_LOG_EVERY, args.checkpoint_every
    phase = Phase("pretrain", args.pretrain_steps, 0, *every, "valid_nll")
    state = new_state(args, "pretrain", theta)
    return run_phase(args, run_dir, phase, state, step_once, whole, stop)


def run_finetuning(args, run_dir, theta, oracle, length, key, shards, stop):
    """SiMPO from the pretrained theta; -> the last theta, or None if stopped."""
    whole, split = shards
    masks = place(np.full((args.num_groups * args.num_samples, length), MASK, np.int32), split)

    def step_once(state, step, due):
        return finetune(args, state, theta, oracle, masks, key)

    phase = Phase("finetune", args.finetune_steps, args.first_iteration, 1, 1, "q_median")
    state = new_state(args, "finetune", jax.tree.map(jnp.copy, theta), length)
    return run_phase(args, run_dir, phase, state, step_once, whole, stop)


def write_table(table, path):
    """Writes the rows as CSV, at once: its presence says that the run is complete; prints them."""
    lines = [",".join(("method", *COLUMNS))]
    lines += [",".join((k, *(f"{v:.6g}" for v in row.values()))) for k, (_, row) in table.items()]
    path.with_suffix(".tmp").write_text("\n".join(lines) + "\n")
    path.with_suffix(".tmp").replace(path)
    wide = max(map(len, table)) + 2
    print("method".ljust(wide) + "".join(name.rjust(13) for name in COLUMNS))
    for name, (_, numbers) in table.items():
        cells = (f"{v:13.0f}" if k == "oracle_calls" else f"{v:13.3f}" for k, v in numbers.items())
        print(name.ljust(wide) + "".join(cells))


def run_dna(args, run_dir):
    """Pretrains, fine-tunes and measures, each unless the run folder has it; -> exit code."""
    if args.distributed:
        start_distributed()
    lead, shards = not jax.process_index(), device_mesh(args)
    whole, split = shards
    data = load_data(args)
    if args.verify_oracle:
        verify_oracle(args, data, split)
        return 0
    seed_keys = jax.jit(lambda seed: jax.random.split(jax.random.key(seed), 3), out_shardings=whole)
    keys = seed_keys(np.uint32(args.seed))
    theta = load_theta(args, args.pretrained) if args.pretrained else None
    names = () if args.pretrain_only else ((args.oracle, "ft"), (args.held_out, "eval"))
    oracles = [place(load_score(*name), whole) for name in names]
    run_dir = run_dir or new_run_dir(args)
    if (run_dir / "metrics.csv").exists():
        print(f"{run_dir} is complete")
        return 0
    if lead:
        print(f"run folder  {run_dir}")
        print(f"device      {split.num_devices} x {jax.devices()[0].device_kind}", flush=True)
    stop, path = watch_signals(), run_dir / "pretrained.npz"
    if path.exists():
        theta = load_theta(dataclasses.replace(args, weights="raw"), path)
    elif theta is None:
        theta = run_pretraining(args, run_dir, data, keys[0], shards, stop)
    if theta is None:
        return finish(stop, run_dir, lead)
    theta = place(fetch(theta), whole)
    if not path.exists():
        save_theta(path, theta)
    if args.pretrain_only:
        return 0
    length = data.x.shape[1]
    tuned = run_finetuning(args, run_dir, theta, oracles[0], length, keys[1], shards, stop)
    if tuned is None:
        return finish(stop, run_dir, lead)
    save_theta(run_dir / "finetuned.npz", tuned)
    judge = make_judge(args, data, theta, oracles, shards)
    table = make_table(args, run_dir, judge, tuned, length, keys[2], split, stop)
    if table is None:
        return finish(stop, run_dir, lead)
    if lead:
        if args.finetune_steps:
            draw_training(run_dir)
            draw_motifs(run_dir, table["pretrained"][0], table[method_name(args)][0])
        write_table(table, run_dir / "metrics.csv")
    return 0


def finish(stop, run_dir, lead):
    """Exit code of a run that has ended before its table."""
    if stop and lead:
        print(f"stopped; --resume {run_dir} goes on", file=sys.stderr)
    return 128 + stop[0] if stop else 0


def load_data(args):
    """The training set; its values are numbers but for --verify-oracle, which also takes labels."""
    if args.data is None:
        return generate_data()
    column = args.verify_oracle or args.score_column
    data = read_data(args.data, column, args.drop_bad_rows)
    length, longest = data.x.shape[1], max(load_motifs("ft")["width"])
    if length < longest:
        raise UsageError(
            f"--data must have {longest} bases or more, a motif's length, got {length}"
        )
    if args.verify_oracle and data.values is None:
        raise UsageError(f"--verify-oracle must be a column of {args.data}, got {column}")
    if args.verify_oracle or data.values is None:
        return data
    return data._replace(values=as_numbers(data.values, args.data, column))


def dna():
    try:
        return run_dna(*parse_command())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(dna())
