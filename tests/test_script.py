"""The script as its users run it: what a run writes, signals, crashes, resume and bad input.

The runs of this file are scenarios: functions that two threads work off in the background, so
that both cores are used; a test waits for its scenario and looks at what it left.
"""

import json
import re
import shutil
import signal
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT, TINY
from tensorboardX.proto.event_pb2 import Event

import simpo_mujoco

EVAL_STEPS, EPISODES = (1000, 2000, 3000, 4000), 3
HOPPER = [*TINY, "--env-id", "Hopper-v4", "--neg-clip", "-0.05"]


# ---- scenarios --------------------------------------------------------------------------------


def await_checkpoints(process, run_dir, count):
    """Returns after the run has compiled and written `count` checkpoints, or has ended."""
    for line in process.stdout:
        if line.startswith("compiled"):
            break
    seen = set()
    while process.poll() is None and len(seen) <= count:
        try:
            seen.add((run_dir / "checkpoint.npz").stat().st_mtime_ns)
        except FileNotFoundError:  # before the first, and between the two renames of a later one
            seen.add(0)
        time.sleep(0.002)


def stop(process, run_dir, count, signum):
    """Sends a signal after `count` checkpoints -> exit code, stderr."""
    with process:
        await_checkpoints(process, run_dir, count)
        process.send_signal(signum)
        _, err = process.communicate(timeout=300)
    return process.returncode, err


def undisturbed(script, root):
    return script.run(*HOPPER, "--run-dir", "whole", cwd=root)


def alone(script, root):
    """The same run from a folder that holds the script and common.py only."""
    (root / "alone").mkdir()
    for name in ("simpo_mujoco.py", "common.py"):
        shutil.copy(ROOT / name, root / "alone")
    path = root / "alone" / "simpo_mujoco.py"
    return script.run(*HOPPER, "--run-dir", "run", cwd=root / "alone", script=path)


def other_seed(script, root):
    return script.run(*HOPPER, "--seed", 2, "--run-dir", "seed2", cwd=root)


def evaluated(script, root):
    return script.run("--evaluate", "whole", cwd=root)


def signalled(script, root):
    """SIGTERM, SIGINT, then a truncated checkpoint; "stopped" keeps a copy of the stopped run."""
    run_dir = root / "signalled"
    ends = [stop(script.start(*HOPPER, "--run-dir", run_dir, cwd=root), run_dir, 4, signal.SIGTERM)]
    shutil.copytree(run_dir, root / "stopped")
    ends += [stop(script.start("--resume", run_dir, cwd=root), run_dir, 3, signal.SIGINT)]
    newest = run_dir / "checkpoint.npz"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 3])
    return [*ends, script.run("--resume", run_dir, cwd=root)]


def killed(script, root):
    """kill -9 five times at random moments; the first comes before any checkpoint."""
    run_dir, rng, codes = root / "killed", np.random.default_rng(0), []
    flags = [*HOPPER, "--run-dir", run_dir]
    for count in (0, *rng.integers(1, 4, size=4)):
        with script.start(*flags, cwd=root) as process:
            await_checkpoints(process, run_dir, count)
            if count:
                time.sleep(rng.uniform(0, 0.15))  # anywhere between two checkpoints, or within one
            process.kill()
        codes.append(process.wait())
        flags = ["--resume", run_dir]
    return codes, script.run(*flags, cwd=root)


def seeds(script, root):
    """Seeds 1 and 2 as one program: undisturbed, and stopped twice, then seed 2 goes on alone."""
    flags = [*HOPPER, "--num-seeds", 2, "--run-dir"]
    whole = script.run(*flags, "seeds", cwd=root)
    folder = root / "seeds-stopped"
    process = script.start(*flags, folder, cwd=root)
    ends = [stop(process, folder / "seed-2", 3, signal.SIGKILL)]
    ends += [stop(script.start("--resume", folder, cwd=root), folder / "seed-2", 3, signal.SIGTERM)]
    shutil.copytree(folder / "seed-2", root / "alone-2")
    newest = folder / "seed-1" / "checkpoint.npz"  # as if killed between the two files
    newest.with_suffix(".previous.npz").replace(newest)
    return (
        whole,
        ends,
        script.run("--resume", folder, cwd=root),
        script.run("--resume", "alone-2", cwd=root),
    )


LATE = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import simpo_mujoco

def evaluate(args, state, key, step, *rest, evaluate=simpo_mujoco.evaluate):
    if step >= args.total_timesteps:
        os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(args, state, key, step, *rest)

simpo_mujoco.evaluate = evaluate
sys.exit(simpo_mujoco.main())
"""


def late(script, root):
    """SIGTERM during the last evaluation, then a resume."""
    path = root / "late.py"
    path.write_text(LATE)
    first = script.run(*HOPPER, "--run-dir", "late", cwd=root, script=path)
    return first, script.run("--resume", "late", cwd=root)


def pendulum(script, root):
    return script.run(*TINY, "--env-id", "Pendulum-v1", "--run-dir", "pendulum", cwd=root)


def own_env(script, root):
    return script.run(*TINY, "--env-id", "tiny_envs:Point-v0", cwd=root)


def nan_env(script, root):
    flags = ["--env-id", "tiny_envs:Nan-v0", "--run-dir", "nan"]
    return script.run(*TINY, *flags, cwd=root)


def refused(script, root):
    """Two kinds of bad input from a real shell: an argument's value, and an environment."""
    (root / "refused").mkdir()
    return [
        script.run(*flags, cwd=root / "refused")
        for flags in (["--neg-clip", "0.1"], ["--env-id", "Nonsense-v0"])
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def outcome(script, root):
    """outcome(scenario) -> what it returned. The first runs of a shape fill the compile cache."""
    with ThreadPoolExecutor(2) as pool:
        futures = {f: pool.submit(f, script, root) for f in (undisturbed, pendulum, refused)}
        futures[undisturbed].result()
        for f in (killed, signalled, seeds, late, alone, other_seed, evaluated, nan_env, own_env):
            futures[f] = pool.submit(f, script, root)
        yield lambda scenario: futures[scenario].result()


def arrays_of(path):
    """Name -> array of a checkpoint; its meta as a dict, less where the run lies."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(arrays.pop("meta").tobytes())
    meta["args"].pop("run_dir")
    return arrays, meta


def assert_same_end(run_dir, reference):
    """Bit-identical results: eval.csv, every array of the checkpoint, and its meta."""
    assert (run_dir / "eval.csv").read_bytes() == (reference / "eval.csv").read_bytes()
    (ours, meta), (theirs, meta_theirs) = (
        arrays_of(folder / "checkpoint.npz") for folder in (run_dir, reference)
    )
    assert meta == meta_theirs and ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype, name
        assert array.tobytes() == theirs[name].tobytes(), name


def read_scalars(run_dir):
    """{tag: {step: value}} of all TensorBoard files of a run."""
    scalars = {}
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while len(data) >= 16:  # length, its checksum, record, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
            data = data[16 + size :]
    return scalars


# ---- what a run writes ------------------------------------------------------------------------


def test_a_run_writes_its_folder(outcome, root):
    code, out, err = outcome(undisturbed)
    assert code == 0, err
    assert err == ""
    run_dir = root / "whole"
    names = {path.name for path in run_dir.iterdir() if "tfevents" not in path.name}
    expected = "args.json versions.json eval.csv checkpoint.npz checkpoint.previous.npz"
    assert names == set(expected.split())  # replay.dat is gone, no temporary file is left
    args = json.loads((run_dir / "args.json").read_text())
    assert args["neg_clip"] == -0.05 and args["hidden_dim"] == 32 and args["env_id"] == "Hopper-v4"
    versions = json.loads((run_dir / "versions.json").read_text())
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"jax", "gymnasium", "mujoco"} < set(versions)
    for step in EVAL_STEPS:
        assert re.search(rf"^step {step}: return \S+ \+- \S+ ", out, re.MULTILINE)


def read_evals(run_dir):
    header, *lines = (run_dir / "eval.csv").read_text().splitlines()
    assert header == "step,episode,return,length"
    return np.array([line.split(",") for line in lines], np.float64)


def test_eval_csv_has_a_row_for_each_episode(outcome, root):
    assert outcome(undisturbed)[0] == 0
    rows = read_evals(root / "whole")
    np.testing.assert_array_equal(rows[:, 0], np.repeat(EVAL_STEPS, EPISODES))
    np.testing.assert_array_equal(rows[:, 1], np.tile(range(EPISODES), 4))
    assert np.isfinite(rows).all() and (rows[:, 3] >= 1).all() and (rows[:, 3] <= 1000).all()
    assert len(np.unique(rows[:, 2])) == len(rows)


def test_tensorboard_file_holds_the_documented_tags(outcome, root):
    assert outcome(undisturbed)[0] == 0
    scalars = read_scalars(root / "whole")
    losses = {tag.removeprefix("losses/") for tag in scalars if tag.startswith("losses/")}
    assert losses >= {"q", "q_target", "critic_loss", "policy_loss", "spread", "noise"}
    assert losses >= {"lam", "kl", "w_max", "w_negative", "ess", "policy_grad_norm"}
    charts = {"charts/episodic_return", "charts/episodic_length", "charts/eval_return"}
    assert set(scalars) - {f"losses/{name}" for name in losses} == charts | {"charts/SPS"}
    for tag, values in scalars.items():
        assert np.isfinite(list(values.values())).all(), tag
    # 740 updates, logged every 400; the first follows the last random step
    assert sorted(scalars["losses/q"]) == [305, 305 + 400 * 5]
    rows = read_evals(root / "whole")
    assert sorted(scalars["charts/eval_return"]) == list(EVAL_STEPS)
    for step, mean in scalars["charts/eval_return"].items():
        assert mean == pytest.approx(rows[rows[:, 0] == step, 2].mean(), rel=1e-5)
    readme = ROOT / "README.md"
    if readme.exists() and "losses/" in readme.read_text():
        missing = [tag for tag in scalars if f"`{tag}`" not in readme.read_text()]
        assert not missing, "tags that README.md does not explain"


def test_checkpoint_is_plain_arrays(outcome, root):
    assert outcome(undisturbed)[0] == 0
    arrays, meta = arrays_of(root / "whole" / "checkpoint.npz")
    assert meta["step"] == 4000 and meta["script"] == "simpo_mujoco"
    assert int(arrays["state.step"]) == 740
    assert all(array.dtype != object and np.isfinite(array).all() for array in arrays.values())
    np.testing.assert_allclose(arrays["evals"], read_evals(root / "whole"), atol=1e-6)
    assert arrays_of(root / "whole" / "checkpoint.previous.npz")[1]["step"] == 3750


def test_same_seed_same_bytes_from_a_copy_of_two_files(outcome, root):
    """The script and common.py alone in an empty folder run, and run the same."""
    code, _, err = outcome(alone)
    assert code == 0, err
    assert outcome(undisturbed)[0] == 0
    assert_same_end(root / "alone" / "run", root / "whole")
    found = {path.name for path in (root / "alone").iterdir()}
    assert found - {"__pycache__"} == {"simpo_mujoco.py", "common.py", "run"}


def test_another_seed_another_run(outcome, root):
    code, _, err = outcome(other_seed)
    assert code == 0, err
    ours, theirs = read_evals(root / "seed2"), read_evals(root / "whole")
    np.testing.assert_array_equal(ours[:, :2], theirs[:, :2])
    assert (ours[:, 2] != theirs[:, 2]).all()


def test_evaluate_gives_the_last_rows_again(outcome, root):
    code, out, err = outcome(evaluated)
    assert code == 0, err
    last = read_evals(root / "whole")[-EPISODES:, 2]
    [line] = [line for line in out.splitlines() if line.startswith("step ")]
    assert line.startswith(f"step 4000: return {last.mean():.1f} +- {last.std():.1f} ")
    assert len(read_evals(root / "whole")) == 12  # nothing was added


def test_other_environments(outcome, root):
    """Pendulum-v1, and a user's own by module:Name, which has no render_mode."""
    for scenario in (pendulum, own_env):
        code, _, err = outcome(scenario)
        assert code == 0, err
    [own] = (root / "runs").iterdir()  # the default --run-dir
    assert re.fullmatch(r"tiny_envs-Point-v0__simpo_mujoco__1__\d{8}-\d{6}", own.name)
    for run_dir, length in ((root / "pendulum", 200), (own, 50)):
        rows = read_evals(run_dir)
        np.testing.assert_array_equal(rows[:, 0], np.repeat(EVAL_STEPS, EPISODES))
        assert (rows[:, 3] == length).all() and (rows[:, 2] < 0).all()
        assert set(read_scalars(run_dir)["charts/episodic_length"].values()) == {length}


# ---- signals, crashes, resume -----------------------------------------------------------------


def test_signals_save_and_a_damaged_checkpoint_falls_back(outcome, root):
    """SIGTERM ends with 143, SIGINT with 130, both after a checkpoint; the run then resumed, from
    the checkpoint before its truncated newest one, ends as the undisturbed run."""
    (term, term_err), (interrupt, interrupt_err), (code, _, err) = outcome(signalled)
    assert term == 128 + signal.SIGTERM and interrupt == 128 + signal.SIGINT
    for text in (term_err, interrupt_err):
        assert re.search(r"^stopped at step \d+; --resume \S+ goes on$", text)
    step = int(re.search(r"step (\d+)", term_err)[1])
    assert 0 < step < int(re.search(r"step (\d+)", interrupt_err)[1]) < 4000
    assert arrays_of(root / "stopped" / "checkpoint.npz")[1]["step"] == step
    assert code == 0 and err.startswith("warning: no usable checkpoint in ")
    assert err.count("\n") == 1 and "checkpoint.previous.npz" in err
    assert outcome(undisturbed)[0] == 0
    assert_same_end(root / "signalled", root / "whole")
    assert not (root / "signalled" / "replay.dat").exists()


def test_killed_five_times_ends_bit_identical(outcome, root):
    codes, (code, _, err) = outcome(killed)
    assert codes.count(-signal.SIGKILL) >= 4, codes  # the last ones may come after the end
    assert code == 0, err
    assert outcome(undisturbed)[0] == 0
    assert_same_end(root / "killed", root / "whole")


def test_seeds_side_by_side(outcome, root):
    """Two seeds as one program end as each by itself, up to the order of sums; killed, stopped and
    resumed, with one seed a checkpoint behind, they end bit-identical; one goes on alone."""
    (code, out, err), ends, (code_2, _, err_2), (code_3, _, err_3) = outcome(seeds)
    assert (code, err) == (0, "") and len(re.findall(r"^step 4000: ", out, re.MULTILINE)) == 2
    assert [end[0] for end in ends] == [-signal.SIGKILL, 128 + signal.SIGTERM]
    assert code_2 == code_3 == 0, (err_2, err_3)
    assert "but another seed has" in err_2
    assert outcome(undisturbed)[0] == outcome(other_seed)[0] == 0
    names = {path.name for path in (root / "seeds").iterdir()}
    assert names == {"args.json", "versions.json", "seed-1", "seed-2"}
    for seed, single in ((1, "whole"), (2, "seed2")):
        folder = root / "seeds" / f"seed-{seed}"
        ours, theirs = read_evals(folder), read_evals(root / single)
        np.testing.assert_array_equal(ours[:, :2], theirs[:, :2])
        first = ours[:, 0] == EVAL_STEPS[0]  # later the simulation has amplified the rounding
        np.testing.assert_allclose(ours[first], theirs[first], rtol=1e-2)
        arrays, meta = arrays_of(folder / "checkpoint.npz")
        assert (meta["step"], meta["args"]["seed"], meta["args"]["num_seeds"]) == (4000, seed, 1)
        assert arrays.keys() == arrays_of(root / single / "checkpoint.npz")[0].keys()
        assert_same_end(root / "seeds-stopped" / f"seed-{seed}", folder)
    ours, theirs = read_evals(root / "alone-2"), read_evals(root / "seeds" / "seed-2")
    np.testing.assert_array_equal(ours[:, :2], theirs[:, :2])


def test_a_run_stopped_in_its_last_evaluation_makes_it_when_resumed(outcome, root):
    (code, out, err), (code_2, out_2, err_2) = outcome(late)
    assert (code, err_2) == (128 + signal.SIGTERM, ""), (err, err_2)
    assert "step 3000: " in out and "step 4000: " not in out
    assert code_2 == 0 and "step 4000: " in out_2
    assert outcome(undisturbed)[0] == 0
    assert_same_end(root / "late", root / "whole")
    assert not (root / "late" / "replay.dat").exists()


def test_nan_reward_stops_the_run(outcome, root):
    code, out, err = outcome(nan_env)
    assert code == 1
    # NaN in step 77 of every environment: 76 x 5 transitions were stored, 0 is met first
    path = root / "nan" / "diverged.npz"
    pattern = r"error: reward of environment 0 is not finite at step 380; saved in nan/diverged.npz"
    assert re.fullmatch(pattern, err.strip()), err
    arrays, meta = arrays_of(path)
    assert meta["step"] == 380 and int(arrays["state.step"]) == 17  # that update ran beside it
    # the newest checkpoint was not replaced by the diverged state
    assert arrays_of(root / "nan" / "checkpoint.npz")[1]["step"] == 250


# ---- bad input --------------------------------------------------------------------------------


def assert_refused(code, err, *mentions):
    assert code == 2, err
    assert err.count("\n") == 1 and err.startswith("error: "), err
    for mention in mentions:
        assert mention in err, err


def test_bad_input_from_a_shell(outcome, root):
    (code, out, err), (code_env, out_env, err_env) = outcome(refused)
    assert_refused(code, err, "--neg-clip", "0.1")
    assert_refused(code_env, err_env, "--env-id", "Nonsense")
    assert out == out_env == ""
    assert list((root / "refused").iterdir()) == []


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(*flags) -> exit code, stderr of main() in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["simpo_mujoco.py", *map(str, flags)])
        code = simpo_mujoco.main()
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    "line",
    [
        "--neg-clip 0.1",
        "--neg-clip nan",
        "--neg-clip -inf",
        "--neg-clip -0.05 --weighting exp",
        "--eps-kl 4",
        "--eps-kl 0",
        "--eps-kl 0.7 --num-samples 2",
        "--num-samples 1",
        "--num-samples 0",
        "--total-timesteps -5",
        "--learning-starts 2000000",
        "--batch-size 30001",
        "--batch-size 0",
        "--buffer-size 255",
        "--power 2",
        "--power 0 --weighting power",
        "--gamma 1.5",
        "--tau 0",
        "--policy-lr-end 1",
        "--critic-lr nan",
        "--reward-scale inf",
        "--seed -1",
        "--num-seeds 0",
        "--num-seeds 2 --track",
        "--sampling-steps 21",
        "--sampling-steps 0",
        "--diffusion-steps 5",
        "--sampler euler",
        "--eval-episodes 0",
        "--eval-every -1",
        "--noise-start -0.1",
        "--num-devices 0",
        "--num-devices 3",
        "--resume missing",
        "--evaluate missing",
        "--resume a --evaluate b",
        "--env-id Nonsense-v0",
        "--env-id CartPole-v1",
        "--no-such-flag 1",
        "--weighting cubic",
        "--num-samples 1.5",
        "--seed",
    ],
)
def test_bad_input_is_one_line_that_names_the_flag(call, tmp_path, line):
    code, err = call(*line.split())
    assert_refused(code, err, line.split()[0])
    assert list(tmp_path.iterdir()) == []


def test_power_is_missed(call, tmp_path):
    assert_refused(*call("--weighting", "power"), "--power")
    assert list(tmp_path.iterdir()) == []


def test_run_dir_that_cannot_be_used(call, tmp_path):
    """A file at the folder or above it, a replay larger than the disk, a folder in use."""
    (tmp_path / "file").write_text("kept")
    for path in ("file", "file/below"):
        assert_refused(*call(*TINY, "--run-dir", path), "--run-dir", path)
    line = "--buffer-size 1000000000000 --total-timesteps 1000000000000 --run-dir large"
    assert_refused(*call(*TINY, *line.split()), "--buffer-size")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("kept")
    assert_refused(*call(*TINY, "--run-dir", "used"), "--run-dir", "used")
    assert sorted(x.name for x in tmp_path.rglob("*")) == ["file", "notes.txt", "used"]


def test_resume_of_what_does_not_fit(call, outcome, root, tmp_path):
    """Other arguments, other networks, another script, pickles, no replay: all exit 2."""
    outcome(signalled)
    run_dir = tmp_path / "run"
    shutil.copytree(root / "stopped", run_dir)
    checkpoint, args = run_dir / "checkpoint.npz", run_dir / "args.json"
    (run_dir / "checkpoint.previous.npz").unlink()
    whole, saved = checkpoint.read_bytes(), json.loads(args.read_text())
    arrays = dict(np.load(checkpoint))

    assert_refused(*call("--resume", run_dir, "--seed", 9), "--seed 9", "--resume")
    assert_refused(*call("--evaluate", run_dir, "--num-samples", 5), "--num-samples 5")

    args.write_text(json.dumps(saved | {"hidden_dim": 16}))
    assert_refused(*call("--resume", run_dir), "checkpoint.npz")
    args.write_text(json.dumps(saved | {"hidden_dims": 16}))
    assert_refused(*call("--resume", run_dir), "--resume")
    args.write_text(json.dumps(saved | {"gamma": 7}))
    assert_refused(*call("--resume", run_dir), "--gamma")
    args.write_text("[]")
    assert_refused(*call("--resume", run_dir), "--resume")
    args.write_text(json.dumps(saved))

    meta = json.loads(arrays["meta"].tobytes())
    for changed in (
        {"meta": np.frombuffer(json.dumps(meta | {"script": "x"}).encode(), np.uint8)},
        {"meta": np.array([object()])},  # a pickle
        {"state.theta['net'][0]['w']": np.zeros((2, 2), np.float32)},
    ):
        np.savez(checkpoint, **(arrays | changed))
        assert_refused(*call("--resume", run_dir), "checkpoint.npz")
    for damaged in (whole[: len(whole) // 2], b"", whole[:-200], b"text"):
        checkpoint.write_bytes(damaged)
        assert_refused(*call("--evaluate", run_dir), "checkpoint.npz")

    checkpoint.write_bytes(whole)
    (run_dir / "replay.dat").unlink()
    assert_refused(*call("--resume", run_dir), "replay.dat")
    assert checkpoint.read_bytes() == whole


def test_resume_of_a_complete_run_says_so(call, outcome, root, capsys):
    assert outcome(undisturbed)[0] == 0
    before = (root / "whole" / "checkpoint.npz").read_bytes()
    code, err = call("--resume", root / "whole")
    assert (code, err) == (0, "")
    assert (root / "whole" / "checkpoint.npz").read_bytes() == before
