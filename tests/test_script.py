"""simpo_mujoco.py as it is run: what it writes, kill -9, resume, films, errors."""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import types

import imageio.v2 as imageio
import jax
import numpy as np
import pytest
import tiny_envs
from conftest import (
    POINT,
    ROOT,
    arrays_of,
    assert_equal_arrays,
    assert_refused,
    open_replay,
    read_evals,
    run_main,
    stop_after,
)
from numpy.testing import assert_array_equal
from tensorboardX.proto.event_pb2 import Event

import simpo_mujoco
from simpo_mujoco import (
    EVAL_SEED,
    Args,
    evaluate,
    init_state,
    load,
    make_envs,
    make_run_dir,
    parse_args,
    read_args,
    save,
    shardings,
)

FORK = pytest.mark.filterwarnings("ignore:.*fork")  # by imageio, which starts ffmpeg
pytestmark = [FORK, pytest.mark.usefixtures("quick_compiler")]
RUN = [*POINT, "--run-dir", "run"]
RANDOM = [
    *RUN,
    "--learning-starts",
    "2000",
    "--eval-episodes",
    "1",
]  # for what is early


def call(root, *flags):
    """-> exit code, stdout, stderr of main in a folder, which it makes."""
    root.mkdir(exist_ok=True)
    return run_main(simpo_mujoco, *flags, cwd=root)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(root, quick_compiler):
    """An undisturbed run -> folder, stdout, seeds of resets."""
    tiny_envs.Point.seeds.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simpo_mujoco, "LOG_EVERY", 400)
        code, out, err = call(root / "whole", *RUN)
    assert code == 0, err
    return root / "whole" / "run", out + err, list(tiny_envs.Point.seeds)


@pytest.fixture
def copy(whole, tmp_path):
    """The folder of `whole`, to be changed, with a replay as if it had not ended."""
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    (run / "replay.dat").write_bytes(bytes(600 * 36))
    return run


def change_args(run, **changes):
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(args | changes))


# ---- what a run writes ---------------------------------------------------------------


def test_a_run_writes_its_folder_and_says_how_it_goes(whole):
    run, out, seeds = whole
    names = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    assert names == {"args.json", "versions.json", "eval.csv", "checkpoint.npz"}
    args = json.loads((run / "args.json").read_text())
    assert args["neg_clip"] == -0.05
    assert args["env_id"] == "tiny_envs:Point-v0"
    versions = json.loads((run / "versions.json").read_text())
    assert {"jax", "gymnasium", "mujoco", "devices"} < set(versions)
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", versions["commit"])
    else:
        assert versions["commit"] is None

    rows = read_evals(run)
    expected = [[step, i] for step in (0, 1200, 2400) for i in (0, 1)]
    assert_array_equal(rows[:, :2], expected)
    assert (rows[:, 3] == 50).all()
    assert (rows[:, 2] < 0).all()
    assert len(set(rows[:, 2])) == 6
    for step in (0, 1200, 2400):
        ret = rows[rows[:, 0] == step, 2]
        line = f"step {step}: return {ret.mean():.1f} +- {ret.std():.1f}"
        assert line in out
    assert re.search(r"^done: .*TensorBoard events are in run$", out, re.M)


def test_seeds_of_episodes(whole):
    """Evaluations start alike every time; only the first training episodes have one."""
    seeds = whole[2]
    starts = [EVAL_SEED, EVAL_SEED + 1]
    training = [seed for seed in seeds if seed not in starts]
    assert [seed for seed in seeds if seed in starts] == 3 * starts
    assert len(set(training)) == len(training) == 5
    assert max(seeds) < 2**31


def events(run):
    """{tag: {step: value}} of all TensorBoard files of a run."""
    scalars = {}
    for path in sorted(run.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while len(data) >= 16:  # length, its checksum, record, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
            data = data[16 + size :]
    return scalars


def test_tensorboard_file_holds_the_documented_tags(whole):
    scalars = events(whole[0])
    losses = {tag for tag in scalars if tag.startswith("losses/")}
    charts = {tag for tag in scalars if tag.startswith("charts/")}
    assert set(scalars) == losses | charts
    assert len(losses) == 10
    for name in ("q", "critic_loss", "policy_loss", "spread", "lam", "kl", "ess"):
        assert sorted(scalars[f"losses/{name}"]) == list(range(400, 2401, 400))
    names = {"episodic_return", "episodic_length", "eval_return"}
    assert charts == {f"charts/{name}" for name in names}
    rows = read_evals(whole[0])
    assert set(scalars["charts/eval_return"]) == {0, 1200, 2400}
    for step, mean in scalars["charts/eval_return"].items():
        assert mean == pytest.approx(rows[rows[:, 0] == step, 2].mean(), rel=1e-5)
    # episodes of 50 steps, of five environments, in 2400 steps
    lengths = scalars["charts/episodic_length"]
    assert set(lengths) == set(scalars["charts/episodic_return"])
    assert len(lengths) == 9
    assert set(lengths.values()) == {50.0}
    page = (ROOT / "docs" / "mujoco.md").read_text()
    assert not [tag for tag in scalars if f"`{tag}`" not in page]


def test_checkpoint_is_plain_arrays(whole, tmp_path, monkeypatch):
    arrays = arrays_of(whole[0])
    assert arrays["env_step"] == 2400
    assert arrays[".step"] == 460
    for name, array in arrays.items():
        assert array.dtype != object, name
        assert np.isfinite(array).all(), name
    shutil.copy(whole[0] / "checkpoint.npz", tmp_path)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: sys.exit(137))
    with pytest.raises(SystemExit):  # within a save
        save(tmp_path / "checkpoint.npz", {"x": np.zeros(9)}, 7)
    assert arrays_of(tmp_path)["env_step"] == 2400


@pytest.fixture
def evaluate_at(whole, tmp_path):
    """evaluate_at(step), two episodes into the file eval.csv of tmp_path."""
    args = read_args(whole[0])
    envs, *_ = make_envs(args, 2)
    state = init_state(args, 3, 1, jax.random.key(0))

    def run(step):
        evaluate(args, envs, state, jax.random.key(step), step, tmp_path / "eval.csv")

    return run


def test_rows_of_an_evaluation_keep_nine_digits_and_stand_once(evaluate_at, tmp_path):
    for step in (0, 5, 10):
        evaluate_at(step)
    first = (tmp_path / "eval.csv").read_text().splitlines()
    assert len(first) == 7
    assert re.fullmatch(r"0,0,-\d+\.\d+,50", first[1])
    assert 8 <= len(re.sub(r"\D", "", first[1].split(",")[2])) <= 9
    evaluate_at(5)  # as a resumed run does
    assert (tmp_path / "eval.csv").read_text().splitlines() == first[:5]


@pytest.mark.parametrize("text", ["", "step,episode,return,length\n"])
def test_a_file_of_evaluations_without_a_row_is_continued(evaluate_at, tmp_path, text):
    (tmp_path / "eval.csv").write_text(text)
    evaluate_at(5)
    assert read_evals(tmp_path)[:, :2].tolist() == [[5, 0], [5, 1]]


# ---- play ----------------------------------------------------------------------------


def test_evaluate_gives_the_last_rows_again_and_a_film(whole, tmp_path):
    """The checkpoint has but what plays."""
    run = tmp_path / "100%-run"
    shutil.copytree(whole[0], run)
    needed = (".theta_old[", ".critics[", ".step", "env_step")
    arrays = arrays_of(run)
    arrays = {name: x for name, x in arrays.items() if name.startswith(needed)}
    np.savez(run / "checkpoint.npz", **arrays)
    code, out, err = call(tmp_path, "--evaluate", "100%-run", "--capture-video")
    assert code == 0, err
    last = read_evals(whole[0])[-2:]
    assert_array_equal(read_evals(run, "evaluate.csv"), last)
    assert f"step 2400: return {last[:, 2].mean():.1f}" in out
    assert "evaluate.csv and films are in 100%-run" in out
    frames = np.array(imageio.mimread(run / "film-2400.mp4"))
    assert frames.shape == (50, 32, 48, 3)
    assert (run / "eval.csv").read_bytes() == (whole[0] / "eval.csv").read_bytes()


def test_evaluate_takes_flags_that_training_would_refuse(copy):
    change_args(copy, eps_kl=0.9)
    flags = "--evaluate run --eval-episodes 3 --num-samples 2".split()
    code, _, err = call(copy.parent, *flags)
    assert code == 0, err
    assert len(read_evals(copy, "evaluate.csv")) == 3


def test_flags_of_evaluate_are_checked_beside_those_of_the_run(copy):
    """30 of 50 noise levels, where the defaults have 20."""
    change_args(copy, diffusion_steps=50)
    flags = "--evaluate run --sampling-steps 30 --eval-episodes 1".split()
    code, _, err = call(copy.parent, *flags)
    assert code == 0, err
    code, _, err = call(copy.parent, "--evaluate", "run", "--sampling-steps", 51)
    assert code == 2
    assert "--sampling-steps" in err


# ---- kill -9, Ctrl-C, resume ---------------------------------------------------------


def test_the_interval_of_evaluations_changes_nothing(whole, root):
    """Two undisturbed runs of one seed end with the same bits."""
    code, _, err = call(root / "often", *RUN, "--eval-every", "300")
    assert code == 0, err
    run = root / "often" / "run"
    assert_equal_arrays(arrays_of(run), arrays_of(whole[0]))
    rows = read_evals(run)
    assert list(rows[::2, 0]) == list(range(0, 2401, 300))
    common = np.isin(rows[:, 0], [0, 1200, 2400])
    assert_array_equal(rows[common], read_evals(whole[0]))


def test_a_reward_that_comes_late_is_seen_between_short_intervals(root):
    """The only reward is at the end of episodes of 50 steps, an interval has 20."""
    flags = ["--env-id", "tiny_envs:Late-v0", "--eval-every", "100"]
    stop_after(10 * (50 + 100))
    code, _, err = call(root / "late", *RANDOM, *flags)
    assert code == 1, err
    run = root / "late" / "run"
    replay = open_replay(run)
    assert (replay["reward"] == 1).sum() >= 10
    assert (read_evals(run)[:, 2] == 1).all()


def test_a_killed_run_is_continued_from_its_last_save(whole, root, twin, monkeypatch):
    """kill -9 in step 1300; each evaluation stands once; its W&B run goes on."""
    run = root / "killed" / "run"
    run.parent.mkdir()
    twin.env["KILL_AFTER"] = str(2 * 100 + 1300)  # two evaluations, and training
    code, out, err = twin.run(*RUN, cwd=run.parent)
    assert code == -signal.SIGKILL, (out, err)
    assert arrays_of(run)["env_step"] == 1200
    assert np.abs(open_replay(run)["act"]).max() == 1  # noisy ones are clipped

    init = {}
    wandb = types.SimpleNamespace(init=init.update)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tiny_envs.Point.seeds.clear()
    code, out, err = call(run.parent, "--resume", "run", "--track")
    assert code == 0, err
    rows = read_evals(run)
    reference = read_evals(whole[0])
    assert_array_equal(rows[:4], reference[:4])
    assert_array_equal(rows[:, :2], reference[:, :2])
    arrays = arrays_of(run)
    assert arrays["env_step"] == 2400
    assert arrays[".step"] == 460
    assert not (run / "replay.dat").exists()
    assert not set(tiny_envs.Point.seeds) & set(whole[2]) - {EVAL_SEED, EVAL_SEED + 1}
    assert init["id"] == "run"
    assert init["resume"] == "allow"
    assert init["config"] == vars(read_args(run)) | {"resume": "run", "track": True}


@pytest.mark.parametrize("steps,rows", [(100 + 1200 + 33, 2), (200 + 1200 + 33, 4)])
def test_ctrl_c_says_how_to_continue(whole, root, steps, rows):
    """In the evaluation at step 1200, whose rows the resumed run writes, and then."""
    folder = root / f"stopped-{steps}"
    stop_after(steps)
    code, out, err = call(folder, *RUN)
    assert code == 1
    assert err.splitlines()[-1] == "stopped; continue with --resume run"
    assert "Traceback" not in err
    run = folder / "run"
    assert arrays_of(run)["env_step"] == 1200
    assert len(read_evals(run)) == rows
    stop_after(100 + 33)
    assert call(folder, "--resume", "run")[0] == 1
    assert_array_equal(read_evals(run), read_evals(whole[0])[:4])


def test_only_two_flags_stand_beside_resume(copy, monkeypatch):
    flags = ["--resume", str(copy), "--capture-video", "--track"]
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    args = parse_args()
    assert args.capture_video
    assert args.track
    assert args.gamma == 0.5
    for flags in (["--gamma", "0.9"], ["--eval-every", "77"], ["--seed=2"]):
        result = call(copy.parent, "--resume", "run", *flags)
        assert_refused(result, "--resume takes only --track and --capture-video")


def test_a_folder_of_other_flags_is_refused(copy):
    """As one that another version made, which names its commit."""
    commit = json.loads((copy / "versions.json").read_text())["commit"]
    args = json.loads((copy / "args.json").read_text())
    del args["act_samples"]
    args["checkpoint_every"] = 1000
    (copy / "args.json").write_text(json.dumps(args))
    for flag in ("--resume", "--evaluate"):
        result = call(copy.parent, flag, "run")
        assert_refused(result, "act_samples, checkpoint_every", f"commit {commit}")


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_what_is_no_run_folder(copy, flag):
    result = call(copy.parent, flag, "missing")
    assert_refused(result, "No such file", "missing/args.json")


def test_an_empty_name_of_a_folder_starts_no_run(tmp_path):
    """As of a shell's variable that is not set."""
    assert_refused(call(tmp_path, "--resume=", *RUN), "args.json")
    assert list(tmp_path.iterdir()) == []


def test_track_without_wandb_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert_refused(call(tmp_path, *RUN, "--track"), "wandb")


def test_a_folder_without_a_checkpoint_is_refused(copy):
    (copy / "checkpoint.npz").unlink()
    result = call(copy.parent, "--resume", "run")
    assert_refused(result, "No such file", "run/checkpoint.npz")


def test_a_checkpoint_of_other_networks_is_not_loaded(copy):
    args = read_args(copy)
    state = init_state(args, 8, 2, jax.random.key(0))
    with pytest.raises(ValueError, match="reshape"):
        load(copy / "checkpoint.npz", state)


def test_one_process_trains_in_a_folder(copy):
    with (copy / "args.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = call(copy.parent, "--resume", "run")
    assert_refused(result, "another process trains in run")


def test_a_complete_run_and_one_without_a_replay_only_play(copy):
    (copy / "replay.dat").unlink()
    code, out, err = call(copy.parent, "--resume", "run")
    assert code == 0, err
    assert out == "run is complete, or has no replay; --evaluate plays it\n"


# ---- environments, films, run folders ------------------------------------------------


def test_an_environment_of_the_working_directory(whole, root):
    """`module:Name`, the default run folder, another seed: the same starts."""
    own = root / "own"
    own.mkdir()
    (own / "own_module.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Own-v0', 'tiny_envs:Point', max_episode_steps=50)\n"
    )
    tiny_envs.Point.seeds.clear()
    stop_after(2 * 50 + 10)
    flags = ["--env-id", "own_module:Own-v0", "--seed", 2**32 - 1]
    code, out, err = call(own, *POINT, *flags)
    assert code == 1, err
    [run] = (own / "runs").iterdir()
    name = r"own_module-Own-v0__simpo_mujoco__4294967295__\d{8}-\d{6}"
    assert re.fullmatch(name, run.name)
    assert max(tiny_envs.Point.seeds) < 2**31
    ours = read_evals(run)
    theirs = read_evals(whole[0])[:2]
    assert_array_equal(ours[:, [0, 1, 3]], theirs[:, [0, 1, 3]])
    assert (ours[:, 2] != theirs[:, 2]).all()


@pytest.mark.parametrize(
    "kind", ["Whole", "Bytes", "Halves", "CSeed", "Faint", "Plain"]
)
def test_unusual_environments_are_trained(root, kind):
    stop_after(50 + 300)
    flags = ["--env-id", f"tiny_envs:{kind}-v0"]
    code, _, err = call(root / kind, *RANDOM, *flags)
    assert code == 1 and "stopped" in err, err
    [row] = read_evals(root / kind / "run")
    assert row[3] == 50
    assert row[2] < 0
    if kind == "Faint":
        [text] = (root / kind / "run" / "eval.csv").read_text().splitlines()[1:]
        assert re.fullmatch(r"0,0,-\d\.\d{6,8}e-0\d,50", text)


@pytest.mark.parametrize("kind", ["Nan", "Beyond"])
def test_an_environment_that_is_not_finite_ends_with_code_3(root, twin, kind):
    """In one line."""
    folder = root / kind
    folder.mkdir()
    flags = ["--env-id", f"tiny_envs:{kind}-v0"]
    code, _, err = twin.run(*RANDOM, *flags, cwd=folder)
    assert code == 3, err
    assert err.splitlines()[-1] == "error: observation is not finite"
    assert "Traceback" not in err
    assert not (folder / "run" / "eval.csv").exists()


def test_a_reward_that_is_not_finite_ends_training(root, monkeypatch):
    monkeypatch.setattr(tiny_envs.Nan, "kind", "reward")
    monkeypatch.setattr(simpo_mujoco, "EVAL_STEPS", 5)  # it comes at step 7
    result = call(root / "reward", *RANDOM, "--env-id", "tiny_envs:Nan-v0")
    assert result[0] == 3
    assert result[2].splitlines()[-1] == "error: reward is not finite"


def test_divergence_ends_with_code_3(root):
    code, _, err = call(root / "huge", *RUN, "--env-id", "tiny_envs:Huge-v0")
    assert code == 3
    assert re.search(r"^error: \w+ is not finite\n\Z", err, re.M), err
    assert np.isfinite(read_evals(root / "huge" / "run")).all()


def test_an_evaluation_without_a_time_limit_ends(root, monkeypatch):
    monkeypatch.setattr(simpo_mujoco, "EVAL_STEPS", 30)
    stop_after(30 + 10)
    code, _, _ = call(root / "endless", *RANDOM, "--env-id", "tiny_envs:Endless-v0")
    assert code == 1
    assert read_evals(root / "endless" / "run")[0, 3] == 30


def test_an_environment_that_cannot_be_filmed_is_refused(tmp_path):
    flags = ["--env-id", "tiny_envs:NoRenderMode-v0", "--capture-video"]
    result = call(tmp_path, *RANDOM, *flags)
    assert_refused(result, "NoRenderMode", "render")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["file", "file/below", "used", "x" * 300])
def test_run_folders_that_cannot_be_made(tmp_path, path):
    """A file at the folder or above it, a folder in use, a name that is too long."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "used").mkdir()
    assert_refused(call(tmp_path, *POINT, "--run-dir", path), path)
    assert sorted(x.name for x in tmp_path.rglob("*")) == ["file", "used"]


# ---- flags ---------------------------------------------------------------------------


def test_the_bound_on_the_kl_follows_from_the_number_of_samples():
    assert Args(num_samples=32).kl_bound == 1.5
    assert Args().kl_bound == pytest.approx(1.5 / np.log(32) * np.log(8))
    assert Args(eps_kl=2.0).kl_bound == 2.0


@pytest.mark.parametrize(
    "flags,mention",
    [
        ("--neg-clip 0.1", "--neg-clip must be at most 0"),
        ("--neg-clip nan", "--neg-clip must be at most 0"),
        ("--neg-clip -0.05 --weighting exp", "--neg-clip is for linear, square"),
        ("--eps-kl 4", "--eps-kl must be below the log of --num-samples"),
        ("--eps-kl 0.7 --num-samples 2", "--eps-kl"),
        ("--num-samples 1", "--num-samples"),
        ("--num-samples 1.5", "--num-samples"),
        ("--total-timesteps -5", "--total_timesteps must be at least 1"),
        ("--total-timesteps 10000", "--total-timesteps must be at least --lear"),
        ("--learning-starts 2000000", "--total-timesteps must be at least --lear"),
        ("--num-envs 2000000", "--total-timesteps must be at least --lear"),
        ("--num-samples 0", "--num_samples must be at least 1"),
        ("--learning-starts 0", "--learning_starts must be at least 1"),
        ("--buffer-size 0", "--buffer_size"),
        ("--batch-size 0", "--batch_size"),
        ("--eval-episodes 0", "--eval_episodes"),
        ("--eval-every -1", "--eval_every"),
        ("--critic-lr nan", "--critic_lr must be at least 0"),
        ("--gamma -0.1", "--gamma must be at least 0"),
        ("--tau -1", "--tau must be at least 0"),
        ("--seed", "--seed"),
        ("--seed -1", "--seed must be at least 0"),
        (f"--seed {2**32}", "--seed must be below 2^32"),
        ("--sampling-steps 1", "--sampling-steps must be in [2, --diffusion-steps]"),
        ("--sampling-steps 21", "--sampling-steps must be in [2, --diffusion-steps]"),
        ("--diffusion-steps 3", "--sampling-steps must be in [2, --diffusion-steps]"),
        ("--sampler euler", "--sampler"),
        ("--weighting cubic", "--weighting"),
        ("--no-such-flag 1", "--no-such-flag"),
    ],
)
def test_bad_input_names_its_flag(tmp_path, flags, mention):
    stop_after(30)  # where it is not refused
    code, _, err = call(tmp_path, "--env-id", "tiny_envs:Point-v0", *flags.split())
    assert code == 2, err
    assert mention in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


DEVICES = """
import jax, {name} as script
print(jax.config.jax_num_cpu_devices)
print(script.shardings(script.Args(batch_size=840))[1].num_devices)
"""


@pytest.mark.parametrize("batch_size,count", [(256, 2), (7, 1), (1, 1)])
def test_a_batch_is_split_over_as_many_cores_as_divide_it(batch_size, count):
    assert len(jax.devices()) == 2
    whole, split = shardings(Args(batch_size=batch_size))
    assert whole.num_devices == split.num_devices == count


@pytest.mark.parametrize("name", ["simpo_mujoco", "simpo_dmc"])
def test_every_core_is_a_device_and_importing_sets_nothing(tmp_path, name):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    del env["JAX_NUM_CPU_DEVICES"]
    done = subprocess.run(
        [sys.executable, "-c", DEVICES.format(name=name)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    before, count = map(int, done.stdout.split())
    cores = len(os.sched_getaffinity(0))
    assert before == -1
    assert count == max(n for n in range(1, cores + 1) if 840 % n == 0)


def test_flags_of_a_run_are_those_that_were_written(tmp_path):
    args = dataclasses.replace(Args(), seed=7, eps_kl=0.5, run_dir=str(tmp_path / "x"))
    run = make_run_dir(args)
    assert read_args(run) == args
