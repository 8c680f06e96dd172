"""Std of a Gaussian policy after one pass through its own sampler, with the exact velocity.

    python benchmark/shrinkage.py

For a0 ~ N(0, s^2), E[a0 | a_t] = alpha s^2 / (alpha^2 s^2 + sigma^2) a_t, so the variance follows a
linear recursion over the steps of `simpo_mujoco.sample` (clipping left out).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simpo_mujoco import cosine_schedule


def std_after(s, num_steps):
    """Std of the samples when the data have std s: float64 recursion from N(0, 1) at t = T."""
    variance = 1.0
    for alpha, sigma, coef_a0, coef_at, std in reversed(
        list(zip(*cosine_schedule(num_steps), strict=True))
    ):
        gain = coef_a0 * alpha * s**2 / (alpha**2 * s**2 + sigma**2) + coef_at
        variance = gain**2 * variance + std**2
    return variance**0.5


if __name__ == "__main__":
    print("std      " + "".join(f"  T = {t:<4}" for t in (5, 20, 100)))
    for s in (0.5, 0.3, 0.1):
        print(f"{s:<9}" + "".join(f"{std_after(s, t):8.3f}" for t in (5, 20, 100)))
