"""The two pieces that every SiMPO script shares: the normaliser nu(s) and the dual update of lam.

Paper: SiMPO, arXiv 2603.10250; nu is Appendix E, lam is Appendix G. Copy this file beside a script.
Legend: N samples of one state (the last axis), any leading batch shape, y = (q - nu) / lam.
"""

import jax
import jax.numpy as jnp

LAM_MIN, LAM_MAX = 1e-4, 1e4  # reward units; keeps q / lam finite when all samples have one value


def solve_nu(q, lam, power=1, neg_clip=0.0):
    """Normaliser nu(s) of the power weights: mean_i max(sign(y_i) |y_i|^power, neg_clip) = 1.

    q [..., N] and lam > 0 in reward units, lam a scalar or [..., 1]; power > 0 is a Python number,
    neg_clip <= 0 one or a scalar array. Returns nu [..., 1], float32. Power 1, and power 2 with the
    number 0 as neg_clip, are exact; any other case goes through `solve_nu_for`. nu can be no finer
    than float32 at the size of q: where lam is much smaller than |q|, shift q first (nu moves
    along), as `weights` does.
    Source: App. E, eqs. (24) and (28); for the clip: max(y, l) = l + relu(y - l), so eq. (11) is
    the problem of mass N (1 - l), and nu moves by -lam l.
    """
    q, lam = jnp.asarray(q, jnp.float32), jnp.asarray(lam, jnp.float32)
    lam = jnp.broadcast_to(lam, (*q.shape[:-1], 1))
    if power == 1:
        return _solve_nu_linear(q, lam, 1.0 - neg_clip) - lam * neg_clip
    if power == 2 and not isinstance(neg_clip, jax.Array) and neg_clip == 0:
        return _solve_nu_square(q, lam)
    return solve_nu_for(q, lam, lambda y: jnp.maximum(jnp.sign(y) * jnp.abs(y) ** power, neg_clip))


def solve_nu_for(q, lam, g):
    """Normaliser nu(s) of any weighting: mean_i g((q_i - nu) / lam) = 1.

    q [..., N] and lam > 0 in reward units, lam a scalar or [..., 1]; g is elementwise and
    non-decreasing and must pass 1, else nu is not finite. Returns nu [..., 1], float32.
    Source: eq. (9). Bisection over the ordered bit patterns of float32: 32 halvings visit every
    magnitude, so no bracket is needed and u = (max q - nu) / lam is exact to one rounding.
    """
    q, lam = jnp.asarray(q, jnp.float32), jnp.asarray(lam, jnp.float32)
    lam = jnp.broadcast_to(lam, (*q.shape[:-1], 1))
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


def update_lam(log_lam, q, eps_kl, lr=0.05):
    """One descent step on the dual of lam, eq. (30), averaged over states.

    log_lam scalar; q [..., N] in reward units; eps_kl < log N in nats. Returns the new log_lam and
    the mean KL(softmax(q / lam) || uniform) in nats, which is eps_kl at the optimum.
    Source: App. G, d/dlam = eps_kl + H(p) - log N = eps_kl - KL. The step is taken on log lam and
    leaves out the chain rule's factor lam: same sign and optimum, whatever the scale of q. There
    KL falls by about 2 eps_kl for each unit of log lam, so lr eps_kl must stay well below 1.
    """
    q = (q - jnp.max(q, axis=-1, keepdims=True)) / jnp.exp(log_lam)
    log_p = jax.nn.log_softmax(q, axis=-1)
    kl = jnp.mean(jnp.log(q.shape[-1]) + jnp.sum(jnp.exp(log_p) * log_p, axis=-1))
    log_lam = log_lam - lr * (eps_kl - kl)
    return jnp.clip(log_lam, jnp.log(LAM_MIN), jnp.log(LAM_MAX)), kl


# Both closed forms sort q downwards and work with the gaps between neighbours, in units of lam.
# With y measured from the k-th sample, A_k = sum_{j<=k} (y_j - y_k), E_k = sum_{j<=k} (y_j - y_k)^2
# are sums of positive terms, so float32 loses nothing to cancellation, however large q is.


def _sorted_gaps(q, lam):
    """q sorted downwards [..., N], its gaps d_k = (q_k - q_{k+1}) / lam with d_0 = 0, and k - 1."""
    q = jnp.flip(jnp.sort(q, axis=-1), axis=-1)
    gaps = -jnp.diff(q, axis=-1, prepend=q[..., :1]) / lam
    return q, gaps, jnp.broadcast_to(jnp.arange(q.shape[-1], dtype=jnp.float32), q.shape)


def _solve_nu_linear(q, lam, mean_weight):
    """mean_i relu(y_i) = mean_weight: the largest k with A_k < N mean_weight, eq. (25)."""
    q, gaps, before = _sorted_gaps(q, lam)
    mass = q.shape[-1] * mean_weight
    excess = jnp.cumsum(before * gaps, axis=-1)  # A_{k+1} = A_k + k d_k
    k = jnp.sum(excess < mass, axis=-1, keepdims=True)  # >= 1, since A_1 = 0
    q_k, excess_k = (jnp.take_along_axis(x, k - 1, axis=-1) for x in (q, excess))
    return q_k - lam * (mass - excess_k) / k


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
