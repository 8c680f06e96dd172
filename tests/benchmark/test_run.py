"""benchmark/run.py: what it runs and refuses, and, where Ray is installed, sweeps whose
worker and driver are killed."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmark import run
from benchmark.experiments import EXPERIMENTS

ROOT = Path(__file__).resolve().parents[2]
TINY = """
    --num-samples 4 --sampling-steps 2 --hidden-dim 8 --batch-size 16 --eval-episodes 2
    --num-envs 2 --buffer-size 5000 --learning-starts 200 --eval-every 500
""".split()


def plan(experiment, *extra, **options):
    return run.plan(run.Args(experiment, **options), [*extra])


def flag(planned, name):
    return planned.flags[planned.flags.index(name) + 1]


def command(*flags):
    """-> process of `python -m benchmark.run`."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmark.run", *map(str, flags)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    """-> exit code, stdout, stderr."""
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


# ---- what is run ---------------------------------------------------------------------
@pytest.mark.parametrize(
    "experiment, count",
    [("table2", 30), ("figure5", 12), ("figure6", 6), ("bandit", 1), ("table3", 13)],
)
def test_the_scripts_parsers_take_every_run(experiment, count):
    runs = plan(experiment)
    assert len(runs) == count
    assert len({planned.folder for planned in runs}) == count
    assert {planned.args["seed"] for planned in runs} == {1}


def test_the_runs_of_a_table_are_its_tasks_and_methods():
    runs = plan("table2", tasks=("Hopper-v4",), methods=("linear_neg",), seeds=(3,))
    assert runs[0].folder == ROOT / "runs/table2/Hopper-v4__linear_neg__3"
    assert runs[0].args["env_id"] == "Hopper-v4"
    assert runs[0].args["weighting"] == "linear"
    assert runs[0].args["neg_clip"] == -0.05
    assert runs[0].args["total_timesteps"] == 1_000_000


def test_figure5_has_its_rewards_and_a_scale_that_exp_learns_with():
    scales = {}
    for planned in plan("figure5", methods=("linear",)):
        assert planned.args["domain"] == "cheetah"
        assert planned.args["task"] == "run"
        assert planned.args["total_timesteps"] == 300_000
        scales[planned.args["reward"]] = planned.args["reward_scale"]
    assert scales == {"sqrt": 0.2, "linear": 0.2, "square": 0.2, "exp": 20}


def test_figure6_has_shares_of_log_8():
    runs = plan("figure6", tasks=("Walker2d-v4",))
    bounds = [planned.args["eps_kl"] for planned in runs]
    assert bounds == pytest.approx([1.0 * 0.6, 1.5 * 0.6, 2.0 * 0.6])
    assert {planned.args["num_samples"] for planned in runs} == {8}


def test_any_task_and_flags_for_all_runs():
    (planned,) = plan("table2", "--tau=0.1", tasks=("my:Own/Env-v0",), methods=("exp",))
    assert planned.folder.name == "my-Own-Env-v0__exp__1"
    assert planned.args["env_id"] == "my:Own/Env-v0"
    assert planned.args["tau"] == 0.1
    (planned,) = plan("figure5", tasks=("ball_in_cup-catch",), methods=("exp",))
    assert planned.args["domain"] == "ball_in_cup"
    assert planned.args["reward"] == "stock"
    runs = plan("table3", tasks=("sets/sites.csv.gz",), methods=("exp",))
    assert runs[0].folder.name == "sites__exp__1"
    assert runs[0].args["data"] == os.path.abspath("sets/sites.csv.gz")


def test_dry_run_prints_the_commands(tmp_path):
    code, out, _ = end(command("figure5", "--dry-run", "--root", tmp_path, "--", *TINY))
    assert code == 0
    lines = [shlex.split(line) for line in out.splitlines()]
    assert len(lines) == 12
    for words in lines:
        assert words[:3] == ["python", "simpo_dmc.py", "--run-dir"]
        assert Path(words[3]).parent == tmp_path
        assert words[-len(TINY) :] == TINY


# ---- what is refused -----------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, mention",
    [
        ("table9", "table9"),
        ("table2 --methods best", "--methods best is none of exp"),
        ("table2 --seeds", "--seeds names none"),
        ("table2 --seeds 1 1", "HalfCheetah-v4__exp__1 is named twice"),
        ("table2 --tasks Ant-v4 Ant-v4", "Ant-v4__exp__1 is named twice"),
        ("figure5 --tasks cheetah", "--tasks cheetah is not DOMAIN-TASK"),
        ("table2 -- --env-id Ant-v4", "--env-id cannot follow --"),
        ("table2 -- --env_id Ant-v4", "--env-id cannot follow --"),
        ("table2 -- --env_id=Ant-v4", "--env-id cannot follow --"),
        ("table2 -- --run_dir x", "--run-dir cannot follow --"),
        ("figure6 -- --num_samples 16", "--num-samples cannot follow --"),
        ("table2 --methods linear -- --neg-clip -0.05", "--neg-clip cannot follow --"),
        ("table3 -- --data sites.csv", "--data cannot follow --"),
        ("table2 -- --gama 0.9", "--gama"),
        ("table2 -- --total-timesteps 10", "--total-timesteps"),
    ],
)
def test_wrong_flags_are_refused_before_anything_runs(flags, mention, capsys):
    here, dashes, extra = flags.partition(" -- ")
    with pytest.raises(SystemExit) as end:
        run.main([*here.split(), "--dry-run", *(dashes + extra).split()])
    assert end.value.code == 2
    assert mention in " ".join(capsys.readouterr().err.replace("│", " ").split())


def make_folder(tmp_path, **args):
    (planned,) = plan(
        "table2", tasks=("Hopper-v4",), methods=("exp",), root=tmp_path / "root"
    )
    planned.folder.mkdir(parents=True)
    (planned.folder / "args.json").write_text(json.dumps(planned.args | args))
    return planned


def test_a_run_of_other_flags_is_refused(tmp_path, capsys):
    planned = make_folder(tmp_path, tau=0.5, capture_video=True)
    with pytest.raises(SystemExit):
        run.check_folder(planned)
    assert f"has tau 0.5, not {planned.args['tau']}" in capsys.readouterr().err
    (planned.folder / "args.json").write_text(json.dumps(planned.args | {"eps_kl": 1}))
    with pytest.raises(SystemExit):
        run.check_folder(planned)
    assert "has eps_kl 1, not None" in capsys.readouterr().err
    (planned.folder / "args.json").write_text(json.dumps(planned.args))
    run.check_folder(planned)
    (planned.folder / "args.json").write_text("[]")
    with pytest.raises(SystemExit):
        run.check_folder(planned)
    assert "holds no run" in capsys.readouterr().err


def test_a_run_of_dna_is_that_of_its_file(tmp_path):
    """Whose args.json has the checksum of that file."""
    options = {"methods": ("exp",), "root": tmp_path}
    (planned,) = plan("table3", tasks=("sites.csv",), **options)
    planned.folder.mkdir()
    saved = planned.args | {"data_sha256": "abc"}
    (planned.folder / "args.json").write_text(json.dumps(saved))
    run.check_folder(planned)
    (planned.folder / "pretrain_checkpoint.tmp").touch()
    assert not planned.is_begun()
    (planned.folder / "pretrain_checkpoint.safetensors").touch()
    assert planned.is_begun()


def test_a_folder_of_the_users_stays(tmp_path):
    planned = make_folder(tmp_path)
    (planned.folder / "args.json").unlink()
    (planned.folder / "notes.txt").write_text("mine")
    flags = ["--tasks", "Hopper-v4", "--methods", "exp", "--root", tmp_path / "root"]
    code, _, err = end(command("table2", *flags))
    assert code == 2
    assert err == f"error: {planned.folder} holds no run: rename it\n"
    assert (planned.folder / "notes.txt").read_text() == "mine"


def test_a_name_that_is_too_long_is_one_line(tmp_path):
    flags = ["--tasks", "A" * 300, "--methods", "exp", "--root", tmp_path]
    code, _, err = end(command("table2", *flags))
    assert code == 2
    assert "File name too long" in err
    assert err.count("\n") == 1


# ---- an attempt at a run -------------------------------------------------------------
def make_run(tmp_path, source):
    """A run whose script has this source."""
    script = tmp_path / "script.py"
    script.write_text(source)
    (tmp_path / "root" / "logs").mkdir(parents=True)
    folder = tmp_path / "root" / "task__method__1"
    return run.Run(folder, str(script), ["--tau", "0.1"], {}, "metrics.csv")


def test_a_run_is_begun_resumed_and_skipped(tmp_path):
    source = "import os, sys; print(sys.argv[1:], os.environ['JAX_NUM_CPU_DEVICES'])"
    planned = make_run(tmp_path, source)
    assert run.train(planned, 2, 0, tmp_path) == 0
    planned.folder.mkdir()
    (planned.folder / "args.json").write_text("killed before its first checkpoint")
    assert run.train(planned, 2, 0, tmp_path) == 0
    assert not planned.folder.exists()
    (kept,) = (tmp_path / "root" / "logs").glob("*/args.json")
    assert kept.read_text() == "killed before its first checkpoint"
    planned.folder.mkdir()
    (planned.folder / "checkpoint.npz").touch()
    assert run.train(planned, 2, 0, tmp_path) == 0
    (planned.folder / "metrics.csv").touch()
    assert run.train(planned, 2, 0, tmp_path) == 0
    begun = f"['--run-dir', '{planned.folder}', '--tau', '0.1'] 2"
    resumed = f"['--resume', '{planned.folder}'] 2"
    assert planned.log.read_text().splitlines() == [begun, begun, resumed]


@pytest.mark.parametrize("code", [1, 2, 3])
def test_an_exit_code_is_told(code, tmp_path):
    planned = make_run(tmp_path, f"raise SystemExit({code})")
    assert run.train(planned, 1, 0, tmp_path) == code


def test_a_killed_script_is_raised_for_ray_to_try_again(tmp_path):
    planned = make_run(tmp_path, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(RuntimeError, match="killed by signal 9"):
        run.train(planned, 1, 0, tmp_path)


# ---- sweeps --------------------------------------------------------------------------
def processes(folder):
    """-> [pid] of the trainers in a run folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:
            continue
        if len(words) > 1 and words[1].endswith(".py") and str(folder) in words:
            found.append(int(path.parent.name))
    return found


def await_training(folder, known=()):
    """-> pid of a trainer, not in `known`, that has saved a checkpoint of its own."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        for pid in processes(folder):
            began = Path(f"/proc/{pid}").stat().st_mtime
            saved = folder / "checkpoint.npz"
            if pid not in known and saved.exists() and saved.stat().st_mtime > began:
                return pid
        time.sleep(0.05)
    raise AssertionError(f"nothing trains in {folder}")


def parent_of(pid):
    status = Path(f"/proc/{pid}/stat").read_text()
    return int(status.rpartition(")")[2].split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="workers are found by /proc")
def test_a_lost_worker_and_a_killed_driver_leave_no_gap(tmp_path):
    pytest.importorskip("ray")
    root = tmp_path / "root"
    folder = root / "Pendulum-v1__linear_neg__1"
    flags = ["--tasks", "Pendulum-v1", "--methods", "linear_neg", "--root", root]
    flags = ["table2", *flags, "--", *TINY, "--total-timesteps", "8000"]

    driver = command(*flags)
    first = await_training(folder)
    os.kill(parent_of(first), signal.SIGKILL)  # the Ray worker
    second = await_training(folder, known=[first])
    assert first not in processes(folder)
    driver.kill()
    driver.communicate()
    deadline = time.monotonic() + 60
    while second in processes(folder):
        assert time.monotonic() < deadline
        time.sleep(0.1)

    code, out, err = end(command(*flags))
    assert code == 0, out + err
    assert "Pendulum-v1__linear_neg__1: complete" in out
    with (tmp_path / "root.csv").open(newline="") as file:
        rows = [(int(x["step"]), int(x["episode"])) for x in csv.DictReader(file)]
    assert rows == [(step, i) for step in range(0, 8001, 500) for i in (0, 1)]
    code, out, _ = end(command(*flags))
    assert code == 0
    assert out.startswith("1 runs, 1 complete")


def test_runs_that_fail_or_diverge_are_told_and_not_tried_again(tmp_path):
    """An environment that is not there, and one whose rewards end as nan."""
    pytest.importorskip("ray")
    (tmp_path / "broken.py").write_text(
        "import gymnasium as gym\n"
        "class Broken(gym.Wrapper):\n"
        "    def step(self, action):\n"
        "        obs, _, *rest = self.env.step(action)\n"
        "        return obs, float('nan'), *rest\n"
        "gym.register('Broken-v0', lambda **x: Broken(gym.make('Pendulum-v1', **x)))\n"
    )
    root = tmp_path / "root"
    tasks = ["broken:None-v0", "broken:Broken-v0"]
    flags = ["--tasks", *tasks, "--methods", "exp", "--root", root]
    process = subprocess.run(
        [sys.executable, "-m", "benchmark.run", "table2", *flags, "--", *TINY],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1, process.stderr
    assert "broken-None-v0__exp__1: failed" in process.stdout
    assert "broken-Broken-v0__exp__1: diverged" in process.stdout
    for log in (root / "logs").iterdir():
        assert log.read_text().count("error:") == 1


def test_experiments_have_names_that_the_pages_use():
    text = (ROOT / "benchmark/README.md").read_text()
    for name in EXPERIMENTS:
        assert f"`{name}`" in text
