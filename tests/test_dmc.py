"""simpo_dmc.py: rewards, observations, ends of episodes, and the script as its users run it."""

import ctypes.util
import dataclasses
import json
import math
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT, TINY
from dm_control import suite
from dm_control.utils import rewards
from test_script import arrays_of, assert_refused, assert_same_end, await_checkpoints, read_scalars

import simpo_dmc
from simpo_dmc import Args, DMControl, Replay, landscape, make_env, make_envs, step_envs

CHEETAH, WALKER = Args(num_envs=2, seed=5), Args(domain="walker", num_envs=2, seed=5)
COLUMNS = "step,episode,return,length,stock_return,speed"


def with_reward(args, reward):
    return dataclasses.replace(args, reward=reward)


def peer(args, seed):
    """dm_control's own environment, started as ours with reset(seed=seed)."""
    env = suite.load(args.domain, args.task, task_kwargs={"random": seed})
    return env, env.reset()


# ---- rewards ----------------------------------------------------------------------------------

SPEEDS = (0, 2.5, 5, 7.5, 10)
TABLE = {
    "sqrt": (0, 0.5, 0.7071, 0.8660, 1),
    "linear": (0, 0.25, 0.5, 0.75, 1),
    "square": (0, 0.0625, 0.25, 0.5625, 1),
    "exp": (4.5e-5, 5.5e-4, 6.7e-3, 0.0821, 1),
}


@pytest.mark.parametrize("reward,values", TABLE.items())
def test_values_of_the_cheetahs_rewards(reward, values):
    args = with_reward(CHEETAH, reward)
    found = [landscape(args, v, 0.0) for v in SPEEDS]
    np.testing.assert_allclose(found, values, rtol=1e-2, atol=1e-12)
    assert landscape(args, -3.0, 0.0) == found[0] and landscape(args, 12.0, 1.0) == 1
    fine = [landscape(args, v, 0.0) for v in np.linspace(0, 10, 101)]
    assert (np.diff(fine) > 0).all()


def test_rewards_are_ordered_from_flat_to_steep():
    """At half the top speed, and by slope at the top: 0.5, 1, 2, v* in units of 1 / v*."""
    middle = [landscape(with_reward(CHEETAH, name), 5.0, 0.0) for name in TABLE]
    assert middle == sorted(middle, reverse=True) and len(set(middle)) == 4
    for name, slope in zip(TABLE, (0.5, 1, 2, 10), strict=True):
        low = landscape(with_reward(CHEETAH, name), 10 - 1e-6, 0.0)
        assert (1 - low) / 1e-7 == pytest.approx(slope, rel=1e-3)


def walker_reward(reward, physics):
    """dm_control's reward for walker-run, written out, with the shape in the place of `move`."""
    standing = rewards.tolerance(physics.torso_height(), bounds=(1.2, math.inf), margin=0.6)
    stand = (3 * standing + (1 + physics.torso_upright()) / 2) / 4
    v = np.clip(physics.horizontal_velocity(), 0, 8)
    shapes = {"sqrt": np.sqrt(v / 8), "linear": v / 8, "square": (v / 8) ** 2}
    return stand * (5 * (shapes | {"exp": np.exp(v - 8)})[reward] + 1) / 6


@pytest.mark.parametrize("domain,reward", [("cheetah", "linear"), *(("walker", r) for r in TABLE)])
def test_rewards_along_a_random_episode(domain, reward):
    """cheetah linear and walker linear are dm_control's own; walker keeps its factor `stand`.
    A push now and then leads through all speeds."""
    args = dataclasses.replace(CHEETAH, domain=domain, reward=reward)
    env, (theirs, _), rng = DMControl(args, None), peer(args, 3), np.random.default_rng(0)
    env.reset(seed=3)
    found, speeds, stock = [], [], []
    for step in range(1000):
        if step % 20 == 0:
            push = rng.uniform(-2, 14)
            for physics in (env.env.physics, theirs.physics):
                physics.named.data.qvel["rootx"] = push
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        now = theirs.step(action)
        _, ours, terminated, truncated, info = env.step(action)
        expected = now.reward if reward == "linear" else walker_reward(reward, theirs.physics)
        assert ours == pytest.approx(expected, abs=1e-12, rel=0)
        assert not terminated and truncated == (step == 999)
        found.append(ours), stock.append(now.reward)
        speeds.append(theirs.physics.named.data.sensordata["torso_subtreelinvel"][0])
    assert min(found) < 0.05 and max(found) > 0.9 and min(speeds) < 0 and max(speeds) > 10
    assert info["stock_return"] == pytest.approx(sum(stock), rel=1e-12)
    assert info["speed"] == pytest.approx(np.mean(speeds), rel=1e-9)


# ---- observations and episodes ----------------------------------------------------------------


def test_observations_have_the_documented_order():
    rng = np.random.default_rng(0)
    for args, size in ((CHEETAH, 17), (WALKER, 24)):
        env = DMControl(args, None)
        env.reset(seed=1)
        obs = env.step(rng.uniform(-1, 1, 6))[0]
        data = env.env.physics.data
        head = data.qpos[1:]
        if args is WALKER:  # the rows of xmat are bodies, the world first: xx xy xz yx ...
            head = [*data.xmat[1:, [0, 2]].ravel(), data.xpos[1, 2]]
        np.testing.assert_array_equal(obs, [*head, *data.qvel])
        assert obs.shape == env.observation_space.shape == (size,)
        assert env.action_space.shape == (6,) and env.action_space.dtype == np.float32


@pytest.mark.parametrize("args", [CHEETAH, WALKER, Args(domain="point_mass", task="hard")])
def test_restore_brings_an_episode_back_bit_for_bit(args):
    """Whatever was played before; point_mass-hard draws its actuators anew for each episode."""
    env, twin = (make_env(args, 1, args.seed, None) for _ in range(2))
    rng = np.random.default_rng(3)

    def play(count, *envs):
        for _ in range(count):
            action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            results = [x.step(action) for x in envs]
        return results

    env.reset()
    for count in (3, 40):
        play(count, env)
        env.reset()
    [(obs, *_)] = play(25, env)
    twin.reset()
    play(7, twin)
    np.testing.assert_array_equal(twin.restore(env.episode, np.array(env.actions)), obs)
    (ours, *rest), (theirs, *rest_theirs) = play(30, env, twin)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_equal(rest, rest_theirs)  # rewards, ends, info with its sums
    for name in ("qpos", "qvel", "qacc_warmstart", "time"):
        values = [getattr(x.unwrapped.env.physics.data, name) for x in (env, twin)]
        np.testing.assert_array_equal(*values)


def scaled(rows):
    """The actions that replay rows of a cheetah were played with, in its range [-1, 1]."""
    return np.float32(-1) + (rows[..., 34:40] + 1) / 2 * np.float32(2)


def rollout(args, steps, tmp_path, hook=lambda envs, step: None):
    """Random steps into a replay -> rows [steps, num_envs, 2 o + 8], (step, statistics) of ends."""
    envs, rng, ends = make_envs(args, args.num_envs, args.seed), np.random.default_rng(1), []
    o = envs.single_observation_space.shape[0]
    replay = Replay(tmp_path / "replay.dat", (steps * args.num_envs, 2 * o + 8), 10**6)
    obs = envs.reset()[0]
    for step in range(steps):
        hook(envs, step)
        actions = rng.uniform(-1, 1, envs.action_space.shape).astype(np.float32)
        obs, ended = step_envs(envs, replay, obs, actions)
        ends += [(step, stats) for stats in ended]
    return np.array(replay.rows).reshape(steps, args.num_envs, -1), ends


def test_the_time_limit_truncates_and_bootstraps(tmp_path):
    """1000 steps, the true last observation, never `terminated`; statistics of the episode."""
    args = with_reward(CHEETAH, "sqrt")
    rows, ends = rollout(args, 1003, tmp_path)
    assert [step for step, _ in ends] == [999, 999] and not rows[..., -1].any()
    for i, (_, (ret, length, stock, speed, errors)) in enumerate(ends):
        seed = int(np.random.SeedSequence([5, i, 0]).generate_state(1)[0])
        env, _ = peer(args, seed)
        past = [(env.step(action), env.physics.speed()) for action in scaled(rows[:1000, i])]
        last = past[-1][0].observation
        assert past[-1][0].last() and past[-1][0].discount == 1
        expected = np.float32([*last["position"], *last["velocity"]])
        np.testing.assert_array_equal(rows[999, i, 17:34], expected)
        assert (rows[1000, i, :17] != expected).any()  # the next episode's first
        assert ret == pytest.approx(sum(np.sqrt(np.clip(v / 10, 0, 1)) for _, v in past), rel=1e-5)
        assert stock == pytest.approx(sum(now.reward for now, _ in past), rel=1e-9)
        assert speed == pytest.approx(np.mean([v for _, v in past]), rel=1e-9)
        assert (length, errors) == (1000, DMControl.physics_errors)


def test_a_task_that_ends_terminates():
    """lqr, the one task with a discount of 0, once its state is at rest."""
    env = DMControl(Args(domain="lqr", task="lqr_2_1"), None)
    env.reset(seed=0)
    assert env.step(np.zeros(1))[2:4] == (False, False)
    with env.env.physics.reset_context():
        env.env.physics.data.qpos[:] = 0
    assert env.step(np.zeros(1))[2:4] == (True, False)


@pytest.mark.parametrize("value", [np.nan, 1e12])
def test_a_physics_error_truncates(tmp_path, capsys, value):
    """The last state known is its own successor, reward 0, not terminated; counted, one line."""
    before = DMControl.physics_errors

    def blow_up(envs, step):
        if step == 9:
            envs.envs[1].unwrapped.env.physics.data.qvel[:] = value

    args = with_reward(CHEETAH, "exp")
    rows, ends = rollout(args, 30, tmp_path, blow_up)
    [(step, (ret, length, stock, speed, errors))] = ends
    assert step == 9 and length == 10 and errors == before + 1 == DMControl.physics_errors
    err = capsys.readouterr().err
    assert re.fullmatch(r"warning: episode cut off: .*mjWARN_\w+\n", err), err
    own = rows[:, 1]
    np.testing.assert_array_equal(own[9, 17:34], own[9, :17])
    np.testing.assert_array_equal(own[9, :17], own[8, 17:34])
    assert own[9, -2] == 0 and not rows[..., -1].any() and np.isfinite(rows).all()
    assert ret == pytest.approx(own[:9, -2].sum(), rel=1e-5)
    assert 0 <= stock < 9 and np.isfinite(speed)
    # the next episode is what it is without the error
    fresh = make_env(args, 1, args.seed, None)
    fresh.reset()
    np.testing.assert_array_equal(own[10, :17], np.float32(fresh.reset()[0]))
    for action, row in zip(scaled(own[10:]), own[10:], strict=True):
        np.testing.assert_array_equal(np.float32(fresh.step(action)[0]), row[17:34])


def test_an_action_that_is_not_finite_is_no_physics_error(tmp_path):
    envs, before = make_envs(CHEETAH, 2, 0), DMControl.physics_errors
    replay, obs = Replay(tmp_path / "replay.dat", (9, 42), 9), envs.reset()[0]
    with pytest.raises(simpo_dmc.Diverged, match="action is not finite"):
        step_envs(envs, replay, obs, np.full((2, 6), np.nan))
    assert DMControl.physics_errors == before


# ---- the script -------------------------------------------------------------------------------

FLAGS = [*TINY, "--reward", "sqrt", "--num-envs", "2", "--total-timesteps", "2400"]
FLAGS += ["--eval-every", "1200", "--eval-episodes", "2"]
BLOW_UP = """
import sys
import simpo_dmc

def step(self, action, step=simpo_dmc.DMControl.step):
    if self.steps == 300:
        self.env.physics.data.qvel[:] = 1e12  # a real PhysicsError
    return step(self, action)

simpo_dmc.DMControl.step = step
sys.exit(simpo_dmc.main())
"""


def script_dmc(script, root, *flags, path=ROOT / "simpo_dmc.py"):
    return script.run(*flags, cwd=root, script=path)


def undisturbed(script, root):
    return script_dmc(script, root, *FLAGS)


def killed(script, root):
    """kill -9 in the first episodes and in the second ones, which begin at step 2000."""
    run_dir, flags, codes = root / "killed", [*FLAGS, "--run-dir", root / "killed"], []
    for count in (3, 6):
        with script.start(*flags, cwd=root, script=ROOT / "simpo_dmc.py") as process:
            await_checkpoints(process, run_dir, count)
            process.kill()
        codes.append(process.wait())
        flags = ["--resume", run_dir]
    return codes, script_dmc(script, root, *flags)


def blown_up(script, root):
    (root / "blow_up.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}){BLOW_UP}")
    return script_dmc(script, root, *FLAGS, "--run-dir", "blown", path=root / "blow_up.py")


def filmed(script, root):
    """An evaluation with video, without a screen."""
    [run_dir] = (root / "runs").iterdir()
    shutil.copytree(run_dir, root / "filmed")
    return script_dmc(script, root, "--evaluate", "filmed", "--capture-video")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("dmc")


@pytest.fixture(scope="module")
def outcome(script, root):
    """outcome(scenario) -> what it returned; two at a time, once the first has compiled."""
    with ThreadPoolExecutor(2) as pool:
        futures = {undisturbed: pool.submit(undisturbed, script, root)}
        futures[undisturbed].result()
        for f in (killed, blown_up, filmed):
            futures[f] = pool.submit(f, script, root)
        yield lambda scenario: futures[scenario].result()


def run_of(root):
    [run_dir] = (root / "runs").iterdir()
    return run_dir


def read_evals(run_dir):
    header, *lines = (run_dir / "eval.csv").read_text().splitlines()
    assert header == COLUMNS
    return np.array([line.split(",") for line in lines], np.float64)


def test_a_run_writes_its_folder(outcome, root):
    code, out, err = outcome(undisturbed)
    assert code == 0 and err == "", err
    run_dir = run_of(root)  # the default --run-dir
    assert re.fullmatch(r"cheetah-run__simpo_dmc__1__\d{8}-\d{6}", run_dir.name)
    args = json.loads((run_dir / "args.json").read_text())
    assert (args["domain"], args["task"], args["reward"]) == ("cheetah", "run", "sqrt")
    assert json.loads((run_dir / "versions.json").read_text())["dm_control"] == "1.0.36"
    rows = read_evals(run_dir)
    np.testing.assert_array_equal(rows[:, :2], [[1200, 0], [1200, 1], [2400, 0], [2400, 1]])
    ret, length, stock, speed = rows[:, 2:].T
    assert (length == 1000).all() and np.isfinite(rows).all()
    # sqrt(u) >= u, and u is the stock reward, so is not below the mean speed
    assert (ret > stock).all() and (stock >= 100 * speed - 1e-3).all()
    means = rows[2:].mean(axis=0)
    line = rf"return {means[2]:.3f} \+- \S+, stock_return {means[4]:.3f} \+- \S+, "
    assert re.search(rf"^step 2400: {line}speed {means[5]:.3f} \+- ", out, re.MULTILINE)


def test_tensorboard_file_holds_the_documented_tags(outcome, root):
    assert outcome(undisturbed)[0] == 0
    scalars = read_scalars(run_of(root))
    charts = {tag for tag in scalars if tag.startswith("charts/")}
    names = "return length stock_return speed".split()
    expected = {f"charts/episodic_{name}" for name in names} | {"charts/SPS"}
    expected |= {f"charts/eval_{name}" for name in ("return", "stock_return", "speed")}
    assert charts == expected | {"charts/physics_errors"}
    rows = read_evals(run_of(root))
    for column, name in ((2, "return"), (4, "stock_return"), (5, "speed")):
        assert list(scalars[f"charts/eval_{name}"]) == [1200, 2400]
        mean = rows[2:, column].mean()
        assert scalars[f"charts/eval_{name}"][2400] == pytest.approx(mean, rel=1e-5, abs=1e-7)
    assert scalars["charts/episodic_length"] == {2000: 1000}
    assert scalars["charts/physics_errors"] == {2000: 0}
    missing = [tag for tag in scalars if f"`{tag}`" not in (ROOT / "README.md").read_text()]
    assert not missing, "tags that README.md does not explain"


def test_killed_twice_ends_bit_identical(outcome, root):
    codes, (code, _, err) = outcome(killed)
    assert codes == [-signal.SIGKILL] * 2
    assert code == 0, err
    assert outcome(undisturbed)[0] == 0
    assert_same_end(root / "killed", run_of(root))
    meta = arrays_of(root / "killed" / "checkpoint.npz")[1]
    assert meta["step"] == 2400 and meta["script"] == "simpo_dmc"


def test_physics_errors_of_a_run_are_counted_and_logged(outcome, root):
    """Every episode ends in its step 301, in training and in evaluation."""
    code, _, err = outcome(blown_up)
    assert code == 0, err
    lines = [line for line in err.splitlines() if "absl" not in line and "core.py" not in line]
    assert all(line.startswith("warning: episode cut off: ") for line in lines), err
    training, evaluations = 2 * (1200 // 301), 2 * 2
    # a vector of environments goes on until its last episode has ended; all end at once here
    assert len(lines) == training + evaluations
    scalars = read_scalars(root / "blown")
    assert scalars["charts/episodic_length"] == {2 * 301 * i: 301 for i in (1, 2, 3)}
    # the two of the evaluation at step 1200 come before the second pair of training
    assert scalars["charts/physics_errors"] == {602: 2, 1204: 6, 1806: 8}
    assert (read_evals(root / "blown")[:, 3] == 301).all()


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="needs EGL to render")
def test_video(outcome, root):
    code, out, err = outcome(filmed)
    assert code == 0, err
    assert out.startswith("step 2400: return ")
    [video] = (root / "filmed" / "videos").iterdir()
    assert video.suffix == ".mp4" and video.stat().st_size > 10_000


@pytest.mark.parametrize(
    "line,mentions",
    [
        ("--domain nonsense", ["cheetah", "walker", "humanoid_CMU"]),
        ("--task fly --domain walker", ["stand, walk, run"]),
        ("--reward exp --domain walker --task walk", []),
        ("--reward linear --domain cartpole --task balance", []),
        ("--domain lqr --task lqr_2_1", ["--task", "bounded"]),
        ("--neg-clip 0.1", []),
    ],
)
def test_bad_input_is_one_line_that_names_the_flag(monkeypatch, capsys, tmp_path, line, mentions):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["simpo_dmc.py", *line.split()])
    code = simpo_dmc.main()
    assert_refused(code, capsys.readouterr().err, line.split()[0], *mentions)
    assert list(tmp_path.iterdir()) == []


def test_the_reward_defaults_to_one_that_every_task_has():
    for domain, task in (("cartpole", "balance"), ("quadruped", "walk")):
        env = make_env(Args(domain=domain, task=task), 0, 0, None)
        env.reset()
        _, reward, _, _, info = env.step(np.zeros(env.action_space.shape, np.float32))
        assert reward == info["stock_return"] > 0 and math.isnan(info["speed"])
