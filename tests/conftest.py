"""Shared set-up: two virtual CPU devices, strict shapes, and the script run as its users run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT, TESTS = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
# Before jax starts: two devices for the sharding test, and the CPU everywhere.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path[:0] = [str(ROOT), str(TESTS)]

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

TINY = """
    --num-samples 4 --sampling-steps 3 --eps-kl 0.5 --hidden-dim 32 --batch-size 32
    --learning-starts 300 --total-timesteps 4000 --buffer-size 1500 --eval-every 1000
    --eval-episodes 3 --checkpoint-every 250
""".split()


class Script:
    """Starts simpo_mujoco.py in a child process with one XLA device and a shared compile cache."""

    def __init__(self, cache):
        self.env = os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(TESTS),  # for tiny_envs
        }

    def start(self, *flags, cwd, script=ROOT / "simpo_mujoco.py"):
        """The running process; its output goes to pipes."""
        pipe = subprocess.PIPE
        command = [sys.executable, str(script), *map(str, flags)]
        return subprocess.Popen(
            command, cwd=cwd, env=self.env, stdout=pipe, stderr=pipe, text=True, bufsize=1
        )

    def run(self, *flags, cwd, **kwargs):
        """-> exit code, stdout, stderr of a run to its end."""
        with self.start(*flags, cwd=cwd, **kwargs) as process:
            out, err = process.communicate(timeout=300)
        return process.returncode, out, err


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    return Script(tmp_path_factory.mktemp("jax-cache"))
