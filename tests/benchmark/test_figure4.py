"""benchmark/dmc/figure4.py against the rewards of appendix F.2 at a few speeds."""

import numpy as np

from benchmark.dmc import figure4


def test_figure4_draws_the_rewards(tmp_path):
    square = figure4.curve("cheetah", "square", [0, 5, 10])
    np.testing.assert_allclose(square, [0, 0.25, 1])
    exp = figure4.curve("cheetah", "exp", [0, 10])
    np.testing.assert_allclose(exp, [np.exp(-10), 1])
    upright = figure4.curve("walker", "sqrt", [0, 2, 8])
    np.testing.assert_allclose(upright, [1 / 6, 3.5 / 6, 1])
    figure4.main(tmp_path / "figure4.png")
    assert (tmp_path / "figure4.png").read_bytes()[:4] == b"\x89PNG"
