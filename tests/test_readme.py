"""Every `python SCRIPT.py ...` line of the README and the benchmarks is accepted as it is."""

import importlib
import re
import shlex

import pytest
import tyro
from conftest import ROOT

SOURCES = [ROOT / "README.md", *sorted((ROOT / "benchmark").glob("*")), *sorted(ROOT.glob("*.py"))]


def commands():
    """(file, script, arguments) of each line `python SCRIPT.py ...` for a script of the root."""
    for path in SOURCES:
        if path.suffix not in (".md", ".sh", ".py"):
            continue
        text = path.read_text().replace("\\\n", " ")
        for match in re.finditer(r"python3? (\w+)\.py\b([^\n`|]*)", text):
            if (ROOT / f"{match[1]}.py").exists():
                yield path.name, match[1], match[2].split(" #")[0].split("&&")[0].strip()


@pytest.mark.parametrize("file,script,line", sorted(set(commands())) or [("", None, "")])
def test_command_parses(file, script, line):
    module = script and importlib.import_module(script)
    if not hasattr(module, "Args"):
        pytest.skip("not a script with Args, or no README yet")
    tokens = shlex.split(line)
    fields = module.Args.__dataclass_fields__.values()
    flags = {"--" + field.name.replace("_", "-") for field in fields}
    flags |= {"--no-" + field.name.replace("_", "-") for field in fields if field.type is bool}
    assert {token for token in tokens if token.startswith("--")} <= flags | {"--help"}
    if "--help" in tokens or any(re.search(r"[${}<>]|\.\.\.", token) for token in tokens):
        return  # placeholders stand for values
    tyro.cli(module.Args, args=tokens)


def anchors(path):
    """Of the headings of a Markdown file, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "benchmark/README.md", "data/README.md"])
def test_links_lead_to_files_and_headings_that_exist(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target
