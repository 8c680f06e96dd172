"""simpo_bandit.py: its files, its flags, and the claims of figures 2 and 3."""

import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import simpo_bandit as bandit
from simpo_bandit import LANDSCAPES, Args

SCRIPT = Path(__file__).resolve().parents[1] / "simpo_bandit.py"
TINY = ["--epochs", "3", "--hidden-dim", "16", "--grad-steps", "2"]
CURVES = {
    "escape": ["linear", "square", "exp", "linear_neg"],
    "broad": ["linear", "square", "exp"],
    "sharp": ["linear", "square", "exp"],
}


# ---- the script ----------------------------------------------------------------------
def start_script(cwd, *flags):
    """The script with little compiler optimisation, which is half of a tiny run."""
    env = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(cwd, *flags):
    """-> exit code, stdout, stderr."""
    with start_script(cwd, *flags) as process:
        out, err = process.communicate()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run folder of a tiny run of everything, seeds 5 and 6."""
    cwd = tmp_path_factory.mktemp("bandit")
    flags = ["--seed", "5", "--num-seeds", "2", "--run-dir", "run"]
    code, out, err = run(cwd, *TINY, *flags)
    assert code == 0, err
    assert out.startswith("run folder run\nlandscape,method,seeds,at_best")
    return cwd / "run"


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_files_of_a_run(folder):
    assert {path.name for path in folder.iterdir()} == {
        "args.json",
        "versions.json",
        "curves.csv",
        "summary.csv",
        "figure2.png",
        "figure3.png",
    }
    for name in ("figure2.png", "figure3.png"):
        picture = matplotlib.image.imread(folder / name)
        assert min(picture.shape[:2]) > 200
        assert picture[..., :3].std() > 0.05
    args = Args(**json.loads((folder / "args.json").read_text()))
    assert args == Args(
        seed=5, num_seeds=2, epochs=3, hidden_dim=16, grad_steps=2, run_dir="run"
    )
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["jax"] == jax.__version__
    assert "commit" in versions


def test_a_row_of_curves_for_each_seed_and_epoch(folder):
    expected = []
    for name, methods in CURVES.items():
        for method in methods:
            for seed in ("5", "6"):
                for epoch in ("0", "1", "2", "3"):
                    expected.append([name, method, seed, epoch])
    keys = []
    for row in read(folder / "curves.csv"):
        *key, regret = row.values()
        assert -1e-4 < float(regret) < 1.1
        keys.append(key)
    assert keys == expected


def test_summary_follows_from_curves(folder):
    curves = read(folder / "curves.csv")
    rows = read(folder / "summary.csv")
    assert [row["method"] for row in rows] == sum(CURVES.values(), [])
    regrets = np.array([float(row["regret"]) for row in curves])
    regrets = regrets.reshape(10, 2, 4)  # two seeds, three epochs and the end
    for row, regret in zip(rows, regrets, strict=True):
        last = regret[:, -1]
        average = regret.mean(axis=1)
        at_best = math.nan  # both optima are best
        if row["landscape"] == "escape":
            at_best = np.mean(last < 0.15)  # nearer to 0 than to 0.3
        expected = {
            "seeds": 2,
            "at_best": at_best,
            "final_regret": last.mean(),
            "final_se": last.std(ddof=1) / math.sqrt(2),
            "mean_regret": average.mean(),
            "mean_se": average.std(ddof=1) / math.sqrt(2),
        }
        found = {name: float(row[name]) for name in expected}
        assert found == pytest.approx(expected, abs=1e-4, nan_ok=True)
        assert 0 < float(row["final_spread"]) < 2


@pytest.mark.parametrize(
    "landscape,method,expected",
    [
        ("escape", "linear", [0.659449, 0.624649]),
        ("escape", "square", [0.669563, 0.641875]),
        ("escape", "exp", [0.670097, 0.644786]),
        ("escape", "linear_neg", [0.653558, 0.622843]),
        ("broad", "linear", [0.163659, 0.174863]),
        ("broad", "square", [0.166092, 0.175429]),
        ("broad", "exp", [0.165453, 0.175206]),
        ("sharp", "linear", [0.975669, 0.974877]),
        ("sharp", "square", [0.972282, 0.972364]),
        ("sharp", "exp", [0.973130, 0.972741]),
    ],
)
def test_the_last_regrets_are_those_recorded_at_923a669(
    folder, landscape, method, expected
):
    found = []
    for row in read(folder / "curves.csv"):
        name, weighting, _, epoch, regret = row.values()
        if [name, weighting, epoch] == [landscape, method, "3"]:
            found.append(float(regret))
    assert found == pytest.approx(expected, abs=1e-3)


def test_an_interrupted_run_keeps_its_finished_curves(tmp_path):
    """Ctrl-C once the first curve is written, while others are trained."""
    flags = [*TINY, "--figure", "3", "--num-seeds", "2", "--run-dir", "run"]
    with start_script(tmp_path, *flags) as process:
        for line in process.stdout:
            if line.startswith("broad,linear,"):
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 1
    assert err == "stopped; the run folder has the finished curves\n"
    methods = [row["method"] for row in read(tmp_path / "run/curves.csv")]
    assert methods in (["linear"] * 8, ["linear"] * 8 + ["square"] * 8)
    assert not (tmp_path / "run/summary.csv").exists()


def test_a_diverged_run_ends_with_code_3(tmp_path):
    flags = ["--policy-lr", "1e38", "--num-seeds", "2", "--run-dir", "run"]
    code, _, err = run(tmp_path, *TINY, *flags)
    assert code == 3
    assert err == "error: linear diverged; lower --policy-lr\n"
    assert not (tmp_path / "run/summary.csv").exists()


def test_a_run_folder_is_never_used_twice(tmp_path):
    args = Args(run_dir=str(tmp_path / "run"))
    bandit.create_run_dir(args)
    with pytest.raises(SystemExit, match="error: --run-dir .*run: File exists"):
        bandit.create_run_dir(args)


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    names = {"file/x": "Not a directory", "x" * 300: "File name too long"}
    for name, reason in names.items():
        args = Args(run_dir=str(tmp_path / name))
        with pytest.raises(SystemExit, match=f"error: --run-dir .*: {reason}"):
            bandit.create_run_dir(args)


# ---- flags ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name,flags",
    [
        ("--epochs", {"epochs": 0}),
        ("--num-seeds", {"num_seeds": 0}),
        ("--hidden-dim", {"hidden_dim": 0}),
        ("--grad-steps", {"grad_steps": 0}),
        ("--lam", {"lam": 0.0}),
        ("--policy-lr", {"policy_lr": 0.0}),
        ("--grad-clip", {"grad_clip": 0.0}),
        ("--neg-until", {"neg_until": 0.0}),
        ("--noise", {"noise": -1.0}),
        ("--neg-clip", {"neg_clip": 0.1}),
        ("--neg-clip", {"neg_clip": -0.1, "weighting": "exp"}),
        ("--eps-kl", {"eps_kl": 0.0}),
        ("--eps-kl", {"eps_kl": 5.0}),  # log 64 = 4.16
        ("--num-samples", {"num_samples": 1}),
        ("--seed", {"seed": -1}),
        ("--seed", {"seed": 2**32 - 1, "num_seeds": 2}),
    ],
)
def test_bad_flags_are_named(name, flags):
    with pytest.raises(ValueError, match=name):
        Args(**flags)


def test_the_limits_of_flags_are_valid():
    Args(neg_until=math.inf, grad_clip=math.inf, eps_kl=4.1, seed=2**32 - 20)


THREE = [("linear", 0), ("square", 0), ("exp", 0)]


@pytest.mark.parametrize(
    "figure,flags,curves",
    [
        ("2", {}, [*THREE, ("linear", -0.6)]),
        ("3", {}, THREE),
        ("3", {"neg_clip": -0.1}, [*THREE, ("linear", -0.1)]),
        ("2", {"neg_clip": 0.0}, THREE),
        ("2", {"weighting": "linear"}, [("linear", 0)]),
        ("3", {"weighting": "square", "neg_clip": -0.1}, [("square", -0.1)]),
    ],
)
def test_the_curves_of_a_figure(figure, flags, curves):
    """A clip that is asked for is never dropped without a word."""
    assert bandit.figure_curves(Args(**flags), figure) == curves


# ---- rewards -------------------------------------------------------------------------
ONE_WIDTH_OFF = math.exp(-0.5)  # share of a bump's height


@pytest.mark.parametrize(
    "name,a,reward",
    [
        ("escape", -1.4, 0.7 * ONE_WIDTH_OFF),
        ("escape", 0, 0.7 * math.exp(-3.125)),
        ("escape", 1.5, 1),
        ("escape", 1.9, ONE_WIDTH_OFF),
        ("broad", 0, 2 * math.exp(-1 / 0.98)),
        ("broad", 1, 1 + math.exp(-4 / 0.98)),
        ("sharp", -1, 1),
        ("sharp", 0, 0),
        ("sharp", 1.03, ONE_WIDTH_OFF),
    ],
)
def test_rewards_have_the_bumps_of_the_page(name, a, reward):
    assert float(LANDSCAPES[name].reward(a)) == pytest.approx(reward, abs=1e-3)


@pytest.mark.parametrize("name", LANDSCAPES)
def test_the_grid_is_fine_enough_for_the_best_reward(name):
    landscape = LANDSCAPES[name]
    everywhere = landscape.reward(np.linspace(-2, 2, 300_001, dtype=np.float32))
    best = float(landscape.reward(bandit.GRID).max())
    assert best == pytest.approx(float(everywhere.max()), abs=1e-4)


# ---- training ------------------------------------------------------------------------
LINEAR = Args(num_seeds=8, weighting="linear", neg_clip=0.0)
NEG = Args(num_seeds=8, weighting="linear", neg_clip=-0.6)
EXP = Args(num_seeds=8, weighting="exp", neg_clip=0.0)


@pytest.fixture(scope="module")
def start():
    """keys and {landscape: initial policies} of eight seeds."""
    seeds = np.arange(1, 9, dtype=np.uint32)
    keys = jax.vmap(jax.random.key)(seeds)
    states = {}
    for name in ("escape", "sharp"):
        states[name] = bandit.init_states(Args(), LANDSCAPES[name], keys)
    return keys, states


def test_policies_start_as_the_initial_gaussian(start):
    keys, states = start
    for name, state in states.items():
        landscape = LANDSCAPES[name]
        z = np.random.default_rng(0).normal(size=9999)
        expected = landscape.start_mean + landscape.start_std * z
        expected = np.clip(expected, -2, 2)
        samples = np.asarray(bandit.final_samples(state, keys))
        assert samples.mean() == pytest.approx(expected.mean(), abs=0.1)
        assert samples.std() == pytest.approx(expected.std(), abs=0.1)


def one_epoch(start, args, epoch):
    """Parameters [.] after epoch number `epoch` of 200, and the new lam [S]."""
    keys, states = start
    escape = LANDSCAPES["escape"]
    new, _ = bandit.train_epoch(args, escape, states["escape"], keys, epoch, 200)
    theta, _ = ravel_pytree(new.theta)
    return theta, np.exp(new.log_lam)


@pytest.mark.parametrize("epoch,same", [(80, False), (100, True)])
def test_the_clip_falls_to_0(start, epoch, same):
    """From half of the epochs on, Lin. Neg. is Linear; before, it is not."""
    linear, _ = one_epoch(start, LINEAR, epoch)
    neg, _ = one_epoch(start, NEG, epoch)
    assert np.allclose(linear, neg, atol=1e-4) == same


@pytest.mark.parametrize("epoch,same", [(0, False), (200, True)])
def test_the_noise_falls_to_0(start, epoch, same):
    theta, _ = one_epoch(start, LINEAR, epoch)
    quiet, _ = one_epoch(start, dataclasses.replace(LINEAR, noise=0.0), epoch)
    assert np.allclose(theta, quiet, atol=1e-4) == same


def test_lam_is_constant_or_follows_its_dual(start):
    _, lam = one_epoch(start, LINEAR, 0)
    _, dual = one_epoch(start, dataclasses.replace(LINEAR, eps_kl=3.0), 0)
    assert lam == pytest.approx(0.25)
    assert np.median(dual) < 0.24  # greedier: KL is below 3 at first, for most seeds


def test_gradients_are_clipped_where_asked(start):
    """Adam's second moment is bounded by the norm of the gradients it was given."""
    keys, states = start
    largest = {}
    for clip in (1e-3, math.inf):
        args = dataclasses.replace(LINEAR, grad_clip=clip, grad_steps=1)
        escape = LANDSCAPES["escape"]
        state, _ = bandit.train_epoch(args, escape, states["escape"], keys, 0, 200)
        adam = state.opt[1][0]
        squares = optax.tree_utils.tree_sum(adam.nu) / (1 - 0.999)
        largest[clip] = math.sqrt(squares / len(keys))  # root mean square over seeds
    assert largest[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert largest[math.inf] > 0.1


def test_figure_2_negative_weights_leave_the_lower_optimum(start):
    """Share of seeds at the best optimum; over seven sets of seeds: 1 against 0.12 to
    0.38."""
    keys, states = start
    escape = LANDSCAPES["escape"]
    shares = []
    for args in (LINEAR, NEG):
        regret, final = bandit.train_curve(args, escape, states["escape"], keys, 200)
        assert regret.shape == (201, 8)
        assert regret.min() > -1e-4
        shares.append(bandit.summarise(escape, regret, final)[0])
    assert shares[1] >= shares[0] + 0.4


def test_figure_3_linear_is_best_where_bumps_are_sharp(start):
    """Mean regret; over nine sets of seeds at least 0.06 below, standard error 0.01."""
    keys, states = start
    averages = []
    for args in (LINEAR, EXP):
        sharp = LANDSCAPES["sharp"]
        regret, _ = bandit.train_curve(args, sharp, states["sharp"], keys, 100)
        averages.append(regret.mean())
    assert averages[0] < averages[1] - 0.02
    assert averages[0] < 0.6  # 0.97 at the start
