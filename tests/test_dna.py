"""simpo_dna.py: exact laws on two bases, the target measure, oracle, data, peers, and the script.

The runs of the script are scenarios: functions that two threads work off in the background; a
test waits for its scenario and looks at what it left.
"""

import copy
import csv
import dataclasses
import functools
import gzip
import itertools
import json
import math
import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, TESTS, Script
from scipy import stats

import drakes
import simpo_dna as dna
from simpo_dna import Args, Data, UsageError

FIXTURES, SITES = TESTS / "fixtures" / "dna", ROOT.parent / "shared/data/dhs_hepg2_k562.csv.gz"
ENFORMER = f"enformer:{FIXTURES / 'oracle.ckpt'}"
LENGTH = 48
TINY = """
    --hidden-dim 16 --sampling-steps 8 --num-samples 8 --num-groups 4 --eps-kl 0.9
    --checkpoint-every 4 --data tiny.csv
""".split()
PRETRAIN = "--batch-size 16 --pretrain-steps 60 --pretrain-lr 5e-3".split()
FINETUNE = "--neg-clip -0.2 --finetune-steps 4 --grad-steps 2 --eval-samples 32".split()
WHOLE = [*TINY, *PRETRAIN, *FINETUNE]
SMALL = Args(num_samples=8, eps_kl=0.9, sampling_steps=8, eval_samples=32, batch_size=16)


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """Most of the time of this file is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def generated():
    return dna.generate_data(400).x


# ---- exact laws on two bases ------------------------------------------------------------------

STATES = np.array(list(itertools.product(range(5), repeat=2)))
SEQUENCES = np.array(list(itertools.product(range(4), repeat=2)))  # in the order of 4 a + b


def random_theta(seed, scale=3.0):
    """A generator that is far from uniform."""
    theta = dna.init_generator(jax.random.key(seed), 8, 5)
    theta["head"][1]["w"] *= scale
    return theta


THETA = random_theta(0)


def exact_log_p(theta):
    """log p(x0 | x_t) for every state [25, 2, 4]."""
    log_p = np.asarray(jax.jit(dna.log_probs)(theta, STATES), np.float64)
    return log_p - np.logaddexp.reduce(log_p, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def log_p():
    return exact_log_p(THETA)


def sampler_law(log_p, num_steps):
    """Probabilities of the 16 sequences, by the Markov chain over all 25 states."""
    m = (1 - 1e-3) * np.linspace(1, 1e-5, num_steps + 1)
    law = np.all(STATES == dna.MASK, axis=1).astype(float)
    for m_t, m_s in itertools.pairwise(m):
        q = np.concatenate([np.exp(log_p) * (m_t - m_s), np.full((25, 2, 1), m_s)], axis=-1) / m_t
        q = np.where((STATES == dna.MASK)[..., None], q, np.eye(5)[STATES])  # bases stay
        law = law @ (q[:, 0][:, STATES[:, 0]] * q[:, 1][:, STATES[:, 1]])
    last = log_p.argmax(axis=-1) @ (4, 1)
    return np.bincount(last, law, minlength=16)


def total_variation(p, q):
    return np.abs(p - q).sum() / 2


def frequencies(x, base=4):
    return np.bincount(np.asarray(x) @ (base, 1), minlength=base * base)


def assert_drawn_from(law, counts):
    """Chi-square test of deterministic draws, on the cells that expect five or more."""
    expected = law * counts.sum()
    assert counts[expected == 0].sum() == 0
    few = expected < 5
    expected, counts = ([*x[~few], x[few].sum()] for x in (expected, counts))
    keep = np.array(expected) > 0
    test = stats.chisquare(np.array(counts)[keep], np.array(expected)[keep])
    assert test.pvalue > 1e-3 and len(counts) > 3


def test_subs_probabilities():
    """They sum to 1 over bases; a known base is a point mass, and so never turns into the mask."""
    p = np.exp(np.asarray(dna.log_probs(THETA, STATES)))
    np.testing.assert_allclose(p.sum(axis=-1), 1, atol=1e-6)
    known = STATES != dna.MASK
    np.testing.assert_array_equal(p[known], np.eye(4)[STATES[known]])
    free = p[~known]
    assert free.min() > 0 and free.max() < 1 and free.std() > 0.1
    raw = np.asarray(dna.logits(THETA, STATES))[~known][:, :4]
    ratio = np.exp(raw - raw.max(axis=-1, keepdims=True))
    np.testing.assert_allclose(free, ratio / ratio.sum(axis=-1, keepdims=True), atol=1e-5)


def test_one_step_of_the_sampler_has_its_law():
    """unmask against q with p made by hand; both positions are independent, a base stays."""
    p = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.15, 0.05]])
    t, s, n = 0.8, 0.3, 20_000
    log_p = np.broadcast_to(np.log(p), (n, 2, 4))
    q = np.concatenate([p * (t - s) / t, np.full((2, 1), s / t)], axis=1)
    for x, law in (
        ((4, 4), np.outer(*q)),
        ((4, 2), np.outer(q[0], np.eye(5)[2])),
        ((0, 1), np.outer(*np.eye(5)[[0, 1]])),
    ):
        drawn = dna.unmask(log_p, jnp.full((n, 2), jnp.array(x)[None]), t, s, jax.random.key(1))
        if dna.MASK in x:
            assert_drawn_from(law.ravel(), frequencies(drawn, 5))
        else:
            np.testing.assert_array_equal(drawn, [x] * n)


@pytest.mark.parametrize("num_steps", [1, 16])
def test_samples_have_the_law_of_the_chain(num_steps):
    """Of a model whose two bases depend on each other, so that the law depends on the steps."""
    theta, masks = random_theta(2), np.full((16_384, 2), dna.MASK)
    law, other = (sampler_law(exact_log_p(theta), n) for n in (num_steps, 17 - num_steps))
    assert law.sum() == pytest.approx(1) and total_variation(law, other) > 0.3
    x = dna.sample_sequences(theta, num_steps, masks, jax.random.key(2))
    assert_drawn_from(law, frequencies(x))


def hidden_terms(log_p, m, power=1):
    """E (sum_i [x_i hidden] log p(x_i | x_t))^power of each sequence [16], hidden with chance m."""
    total = np.zeros(16)
    for hidden in itertools.product((0, 1), repeat=2):
        chance = math.prod(m if h else 1 - m for h in hidden)
        state = np.where(hidden, dna.MASK, SEQUENCES) @ (5, 1)
        terms = np.take_along_axis(log_p[state], SEQUENCES[..., None], axis=-1)[..., 0]
        total += chance * (terms @ hidden) ** power
    return total


def test_likelihood_has_the_exact_mean_and_variance(log_p):
    """The mean over keys is the bound; each t has a draw of its own."""
    mean = variance = 0
    for a, b in itertools.pairwise((1 - 1e-3) * np.linspace(1, 1e-5, 5)):
        first, second = (hidden_terms(log_p, a, power) for power in (1, 2))
        mean = mean + first * (a - b) / a
        variance = variance + (second - first**2) * ((a - b) / a) ** 2
    rows = np.repeat(SEQUENCES, 512, axis=0)
    found = np.asarray(dna.log_likelihood(THETA, 4, rows, jax.random.key(3))).reshape(16, -1)
    assert (np.abs(found.mean(axis=1) - mean) < 4 * np.sqrt(variance / 512)).all()
    assert found.var(axis=1).sum() == pytest.approx(variance.sum(), rel=0.1)
    assert np.all(mean < np.log(sampler_law(log_p, 400)) + 0.05)  # a bound of the fine chain


def test_likelihood_of_the_uniform_model():
    theta = jax.tree.map(jnp.zeros_like, THETA)
    x0 = np.random.default_rng(0).integers(4, size=(128, 200))
    found = dna.log_likelihood(theta, 128, x0, jax.random.key(0))
    assert np.mean(found) == pytest.approx(-200 * math.log(4) * 0.999, abs=1)


def test_mean_loss_is_the_exact_integral(log_p):
    """Of -w log p / t over t and masks, with weights of both signs."""
    t = 1e-3 + 0.999 * (np.arange(9) + 0.5) / 9  # exact for what is linear in t
    integral = sum(hidden_terms(log_p, 0.999 * a) / a for a in t) / len(t) / 2
    w = np.linspace(-1, 3, 16)
    keys = jax.random.split(jax.random.key(4), 1024)
    one_loss = jax.vmap(dna.subs_loss, in_axes=(None, None, None, 0))
    found = np.asarray(jax.jit(one_loss)(THETA, SEQUENCES, jnp.array(w), keys))
    exact, error = -np.mean(w * integral), found.std() / math.sqrt(1024)
    assert abs(found.mean() - exact) < 4 * error and error < 0.02 * exact


def test_times_of_the_loss_are_stratified_and_permuted(monkeypatch):
    """t is read off the loss of the one sample that has weight, where every log p is -1."""
    seen, strata = [], []

    def log_probs(theta, x):
        seen.append(np.mean(np.asarray(x) == dna.MASK, axis=1))
        return -jnp.ones((*x.shape, 4))

    monkeypatch.setattr(dna, "log_probs", log_probs)
    x0, w = jnp.zeros((16, 1000), int), jnp.ones(16)
    for i in range(40):
        share_over_t = 16 * jax.grad(dna.subs_loss, argnums=2)(None, x0, w, jax.random.key(i))
        t = seen[-1] / np.asarray(share_over_t)
        assert np.all(np.abs(seen[-1] - 0.999 * t) < 5 * np.sqrt(t * (1.01 - t) / 1000))
        strata.append(np.floor((t - 1e-3) / 0.999 * 16 + 1e-4))
        assert sorted(strata[-1]) == list(range(16))
    assert min(len(set(one)) for one in np.transpose(strata)) > 10  # no sample keeps its own
    assert np.array(strata).std(axis=1).min() > 0


# ---- weights and the target measure -----------------------------------------------------------


@pytest.mark.parametrize("weighting", ["exp", "linear"])
def test_refit_makes_the_law_the_reweighted_one(weighting, log_p):
    """p w, with p the old law and w of eq. (9), by enumeration."""
    fit = Args(pretrain_steps=1000, pretrain_lr=1e-2, batch_size=256)
    old = sampler_law(log_p, 100)
    rows = np.repeat(np.arange(16), np.round(old * 400).astype(int))
    rows = np.resize(np.random.default_rng(0).permutation(rows), 256)
    q = np.random.default_rng(1).normal(size=16).astype(np.float32)[rows]
    w = dna.weights(Args(weighting=weighting), jnp.array(q)[None], 0.7)[0]
    assert np.mean(w) == pytest.approx(1, abs=1e-5) and np.min(w) >= 0
    target = np.bincount(rows, w, minlength=16) / 256
    fresh = dna.init_generator(jax.random.key(0), 16, 5)
    state, x0 = dna.new_state(fit, "pretrain", fresh), SEQUENCES[rows]
    for _ in range(1000):
        state, _, _ = dna.refit(fit, "pretrain", state, x0, w, jax.random.key(0))
    new = sampler_law(exact_log_p(state.theta), 100)
    assert total_variation(old, target) > 0.2
    assert total_variation(new, target) < 0.06


def refitted(theta, x0, w, steps, **flags):
    args = Args(finetune_lr=1e-2, neg_clip=-0.1, **flags)
    state = dna.new_state(args, "finetune", jax.tree.map(jnp.copy, theta))
    for _ in range(steps):
        state, _, _ = dna.refit(args, "finetune", state, x0, w, jax.random.key(5))
    return state.theta


def test_the_sign_of_a_weight():
    """A positive one raises its sequence's likelihood, a negative one lowers it, 0 is none."""
    rng = np.random.default_rng(0)
    x0 = np.repeat(rng.integers(4, size=(2, 10)), 8, axis=0)
    for w, signs in (((1, -1), (1, -1)), ((-1, 1), (-1, 1)), ((0, 0), (0, 0))):
        theta = refitted(THETA, x0, jnp.repeat(jnp.array(w, jnp.float32), 8), 10)
        before, after = (
            dna.log_likelihood(t, 64, x0, jax.random.key(6)).reshape(2, 8).mean(axis=1)
            for t in (THETA, theta)
        )
        np.testing.assert_array_equal(np.sign(after - before), signs)
        assert np.all(np.abs(after - before) > 1) or not any(w)


def test_negative_weights_stop_at_the_floor():
    """Exactly no gradient from a base of p < neg_floor; other bases and weights keep theirs."""
    theta = jax.tree.map(jnp.zeros_like, THETA)
    theta["head"][1]["b"] = jnp.array([-5.0, 0, 0, 0, 0])  # p(A) = 0.002, p(C) = 0.33
    below, above = np.zeros((16, 10), int), np.ones((16, 10), int)
    grad = jax.jit(jax.grad(dna.subs_loss))

    def gradient(x0, w, floor):
        tree = grad(theta, x0, jnp.full(16, w), jax.random.key(0), floor)
        return np.asarray(tree["head"][1]["b"])

    assert not gradient(below, -1.0, 0.05).any()
    assert gradient(below, -1.0, 0.001).any() and gradient(below, -1.0, 0.0).any()
    np.testing.assert_array_equal(gradient(below, 1.0, 0.05), gradient(below, 1.0, 0.0))
    np.testing.assert_array_equal(gradient(above, -1.0, 0.05), gradient(above, -1.0, 0.0))
    assert gradient(below, 1.0, 0.05).any() and gradient(above, -1.0, 0.05).any()
    stays = refitted(theta, below, -jnp.ones(16), 1)["head"][1]["b"]  # --neg-floor reaches it
    np.testing.assert_array_equal(stays, theta["head"][1]["b"])
    moves = refitted(theta, below, -jnp.ones(16), 1, neg_floor=0.0)["head"][1]["b"]
    assert moves[0] < -5


@pytest.fixture(scope="module")
def motifs():
    return dna.load_motifs("ft")


def weigh(motifs, x0, weighting="linear", neg_clip=0.0, count=1):
    """w [G, N], metrics after `count` calls, each with LAM_STEPS steps of lam."""
    args = Args(weighting=weighting, neg_clip=neg_clip, num_samples=8, eps_kl=0.9)
    state = dna.new_state(args, "finetune", THETA)
    for _ in range(count):
        w, state, metrics = dna.weigh(args, state, random_theta(1), motifs, x0, jax.random.key(0))
    assert metrics["lam"] == pytest.approx(np.exp(state.log_lam), rel=1e-5)
    return np.asarray(w).reshape(4, 8), {k: float(v) for k, v in metrics.items()}


@pytest.mark.parametrize(
    "weighting,neg_clip",
    [("exp", 0.0), ("linear", 0.0), ("linear", -0.3), ("square", -0.3), ("wd1", 0.0)],
)
def test_weights_are_those_of_each_group(weighting, neg_clip, motifs, generated):
    """Mean 1 in a group, 0 for wd1; groups meet in lam alone."""
    x0 = generated[:32, :LENGTH].astype(int)
    w, metrics = weigh(motifs, x0, weighting, neg_clip)
    np.testing.assert_allclose(w.mean(axis=1), 0 if weighting == "wd1" else 1, atol=1e-5)
    order = np.array([2, 0, 3, 1])
    permuted, _ = weigh(motifs, x0.reshape(4, 8, -1)[order].reshape(32, -1), weighting, neg_clip)
    np.testing.assert_allclose(permuted, w[order], rtol=1e-4, atol=1e-5)
    q = np.asarray(dna.motif_score(motifs, x0)).reshape(4, 8)
    for one_q, one_w in zip(q, w, strict=True):
        assert stats.spearmanr(one_q, one_w).statistic > 0.5 and one_w[one_q.argmax()] > 1
        if weighting == "exp":
            expected = np.exp((one_q - one_q.max()) / metrics["lam"])
            np.testing.assert_allclose(one_w, expected / expected.mean(), rtol=1e-3)
        if weighting == "linear":  # a line, but for the clip
            free = one_w > neg_clip + 1e-6
            slope = np.diff(one_w[free]) / np.diff(one_q[free])
            np.testing.assert_allclose(slope, 1 / metrics["lam"], rtol=1e-2)
    assert w.min() == pytest.approx(neg_clip, abs=1e-5) or weighting in ("wd1", "exp")
    size = np.abs(w)
    assert metrics["ess"] == pytest.approx(np.mean(size.sum(1) ** 2 / (w**2).sum(1)), rel=1e-4)
    expected = {"q_median": np.median(q), "q_max": q.max(), "q_spread": q.std(axis=1).mean()}
    expected |= {"w_max": w.max(), "w_negative": np.mean(w < 0)}
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4)
    assert abs(metrics["nll"] - metrics["nll_pretrained"]) > 0.1 and metrics["nll"] > 0.3


def test_lam_reaches_its_bound(motifs, generated):
    x0 = generated[:32, :LENGTH].astype(int)
    _, metrics = weigh(motifs, x0, count=15)
    assert metrics["kl"] == pytest.approx(0.9, abs=0.01)
    q = np.asarray(dna.motif_score(motifs, x0)).reshape(4, 8) / metrics["lam"]
    p = np.exp(q - np.logaddexp.reduce(q, axis=1, keepdims=True))
    assert np.mean(math.log(8) + np.sum(p * np.log(p), axis=1)) == pytest.approx(0.9, abs=0.01)


# ---- motif oracle -----------------------------------------------------------------------------


def sites_by_hand(counts, x):
    """Log-odds of every site of one matrix in x on both strands, and 80 % of their range."""
    odds = np.log((np.array(counts).T + 0.25) / (np.sum(counts, axis=0) + 1)[:, None] / 0.25)
    found = [
        sum(odds[j, strand[i + j]] for j in range(len(odds)))
        for strand in (x, 3 - x[::-1])
        for i in range(len(x) - len(odds) + 1)
    ]
    low, high = odds.min(axis=1).sum(), odds.max(axis=1).sum()
    return np.array(found), low + 0.8 * (high - low)


@pytest.mark.parametrize("part", ["ft", "eval"])
def test_motif_oracle_against_loops(part, generated):
    sets, x = json.loads(dna.MOTIFS.read_text())[part], generated[:6, 20:90]
    params = dna.load_motifs(part)
    score, hits = [], []
    for row in x.astype(int):
        sites = [sites_by_hand(counts, row) for counts in sets["pfm_counts"]]
        z = [
            (np.logaddexp.reduce(s) - mean) / sd
            for (s, _), mean, sd in zip(sites, sets["mean"], sets["sd"], strict=True)
        ]
        score.append(np.dot(sets["w"], [*z, 1]))
        hits.append([np.sum(s >= threshold) for s, threshold in sites])
    x = x.astype(np.int32)
    np.testing.assert_allclose(dna.score("motif", params, x), score, atol=1e-4)
    np.testing.assert_array_equal(dna.motif_hits(params, x), hits)
    assert np.sum(hits) > 5
    other = 3 - x[:, ::-1]
    np.testing.assert_allclose(dna.score("motif", params, other), score, atol=1e-4)
    np.testing.assert_array_equal(dna.motif_hits(params, other), hits)


@pytest.mark.skipif(not SITES.exists(), reason="the real sites are not part of the project")
def test_motif_oracle_on_real_sites():
    with gzip.open(SITES, "rt") as file:
        _, *rows = csv.reader(file)
    letters, cell, chrom, _ = np.array(rows).T
    x = dna.encode("".join(letters)).reshape(len(rows), 200).astype(np.int32)
    liver, chr1 = cell == "HepG2", chrom == "chr1"
    for part, auc in (("ft", 0.906), ("eval", 0.919)):
        params = dna.load_motifs(part)
        q = np.concatenate([dna.score("motif", params, y) for y in np.split(x, 8)])
        rank = stats.mannwhitneyu(q[liver & chr1], q[~liver & chr1]).statistic
        assert rank / np.sum(liver & chr1) / np.sum(~liver & chr1) == pytest.approx(auc, abs=6e-4)
        if part == "ft":
            found = [*np.quantile(q[liver], (0.5, 0.99, 0.999)), np.median(q[~liver])]
            assert found == pytest.approx([1.94, 6.23, 7.61, -1.96], abs=0.006)


# ---- data -------------------------------------------------------------------------------------


def test_generated_data(motifs):
    """Without duplicates, the same at each call, with the sites that the labels of rows promise."""
    x = dna.generate_data().x
    assert x.shape == (20_000, 200) and x.dtype == np.uint8 and x.max() == 3
    assert len(np.unique(x, axis=0)) == len(x)
    np.testing.assert_array_equal(dna.load_data(Args(seed=7)).x, x)
    pairs = np.mean((x[:, :-1] == 1) & (x[:, 1:] == 2))
    assert pairs < 0.6 * np.mean(x == 1) * np.mean(x == 2)  # CpG
    mixed = np.random.default_rng(0).permuted(x[:2000], axis=1)
    sign = np.sign(json.loads(dna.MOTIFS.read_text())["ft"]["w"][:-1])
    hits = [np.asarray(dna.motif_hits(motifs, part.astype(np.int32))) for part in (x[:2000], mixed)]
    own, other = hits[0][1::2].sum(axis=0), hits[0][::2].sum(axis=0)
    assert np.all(np.where(sign > 0, own, other) > 1.15 * np.where(sign > 0, other, own))
    assert hits[0].sum() > 1.3 * hits[1].sum()
    q = np.asarray(dna.score("motif", motifs, x[:2000].astype(np.int32)))
    assert np.median(q[1::2]) > np.median(q[::2]) + 1


ROWS = ["".join(row) for row in itertools.product("ACGT", repeat=4)][:100]
FASTA = "".join(f">{i} some words\n{s[:2]}\n{s[2:].lower()}\n" for i, s in enumerate(ROWS))
CSV = "id,seq,value\n" + "".join(f"{i},{s},{i}\n" for i, s in enumerate(ROWS))


FORMATS = {
    "csv": CSV,
    "lower": CSV.lower().rstrip("\n"),
    "crlf": CSV.replace("\n", "\r\n"),
    "byte-order mark": "\ufeff" + CSV,
    "blank lines": CSV.replace("\n", "\n\n"),
    "sequence": CSV.replace("seq", "sequence"),
    "csv.gz": CSV,
    "fasta": FASTA,
    "fasta-crlf": FASTA.replace("\n", "\r\n"),
    "fasta.gz": FASTA,
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_data(name, tmp_path):
    path, text = tmp_path / "data", FORMATS[name].encode()
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    data = dna.read_data(path, "value")
    assert dna.decode(data.x) == ROWS and data.x.dtype == np.uint8
    assert data.values == (None if "fasta" in name else [str(i) for i in range(100)])
    assert dna.read_data(path, "absent").values is None


BAD_ROWS = {
    "repeats sequence 1": "AAAA",
    "has 5 bases, the first one 4": "ACGTA",
    "has the letter 'N', expected A, C, G and T alone": "ACGN",
    "is empty": "",
}
BAD_FILES = {
    "or CSV with a column seq or sequence, found the first line 'name,x'": b"name,x\n1,2",
    "first line ''": b"",
    "has 3 usable sequences, expected at least 64": b"seq\nAC\nAG\nAT\n",
    "has 0 usable sequences": b"seq\n",
    "codec can't decode": b"\x89PNG\r\n\x1a\n\xff\xfe",
    "ended before": gzip.compress(CSV.encode())[:40],
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_bad_rows_are_named_or_dropped(fault, tmp_path, capsys):
    path = tmp_path / "data.csv"
    path.write_text(CSV + f"200,{BAD_ROWS[fault]},1\n")
    with pytest.raises(UsageError) as error:
        dna.read_data(path, "value")
    line = f"--data {path}: sequence 101 {fault}; --drop-bad-rows skips it"
    assert str(error.value) == line and line.isprintable()
    data = dna.read_data(path, "value", drop_bad_rows=True)
    assert capsys.readouterr().out == f"{path}: 1 of 101 sequences dropped\n"
    assert dna.decode(data.x) == ROWS and len(data.values) == 100


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_files_are_one_line(fault, tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(BAD_FILES[fault])
    for flags in ((), (True,)):
        with pytest.raises(UsageError) as error:
            dna.read_data(path, "value", *flags)
        message = str(error.value)
        assert message.startswith(f"--data {path}") and fault in message and message.isprintable()


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "absent.csv", tmp_path):
        with pytest.raises(UsageError, match=rf"^--data {path}: [^\n]+\Z"):
            dna.read_data(path, "value")


def test_columns_as_numbers():
    np.testing.assert_array_equal(dna.as_numbers(["1", " -2.5e1"], "f", "v"), [1, -25])
    for bad in ("", "x", "nan", "inf"):
        with pytest.raises(UsageError, match=f"^--data f: v of sequence 2 is {bad!r}, no number$"):
            dna.as_numbers(["1", bad, "y"], "f", "v")


# ---- peers and table --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards():
    return dna.device_mesh(SMALL)


@pytest.fixture(scope="module")
def judge(motifs, shards, generated):
    theta = dna.place(THETA, shards[0])
    data = Data(generated[:, :LENGTH], None)
    oracles = dna.place((motifs, dna.load_motifs("eval")), shards[0])
    return dna.make_judge(SMALL, data, theta, oracles, shards)


def test_best_of_n_is_the_best_under_the_oracle(judge, motifs, shards):
    """At the calls asked for, rounded down to whole N."""
    key = jax.random.key(0)
    x, used = dna.best_of(SMALL, judge, 150, LENGTH, key, shards[1])
    pool = dna.generate(SMALL, judge.theta, 128, LENGTH, key, shards[1])
    assert used == 128 and x.shape == (32, LENGTH)
    q = np.asarray(dna.motif_score(motifs, pool)).reshape(32, 4)
    np.testing.assert_allclose(dna.motif_score(motifs, x), q.max(axis=1), atol=1e-4)
    np.testing.assert_array_equal(x, pool.reshape(32, 4, -1)[np.arange(32), q.argmax(axis=1)])
    assert len(np.unique(pool, axis=0)) == 128  # every batch has its own key


def test_smc_keeps_groups_apart_and_raises_the_score(judge, motifs, shards):
    """A group whose first base is known has that base in all of its samples."""
    x, used = dna.run_smc(SMALL, judge, LENGTH, jax.random.key(0), shards[1])
    assert used == 32 * 8 and x.shape == (32, LENGTH) and x.min() == 0 and x.max() == 3
    masks = np.full((32, LENGTH), dna.MASK)
    masks[:, 0] = np.repeat(np.arange(4), 8)
    for i in range(4):
        group = np.asarray(dna.smc(SMALL, THETA, motifs, masks, jax.random.key(i)))
        np.testing.assert_array_equal(group[:, 0], masks[:, 0])
        x = np.concatenate([x, group])
    plain = dna.generate(SMALL, judge.theta, 160, LENGTH, jax.random.key(1), shards[1])
    new, old = (np.asarray(dna.motif_score(motifs, y)) for y in (x, plain))
    assert new.mean() > old.mean() + 1.0


def test_smc_samples_the_tilted_law(monkeypatch, log_p):
    """p exp(q / SMC_TEMPERATURE) with p the model's law and q any score of two bases."""
    monkeypatch.setattr(dna, "score", lambda _, q, x: q[4 * x[:, 0] + x[:, 1]])
    q = np.random.default_rng(2).normal(0, 0.6, size=16).astype(np.float32)
    args = Args(num_samples=256, num_groups=32, sampling_steps=4)
    x = dna.smc(args, THETA, jnp.array(q), np.full((8192, 2), dna.MASK), jax.random.key(0))
    law = sampler_law(log_p, 4)
    target = law * np.exp(q / dna.SMC_TEMPERATURE)
    target /= target.sum()
    assert total_variation(law, target) > 0.3
    assert total_variation(frequencies(x) / 8192, target) < 0.04


def test_kmers_and_batches(judge, shards, generated):
    """3-mers by hand; a last batch that is not full; the reference is the held-out best."""
    x = generated[:37, :LENGTH]
    counts = dict.fromkeys(itertools.product(range(4), repeat=3), 0)
    for row in x.tolist():
        for i in range(LENGTH - 2):
            counts[tuple(row[i : i + 3])] += 1
    np.testing.assert_array_equal(dna.kmer_counts(x), list(counts.values()))
    q = dna.scores(SMALL, "motif", judge.eval, x, shards[1])
    held_out = dna.load_motifs("eval")
    np.testing.assert_allclose(q, dna.motif_score(held_out, x.astype(np.int32)), atol=1e-4)
    value = np.asarray(dna.motif_score(held_out, generated[:, :LENGTH].astype(np.int32)))
    best = generated[np.argsort(-value)[:200], :LENGTH]
    np.testing.assert_array_equal(judge.kmers, dna.kmer_counts(best))
    hits = [dna.motif_hits(dna.load_motifs(p), best.astype(np.int32)) for p in ("ft", "eval")]
    np.testing.assert_array_equal(judge.hits, np.concatenate(hits, axis=1).sum(axis=0))


def test_finetuning_raises_the_score_and_compiles_once(motifs, shards, tmp_path, judge):
    """The score of a model without pretraining, in 16 iterations."""
    args = Args(num_samples=16, sampling_steps=8, finetune_lr=5e-3, finetune_steps=16)
    functions = dna.refit, dna.sample_sequences, dna.weigh
    before = [f._cache_size() for f in functions]
    theta, key = judge.theta, jax.device_put(jax.random.key(0), shards[0])
    place = dna.place(motifs, shards[0])
    dna.run_finetuning(args, tmp_path, theta, place, LENGTH, key, shards, [])
    assert [f._cache_size() for f in functions] == [n + 1 for n in before]
    curve = np.genfromtxt(tmp_path / "finetune.csv", delimiter=",", names=True)
    q = curve["q_median"]
    assert q[-3:].mean() > q[:3].mean() + 1
    assert np.all(np.abs(curve["kl"][5:] - 1.5) < 0.5)
    masks = dna.place(np.full((64, LENGTH), dna.MASK, np.int32), shards[1])
    new = dna.new_state(args, "finetune", theta, LENGTH)
    states = [dna.place(new._replace(step=np.int32(i)), shards[0]) for i in (0, 8)]
    both = [dna.finetune(args, state, theta, place, masks, key)[1] for state in states]
    assert both[0]["q_median"] != both[1]["q_median"]  # an iteration has noise of its own


def test_gradient_steps_replay_the_last_iterations(motifs, shards, judge, monkeypatch):
    """Each on G N rows of the replay, without repetition; the newest ones are its last."""
    args = dataclasses.replace(SMALL, neg_clip=-0.5, grad_steps=6, replay=3)
    key, oracle = jax.device_put(jax.random.key(0), shards[0]), dna.place(motifs, shards[0])
    masks = dna.place(np.full((32, LENGTH), dna.MASK, np.int32), shards[1])
    theta = jax.tree.map(jnp.copy, judge.theta)  # refit gives it away
    state = dna.place(dna.new_state(args, "finetune", theta, LENGTH), shards[0])
    refit, used, newest = dna.refit, [], []

    def watched(args, phase, state, x0, w, key):
        used.append([(*x, float(v)) for x, v in zip(np.asarray(x0).tolist(), w, strict=True)])
        return refit(args, phase, state, x0, w, key)

    monkeypatch.setattr(dna, "refit", watched)
    for i in range(4):
        used.clear()
        state, _ = dna.finetune(args, state, judge.theta, oracle, masks, key)
        x0, w = state.replay
        assert x0.shape == (96, LENGTH) and w.shape == (96,)
        newest.append(np.concatenate([x0[-32:], w[-32:, None]], axis=1))
        np.testing.assert_allclose(w.reshape(-1, 8).mean(axis=1), 1, atol=1e-5)
        expected = np.concatenate([newest[max(j, 0)] for j in (i - 2, i - 1, i)])
        np.testing.assert_array_equal(np.concatenate([x0, w[:, None]], axis=1), expected)
        rows = {tuple(row) for row in np.concatenate([x0, w[:, None]], axis=1).tolist()}
        assert len(used) == 6 and rows >= {row for step in used for row in step}
        assert len({row for step in used for row in step}) > min(i + 1, 3) * 20
        assert len(rows) == 32 * min(i + 1, 3)
        if i >= 2:
            assert all(len(set(step)) == 32 for step in used)


# ---- the script -------------------------------------------------------------------------------

# One argument before the flags, WHERE:COUNT:SIGNAL, signals the run the COUNT-th time it is about
# to take a step of pretrain or finetune, or to draw; "table" leaves out the table. Pictures, which
# take as long as all the rest, are empty.
PATCHED = f"""
import os
import sys

sys.path.insert(0, {str(ROOT)!r})
import simpo_dna

where, count, signum = sys.argv.pop(1).split(":")
calls = []

def before(name, function):
    def call(*args, **kwargs):
        calls.append(name or args[1])
        if calls.count(where) == int(count):
            os.kill(os.getpid(), int(signum))
        return function(*args, **kwargs)
    return call

simpo_dna.refit = before(None, simpo_dna.refit)
simpo_dna.draw_training = before("draw", lambda run_dir: (run_dir / "curves.png").touch())
simpo_dna.draw_motifs = lambda *_: None
if where == "table":
    simpo_dna.make_table = lambda *_: None
sys.exit(simpo_dna.dna())
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory, generated):
    root = tmp_path_factory.mktemp("dna")
    (root / "patched.py").write_text(PATCHED)
    rows = enumerate(dna.decode(generated[:256, :LENGTH]))
    lines = [f"{seq},{i * 7 % 256},{'ab'[i % 2]}" for i, seq in rows]
    (root / "tiny.csv").write_text("\n".join(["seq,hepg2,cell", *lines, ""]))
    return root


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The script with little compiler optimisation."""
    script = Script(tmp_path_factory.mktemp("jax-cache"))
    script.env["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    return script


def run(script, root, *flags, end="none:0:0", **env):
    """-> exit code, stdout, stderr of a run that ends as PATCHED says."""
    script = copy.copy(script)
    script.env = script.env | env
    return script.run(end, *flags, cwd=root, script=root / "patched.py")


def undisturbed(script, root):
    return script.run(*WHOLE, "--run-dir", "whole", cwd=root, script=ROOT / "simpo_dna.py")


def interrupted(script, root):
    """kill -9 between two checkpoints of pretraining and within an iteration of fine-tuning, then
    SIGTERM, and kill -9 between the table and the pictures."""
    ends = [run(script, root, *WHOLE, "--run-dir", "killed", end="pretrain:11:9")]
    for end in ("finetune:4:9", "finetune:3:15", "draw:1:9", "none:0:0"):
        ends.append(run(script, root, "--resume", "killed", end=end))
        if end == "finetune:3:15":
            shutil.copytree(root / "killed", root / "stopped")
    return ends


def in_two_parts(script, root):
    first = run(script, root, *TINY, *PRETRAIN, "--run-dir", "first", "--pretrain-only")
    flags = "--no-compare --run-dir second --pretrained first/pretrained.npz".split()
    return [first, run(script, root, *TINY, *FINETUNE, *flags)]


def spread(script, root):
    """The same on 2 and on 4 devices, up to the table."""
    flags, ends = [*TINY, *FINETUNE, "--pretrained", "whole/pretrained.npz", "--run-dir"], []
    for n in (2, 4):
        xla = script.env["XLA_FLAGS"].replace("count=1", f"count={n}")
        ends.append(run(script, root, *flags, f"devices{n}", end="table:0:0", XLA_FLAGS=xla))
    return ends


def distributed(script, root):
    """The same by two processes, with the table."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    flags = "--pretrained whole/pretrained.npz --run-dir distributed --distributed --no-compare"
    flags = [*TINY, *FINETUNE, *flags.split()]
    with ThreadPoolExecutor(2) as pool:
        start = functools.partial(pool.submit, run, script, root, *flags, **env)
        futures = [start(JAX_PROCESS_ID=str(i)) for i in range(2)]
    return [future.result() for future in futures]


def drakes_files(script, root):
    """The generator with both kinds of weights, and an Enformer in both roles."""
    flags = [*TINY[2:], "--eval-samples", 32, "--pretrained", FIXTURES / "pretrained.ckpt"]
    flags.append("--finetune-steps")
    ema = [*flags, 0, "--run-dir", "ema", "--weights", "ema"]
    oracle = ["--oracle", ENFORMER, "--eval-oracle", ENFORMER]
    raw = [*flags, 1, "--run-dir", "raw", "--no-compare", *oracle]
    return [run(script, root, *ema, end="table:0:0"), run(script, root, *raw)]


@pytest.fixture(scope="module")
def outcome(quick, root):
    """outcome(scenario) -> what it returned; two at a time."""
    with ThreadPoolExecutor(2) as pool:
        futures = {f: pool.submit(f, quick, root) for f in (undisturbed, drakes_files)}
        for f in (interrupted, in_two_parts, spread, distributed):
            after = futures[undisturbed].result
            futures[f] = pool.submit(lambda f=f, after=after: after() and f(quick, root))
        yield lambda scenario: futures[scenario].result()
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module", autouse=True)
def early_start(request):
    """The runs go on beside the tests without one."""
    if any("outcome" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("outcome")


def table_of(run_dir):
    """{row: {column: number}} of metrics.csv."""
    with (run_dir / "metrics.csv").open() as file:
        header, *lines = csv.reader(file)
    assert header == ["method", *dna.COLUMNS]
    return {name: dict(zip(dna.COLUMNS, map(float, row), strict=True)) for name, *row in lines}


def samples_of(run_dir, name):
    """x [32, L] of a FASTA file that names its samples after the row."""
    lines = (run_dir / f"{name}.fasta").read_text().splitlines()
    assert lines[::2] == [f">{name}_{i}" for i in range(32)]
    return dna.encode("".join(lines[1::2])).reshape(32, LENGTH).astype(np.int32)


def curve_of(run_dir, phase="finetune"):
    return np.genfromtxt(run_dir / f"{phase}.csv", delimiter=",", names=True, ndmin=1)


def assert_same(run_dir, other, *names):
    """Text files byte for byte, npz files by their arrays and meta."""
    for name in names:
        if name.endswith(".npz"):
            (ours, meta), (theirs, other_meta) = (
                dna.load_arrays(x / name) for x in (run_dir, other)
            )
            assert meta == other_meta and ours.keys() == theirs.keys()
            for key in ours:
                np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
        else:
            assert (run_dir / name).read_bytes() == (other / name).read_bytes(), name


def test_a_run_writes_its_folder(outcome, root, call, generated):
    code, out, err = outcome(undisturbed)
    assert code == 0, err
    assert out.startswith("run folder  whole\ndevice      1 x cpu\nmethod ") and "Trace" not in err
    rows = "pretrained", "best-of-n", "smc", "simpo-linear(-0.2)"
    whole = root / "whole"
    found = {path.name for path in whole.iterdir() if not path.name.startswith("events.")}
    assert found == {
        *(f"{name}.fasta" for name in rows),
        *(f"{x}{y}" for x in ("pretrain", "finetune") for y in (".csv", "_checkpoint.npz")),
        *("pretrained.npz", "finetuned.npz", "args.json", "versions.json", "metrics.csv"),
        *("curves.png", "curves.pdf", "motifs.png", "motifs.pdf"),
    }
    args = json.loads((whole / "args.json").read_text())
    assert Args(**args) == Args(**args | {"neg_clip": -0.2, "data": "tiny.csv", "batch_size": 16})
    assert json.loads((whole / "versions.json").read_text())["jax"] == jax.__version__
    for name in ("curves", "motifs"):
        assert (whole / f"{name}.pdf").read_bytes()[:5] == b"%PDF-"
        picture = matplotlib.image.imread(whole / f"{name}.png")
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.05
    pretrain, finetune = (curve_of(whole, phase) for phase in ("pretrain", "finetune"))
    np.testing.assert_array_equal(pretrain["step"], [50, 60])
    np.testing.assert_array_equal(finetune["step"], [1, 2, 3, 4])
    assert np.all(np.abs(pretrain["valid_nll"] - 1.386) < 0.1)  # of 24 sequences
    theta, x = dna.load_theta(Args(), whole / "pretrained.npz"), generated[:256, :LENGTH]
    learnt = dna.log_likelihood(theta, 64, x.astype(np.int32), jax.random.key(0))
    assert np.mean(learnt) / LENGTH > -1.38  # -log 4 = -1.386
    assert finetune["nll"][0] == finetune["nll_pretrained"][0]
    assert np.all(finetune["nll"][1:] != finetune["nll_pretrained"][1:])
    assert finetune["w_negative"].max() > 0
    assert call("--resume whole")[:2] == (0, "whole is complete\n")


def test_the_table_follows_from_the_samples(outcome, root, motifs):
    """Every number of metrics.csv from the FASTA files, and on stdout."""
    code, out, err = outcome(undisturbed)
    assert code == 0, err
    table, data = table_of(root / "whole"), dna.read_data(root / "tiny.csv", "hepg2")
    best = data.x[np.argsort(-np.array(data.values, float))[:200]].astype(np.int32)
    both = motifs, dna.load_motifs("eval")
    theta = dna.load_theta(Args(), root / "whole" / "pretrained.npz")
    for (name, row), calls in zip(table.items(), (0, 128, 256, 128), strict=True):
        x = samples_of(root / "whole", name)
        ft, held_out = (np.median(dna.score("motif", m, x)) for m in both)
        hits = [np.concatenate([dna.motif_hits(m, y).sum(axis=0) for m in both]) for y in (x, best)]
        kmers = [dna.kmer_counts(y) for y in (x, best)]
        corr = np.corrcoef(*kmers)[0, 1], stats.spearmanr(*hits).statistic
        log_lik = np.median(dna.log_likelihood(theta, 8, x, jax.random.key(9)))  # another key
        assert row["log_lik"] == pytest.approx(log_lik, abs=4)
        share = np.isin(x, (1, 2)).mean(), len(np.unique(x, axis=0)) / 32
        expected = ft, held_out, *corr, row["log_lik"], *share, calls
        assert list(row.values()) == pytest.approx(expected, rel=1e-3, abs=1e-4)
        [line] = re.findall(rf"^{re.escape(name)} +(\S.*)$", out, re.MULTILINE)
        shown = [float(cell) for cell in line.split()]
        assert shown == pytest.approx(list(row.values()), abs=6e-4)


def test_killed_and_signalled_ends_bit_identical(outcome, root):
    """kill -9 and SIGTERM; every run goes on where the last checkpoint was."""
    ends = outcome(interrupted)
    assert [end[0] for end in ends] == [-9, -9, 143, -9, 0], ends
    assert "stopped; --resume killed goes on\n" in ends[2][2]
    assert len(curve_of(root / "stopped")) == 3 and not (root / "stopped/metrics.csv").exists()
    assert outcome(undisturbed)[0] == 0
    names = "pretrain.csv", "finetune.csv", "metrics.csv", "pretrained.npz", "finetuned.npz"
    assert_same(root / "killed", root / "whole", *names, "finetune_checkpoint.npz", "smc.fasta")


def test_a_kill_before_the_pictures_does_not_lose_them(outcome, root):
    assert outcome(interrupted)[-1][0] == 0
    assert (root / "killed" / "curves.png").exists()


def test_a_kill_before_the_last_row_of_a_csv_does_not_lose_it(tmp_path, monkeypatch):
    """The checkpoint of the last step is there and the row is not, at the worst moment."""
    phase = dna.Phase("finetune", 3, 0, 1, 1, "x")
    state = dna.TrainState({"w": np.zeros(2)}, (), np.zeros(()), np.zeros((), np.int32))
    whole = dna.device_mesh(SMALL)[0]
    savetxt = np.savetxt

    def kill(path, curve, *rest, **style):
        if len(curve) == 3:
            raise KeyboardInterrupt
        savetxt(path, curve, *rest, **style)

    def step_once(state, step, due):
        return state, {"x": np.float32(step)}

    monkeypatch.setattr(np, "savetxt", kill)
    with pytest.raises(KeyboardInterrupt):
        dna.run_phase(SMALL, tmp_path, phase, state, step_once, whole, [])
    monkeypatch.setattr(np, "savetxt", savetxt)
    dna.run_phase(SMALL, tmp_path, phase, state, step_once, whole, [])
    np.testing.assert_array_equal(curve_of(tmp_path)["x"], [0, 1, 2])


def test_pretraining_and_fine_tuning_apart(outcome, root):
    (code, _, err), (code2, out, err2) = outcome(in_two_parts)
    assert (code, code2) == (0, 0), err + err2
    assert outcome(undisturbed)[0] == 0
    assert_same(root / "first", root / "whole", "pretrained.npz", "pretrain.csv")
    assert not (root / "first" / "finetune.csv").exists()
    assert_same(root / "second", root / "whole", "finetune.csv", "finetuned.npz")
    assert list(table_of(root / "second")) == ["pretrained", "simpo-linear(-0.2)"]
    assert not (root / "second" / "pretrain.csv").exists()


def assert_same_curve(run_dir, other):
    ours, theirs = curve_of(run_dir), curve_of(other)
    assert ours.dtype.names == theirs.dtype.names and len(ours) == 4
    for name in ours.dtype.names:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, err_msg=name)


def test_the_number_of_devices_does_not_matter(outcome, root):
    for n, (code, out, err) in zip((2, 4), outcome(spread), strict=True):
        assert code == 0, err
        assert f"\ndevice      {n} x cpu\n" in out
        assert_same_curve(root / f"devices{n}", root / "whole")


def test_two_processes_agree_with_one(outcome, root):
    """One of them writes and prints."""
    (code, out, err), (code2, out2, err2) = outcome(distributed)
    assert (code, code2) == (0, 0), err + err2
    assert "device      2 x cpu\n" in out and "\nmethod" in out and "method" not in out2
    assert outcome(undisturbed)[0] == 0 and outcome(in_two_parts)[1][0] == 0
    assert_same_curve(root / "distributed", root / "whole")
    table, alone = (table_of(root / name) for name in ("distributed", "second"))
    for name in alone:
        assert table[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-3), name
    assert table.keys() == alone.keys()


def test_files_of_drakes(outcome, root):
    ends = outcome(drakes_files)
    assert [end[0] for end in ends] == [0, 0], ends
    for kind in ("raw", "ema"):
        theta = drakes.load_generator(FIXTURES / "pretrained.ckpt", kind)
        found = dna.load_theta(Args(), root / kind / "pretrained.npz")
        jax.tree.map(np.testing.assert_array_equal, found, theta)
    oracle = drakes.load_oracle(FIXTURES / "oracle.ckpt")
    for name, row in table_of(root / "raw").items():
        q = np.median(jax.jit(drakes.enformer)(oracle, samples_of(root / "raw", name))[:, 0])
        assert (row["ft"], row["eval"]) == pytest.approx((q, q), rel=1e-3, abs=1e-4)


# ---- flags and errors -------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch, capsys, root):
    """call(line) -> exit code, stdout, stderr of the script in this process and folder."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(dna, "generate_data", lambda: Data(np.eye(100, 48, dtype=np.uint8), None))

    def run(line):
        monkeypatch.setattr("sys.argv", ["simpo_dna.py", *line.split()])
        return dna.dna(), *capsys.readouterr()

    return run


CHECKPOINT = f"{FIXTURES / 'pretrained.ckpt'} --data tiny.csv"


@pytest.mark.parametrize(
    "line,word",
    [
        ("--eps-kl 3.5", "log N = 3.466"),
        ("--eps-kl nan", "got nan"),
        ("--num-samples 1", "at least 2"),
        ("--neg-clip 0.1", "at most 0"),
        ("--neg-clip -0.1 --weighting exp", "0 for exp"),
        ("--neg-clip -0.1 --weighting wd1", "0 for wd1"),
        ("--neg-floor 1", "[0, 1)"),
        ("--seed -1", "2^32"),
        ("--grad-steps 0", "at least 1"),
        ("--finetune-lr 0", "above 0"),
        ("--oracle kind:file", "motif or enformer:FILE"),
        ("--oracle enformer:", "motif or enformer:FILE"),
        (f"--eval-oracle {ENFORMER}", "of the kind of --oracle"),
        (f"--eval-oracle None --oracle {ENFORMER}", "of the kind of --oracle"),
        (f"--eval-oracle {ENFORMER} --oracle enformer:absent.ckpt", "absent.ckpt"),
        ("--num-layers 7", "a multiple of 5"),
        ("--hidden-dim 0", "at least 1"),
        (f"--hidden-dim 16 --pretrained {CHECKPOINT}", "has "),
        (f"--num-layers 10 --pretrained {CHECKPOINT}", "has "),
        (f"--pretrained {FIXTURES / 'pretrained.ckpt'}", "--data"),
        ("--pretrained absent.npz", "absent.npz"),
        ("--pretrained absent.ckpt --data tiny.csv", "absent.ckpt"),
        ("--pretrained tiny.csv --data tiny.csv", "tiny.csv"),
        ("--pretrained absent.npz --pretrain-only", "--pretrain-only"),
        ("--pretrained absent.npz --pretrain-steps 3", "--pretrain-steps"),
        ("--pretrain-only --neg-clip -0.1", "--neg-clip"),
        ("--pretrain-only --no-compare", "--compare"),
        ("--pretrain-only --eval-samples 10", "--eval-samples"),
        ("--neg-floor 0.1", "weights >= 0"),
        ("--score-column k562", "the generated data"),
        ("--data tiny.csv --score-column cell", "cell of sequence 1 is 'a', no number"),
        ("--weights ema", "--weights"),
        ("--data absent.csv", "absent.csv"),
        ("--data short.csv", "17 bases or more"),
        ("--pretrained used/args.json --data tiny.csv", "expected a zip file by torch.save"),
        ("--data tiny.csv --run-dir used", "--run-dir used is not empty"),
        ("--data tiny.csv --run-dir tiny.csv", "--run-dir tiny.csv"),
        ("--data tiny.csv --num-devices 3", "--num-devices must be at most 2"),
        ("--data tiny.csv --num-devices 2 --batch-size 15", "divide"),
        ("--verify-oracle hepg2", "beside --data"),
        ("--verify-oracle absent --data tiny.csv", "absent"),
        ("--unknown 1", "--unknown"),
        ("--weighting square2", "square2"),
        ("--seed x", "--seed"),
        ("--resume absent", "absent is not a run folder"),
        ("--resume used --seed 2", "--seed 2 beside --resume, but the run has 1"),
        ("--resume used --neg-clip -0.1", "--neg-clip -0.1 beside --resume"),
    ],
)
def test_bad_flags_are_one_line(line, word, call, root):
    used = root / "used"
    used.mkdir(exist_ok=True)
    (used / "args.json").write_text(json.dumps(vars(Args(run_dir="used"))))
    (root / "short.csv").write_text(CSV)
    code, out, err = call(line)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err) and word in err, err
    assert len(list(used.iterdir())) == 1 and not (root / "runs").exists()


def test_verify_oracle(call, root, motifs):
    """Correlations with a column of numbers, the AUC of two labels; of --eval-samples rows."""
    data = dna.read_data(root / "tiny.csv", "hepg2")
    q = {p: dna.motif_score(dna.load_motifs(p), data.x.astype(int)) for p in ("ft", "eval")}
    code, out, err = call("--data tiny.csv --verify-oracle hepg2")
    assert code == 0, err
    column = np.array(data.values, float)
    assert out == "".join(
        f"{part} oracle motif, 256 sequences: Pearson {stats.pearsonr(q[part], column)[0]:.3f}, "
        f"Spearman {stats.spearmanr(q[part], column)[0]:.3f}\n"
        for part in q
    )
    code, out, err = call("--data tiny.csv --verify-oracle cell")
    assert code == 0, err
    area = {p: np.mean(np.array(q[p])[::2, None] > np.array(q[p])[None, 1::2]) for p in q}
    assert out == "".join(
        f"{part} oracle motif, 256 sequences: AUC of a against b {area[part]:.3f}\n" for part in q
    )
    assert "64 sequences" in call("--data tiny.csv --verify-oracle cell --eval-samples 64")[1]


def test_an_error_from_a_shell(quick, tmp_path):
    code, out, err = quick.run("--eps-kl", 4, cwd=tmp_path, script=ROOT / "simpo_dna.py")
    assert (code, out) == (2, "") and re.fullmatch(r"error: --eps-kl must be [^\n]+\n", err)
    assert list(tmp_path.iterdir()) == []
