"""Fits dna/motif_reward.json anew on real sites, and measures it.

    python benchmark/dna/fit_reward.py dhs_hepg2_k562.csv.gz --out dna/motif_reward.json

The file has the columns seq, cell (HepG2 or K562) and chrom. Matrices and the chromosomes of both
sets stay those of --out; mean, sd and the weights are fitted (logistic regression with an L2
penalty of 1 on the weights). Prints the AUC on chromosome 1, which no set is fitted on, and the
median score of letters drawn at random from 5 to 95 % G and C.
"""

import csv
import dataclasses
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import tyro
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dna.data import REWARD
from dna.oracles import load_motifs, motif_features, motif_score

GC = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
HELD_OUT, PARTS = "chr1", ("ft", "eval")


@dataclasses.dataclass(frozen=True)
class Args:
    sites: tyro.conf.Positional[Path]  # CSV, gzipped: seq, cell, chrom
    out: Path = REWARD  # motif_reward.json, read and rewritten


def read_sites(path):
    """-> x [n, L], whether HepG2 [n], chromosome [n]."""
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file))
    x = np.array([["ACGT".index(base) for base in row["seq"]] for row in rows], np.int32)
    return x, np.array([r["cell"] == "HepG2" for r in rows]), np.array([r["chrom"] for r in rows])


def logistic_regression(z, y, penalty=1.0, iterations=30):
    """Weights [F + 1] of z [n, F] for labels y [n], the last the intercept; Newton's method."""
    z = np.hstack([z, np.ones((len(z), 1))])
    ridge, w = penalty * np.eye(z.shape[1]), np.zeros(z.shape[1])
    ridge[-1, -1] = 0
    for _ in range(iterations):
        p = 1 / (1 + np.exp(-z @ w))
        hessian = z.T @ (z * (p * (1 - p))[:, None]) + ridge
        w -= np.linalg.solve(hessian, z.T @ (p - y) + ridge @ w)
    return w


def in_parts(f, motifs, x, size=4096):
    return np.concatenate([f(motifs, x[i : i + size]) for i in range(0, len(x), size)])


def auc(q, y):
    return stats.mannwhitneyu(q[y], q[~y]).statistic / y.sum() / (~y).sum()


def random_letters(gc, num=4096, length=200):
    """num sequences of independent letters, always the same."""
    return np.random.default_rng(0).choice(
        4, (num, length), p=np.array([1 - gc, gc, gc, 1 - gc]) / 2
    )


def main(args):
    x, is_hepg2, chrom = read_sites(args.sites)
    sets, held_out, chr1_scores = json.loads(args.out.read_text()), chrom == HELD_OUT, []
    for part in PARTS:
        motifs = sets[part]
        train = np.isin(chrom, motifs["fit_chroms"])
        features = in_parts(motif_features, load_motifs(args.out, part), x)
        mean, sd = features[train].mean(axis=0), features[train].std(axis=0)
        w = logistic_regression((features[train] - mean) / sd, is_hepg2[train])
        motifs |= {"mean": mean.tolist(), "sd": sd.tolist(), "w": w.tolist()}
        motifs["w"] = [round(float(v), 6) for v in w]
        q = (features - mean) / sd @ w[:-1] + w[-1]
        motifs["score_sd"] = round(float(q.std()), 3)  # of all real sites
        chr1_scores.append(q[held_out])
        print(f"{part}: AUC on {HELD_OUT} {auc(q[held_out], is_hepg2[held_out]):.3f}", end=", ")
        print(f"HepG2 median, 99 %: {np.quantile(q[is_hepg2], (0.5, 0.99)).round(2)}", end=", ")
        print(f"K562 median {np.median(q[~is_hepg2]):.2f}, sd of all {q.std():.2f}")
    print(f"correlation of the two on {HELD_OUT}: {np.corrcoef(*chr1_scores)[0, 1]:.3f}")
    args.out.write_text(json.dumps(sets))
    print("G and C     " + "".join(f"{gc:7.2f}" for gc in GC))
    for part in PARTS:
        motifs = load_motifs(args.out, part)
        medians = [np.median(motif_score(motifs, random_letters(gc))) for gc in GC]
        spread = np.ptp(medians) / sets[part]["score_sd"]
        print(f"{part:12}" + "".join(f"{q:7.2f}" for q in medians) + f"   range {spread:.2f} sd")


if __name__ == "__main__":
    main(tyro.cli(Args))
