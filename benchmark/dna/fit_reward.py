"""Fits dna/motif_reward.json to real sites, and measures what games it.

    python -m benchmark.dna.fit_reward dhs_hepg2_k562.csv.gz

The file has the columns seq, cell (HepG2 or K562) and chrom. Matrices and chromosomes
of both sets stay; mean, sd and the weights are fitted by a logistic regression with an
L2 penalty of 1. reward.csv gets a row for each `bound_at` and set: AUC on the sites of
the fit and on chr1, which no set is fitted on; quantiles of the scores of HepG2 and
K562; sd of all; the ceiling, for all good factors bound and no bad one; of random
letters, 5 to 95 % G + C, the range of the medians in sd of the real scores and the
largest median; and the largest median of random letters full of one factor's best site.
"""

import csv
import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import tyro
from scipy import stats

from dna.data import REWARD, encode
from dna.motifs import BOUND_AT, load_motifs, motif_features

GC = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
LENGTH = 200


@dataclasses.dataclass(frozen=True)
class Args:
    sites: tyro.conf.Positional[Path]  # CSV, gzipped: seq, cell, chrom
    bound_at: tuple[float, ...] = (BOUND_AT,)  # the last one is written to the JSON
    out: Path = Path(__file__).with_name("reward.csv")


def logistic_regression(z, y, penalty=1.0, iterations=30):
    """Weights [F + 1] of z [n, F] for labels y [n], the last the intercept; Newton."""
    ones = np.ones((len(z), 1))
    z = np.hstack([z, ones])
    ridge = penalty * np.eye(z.shape[1])
    ridge[-1, -1] = 0
    w = np.zeros(z.shape[1])
    for _ in range(iterations):
        p = 1 / (1 + np.exp(-z @ w))
        curvature = p * (1 - p)
        hessian = z.T @ (z * curvature[:, None]) + ridge
        gradient = z.T @ (p - y) + ridge @ w
        w -= np.linalg.solve(hessian, gradient)
    return w


def features_of(motifs, x, bound_at, size=2048):
    features = []
    for start in range(0, len(x), size):
        part = x[start : start + size]
        features.append(motif_features(motifs, part, bound_at))
    return np.concatenate(features)


def random_letters(gc, num=4096):
    """Independent letters, the same ones at every call."""
    p = np.array([1 - gc, gc, gc, 1 - gc]) / 2
    return np.random.default_rng(0).choice(4, (num, LENGTH), p=p)


def full_of_sites(counts):
    """Random letters, with the best site of a motif as often as it fits."""
    x = random_letters(0.5, 256)
    site = np.argmax(counts, axis=0)
    for start in range(0, LENGTH - len(site) + 1, len(site)):
        x[:, start : start + len(site)] = site
    return x


def auc(q, y):
    """Chance that a score of label True is above one of label False."""
    pairs = y.sum() * (~y).sum()
    return stats.mannwhitneyu(q[y], q[~y]).statistic / pairs


def fit(part, motifs, bound_at, x, is_hepg2, chrom):
    """Fits one set in place -> row of the table."""
    params = load_motifs(part=part)
    features = features_of(params, x, bound_at)
    fitted = np.isin(chrom, motifs["fit_chroms"])
    chr1 = chrom == "chr1"
    mean = features[fitted].mean(axis=0)
    sd = features[fitted].std(axis=0)
    z = (features - mean) / sd
    w = logistic_regression(z[fitted], is_hepg2[fitted])

    def score(features):
        z = (features - mean) / sd
        return z @ w[:-1] + w[-1]

    def median_of(letters):
        features = features_of(params, letters, bound_at)
        return np.median(score(features))

    of_letters = []
    for gc in GC:
        of_letters.append(median_of(random_letters(gc)))
    of_one_site = []
    for counts in motifs["pfm_counts"]:
        of_one_site.append(median_of(full_of_sites(counts)))
    q = score(features)
    hepg2 = q[is_hepg2]
    top = np.quantile(hepg2, 0.999)
    motifs["mean"] = mean.tolist()
    motifs["sd"] = sd.tolist()
    motifs["w"] = w.round(6).tolist()
    motifs["score_sd"] = round(float(q.std()), 3)
    motifs["top"] = round(float(top), 2)
    return {
        "auc_fit": auc(q[fitted], is_hepg2[fitted]),
        "auc_chr1": auc(q[chr1], is_hepg2[chr1]),
        "hepg2_50": np.median(hepg2),
        "hepg2_99": np.quantile(hepg2, 0.99),
        "hepg2_99.9": top,
        "k562_50": np.median(q[~is_hepg2]),
        "sd": q.std(),
        "ceiling": score(w[:-1] > 0),
        "letters_sd": np.ptp(of_letters) / q.std(),
        "letters_max": max(of_letters),
        "one_site_max": max(of_one_site),
    }


def main(args):
    with gzip.open(args.sites, "rt") as file:
        rows = list(csv.DictReader(file))
    x = np.stack([encode(row["seq"]) for row in rows]).astype(np.int32)
    is_hepg2 = np.array([row["cell"] == "HepG2" for row in rows])
    chrom = np.array([row["chrom"] for row in rows])
    sets = json.loads(REWARD.read_text())
    with args.out.open("w") as file:
        for bound_at in args.bound_at:
            for part in ("ft", "eval"):
                row = fit(part, sets[part], bound_at, x, is_hepg2, chrom)
                if file.tell() == 0:
                    print("bound_at", "set", *row, sep=",", file=file)
                cells = [f"{value:.3f}" for value in row.values()]
                print(bound_at, part, *cells, sep=",", file=file, flush=True)
    REWARD.write_text(json.dumps(sets))


if __name__ == "__main__":
    main(tyro.cli(Args))
