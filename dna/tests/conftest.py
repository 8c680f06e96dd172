"""Set-up of the tests of dna/: the repository on the path, and a compiler that hurries."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """Most of the time of these tests is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
