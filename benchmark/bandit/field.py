"""Section 3.4 on the bandit's landscape `escape`: the velocity of eq. (8), that of a
network trained by eq. (7), and the density rho_t of eq. (10).

    python -m benchmark.bandit.field --out benchmark/bandit   # field.png and field.csv

Particles follow each velocity from N(0, 1) at t = 1 to t = 0. At some times, field.csv
has the mass of rho_t where it is negative, and the total variation distance of rho_t
from the particles: of the closed form, eq. (8), and of the network.
Shapes: A actions, M nodes of quadrature, T times, P particles, C bins.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.scipy.stats import norm
from matplotlib.figure import Figure

import simpo_bandit as bandit
from common import solve_nu

ESCAPE = bandit.LANDSCAPES["escape"]
LAM = bandit.Args.lam
NEG_CLIPS = (0.0, -0.2)  # l of the upper row of the figure and of the lower one
GRAD_STEPS = 300  # of the network
EULER_STEPS = 250  # T
TIMES = np.linspace(1, 0, EULER_STEPS + 1, dtype=np.float32)
PARTICLES = 4000  # P
WIDTH = 0.05  # of a bin
EDGES = np.linspace(-5, 5, 201)
MIDDLES = np.linspace(-4.975, 4.975, 200)  # [C]
ACTIONS = np.linspace(-3, 3, 241, dtype=np.float32)  # [A], of the figure


# ---- eqs. (8), (10) and (11) by quadrature -------------------------------------------
class Target(NamedTuple):
    """The signed measure w pi_old, where pi_old is the landscape's initial Gaussian."""

    a0: jax.Array  # [M], evenly spaced
    mass: jax.Array  # [M], of pi_old; sums to 1
    w: jax.Array  # [M], of mean 1 under mass


def normal_quantiles(num):
    """num points of N(0, 1) of equal mass."""
    return norm.ppf((jnp.arange(num) + 0.5) / num)


def make_target(neg_clip):
    """Stage I without the error of sampling."""
    nodes = ESCAPE.start_mean + ESCAPE.start_std * normal_quantiles(4096)
    reward = ESCAPE.reward(nodes)
    mean = reward.mean()
    std = reward.std()
    nu = solve_nu((reward - mean) / std, LAM, 1, neg_clip)

    z = jnp.linspace(-6, 6, 2001)
    a0 = ESCAPE.start_mean + ESCAPE.start_std * z
    mass = jax.nn.softmax(norm.logpdf(z))
    q = (ESCAPE.reward(a0) - mean) / std
    return Target(a0, mass, w=jnp.maximum((q - nu) / LAM, neg_clip))


def closed_form(target, a_t, t):
    """Eq. (8): a_t [A], t in (0, 1] -> velocity [A], its denominator E[w | a_t] [A].

    Where E[w | a_t] <= 0 the loss has no minimum (section 3.4, case II), and the
    velocity means nothing."""
    noise = (a_t[:, None] - (1 - t) * target.a0) / t  # [A, M]
    posterior = jax.nn.softmax(jnp.log(target.mass) - noise**2 / 2)  # of a0 given a_t
    mean_w = posterior @ target.w
    velocity = (posterior * (noise - target.a0)) @ target.w
    return velocity / (mean_w + 1e-30), mean_w  # far out both are 0 in float32


def closed_form_velocity(target, a_t, t):
    """`closed_form` at many particles, read off a grid."""
    grid = jnp.linspace(-5, 5, 1001)
    velocity, _ = closed_form(target, grid, t)
    return jnp.interp(a_t, grid, velocity)


def path_density(target, t):
    """rho_t of eq. (10) at MIDDLES [C], t in (0, 1]."""
    a = MIDDLES[:, None]
    kernel = norm.pdf(a, (1 - t) * target.a0, t)  # [C, M]
    return np.asarray(kernel @ (target.w * target.mass))


# ---- network and particles -----------------------------------------------------------
@jax.jit
def fit_network(target):
    """The landscape's initial policy after GRAD_STEPS steps of eq. (7), each on fresh
    samples of pi_old."""

    def draw(key):
        z = jax.random.normal(key, (512,))
        a0 = ESCAPE.start_mean + ESCAPE.start_std * z
        return a0, jnp.interp(a0, target.a0, target.w)

    args = bandit.Args(policy_lr=1e-3)
    k_init, k_fit = jax.random.split(jax.random.key(1))
    states = bandit.init_states(args, ESCAPE, k_init[None])
    theta = jax.tree.map(lambda x: x[0], states.theta)
    adam = bandit.flow_optimiser(args)
    opt = adam.init(theta)
    theta, _ = bandit.fit_flow(theta, opt, adam, draw, GRAD_STEPS, k_fit)
    return theta


@functools.partial(jax.jit, static_argnums=0)
def flow_path(velocity, params):
    """Particles at TIMES [T + 1, P], by Euler steps of velocity(params, a_t, t)."""

    def euler(a_t, t):
        step = velocity(params, a_t, t) / EULER_STEPS
        return jnp.clip(a_t - step, -1e3, 1e3), a_t

    last, path = jax.lax.scan(euler, normal_quantiles(PARTICLES), TIMES[:-1])
    return jnp.vstack([path, last])


def total_variation(rho, particles):
    """Distance of rho [C] from particles [P]; those outside count in the end bins."""
    count, _ = np.histogram(np.clip(particles, -5, 5), EDGES)
    return np.abs(count / PARTICLES - rho * WIDTH).sum() / 2


# ---- figure --------------------------------------------------------------------------
def draw_field(axis, target, velocity, params, path):
    """velocity(params, a_t, t), case II hatched, and every 200th particle."""
    times = TIMES[:-1]
    field = jax.lax.map(lambda t: velocity(params, ACTIONS, t), times)
    _, mean_w = jax.lax.map(lambda t: closed_form(target, ACTIONS, t), times)
    image = axis.pcolormesh(times, ACTIONS, field.T, cmap="RdBu_r")
    image.set_clim(-4, 4)
    axis.figure.colorbar(image, label="velocity")
    if mean_w.min() < 0:
        case_2 = axis.contourf(times, ACTIONS, mean_w.T, [-9, 0], colors="none")
        case_2.set(hatch="//")
    axis.plot(TIMES, path[:, 100::200], color="black", lw=0.5)
    axis.set(xlabel="t", ylabel="$a_t$", ylim=(-3, 3))


def draw_density(axis, rho, particles):
    """rho_t [C] beside particles [P] of both velocities."""
    axis.hist(
        particles,
        EDGES,
        density=True,
        histtype="stepfilled",
        alpha=0.5,
        label=["particles of eq. (8)", "of the network"],
    )
    axis.plot(MIDDLES, rho, color="black", label="eq. (10)")
    axis.set(xlabel="a", ylabel="density")
    axis.set(xlim=(-3, 3), ylim=(-0.3, 3))
    axis.legend()


def main(out: Path):
    fig = Figure((13, 7.4), layout="constrained")
    rows = ["neg_clip,t,negative_mass,tv_closed_form,tv_network"]
    for axes, neg_clip in zip(fig.subplots(2, 3), NEG_CLIPS, strict=True):
        target = make_target(neg_clip)
        theta = fit_network(target)
        exact = flow_path(closed_form_velocity, target)
        fitted = flow_path(bandit.flow_velocity, theta)
        for k in range(25, EULER_STEPS, 25):
            rho = path_density(target, TIMES[k])
            negative = np.maximum(-rho, 0).sum() * WIDTH
            distance = total_variation(rho, exact[k])
            network = total_variation(rho, fitted[k])
            numbers = f"{negative:.4f},{distance:.4f},{network:.4f}"
            rows.append(f"{neg_clip:g},{TIMES[k]:.3f},{numbers}")

        draw_field(axes[0], target, closed_form_velocity, target, exact)
        draw_field(axes[1], target, bandit.flow_velocity, theta, fitted)
        rho = path_density(target, TIMES[-5])
        draw_density(axes[2], rho, [exact[-5], fitted[-5]])
        axes[0].set_title(f"eq. (8), l = {neg_clip:g}")
        axes[1].set_title(f"network after {GRAD_STEPS} steps")
        axes[2].set_title(f"t = {TIMES[-5]:.3f}")

    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / "field.png", dpi=70)
    (out / "field.csv").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
