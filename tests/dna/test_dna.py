"""simpo_dna.py: the network, exact laws on two bases, weights and the update.

What a run of the script writes is in test_dna_run.py.
"""

import dataclasses
import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import simpo_dna as sd
import simpo_mujoco
from dna.devices import make_layout
from dna.files import named_leaves
from dna.oracles import Oracles, load_oracle
from simpo_dna import Args

pytestmark = pytest.mark.usefixtures("quick_compiler")
jit_kl_to = jax.jit(sd.kl_to)
FIXTURES = Path(__file__).parent / "fixtures"
LENGTH = 48
SMALL = Args(
    num_samples=8,
    eps_kl=0.9,
    sampling_steps=8,
    neg_clip=-0.5,
    grad_steps=6,
)
KEYS = [jax.random.key(i) for i in range(20)]


# ---- the network ---------------------------------------------------------------------
def outputs(name):
    """Of the original PyTorch classes, by make_fixtures.py."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        return dict(file)


def converted(name):
    """The same network, by dna/convert_drakes.py."""
    models, _ = sd.load_generator(FIXTURES / f"{name}.safetensors")
    return models["pretrained"]


GENERATORS = [("drakes", "raw"), ("drakes", "ema"), ("finetuned", "raw")]


@pytest.mark.parametrize("name,weights", GENERATORS)
def test_generator_agrees_with_the_original(name, weights):
    """Also that the folded time bias of every fifth layer matters."""
    original = outputs("pretrained" if name == "drakes" else name)
    theta = converted(f"{name}.{weights}")
    x = jnp.asarray(original["x"], jnp.int32)
    want = original[weights]
    logits = jax.jit(sd.logits)
    found = logits(theta, x)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=2e-5)
    masked = want[original["x"] == sd.MASK]
    assert len(masked) > 10
    assert np.all(masked.std(axis=0) > 0.05)  # positions of one token differ
    for i in range(0, len(theta["layers"]), 5):
        without = jax.tree.map(jnp.asarray, theta)
        without["layers"][i]["time"] *= 0
        change = logits(without, x) - want
        assert np.abs(change).max() > 1e-3


def test_raw_and_averaged_weights_differ():
    original = outputs("pretrained")
    difference = original["raw"] - original["ema"]
    assert np.abs(difference).max() > 0.1


def test_a_fresh_generator_at_full_size_is_that_of_drakes():
    loaded = converted("drakes.raw")
    fresh = sd.init_generator(jax.random.key(0), 6, 20)
    shapes = jax.tree.map(jnp.shape, loaded)
    assert shapes == jax.tree.map(jnp.shape, fresh)
    first_numbers = set()
    for name, leaf in named_leaves(fresh).items():
        if name.endswith("w") and "norm" not in name:
            first_numbers.add(float(leaf.ravel()[0]))
    assert len(first_numbers) == 23  # every layer has a key of its own
    w = fresh["layers"][3]["conv"]["w"]
    fan_in = 9 * 6
    assert w.var() * fan_in == pytest.approx(1, abs=0.3)

    key = jax.random.key(0)
    theta = jax.eval_shape(lambda: sd.init_generator(key, 128, 20))
    count = sum(leaf.size for leaf in jax.tree.leaves(theta))
    # the original has a time embedder, and a matrix in each time layer
    embedder = 64 + 128 * 128 + 128
    assert count + embedder + 20 * 128 * 128 == 3_326_661


# ---- exact laws on two bases ---------------------------------------------------------
def pairs_of(num):
    """All pairs a b of tokens below num, at the row num a + b: [num^2, 2]."""
    pairs = itertools.product(range(num), repeat=2)
    return np.array(list(pairs))


STATES = pairs_of(5)
IS_MASK = STATES == sd.MASK
SEQUENCES = pairs_of(4)


def random_theta(seed, scale=3.0):
    """A generator that is far from uniform."""
    theta = sd.init_generator(jax.random.key(seed), 8, 5)
    theta["head"][1]["w"] *= scale
    return theta


THETA = random_theta(0)


def exact_log_p(theta):
    """log p(x0 | x_t) for every state [25, 2, 4]."""
    log_p = jax.jit(sd.log_probs)(theta, STATES)
    log_p = np.asarray(log_p, np.float64)
    total = np.logaddexp.reduce(log_p, axis=-1, keepdims=True)
    return log_p - total


@pytest.fixture(scope="module")
def log_p():
    return exact_log_p(THETA)


def chances(num_steps):
    """m_t from the first to the last of the sampler's times."""
    return (1 - 1e-3) * np.linspace(1, 1e-5, num_steps + 1)


def sampler_law(log_p, num_steps):
    """Probabilities of the 16 sequences, by the Markov chain over all 25 states."""
    law = IS_MASK.all(axis=1).astype(float)
    for m_t, m_s in itertools.pairwise(chances(num_steps)):
        stay = np.full((25, 2, 1), m_s)
        leave = np.exp(log_p) * (m_t - m_s)
        q = np.concatenate([leave, stay], axis=-1) / m_t
        known = np.eye(5)[STATES]
        q = np.where(IS_MASK[..., None], q, known)  # bases stay
        first = q[:, 0, STATES[:, 0]]
        second = q[:, 1, STATES[:, 1]]
        law = law @ (first * second)
    last = log_p.argmax(axis=-1) @ (4, 1)
    return np.bincount(last, law, minlength=16)


def total_variation(p, q):
    return np.abs(p - q).sum() / 2


def test_subs_probabilities():
    """The softmax of four logits; a known base is a point mass, so it never changes."""
    p = np.exp(sd.log_probs(THETA, STATES))
    known = np.eye(4)[STATES[~IS_MASK]]
    np.testing.assert_array_equal(p[~IS_MASK], known)
    logits = np.asarray(sd.logits(THETA, STATES))[IS_MASK]
    ratio = np.exp(logits[:, :4])
    want = ratio / ratio.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(p[IS_MASK], want, atol=1e-5)
    assert p[IS_MASK].std() > 0.1


@pytest.mark.parametrize("num_steps", [1, 16])
def test_samples_have_the_law_of_the_chain(num_steps):
    """Of a model whose bases depend on each other: the law depends on T."""
    theta = random_theta(6, 6.0)
    log_p = exact_log_p(theta)
    law = sampler_law(log_p, num_steps)
    assert law.sum() == pytest.approx(1)
    assert total_variation(law, sampler_law(log_p, 17 - num_steps)) > 0.3
    masks = np.full((16_384, 2), sd.MASK)
    x = sd.sample_sequences(theta, num_steps, masks, KEYS[2])
    rows = np.asarray(x) @ (4, 1)
    shares = np.bincount(rows, minlength=16) / len(rows)
    assert total_variation(law, shares) < 0.02  # 0.01 is the noise


def hidden_terms(log_p, m, power=1):
    """E (sum_i [x_i hidden] log p(x_i | x_t))^power of each of the 16 sequences.

    A base is hidden with chance m."""
    total = np.zeros(16)
    for hidden in itertools.product((0, 1), repeat=2):
        chance = math.prod(m if h else 1 - m for h in hidden)
        state = np.where(hidden, sd.MASK, SEQUENCES) @ (5, 1)
        bases = SEQUENCES[..., None]
        terms = np.take_along_axis(log_p[state], bases, axis=-1)
        terms = terms[..., 0] @ hidden
        total += chance * terms**power
    return total


def test_likelihood_has_the_exact_mean_and_variance(log_p):
    """The mean over keys is the bound; each t has a draw of its own."""
    mean = np.zeros(16)
    variance = np.zeros(16)
    for m_t, m_s in itertools.pairwise(chances(4)):
        share = (m_t - m_s) / m_t
        first = hidden_terms(log_p, m_t)
        second = hidden_terms(log_p, m_t, power=2)
        mean += first * share
        variance += (second - first**2) * share**2
    rows = np.repeat(SEQUENCES, 512, axis=0)
    found = sd.log_likelihood(THETA, 4, rows, KEYS[3])
    found = np.asarray(found).reshape(16, 512)
    error = np.abs(found.mean(axis=1) - mean)
    assert np.all(error < 4 * np.sqrt(variance / 512))
    found_variance = found.var(axis=1).sum()
    assert found_variance == pytest.approx(variance.sum(), rel=0.1)
    fine_chain = np.log(sampler_law(log_p, 400))
    assert np.all(mean < fine_chain + 0.1)


def test_mean_loss_is_the_exact_integral(log_p):
    """Of -w log p / t over t and masks, with weights of both signs."""
    midpoints = (np.arange(9) + 0.5) / 9  # exact for what is linear in t
    ts = 1e-3 + 0.999 * midpoints
    terms = [hidden_terms(log_p, 0.999 * t) / t for t in ts]
    w = np.linspace(-1, 3, 16)
    of_each = w * np.mean(terms, axis=0)
    exact = -np.mean(of_each) / 2
    keys = jax.random.split(KEYS[4], 1024)
    w = jnp.array(w)
    loss_of = functools.partial(sd.subs_loss, THETA, SEQUENCES, w)
    losses = jax.jit(jax.vmap(loss_of))
    found = np.asarray(losses(keys))
    error = found.std() / math.sqrt(1024)
    assert abs(found.mean() - exact) < 4 * error
    assert error < 0.03 * exact


def test_times_are_stratified_and_permuted():
    """And a base is hidden with chance (1 - 1e-3) t."""
    x0 = jnp.zeros((16, 1000), int)
    strata = []
    for key in KEYS:
        x_t, hidden, t = sd.mask_at_random(x0, key)
        want = np.where(hidden, sd.MASK, 0)
        np.testing.assert_array_equal(x_t, want)
        t = np.asarray(t)[:, 0]
        error = np.abs(hidden.mean(axis=1) - 0.999 * t)
        variance = t * (1.01 - t) / 1000
        assert np.all(error < 5 * np.sqrt(variance))
        u = (t - 1e-3) / 0.999
        strata.append(np.floor(16 * u))
    in_order = np.sort(strata, axis=1)
    np.testing.assert_array_equal(in_order, [range(16)] * 20)
    assert np.std(strata, axis=0).min() > 2  # no sample keeps its own


# ---- weights and the target measure --------------------------------------------------
def refitted(theta, x0, w, steps, **flags):
    flags = {"finetune_lr": 1e-2, "neg_clip": -0.1, "neg_floor": 0.05} | flags
    args = Args(**flags)
    copy = jax.tree.map(jnp.copy, theta)
    state = sd.init_state(sd.finetune_optimiser(args), copy)
    batch = sd.Replay(x0, jnp.asarray(w, jnp.float32))
    for _ in range(steps):
        state, _, _ = sd.finetune_step(args, state, theta, batch, KEYS[5])
    return state.theta


SIGNS = [
    (1, -1),
    (-1, 1),
    (0, 0),
]


@pytest.mark.parametrize("signs", SIGNS)
def test_the_sign_of_a_weight(signs):
    """A positive one raises its sequence's likelihood, a negative one lowers it."""
    x0 = np.random.default_rng(0).integers(4, size=(2, 10))
    x0 = np.repeat(x0, 8, axis=0)
    w = np.repeat(signs, 8)
    theta = refitted(THETA, x0, w, 10)
    means = []
    for model in (THETA, theta):
        loglik = sd.log_likelihood(model, 64, x0, KEYS[6])
        loglik = loglik.reshape(2, 8)
        means.append(loglik.mean(axis=1))
    change = means[1] - means[0]
    np.testing.assert_array_equal(np.sign(change), signs)
    if any(signs):
        assert np.abs(change).min() > 1


def test_the_rate_falls_to_zero():
    """An iteration has 8 gradient steps: the ninth does nothing."""
    x0 = np.zeros((16, 10), int)
    w = np.ones(16)
    head = []
    for steps in (7, 8, 9):
        end = refitted(THETA, x0, w, steps, finetune_steps=1)
        head.append(end["head"][1]["b"])
    assert not np.array_equal(head[0], head[1])
    assert np.array_equal(head[1], head[2])


def floor_gradient(base, w, floor):
    """Gradient of the last bias where p(A) = 0.002, p(C) = 0.33."""
    theta = jax.tree.map(jnp.zeros_like, THETA)
    last = theta["head"][1]
    last["b"] = jnp.float32([-5, 0, 0, 0, 0])
    x0 = np.full((16, 10), base)
    w = jnp.full(16, w)
    gradient = jax.jit(jax.grad(sd.subs_loss))
    tree = gradient(theta, x0, w, KEYS[0], floor)
    return np.asarray(tree["head"][1]["b"])


def test_negative_weights_stop_at_the_floor():
    """Exactly no gradient from a base of p < neg_floor; all else keeps its own."""
    assert not floor_gradient(0, -1.0, 0.05).any()
    assert floor_gradient(0, -1.0, 0.001).any()
    assert floor_gradient(0, -1.0, 0.0).any()
    others = [(0, 1.0), (1, -1.0)]
    for base, w in others:
        bounded = floor_gradient(base, w, 0.05)
        assert bounded.any()
        np.testing.assert_array_equal(bounded, floor_gradient(base, w, 0.0))


WEIGHTINGS = ["exp", "linear", "square", "wd1", "uniform"]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_those_of_each_group(weighting):
    """As simpo_mujoco's, which tests/test_weights.py checks; all 1 for uniform."""
    neg_clip = -0.3 if weighting == "linear" else 0.0
    args = dataclasses.replace(SMALL, weighting=weighting, neg_clip=neg_clip)
    q = 3 * jax.random.normal(KEYS[0], (4, 8))
    log_lam = jnp.zeros(())
    for _ in range(15):
        w, log_lam, metrics = sd.weigh(args, log_lam, q)
    assert metrics["kl"] == pytest.approx(0.9, abs=0.01)
    lam = np.exp(log_lam)
    assert metrics["lam"] == pytest.approx(lam, rel=1e-5)
    if weighting == "uniform":
        np.testing.assert_array_equal(w, 1)
    else:
        theirs = simpo_mujoco.Args(weighting=weighting, neg_clip=neg_clip)
        want = simpo_mujoco.weights(theirs, q, metrics["lam"])
        np.testing.assert_allclose(w, want, atol=2e-3)
    size = np.abs(w)
    share = size / size.sum(axis=1, keepdims=True)
    ess = 1 / np.sum(share**2, axis=1)
    kl = np.log(8) - stats.entropy(share, axis=1)
    assert metrics["ess"] == pytest.approx(ess.mean(), rel=1e-4)
    assert metrics["w_kl"] == pytest.approx(kl.mean(), abs=1e-4)


def test_kl_to_the_pretrained_model():
    """Where bases are independent it is that of one base."""
    uniform = jax.tree.map(jnp.zeros_like, THETA)
    free = jax.tree.map(jnp.zeros_like, THETA)
    last = free["head"][1]
    last["b"] = jnp.float32([1, 0, -1, 2, 0])
    log_p = exact_log_p(free)[-1, 0]
    p = np.exp(log_p)
    rng = np.random.default_rng(0)
    p = p / p.sum()
    x0 = rng.choice(4, (4096, 2), p=p)
    found = jit_kl_to(uniform, free, x0, KEYS[0])
    want = np.sum(p * (log_p - np.log(0.25)))
    assert found == pytest.approx(want, rel=0.05)


def test_an_anchor_holds_the_model():
    x0 = np.zeros((16, 10), int)
    x0[8:] = 1
    w = np.repeat([2, -2], 8)
    away = []
    for kl_weight in (0.0, 1e3):
        theta = refitted(THETA, x0, w, 20, kl_weight=kl_weight)
        kl = jit_kl_to(THETA, theta, x0, KEYS[1])
        away.append(float(kl))
    assert 0 < away[1] < 0.3 * away[0]


# ---- iterations ----------------------------------------------------------------------
@pytest.fixture(scope="module")
def layout():
    return make_layout(32)


def start(args, layout):
    """A model that is nearly uniform, its state and an empty replay."""
    theta = jax.device_put(random_theta(0, 0.3), layout.whole)
    copy = jax.tree.map(jnp.copy, theta)
    state = sd.init_state(sd.finetune_optimiser(args), copy)
    rows = args.replay * layout.size
    replay = sd.Replay(
        x0=np.zeros((rows, LENGTH), np.int32),
        w=np.zeros(rows, np.float32),
    )
    return theta, jax.device_put(state, layout.whole), replay


def share_of_a(x):
    """A reward that is easily raised."""
    is_a = (x == 0).astype(np.float32)
    return 10 * is_a.mean(axis=1)


def test_finetuning_raises_the_score_and_compiles_once(layout):
    args = dataclasses.replace(
        SMALL, neg_clip=0.0, finetune_lr=5e-3, finetune_steps=16, grad_steps=8
    )
    theta, state, replay = start(args, layout)
    oracles = Oracles(share_of_a, share_of_a)
    key = jax.device_put(jax.random.key(0), layout.whole)
    functions = (sd.finetune_step, sd.sample_sequences, sd.weigh, sd.bounds)
    sizes = [f._cache_size() for f in functions]
    curve = {}
    for _ in range(16):
        state, replay, metrics = sd.iterate(
            args, state, replay, theta, oracles, layout, key
        )
        for name, value in metrics.items():
            curve.setdefault(name, []).append(float(value))
    for f, size in zip(functions, sizes, strict=True):
        assert f._cache_size() == size + 1
    q = curve["q_median"]
    first = np.mean(q[:3])
    last = np.mean(q[-3:])
    assert last > first + 0.4
    kl = np.array(curve["kl"][5:])
    assert np.abs(kl - 0.9).max() < 0.5
    assert curve["kl_pretrained"][0] == 0
    assert curve["kl_pretrained"][-1] > 1


def test_gradient_steps_replay_the_last_iterations(layout, monkeypatch):
    """Each on G N rows of the replay, none twice; the newest ones are its last."""
    args = dataclasses.replace(SMALL, replay=3)
    theta, state, replay = start(args, layout)
    oracles = Oracles(load_oracle("motif", layout=layout), share_of_a)
    key = jax.device_put(jax.random.key(0), layout.whole)
    finetune_step = sd.finetune_step
    used = []

    def rows_of(replay):
        x0 = np.asarray(replay.x0)
        w = np.asarray(replay.w)[:, None]
        return np.concatenate([x0, w], axis=1)

    def as_set(rows):
        return {tuple(row) for row in rows.tolist()}

    def watched(args, state, theta_pretrained, batch, key):
        used.append(as_set(rows_of(batch)))
        return finetune_step(args, state, theta_pretrained, batch, key)

    monkeypatch.setattr(sd, "finetune_step", watched)
    newest = []
    for i in range(4):
        used.clear()
        state, replay, _ = sd.iterate(args, state, replay, theta, oracles, layout, key)
        rows = rows_of(replay)
        newest.append(rows[-32:])
        w = rows[-32:, -1]
        means = w.reshape(4, 8).mean(axis=1)
        np.testing.assert_allclose(means, 1, atol=1e-5)
        expected = [newest[0], newest[0], *newest][-3:]
        np.testing.assert_array_equal(rows, np.concatenate(expected))
        assert len(used) == 6
        all_used = set.union(*used)
        assert as_set(rows) >= all_used
        assert len(all_used) > min(i + 1, 3) * 20
        assert i < 2 or all(len(step) == 32 for step in used)
