"""What two scripts share stays byte-identical, and the trainers stay as short as they are."""

import ast
import itertools

import pytest
from conftest import ROOT

LIMITS = {"simpo_mujoco.py": 650, "simpo_dmc.py": 720}
SCRIPTS = sorted(ROOT.glob("simpo_*.py"))
TRAINERS = [ROOT / name for name in LIMITS]
OWN = {"Args", "make_env", "create_run_dir", "main"}  # what may differ between the trainers,
OTHERS = OWN | {"make_run_dir", "draw_curves", "init_state", "parse_args", "train"}  # and elsewhere


def pieces(path):
    """{name: source} of the functions, classes and constants of a script, decorators included."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts = *node.decorator_list, node
            found[node.name] = [ast.get_source_segment(source, x, padded=True) for x in parts]
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.unparse(node)
    return found


@pytest.mark.parametrize("one,other", [*itertools.combinations(SCRIPTS, 2)])
def test_functions_of_one_name_are_identical(one, other):
    ours, theirs = pieces(one), pieces(other)
    own = OWN if {one, other} == set(TRAINERS) else OTHERS
    assert not [x for x in sorted(ours.keys() & theirs.keys() - own) if ours[x] != theirs[x]]


def test_the_trainers_share_all_but_the_environment():
    ours, theirs = map(pieces, TRAINERS)
    assert not ours.keys() - theirs.keys()
    assert theirs.keys() - ours.keys() == {"TOP_SPEED", "landscape", "DMControl"}


@pytest.mark.parametrize("name", LIMITS)
def test_trainers_are_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= LIMITS[name]
