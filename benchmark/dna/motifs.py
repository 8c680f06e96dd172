"""motifs.png of a run folder: what fine-tuning did to the sites of the embedded motif reward.

    python benchmark/dna/motifs.py runs/NAME --out motifs.png

Hits of every motif of both sets per 100 sequences of the first and the last row of the table, and
logos of the sites behind them; from the FASTA files of metrics.csv's rows.
"""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.patches import PathPatch
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmark.results import fail
from dna.data import BASES, REWARD, read_data, site_shares
from dna.oracles import is_hit, load_motifs


@dataclasses.dataclass(frozen=True)
class Args:
    run: tyro.conf.Positional[Path]  # run folder of simpo_dna.py
    out: Path | None = None  # default motifs.png in the run folder


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


def found_shares(motifs, hit, f, x):
    """Sites of motif f in x [n, L], turned to its strand -> their number, base shares [m, 4]."""
    width = int(motifs["width"][f])
    n, i, strand = np.nonzero(hit[..., f])
    sites = x[n[:, None], i[:, None] + np.arange(width)]
    sites = np.where(strand[:, None] == 1, 3 - sites[:, ::-1], sites)
    return len(n), np.mean(sites[..., None] == np.arange(4), axis=0) if len(n) else None


def main(args):
    if not (args.run / "metrics.csv").exists():
        fail(f"{args.run} has no metrics.csv, which a complete run of simpo_dna.py has")
    with (args.run / "metrics.csv").open() as file:
        names = [row["method"] for row in csv.DictReader(file)]
    rows = [
        read_data(args.run / f"{name}.fasta", training=False).x for name in (names[0], names[-1])
    ]
    sets = json.loads(REWARD.read_text())
    fig, axes = plt.subplots(11, 8, figsize=(14, 11), width_ratios=[2, 3, 3, 3] * 2)
    for column, part in enumerate(("ft", "eval")):
        motifs = load_motifs(part=part)
        hits = [np.asarray(is_hit(motifs, jnp.asarray(x, jnp.int32))) for x in rows]
        for f, name in enumerate(sets[part]["names"]):
            bars, *logos = axes[f, 4 * column : 4 * column + 4]
            found = [found_shares(motifs, hit, f, x) for hit, x in zip(hits, rows, strict=True)]
            rates = [100 * number / len(x) for (number, _), x in zip(found, rows, strict=True)]
            bars.barh((1, 0), rates, color=("0.7", "C0"))
            bars.set(yticks=(1, 0), xticks=[])
            bars.set_yticklabels([f"before {rates[0]:.0f}", f"after {rates[1]:.0f}"], fontsize=7)
            title = f"{part}: {name}, w {sets[part]['w'][f]:+.2f}"
            bars.set_title(title, fontsize=8, loc="left")
            matrix = site_shares(sets[part]["pfm_counts"][f])
            for axis, shares in zip(logos, (matrix, *(s for _, s in found)), strict=True):
                axis.set_axis_off()
                if shares is not None:
                    draw_logo(axis, shares)
            for axis, title in zip(logos, ("matrix", "before", "after"), strict=True):
                axis.set_title("" if f else title, fontsize=8)
    fig.suptitle(f"{names[0]} -> {names[-1]}", fontsize=9)
    fig.tight_layout()
    fig.savefig(args.out or args.run / "motifs.png", dpi=70, bbox_inches="tight")


if __name__ == "__main__":
    main(tyro.cli(Args))
