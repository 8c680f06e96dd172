"""Rewards of simpo_dna.py: the motif grammar, DRAKES' Enformer, or a function of yours.

Legend: B sequences, L bases, F motifs, m a motif's width; x [B, L] holds 0..3 = A C G T.
"""

import functools
import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dna.data import REWARD, UsageError, decode, load_arrays, nest, site_shares

CONCENTRATION = 0.5  # of a factor: its occupancy is even odds at twice the mean odds of chance


# ---- motif grammar -----------------------------------------------------------------------------


def load_motifs(path=REWARD, part="ft"):
    """A set of motifs of a JSON file, or the file's only one, as a kernel for both strands.

    The file has pfm_counts, a list of matrices of counts [4, m], rows A C G T; mean and sd of the
    F features (default 0 and 1); w, F weights and an intercept (default 0). kernel [W, 5, 2 F] is
    log-odds, forward and reverse complement, 0 beyond a motif's width [F]; its fifth input is the
    log-share of a base in the sequence, which it subtracts. UsageError for a malformed file.
    """
    try:
        motifs = json.loads(Path(path).read_text())
        motifs = motifs.get(part, motifs)
        shares = [site_shares(np.array(counts, float)) for counts in motifs["pfm_counts"]]
        num = len(shares)
        default = {"mean": np.zeros(num), "sd": np.ones(num), "w": np.zeros(num + 1)}
        columns = {k: np.array(motifs.get(k, v), np.float32) for k, v in default.items()}
        if not all(columns[k].shape == v.shape for k, v in default.items()):
            raise ValueError(f"expected {num} values of mean and sd and {num + 1} of w")
        if not all((p.shape[1:] == (4,)) & (p > 0).all() for p in shares):
            raise ValueError("expected matrices of 4 rows of counts")
        if not all(np.isfinite(v).all() for v in columns.values()) or (columns["sd"] <= 0).any():
            raise ValueError("expected finite numbers and sd above 0")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"motif:{path}: {' '.join(str(error).split())}") from None
    kernel = np.zeros((max(map(len, shares)), 5, 2, num), np.float32)
    for f, p in enumerate(shares):
        log_odds = np.log(p / 0.25)
        kernel[: len(p), :4, 0, f], kernel[: len(p), :4, 1, f] = log_odds, log_odds[::-1, ::-1]
        kernel[: len(p), 4, :, f] = -1
    widths = np.array([len(p) for p in shares])
    return {"kernel": kernel.reshape(*kernel.shape[:2], -1), "width": widths, **columns}


def own_shares(x):
    """Shares of the bases in each sequence [B, 4], one of each added: none is 0."""
    return (jax.nn.one_hot(x, 4).sum(axis=1) + 1) / (x.shape[1] + 4)


def site_log_odds(motifs, x, shares):
    """log of p(site | motif) / p(site | shares) of the site from i on: [B, L, 2 (strand), F].

    shares [B, 4] are those of independent bases; -inf where a site would end behind the sequence.
    """
    onehot, width = jax.nn.one_hot(x, 4), motifs["width"]
    log_share = jnp.sum(onehot * jnp.log(4 * shares)[:, None], axis=-1, keepdims=True)
    match = jax.lax.conv_general_dilated(
        jnp.concatenate([onehot, log_share], axis=-1),
        motifs["kernel"],
        (1,),
        ((0, motifs["kernel"].shape[0] - 1),),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    fits = jnp.arange(x.shape[1])[:, None] <= x.shape[1] - width[None]  # [L, F]
    return jnp.where(fits[None, :, None], match.reshape(*x.shape, 2, -1), -jnp.inf)


def motif_features(motifs, x):
    """Occupancy log(1 + CONCENTRATION mean_sites p(site | motif) / p(site)) by each factor: [B, F].

    p(site) is the larger of two: with the shares of the bases in that sequence, so that the mean is
    at most 1 for letters drawn at random, whatever their shares, and with uniform shares, so that a
    site is worth no more where its bases are made rare.
    """
    own, uniform = own_shares(x), jnp.full((x.shape[0], 4), 0.25)
    log_odds = jnp.minimum(site_log_odds(motifs, x, own), site_log_odds(motifs, x, uniform))
    num_sites = 2.0 * jnp.maximum(x.shape[1] - motifs["width"] + 1, 1)
    mean = jax.nn.logsumexp(log_odds, axis=(1, 2)) - jnp.log(num_sites)[None]
    return jax.nn.softplus(mean + jnp.log(CONCENTRATION))


@jax.jit
def motif_score(motifs, x):
    """Linear model of the standardised occupancies, logit of the first cell type: x [B, L] -> [B].

    In motif_reward.json accessibility specificity, HepG2 against K562.
    """
    z = (motif_features(motifs, x) - motifs["mean"][None]) / motifs["sd"][None]
    return z @ motifs["w"][:-1] + motifs["w"][-1]


@jax.jit
def motif_hits(motifs, x):
    """Sites with at least 80 % of a matrix's range of log-odds against uniform bases: [B, F]."""
    return jnp.sum(is_hit(motifs, x), axis=(1, 2))


def is_hit(motifs, x):
    """x [B, L] -> whether a site from i on is one of motif f: [B, L, 2, F]."""
    rows = motifs["kernel"][:, :4].reshape(-1, 4, 2, motifs["width"].size)[:, :, 0]  # [W, 4, F]
    low, high = rows.min(axis=1).sum(axis=0), rows.max(axis=1).sum(axis=0)
    threshold = low + 0.8 * (high - low)
    log_odds = site_log_odds(motifs, x, jnp.full((x.shape[0], 4), 0.25))
    return log_odds >= threshold[None, None, None]


# ---- Enformer, the oracle of DRAKES ------------------------------------------------------------


def dense(layer, x):
    return x @ layer["w"] + layer["b"]


def conv(layer, x, dilation=1):
    """x [B, L, in] with w [K, in, out] -> [B, L, out]; zeros beyond both ends."""
    numbers, dilation = ("NWC", "WIO", "NWC"), (dilation,)
    y = jax.lax.conv_general_dilated(
        x, layer["w"], (1,), "SAME", rhs_dilation=dilation, dimension_numbers=numbers
    )
    return y + layer["b"][None, None]


def short_conv(layer, x):
    """`conv` for L < K as one matmul; XLA for CPUs takes 300 times longer for such a conv."""
    (_, length, _), width = x.shape, layer["w"].shape[0]
    x = jnp.pad(x, ((0, 0), (width // 2, width // 2), (0, 0)))
    windows = jnp.concatenate([x[:, i : i + length] for i in range(width)], axis=-1)
    return dense({"w": layer["w"].reshape(windows.shape[-1], -1), "b": layer["b"]}, windows)


def layer_norm(norm, x):
    x = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
    return x * norm["w"][None, None] + norm["b"][None, None]


def gelu(x):
    return x * jax.nn.sigmoid(1.702 * x)


def norm_gelu_conv(block, x):
    """Batch norm with its running statistics (folded into a scale and a shift), gelu, conv."""
    norm, layer = block["norm"], block["conv"]
    x = gelu(x * norm["w"][None, None] + norm["b"][None, None])
    return (short_conv if x.shape[1] < layer["w"].shape[0] else conv)(layer, x)


def attention_pool(w, x):
    """Softmax-weighted mean of each pair of positions, by channel: [B, L, C] -> [B, ceil(L/2), C].

    The last position of an odd length has no partner and stays as it is.
    """
    b, length, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, length % 2), (0, 0))).reshape(b, -1, 2, c)
    exists = (jnp.arange(x.shape[1] * 2) < length).reshape(1, -1, 2, 1)
    return jnp.sum(x * jax.nn.softmax(jnp.where(exists, x @ w, -jnp.inf), axis=2), axis=2)


def position_features(n, size):
    """Enformer's features of the distances -(n - 1)..n - 1, a numpy constant [2n - 1, size].

    A third each of exponentials, central masks and gamma densities, then all with the sign.
    """
    k, distance = size // 6, np.arange(-n + 1, n)[:, None]
    d = np.abs(distance)
    exponential = 0.5 ** (d / 2 ** np.linspace(3, math.log2(n), k))
    mask = d < 2.0 ** np.arange(1, k + 1) - 1
    mean, std = np.linspace(n / k, n, k), n / (2 * k)
    shape, rate = (mean / std) ** 2, mean / std**2  # shape >= 4: the density is 0 at 0
    log_norm = np.array([math.lgamma(s) for s in shape]) - shape * np.log(rate)
    density = np.exp((shape - 1) * np.log(np.maximum(d, 1e-300)) - rate * d - log_norm) + 1e-8
    gamma = density / density.max(axis=-1, keepdims=True)
    features = np.concatenate([exponential, mask, gamma], axis=-1)
    return np.concatenate([features, np.sign(distance) * features], axis=-1).astype(np.float32)


def attention(block, x):
    """Self-attention with Transformer-XL's relative positions: [B, n, C] -> [B, n, C]."""
    b, n, _ = x.shape
    heads, size = block["content_bias"].shape
    q, k, v = ((x @ block[w]).reshape(b, n, heads, -1) for w in ("query", "key", "value"))
    q = q / math.sqrt(size)
    rel = jnp.asarray(position_features(n, block["rel"].shape[0])) @ block["rel"]
    rel = rel.reshape(-1, heads, size)  # [2n - 1, heads, size]
    content = jnp.einsum("bihd,bjhd->bhij", q + block["content_bias"][None, None], k)
    position = jnp.einsum("bihd,mhd->bhim", q + block["position_bias"][None, None], rel)
    index = jnp.arange(n)[None] - jnp.arange(n)[:, None] + n - 1  # of the distance j - i
    position = jnp.take_along_axis(position, index[None, None], axis=-1)
    weight = jax.nn.softmax(content + position, axis=-1)
    return dense(block["out"], jnp.einsum("bhij,bjhd->bihd", weight, v).reshape(b, n, -1))


def enformer(params, x):
    """The DRAKES reward oracle: tokens [B, L] or one-hot [B, L, 4] -> [B, 3] hepg2, k562, sknsh.

    gReLU's EnformerPretrainedModel in evaluation; no activation after the head (MSE regression).
    """
    x = jax.nn.one_hot(x, 4) if x.ndim == 2 else x
    x = conv(params["stem"], x)
    for stage in params["tower"]:
        x = norm_gelu_conv(stage["wide"], x) if "wide" in stage else x
        x = attention_pool(stage["pool"], x + norm_gelu_conv(stage["point"], x))
    for block in params["transformer"]:
        x = x + attention(block, layer_norm(block["norm"], x))
        h = dense(block["up"], layer_norm(block["mlp_norm"], x))
        x = x + dense(block["down"], jax.nn.relu(h))
    x = gelu(norm_gelu_conv(params["pointwise"], x))
    return jnp.mean(dense(params["head"], x), axis=1)


# ---- choice ------------------------------------------------------------------------------------


class Oracle(NamedTuple):
    """apply(params, x [B, L]) -> scores [B] on the device; without params apply(x) on the host."""

    apply: Callable
    params: dict | None


def load_oracle(spec, part="ft", column=0):
    """The reward that a flag names; UsageError if there is none.

    motif: the embedded motif grammar, its set `part`. motif:FILE.json: one of yours.
    enformer:FILE.npz: of DRAKES, by dna/convert_drakes.py; column 0 HepG2, 1 K562, 2 SK-N-SH.
    MODULE:FUNCTION: your function of a list of strings, or, if it has the attribute
    `takes_indices`, of x [n, L] uint8; it returns n scores, or [n, k] of which column counts.
    """
    kind, _, rest = spec.partition(":")
    if kind == "motif":
        return Oracle(motif_score, load_motifs(rest or REWARD, part))
    if kind == "enformer":
        return load_enformer(rest, column)
    try:
        sys.path.insert(0, "")  # modules of the working directory
        function = functools.reduce(getattr, rest.split("."), importlib.import_module(kind))
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"oracle {spec}: {error}") from None

    def apply(x):
        takes_indices = getattr(function, "takes_indices", False)
        q = np.asarray(function(x.astype(np.uint8) if takes_indices else decode(x)), np.float32)
        if q.ndim == 2 and q.shape[1] > column:
            q = q[:, column]
        if q.shape != (len(x),) or not np.isfinite(q).all():
            found = f"returned shape {q.shape}, or numbers that are not finite"
            raise UsageError(f"oracle {spec} {found}; expected ({len(x)},)")
        return q

    return Oracle(apply, None)


def load_enformer(path, column):
    """An Enformer that dna/convert_drakes.py wrote; its structure comes from the arrays' names."""
    arrays, _ = load_arrays(path, "enformer")
    params, x = nest(arrays), jnp.zeros((1, 128), jnp.int32)
    try:
        outputs = jax.eval_shape(enformer, params, x).shape[1]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = ascii(" ".join(str(error).split()))[:120]
        raise UsageError(f"{path} is no enformer of simpo_dna: {reason}") from None
    if not 0 <= column < outputs:
        raise UsageError(f"--oracle-column {column}, but {path} has {outputs} outputs")
    return Oracle(jax.jit(lambda params, x: enformer(params, x)[:, column]), params)
