"""What two scripts share stays byte-identical, and `diff` between the trainers stays short."""

import ast
import itertools
import subprocess

import pytest
from conftest import ROOT

SCRIPTS = [*sorted(ROOT.glob("simpo_*.py")), ROOT / "drakes.py"]
OWN = {"Args", "SCRIPT, ENV_FLAGS, DECIMALS", "PACKAGES", "EPISODE", "open_env"}  # may differ


def pieces(path):
    """{name: source} of the functions, classes and constants of a script, decorators included."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        text = "\n".join(
            ast.get_source_segment(source, part, padded=True)
            for part in (*getattr(node, "decorator_list", ()), node)
        )
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = text
        elif isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Subscript):
            name = ast.unparse(node.targets[0]).strip("()")
            found[name] = text
    return found


def fields(path):
    """{name: (annotation, default, text)} of the flags, and the methods but __post_init__."""
    [args] = [x for x in ast.parse(path.read_text()).body if getattr(x, "name", "") == "Args"]
    found = {}
    for node, after in itertools.pairwise([*args.body, None]):
        if isinstance(node, ast.AnnAssign):
            parts = (node.annotation, node.value, after.value)
            found[node.target.id] = tuple(map(ast.unparse, parts))
        elif isinstance(node, ast.FunctionDef) and node.name != "__post_init__":
            found[node.name] = ast.unparse(node)
    return found


@pytest.mark.parametrize("one,other", [*itertools.combinations(SCRIPTS, 2)])
def test_shared_pieces_are_identical(one, other):
    ours, theirs = pieces(one), pieces(other)
    shared = ours.keys() & theirs.keys() - OWN
    assert not [name for name in sorted(shared) if ours[name] != theirs[name]]


def test_the_two_trainers_share_everything_but_the_environment():
    ours, theirs = (pieces(ROOT / f"simpo_{name}.py") for name in ("mujoco", "dmc"))
    assert ours.keys() - theirs.keys() == {"CutOff", "open_gym"}
    assert theirs.keys() - ours.keys() == {"TOP_SPEED", "landscape", "DMControl"}
    flags, flags_dmc = (fields(ROOT / f"simpo_{name}.py") for name in ("mujoco", "dmc"))
    assert flags.keys() - flags_dmc.keys() == {"env_id"}
    assert flags_dmc.keys() - flags.keys() == {"domain", "task", "reward"}
    common = flags.keys() & flags_dmc.keys()
    assert {name: flags[name] for name in common} == {name: flags_dmc[name] for name in common}


def test_the_diff_is_at_most_80_lines_a_side():
    command = ["diff", ROOT / "simpo_mujoco.py", ROOT / "simpo_dmc.py"]
    out = subprocess.run(command, capture_output=True, text=True).stdout
    for mark in "<>":
        assert 0 < sum(line.startswith(mark) for line in out.splitlines()) <= 80


def test_banners_are_the_same_in_the_same_order():
    banners = [
        [line for line in path.read_text().splitlines() if line.startswith("# ----")]
        for path in (ROOT / "simpo_mujoco.py", ROOT / "simpo_dmc.py")
    ]
    assert banners[0] == banners[1] and len(banners[0]) == 9
    assert all(len(banner) == 97 for banner in banners[0])


def test_the_bandit_has_the_same_banners_in_the_same_order():
    banners = [
        [line for line in (ROOT / name).read_text().splitlines() if line.startswith("# ----")]
        for name in ("simpo_mujoco.py", "simpo_bandit.py")
    ]
    assert banners[1] == [x.replace(" diffusion -----", " flow ----------") for x in banners[0]]


def test_the_bandit_shares_networks_and_weights_with_the_trainers():
    shared = pieces(ROOT / "simpo_mujoco.py").keys() & pieces(ROOT / "simpo_bandit.py").keys()
    assert {"mish", "init_mlp", "dense", "mlp", "weights", "UsageError", "Diverged"} <= shared
