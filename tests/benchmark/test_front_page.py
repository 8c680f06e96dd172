"""The numbers of README's tables and of benchmark/mujoco/LOG.md are those of CSVs."""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean, median

from benchmark.results import (
    OLDER,
    PUBLISHED,
    group_runs,
    last_values,
    read_runs,
    text_of,
)

ROOT = Path(__file__).resolve().parents[2]
MUJOCO = ROOT / "benchmark" / "mujoco"
LOG = MUJOCO / "LOG.md"
DNA_COLUMNS = {
    "Linear": "linear",
    "Lin. Neg.": "linear_neg1",
    "Exp": "exp",
    "Square": "square",
    "Sqr. Neg.": "square_neg1",
    "best of 40": "best-of-40",
    "SMC": "smc",
}
DNA_ROWS = {"held-out score": "eval", "share of different sequences": "unique"}


def tables(path):
    """Of a Markdown file -> [(header, rows)], lists of cells."""
    found = []
    table = []
    for line in [*path.read_text().splitlines(), ""]:
        if line.startswith("|"):
            cells = line.split("|")[1:-1]
            table.append([cell.strip() for cell in cells])
        elif table:
            found.append((table[0], table[2:]))  # table[1] is the rule
            table = []
    return found


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def readme_rows():
    """-> [(label, {task: cell})] of the table of returns."""
    found = []
    for header, rows in tables(ROOT / "README.md"):
        if "HalfCheetah" in header:
            tasks = [f"{cell}-v4" for cell in header[1:]]
            for label, *cells in rows:
                found.append((label, dict(zip(tasks, cells, strict=True))))
    return found


def published_text(mean, std):
    return f"{mean:.0f}" if std is None else f"{mean:.0f} +- {std:.0f}"


def test_our_rows_are_the_last_evaluations():
    """A star marks a run of an older trainer."""
    curves = group_runs(read_runs([MUJOCO / "table2.csv"]))
    rows = {label.removeprefix("ours, "): cells for label, cells in readme_rows()}
    for (task, name), runs in curves.items():
        step, values = last_values(runs)
        text = text_of(values) + ("*" if name.endswith(OLDER) else "")
        assert rows[name.removesuffix(OLDER)][task] == text, (task, name)
        assert step == 1_000_000
    count = 0
    for label, cells in readme_rows():
        if label.startswith("ours"):
            count += sum(cell != "" for cell in cells.values())
    assert count == len(curves)


def test_the_others_rows_are_the_published_ones():
    count = 0
    for label, cells in readme_rows():
        parts = label.split(", ")
        for (source, method), values in PUBLISHED.items():
            if {source, method} in ({*parts}, {*parts, "SimbaV2's page"}):
                count += 1
                for task, cell in cells.items():
                    expected = published_text(*values[task]) if task in values else ""
                    assert cell == expected, (label, task)
    ours = [label for label, _ in readme_rows() if label.startswith("ours")]
    assert count == len(readme_rows()) - len(ours) > 0


def test_the_dna_rows_are_medians_over_seeds():
    scores = defaultdict(list)
    for row in read_csv(ROOT / "benchmark" / "dna" / "table.csv"):
        for quantity in DNA_ROWS.values():
            scores[quantity, row["method"]].append(float(row[quantity]))
    count = 0
    for header, rows in tables(ROOT / "README.md"):
        if "SMC" in header:
            for label, *cells in rows:
                for column, cell in zip(header[1:], cells, strict=True):
                    values = scores[DNA_ROWS[label], DNA_COLUMNS[column]]
                    assert len(values) == 3
                    assert cell == f"{median(values):.2f}", (label, column)
                    count += 1
    assert count == len(DNA_ROWS) * len(DNA_COLUMNS)


def steps_of(cell):
    """200k and 1M as numbers."""
    unit = {"k": 1_000, "M": 1_000_000}[cell[-1]]
    return int(cell[:-1]) * unit


def test_the_logs_experiments_are_those_of_early():
    """An empty cell is an evaluation that early.csv does not have."""
    expected = {}
    for row in read_csv(MUJOCO / "early.csv"):
        key = (row["task"], row["variant"], row["commit"], int(row["step"]))
        expected[key] = f"{float(row['mean_return']):.0f}"
    count = 0
    for header, rows in tables(LOG):
        task, *columns, last = header
        if last == "commit" and task in ("HalfCheetah", "Hopper", "Walker2d"):
            for variant, *cells, commit in rows:
                for column, cell in zip(columns, cells, strict=True):
                    key = (f"{task}-v4", variant, commit, steps_of(column))
                    assert cell == expected.get(key, ""), key
                    count += cell != ""
    assert count > 100


def test_the_logs_course_of_table_2_is_that_of_its_evaluations():
    evaluations = defaultdict(list)
    for row in read_csv(MUJOCO / "table2.csv"):
        key = (row["task"], row["method"], int(row["step"]))
        evaluations[key].append((float(row["return"]), int(row["length"])))
    (table,) = [rows for header, rows in tables(LOG) if header[2:4] == ["500k", "1M"]]
    assert len(table) == 12
    for task, name, *cells, _, _ in table:
        method = {"Linear": "linear", "Lin. Neg.": "linear_neg"}[name]

        def at(step, key=(f"{task}-v4", method)):
            return mean(value for value, _ in evaluations[*key, step])

        last_ten = range(775_000, 1_000_001, 25_000)
        returns = [at(step) for step in last_ten]
        lengths = []
        for step in last_ten:
            episodes = evaluations[f"{task}-v4", method, step]
            lengths += [length for _, length in episodes]
        short = sum(length < 1_000 for length in lengths)
        numbers = [at(500_000), at(1_000_000), min(returns), max(returns)]
        expected = [f"{x:.0f}" for x in numbers]
        assert cells == [*expected, f"{short} of {len(lengths)}"], (task, name)


def test_the_logs_readings_are_those_of_the_study():
    """The run of Table 2 is in that table's evaluations."""
    expected = {}
    for row in read_csv(MUJOCO / "study.csv"):
        key = (row["task"], row["setting"], row["reading"], int(row["step"]))
        expected[key] = f"{float(row['return']):.0f}"
    table2 = defaultdict(list)
    for row in read_csv(MUJOCO / "table2.csv"):
        if row["method"] == "linear_neg":
            table2[row["task"], int(row["step"])].append(float(row["return"]))
    count = 0
    for header, rows in tables(LOG):
        if header[:3] != ["task", "setting", "reading"]:
            continue
        for task, setting, reading, *cells in rows:
            for column, cell in zip(header[3:], cells, strict=True):
                step = steps_of(column)
                if setting == "run of Table 2":
                    text = f"{mean(table2[f'{task}-v4', step]):.0f}"
                else:
                    text = expected.get((f"{task}-v4", setting, reading, step), "")
                assert cell == text, (task, setting, reading, column)
                count += cell != ""
    assert count > 80
