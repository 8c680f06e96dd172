"""What scripts share is byte-identical, and their difference stays small."""

import ast
import functools
import itertools
import subprocess

import pytest
from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("simpo_*.py"))
TRAINERS = [ROOT / "simpo_mujoco.py", ROOT / "simpo_dmc.py"]
OWN = {"Args", "main", "make_envs"}  # may differ between any two scripts
# may differ between a trainer and another script
OWN_ELSEWHERE = OWN | {"State", "init_state"}


@functools.cache
def pieces(path):
    """{name: source} of the functions and classes of a script, decorators included."""
    lines = path.read_text().splitlines()
    found = {}
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([x.lineno for x in node.decorator_list], default=node.lineno)
            found[node.name] = lines[first - 1 : node.end_lineno]
    return found


@pytest.mark.parametrize("one,other", [*itertools.combinations(SCRIPTS, 2)])
def test_what_has_one_name_is_identical(one, other):
    ours = pieces(one)
    theirs = pieces(other)
    own = OWN if {one, other} == set(TRAINERS) else OWN_ELSEWHERE
    differing = [x for x in ours.keys() & theirs.keys() if ours[x] != theirs[x]]
    assert sorted(set(differing) - own) == []


def test_the_trainers_share_all_but_the_environment():
    mujoco, dmc = map(pieces, TRAINERS)
    assert mujoco.keys() - dmc.keys() == set()
    assert dmc.keys() - mujoco.keys() == {"landscape", "DMControl"}


def test_the_difference_of_the_trainers_is_short():
    """As the README's reading guide prints it."""
    command = ["diff", *map(str, TRAINERS)]
    out = subprocess.run(command, capture_output=True, text=True).stdout
    lines = out.splitlines()
    removed = [line for line in lines if line.startswith("<")]
    added = [line for line in lines if line.startswith(">")]
    assert 0 < len(removed) <= 80
    assert 0 < len(added) <= 80
