"""Every `python SCRIPT.py ...` line of the pages is accepted as it is, and links lead somewhere."""

import importlib
import re
import shlex

import pytest
import tyro
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "benchmark").rglob("*.md"))
SOURCES = [*PAGES, *sorted(ROOT.glob("*.py")), *sorted((ROOT / "benchmark").rglob("*.sh"))]


def commands():
    """(file, script, arguments) of each line `python SCRIPT.py ...` for a script of the root."""
    for path in SOURCES:
        text = path.read_text().replace("\\\n", " ")
        for match in re.finditer(r"python3? (\w+)\.py\b([^\n`|]*)", text):
            if (ROOT / f"{match[1]}.py").exists():
                line = match[2].split(" #")[0].split("&&")[0].strip()
                yield str(path.relative_to(ROOT)), match[1], line


@pytest.mark.parametrize("file,script,line", sorted(set(commands())))
def test_command_parses(file, script, line, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").touch()  # --track asks whether there is one
    monkeypatch.syspath_prepend(tmp_path)
    args, tokens = importlib.import_module(script).Args, shlex.split(line)
    fields = args.__dataclass_fields__.values()
    flags = {"--" + field.name.replace("_", "-") for field in fields}
    flags |= {"--no-" + field.name.replace("_", "-") for field in fields if field.type is bool}
    assert {token for token in tokens if token.startswith("--")} <= flags | {"--help"}
    if "--help" in tokens or any(re.search(r"[${}<>]|\.\.\.", token) for token in tokens):
        return  # placeholders stand for values
    tyro.cli(args, args=tokens)


def anchors(path):
    """Of the headings of a Markdown file, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target
