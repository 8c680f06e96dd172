"""README's table of returns says what table2.csv and published.csv do."""

from pathlib import Path

from benchmark.results import (
    OLDER,
    PUBLISHED,
    group_runs,
    last_values,
    read_runs,
    text_of,
)

ROOT = Path(__file__).resolve().parents[2]


def readme_rows():
    """-> [(label, {task: cell})] of the tables whose columns are tasks."""
    found = []
    tasks = None
    for line in (ROOT / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if "HalfCheetah" in cells:
            tasks = [f"{cell}-v4" for cell in cells[1:]]
        elif not cells:
            tasks = None
        elif tasks and not cells[1].startswith("---"):
            found.append((cells[0], dict(zip(tasks, cells[1:], strict=True))))
    return found


def published_text(mean, std):
    return f"{mean:.0f}" if std is None else f"{mean:.0f} +- {std:.0f}"


def test_our_rows_are_the_last_evaluations():
    """A star marks a run of an older trainer."""
    curves = group_runs(read_runs([ROOT / "benchmark/mujoco/table2.csv"]))
    rows = {label.removeprefix("ours, "): cells for label, cells in readme_rows()}
    for (task, name), runs in curves.items():
        step, values = last_values(runs)
        text = text_of(values) + ("*" if name.endswith(OLDER) else "")
        assert rows[name.removesuffix(OLDER)][task] == text, (task, name)
        assert step == 1_000_000
    ours = [cells for label, cells in readme_rows() if label.startswith("ours")]
    assert sum(cell != "" for cells in ours for cell in cells.values()) == len(curves)


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
