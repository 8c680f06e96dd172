"""benchmark/dmc/figure4.py against the rewards of appendix F.2 at a few speeds."""

import subprocess
import sys

import numpy as np
from conftest import ROOT
from dmc import figure4


def test_figure4_draws_the_rewards(tmp_path):
    np.testing.assert_allclose(figure4.curve("cheetah", "square", [0, 5, 10]), [0, 0.25, 1])
    np.testing.assert_allclose(figure4.curve("cheetah", "exp", [0, 10]), [np.exp(-10), 1])
    upright = [(5 * f + 1) / 6 for f in (0, 0.5, 1)]
    np.testing.assert_allclose(figure4.curve("walker", "sqrt", [0, 2, 8]), upright)
    command = [sys.executable, ROOT / "benchmark" / "dmc" / "figure4.py"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "figure4.png").read_bytes()[:4] == b"\x89PNG"
