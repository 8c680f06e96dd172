"""Every command of the pages is accepted as it is, and links lead somewhere."""

import importlib
import importlib.util
import re
import shlex

import pytest
import tyro
from conftest import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmark").rglob("*.md")),
]
SOURCES = [*PAGES, *sorted(ROOT.glob("*.py"))]


def commands(pattern):
    """(file, program, arguments) of each line of the pages that starts such a one."""
    found = set()
    for path in SOURCES:
        text = path.read_text().replace("\\\n", " ")
        for program, line in re.findall(pattern + r"\b([^\n`|]*)", text):
            line = line.split(" #")[0].split("&&")[0].strip()
            found.add((str(path.relative_to(ROOT)), program, line))
    return sorted(found)


def scripts():
    """Those of the root, which have Args."""
    rows = commands(r"python3? (\w+)\.py")
    return [row for row in rows if (ROOT / f"{row[1]}.py").exists()]


@pytest.mark.parametrize("file,script,line", scripts())
def test_command_parses(file, script, line):
    args = importlib.import_module(script).Args
    tokens = shlex.split(line)
    flags = {"--help"}
    for field in args.__dataclass_fields__.values():
        flag = field.name.replace("_", "-")
        flags.add(f"--{flag}")
        if field.type is bool:
            flags.add(f"--no-{flag}")
    assert {token for token in tokens if token.startswith("--")} <= flags
    placeholder = any(re.search(r"[${}<>]|\.\.\.", token) for token in tokens)
    if "--help" not in tokens and not placeholder:
        tyro.cli(args, args=tokens)


@pytest.mark.parametrize("file,module,line", commands(r"python3? -m ([\w.]+)"))
def test_module_exists(file, module, line):
    assert importlib.util.find_spec(module), f"{file}: {module}"


def anchors(path):
    """Of the headings of a Markdown file, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    found = set()
    for heading in headings:
        words = re.sub(r"[^\w -]", "", heading.lower())
        found.add(words.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target
