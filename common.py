"""The two pieces that every SiMPO script shares: the normaliser nu(s) and the dual update of lam.

Paper: SiMPO, arXiv 2603.10250; nu is Appendix E, lam is Appendix G. Copy this file beside a script.
Legend: N samples of one state (the last axis), any leading batch shape, y = (q - nu) / lam.
"""

import math

import jax
import jax.numpy as jnp

LAM_SHARE = 1e-3  # smallest lam, as a share of the standard deviation of q over N,
LAM_MIN = 1e-12  # and in reward units, where that is 0: (q / lam)^2 is finite for q within 1e4


def solve_nu(q, lam, power=1, neg_clip=0.0):
    """Normaliser nu(s) of the power weights: mean_i max(sign(y_i) |y_i|^power, neg_clip) = 1.

    q [..., N] and lam > 0 in reward units, lam a scalar or [..., 1]; power > 0 is a Python number,
    neg_clip <= 0 one or a scalar array. Returns nu [..., 1], float32, differentiable. Closed forms,
    eqs. (24) and (28), serve power 1 and, without a clip, 2. nu is as fine as float32 at the size
    of q: where lam is much smaller, shift q first (nu moves along). Source: App. E.
    """

    def g(y):
        return jnp.maximum(jnp.sign(y) * jnp.abs(y) ** power, neg_clip)

    if power == 1:
        return _implicit(_solve_nu_linear, q, lam, g, neg_clip)
    if power == 2 and not isinstance(neg_clip, jax.Array) and neg_clip == 0:
        return _implicit(_solve_nu_square, q, lam, g)
    return solve_nu_for(q, lam, g)


def solve_nu_for(q, lam, g):
    """Normaliser nu(s) of any weighting: mean_i g((q_i - nu) / lam) = 1.

    q and lam as in `solve_nu`; g is elementwise, non-decreasing and passes 1, else nu is infinite.
    Returns nu [..., 1], float32, differentiable, also in what g closes over. Source: eq. (9).
    """
    return _implicit(_bisect_nu, q, lam, g, g)


def update_lam(log_lam, q, eps_kl, lr=0.05):
    """One descent step on the dual of lam, eq. (30), averaged over states.

    log_lam scalar; q [..., N] in reward units; eps_kl < log N in nats. Returns the new log_lam and
    the mean KL(softmax(q / lam) || uniform) in nats, which is eps_kl at the optimum.
    Source: App. G, d/dlam = eps_kl + H(p) - log N = eps_kl - KL. The step is taken on log lam,
    without the chain rule's factor lam: same optimum at any scale of q. Keep lr eps_kl below 0.5.
    """
    q = jnp.asarray(q, jnp.float32)
    q = q - jnp.max(q, axis=-1, keepdims=True)
    log_p = jax.nn.log_softmax(q / jnp.exp(log_lam), axis=-1)
    kl = jnp.mean(math.log(q.shape[-1]) + jnp.sum(jnp.exp(log_p) * log_p, axis=-1))
    # where all samples have one value KL is 0 and lam would fall for ever
    lam_min = jnp.maximum(LAM_SHARE * jnp.mean(jnp.std(q, axis=-1)), LAM_MIN)
    return jnp.maximum(log_lam - lr * (eps_kl - kl), jnp.log(lam_min)), kl


def _implicit(solve, q, lam, g, *args):
    """nu = solve(q, lam [..., 1], *args), differentiated as the implicit function of eq. (9):
    dnu/dq_i = g'(y_i) / sum_j g'(y_j) and dnu/dlam = -sum_j g'(y_j) y_j / sum_j g'(y_j)."""
    q, lam = jnp.asarray(q, jnp.float32), jnp.asarray(lam, jnp.float32)
    lam = jnp.broadcast_to(lam, (*q.shape[:-1], 1))
    return jax.lax.custom_root(
        lambda nu: jnp.mean(g((q - nu) / lam), axis=-1, keepdims=True, dtype=jnp.float32) - 1,
        q[..., :1],  # ignored: no initial guess is needed
        lambda *_: solve(q, lam, *args).astype(jnp.float32),
        lambda slope, x: x / slope(jnp.ones_like(x)),  # each state has its own nu: a diagonal
    )


def _bisect_nu(q, lam, g):
    """Bisection over the ordered bit patterns of float32: 32 halvings visit every magnitude, so
    that no bracket is needed and u = (max q - nu) / lam is exact to one rounding."""
    q_max = jnp.max(q, axis=-1, keepdims=True)
    y = (q - q_max) / lam

    def halve(_, bounds):
        lo, hi = bounds
        mid = (lo >> 1) + (hi >> 1) + (lo & hi & 1)  # floor((lo + hi) / 2) without overflow
        above = jnp.mean(g(y + _float_at(mid)), axis=-1, keepdims=True) >= 1
        return jnp.where(above, lo, mid), jnp.where(above, mid, hi)

    inf = jnp.full_like(q_max, jnp.inf).view(jnp.int32)
    _, hi = jax.lax.fori_loop(0, 32, halve, (-inf - 1, inf))
    return q_max - lam * _float_at(hi)


# Both closed forms sort q downwards and work with the gaps between neighbours, in units of lam.
# With y measured from the k-th sample, A_k = sum_{j<=k} (y_j - y_k), E_k = sum_{j<=k} (y_j - y_k)^2
# are sums of positive terms, so float32 loses nothing to cancellation, however large q is.


def _sorted_gaps(q, lam):
    """q sorted downwards [..., N], its gaps d_k = (q_k - q_{k+1}) / lam with d_0 = 0, and k - 1."""
    q = jnp.flip(jnp.sort(q, axis=-1), axis=-1)
    gaps = -jnp.diff(q, axis=-1, prepend=q[..., :1]) / lam
    return q, gaps, jnp.broadcast_to(jnp.arange(q.shape[-1], dtype=jnp.float32), q.shape)


def _solve_nu_linear(q, lam, neg_clip):
    """mean_i max(y_i, l) = 1: since max(y, l) = l + relu(y - l), the problem without a clip for a
    mass of N (1 - l), moved by -lam l. The largest k with A_k < N (1 - l), eq. (25)."""
    q, gaps, before = _sorted_gaps(q, lam)
    mass = q.shape[-1] * (1.0 - neg_clip)
    excess = jnp.cumsum(before * gaps, axis=-1)  # A_{k+1} = A_k + k d_k
    k = jnp.sum(excess < mass, axis=-1, keepdims=True)  # >= 1, since A_1 = 0
    q_k, excess_k = (jnp.take_along_axis(x, k - 1, axis=-1) for x in (q, excess))
    return q_k - lam * (mass - excess_k) / k - lam * neg_clip


def _solve_nu_square(q, lam):
    """mean_i relu(y_i)^2 = 1: the largest k with E_k < N, eq. (29), and the root of
    k z^2 + 2 A_k z = N - E_k, z = y_k - nu / lam > 0, in the form that does not cancel."""
    q, gaps, before = _sorted_gaps(q, lam)
    mass = float(q.shape[-1])
    excess = jnp.cumsum(before * gaps, axis=-1)
    # E_{k+1} = E_k + 2 d_k A_k + k d_k^2 = E_k + d_k (A_k + A_{k+1})
    energy = jnp.cumsum(gaps * (2 * excess - before * gaps), axis=-1)
    k = jnp.sum(energy < mass, axis=-1, keepdims=True)
    q_k, a_k, e_k = (jnp.take_along_axis(x, k - 1, axis=-1) for x in (q, excess, energy))
    return q_k - lam * (mass - e_k) / (a_k + jnp.sqrt(a_k**2 + k * (mass - e_k)))


def _float_at(index):
    """The float32 at an ordered index: int32 order equals float order, -0.0 just below 0.0."""
    bits = jnp.where(index < 0, ~index ^ jnp.int32(-(2**31)), index)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
