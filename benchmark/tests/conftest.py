"""Set-up of the tests of benchmark/: its modules on the path, and runs that take seconds."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
os.environ["JAX_PLATFORMS"] = "cpu"

TINY = """
    --num-samples 4 --sampler dpm2 --sampling-steps 2 --hidden-dim 16 --batch-size 16
    --buffer-size 1500 --eval-episodes 2 --total-timesteps 4000 --eval-every 1000
    --checkpoint-every 250
""".split()


@pytest.fixture(scope="session")
def env(tmp_path_factory):
    """Environment variables of child processes, which share what they compile."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("jax-cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
