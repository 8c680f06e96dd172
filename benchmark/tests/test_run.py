"""run.py: what is run, what killed runs leave, and, where Ray is installed, a sweep on a cluster of
several nodes whose workers, nodes and driver are killed."""

import contextlib
import csv
import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import experiments
import numpy as np
import pytest
import results
import run as driver
import tyro
import worker
from conftest import ROOT, TINY

EVAL = "step,episode,return,length\n"


def plan(*flags, extra=()):
    return experiments.plan(tyro.cli(driver.Args, args=flags), extra)


def flag(run, name):
    return run.flags[run.flags.index(name) + 1]


# ---- what is run -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_scripts_accept_the_flags_of_every_run(name):
    tasks = {"mujoco": ["--tasks", "Ant-v4"], "dmc": ["--tasks", "walker-run-exp"]}.get(name, [])
    for setting in ([], *[["--fast"]] * (name != "table3")):
        runs = plan(name, *setting, *tasks)
        for run in runs:
            module = importlib.import_module(run.script.removesuffix(".py"))
            args = tyro.cli(module.Args, args=[*run.flags, "--run-dir", run.name])
            assert str(args.seed) == run.seed
            if run.script != experiments.DNA:  # the name of a run says what it is
                assert results.task_of(vars(args)) == run.task
                if run.method in "exp linear square linear_neg".split():
                    assert results.method_of(vars(args)) == run.method
        assert len({run.name for run in runs}) == len(runs)
    count = {"table2": 6 * 4 * 5, "figure5": 4 * 3 * 5, "figure6": 6 * 3 * 5, "choices": 11}
    assert len(runs) == (count | {"table3": 3 * (13 + 1)}).get(name, 1)


def test_figure5_gives_exp_a_scale_that_it_learns_with():
    runs = {run.task: run for run in plan("figure5", "--seeds", "1", "--methods", "linear")}
    assert flag(runs["cheetah-run-exp"], "--reward-scale") == "20"
    assert "--reward-scale" not in runs["cheetah-run-square"].flags


def test_figure6_takes_shares_of_log_n():
    for setting, values in ([], "1 1.5 2"), (["--fast"], "0.6 0.9 1.2"):
        runs = plan("figure6", *setting, "--tasks", "Ant-v4", "--seeds", "7")
        assert [flag(run, "--eps-kl") for run in runs] == values.split()


def test_flags_make_a_method_and_names_make_tasks():
    extra = ["--weighting", "square", "--neg-clip=-0.1", "--capture-video"]
    (run,) = plan("--tasks", "my:Own/Env-v0", extra=extra)
    assert flag(run, "--env-id") == "my:Own/Env-v0" and run.script == experiments.MUJOCO
    assert run.name == "my-Own-Env-v0__weighting=square,neg-clip=-0.1,capture-video__1"
    assert plan("--tasks", "Ant-v4")[0].name == "Ant-v4__default__1"
    (run,) = plan("dmc", "--tasks", "ball_in_cup-catch")
    assert [flag(run, x) for x in ("--domain", "--task", "--reward")] == [
        "ball_in_cup",
        "catch",
        "stock",
    ]


def test_budget_and_flags_behind_the_dashes():
    flags = ["--total-timesteps", "100000", "--methods", "linear_neg"]
    run = plan("table2", *flags, extra=["--neg-clip", "-0.1", "--capture-video", "--tau=0.01"])[0]
    for name, value in (("total-timesteps", 100_000), ("eval-every", 5000)):
        assert flag(run, f"--{name}") == str(value)
    assert (flag(run, "--neg-clip"), flag(run, "--tau")) == ("-0.1", "0.01")
    assert run.flags.count("--neg-clip") == 1 and "--capture-video" in run.flags


def test_dna_starts_from_one_pretrained_model_a_seed(tmp_path):
    root = ["--root", str(tmp_path)]
    runs = plan("table3", *root, "--seeds", "1", "2", "--methods", "exp", "wd1")
    names = [run.name for run in runs]
    assert names[:2] == ["generated__pretraining__1", "generated__pretraining__2"]
    for run in runs[2:]:
        assert run.needs == f"generated__pretraining__{run.seed}"
        assert flag(run, "--pretrained") == str(tmp_path / run.needs / "pretrained.npz")
    data = ["--data", "/sets/sites.csv.gz", "--drop-bad-rows"]
    both = [*data, "--pretrain-steps", "60"]
    model, tuned = plan("table3", "--seeds", "1", "--methods", "exp", extra=both)
    assert model.task == tuned.task == "sites" and set(data) < set(model.flags) & set(tuned.flags)
    assert "--pretrain-steps" in model.flags and "--pretrain-steps" not in tuned.flags
    given = plan("table3", extra=[*data, "--pretrained", "drakes.npz"])
    assert len(given) == 39 and not any(run.needs for run in given)


@pytest.mark.parametrize(
    "flags,mention",
    [
        ("table9", "table9"),
        ("table2 --methods best", "--methods best is not among exp"),
        ("table3 --fast", "--fast is for the experiments of simpo_mujoco.py"),
        ("table2 --cpus-per-run 0", "--cpus-per-run must be at least 1"),
        ("table2 --gpus-per-run 1.5", "--gpus-per-run must be a fraction of 1 or whole"),
        ("table2 --seeds 1 1", "--seeds must be different"),
        ("dmc --tasks cheetah", "--tasks cheetah"),
        ("dmc", "--tasks must name"),
        ("table2 -- 5", "must be flags"),
        ("table2 -- --gamma 0.9 --seed=9", "--seed cannot follow"),
        ("table2 -- --run-dir x", "--run-dir cannot follow"),
    ],
)
def test_wrong_flags_are_named(flags, mention, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", *flags.split(), "--dry-run"][:99])
    if "--" in flags.split():
        monkeypatch.setattr(sys, "argv", ["run.py", "--dry-run", *flags.split()])
    with pytest.raises(SystemExit) as end:
        driver.main()
    assert end.value.code == 2
    assert mention in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_dry_run_prints_the_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "figure5", "--dry-run", "--", "--tau", "0.1"])
    assert driver.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 60 and all(x.startswith("python simpo_dmc.py --run-dir") for x in lines)
    assert all(x.endswith("--tau 0.1") for x in lines)


def test_two_drivers_of_one_folder_are_refused(tmp_path, capsys):
    with driver.lock_root(tmp_path / "root"):
        with pytest.raises(SystemExit):
            driver.lock_root(tmp_path / "root")
    driver.lock_root(tmp_path / "root").close()
    with pytest.raises(SystemExit):
        driver.lock_root(Path("/proc/root-of-none"))
    assert "another run.py" in capsys.readouterr().err


def test_an_address_without_ray_is_refused(capsys):
    pytest.importorskip("ray")
    with pytest.raises(SystemExit):
        driver.start_ray(driver.Args(address="127.0.0.1:1"))
    assert "error: --address 127.0.0.1:1" in capsys.readouterr().err


def test_a_run_has_its_cores_or_its_share_of_a_gpu():
    env = worker.environment(2, 0)
    assert env["JAX_NUM_CPU_DEVICES"] == "2" and env["JAX_PLATFORMS"] == "cpu"
    assert worker.environment(1, 0.25)["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.225"
    assert worker.device("run folder x, on 1 x NVIDIA H100\n", 4) == "1 x NVIDIA H100"
    assert worker.device("device      2 x cpu\n", 2).startswith("2 x ")


# ---- what a run has left -----------------------------------------------------------------------


def leave(root, run, text, status="unfinished", total=4000):
    """What a run and its worker write."""
    folder = root / run.name
    folder.mkdir(parents=True)
    (root / "logs").mkdir(exist_ok=True)
    (folder / "args.json").write_text(json.dumps({"total_timesteps": total, "tau": 0.1}))
    (folder / "eval.csv").write_text(text)
    numbers = {"status": status, "attempts": 2, "seconds": 61.7, "device": "cpu"}
    record = json.dumps(dataclasses.asdict(run) | numbers)
    (root / "logs" / f"{run.name}.json").write_text(record)


def episodes(*means, every=1000):
    """Text of an eval.csv with two episodes a step, -+ 1."""
    lines = [
        f"{every * (i + 1)},{episode},{mean + 2 * episode - 1:.6f},9\n"
        for i, mean in enumerate(means)
        for episode in (0, 1)
    ]
    return EVAL + "".join(lines)


def test_completeness_and_results(tmp_path, capsys):
    runs = plan("table2", "--tasks", "Ant-v4", "Hopper-v4", "--seeds", "2", "10")
    one, two, three, four, five, *_ = runs
    leave(tmp_path, one, episodes(1, 2, 3, 4))
    leave(tmp_path, two, episodes(1, 2, 3) + "4000,0,5")  # is being written
    leave(tmp_path, three, episodes(1, 2, 3, 4))
    (tmp_path / three.name / "replay.dat").touch()  # killed at its end
    leave(tmp_path, four, episodes(1), status="diverged")
    found = [driver.status(tmp_path, run) for run in runs[:5]]
    assert found == ["done", "unfinished", "unfinished", "diverged", "unfinished"]
    assert results.share_done(tmp_path / two.name) == 0.75
    other = dataclasses.replace(four, flags=(*four.flags, "--gamma", "0.9"))
    assert driver.status(tmp_path, other) == "unfinished"
    with pytest.raises(SystemExit):
        driver.status(tmp_path, dataclasses.replace(one, flags=other.flags))
    assert "finished Ant-v4__exp__2 with other flags" in capsys.readouterr().err

    out = tmp_path / "out.csv"
    results.write_results(tmp_path.iterdir(), out)
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 8 + 6 + 8 + 2
    head = {"task": "Ant-v4", "method": "exp", "seed": "2"}
    assert rows[0] == head | {"step": "1000", "episode": "0", "return": "0.000000", "length": "9"}
    table = list(csv.DictReader(out.with_suffix(".runs.csv").open()))
    by_name = {row["method"]: row for row in table}
    assert by_name["linear_neg"]["status"] == "diverged" and by_name["exp"]["status"] == "done"
    assert (by_name["linear"]["step"], by_name["exp"]["attempts"]) == ("3000", "2")
    assert by_name["exp"]["flags"] == "--total-timesteps 4000 --tau 0.1"

    last = next(run for run in runs if run.seed == "10" and run.method == "exp")
    leave(tmp_path, last, episodes(5))  # stands behind seed 2 of its task and method
    results.write_results(tmp_path.iterdir(), out)
    order = list(dict.fromkeys((x["method"], x["seed"]) for x in csv.DictReader(out.open())))
    assert order[:3] == [("exp", "2"), ("exp", "10"), ("linear", "2")]
    assert not list(tmp_path.glob("*.tmp"))


def test_results_of_folders_with_any_name(tmp_path, capsys):
    args = {"env_id": "Ant-v4", "seed": 3, "weighting": "linear", "neg_clip": -0.05, "tau": 0.1}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval.csv").write_text(episodes(7))
    (tmp_path / "first" / "args.json").write_text(json.dumps(args | {"resume": None}))
    command = [
        sys.executable,
        ROOT / "benchmark" / "results.py",
        "first",
        "second",
        "--out",
        "x.csv",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [list(row.values())[:4] for row in rows] == [["Ant-v4", "linear_neg", "3", "1000"]] * 2
    (tmp_path / "second" / "args.json").write_text(json.dumps(args))
    with pytest.raises(SystemExit):
        results.write_results([tmp_path / "first", tmp_path / "second"], tmp_path / "x.csv")
    assert "both hold Ant-v4 linear_neg 3" in capsys.readouterr().err


def test_results_of_dna(tmp_path):
    model, tuned = plan("table3", "--methods", "exp", "--seeds", "1")
    for run, name in ((model, "pretrained.npz"), (tuned, "metrics.csv")):
        (tmp_path / run.name).mkdir()
        args = {"pretrain_only": run is model}
        (tmp_path / run.name / "args.json").write_text(json.dumps(args))
        assert driver.status(tmp_path, run) == "unfinished"
        (tmp_path / run.name / name).write_text("method,ft\npretrained,0\nsimpo-exp,2\n")
        assert driver.status(tmp_path, run) == "done"
    rows, _ = results.join([tmp_path / tuned.name])
    assert [(row["method"], row["row"]) for row in rows] == [
        ("exp", "pretrained"),
        ("exp", "simpo-exp"),
    ]


# ---- worker ------------------------------------------------------------------------------------

SCRIPT = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[2])
def end(*_):
    time.sleep(0.5)
    (folder / "ended").write_text(str(time.time()))
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
folder.mkdir(exist_ok=True)
(folder / "checkpoint.npz").touch()
(folder / "began").write_text(f"{time.time()} {sys.argv[1]} {len(os.sched_getaffinity(0))}")
time.sleep(float(sys.argv[3]))
"""
PARENT = """
import os, subprocess, sys
subprocess.Popen([sys.executable, sys.argv[1], str(os.getpid()), *sys.argv[2:]]).wait()
"""


def await_file(path, seconds=120):
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
    return path.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
def test_script_ends_with_its_worker_and_before_the_next_one_begins(tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT)

    def start(seconds):
        what = ROOT / "benchmark" / "worker.py", 1, folder, tmp_path / "lock", script, seconds
        return subprocess.Popen([sys.executable, "-c", PARENT, *map(str, what)])

    with start(60) as first:
        _, flag, cores = await_file(folder / "began").split()
        assert (flag, cores) == ("--run-dir", "1")
        (folder / "began").unlink()
        first.kill()
    with start(0) as second:
        began, flag, _ = await_file(folder / "began").split()
        assert flag == "--resume" and float(began) > float(await_file(folder / "ended"))
        assert second.wait(60) == 0


def test_what_was_killed_before_its_first_checkpoint_is_begun_anew(tmp_path):
    folder = tmp_path / "run"
    assert worker.place_flags(folder) == ["--run-dir", str(folder)]
    folder.mkdir()
    (folder / "args.json").write_text('{"seed": 1}')
    (folder / "checkpoint.tmp.npz").touch()
    assert worker.place_flags(folder) == ["--run-dir", str(folder)] and not folder.exists()
    folder.mkdir()
    (folder / "checkpoint.npz").touch()
    assert worker.place_flags(folder) == ["--resume", str(folder)]


# ---- a sweep on a cluster ----------------------------------------------------------------------

STARTED = []  # drivers


@pytest.fixture(scope="module")
def cluster(env):
    """Three nodes on this machine, two of them with one core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name in (name for name in env if name.startswith("JAX_")):
            patch.setenv(name, env[name])  # for the workers
        cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
        for process in STARTED:
            process.kill()
        cluster.shutdown()


def start(env, root, *flags):
    """The driver of a sweep; the fixture `cluster` ends it if a test does not."""
    what = "table2", "--tasks", "Pendulum-v1", "--methods", "linear_neg", "--seeds", 1, 2
    command = [sys.executable, ROOT / "benchmark" / "run.py", *what, "--root", root, *flags]
    longer = {"4000": "8000", "1000": "2000"}  # else a fast machine ends a run before it is hit
    command = [str(longer.get(x, x)) for x in (*command, "--", *TINY)]
    options = {"cwd": root.parent, "env": env, "text": True, "stdout": -1, "stderr": -1}
    STARTED.append(subprocess.Popen(command, **options))
    return STARTED[-1]


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def is_script(pid):
    """Whether an attempt has become its script."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1].endswith("simpo_mujoco.py")
    except (OSError, IndexError):
        return False


def attempts(root):
    """{(name, pid)} of the last attempt at each run."""
    locks = sorted((root / "logs").glob("*__*.lock"))
    return {(lock.stem, lock.read_text().partition(" ")[2]) for lock in locks}


def await_training(root, process, known):
    """Name and pid of a run in the middle of an attempt that is not in `known`, and adds it there:
    it has saved a checkpoint since its start, and is not near its end. It is stopped (SIGSTOP)."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        for name, pid in sorted(attempts(root) - known):
            if not (pid and is_script(int(pid))):  # its header is not in the log yet
                continue
            log, saved = root / "logs" / f"{name}.log", root / name / "checkpoint.npz"
            began = "compiling" in log.read_text().rpartition("=== ")[2]
            if began and saved.exists() and saved.stat().st_mtime > log.stat().st_mtime:
                try:
                    os.kill(int(pid), signal.SIGSTOP)
                except ProcessLookupError:
                    continue
                with np.load(saved) as arrays:
                    if arrays["env_step"] < 7000 and is_alive(int(pid)):
                        known.add((name, pid))
                        return name, int(pid)
                os.kill(int(pid), signal.SIGCONT)
        time.sleep(0.01)
    raise AssertionError(f"no run trains; driver: {process.communicate(timeout=60)}")


def go_on(pid):
    """Continues a stopped run once SIGTERM waits for it: it cannot end before it is hit."""
    deadline = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < deadline, "no SIGTERM reached the run"
        with contextlib.suppress(OSError):  # it is gone
            status = Path(f"/proc/{pid}/status").read_text()
            waiting = re.findall(r"^(?:Sig|Shd)Pnd:\s*(\w+)", status, re.MULTILINE)
            if any(int(x, 16) >> signal.SIGTERM - 1 & 1 for x in waiting):
                os.kill(pid, signal.SIGCONT)
                return
        time.sleep(0.01)


def finish(process):
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert "2 of 2 runs complete" in out


def test_killed_workers_nodes_and_drivers_leave_no_gap_in_the_results(env, cluster, tmp_path):
    whole, root, known = tmp_path / "whole", tmp_path / "killed", set()
    here = "--address", cluster.address
    finish(start(env, whole, *here))

    process = start(env, root, *here)
    one, pid = await_training(root, process, known)
    os.kill(parent(pid), signal.SIGKILL)  # its Ray worker
    go_on(pid)

    two, pid = await_training(root, process, known)
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}
    cluster.remove_node(raylets[parent(parent(pid))], allow_graceful=False)
    go_on(pid)
    cluster.add_node(num_cpus=1)

    three, pid = await_training(root, process, known)
    process.kill()  # the driver
    process.communicate()
    go_on(pid)
    known |= attempts(root)  # the other run dies with it, and may still be saving

    process = start(env, root, *here)
    four, pid = await_training(root, process, known)
    process.send_signal(signal.SIGINT)
    go_on(pid)
    process.communicate(timeout=300)
    assert process.returncode == 130 and not is_alive(pid)

    finish(start(env, root, *here))
    # a run that was asked to stop saves where it is, and there begins new episodes: its returns
    # differ from then on, but no row is missing, doubled or cut
    rows, others = (list(csv.DictReader((x / "results.csv").open())) for x in (root, whole))
    assert [list(x.values())[:5] for x in rows] == [list(x.values())[:5] for x in others]
    assert len(rows) == 2 * 5 * 2 and all(len(x) == 7 and float(x["return"]) < 0 for x in rows)
    assert rows[:2] == others[:2]
    hits = [one, two, three, four]
    for name in set(hits):  # what was hit in its middle went on from there
        log = (root / "logs" / f"{name}.log").read_text()
        assert log.count("--run-dir") == 1 and log.count(".py --resume ") >= hits.count(name)
