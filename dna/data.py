"""Sequences and files of simpo_dna.py: readers, the generated training set, npz without pickle.

Legend: n sequences, L bases; x [n, L] uint8 holds 0..3 = A C G T.
"""

import csv
import gzip
import io
import json
import math
import os
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

BASES = "ACGT"
REWARD = Path(__file__).with_name("motif_reward.json")


class UsageError(Exception):
    """Bad input. The scripts print it as one line and exit with code 2."""


# ---- sequences ---------------------------------------------------------------------------------


class Data(NamedTuple):
    """Sequences x [n, L], their names, and the texts of one column of the file or None."""

    x: np.ndarray
    names: list
    values: list | None


def encode(letters):
    """Letters of any case -> uint8 of the same shape, 0..3 = A C G T, 255 for anything else."""
    table = np.full(256, 255, np.uint8)
    for i, base in enumerate(BASES):
        table[[ord(base), ord(base.lower())]] = i
    return table[np.frombuffer(letters.encode("latin-1", "replace"), np.uint8)]


def decode(x):
    """x [n, L] -> list of n strings."""
    return ["".join(BASES[i] for i in row) for row in np.asarray(x)]


def read_records(path, column):
    """Rows (line in the file, name, letters, text in `column` or None) of a CSV or FASTA file."""
    is_gzip = path.read_bytes()[:2] == b"\x1f\x8b"
    with (gzip.open if is_gzip else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        text = file.read()
    start = len(text) - len(text.lstrip())
    skipped, text = text.count("\n", 0, start), text[start:]
    if text.startswith(">"):
        if column:
            raise UsageError(f"{path} is FASTA and has no column {column}")
        line, rows = skipped + 1, []
        for record in ("\n" + text).split("\n>")[1:]:
            name, _, letters = record.partition("\n")
            rows.append((line, (name.split() or [""])[0], "".join(letters.split()), None))
            line += record.count("\n") + 1
        return rows
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    header = [name.strip() for name in next(reader, [])]
    [seq, *_] = [i for i, h in enumerate(header) if h.lower() in ("seq", "sequence")] or [None]
    if seq is None:
        found = f"found the first line {first.strip()[:60]!r}"
        raise UsageError(f"{path}: expected FASTA, or CSV with a column seq or sequence, {found}")
    if column and column not in header:
        raise UsageError(f"{path} has no column {column}, but {', '.join(header)}")
    rows, value = [], header.index(column) if column else None
    for row in reader:
        if any(cell.strip() for cell in row):
            row = [cell.strip() for cell in row] + [""] * (len(header) - len(row))
            line = skipped + reader.line_num
            rows.append((line, str(line), row[seq], row[value] if column else None))
    return rows


def read_data(path, column=None, drop_bad_rows=False, numbers=True, training=True):
    """Sequences of a file, CSV (or TSV, semicolons) or FASTA, perhaps gzipped -> Data.

    UsageError for the first bad row, unless such are dropped: empty, other letters than ACGT (in
    any case), another length than most, and in `column` nothing or, with numbers, no finite number.
    For training also repetitions are bad, and 64 rows must be left.
    """
    path = Path(path)
    try:
        rows = read_records(path, column)
    except (OSError, UnicodeDecodeError, csv.Error, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None
    length = Counter(len(letters) for *_, letters, _ in rows if letters).most_common(1)
    length, first, good = length[0][0] if length else 0, {}, []
    for line, name, letters, value in rows:
        row, fault = encode(letters), None
        if not letters:
            fault = "has no sequence"
        elif (row == 255).any():
            letter = letters[np.argmax(row == 255)]
            fault = f"has the letter {ascii(letter)}, expected A, C, G and T alone"
        elif len(row) != length:
            fault = f"has {len(row)} bases, most have {length}"
        elif column and (value == "" or numbers and not is_number(value)):
            fault = f"has {ascii(value)} in {column}, expected a value"
        elif training and row.tobytes() in first:
            fault = f"repeats the sequence of line {first[row.tobytes()]}"
        if fault is None:
            first[row.tobytes()] = line
            good.append((row, name, value))
        elif not drop_bad_rows:
            raise UsageError(f"{path}: line {line} {fault}; --drop-bad-rows skips it")
    if len(good) < (64 if training else 1):
        least = "at least 64" if training else "one"
        raise UsageError(f"{path} has {len(good)} usable sequences, expected {least}")
    if len(good) < len(rows):
        print(f"{path}: {len(rows) - len(good)} of {len(rows)} sequences dropped")
    x, names, values = zip(*good, strict=True)
    return Data(np.stack(x), list(names), list(values) if column else None)


def is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def write_fasta(path, name, x, columns):
    """Sequences x [n, L] as >name_i key=value ..., with columns {key: [n]}."""
    records = []
    for i, letters in enumerate(decode(x)):
        notes = "".join(f" {key}={values[i]:.6g}" for key, values in columns.items())
        records.append(f">{name}_{i}{notes}\n{letters}\n")
    path.write_text("".join(records))


def shuffle_dinucleotides(x, rng):
    """x [n, L] -> a shuffle of each sequence that keeps its counts of adjacent pairs of bases.

    Uniform over such sequences: Altschul and Erickson 1985, Mol. Biol. Evol. 2, 526. Each base's
    last successor is drawn until these lead from every base to the sequence's last one.
    """
    shuffled = np.empty_like(x)
    for n, row in enumerate(x):
        followers = [row[1:][row[:-1] == base] for base in range(4)]
        starts = [base for base in range(4) if len(followers[base]) and base != row[-1]]
        while True:
            exits = {base: int(rng.choice(followers[base])) for base in starts}
            reached = {int(row[-1])}
            for _ in starts:
                reached |= {base for base in starts if exits[base] in reached}
            if len(reached) == len(starts) + 1:
                break
        queues = []
        for base in range(4):
            rest, end = list(followers[base]), [exits[base]] if base in exits else []
            for last in end:
                rest.remove(last)
            queues.append([*end, *rng.permutation(rest)])  # taken from its end
        shuffled[n, 0] = row[0]
        for i in range(1, len(row)):
            shuffled[n, i] = queues[shuffled[n, i - 1]].pop()
    return shuffled


def site_shares(counts):
    """Counts [4, m] -> probability of each base at each position [m, 4], pseudocount 0.25."""
    counts = np.asarray(counts).T + 0.25
    return counts / counts.sum(axis=1, keepdims=True)


def generate_data(num=20_000, length=200):
    """The embedded training set: a Markov background of order 3 with sites planted in it.

    Like genomes it avoids CpG, varies in GC content and has clusters of sites of few factors: a
    sequence has three matrices of the ft and the eval set, drawn with repetition, and on average 6
    sites of these, on either strand. Half of the sequences take theirs among the factors with
    positive weight in the oracles, half among those with negative weight, one in seven from the
    others. Always the same set, whatever --seed.
    """
    rng = np.random.default_rng(0)
    shapes = ((4, 4), (4, 4, 4), (4, 4, 4, 4))  # what 1, 2 and 3 bases before add
    energy = sum(0.4 / order * rng.normal(size=s) for order, s in enumerate(shapes, start=1))
    energy[:, :, 1, 2] -= 1.4  # CpG
    gc = 0.4 * rng.normal(size=(num, 1)) * np.array([-1, 1, 1, -1])  # of each sequence
    x, context = np.zeros((length, num), np.uint8), rng.integers(64, size=num)
    for i, u in enumerate(rng.random((length, num))):
        cdf = np.cumsum(np.exp(energy.reshape(64, 4)[context] + gc), axis=1)
        x[i] = np.sum(u[:, None] > cdf[:, :3] / cdf[:, 3:], axis=1)
        context = (4 * context + x[i]) % 64
    x = np.ascontiguousarray(x.T)
    sets = json.loads(REWARD.read_text())
    sites = {sign: [] for sign in (1, -1)}  # cumulative shares [m, 4] of each matrix
    for part in ("ft", "eval"):
        for counts, w in zip(sets[part]["pfm_counts"], sets[part]["w"][:-1], strict=True):
            sites[np.sign(w)].append(np.cumsum(site_shares(counts), axis=1))
    for i, number in enumerate(2 + rng.poisson(4, num)):
        own = 1 if i % 2 else -1
        kinds = np.where(rng.random(3) < 1 / 7, -own, own)
        palette = [sites[kind][rng.integers(len(sites[kind]))] for kind in kinds]
        for j in rng.integers(3, size=number):
            site = np.sum(rng.random((len(palette[j]), 1)) > palette[j][:, :3], axis=1)
            start = rng.integers(length - len(site) + 1)
            x[i, start : start + len(site)] = site if rng.random() < 0.5 else 3 - site[::-1]
    return Data(x, [str(i) for i in range(num)], None)


# ---- npz files ---------------------------------------------------------------------------------


def named_leaves(tree):
    return {jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(tree)}


def save_arrays(path, tree, kind, **meta):
    """Writes the leaves of a pytree and meta, what JSON can hold, as npz; atomically."""
    meta = json.dumps({"script": "simpo_dna", "kind": kind, **meta})
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}
    with path.with_suffix(".tmp").open("wb") as file:
        np.savez(file, **arrays, meta=np.frombuffer(meta.encode(), np.uint8))
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".tmp").replace(path)


def load_arrays(path, kind):
    """-> {name: array}, meta of a file that save_arrays wrote with that kind; else UsageError.

    Takes no more memory than the file has bytes, whatever it declares, and runs nothing.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as file:
            for entry in file.infolist():
                stored = entry.compress_type == zipfile.ZIP_STORED
                if not stored or entry.file_size > path.stat().st_size:
                    raise ValueError("compressed or damaged")
            if file.testzip():
                raise ValueError("a check sum is wrong")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        if meta["script"] != "simpo_dna" or meta["kind"] != kind:
            raise ValueError(f"found a {meta['kind']} of {meta['script']}")
        for name, array in arrays.items():
            if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
                raise ValueError(f"{name} is not finite")
        return arrays, meta
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except Exception as error:  # whatever a damaged file makes zipfile, numpy or json raise
        reason = ascii(" ".join(str(error).split()))[:120] or type(error).__name__
        raise UsageError(f"{path} is no {kind} of simpo_dna: {reason}") from None


def nest(arrays):
    """{"['a'][0]['b']": array} -> {"a": [{"b": array}]}; the names are those of `named_leaves`."""
    root = {}
    for name, array in arrays.items():
        *path, last = name.strip("[]").replace("'", "").split("][")
        node = root
        for part in path:
            node = node.setdefault(part, {})
        node[last] = array

    def lists(node):
        if not isinstance(node, dict):
            return node
        node = {key: lists(child) for key, child in node.items()}
        return [node[str(i)] for i in range(len(node))] if "0" in node else node

    return lists(root)


def fill(template, arrays, path):
    """The pytree `template` with the arrays of those names, which must have its shapes."""
    names = named_leaves(template)
    for name, leaf in names.items():
        if name not in arrays or arrays[name].shape != leaf.shape:
            raise UsageError(f"{path}: expected {name} of shape {leaf.shape}")
    if len(arrays) > len(names):
        raise UsageError(f"{path}: unexpected {ascii(min(arrays.keys() - names.keys()))}")
    leaves = [arrays[name].astype(leaf.dtype) for name, leaf in names.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)
