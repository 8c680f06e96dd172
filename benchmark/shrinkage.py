"""Std of a Gaussian policy after one pass through its own sampler, with the exact velocity.

    python benchmark/shrinkage.py

A row for each sampler and each S of T noise levels that it visits, a column for each std s of the
policy. For a0 ~ N(0, s^2), E[a0 | a_t] = alpha s^2 / (alpha^2 s^2 + sigma^2) a_t, so the second
moments of a_t and of the last prediction follow a linear recursion over the steps of
`simpo_mujoco.sample` (clipping left out).
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simpo_mujoco import cosine_schedule


def std_after(s, schedule):
    """Std of the samples when the data have std s: float64 recursion from N(0, 1) at t = T."""
    moments = np.diag([1.0, 0.0])  # of (a_t, last prediction)
    for _, alpha, sigma, coef_a0, coef_last, coef_at, std in np.float64(schedule).T[::-1]:
        gain = alpha * s**2 / (alpha**2 * s**2 + sigma**2)
        step = np.array([[coef_a0 * gain + coef_at, coef_last], [gain, 0.0]])
        moments = step @ moments @ step.T + np.diag([std**2, 0.0])
    return moments[0, 0] ** 0.5


if __name__ == "__main__":
    stds = (0.5, 0.3, 0.1)
    print("sampler  T   S  " + "".join(f"{s:8}" for s in stds))
    for num_levels, visits in ((5, (5,)), (20, (3, 4, 5, 10, 20)), (100, (100,))):
        for sampler in ("ddpm", "ddim", "dpm2"):
            for visited in visits:
                schedule = cosine_schedule(num_levels, visited, sampler)
                row = "".join(f"{std_after(s, schedule):8.3f}" for s in stds)
                print(f"{sampler} {num_levels:5} {visited:3}  {row}")
