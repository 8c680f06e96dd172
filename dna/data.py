"""Sequences of simpo_dna.py: readers of CSV and FASTA, and the generated training set.

Legend: n sequences, L bases; x [n, L] uint8 holds 0..3 = A C G T.
"""

import csv
import gzip
import hashlib
import io
import json
import math
import re
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

BASES = "ACGT"
REWARD = Path(__file__).with_name("motif_reward.json")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


# ---- sequences -----------------------------------------------------------------------
class Data(NamedTuple):
    x: np.ndarray  # [n, L]
    names: list
    values: list | None = None  # texts of one column of the file
    sha256: str | None = None  # of the file


class Record(NamedTuple):
    line: int  # of the file
    name: str
    letters: str
    value: str | None  # text of the column that is asked for


def encode(letters):
    """Letters of any case -> uint8 [L], 0..3 = A C G T, 255 for anything else."""
    table = np.full(256, 255, np.uint8)
    for i, base in enumerate(BASES):
        table[[ord(base), ord(base.lower())]] = i
    return table[np.frombuffer(letters.encode("latin-1", "replace"), np.uint8)]


def decode(x):
    """x [n, L] -> list of n strings."""
    return ["".join(BASES[i] for i in row) for row in np.asarray(x)]


def read_text(path):
    """-> the text of a file, perhaps gzipped, and the file's checksum; one read."""
    try:
        content = Path(path).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig"), sha256
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"error: {path}: {reason}") from None


def read_fasta(text):
    records = []
    for line, row in enumerate(text.splitlines(), start=1):
        if row.startswith(">"):
            name = (row[1:].split() or [""])[0]
            records.append(Record(line, name, "", None))
        elif row.strip():
            letters = records[-1].letters + "".join(row.split())
            records[-1] = records[-1]._replace(letters=letters)
    return records


def csv_rows(text, path):
    """Yields (line, cells) of CSV, TSV or semicolons, blank rows left out.

    Strict: every row has as many cells as the first one and stands on one line, and
    quotes close where the cell ends.
    """
    first = text.strip().partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    width = None
    last = 0
    try:
        for row in reader:
            line = reader.line_num
            if line > last + 1:
                rows = f"lines {last + 1} to {line}"
                raise SystemExit(f"error: {path}: a quoted cell spans {rows}")
            last = line
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            width = width or len(cells)
            if len(cells) != width:
                found = f"line {line} has {len(cells)} cells, the header {width}"
                raise SystemExit(f"error: {path}: {found}")
            yield line, cells
    except csv.Error as error:
        raise SystemExit(f"error: {path}: line {last + 1}: {error}") from None


def find_column(header, path, names):
    """Index of the column with one of the names, in any case; None without one."""
    found = [i for i, cell in enumerate(header) if cell.lower() in names]
    if len(found) > 1:
        cells = " and ".join(header[i] for i in found)
        raise SystemExit(f"error: {path} has the columns {cells}, expected one of them")
    return found[0] if found else None


def read_csv(text, path, column=None, seq_column=None):
    """[Record] of a table with a column of sequences, and perhaps name or id."""
    rows = csv_rows(text, path)
    _, header = next(rows, (0, [""]))
    for name, count in Counter(header).items():
        if name and count > 1:
            raise SystemExit(f"error: {path} has {count} columns named {name}")
    names = [seq_column.lower()] if seq_column else ["seq", "sequence"]
    seq = find_column(header, path, names)
    if seq is None:
        expected = f"expected FASTA, or CSV with a column {' or '.join(names)}"
        found = f"found the first line {','.join(header)[:60]!r}"
        raise SystemExit(f"error: {path}: {expected}, {found}")
    if column and column not in header:
        columns = ", ".join(header)
        raise SystemExit(f"error: {path} has no column {column}, but {columns}")
    label = find_column(header, path, ("name", "id"))

    records = []
    for line, cells in rows:
        name = str(line) if label is None else cells[label]
        value = cells[header.index(column)] if column else None
        records.append(Record(line, name, cells[seq], value))
    return records


def fault_of(record, length, numbers):
    """What is wrong with a record, or None."""
    row = encode(record.letters)
    if not record.letters:
        return "has no sequence"
    if (row == 255).any():
        letter = record.letters[np.argmax(row == 255)]
        return f"has the letter {ascii(letter)}, expected A, C, G and T alone"
    if len(row) != length:
        return f"has {len(row)} bases, most have {length}"
    if record.value is None:
        return None
    if not record.value:
        return "has an empty cell in the column that is read"
    if numbers and not NUMBER.fullmatch(record.value):
        return f"has {ascii(record.value)}, expected a number"
    if numbers and not math.isfinite(float(record.value)):
        return f"has {ascii(record.value)}, expected a finite number"
    return None


def read_data(
    path,
    column=None,
    seq_column=None,
    drop_bad_rows=False,
    numbers=True,
    training=True,
):
    """Sequences of a file, CSV or FASTA, perhaps gzipped -> Data.

    The first bad row ends the program, unless such rows are dropped: empty, other
    letters than ACGT in any case, another length than most, and in `column` nothing or,
    with numbers, no number. For training also repetitions are bad, and 64 rows must be
    left. What is wrong with the table as a whole is never dropped.
    """
    text, sha256 = read_text(path)
    if not text.lstrip().startswith(">"):
        records = read_csv(text, path, column, seq_column)
    elif column:
        raise SystemExit(f"error: {path} is FASTA and has no column {column}")
    else:
        records = read_fasta(text)

    lengths = Counter(len(record.letters) for record in records if record.letters)
    [(length, _)] = lengths.most_common(1) or [(0, 0)]
    first = {}  # line of each sequence
    good = []
    for record in records:
        fault = fault_of(record, length, numbers)
        letters = record.letters.upper()
        if fault is None and training and letters in first:
            fault = f"repeats the sequence of line {first[letters]}"
        if fault is None:
            first[letters] = record.line
            good.append(record)
        elif not drop_bad_rows:
            reason = f"line {record.line} {fault}; --drop-bad-rows skips it"
            raise SystemExit(f"error: {path}: {reason}")

    if len(good) < (64 if training else 1):
        least = "at least 64" if training else "one"
        found = f"{len(good)} usable sequences, expected {least}"
        raise SystemExit(f"error: {path} has {found}")
    if len(good) < len(records):
        dropped = f"{len(records) - len(good)} of {len(records)} sequences dropped"
        print(f"{path}: {dropped}", file=sys.stderr)
    x = np.stack([encode(record.letters) for record in good])
    names = [record.name for record in good]
    values = [record.value for record in good] if column else None
    return Data(x, names, values, sha256)


def write_fasta(path, name, x, columns):
    """Sequences x [n, L] as >name_i key=value ..., with columns {key: [n]}."""
    with path.open("w") as file:
        for i, letters in enumerate(decode(x)):
            file.write(f">{name}_{i}")
            for key, values in columns.items():
                file.write(f" {key}={values[i]:.6g}")
            file.write(f"\n{letters}\n")


# ---- shuffles and the generated set --------------------------------------------------
def shuffle_dinucleotides(x, rng):
    """x [n, L] -> a shuffle of each row that keeps its counts of pairs of neighbours.

    Uniform over such sequences: Altschul and Erickson 1985, Mol. Biol. Evol. 2, 526.
    The last successor of each base is drawn until these lead from every base to the end
    of the sequence.
    """
    shuffled = np.empty_like(x)
    for n, row in enumerate(x):
        followers = [row[1:][row[:-1] == base] for base in range(4)]
        last = int(row[-1])
        starts = [i for i in range(4) if i != last and len(followers[i])]
        while True:
            exits = {base: int(rng.choice(followers[base])) for base in starts}
            reached = {last}
            for _ in starts:
                reached |= {base for base in starts if exits[base] in reached}
            if len(reached) == len(starts) + 1:
                break

        queues = []  # the successors of each base, taken from the end
        for base in range(4):
            rest = list(followers[base])
            end = []
            if base in exits:
                end = [exits[base]]
                rest.remove(exits[base])
            queues.append([*end, *rng.permutation(rest)])
        shuffled[n, 0] = row[0]
        for i in range(1, len(row)):
            shuffled[n, i] = queues[shuffled[n, i - 1]].pop()
    return shuffled


def site_shares(counts):
    """Counts [4, m] -> chance of each base by position [m, 4], pseudocount 0.25."""
    counts = np.asarray(counts).T + 0.25
    return counts / counts.sum(axis=1, keepdims=True)


def draw_background(rng, num, length):
    """Markov sequences of order 3 [num, length] that avoid CpG and vary in G + C."""
    energy = np.zeros((4, 4, 4, 4))  # of a base after the three before it
    for order in (1, 2, 3):
        shape = (4,) * (order + 1)
        energy += 0.4 / order * rng.normal(size=shape)
    energy[:, :, 1, 2] -= 1.4  # CpG
    energy = energy.reshape(64, 4)
    gc = 0.4 * rng.normal(size=(num, 1))  # of each sequence
    gc = gc * np.array([-1, 1, 1, -1])

    x = np.zeros((length, num), np.uint8)
    context = rng.integers(64, size=num)
    for i, u in enumerate(rng.random((length, num))):
        cdf = np.cumsum(np.exp(energy[context] + gc), axis=1)
        cdf = cdf[:, :3] / cdf[:, 3:]
        x[i] = np.sum(u[:, None] > cdf, axis=1)
        context = (4 * context + x[i]) % 64
    return np.ascontiguousarray(x.T)


def generate_data(num=20_000, length=200):
    """The embedded training set: a Markov background with sites planted in it.

    Like genomes it avoids CpG, varies in GC content and has clusters of sites of few
    factors: a sequence has three matrices of the ft and the eval set, drawn with
    repetition, and on average 6 sites of these, on either strand. Half of the sequences
    take theirs among the factors with positive weight in the oracles, half among those
    with negative weight, one in seven from the others. Always the same set, whatever
    --seed.
    """
    rng = np.random.default_rng(0)
    x = draw_background(rng, num, length)
    sets = json.loads(REWARD.read_text())
    sites = {1: [], -1: []}  # cumulative shares [m, 4] of each matrix
    for part in ("ft", "eval"):
        for counts, w in zip(
            sets[part]["pfm_counts"], sets[part]["w"][:-1], strict=True
        ):
            cumulative = np.cumsum(site_shares(counts), axis=1)
            sites[np.sign(w)].append(cumulative)

    for i, number in enumerate(2 + rng.poisson(4, num)):
        own = 1 if i % 2 else -1
        kinds = np.where(rng.random(3) < 1 / 7, -own, own)
        palette = [sites[kind][rng.integers(len(sites[kind]))] for kind in kinds]
        for j in rng.integers(3, size=number):
            u = rng.random((len(palette[j]), 1))
            site = np.sum(u > palette[j][:, :3], axis=1)
            start = rng.integers(length - len(site) + 1)
            if rng.random() >= 0.5:
                site = 3 - site[::-1]
            x[i, start : start + len(site)] = site
    return Data(x, [str(i) for i in range(num)])
