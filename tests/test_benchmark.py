"""run.py and report.py: what is run, what killed runs leave, and, where Ray is installed, a sweep
on a cluster of several nodes whose workers, nodes and driver are killed."""

import csv
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro
from conftest import ROOT

sys.path.append(str(ROOT / "benchmark"))

import experiments
import guard
import report
import results
import run as driver

SETTINGS = ([], ["--fast"], ["--smoke"])
EVAL = "step,episode,return,length\n"


def plan(*flags, extra=()):
    return experiments.plan(driver.parse_flags(driver.Args, list(flags)), extra)


# ---- what is run ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_scripts_accept_the_flags_of_every_run(name):
    for setting in SETTINGS:
        for run in plan(name, *setting):
            module = importlib.import_module(run.script.removesuffix(".py"))
            args = tyro.cli(module.Args, args=[*run.flags, "--run-dir", run.name])
            assert str(args.seed) == run.seed.split("-")[0]
    seeds = {"table2": 5, "table3": 3, "figure5": 5, "figure6": 5, "ablation": 3}.get(name, 1)
    _, _, tasks, methods = experiments.EXPERIMENTS[name]
    runs = plan(name)
    assert len({run.name for run in runs}) == len(runs)
    assert len(runs) == seeds * (len(tasks) * len(methods) + (name == "table3"))


def flag(run, name):
    return run.flags[run.flags.index(name) + 1]


def test_figure6_scales_the_bound_with_the_samples():
    for setting, values in (
        ([], "1 1.5 2"),
        (["--fast"], "0.5333 0.8 1.067"),
        (["--smoke"], "0.4 0.6 0.8"),
    ):
        runs = plan("figure6", *setting, "--tasks", "Ant-v4", "--seeds", "7")
        assert [flag(run, "--eps-kl") for run in runs] == values.split()


def test_budget_and_own_flags():
    flags = ["--total-timesteps", "100000", "--cpus-per-run", "2", "--methods", "linear_neg"]
    run = plan("table2", *flags, extra=["--neg-clip", "-0.1", "--no-train-noise", "--tau=0.01"])[0]
    for name, value in (("total-timesteps", 100_000), ("eval-every", 5000), ("num-devices", 2)):
        assert flag(run, f"--{name}") == str(value)
    assert (flag(run, "--neg-clip"), flag(run, "--tau")) == ("-0.1", "0.01")
    assert run.flags.count("--neg-clip") == 1 and "--no-train-noise" in run.flags


def test_dna_starts_from_one_pretrained_model_a_seed(tmp_path):
    root = ["--root", str(tmp_path)]
    runs = plan("table3", "--smoke", *root, "--seeds", "1", "2", "--methods", "exp", "wd1")
    names = [run.name for run in runs]
    assert names[:2] == ["generated__pretraining__1", "generated__pretraining__2"]
    for run in runs[2:]:
        assert run.needs == f"generated__pretraining__{run.seed}"
        assert flag(run, "--pretrained") == str(tmp_path / run.needs / "pretrained.npz")
        assert ("--no-compare" in run.flags) == (run.method == "wd1")
    data = ["--data", "/sets/sites.csv.gz", "--drop-bad-rows"]
    model, tuned = plan("table3", "--seeds", "1", "--methods", "exp", extra=data)
    assert model.task == tuned.task == "sites" and set(data) < set(model.flags) & set(tuned.flags)
    given = plan("table3", extra=[*data, "--pretrained", "drakes.ckpt"])
    assert len(given) == 18 and not any(run.needs for run in given)
    smoke = plan("table3", "--smoke", extra=["--pretrained", "drakes.ckpt"])
    assert not any("--pretrain-steps" in run.flags for run in smoke)


@pytest.mark.parametrize("flag", ["--seed 9", "--num-seeds=2", "--run-dir x", "--resume x"])
def test_flags_that_are_the_drivers_own_are_refused(flag):
    with pytest.raises(experiments.UsageError, match=flag[:6]):
        plan("table2", extra=["--gamma", "0.9", *flag.split()])


def test_a_finished_run_is_not_overwritten_by_one_with_other_flags(tmp_path):
    runs = plan("figure2", "--methods", "linear")
    driver.refuse_overwriting(tmp_path, runs)
    leave(tmp_path, runs[0], "")
    driver.refuse_overwriting(tmp_path, runs)
    with pytest.raises(experiments.UsageError, match="escape__linear__1-20 with other flags"):
        driver.refuse_overwriting(tmp_path, plan("figure2", extra=["--noise", "0.2"]))


@pytest.mark.parametrize(
    "flags,mention",
    [
        ("table9", "table9"),
        ("table2 --tasks Pong-v4", "--tasks must be among HalfCheetah-v4"),
        ("table2 --methods best", "--methods must be among exp"),
        ("table2 --gpus-per-run -1", "--gpus-per-run must be at least 0, got -1"),
        ("table2 --gpus-per-run 1.5", "--gpus-per-run must be a fraction of 1 or whole"),
        ("table2 --cpus-per-run 0", "--cpus-per-run must be at least 1"),
        ("table2 --fast --smoke", "--smoke must be left out with --fast"),
        ("table2 --seeds 1 1", "--seeds must be different"),
        ("figure2 --seeds 1 3", "--seeds must be in a row"),
        ("table3 --total-timesteps 100", "--total-timesteps must be left out"),
        ("ablation --total-timesteps 100", "--total-timesteps must be left out"),
        ("table2 --sedes 1", "--sedes"),
    ],
)
def test_wrong_flags_are_named(flags, mention):
    with pytest.raises(experiments.UsageError, match=mention) as error:
        driver.parse_flags(driver.Args, flags.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "command",
    ["run.py table2 --tasks Pong-v4", "run.py table2 --dry-run -- 5", "report.py none.csv"],
)
def test_wrong_input_is_one_line_and_code_2(command, tmp_path):
    file, *flags = command.split()
    command = [sys.executable, str(ROOT / "benchmark" / file), *flags]
    end = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert end.returncode == 2 and not end.stdout
    assert end.stderr.startswith("error: ") and end.stderr.count("\n") == 1


def test_two_drivers_of_one_folder_are_refused(tmp_path):
    with driver.lock_root(tmp_path / "root"):
        with pytest.raises(experiments.UsageError, match="another run.py"):
            driver.lock_root(tmp_path / "root")
    driver.lock_root(tmp_path / "root").close()
    with pytest.raises(experiments.UsageError, match="--root"):
        driver.lock_root(Path("/proc/root-of-none"))


def test_an_address_without_ray_is_refused():
    pytest.importorskip("ray")
    args = driver.parse_flags(driver.Args, ["table2", "--address", "127.0.0.1:1"])
    with pytest.raises(experiments.UsageError, match="--address 127.0.0.1:1"):
        driver.start_ray(args)


def test_a_run_beside_a_gpu_has_all_its_cores():
    flags = ["table2", "--gpus-per-run", "0.25", "--cpus-per-run", "4"]
    args = driver.parse_flags(driver.Args, flags)
    assert (args.cores_and_gpus, args.num_devices) == ((4, 0.25), 1)
    assert driver.parse_flags(driver.Args, ["table2", "--cpus-per-run", "2"]).num_devices == 2


def test_dry_run_prints_the_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "figure2", "--dry-run"])
    assert driver.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(x.startswith("python simpo_bandit.py --run-dir") for x in lines)


# ---- what a run has left ----------------------------------------------------------------------


def leave(root, run, text, status="done", total=4000):
    """What a run and its worker write."""
    folder = root / run.name
    folder.mkdir(parents=True)
    (root / "logs").mkdir(exist_ok=True)
    (folder / "args.json").write_text(json.dumps({"total_timesteps": total}))
    (folder / results.RESULTS[run.script]).write_text(text)
    numbers = {"status": status, "attempts": 2, "seconds": 61.7, "device": "cpu", "commit": "abc"}
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


def test_completeness_and_results(tmp_path):
    runs = plan("table2", "--smoke", "--tasks", "Ant-v4", "Hopper-v4", "--seeds", "2", "10")
    one, two, three, four, *_ = runs
    leave(tmp_path, one, episodes(1, 2, 3, 4))
    leave(tmp_path, two, episodes(1, 2, 3) + "4000,0,5", status="unfinished")  # is being written
    leave(tmp_path, three, episodes(1, 2, 3))  # recorded as done, but its end is missing
    leave(tmp_path, four, episodes(1), status="diverged")
    found = [results.status(tmp_path, run) for run in runs[:5]]
    assert found == ["done", "unfinished", "unfinished", "diverged", "unfinished"]
    assert results.share_done(tmp_path / two.name, two.script) == 0.75
    other = dataclasses.replace(one, flags=(*one.flags, "--gamma", "0.9"))
    assert results.status(tmp_path, other) == "unfinished"

    results.write_results(tmp_path, "table2", tmp_path / "results.csv")
    text = (tmp_path / "results.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 8 + 6 + 6 + 2
    head = {"experiment": "table2", "task": "Ant-v4", "method": "exp", "seed": "2"}
    numbers = {"step": "1000", "episode": "0", "return": "0.000000", "length": "9"}
    assert rows[0] == head | {"setting": "smoke"} | numbers
    with (tmp_path / "results.runs.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["status"] for row in table] == ["done", "unfinished", "done", "diverged"]
    assert (table[1]["step"], table[0]["attempts"], table[0]["seconds"]) == ("3000", "2", "62")

    last = next(run for run in runs if run.seed == "10" and run.method == "exp")
    leave(tmp_path, last, episodes(5))  # stands behind seed 2 of its task and method
    results.write_results(tmp_path, "table2", tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        order = list(dict.fromkeys((row["method"], row["seed"]) for row in csv.DictReader(file)))
    assert order[:3] == [("exp", "2"), ("exp", "10"), ("linear", "2")]
    assert not list(tmp_path.glob("*.tmp"))


def test_results_of_bandit_and_dna(tmp_path):
    (bandit,) = plan("figure2", "--methods", "linear_neg", "--seeds", "3", "4")
    curve = (
        "landscape,method,seed,epoch,regret\nescape,linear_neg,3,0,0.5\nescape,linear_neg,4,0,1\n"
    )
    leave(tmp_path, bandit, curve)
    rows = list(results.result_rows(tmp_path, "figure2"))
    assert [list(row.values())[2:] for row in rows] == [
        ["linear_neg", "3", "default", "0", "0.5"],
        ["linear_neg", "4", "default", "0", "1"],
    ]
    assert results.status(tmp_path, bandit) == "unfinished"  # the figure comes last
    (tmp_path / bandit.name / "figure2.pdf").touch()
    assert results.status(tmp_path, bandit) == "done"

    _, dna = plan("table3", "--methods", "exp", "--seeds", "1")
    leave(tmp_path, dna, "method,ft,eval\npretrained,0,0.1\nsimpo-exp,2,3\n")
    rows = list(results.result_rows(tmp_path, "table3"))
    assert [row["row"] for row in rows] == ["pretrained", "simpo-exp"]
    assert rows[0]["method"] == "exp" and results.status(tmp_path, dna) == "done"


# ---- guard ------------------------------------------------------------------------------------

SCRIPT = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[2])
def end(*_):
    time.sleep(0.5)
    (folder / "ended").write_text(str(time.time()))
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
folder.mkdir(exist_ok=True)
(folder / "args.json").write_text("{}")
(folder / "began").write_text(f"{time.time()} {sys.argv[1]} {len(os.sched_getaffinity(0))}")
time.sleep(float(sys.argv[3]))
"""
PARENT = """
import os, subprocess, sys
subprocess.Popen([sys.executable, sys.argv[1], str(os.getpid()), *sys.argv[2:]]).wait()
"""


def await_file(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
    return path.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux's")
def test_script_ends_with_its_worker_and_before_the_next_one_begins(tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT)

    def worker(seconds):
        what = ROOT / "benchmark" / "guard.py", 1, folder, tmp_path / "lock", script, seconds
        return subprocess.Popen([sys.executable, "-c", PARENT, *map(str, what)])

    with worker(60) as first:
        _, flag, cores = await_file(folder / "began").split()
        assert (flag, cores) == ("--run-dir", "1")
        (folder / "began").unlink()
        first.kill()
    with worker(0) as second:
        began, flag, _ = await_file(folder / "began").split()
        assert flag == "--resume" and float(began) > float(await_file(folder / "ended"))
        assert second.wait(60) == 0


def test_what_was_killed_early_is_begun_anew(tmp_path, capsys):
    folder, name = tmp_path / "run", "simpo_mujoco.py"
    assert guard.place_flags(folder, name) == ["--run-dir", str(folder)]
    folder.mkdir()
    (folder / "args.json").write_text('{"seed": 1')
    assert guard.place_flags(folder, name) == ["--run-dir", str(folder)] and not folder.exists()
    folder.mkdir()
    (folder / "args.json").write_text('{"seed": 1}')
    assert guard.place_flags(folder, name) == ["--resume", str(folder)]
    (folder / "args.json").write_text("")
    (folder / "checkpoint.npz").touch()  # not ours to remove
    with pytest.raises(SystemExit) as end:
        guard.place_flags(folder, name)
    assert end.value.code == 2 and capsys.readouterr().out.startswith("error: ")
    (folder / "checkpoint.npz").unlink()
    (folder / "args.json").write_text("{}")
    assert guard.place_flags(folder, "simpo_bandit.py")[0] == "--run-dir" and not folder.exists()


# ---- report -----------------------------------------------------------------------------------


def sweep_of(root, experiment, make, *flags):
    """results.csv of runs whose result files are make(run); leaves out runs with None."""
    for run in plan(experiment, "--root", str(root), *flags):
        text = make(run)
        if text is not None:
            leave(root, run, text, total=1_000_000)
    results.write_results(root, experiment, root / "results.csv")
    return root / "results.csv"


def test_table2_stands_beside_the_papers(tmp_path):
    pytest.importorskip("rliable")

    def make(run):
        if run.task in ("Ant-v4", "Hopper-v4") and run.method != "square":
            scale = report.BEST[run.task] * (2 if run.method == "exp" else 1)
            return episodes(0, scale * (1 + 0.1 * (int(run.seed) - 3)), every=500_000)

    def short(run):
        return episodes(300, every=50_000) if run.task == "Hopper-v4" else None

    fast = ("--fast", "--seeds", "1", "2", "--methods", "linear")
    files = (
        sweep_of(tmp_path / "whole", "table2", make),
        sweep_of(tmp_path / "short", "table2", short, *fast),
    )
    report.main(report.Args(files, tmp_path / "report"))
    text = (tmp_path / "report" / "report.md").read_text()
    lines = text.splitlines()
    # seeds 0.8, 0.9, 1, 1.1, 1.2 of the best: standard deviation sqrt(0.1 / 4)
    texts = "not run | not run | 5984 +- 946 | not run | 3387 +- 536 | not run"
    assert f"| SiMPO-Linear | here | {texts} |" in lines
    assert "| SiMPO-Exp | here | not run | not run | 11968 +- 1892 |" in text
    assert "| TD3 | paper | 9820 +- 1543 | 5263 +- 47 | 4400 +- 1196 |" in text
    assert "| 300 +- 0 |" in text and "Here 50,000 x 2 environment steps x seeds" in text
    assert "Normalised returns: Ant-v4, Hopper-v4; 1,000,000 steps, seeds: 5." in lines
    (line,) = (line for line in lines if line.startswith("| Exp | 2.000 ("))
    low, high = line.split("(")[1].split(")")[0].split(" to ")
    assert 1.6 < float(low) < 2 < float(high) < 2.4
    assert "## Figure 5\n\nNot run." in text and "* runs: 30 done" in lines
    for name in ("table2.png", "table2-fast.png"):
        assert 1000 < (tmp_path / "report" / name).stat().st_size < 300_000


def test_a_cell_of_another_budget_says_so():
    values = {
        ("Ant-v4", "exp"): {1: {5: 100.0}, 2: {5: 200.0}},
        ("Ant-v4", "linear"): {1: {5: 3.0}},
    }
    values["Ant-v4", "square"] = {1: {5: 30.0}, 2: {5: 30.0}}
    texts, budget = report.cells(values, [*values, ("Ant-v4", "wd1")])
    assert list(texts.values()) == ["150 +- 71", "3.000 (5 x 1)", "30 +- 0", "not run"]
    assert budget.startswith("Here 5 x 2 environment steps x seeds;")


def test_methods_are_compared_where_all_have_the_last_step():
    seeds = {1: {5: 0.0, 10: 1.0}, 2: {5: 0.0, 10: 2.0}}
    behind = {1: {5: 0.0}, 2: {5: 0.0}}
    values = {("Ant-v4", m): seeds for m in ("exp", "linear")}
    values |= {("Hopper-v4", "exp"): seeds, ("Hopper-v4", "linear"): behind}
    assert report.comparable(values, ["exp", "linear"]) == (10, ["Ant-v4"], [1, 2])
    values["Ant-v4", "linear"] = {2: seeds[2], 3: seeds[1]}
    assert report.comparable(values, ["exp", "linear"]) == (10, ["Ant-v4"], [2])
    assert report.comparable(values, ["exp", "square"])[1:] == ([], [])


def test_report_of_a_sweep_that_has_just_begun(tmp_path):
    model, *_ = plan("table3", "--seeds", "1")
    leave(tmp_path, model, "", status="unfinished")
    results.write_results(tmp_path, "table3", tmp_path / "results.csv")
    report.main(report.Args((tmp_path / "results.csv",), tmp_path / "report"))
    text = (tmp_path / "report" / "report.md").read_text()
    assert "No evaluation yet." in text and "* runs: 1 unfinished" in text


def test_report_of_dna_bandit_and_rewards(tmp_path):
    def dna(run):
        score = {"exp": 2, "linear_neg": 3}.get(run.method)
        rows = f"pretrained,0,0,-260\nsimpo-x,9,{score},-255\n"
        return f"method,ft,eval,log_lik\n{rows}" if score else None

    def bandit(run):
        rows = [f"escape,x,{seed},{e},{0.4 - e * seed}\n" for seed in (1, 2) for e in (0, 0.2)]
        text = "landscape,method,seed,epoch,regret\n" + "".join(rows)
        return text.replace("0.2,", "1,") if run.method == "linear" else None

    def rewards(run):
        return episodes(10, 20) if run.task == "cheetah-run-exp" else None

    files = (
        sweep_of(tmp_path / "a", "table3", dna, "--seeds", "1", "2"),
        sweep_of(tmp_path / "b", "figure2", bandit, "--seeds", "1", "2"),
        sweep_of(tmp_path / "c", "figure5", rewards, "--seeds", "1"),
    )
    report.main(report.Args(files, tmp_path / "report"))
    text = (tmp_path / "report" / "report.md").read_text()
    gain = "3.00 +- 0.00 | +50.0% | 9.00 +- 0.00 | -255.0 +- 0.0 | 2 |"
    assert f"| SiMPO-Lin. Neg. | 7.51 +- 0.08 | +15.2% | {gain}" in text
    assert "| WD1 | 3.78 +- 0.12 | -42.0% | not run |" in text
    assert "| escape | Linear | 2 | 1 | 0.1000 +- 0.1000 | 0.2500 +- 0.0500 | 50% |" in text
    assert "| Exp | not run | not run | not run | 20 |" in text
    assert "| CG | 3.30 +- 0.01 |  | not run |" in text
    with pytest.raises(experiments.UsageError, match="repeats a run"):
        copy = tmp_path / "copy.csv"
        for path in (files[2], files[2].with_suffix(".runs.csv")):
            Path(str(copy).replace(".csv", "".join(path.suffixes))).write_text(path.read_text())
        report.main(report.Args((files[2], copy), tmp_path / "report"))


# ---- a sweep on a cluster ---------------------------------------------------------------------

SWEEP = """table2 --smoke --tasks Hopper-v4 --methods linear linear_neg --seeds 1 2
    --total-timesteps 6000""".split()


STARTED = []  # drivers


@pytest.fixture(scope="module")
def cluster(script):
    """Three nodes on this machine, two of them with one core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name in (name for name in script.env if name.startswith("JAX_")):
            patch.setenv(name, script.env[name])  # for the workers
        cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
        for process in STARTED:
            process.kill()
        cluster.shutdown()


def start(script, root, *flags):
    """The driver of a sweep; the fixture `cluster` ends it if a test does not."""
    command = [sys.executable, ROOT / "benchmark" / "run.py", *SWEEP, "--root", root, *flags]
    options = {"cwd": root.parent, "env": script.env, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    STARTED.append(subprocess.Popen([str(x) for x in command], **options, **pipes))
    return STARTED[-1]


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def modified(path):
    """Time of a file's last change; 0 if it is missing, as a checkpoint is between two renames."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0


def attempts(root):
    """{(name, pid)} of the last attempt at each run."""
    locks = sorted((root / "logs").glob("*__*.lock"))
    return {(lock.stem, lock.read_text().partition(" ")[2]) for lock in locks}


def await_training(root, process, known):
    """Name and pid of a run in the middle of an attempt that is not in `known`, and adds it there:
    it has trained, saved a checkpoint since its start, and is not near its end."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        for name, pid in sorted(attempts(root) - known):
            if not pid:
                continue
            log, saved = root / "logs" / f"{name}.log", root / name / "checkpoint.npz"
            began = "compiled in" in log.read_text().rpartition("=== ")[2]
            share = results.share_done(root / name, experiments.MUJOCO)
            fresh = modified(saved) > modified(log)
            if began and fresh and 0.1 < share < 0.9 and is_alive(int(pid)):
                known.add((name, pid))
                return name, int(pid)
        time.sleep(0.01)
    raise AssertionError(f"no run trains; driver: {process.communicate(timeout=60)}")


def finish(process):
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert "4 of 4 runs complete" in out


def test_killed_workers_nodes_and_drivers_leave_no_trace_in_the_results(script, cluster, tmp_path):
    whole, root, known = tmp_path / "whole", tmp_path / "killed", set()
    here = "--address", cluster.address
    finish(start(script, whole, *here))

    process = start(script, root, *here)
    one, pid = await_training(root, process, known)
    os.kill(parent(pid), signal.SIGKILL)  # its Ray worker

    two, pid = await_training(root, process, known)
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}
    cluster.remove_node(raylets[parent(parent(pid))], allow_graceful=False)
    cluster.add_node(num_cpus=1)

    three, pid = await_training(root, process, known)
    process.kill()  # the driver
    process.communicate()
    known |= attempts(root)  # the other run dies with it, and may still be saving

    process = start(script, root, *here)
    four, pid = await_training(root, process, known)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == 130 and not is_alive(pid)
    assert "stopped at step" in (root / "logs" / f"{four}.log").read_text()

    finish(start(script, root, *here))
    assert (root / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    assert len((root / "results.csv").read_text().splitlines()) == 1 + 4 * 20 * 3
    hits = [one, two, three, four]
    for name in hits:  # what was hit in its middle went on from there
        log = (root / "logs" / f"{name}.log").read_text()
        assert log.count("--run-dir") == 1 and log.count(".py --resume ") >= hits.count(name)
