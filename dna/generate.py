"""Designs of a tuned model, best first.

    python -m dna.generate runs/NAME --num 1000
    python -m dna.generate runs/NAME --template ACGTNNNNNNNNNNNNACGT

Writes runs/NAME/designs.csv: each different sequence with its scores by the two oracles
of the run and its likelihood under the pretrained model, nats a sequence.
"""

import csv
import dataclasses
from pathlib import Path

import jax
import numpy as np
import tyro

import simpo_dna
from dna.data import decode, encode
from dna.devices import make_layout, use_all_cores
from dna.oracles import load_oracle
from dna.runs import read_args


@dataclasses.dataclass(frozen=True)
class Args:
    run: tyro.conf.Positional[Path]  # folder of a run of simpo_dna.py that is complete
    num: int = 100  # sequences to draw
    template: str | None = None  # A, C, G, T where a base is fixed, N where it is free
    seed: int = 1


def read_template(template):
    """Letters -> tokens [L], masks where they are N."""
    tokens = encode(template)
    tokens[[letter in "Nn" for letter in template]] = simpo_dna.MASK
    if not len(tokens) or (tokens > simpo_dna.MASK).any():
        raise SystemExit("error: --template must have the letters A, C, G, T and N")
    return tokens


def main():
    use_all_cores()
    args = tyro.cli(Args)
    flags = read_args(args.run, simpo_dna.Args)
    layout = make_layout(flags.num_groups * flags.num_samples)
    models, meta = simpo_dna.load_generator(args.run / "finetuned.safetensors")
    models = jax.device_put(models, layout.whole)
    tokens = read_template(args.template or "N" * meta["length"])

    k_draw, k_likelihood = jax.random.split(jax.random.key(args.seed))
    start = np.tile(tokens, (args.num, 1))
    x = simpo_dna.sample(flags, models["finetuned"], start, layout, k_draw)
    x = np.unique(x, axis=0)
    column = flags.oracle_column
    ft = load_oracle(flags.oracle, "ft", column, layout)(x)
    held_out = load_oracle(flags.eval_oracle or "motif", "eval", column, layout)(x)
    loglik = simpo_dna.likelihoods(flags, models["pretrained"], x, layout, k_likelihood)

    path = args.run / "designs.csv"
    sequences = decode(x)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["sequence", "ft", "eval", "loglik"])
        for i in np.argsort(-ft, kind="stable"):
            numbers = [f"{values[i]:.6g}" for values in (ft, held_out, loglik)]
            writer.writerow([sequences[i], *numbers])
    print(f"{path}: {len(x)} different sequences of {args.num}")


if __name__ == "__main__":
    main()
