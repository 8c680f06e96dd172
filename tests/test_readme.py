"""Every `python SCRIPT.py ...` line of the README and the benchmarks is accepted as it is."""

import importlib
import re
import shlex
from pathlib import Path

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


def test_readme_names_only_files_that_exist():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README yet")
    for target in re.findall(r"\]\(([^)#]+)\)", readme.read_text()):
        if "://" not in target:
            assert (ROOT / Path(target)).exists(), target
