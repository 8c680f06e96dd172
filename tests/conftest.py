"""Shared set-up: two virtual CPU devices, one compilation cache, and the scripts run
as their users run them, in a child process or by their `main` in this one."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
CACHE = tempfile.TemporaryDirectory(prefix="jax-cache-")
os.environ |= {  # before jax starts
    "JAX_NUM_CPU_DEVICES": "2",  # for the tests of two devices
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_prefer_vector_width=512",  # as the trainers set it
    "JAX_COMPILATION_CACHE_DIR": CACHE.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
sys.path[:0] = [str(ROOT), str(TESTS)]

import jax  # noqa: E402
import tiny_envs  # noqa: E402

# One setting for all tests of `update` and of the trainers, so that its programs are
# compiled once: 460 updates, with a discount and rates that suit the probe problem.
TINY = """
    --num-samples 4 --target-samples 4 --diffusion-steps 6 --sampling-steps 4
    --hidden-dim 16 --batch-size 32 --neg-clip -0.05 --gamma 0.5 --tau 0.05
    --reward-scale 0.5
    --critic-lr 3e-3 --policy-lr 3e-3 --policy-lr-end 1e-3
    --total-timesteps 2400 --learning-starts 100 --buffer-size 600
    --eval-every 1200 --eval-episodes 2
""".split()
POINT = [*TINY, "--env-id", "tiny_envs:Point-v0"]


class Script:
    """Starts a script in a child process that runs the programs of this one."""

    def __init__(self, **env):
        self.env = os.environ | {"PYTHONPATH": str(TESTS)} | env

    def start(self, *flags, cwd, script=ROOT / "simpo_mujoco.py"):
        """The running process; its output goes to pipes."""
        command = [sys.executable, str(script), *map(str, flags)]
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *flags, cwd, **kwargs):
        """-> exit code, stdout, stderr of a run to its end."""
        with self.start(*flags, cwd=cwd, **kwargs) as process:
            out, err = process.communicate(timeout=1200)
        return process.returncode, out, err


@pytest.fixture
def twin():
    """A child process; its programs are this one's, from the compilation cache."""
    return Script(JAX_DISABLE_MOST_OPTIMIZATIONS="1")


@pytest.fixture(scope="module")
def quick_compiler():
    """Most of the time of the tests is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def stop_after(steps, signum=signal.SIGINT):
    """A signal comes once the environments of tiny_envs have made so many steps."""
    tiny_envs.Point.left = steps
    tiny_envs.Point.signal = signum


def run_main(module, *flags, cwd):
    """-> exit code, stdout, stderr of module.main() with these flags in this process.

    As the interpreter does, it prints the text of a SystemExit and makes it code 1."""
    out = io.StringIO()
    err = io.StringIO()
    interrupt = signal.getsignal(signal.SIGINT)
    argv = sys.argv
    path = list(sys.path)
    sys.argv = [module.__file__, *map(str, flags)]
    code = 0
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            module.main()
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=err)
            code = 1
    except (OSError, ImportError) as error:  # as the last lines of a trainer do
        print(f"error: {error}", file=err)
        code = 1
    finally:
        signal.signal(signal.SIGINT, interrupt)
        sys.argv = argv
        sys.path[:] = path
    return code, out.getvalue(), err.getvalue()


def read_evals(run_dir, name="eval.csv"):
    """-> rows [., 4]: step, episode, return, length."""
    header, *lines = (run_dir / name).read_text().splitlines()
    assert header == "step,episode,return,length"
    rows = [line.split(",") for line in lines]
    return np.array(rows, np.float64).reshape(-1, 4)


def open_replay(run_dir, obs_dim=3, act_dim=1):
    """The rows of a replay of 600 transitions of a kind of tiny_envs."""
    fields = [("obs", "f4", obs_dim), ("next_obs", "f4", obs_dim)]
    fields += [("act", "f4", act_dim), ("reward", "f4"), ("terminated", "f4")]
    return np.memmap(run_dir / "replay.dat", fields, "r", shape=600)


def arrays_of(run_dir):
    with np.load(run_dir / "checkpoint.npz", allow_pickle=False) as file:
        return dict(file)


def assert_equal_arrays(ours, theirs):
    """The same names, types and bits."""
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype, name
        assert array.tobytes() == theirs[name].tobytes(), name


def assert_refused(result, *mentions, code=1):
    """One line on stderr, no traceback."""
    assert result[0] == code, result
    assert result[2].startswith("error: "), result[2]
    assert result[2].count("\n") == 1, result[2]
    for mention in mentions:
        assert mention in result[2], result[2]
