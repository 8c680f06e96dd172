"""The environment that peers.py gives to every program: a task that notes its steps and returns.

Its id is peers_env:Recorded-v0. It is imported into the program's own Python, so it uses Gymnasium
alone, 0.29 or later. Around the task PEERS_TASK it writes to a file of its own in PEERS_DIR lines
"time,steps,return": time.monotonic(), steps of this environment so far and, at the end of an
episode, its undiscounted return, else nothing; one for each episode, every 0.1 s and at the end.
The evaluation of ours, one episode whose seed is 2^31, is left out; others draw seeds above it.
"""

import atexit
import importlib.metadata
import itertools
import json
import os
import platform
import time
from pathlib import Path

import gymnasium as gym

TASK, FOLDER, EVERY = os.environ["PEERS_TASK"], Path(os.environ["PEERS_DIR"]), 0.1
PACKAGES = ("jax", "gymnasium", "mujoco", "numpy", "torch", "sbx-rl", "stable-baselines3")
NUMBER = itertools.count()


class Recorder(gym.Wrapper):
    """Writes the file; changes nothing of the task."""

    def __init__(self, env):
        super().__init__(env)
        path = FOLDER / f"env-{os.getpid()}-{next(NUMBER)}.csv"
        self.file = path.open("w", buffering=1)
        self.steps, self.total, self.now, self.noted = 0, 0.0, 0.0, 0.0
        self.silent = False  # of an evaluation
        atexit.register(self.note)

    def note(self, total=""):
        if self.silent:
            return
        self.file.write(f"{self.now:.4f},{self.steps},{total}\n")
        self.noted = self.now

    def reset(self, **kwargs):
        self.total = 0.0
        self.silent = self.silent or kwargs.get("seed") == 2**31
        return self.env.reset(**kwargs)

    def step(self, action):
        answer = _, reward, terminated, truncated, _ = self.env.step(action)
        self.steps, self.total = self.steps + 1, self.total + float(reward)
        self.now = time.monotonic()
        if terminated or truncated:
            self.note(self.total)
        elif self.now - self.noted > EVERY:
            self.note()
        return answer


def make(**kwargs):
    return Recorder(gym.make(TASK, **kwargs))


def versions():
    """{package: version} of what is installed here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


(FOLDER / "versions.json").write_text(json.dumps(versions()))
gym.register("Recorded-v0", make, disable_env_checker=True, order_enforce=False)
