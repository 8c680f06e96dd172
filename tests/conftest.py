"""Shared set-up: two virtual CPU devices, one compilation cache, and the scripts run
as their users run them, in a child process or by their `main` in this one."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

ROOT, TESTS = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent
CACHE = tempfile.TemporaryDirectory(prefix="jax-cache-")
os.environ |= {  # before jax starts: two devices for the sharding test, and the CPU everywhere
    "JAX_NUM_CPU_DEVICES": "2",
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": CACHE.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
sys.path[:0] = [str(ROOT), str(TESTS)]

import jax  # noqa: E402
import tiny_envs  # noqa: E402

# One setting for all tests of `update` and of the scripts, so that its programs are compiled once:
# 460 updates; discount and rates suit the probe problems.
TINY = """
    --num-samples 4 --diffusion-steps 6 --sampling-steps 4 --hidden-dim 16
    --batch-size 32 --neg-clip -0.05 --gamma 0.5 --tau 0.05 --reward-scale 0.5
    --critic-lr 3e-3 --policy-lr 3e-3 --policy-lr-end 1e-3
    --total-timesteps 2400 --learning-starts 100 --buffer-size 600
    --eval-every 1200 --eval-episodes 2 --checkpoint-every 300
""".split()
POINT = [*TINY, "--env-id", "tiny_envs:Point-v0"]


class Script:
    """Starts a script in a child process with one XLA device and a shared compile cache."""

    def __init__(self, cache, **env):
        own = {"JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": str(cache)}
        self.env = os.environ | own | {"PYTHONPATH": str(TESTS)} | env

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
            out, err = process.communicate(timeout=1200)
        return process.returncode, out, err


@pytest.fixture(scope="session")
def twin():
    """A child process that runs the programs of this one, bit for bit, though x64 is asked for."""
    env = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_ENABLE_X64": "1"}
    return Script(CACHE.name, JAX_NUM_CPU_DEVICES="2", **env)


@pytest.fixture(scope="module")
def quick_compiler():
    """Most of the time of the tests is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def stop_after(steps, signum=signal.SIGTERM):
    """A signal comes once the environments of tiny_envs have made so many steps together."""
    tiny_envs.Point.left, tiny_envs.Point.signal = steps, signum


def run_main(module, *flags, cwd):
    """-> exit code, stdout, stderr of module.main() with these flags in this process."""
    out, err = io.StringIO(), io.StringIO()
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGPIPE]
    before = [signal.getsignal(x) for x in signals], sys.argv, list(sys.path)
    sys.argv = [module.__file__, *map(str, flags)]
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            module.main()
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        _, sys.argv, sys.path[:] = before
        for signum, handler in zip(signals, before[0], strict=True):
            signal.signal(signum, handler)
    return code, out.getvalue(), err.getvalue()


def pairs(text):
    """[input, what its message mentions] of `input => mention`, one a line or between |."""
    rows = [x.strip().partition(" => ") for x in re.split(r"[|\n]", text) if x.strip()]
    return [(flags, mention or flags.split()[0]) for flags, _, mention in rows]


def read_evals(run_dir, name="eval.csv"):
    """-> rows [., 4]: step, episode, return, length."""
    header, *lines = (run_dir / name).read_text().splitlines()
    assert header == "step,episode,return,length"
    return np.array([line.split(",") for line in lines], np.float64).reshape(-1, 4)


def arrays_of(run_dir):
    with np.load(run_dir / "checkpoint.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def assert_same_end(run_dir, reference):
    """Bit-identical eval.csv and checkpoint; the replay is gone."""
    assert (run_dir / "eval.csv").read_bytes() == (reference / "eval.csv").read_bytes()
    ours, theirs = arrays_of(run_dir), arrays_of(reference)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype and array.tobytes() == theirs[name].tobytes(), name
    assert not (run_dir / "replay.dat").exists()


def assert_refused(result, *mentions, code=2):
    """One line on stderr, no traceback."""
    assert result[0] == code, result
    assert result[2].startswith("error: ") and result[2].count("\n") == 1, result[2]
    for mention in mentions:
        assert mention in result[2], result[2]
