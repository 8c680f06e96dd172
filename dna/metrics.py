"""What the sequences of simpo_dna.py are worth: the rows of metrics.csv."""

from typing import NamedTuple

import jax
import numpy as np
from scipy import stats

from dna.data import shuffle_dinucleotides
from dna.devices import Layout, in_batches
from dna.motifs import load_motifs, motif_hits

RARE = 0.01  # hits a sequence, added to those of a motif
MAX_REFERENCE = 20_000  # sequences that the held-out oracle scores for the reference


class Reference(NamedTuple):
    """What the sequences of a model are compared with."""

    motifs: dict  # of factors that no embedded oracle uses
    kmers: np.ndarray  # counts of 6-mers in the reference sequences, [4^6]
    hits: np.ndarray  # of each motif in one of them, [F]
    layout: Layout


def kmer_counts(x, k=6):
    """Counts of the 4^k k-mers over x [n, L]."""
    starts = x.shape[1] - k + 1
    kmers = np.zeros((len(x), starts), int)
    for i in range(k):
        kmers = 4 * kmers + x[:, i : i + starts]
    return np.bincount(kmers.ravel(), minlength=4**k)


def divergence(counts, other):
    """Jensen-Shannon divergence of two histograms [K], in bits: 0 to 1."""
    p = counts / counts.sum()
    q = other / other.sum()
    middle = (p + q) / 2
    of_p = stats.entropy(p, middle, base=2)
    of_q = stats.entropy(q, middle, base=2)
    return (of_p + of_q) / 2


def median_distance(x, largest=1000):
    """Median Hamming distance of pairs of the first sequences x [n, L]; 0 for n = 1."""
    if len(x) == 1:
        return 0.0
    onehot = np.eye(4, dtype=np.float32)[x[:largest]]
    onehot = onehot.reshape(len(onehot), -1)
    same = onehot @ onehot.T  # number of equal bases of each pair
    pairs = np.triu_indices(len(same), k=1)
    return x.shape[1] - np.median(same[pairs])


def hit_rates(motifs, x, layout):
    """Hits of each motif a sequence over x [n, L] -> [F]."""
    hits = in_batches(lambda batch, _: motif_hits(motifs, batch), x, layout)
    return hits.mean(axis=0)


def choose_reference(args, data, held_out):
    """The best 0.1 % of the data, at least 200 sequences, by --score-column or, without
    it, by the held-out oracle on at most MAX_REFERENCE of them, drawn at random."""
    x = data.x
    if args.score_column:
        value = np.array(data.values, float)
        by = f"column {args.score_column}"
    else:
        rng = np.random.default_rng([args.seed, 3])
        drawn = rng.permutation(len(x))[:MAX_REFERENCE]
        x = x[np.sort(drawn)]
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
    return Reference(
        motifs=motifs,
        kmers=kmer_counts(x),
        hits=hit_rates(motifs, x, layout),
        layout=layout,
    )


def measure(reference, oracles, x, loglik, seed):
    """Of sequences x [n, L] with likelihoods [n]: {column: [n]}, {column: number}.

    The first are for their FASTA, the second is a row of the table: medians of the
    oracles (Pred-Activity) and, behind _shuffled, of a shuffle of every sequence that
    keeps its pairs of bases; js_6mer is the divergence from the reference in bits,
    motif_ratio the largest |log ratio| of hits to its own; log_lik is App-Log-Lik in
    nats a sequence, distance the median Hamming distance of pairs.
    """
    ft = oracles.ft(x)
    held_out = oracles.held_out(x)
    shuffled = shuffle_dinucleotides(x, np.random.default_rng(seed))
    kmers = kmer_counts(x)
    hits = hit_rates(reference.motifs, x, reference.layout)
    log_ratio = np.log((hits + RARE) / (reference.hits + RARE))
    is_gc = (x == 1) | (x == 2)
    row = {
        "ft": np.median(ft),
        "ft_shuffled": np.median(oracles.ft(shuffled)),
        "eval": np.median(held_out),
        "eval_shuffled": np.median(oracles.held_out(shuffled)),
        "js_6mer": divergence(kmers, reference.kmers),
        "motif_ratio": np.abs(log_ratio).max(),
        "log_lik": np.median(loglik),
        "gc": np.mean(is_gc),
        "unique": len(np.unique(x, axis=0)) / len(x),
        "distance": median_distance(x),
    }
    return {"ft": ft, "eval": held_out, "loglik": loglik}, row


def write_table(table, path):
    """Prints {name: row} and writes the CSV, whose presence says: it is complete."""
    columns = list(next(iter(table.values())))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        print("method", *columns, sep=",", file=file)
        for method, row in table.items():
            cells = [f"{value:.6g}" for value in row.values()]
            print(method, *cells, sep=",", file=file)
    temporary.replace(path)

    print("".ljust(14), *(method.rjust(12) for method in table))
    for column in columns:
        cells = [f"{row[column]:12.5g}" for row in table.values()]
        print(column.ljust(14), *cells)
