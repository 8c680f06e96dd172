"""Scores the sequences of a file by both oracles, or compares the two with a column.

python -m dna.score sequences.fasta > scores.csv
python -m dna.score sites.csv --column activity --oracle mymodule:score
"""

import csv
import dataclasses
import sys

import jax
import numpy as np
import tyro
from scipy import stats

import simpo_dna
from dna.data import NUMBER, read_data
from dna.devices import make_layout, use_all_cores
from dna.oracles import load_oracle


@dataclasses.dataclass(frozen=True)
class Args:
    file: tyro.conf.Positional[str]  # CSV with a column seq or sequence, or FASTA
    column: str | None = None  # print how the oracles agree with it, and no scores
    seq_column: str | None = None  # of the sequences; default: seq or sequence
    rows: int | None = None  # compare so many rows, drawn at random; default: all
    drop_bad_rows: bool = False  # leave out rows that are errors otherwise
    model: str | None = None  # also print the likelihood under this model of a run
    oracle: str = "motif"  # motif[:FILE], enformer:FILE or MODULE:FUNCTION
    eval_oracle: str = "motif"  # a second one, of the same forms
    oracle_column: int = 0  # of an oracle with several outputs
    sampling_steps: int = 32  # T of the likelihood
    batch_size: int = 128  # sequences of a call of an oracle
    seed: int = 1


def agreement(q, texts, column):
    """Correlations of scores q [n] with a column's texts; of two labels the AUC."""
    numeric = all(NUMBER.fullmatch(text) for text in texts)
    labels = sorted(set(texts), key=float if numeric else str)
    if len(labels) == 2:
        high = np.array(texts) == labels[1]
        area = stats.mannwhitneyu(q[high], q[~high]).statistic
        auc = area / (high.sum() * (~high).sum())
        return f"AUC of {labels[1]} against {labels[0]} {auc:.3f}"
    if len(labels) == 1 or not numeric:
        raise SystemExit(
            f"error: {column} has neither two labels nor different numbers"
        )
    values = np.array(texts, float)
    pearson = stats.pearsonr(q, values).statistic
    spearman = stats.spearmanr(q, values).statistic
    return f"Pearson {pearson:.3f}, Spearman {spearman:.3f}"


def compare(args, oracles):
    data = read_data(
        args.file,
        args.column,
        args.seq_column,
        args.drop_bad_rows,
        numbers=False,
        training=False,
    )
    rows = np.random.default_rng(args.seed).permutation(len(data.x))[: args.rows]
    texts = [data.values[row] for row in rows]
    for name, oracle in oracles.items():
        result = agreement(oracle(data.x[rows]), texts, args.column)
        print(f"{name} oracle, {len(rows)} sequences: {result}")


def score(args, oracles, layout):
    data = read_data(
        args.file,
        seq_column=args.seq_column,
        drop_bad_rows=args.drop_bad_rows,
        training=False,
    )
    columns = {name: oracle(data.x) for name, oracle in oracles.items()}
    if args.model:
        models, _ = simpo_dna.load_generator(args.model)
        theta = models.get("finetuned", models["pretrained"])
        theta = jax.device_put(theta, layout.whole)
        key = jax.random.key(args.seed)
        loglik = simpo_dna.likelihoods(args, theta, data.x, layout, key)
        columns["loglik"] = loglik
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["name", *columns])
    for name, *row in zip(data.names, *columns.values(), strict=True):
        writer.writerow([name, *(f"{value:.6g}" for value in row)])


def main():
    use_all_cores()
    args = tyro.cli(Args)
    layout = make_layout(args.batch_size)
    oracles = {
        "ft": load_oracle(args.oracle, "ft", args.oracle_column, layout),
        "eval": load_oracle(args.eval_oracle, "eval", args.oracle_column, layout),
    }
    if args.column:
        compare(args, oracles)
    else:
        score(args, oracles, layout)


if __name__ == "__main__":
    main()
