"""Every block of docs/extending.md runs; the trainer learns with each one of them."""

import ast
import dataclasses
import importlib.util
import re
from pathlib import Path

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, read_evals, run_main
from tensorboardX import SummaryWriter

PAGE = (ROOT / "docs" / "extending.md").read_text()
FLAGS = """
    --env-id point_mass:PointMass-v0
    --num-samples 4 --diffusion-steps 20 --sampling-steps 6 --hidden-dim 16
    --batch-size 32 --gamma 0.5 --tau 0.05 --critic-lr 3e-3 --policy-lr 3e-3
    --total-timesteps 2500 --learning-starts 500 --buffer-size 2500
    --eval-every 2500 --eval-episodes 3
""".split()


def blocks(heading):
    """The Python of a section."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert found
    return found


def functions(source):
    """{name: node} of the functions at the top level."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
    return found


def load_copy(folder, script, block):
    """A copy of a script where a block replaces the functions that it names."""
    source = (ROOT / script).read_text()
    replaced = [functions(source)[name] for name in functions(block)]
    replaced.sort(key=lambda node: node.lineno)
    lines = source.splitlines()
    for node in reversed(replaced):
        del lines[node.lineno - 1 : node.end_lineno]
    lines.insert(replaced[0].lineno - 1, block)

    path = folder / f"{Path(script).stem}_mine.py"
    path.write_text("\n".join(lines))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(tmp_path, monkeypatch, quick_compiler):
    """train(module), on the page's environment -> returns before, after, and losses."""
    losses = {}

    class Writer(SummaryWriter):
        def add_scalar(self, tag, value, step):
            if tag.startswith("losses/"):
                losses[tag] = float(value)

    def run(module):
        monkeypatch.setattr(module, "SummaryWriter", Writer)
        result = run_main(module, *FLAGS, "--run-dir", "run", cwd=tmp_path)
        assert result[0] == 0, result
        step, _, returns, _ = read_evals(tmp_path / "run").T
        before = returns[step == 0].mean()
        after = returns[step == 2500].mean()
        return before, after, losses

    (tmp_path / "point_mass.py").write_text(blocks("Your own environment")[0])
    return run


def assert_learns(result):
    before, after, losses = result
    assert {"losses/q", "losses/policy_loss", "losses/w_negative"} < set(losses)
    assert np.isfinite(list(losses.values())).all()
    assert after > before + 5, (before, after)


def sample_gaussian(monkeypatch, module, mean, std, **flags):
    """Actions by the copy's sampler, with the exact velocity of N(mean, std^2)."""
    args = dataclasses.replace(module.Args(), sampling_steps=20, **flags)
    alpha, sigma = map(jnp.float32, module.schedule(args.diffusion_steps))

    def velocity(a_t, t):
        signal = (alpha[t] * std) ** 2
        gain = signal / (signal + sigma[t] ** 2) / alpha[t]
        a0 = mean + gain * (a_t - alpha[t] * mean)
        noise = (a_t - alpha[t] * a0) / sigma[t]
        return module.to_velocity(a0, noise, alpha[t], sigma[t])

    monkeypatch.setattr(
        module,
        "policy_velocity",
        lambda args, theta, obs, a_t, t: velocity(a_t, t),
    )
    theta = {"net": [{"b": np.zeros(1)}]}
    obs = np.zeros((1, 1))
    return module.sample_actions(args, theta, obs, 40_000, jax.random.key(0))


def test_own_weighting(tmp_path, train):
    module = load_copy(tmp_path, "simpo_mujoco.py", blocks("Your own weighting")[0])
    rng = np.random.default_rng(0)
    q = np.float32(rng.normal(size=(64, 8)))
    w = np.asarray(module.weights(module.Args(), q, 0.2))
    np.testing.assert_allclose(w.mean(axis=1), 1, rtol=1e-4)
    assert -0.05 <= w.min() < -0.01
    np.testing.assert_array_equal(w.argmax(1), q.argmax(1))
    before, after, losses = train(module)
    assert_learns((before, after, losses))
    assert losses["losses/w_negative"] > 0


@pytest.mark.parametrize(
    "heading", ["Your own noise schedule", "A flow instead of VP diffusion"]
)
def test_own_path_from_data_to_noise(tmp_path, monkeypatch, train, heading):
    """With 20 steps dpm2 is a little narrow and ddpm wide, as the stock schedule is."""
    module = load_copy(tmp_path, "simpo_mujoco.py", blocks(heading)[0])
    assert_learns(train(module))
    for sampler in ("dpm2", "ddpm"):
        a0 = sample_gaussian(monkeypatch, module, 0.2, 0.15, sampler=sampler)
        assert float(a0.mean()) == pytest.approx(0.2, abs=0.01), sampler
        assert float(a0.std()) == pytest.approx(0.15, rel=0.2), sampler


def test_own_reward(tmp_path, monkeypatch):
    (tmp_path / "gentle.py").write_text(blocks("Your own reward")[0])
    monkeypatch.syspath_prepend(tmp_path)
    gentle = gym.make("gentle:Gentle-v0")
    stock = gym.make("Swimmer-v4")
    action = np.array([0.5, -1.0])
    rewards = []
    for env in (gentle, stock):
        env.reset(seed=0)
        rewards.append(env.step(action)[1])
    assert rewards[0] == pytest.approx(rewards[1] - 0.15)


def test_own_reward_of_dm_control(tmp_path):
    module = load_copy(tmp_path, "simpo_dmc.py", blocks("Your own reward")[1])
    envs, *_ = module.make_envs(module.Args(), 1)
    envs.reset(seed=0)
    a0 = np.ones((1, 6), np.float32)
    for _ in range(5):
        [reward] = envs.step(a0)[1]
    speed = envs.envs[0].unwrapped.speed()
    assert reward == pytest.approx(1 / (1 + (speed - 3) ** 2))
    assert abs(speed) > 0.01


def test_trained_policy(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    exec(blocks("A trained policy")[0], names)
    env = gym.make("HalfCheetah-v4")
    obs, _ = env.reset(seed=1)
    total = 0.0
    for _ in range(100):
        action = names["act"](obs)
        assert env.action_space.contains(action)
        obs, reward, *_ = env.step(action)
        total += reward
    assert total > 600  # 11,789 in 1,000 steps
