"""What every SiMPO script shares: the normaliser nu(s) and the dual update of lam.

Paper: SiMPO, arXiv 2603.10250; nu is Appendix E, lam is Appendix G. Copy this file
beside a script. Shapes: N samples of one state on the last axis, any leading batch
shape. Throughout, y = (q - nu) / lam.
"""

import math

import jax
import jax.numpy as jnp

# The smallest lam, as a share of the standard deviation of q over N.
LAM_SHARE = 1e-3
# The smallest lam in reward units, for states whose samples are all equal. It keeps
# (q / lam)^2 finite in float32 for |q| up to 1e4.
LAM_MIN = 1e-12


# ---- normaliser ----------------------------------------------------------------------
def solve_nu(q, lam, power=1, neg_clip=0.0):
    """Normaliser nu(s) of the power weights: mean_i max(sign(y_i) |y_i|^power, l) = 1.

    q [..., N] and lam > 0 in reward units, lam a scalar or [..., 1]; power > 0 is a
    Python number; neg_clip is l <= 0, a number or a scalar array. Returns nu [..., 1],
    float32, differentiable. Power 1 and, where l = 0, power 2 have closed forms,
    eqs. (24) and (28). nu is as fine as float32 is at the size of q: where lam is much
    smaller, shift q first, and nu moves along. Source: App. E.
    """

    def g(y):
        w = jnp.sign(y) * jnp.abs(y) ** power
        return jnp.maximum(w, neg_clip)

    if power == 1:
        return _implicit(_solve_nu_linear, q, lam, g, neg_clip)
    non_negative = not isinstance(neg_clip, jax.Array) and neg_clip == 0
    if power == 2 and non_negative:
        return _implicit(_solve_nu_square, q, lam, g)
    return solve_nu_for(q, lam, g)


def solve_nu_for(q, lam, g):
    """Normaliser nu(s) of any weighting: mean_i g((q_i - nu) / lam) = 1.

    q and lam as in `solve_nu`; g is elementwise, non-decreasing, below 1 for small y
    and at least 1 for large y. Returns nu [..., 1], float32, differentiable, also in
    what g closes over. Where g stays on one side of 1, no root exists and nu is
    infinite. Source: eq. (9).
    """
    return _implicit(_bisect_nu, q, lam, g, g)


def _implicit(solve, q, lam, g, *args):
    """nu = solve(q, lam [..., 1], *args), differentiated as an implicit function.

    By eq. (9), dnu/dq_i = g'(y_i) / sum_j g'(y_j)
    and dnu/dlam = -sum_j g'(y_j) y_j / sum_j g'(y_j).
    """
    q = jnp.asarray(q, jnp.float32)
    lam = jnp.asarray(lam, jnp.float32)
    states = q.shape[:-1]
    lam = jnp.broadcast_to(lam, (*states, 1))

    def excess(nu):
        y = (q - nu) / lam
        return _mean(g(y)) - 1

    def root(excess, guess):
        nu = solve(q, lam, *args)
        return nu.astype(jnp.float32)

    def divide(slope, x):
        # each state has its own nu: the slope is a diagonal matrix
        diagonal = slope(jnp.ones_like(x))
        return x / diagonal

    guess = q[..., :1]  # only its shape and type count
    return jax.lax.custom_root(excess, guess, root, divide)


def _mean(w):
    """Over the samples: [..., N] -> [..., 1]."""
    return jnp.mean(w, axis=-1, keepdims=True, dtype=jnp.float32)


# ---- any weighting -------------------------------------------------------------------
def _bisect_nu(q, lam, g):
    """Bisection over the bit patterns of float32, for u = (max q - nu) / lam.

    An ordinary bracket fails here, because no bounds on u hold for every g, and an
    interval as wide as float32 needs over a hundred halvings to find a small u. Read as
    integers, the bit patterns are in the order of the numbers, so that halving between
    two patterns settles the magnitude first and the digits after it. After 32 halvings
    the two bounds are neighbours in float32, whatever the size of u.
    """
    q_max = jnp.max(q, axis=-1, keepdims=True)
    y = (q - q_max) / lam

    def halve(_, bounds):
        lo, hi = bounds
        # floor((lo + hi) / 2) without overflow
        both_odd = lo & hi & 1
        mid = (lo >> 1) + (hi >> 1) + both_odd
        w = g(y + _float_at(mid))
        above = _mean(w) >= 1
        lo = jnp.where(above, lo, mid)
        hi = jnp.where(above, mid, hi)
        return lo, hi

    inf = jnp.full_like(q_max, jnp.inf)
    last = inf.view(jnp.int32)
    first = -last - 1  # where -inf is
    bounds = (first, last)
    _, hi = jax.lax.fori_loop(0, 32, halve, bounds)
    return q_max - lam * _float_at(hi)


def _float_at(index):
    """The float32 at an int32 index into their order; -0.0 is just below 0.0."""
    sign = jnp.int32(-(2**31))
    bits = jnp.where(index < 0, ~index ^ sign, index)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


# ---- closed forms --------------------------------------------------------------------
# Both sort q downwards and work with the gaps between neighbours, in units of lam:
# d_k = (q_k - q_{k+1}) / lam. With y measured from the k-th sample, they need the sums
#     A_k = sum_{j<=k} (y_j - y_k)     and     E_k = sum_{j<=k} (y_j - y_k)^2.
# Summed up from the gaps these have positive terms only, so that float32 loses nothing
# to cancellation, however large q is.


def _sorted_gaps(q, lam):
    """q sorted downwards, d_{k-1} with d_0 = 0, and (k - 1) d_{k-1}, all [..., N]."""
    q = jnp.flip(jnp.sort(q), axis=-1)
    falls = -jnp.diff(q, prepend=q[..., :1])
    gaps = falls / lam
    count = jnp.arange(q.shape[-1], dtype=jnp.float32)
    count = jnp.broadcast_to(count, q.shape)
    return q, gaps, count * gaps


def _take(x, k):
    """The k-th sample of a state, counted from 1: [..., N], [..., 1] -> [..., 1]."""
    return jnp.take_along_axis(x, k - 1, axis=-1)


def _solve_nu_linear(q, lam, neg_clip):
    """mean_i max(y_i, l) = 1, by the largest k with A_k < N (1 - l), eq. (25).

    Since max(y, l) = l + relu(y - l), this is the problem of l = 0 for a mass of
    N (1 - l) instead of N, with nu moved by -lam l.
    """
    q, _, growth = _sorted_gaps(q, lam)
    num_samples = q.shape[-1]
    mass = num_samples * (1.0 - neg_clip)
    # A_{k+1} = A_k + k d_k
    a = jnp.cumsum(growth, axis=-1)
    k = jnp.sum(a < mass, axis=-1, keepdims=True)  # at least 1, since A_1 = 0
    rest = mass - _take(a, k)
    nu = _take(q, k) - lam * rest / k
    return nu - lam * neg_clip


def _solve_nu_square(q, lam):
    """mean_i relu(y_i)^2 = 1, by the largest k with E_k < N, eq. (29).

    z = y_k > 0 is the root of k z^2 + 2 A_k z = N - E_k, in the form that
    does not cancel.
    """
    q, gaps, growth = _sorted_gaps(q, lam)
    mass = float(q.shape[-1])
    a = jnp.cumsum(growth, axis=-1)
    # E_{k+1} = E_k + 2 d_k A_k + k d_k^2 = E_k + d_k (A_k + A_{k+1})
    neighbours = 2 * a - growth
    e = jnp.cumsum(gaps * neighbours, axis=-1)
    k = jnp.sum(e < mass, axis=-1, keepdims=True)
    a_k = _take(a, k)
    rest = mass - _take(e, k)
    root = jnp.sqrt(a_k**2 + k * rest)
    return _take(q, k) - lam * rest / (a_k + root)


# ---- dual of lam ---------------------------------------------------------------------
def update_lam(log_lam, q, eps_kl, lr=0.05):
    """One descent step on the dual of lam, eq. (30), averaged over states.

    log_lam scalar; q [..., N] in reward units; eps_kl < log N in nats. Returns the new
    log_lam and the mean KL(softmax(q / lam) || uniform) in nats, which is eps_kl at the
    optimum. Source: App. G, d/dlam = eps_kl + H(p) - log N = eps_kl - KL. The step is
    taken on log lam, without the chain rule's factor lam: same optimum at any scale of
    q. Keep lr eps_kl below 0.5, or lam swings about its optimum.
    """
    q = jnp.asarray(q, jnp.float32)
    num_samples = q.shape[-1]
    q = q - jnp.max(q, axis=-1, keepdims=True)
    logits = q / jnp.exp(log_lam)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    entropy = -jnp.sum(p * log_p, axis=-1)
    kl = jnp.mean(math.log(num_samples) - entropy)
    log_lam = log_lam - lr * (eps_kl - kl)

    # where all samples have one value the KL is 0, and lam would fall for ever
    spread = jnp.mean(jnp.std(q, axis=-1))
    lam_min = jnp.maximum(LAM_SHARE * spread, LAM_MIN)
    log_lam = jnp.maximum(log_lam, jnp.log(lam_min))
    return log_lam, kl
