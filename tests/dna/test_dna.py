"""simpo_dna.py: the network, exact laws on two bases, weights and the update.

What a run of the script writes is in test_dna_run.py.
"""

import dataclasses
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
SMALL = Args(num_samples=8, eps_kl=0.9, sampling_steps=8, neg_clip=-0.5, grad_steps=6)


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
    np.testing.assert_allclose(logits(theta, x), want, rtol=1e-5, atol=2e-5)
    masked = want[original["x"] == sd.MASK]
    assert len(masked) > 10
    assert np.all(masked.std(axis=0) > 0.05)  # positions of one token differ
    for i in range(0, len(theta["layers"]), 5):
        without = jax.tree.map(jnp.asarray, theta)
        without["layers"][i]["time"] *= 0
        assert np.abs(logits(without, x) - want).max() > 1e-3


def test_raw_and_averaged_weights_differ():
    original = outputs("pretrained")
    assert np.abs(original["raw"] - original["ema"]).max() > 0.1


def test_a_fresh_generator_at_full_size_is_that_of_drakes():
    loaded = converted("drakes.raw")
    fresh = sd.init_generator(jax.random.key(0), 6, 20)
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, fresh)
    first_numbers = set()
    for name, leaf in named_leaves(fresh).items():
        if name.endswith("w") and "norm" not in name:
            first_numbers.add(float(leaf.ravel()[0]))
    assert len(first_numbers) == 23  # every layer has a key of its own
    std = float(fresh["layers"][3]["conv"]["w"].std())
    assert std * np.sqrt(9 * 6) == pytest.approx(1, abs=0.15)

    key = jax.random.key(0)
    theta = jax.eval_shape(lambda: sd.init_generator(key, 128, 20))
    count = sum(leaf.size for leaf in jax.tree.leaves(theta))
    # the original has a time embedder, and a matrix in each time layer
    embedder = 64 + 128 * 128 + 128
    assert count + embedder + 20 * 128 * 128 == 3_326_661


# ---- exact laws on two bases ---------------------------------------------------------
STATES = np.array(list(itertools.product(range(5), repeat=2)))
IS_MASK = STATES == sd.MASK
SEQUENCES = np.array(list(itertools.product(range(4), repeat=2)))  # a b is 4 a + b


def random_theta(seed, scale=3.0):
    """A generator that is far from uniform."""
    theta = sd.init_generator(jax.random.key(seed), 8, 5)
    theta["head"][1]["w"] *= scale
    return theta


THETA = random_theta(0)


def exact_log_p(theta):
    """log p(x0 | x_t) for every state [25, 2, 4]."""
    log_p = np.asarray(jax.jit(sd.log_probs)(theta, STATES), np.float64)
    return log_p - np.logaddexp.reduce(log_p, axis=-1, keepdims=True)


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
        q = np.concatenate([np.exp(log_p) * (m_t - m_s), stay], axis=-1) / m_t
        q = np.where(IS_MASK[..., None], q, np.eye(5)[STATES])  # bases stay
        first = q[:, 0, STATES[:, 0]]
        second = q[:, 1, STATES[:, 1]]
        law = law @ (first * second)
    last = log_p.argmax(axis=-1) @ (4, 1)
    return np.bincount(last, law, minlength=16)


def total_variation(p, q):
    return np.abs(p - q).sum() / 2


def test_subs_probabilities():
    """The softmax of four logits; a known base is a point mass, so it never changes."""
    p = np.exp(np.asarray(sd.log_probs(THETA, STATES)))
    known = STATES[~IS_MASK]
    np.testing.assert_array_equal(p[~IS_MASK], np.eye(4)[known])
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
    x = sd.sample_sequences(theta, num_steps, masks, jax.random.key(2))
    found = np.bincount(np.asarray(x) @ (4, 1), minlength=16) / len(x)
    assert total_variation(law, found) < 0.02  # 0.01 is the noise


def hidden_terms(log_p, m, power=1):
    """E (sum_i [x_i hidden] log p(x_i | x_t))^power of each of the 16 sequences.

    A base is hidden with chance m."""
    total = np.zeros(16)
    for hidden in itertools.product((0, 1), repeat=2):
        chance = math.prod(m if h else 1 - m for h in hidden)
        state = np.where(hidden, sd.MASK, SEQUENCES) @ (5, 1)
        bases = SEQUENCES[..., None]
        terms = np.take_along_axis(log_p[state], bases, axis=-1)[..., 0]
        total += chance * (terms @ hidden) ** power
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
    found = sd.log_likelihood(THETA, 4, rows, jax.random.key(3))
    found = np.asarray(found).reshape(16, 512)
    error = np.abs(found.mean(axis=1) - mean)
    assert np.all(error < 4 * np.sqrt(variance / 512))
    assert found.var(axis=1).sum() == pytest.approx(variance.sum(), rel=0.1)
    fine_chain = np.log(sampler_law(log_p, 400))
    assert np.all(mean < fine_chain + 0.1)


def test_mean_loss_is_the_exact_integral(log_p):
    """Of -w log p / t over t and masks, with weights of both signs."""
    midpoints = (np.arange(9) + 0.5) / 9  # exact for what is linear in t
    ts = 1e-3 + 0.999 * midpoints
    terms = [hidden_terms(log_p, 0.999 * t) / t for t in ts]
    w = np.linspace(-1, 3, 16)
    exact = -np.mean(w * np.mean(terms, axis=0)) / 2
    keys = jax.random.split(jax.random.key(4), 1024)
    losses = jax.vmap(sd.subs_loss, in_axes=(None, None, None, 0))
    found = np.asarray(jax.jit(losses)(THETA, SEQUENCES, jnp.array(w), keys))
    error = found.std() / math.sqrt(1024)
    assert abs(found.mean() - exact) < 4 * error
    assert error < 0.03 * exact


def test_times_are_stratified_and_permuted():
    """And a base is hidden with chance (1 - 1e-3) t."""
    x0 = jnp.zeros((16, 1000), int)
    strata = []
    for i in range(20):
        x_t, hidden, t = sd.mask_at_random(x0, jax.random.key(i))
        np.testing.assert_array_equal(x_t, np.where(hidden, sd.MASK, 0))
        t = np.asarray(t)
        error = hidden.mean(axis=1, keepdims=True) - 0.999 * t
        assert np.all(np.abs(error) < 5 * np.sqrt(t * (1.01 - t) / 1000))
        strata.append(np.floor((t[:, 0] - 1e-3) / 0.999 * 16))
    np.testing.assert_array_equal(np.sort(strata, axis=1), [range(16)] * 20)
    assert np.std(strata, axis=0).min() > 2  # no sample keeps its own


# ---- weights and the target measure --------------------------------------------------
def refitted(theta, x0, w, steps, **flags):
    flags = {"finetune_lr": 1e-2, "neg_clip": -0.1, "neg_floor": 0.05} | flags
    args = Args(**flags)
    copy = jax.tree.map(jnp.copy, theta)
    state = sd.init_state(sd.finetune_optimiser(args), copy)
    batch = sd.Replay(x0, jnp.asarray(w, jnp.float32))
    for _ in range(steps):
        state, _, _ = sd.finetune_step(args, state, theta, batch, jax.random.key(5))
    return state.theta


@pytest.mark.parametrize("signs", [(1, -1), (-1, 1), (0, 0)])
def test_the_sign_of_a_weight(signs):
    """A positive one raises its sequence's likelihood, a negative one lowers it."""
    rng = np.random.default_rng(0)
    x0 = np.repeat(rng.integers(4, size=(2, 10)), 8, axis=0)
    theta = refitted(THETA, x0, np.repeat(signs, 8), 10)
    means = []
    for model in (THETA, theta):
        loglik = sd.log_likelihood(model, 64, x0, jax.random.key(6))
        means.append(loglik.reshape(2, 8).mean(axis=1))
    change = means[1] - means[0]
    np.testing.assert_array_equal(np.sign(change), signs)
    assert np.all(np.abs(change) > 1) or not any(signs)


def test_the_rate_falls_to_zero():
    """An iteration has 8 gradient steps: the ninth does nothing."""
    x0 = np.zeros((16, 10), int)
    head = []
    for steps in (7, 8, 9):
        end = refitted(THETA, x0, np.ones(16), steps, finetune_steps=1)
        head.append(end["head"][1]["b"])
    assert not np.array_equal(head[0], head[1])
    assert np.array_equal(head[1], head[2])


def floor_gradient(base, w, floor):
    """Gradient of the last bias where p(A) = 0.002, p(C) = 0.33."""
    theta = jax.tree.map(jnp.zeros_like, THETA)
    theta["head"][1]["b"] = jnp.array([-5.0, 0, 0, 0, 0])
    x0 = np.full((16, 10), base)
    gradient = jax.jit(jax.grad(sd.subs_loss))
    tree = gradient(theta, x0, jnp.full(16, w), jax.random.key(0), floor)
    return np.asarray(tree["head"][1]["b"])


def test_negative_weights_stop_at_the_floor():
    """Exactly no gradient from a base of p < neg_floor; all else keeps its own."""
    assert not floor_gradient(0, -1.0, 0.05).any()
    assert floor_gradient(0, -1.0, 0.001).any()
    assert floor_gradient(0, -1.0, 0.0).any()
    for base, w in ((0, 1.0), (1, -1.0)):
        bounded = floor_gradient(base, w, 0.05)
        assert bounded.any()
        np.testing.assert_array_equal(bounded, floor_gradient(base, w, 0.0))


WEIGHTINGS = ["exp", "linear", "square", "wd1", "uniform"]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_those_of_each_group(weighting):
    """As simpo_mujoco's, which tests/test_weights.py checks; all 1 for uniform."""
    neg_clip = -0.3 if weighting == "linear" else 0.0
    args = Args(weighting=weighting, neg_clip=neg_clip, num_samples=8, eps_kl=0.9)
    q = jax.random.normal(jax.random.key(0), (4, 8)) * 3
    log_lam = jnp.zeros(())
    for _ in range(15):
        w, log_lam, metrics = sd.weigh(args, log_lam, q)
    assert metrics["kl"] == pytest.approx(0.9, abs=0.01)
    assert metrics["lam"] == pytest.approx(np.exp(log_lam), rel=1e-5)
    if weighting == "uniform":
        np.testing.assert_array_equal(w, 1)
    else:
        theirs = simpo_mujoco.Args(weighting=weighting, neg_clip=neg_clip)
        want = simpo_mujoco.weights(theirs, q, metrics["lam"])
        np.testing.assert_allclose(w, want, atol=2e-3)
    ess = np.mean(np.abs(w).sum(axis=1) ** 2 / np.sum(np.square(w), axis=1))
    assert metrics["ess"] == pytest.approx(ess, rel=1e-4)


def test_kl_to_the_pretrained_model():
    """Where bases are independent it is that of one base."""
    uniform = jax.tree.map(jnp.zeros_like, THETA)
    free = jax.tree.map(jnp.zeros_like, THETA)
    free["head"][1]["b"] = jnp.array([1.0, 0, -1, 2, 0])
    p = np.exp(exact_log_p(free)[-1, 0])
    x0 = np.random.default_rng(0).choice(4, (4096, 2), p=p / p.sum())
    found = float(jit_kl_to(uniform, free, x0, jax.random.key(0)))
    assert found == pytest.approx(np.sum(p * np.log(4 * p)), rel=0.05)


def test_an_anchor_holds_the_model():
    x0 = np.repeat(np.arange(2), 8)[:, None] * np.ones((1, 10), int)
    w = np.repeat([2, -2], 8)
    away = []
    for kl_weight in (0.0, 1e3):
        theta = refitted(THETA, x0, w, 20, kl_weight=kl_weight)
        away.append(float(jit_kl_to(THETA, theta, x0, jax.random.key(1))))
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
    replay = sd.Replay(np.zeros((rows, LENGTH), np.int32), np.zeros(rows, np.float32))
    return theta, jax.device_put(state, layout.whole), replay


def share_of_a(x):
    """A reward that is easily raised."""
    return 10 * np.mean(x == 0, axis=1, dtype=np.float32)


def test_finetuning_raises_the_score_and_compiles_once(layout):
    args = dataclasses.replace(
        SMALL, neg_clip=0.0, finetune_lr=5e-3, finetune_steps=16, grad_steps=8
    )
    theta, state, replay = start(args, layout)
    oracles = Oracles(share_of_a, share_of_a)
    key = jax.device_put(jax.random.key(0), layout.whole)
    functions = (sd.finetune_step, sd.sample_sequences, sd.weigh, sd.bounds)
    before = [f._cache_size() for f in functions]
    rows = []
    for _ in range(16):
        state, replay, metrics = sd.iterate(
            args, state, replay, theta, oracles, layout, key
        )
        rows.append({name: float(value) for name, value in metrics.items()})
    assert [f._cache_size() for f in functions] == [n + 1 for n in before]
    curve = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    assert curve["q_median"][-3:].mean() > curve["q_median"][:3].mean() + 0.4
    assert np.all(np.abs(curve["kl"][5:] - 0.9) < 0.5)
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
        w = np.asarray(replay.w)[:, None]
        return np.concatenate([np.asarray(replay.x0), w], axis=1)

    def watched(args, state, theta_pretrained, batch, key):
        used.append(set(map(tuple, rows_of(batch).tolist())))
        return finetune_step(args, state, theta_pretrained, batch, key)

    monkeypatch.setattr(sd, "finetune_step", watched)
    newest = []
    for i in range(4):
        used.clear()
        state, replay, _ = sd.iterate(args, state, replay, theta, oracles, layout, key)
        rows = rows_of(replay)
        newest.append(rows[-32:])
        means = newest[-1][:, -1].reshape(4, 8).mean(axis=1)
        np.testing.assert_allclose(means, 1, atol=1e-5)
        expected = [newest[max(j, 0)] for j in (i - 2, i - 1, i)]
        np.testing.assert_array_equal(rows, np.concatenate(expected))
        assert len(used) == 6
        assert set(map(tuple, rows.tolist())) >= set.union(*used)
        assert len(set.union(*used)) > min(i + 1, 3) * 20
        assert i < 2 or all(len(step) == 32 for step in used)
