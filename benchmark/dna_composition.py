"""What composition alone scores under the motif oracles: medians over random sequences.

    python benchmark/dna_composition.py

Prints a row for each GC content; 4,096 sequences of 200 bases, seed 0.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import simpo_dna as dna


def main():
    rng, oracles = np.random.default_rng(0), [dna.load_motifs(part) for part in ("ft", "eval")]
    print("  gc     ft   eval")
    for gc in (0.1, 0.2, 0.25, 0.3, 0.4, 0.5):
        shares = np.array([1 - gc, gc, gc, 1 - gc]) / 2
        x = rng.choice(4, size=(4096, 200), p=shares).astype(np.int32)
        ft, held_out = (np.median(dna.motif_score(params, x)) for params in oracles)
        print(f"{gc:4.2f} {ft:6.2f} {held_out:6.2f}")


if __name__ == "__main__":
    main()
