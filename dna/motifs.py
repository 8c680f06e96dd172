"""The motif grammar: a reward of sites of transcription factors, and their hits.

Legend: B sequences, L bases, F motifs, m the width of one, W the largest; x [B, L]
holds 0..3 = A C G T. A motif is a matrix of counts of each base at each position.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dna.data import REWARD, site_shares

BOUND_AT = 7.0  # log-odds of a site that is bound half of the time


def read_motifs(path, part):
    """-> shares of the bases of each motif, a list of [m, 4], and {mean, sd, w}.

    Raises ValueError and what reading JSON raises."""
    motifs = json.loads(Path(path).read_text())
    motifs = motifs.get(part, motifs)
    shares = [site_shares(np.array(counts, float)) for counts in motifs["pfm_counts"]]
    for p in shares:
        is_matrix = p.ndim == 2 and p.shape[1] == 4
        if not is_matrix or p.min() <= 0:
            raise ValueError("expected matrices of 4 rows of counts")
    num = len(shares)
    columns = {
        "mean": np.zeros(num),
        "sd": np.ones(num),
        "w": np.zeros(num + 1),
    }
    for name, default in columns.items():
        found = np.array(motifs.get(name, default), np.float32)
        if found.shape != default.shape or not np.isfinite(found).all():
            raise ValueError(f"expected {len(default)} finite numbers of {name}")
        columns[name] = found
    if (columns["sd"] <= 0).any():
        raise ValueError("expected sd above 0")
    return shares, columns


def load_motifs(path=REWARD, part="ft"):
    """A set of motifs of a JSON file, or its only one, as a kernel for both strands.

    The file has pfm_counts, a list of matrices of counts [4, m], rows A C G T; mean and
    sd of the F features (default 0 and 1); w, F weights and an intercept (default 0).
    kernel [W, 5, 2 F] is log-odds, forward and reverse complement, 0 beyond the width
    [F] of a motif; its fifth input is the log-share of a base in the sequence, which it
    subtracts.
    """
    try:
        shares, columns = read_motifs(path, part)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"error: motif:{path}: {reason}") from None
    width = np.array([len(p) for p in shares])
    shape = (width.max(), 5, 2, len(shares))
    kernel = np.zeros(shape, np.float32)
    for f, p in enumerate(shares):
        part = kernel[: len(p), :, :, f]
        log_odds = np.log(p / 0.25)
        part[:, :4, 0] = log_odds
        part[:, :4, 1] = np.flip(log_odds)
        part[:, 4] = -1
    kernel = kernel.reshape(len(kernel), 5, -1)
    return {"kernel": kernel, "width": width, **columns}


def own_shares(x):
    """Shares of the bases in each sequence [B, 4], one of each added: none is 0."""
    counts = jax.nn.one_hot(x, 4).sum(axis=1)
    return (counts + 1) / (x.shape[1] + 4)


def uniform_shares(x):
    return jnp.full((x.shape[0], 4), 0.25)


def site_log_odds(motifs, x, shares):
    """log p(site | motif) / p(site | shares) of the site from i on: [B, L, 2, F].

    The third axis is the strand; shares [B, 4] are those of independent bases; -inf
    where a site would end behind the sequence.
    """
    onehot = jax.nn.one_hot(x, 4)
    log_share = jnp.log(4 * shares)[:, None]
    log_share = jnp.sum(onehot * log_share, axis=-1, keepdims=True)
    kernel = motifs["kernel"]
    behind = kernel.shape[0] - 1
    match = jax.lax.conv_general_dilated(
        jnp.concatenate([onehot, log_share], axis=-1),
        kernel,
        window_strides=(1,),
        padding=((0, behind),),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    match = match.reshape(*x.shape, 2, -1)
    start = jnp.arange(x.shape[1])
    last_start = x.shape[1] - motifs["width"]
    fits = start[:, None] <= last_start[None]  # [L, F]
    return jnp.where(fits[None, :, None], match, -jnp.inf)


def motif_features(motifs, x, bound_at=BOUND_AT):
    """Chance that a factor is bound to at least one site, of each factor: [B, F].

    A site is bound with chance sigmoid(log ratio - bound_at), where ratio is
    p(site | motif) / p(site) and p(site) the larger of two: with the shares of the
    bases in that sequence, so that random letters earn little, whatever their shares;
    and with uniform shares, so that a site earns no more where its bases are rare.
    """
    own = site_log_odds(motifs, x, own_shares(x))
    uniform = site_log_odds(motifs, x, uniform_shares(x))
    log_odds = jnp.minimum(own, uniform)
    log_free = jax.nn.log_sigmoid(bound_at - log_odds)  # 0 where no site fits
    return -jnp.expm1(jnp.sum(log_free, axis=(1, 2)))


@jax.jit
def motif_score(motifs, x):
    """A linear model of the standardised chances to be bound: x [B, L] -> [B].

    In motif_reward.json the logit of accessibility in HepG2 against K562.
    """
    centred = motif_features(motifs, x) - motifs["mean"][None]
    z = centred / motifs["sd"][None]
    w = motifs["w"]
    return z @ w[:-1] + w[-1]


def is_hit(motifs, x):
    """x [B, L] -> whether a site from i on is one of motif f: [B, L, 2, F].

    A hit has 80 % of the matrix's range of log-odds against uniform bases."""
    kernel = motifs["kernel"]
    kernel = kernel.reshape(len(kernel), 5, 2, -1)
    forward = kernel[:, :4, 0]  # [W, 4, F]
    low = forward.min(axis=1).sum(axis=0)
    high = forward.max(axis=1).sum(axis=0)
    threshold = low + 0.8 * (high - low)
    log_odds = site_log_odds(motifs, x, uniform_shares(x))
    return log_odds >= threshold[None, None, None]


@jax.jit
def motif_hits(motifs, x):
    """Number of hits of each motif: [B, F]."""
    return jnp.sum(is_hit(motifs, x), axis=(1, 2))
