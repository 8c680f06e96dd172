"""Section 3.4 on the bandit's landscape `escape`: eq. (8), a network trained by eq. (7), eq. (10).

    python benchmark/bandit/field.py --out benchmark/bandit     # field.png and field.csv

A row of field.csv compares, at a time t, the density rho_t of eq. (10) with particles that follow
the closed form or the network: negative_mass is that of rho_t, tv_* are total variation distances.
"""

import argparse
import csv
import functools
import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import simpo_bandit as bandit
from common import solve_nu

STEPS = 300  # gradient steps of the network
TIMES = np.append(np.linspace(1, 0, 250, endpoint=False), 0).astype(np.float32)  # 1 .. 0
COLOURS = {"closed_form": "tab:cyan", "network": "tab:brown"}


class Target(NamedTuple):
    """The signed measure w pi_old on M nodes, for quadrature."""

    a0: jax.Array  # [M], evenly spaced
    mass: jax.Array  # [M], of pi_old, sums to 1
    w: jax.Array  # [M], mean 1 under mass


def make_target(lam, landscape, neg_clip, num_nodes=2001):
    """Stage I without sampling error: eq. (11) under the landscape's initial Gaussian."""
    z = jnp.linspace(-6, 6, num_nodes)
    mass = jax.nn.softmax(-(z**2) / 2)
    a0 = landscape.mean + landscape.std * z
    return Target(a0, mass, target_weight(lam, landscape, neg_clip, a0))


def target_weight(lam, landscape, neg_clip, a0, num_nodes=4096):
    """w of eq. (11) at a0 [A]; nu, mean and std of R come from nodes of equal mass of pi_old."""
    quantiles = jax.scipy.special.ndtri((jnp.arange(num_nodes) + 0.5) / num_nodes)
    reward = landscape.reward(landscape.mean + landscape.std * quantiles)
    mean, std = reward.mean(), reward.std()
    nu = solve_nu((reward - mean) / std, lam, 1, neg_clip)
    return jnp.maximum(((landscape.reward(a0) - mean) / std - nu) / lam, neg_clip)


def closed_form(target, at, t):
    """Eq. (8) and its denominator: at [A], t in (0, 1] -> vel [A], E[w | a_t] [A].

    Where E[w | a_t] <= 0 the loss has no minimum (section 3.4, case II) and vel means nothing.
    """
    a0, mass, w = (x[None] for x in target)  # [1, M]
    noise = (at[:, None] - (1 - t) * a0) / t  # [A, M]
    posterior = jax.nn.softmax(jnp.log(mass) - noise**2 / 2, axis=-1)  # p(a0 | a_t)
    mean_w = jnp.sum(posterior * w, axis=-1)
    vel = jnp.sum(posterior * w * (noise - a0), axis=-1)
    return vel / jnp.where(mean_w == 0, 1.0, mean_w), mean_w


def closed_form_velocity(target, at, t):
    """`closed_form` at many particles, read off a grid of step 0.01 in [-5, 5]."""
    grid = jnp.linspace(-5, 5, 1001)
    return jnp.interp(at, grid, closed_form(target, grid, t)[0])


def path_density(target, a, t):
    """rho_t of eq. (10) at a [A], t in (0, 1]; negative where the signed measure is."""
    kernel = jnp.exp(-(((a[:, None] - (1 - t) * target.a0[None]) / t) ** 2) / 2)
    return kernel @ (target.w * target.mass) / (t * math.sqrt(2 * math.pi))


@functools.partial(jax.jit, static_argnums=(0, 3))
def flow_path(velocity, params, times, num_particles):
    """Euler along times [K], from 1 downwards, of the quantiles of N(0, 1) -> [K, particles];
    velocity(params, a, t)."""

    def euler(at, step):
        t, dt = step
        return jnp.clip(at - dt * velocity(params, at, t), -1e3, 1e3), at

    start = jax.scipy.special.ndtri((jnp.arange(num_particles) + 0.5) / num_particles)
    last, path = jax.lax.scan(euler, start, (times[:-1], times[:-1] - times[1:]))
    return jnp.concatenate([path, last[None]])


@jax.jit
def fit_target(landscape, target, theta, key):
    """A network, refitted by `flow_loss` to the target on fresh samples of pi_old."""

    def draw(key):
        a0 = landscape.mean + landscape.std * jax.random.normal(key, (512,))
        return a0, jnp.interp(a0, target.a0, target.w)

    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return bandit.fit_flow(theta, optimiser.init(theta), optimiser, draw, STEPS, key)[0]


def field_rows(neg_clip, target, paths, width=0.05):
    """Rows of field.csv for one target; paths are {name: [times, particles]}."""
    edges = np.arange(-5, 5 + width / 2, width)
    for k in range(25, 250, 25):
        rho = np.asarray(path_density(target, (edges[1:] + edges[:-1]) / 2, TIMES[k]))
        row = {"neg_clip": f"{neg_clip:g}", "t": f"{TIMES[k]:.3f}"}
        row["negative_mass"] = f"{np.maximum(-rho, 0).sum() * width:.4f}"
        for name, path in paths.items():
            share = np.histogram(path[k], edges)[0] / path.shape[1]
            distance = (np.abs(share - rho * width).sum() + 1 - share.sum()) / 2
            row[f"tv_{name}"] = f"{distance:.4f}"
        yield row


def draw_row(fig, axes, clip, target, theta, paths):
    """Both velocity fields with paths of particles, and the densities near t = 0."""
    a, times = np.linspace(-3, 3, 241, dtype=np.float32), TIMES[:-1]
    vel, mean_w = jax.lax.map(lambda t: closed_form(target, a, t), times)
    vel, mean_w = np.where(mean_w == 0, np.nan, vel), np.asarray(mean_w)
    network = jax.lax.map(lambda t: bandit.flow_velocity(theta, jnp.asarray(a), t), times)
    fields = {"closed_form": (vel, "eq. (8)"), "network": (network, f"network, {STEPS} steps")}
    for axis, (name, (field, title)) in zip(axes, fields.items(), strict=False):
        image = axis.pcolormesh(
            times, a, np.asarray(field).T, cmap="RdBu_r", vmin=-4, vmax=4, rasterized=True
        )
        axis.plot(TIMES, paths[name][:, 100::200], color="black", lw=0.5)
        if clip:
            axis.contourf(times, a, mean_w.T, [-9, 0], colors="none", hatches=["////"])
            axis.contour(times, a, mean_w.T, [0], colors="black", linewidths=1)
        axis.set(xlabel="t", ylabel="$a_t$", ylim=(-3, 3), title=f"{title}, l = {clip:g}")
        fig.colorbar(image, ax=axis, label="velocity")
    rho = np.asarray(path_density(target, a, TIMES[-5]))
    axes[2].plot(a, rho, color="black", label="eq. (10)")
    for name, path in paths.items():
        bins, label = np.linspace(-3, 3, 121), f"samples, {name.replace('_', ' ')}"
        axes[2].hist(path[-5], bins, density=True, color=COLOURS[name], alpha=0.6, label=label)
    axes[2].axhline(0, color="0.7", lw=0.5)
    limits = 1.5 * min(rho.min(), -0.05), 1.3 * rho.max()
    axes[2].set(xlabel="a", title=f"density at t = {TIMES[-5]:.3f}, l = {clip:g}", ylim=limits)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--neg-clip", type=float, default=-0.2, help="l of the second row")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    args, landscape = bandit.Args(), bandit.LANDSCAPES["escape"]
    k_init, k_fit = jax.random.split(jax.random.key(flags.seed))
    start = bandit.init_learners(args, landscape, k_init[None]).theta
    start = jax.tree.map(lambda x: x[0], start)
    fig, rows = Figure((13, 7.4), layout="constrained"), []
    axes = fig.subplots(2, 3)
    for row, clip in zip(axes, (0.0, flags.neg_clip), strict=True):
        target = make_target(args.lam, landscape, clip)
        theta = fit_target(landscape, target, start, k_fit)
        paths = {
            "closed_form": np.asarray(flow_path(closed_form_velocity, target, TIMES, 4000)),
            "network": np.asarray(flow_path(bandit.flow_velocity, theta, TIMES, 4000)),
        }
        rows += field_rows(clip, target, paths)
        draw_row(fig, row, clip, target, theta, paths)
    handles = axes[0, 2].get_legend_handles_labels()[0]
    fig.legend(handles=handles, loc="outside lower right", ncols=3)
    fig.savefig(flags.out / "field.png", dpi=70)
    with (flags.out / "field.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
