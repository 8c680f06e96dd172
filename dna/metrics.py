"""What the sequences of simpo_dna.py are worth: the rows of metrics.csv."""

import math
from typing import NamedTuple

import jax
import numpy as np
from scipy import stats

from dna.data import shuffle_dinucleotides
from dna.devices import Layout, in_batches
from dna.motifs import load_motifs, motif_hits

MAX_REFERENCE = 20_000  # sequences that the held-out oracle scores for the reference


class Reference(NamedTuple):
    """What the sequences of a model are compared with."""

    motifs: dict  # of factors that no embedded oracle uses
    kmers: np.ndarray  # counts over the reference sequences, [64]
    hits: np.ndarray  # of the motifs in them, [F]
    layout: Layout


def kmer_counts(x):
    """Counts of the 64 3-mers over x [n, L]."""
    x = x.astype(np.int64)
    pairs = 4 * x[:, :-1] + x[:, 1:]
    kmers = 4 * pairs[:, :-1] + x[:, 2:]
    return np.bincount(kmers.ravel(), minlength=64)


def hit_counts(motifs, x, layout):
    """Hits of each motif over x [n, L] -> [F]."""
    hits = in_batches(lambda batch, _: motif_hits(motifs, batch), x, layout)
    return hits.sum(axis=0)


def choose_reference(args, data, held_out):
    """The best 0.1 % of the data, at least 200 sequences, by --score-column or, without
    it, by the held-out oracle on at most MAX_REFERENCE of them, drawn at random."""
    x = data.x
    if args.score_column:
        value = np.array(data.values, float)
        by = f"column {args.score_column}"
    else:
        drawn = np.random.default_rng([args.seed, 3]).permutation(len(x))
        x = x[np.sort(drawn[:MAX_REFERENCE])]
        value = held_out(x)
        by = "the held-out oracle"
    if np.ptp(value) == 0:
        raise SystemExit(f"error: {by} gives every sequence the same score")
    count = max(len(x) // 1000, 200)
    best = np.argsort(-value, kind="stable")[:count]
    print(f"reference   best {len(best)} of {len(x)} sequences by {by}", flush=True)
    return x[best]


def make_reference(args, data, held_out, layout):
    motifs = jax.device_put(load_motifs(part="control"), layout.whole)
    x = choose_reference(args, data, held_out)
    return Reference(motifs, kmer_counts(x), hit_counts(motifs, x, layout), layout)


def measure(reference, oracles, x, loglik, seed):
    """Of sequences x [n, L] with likelihoods [n]: {column: [n]}, {column: number}.

    The first are for their FASTA, the second is a row of the table: medians of the
    oracles (Pred-Activity) and, behind _shuffled, of a shuffle of every sequence that
    keeps its pairs of bases; log_lik is App-Log-Lik in nats a sequence.
    """
    ft = oracles.ft(x)
    held_out = oracles.held_out(x)
    shuffled = shuffle_dinucleotides(x, np.random.default_rng(seed))
    hits = hit_counts(reference.motifs, x, reference.layout)
    corr_motif = math.nan
    if np.ptp(hits):
        corr_motif = stats.spearmanr(hits, reference.hits).statistic
    row = {
        "ft": np.median(ft),
        "ft_shuffled": np.median(oracles.ft(shuffled)),
        "eval": np.median(held_out),
        "eval_shuffled": np.median(oracles.held_out(shuffled)),
        "corr_3mer": stats.pearsonr(kmer_counts(x), reference.kmers).statistic,
        "corr_motif": corr_motif,
        "log_lik": np.median(loglik),
        "gc": np.mean((x == 1) | (x == 2)),
        "unique": len(np.unique(x, axis=0)) / len(x),
    }
    return {"ft": ft, "eval": held_out, "loglik": loglik}, row


def write_table(table, path):
    """Prints {name: row} and writes the CSV, whose presence says: it is complete."""
    columns = list(next(iter(table.values())))
    lines = [",".join(["method", *columns])]
    width = max(map(len, table)) + 2
    print("method".ljust(width) + "".join(name.rjust(14) for name in columns))
    for method, row in table.items():
        lines.append(",".join([method, *(f"{value:.6g}" for value in row.values())]))
        cells = [f"{value:14.5g}" for value in row.values()]
        print(method.ljust(width) + "".join(cells))
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(path)
