"""The trainer as its users run it: what a run writes, signals, kill -9, resume, films, errors."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import imageio.v2 as imageio
import numpy as np
import pytest
import tiny_envs
from conftest import (
    POINT,
    ROOT,
    arrays_of,
    assert_refused,
    assert_same_end,
    pairs,
    read_evals,
    run_main,
    stop_after,
)
from tensorboardX.proto.event_pb2 import Event

import simpo_mujoco
from simpo_mujoco import Args, create_run_dir, parse_args, save

FORK = pytest.mark.filterwarnings("ignore:os.fork")  # by imageio, which starts ffmpeg
pytestmark = [FORK, pytest.mark.usefixtures("quick_compiler")]
RUN = [*POINT, "--run-dir", "run"]
RANDOM = [*RUN, "--learning-starts", "2000", "--eval-episodes", "1"]  # for what comes before
FAKE_WANDB = "import json; init = lambda **kw: open('wandb.json', 'w').write(json.dumps(kw))"


def call(root, *flags):
    """-> exit code, stdout, stderr of main in a folder, which it makes."""
    root.mkdir(exist_ok=True)
    return run_main(simpo_mujoco, *flags, cwd=root)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(root, quick_compiler):
    """An undisturbed run -> folder, stdout, environments opened and closed, seeds of resets."""
    before = np.array([tiny_envs.Point.opened, tiny_envs.Point.closed])
    tiny_envs.Point.seeds.clear()
    code, out, err = call(root / "whole", *RUN)
    assert code == 0 and err == "", err
    counts = np.array([tiny_envs.Point.opened, tiny_envs.Point.closed]) - before
    return root / "whole" / "run", out, counts, list(tiny_envs.Point.seeds)


# ---- what a run writes ------------------------------------------------------------------------


def test_a_run_writes_its_folder_and_says_how_it_goes(whole):
    run_dir, out, counts, seeds = whole
    names = {path.name for path in run_dir.iterdir() if "tfevents" not in path.name}
    assert names == {"args.json", "versions.json", "eval.csv", "checkpoint.npz"}
    args = json.loads((run_dir / "args.json").read_text())
    assert (args["neg_clip"], args["env_id"]) == (-0.05, "tiny_envs:Point-v0")
    versions = json.loads((run_dir / "versions.json").read_text())
    assert {"jax", "gymnasium", "mujoco", "commit"} < set(versions)
    assert re.fullmatch("[0-9a-f]{40}", versions["commit"]) or not (ROOT / ".git").exists()
    rows = read_evals(run_dir)
    np.testing.assert_array_equal(rows[:, :2], [[s, e] for s in (0, 1200, 2400) for e in (0, 1)])
    assert (rows[:, 3] == 50).all() and (rows[:, 2] < 0).all() and len(set(rows[:, 2])) == 6
    for step in (0, 1200, 2400):
        ret = rows[rows[:, 0] == step, 2]
        assert f"step {step}: return {ret.mean():.1f} +- {ret.std():.1f}" in out
    assert out.index("step 0: ") < out.index("compiling") < out.index("step 1200: ")
    assert re.search(r"^step 2105, \d+ steps a second, \d\.\d hours left$", out, re.M)
    assert (counts == 5 + 3 * 2).all()  # each environment was closed
    others = [x for x in seeds if x not in (2**31, 2**31 + 1)]
    assert seeds.count(2**31) == seeds.count(2**31 + 1) == 3  # the same starts every time
    assert len(set(others)) == len(others) == 5 * 8 and max(others) < 2**31


def events(run_dir):
    """{tag: {step: value}} of all TensorBoard files of a run, and its texts."""
    scalars, texts = {}, ""
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while len(data) >= 16:  # length, its checksum, record, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            for value in event.summary.value:
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
                texts += "".join(x.decode() for x in value.tensor.string_val)
            data = data[16 + size :]
    return scalars, texts


def test_tensorboard_file_holds_the_documented_tags_and_the_arguments(whole):
    scalars, texts = events(whole[0])
    losses = {tag for tag in scalars if tag.startswith("losses/")}
    assert {f"losses/{x}" for x in "q critic_loss policy_loss spread".split()} < losses
    assert {f"losses/{x}" for x in "lam kl w_max w_negative ess".split()} < losses
    charts = {f"charts/{x}" for x in ("episodic_return", "eval_return", "SPS")}
    assert {tag for tag in scalars if "text" not in tag} == losses | charts
    assert sorted(scalars["losses/q"]) == [100 + 401 * 5]  # 460 updates, logged every 400
    rows = read_evals(whole[0])
    for step, mean in scalars["charts/eval_return"].items():
        assert mean == pytest.approx(rows[rows[:, 0] == step, 2].mean(), rel=1e-5)
    assert set(scalars["charts/eval_return"]) == {0, 1200, 2400}
    # each checkpoint begins new episodes: one of 50 steps in the 300 of five environments
    assert set(scalars["charts/episodic_return"]) == {250 + 300 * i for i in range(8)}
    assert "env_id: tiny_envs:Point-v0" in texts
    page = (ROOT / "docs" / "mujoco.md").read_text()
    assert not [tag for tag in losses | charts if f"`{tag}`" not in page]


def test_checkpoint_is_plain_arrays(whole, tmp_path, monkeypatch):
    arrays = arrays_of(whole[0])
    assert arrays["env_step"] == 2400 and arrays[".step"] == 460
    assert all(x.dtype != object and np.isfinite(x).all() for x in arrays.values())
    shutil.copy(whole[0] / "checkpoint.npz", tmp_path)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: sys.exit(137))
    with pytest.raises(SystemExit):  # within a save
        save(tmp_path / "checkpoint.npz", {"x": np.zeros(9)}, 7)
    assert arrays_of(tmp_path)["env_step"] == 2400


def test_evaluate_gives_the_last_rows_again_and_a_film(whole, tmp_path):
    """It opens the environments that it steps; the checkpoint has but what it needs."""
    run, last = tmp_path / "100%-run", read_evals(whole[0])[-2:]
    shutil.copytree(whole[0], run)
    names = (".theta_old[", ".critics[", ".step", "env_step")
    needed = {k: x for k, x in arrays_of(run).items() if k.startswith(names)}
    np.savez(run / "checkpoint.npz", **needed)
    before = tiny_envs.Point.opened
    flags = "--evaluate 100%-run --capture-video --noise-start 9 --noise-end 9".split()
    code, out, err = call(tmp_path, *flags)  # noise is for training
    assert code == 0, err
    np.testing.assert_array_equal(read_evals(run, "evaluate.csv"), last)
    assert f"step 2400: return {last[:, 2].mean():.1f}" in out
    frames = np.array(imageio.mimread(run / "film-2400.mp4"))
    assert frames.shape == (50, 32, 48, 3) and tiny_envs.Point.opened == before + 2
    flags = "--evaluate 100%-run --eval-episodes 3 --num-samples 2 --eps-kl 0.3".split()
    assert call(tmp_path, *flags)[0] == 0
    assert len(read_evals(run, "evaluate.csv")) == 3 and len(read_evals(run)) == 6


# ---- signals, kill -9, resume -----------------------------------------------------------------


def test_killed_and_resumed_ends_bit_identical(whole, root, twin):
    """kill -9 in a copy of the files with JAX_ENABLE_X64=1, in step 1300; its W&B run goes on."""
    run = root / "killed"
    run.mkdir()
    for name in ("simpo_mujoco.py", "common.py"):
        shutil.copy(ROOT / name, run)
    (run / "wandb.py").write_text(FAKE_WANDB)
    twin.env["KILL_AFTER"] = str(2 * 100 + 1300)  # two evaluations, and training to step 1300
    code, out, err = twin.run(*RUN, cwd=run, script=run / "simpo_mujoco.py")
    assert code == -signal.SIGKILL, (out, err)
    assert arrays_of(run / "run")["env_step"] == 1200
    rows = np.fromfile(run / "run" / "replay.dat", np.float32).reshape(-1, 9)
    assert 1 < np.abs(rows[:, 6]).max() < 3  # actions are noisy; the environment clips them
    code, out, err = call(run, "--resume", "run", "--track")
    assert code == 0, err
    assert "step 1200: " in out and "step 2400: " in out and "step 0: " not in out
    assert_same_end(run / "run", whole[0])
    del sys.modules["wandb"]
    wandb = json.loads((run / "wandb.json").read_text())
    assert (wandb["id"], wandb["resume"]) == ("run", "allow")


@pytest.mark.parametrize("signum,where", [(signal.SIGTERM, "training"), (signal.SIGINT, "eval")])
def test_a_signal_saves_and_a_resume_goes_on(whole, root, signum, where):
    """In training, and in the evaluation at step 1200, which the resumed run makes again."""
    before = tiny_envs.Point.opened - tiny_envs.Point.closed
    stop_after(100 + 1000 if where == "training" else 100 + 1200 + 33, signum)
    code, out, err = call(root / where, *RUN)
    assert code == 128 + signum and "Traceback" not in err
    step = arrays_of(root / where / "run")["env_step"]
    assert step == (1000 if where == "training" else 1200)
    assert set(read_evals(root / where / "run")[:, 0]) == {0}
    code, out, err = call(root / where, "--resume", "run")
    assert (code, err) == (0, "")
    if where == "eval":
        assert_same_end(root / where / "run", whole[0])
    assert set(read_evals(root / where / "run")[:, 0]) == {0, 1200, 2400}
    assert tiny_envs.Point.opened - tiny_envs.Point.closed == before


def test_flags_that_may_change_beside_resume(whole, monkeypatch, tmp_path):
    free = "--eval-every 77 --eval-episodes 3 --checkpoint-every 99 --capture-video"
    monkeypatch.setattr(sys, "argv", ["x", "--resume", str(whole[0]), *free.split()])
    args, folder = parse_args()
    assert folder == whole[0] and args.capture_video and (args.eval_every, args.gamma) == (77, 0.5)
    for flags in (["--gamma", "0.9"], ["--total-timesteps", "5000"], ["--seed", "2"]):
        result = call(tmp_path, "--resume", whole[0], *flags)
        assert_refused(result, flags[0], "must stay", "schedules")


def test_run_folders_that_cannot_be_resumed(whole, tmp_path):
    """Damaged and foreign checkpoints, arguments of another script, no replay: exit 2, one line."""
    run, name = tmp_path / "run", ".theta['net'][0]['w']"
    checkpoint, args = run / "checkpoint.npz", run / "args.json"
    shutil.copytree(whole[0], run)
    assert_refused(call(tmp_path, "--resume", "run"), "replay.dat")
    kept, arrays, saved = checkpoint.read_bytes(), arrays_of(run), json.loads(args.read_text())
    for damaged in (kept[:9000], b"", b"text"):
        checkpoint.write_bytes(damaged)
        assert_refused(call(tmp_path, "--evaluate", "run"), "checkpoint.npz")
    others = ({name: np.zeros((2, 2))}, {name: np.array([object()])}, {"env_step": []})
    for foreign in (*(arrays | x for x in others), {"env_step": 7}):
        np.savez(checkpoint, **foreign)
        assert_refused(call(tmp_path, "--resume", "run"), "checkpoint.npz")
    for other in (saved | {"domain": "cheetah"}, saved | {"gamma": -7}, []):
        args.write_text(json.dumps(other))
        assert_refused(call(tmp_path, "--resume", "run"), "run")
    args.write_text("")
    assert_refused(call(tmp_path, "--evaluate", "run"), "run")
    assert_refused(call(tmp_path, "--resume", "missing"), "missing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    (tmp_path / "run").chmod(0o500)
    assert_refused(call(tmp_path, "--resume", "run"), "read-only")


# ---- environments, films, run folders ---------------------------------------------------------


def test_an_environment_of_the_working_directory(whole, root):
    """`module:Name`, the default run folder, another seed: another policy, the same starts."""
    own = root / "own"
    own.mkdir()
    text = "import gymnasium\ngymnasium.register('Own-v0', 'tiny_envs:Point', max_episode_steps=50)"
    (own / "own_module.py").write_text(text)
    stop_after(2 * 50 + 10)
    code, out, err = call(own, *POINT, "--env-id", "own_module:Own-v0", "--seed", "2")
    assert code == 143, err
    [run_dir] = (own / "runs").iterdir()
    assert re.fullmatch(r"own_module-Own-v0__simpo_mujoco__2__\d{8}-\d{6}", run_dir.name)
    ours, theirs = read_evals(run_dir), read_evals(whole[0])[:2]
    assert (ours[:, [0, 1, 3]] == theirs[:, [0, 1, 3]]).all() and (ours[:, 2] != theirs[:, 2]).all()


def test_values_that_are_not_finite_stop_the_run(root, monkeypatch):
    """In the evaluation at step 0, and where the critics diverge; all environments are closed."""
    before = tiny_envs.Point.opened - tiny_envs.Point.closed
    result = call(root / "nan", *RANDOM, "--env-id", "tiny_envs:Nan-v0")
    assert_refused(result, "observation of environment 0 after 7 steps", code=1)
    assert not (root / "nan" / "run" / "eval.csv").exists()
    code, out, err = call(root / "huge", *RUN, "--env-id", "tiny_envs:Huge-v0")
    assert code == 1 and re.fullmatch(r"error: diverged: \w+ is \S+ at step 2105\n", err), err
    assert np.isfinite(read_evals(root / "huge" / "run")).all()
    assert tiny_envs.Point.opened - tiny_envs.Point.closed == before


def test_an_evaluation_without_a_time_limit_ends(root, monkeypatch):
    monkeypatch.setattr(simpo_mujoco, "EPISODE_LIMIT", 30)
    stop_after(30 + 10)
    assert call(root / "endless", *RANDOM, "--env-id", "tiny_envs:Endless-v0")[0] == 143
    assert read_evals(root / "endless" / "run")[0, 3] == 30


@pytest.mark.parametrize("kind", ["NoDriver", "NoRenderMode"])
def test_a_film_that_cannot_be_made_is_refused_at_the_start(root, kind):
    result = call(root / kind, *RANDOM, "--env-id", f"tiny_envs:{kind}-v0", "--capture-video")
    assert_refused(result, "--capture-video", "render" if kind == "NoRenderMode" else "is gone")


def test_a_film_that_fails_later_is_a_warning(root, monkeypatch):
    """The second evaluation's; the run goes on to its signal, and --evaluate then refuses."""
    monkeypatch.setattr(tiny_envs.LosesDriver, "frames", 60)
    flags = "--env-id tiny_envs:LosesDriver-v0 --capture-video --eval-every 600".split()
    stop_after(2 * 50 + 800)
    code, out, err = call(root / "lost", *RANDOM, *flags)
    assert code == 143 and re.fullmatch("warning: no film: .*driver is gone\n", err), err
    assert list(read_evals(root / "lost" / "run")[:, 0]) == [0, 600]
    assert len(imageio.mimread(root / "lost" / "run" / "film-0.mp4")) == 50
    assert_refused(call(root / "lost", "--evaluate", "run"), "--capture-video", "driver is gone")


def test_three_starts_in_one_second_get_three_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(create_run_dir, [Args(env_id="a/b:C-v0")] * 3))
    assert len(folders) == 3
    for path in folders:
        assert path.name.startswith("a-b-C-v0__simpo_mujoco__1__20260101-000000")
        assert {x.name for x in path.iterdir()} == {"args.json", "versions.json"}


# ---- flags ------------------------------------------------------------------------------------


def test_defaults_that_follow_from_other_flags():
    assert Args().eps_kl == 1.5 and Args().learning_starts == 30_000
    assert Args(num_samples=8).eps_kl == pytest.approx(1.5 / np.log(32) * np.log(8), rel=1e-5)
    assert Args(total_timesteps=10_000).learning_starts == 1000
    assert Args(eps_kl=2.0, learning_starts=500).eps_kl == 2.0


BAD = """
    --neg-clip 0.1 | --neg-clip nan | --neg-clip -0.05 --weighting exp | --eps-kl 4 | --eps-kl 0
    --eps-kl 0.7 --num-samples 2 | --num-samples 1 | --total-timesteps -5 | --buffer-size 0
    --learning-starts 0 | --batch-size 0 | --gamma -0.1 | --tau -1 | --critic-lr nan | --seed -1
    --sampling-steps 1 | --sampling-steps 21 | --sampler euler | --eval-episodes 0 | --eval-every -1
    --no-such-flag 1 | --weighting cubic | --num-samples 1.5 | --run-dir s3://bucket/run | --track
    --seed | --learning-starts 2000000 => --total-timesteps | --num-envs 2000000 => --total
    --gamma 1.01 | --tau 2
    --diffusion-steps 5 => --sampling-steps | --checkpoint-every 2000000
    --env-id Nonsense-v0 => Nonsense | --resume missing => missing | --evaluate missing => missing
"""


@pytest.mark.parametrize("line,mention", pairs(BAD))
def test_bad_input_names_its_flag(tmp_path, monkeypatch, line, mention):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    stop_after(30)  # where it is not refused
    code, out, err = call(tmp_path, "--env-id", "tiny_envs:Point-v0", *line.split())
    assert code == 2 and mention in err and "Traceback" not in err, err
    assert list(tmp_path.iterdir()) == []


def test_run_folders_that_cannot_be_made(tmp_path):
    """A file at the folder or above it, a folder in use, a name that is too long, a full disk."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "used").mkdir()
    for path in ("file", "file/below", "used", "x" * 300):
        assert_refused(call(tmp_path, *POINT, "--run-dir", path), "--run-dir", path)
    assert sorted(x.name for x in tmp_path.rglob("*")) == ["file", "used"]
    line = "--buffer-size 1000000000000 --total-timesteps 1000000000000 --run-dir large"
    assert_refused(call(tmp_path, *POINT, *line.split()), "replay", "GB")


SCRIPTS = ["simpo_mujoco", "simpo_dmc", "simpo_bandit", "simpo_dna"]
DEVICES = """
import os, sys, jax, {name} as script
sys.argv = ["{name}.py", "--resume", "missing", "--figure", "9"]
try:
    script.main()
except SystemExit as end:
    precision = jax.config.jax_default_matmul_precision
    print(end.code, jax.device_count(), os.environ.get("XLA_FLAGS"), precision)
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_makes_a_device_of_each_core_and_importing_it_sets_nothing(tmp_path, name):
    env = {x: y for x, y in os.environ.items() if x not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    command = [sys.executable, "-c", DEVICES.format(name=name)]
    env |= {"PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True).stdout
    cores = len(os.sched_getaffinity(0))
    assert out == f"2 {min(cores, 8) if name == 'simpo_dna' else cores} None float32\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_into_head_ends_quietly(name):
    """The trainers' task comes first, then the flags of the paper."""
    line = f"{sys.executable} {ROOT / name}.py --help | head -n 12"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=600)
    assert done.stderr == "" and done.stdout.startswith("usage")
    if name == "simpo_mujoco":
        assert done.stdout.index("--env-id") < done.stdout.index("--weighting")
