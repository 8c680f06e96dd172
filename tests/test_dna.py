"""simpo_dna.py: exact laws on two bases, the target measure, the table, and the script.

The runs of the script are scenarios: functions that two threads work off in the background; a
test waits for its scenario and looks at what it left.
"""

import copy
import csv
import dataclasses
import functools
import itertools
import json
import math
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, Script, pairs
from scipy import stats

import simpo_dna as sd
import simpo_mujoco
from dna.data import Data, decode, encode, generate_data, named_leaves, save_arrays
from dna.oracles import Oracle, load_motifs, load_oracle, motif_hits, motif_score
from simpo_dna import Args

pytestmark = pytest.mark.usefixtures("quick_compiler")
jit_kl_to = jax.jit(sd.kl_to)
FIXTURES = ROOT / "dna" / "tests" / "fixtures"
LENGTH = 48
TINY = """
    --sampling-steps 8 --num-samples 8 --num-groups 4 --eps-kl 0.9 --checkpoint-every 4
    --data tiny.csv --score-column hepg2 --eval-samples 32
""".split()
PRETRAIN = "--hidden-dim 16 --batch-size 16 --pretrain-steps 60 --pretrain-lr 5e-3".split()
FINETUNE = "--neg-clip -0.2 --neg-floor 0.05 --finetune-steps 3 --grad-steps 2".split()
WHOLE = [*TINY, *PRETRAIN, *FINETUNE]
SMALL = Args(num_samples=8, eps_kl=0.9, sampling_steps=8, eval_samples=32, batch_size=16)


@pytest.fixture(scope="module")
def generated():
    return generate_data(400).x


# ---- the network -------------------------------------------------------------------------------

GENERATORS = [("pretrained", "raw"), ("pretrained", "ema"), ("finetuned", "raw")]


def outputs(name):
    """Of the original PyTorch classes, by dna/tests/make_fixtures.py."""
    with np.load(FIXTURES / f"{name}.npz") as file:
        return dict(file)


def drakes(name):
    """The same network, by dna/convert_drakes.py."""
    return sd.load_theta(Args(data="x"), FIXTURES / f"{name}.npz")[0]


@pytest.mark.parametrize(("name", "weights"), GENERATORS)
def test_generator_agrees_with_the_original(name, weights):
    """Also that the folded time bias of every fifth layer matters."""
    data, theta = outputs(name), drakes(f"{name}.{weights}")
    x, want = jnp.asarray(data["x"], jnp.int32), data[weights]
    np.testing.assert_allclose(jax.jit(sd.logits)(theta, x), want, rtol=1e-5, atol=2e-5)
    masked = want[data["x"] == 4]  # logits differ between positions that hold the same token
    assert len(masked) > 10 and np.all(masked.std(axis=0) > 0.05)
    for i in range(0, len(theta["layers"]), 5):
        without = jax.tree.map(jnp.asarray, theta)
        without["layers"][i]["time"] *= 0
        assert np.abs(jax.jit(sd.logits)(without, x) - want).max() > 1e-3
    assert np.abs(outputs("pretrained")["raw"] - outputs("pretrained")["ema"]).max() > 0.1


def test_a_fresh_generator_at_full_size_is_that_of_drakes():
    loaded, fresh = drakes("pretrained.raw"), sd.init_generator(jax.random.key(0), 6, 20)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (loaded, fresh)]
    assert shapes[0] == shapes[1]
    weights = [w for name, w in named_leaves(fresh).items() if "'w'" in name and "norm" not in name]
    assert len(weights) == 23 and len({float(w.ravel()[0]) for w in weights}) == 23  # own keys
    key = jax.random.key(0)
    theta = jax.eval_shape(lambda: sd.init_generator(key, 128, 20))
    # without the time embedder, and a bias in place of each time layer's matrix and bias
    embedder = 64 + 128 * 128 + 128
    count = sum(x.size for x in jax.tree.leaves(theta))
    assert count + embedder + 20 * 128 * 128 == 3_326_661
    std = float(fresh["layers"][3]["conv"]["w"].std())
    assert abs(std * np.sqrt(9 * 6) - 1) < 0.15


# ---- exact laws on two bases ------------------------------------------------------------------

STATES = np.array(list(itertools.product(range(5), repeat=2)))
SEQUENCES = np.array(list(itertools.product(range(4), repeat=2)))  # in the order of 4 a + b


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


def sampler_law(log_p, num_steps):
    """Probabilities of the 16 sequences, by the Markov chain over all 25 states."""
    m = (1 - 1e-3) * np.linspace(1, 1e-5, num_steps + 1)
    law = np.all(STATES == sd.MASK, axis=1).astype(float)
    for m_t, m_s in itertools.pairwise(m):
        q = np.concatenate([np.exp(log_p) * (m_t - m_s), np.full((25, 2, 1), m_s)], axis=-1) / m_t
        q = np.where((STATES == sd.MASK)[..., None], q, np.eye(5)[STATES])  # bases stay
        law = law @ (q[:, 0][:, STATES[:, 0]] * q[:, 1][:, STATES[:, 1]])
    last = log_p.argmax(axis=-1) @ (4, 1)
    return np.bincount(last, law, minlength=16)


def total_variation(p, q):
    return np.abs(p - q).sum() / 2


def test_subs_probabilities():
    """The softmax of four logits; a known base is a point mass, so never turns into the mask."""
    p, known = np.exp(np.asarray(sd.log_probs(THETA, STATES))), STATES != sd.MASK
    np.testing.assert_array_equal(p[known], np.eye(4)[STATES[known]])
    ratio = np.exp(np.asarray(sd.logits(THETA, STATES))[~known][:, :4])
    np.testing.assert_allclose(p[~known], ratio / ratio.sum(axis=-1, keepdims=True), atol=1e-5)
    assert p[~known].std() > 0.1


@pytest.mark.parametrize("num_steps", [1, 16])
def test_samples_have_the_law_of_the_chain(num_steps):
    """Of a model whose two bases depend on each other, so that the law depends on the steps."""
    theta, masks = random_theta(6, 6.0), np.full((16_384, 2), sd.MASK)
    law, other = (sampler_law(exact_log_p(theta), n) for n in (num_steps, 17 - num_steps))
    assert law.sum() == pytest.approx(1) and total_variation(law, other) > 0.3
    x = sd.sample_sequences(theta, num_steps, masks, jax.random.key(2))
    found = np.bincount(np.asarray(x) @ (4, 1), minlength=16) / len(x)
    assert total_variation(law, found) < 0.02  # 0.01 is the noise


def hidden_terms(log_p, m, power=1):
    """E (sum_i [x_i hidden] log p(x_i | x_t))^power of each sequence [16], hidden with chance m."""
    total = np.zeros(16)
    for hidden in itertools.product((0, 1), repeat=2):
        chance = math.prod(m if h else 1 - m for h in hidden)
        state = np.where(hidden, sd.MASK, SEQUENCES) @ (5, 1)
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
    found = np.asarray(sd.log_likelihood(THETA, 4, rows, jax.random.key(3))).reshape(16, -1)
    assert (np.abs(found.mean(axis=1) - mean) < 4 * np.sqrt(variance / 512)).all()
    assert found.var(axis=1).sum() == pytest.approx(variance.sum(), rel=0.1)
    assert np.all(mean < np.log(sampler_law(log_p, 400)) + 0.1)  # a bound of the fine chain


def test_mean_loss_is_the_exact_integral(log_p):
    """Of -w log p / t over t and masks, with weights of both signs."""
    t = 1e-3 + 0.999 * (np.arange(9) + 0.5) / 9  # exact for what is linear in t
    integral = sum(hidden_terms(log_p, 0.999 * a) / a for a in t) / len(t) / 2
    w = np.linspace(-1, 3, 16)
    keys = jax.random.split(jax.random.key(4), 1024)
    one_loss = jax.vmap(sd.subs_loss, in_axes=(None, None, None, 0))
    found = np.asarray(jax.jit(one_loss)(THETA, SEQUENCES, jnp.array(w), keys))
    exact, error = -np.mean(w * integral), found.std() / math.sqrt(1024)
    assert abs(found.mean() - exact) < 4 * error and error < 0.03 * exact


def test_times_are_stratified_and_permuted():
    """And a base is hidden with chance (1 - 1e-3) t."""
    strata, x0 = [], jnp.zeros((16, 1000), int)
    for i in range(20):
        x_t, hidden, t = map(np.asarray, sd.mask_at_random(x0, jax.random.key(i)))
        np.testing.assert_array_equal(x_t, np.where(hidden, sd.MASK, 0))
        error = hidden.mean(axis=1, keepdims=True) - 0.999 * t
        assert np.all(np.abs(error) < 5 * np.sqrt(t * (1.01 - t) / 1000))
        strata.append(np.floor((t[:, 0] - 1e-3) / 0.999 * 16))
    np.testing.assert_array_equal(np.sort(strata, axis=1), [range(16)] * 20)
    assert np.std(strata, axis=0).min() > 2  # no sample keeps its own


# ---- weights and the target measure -----------------------------------------------------------


def refitted(theta, x0, w, steps, **flags):
    args = Args(finetune_lr=1e-2, neg_clip=-0.1, **{"neg_floor": 0.05} | flags)
    state = sd.init_state(args, "finetune", jax.tree.map(jnp.copy, theta))
    for _ in range(steps):
        state, _, _ = sd.refit(args, "finetune", state, theta, x0, w, jax.random.key(5))
    return state.theta


def test_the_sign_of_a_weight():
    """A positive one raises its sequence's likelihood, a negative one lowers it, 0 is none."""
    rng = np.random.default_rng(0)
    x0 = np.repeat(rng.integers(4, size=(2, 10)), 8, axis=0)
    for w, signs in (((1, -1), (1, -1)), ((-1, 1), (-1, 1)), ((0, 0), (0, 0))):
        theta = refitted(THETA, x0, jnp.repeat(jnp.array(w, jnp.float32), 8), 10)
        found = [sd.log_likelihood(t, 64, x0, jax.random.key(6)) for t in (THETA, theta)]
        before, after = (x.reshape(2, 8).mean(axis=1) for x in found)
        np.testing.assert_array_equal(np.sign(after - before), signs)
        assert np.all(np.abs(after - before) > 1) or not any(w)
    ends = [refitted(THETA, x0, jnp.ones(16), n, finetune_steps=1) for n in (7, 8, 9)]
    same = [jax.tree.map(np.array_equal, x, ends[1]) for x in ends]  # the rate falls to 0
    assert [all(jax.tree.leaves(x)) for x in same] == [False, True, True]


def test_negative_weights_stop_at_the_floor():
    """Exactly no gradient from a base of p < neg_floor; other bases and weights keep theirs."""
    theta = jax.tree.map(jnp.zeros_like, THETA)
    theta["head"][1]["b"] = jnp.array([-5.0, 0, 0, 0, 0])  # p(A) = 0.002, p(C) = 0.33
    grad = jax.jit(jax.grad(sd.subs_loss))

    def gradient(base, w, floor):
        tree = grad(theta, np.full((16, 10), base), jnp.full(16, w), jax.random.key(0), floor)
        return np.asarray(tree["head"][1]["b"])

    assert not gradient(0, -1.0, 0.05).any()
    assert gradient(0, -1.0, 0.001).any() and gradient(0, -1.0, 0.0).any()
    for base, w in ((0, 1.0), (1, -1.0)):
        np.testing.assert_array_equal(gradient(base, w, 0.05), gradient(base, w, 0.0))
        assert gradient(base, w, 0.05).any()
    rows = np.zeros((16, 10), int)
    moved = [refitted(theta, rows, -jnp.ones(16), 1, neg_floor=x) for x in (0.05, 0.0)]
    assert moved[0]["head"][1]["b"][0] == -5 > moved[1]["head"][1]["b"][0]


@pytest.fixture(scope="module")
def shards():
    return sd.make_shards(SMALL)


@pytest.fixture(scope="module")
def oracles(shards):
    oracles = [load_oracle("motif", part) for part in ("ft", "eval")]
    return [o._replace(params=sd.place(o.params, shards[0])) for o in oracles]


@pytest.fixture(scope="module")
def judge(oracles, shards, generated):
    data = Data(generated[:, :LENGTH], [], None)
    return sd.make_judge(SMALL, data, sd.place(random_theta(0, 0.3), shards[0]), oracles, shards)


@pytest.mark.parametrize(
    "weighting,neg_clip",
    [("exp", 0.0), ("linear", -0.3), ("square", 0.0), ("wd1", 0.0), ("uniform", 0.0)],
)
def test_weights_are_those_of_each_group(weighting, neg_clip):
    """As simpo_mujoco's, which tests/test_weights.py checks; all 1 for uniform; lam is shared."""
    args = Args(weighting=weighting, neg_clip=neg_clip, num_samples=8, eps_kl=0.9)
    q, log_lam = jax.random.normal(jax.random.key(0), (4, 8)) * 3, jnp.zeros(())
    for _ in range(15):
        w, log_lam, metrics = sd.weigh(args, log_lam, q)
    assert metrics["kl"] == pytest.approx(0.9, abs=0.01)
    assert metrics["lam"] == pytest.approx(np.exp(log_lam), rel=1e-5)
    if weighting == "uniform":
        np.testing.assert_array_equal(w, 1)
    else:
        theirs = simpo_mujoco.Args(weighting=weighting, neg_clip=neg_clip)
        np.testing.assert_allclose(w, simpo_mujoco.weights(theirs, q, metrics["lam"]), atol=2e-3)
    ess = np.mean(np.abs(w).sum(1) ** 2 / (np.asarray(w) ** 2).sum(1))
    assert metrics["ess"] == pytest.approx(ess, rel=1e-4)


def test_kl_to_the_pretrained_model():
    """Where bases are independent it is that of one base; an anchor holds the model."""
    free, uniform = (jax.tree.map(jnp.zeros_like, THETA) for _ in range(2))
    free["head"][1]["b"] = jnp.array([1.0, 0, -1, 2, 0])
    p = np.exp(exact_log_p(free)[-1, 0])
    x0 = np.random.default_rng(0).choice(4, (4096, 2), p=p / p.sum())
    found = float(jit_kl_to(uniform, free, x0, jax.random.key(0)))
    assert found == pytest.approx(np.sum(p * np.log(4 * p)), rel=0.05)
    x0 = np.repeat(np.arange(2), 8)[:, None] * np.ones((1, 10), int)
    w = jnp.where(jnp.arange(16) < 8, 2.0, -2.0)
    models = THETA, *(refitted(THETA, x0, w, 20, kl_weight=x) for x in (0.0, 1e3))
    away = [float(jit_kl_to(THETA, theta, x0, jax.random.key(1))) for theta in models]
    assert away[0] == 0 and 0 < away[2] < 0.3 * away[1]


def test_finetuning_raises_the_score_and_compiles_once(oracles, shards, tmp_path, judge):
    """The score of a model without pretraining, in 16 iterations; one compilation each."""
    args = Args(num_samples=16, sampling_steps=8, finetune_lr=5e-3, finetune_steps=16)
    functions = sd.refit, sd.sample_sequences, sd.weigh, sd.bounds
    before = [f._cache_size() for f in functions]
    key = jax.device_put(jax.random.key(0), shards[0])
    # a reward that is easily raised: the share of A
    share = Oracle(jax.jit(lambda _, x: 10 * jnp.mean(x == 0, axis=1)), {})
    sd.run_finetuning(args, tmp_path, judge.theta, [share, oracles[1]], LENGTH, key, shards)
    assert [f._cache_size() for f in functions] == [n + 1 for n in before]
    curve = curve_of(tmp_path)
    assert curve["q_median"][-3:].mean() > curve["q_median"][:3].mean() + 0.4
    assert np.all(np.abs(curve["kl"][5:] - 1.5) < 0.5)
    assert curve["kl_pretrained"][0] == 0 and curve["kl_pretrained"][-1] > 1


def test_gradient_steps_replay_the_last_iterations(oracles, shards, judge, monkeypatch):
    """Each on G N rows of the replay, without repetition; the newest ones are its last."""
    args = dataclasses.replace(SMALL, neg_clip=-0.5, grad_steps=6, replay=3)
    key = jax.device_put(jax.random.key(0), shards[0])
    masks = sd.place(np.full((32, LENGTH), sd.MASK, np.int32), shards[1])
    theta = jax.tree.map(jnp.copy, judge.theta)  # refit gives it away
    state = sd.place(sd.init_state(args, "finetune", theta, LENGTH), shards[0])
    refit, used, newest = sd.refit, [], []
    joined = lambda x0, w: np.concatenate([x0, np.asarray(w)[:, None]], axis=1)  # noqa: E731

    def watched(args, phase, state, theta_pretrained, x0, w, key):
        used.append(set(map(tuple, joined(x0, w).tolist())))
        return refit(args, phase, state, theta_pretrained, x0, w, key)

    monkeypatch.setattr(sd, "refit", watched)
    for i in range(4):
        used.clear()
        state, _ = sd.finetune(args, state, judge.theta, oracles, masks, key)
        rows = joined(*state.replay)
        newest.append(rows[-32:])
        np.testing.assert_allclose(rows[-32:, -1].reshape(4, 8).mean(axis=1), 1, atol=1e-5)
        expected = np.concatenate([newest[max(j, 0)] for j in (i - 2, i - 1, i)])
        np.testing.assert_array_equal(rows, expected)
        assert len(used) == 6 and set(map(tuple, rows.tolist())) >= set.union(*used)
        assert len(set.union(*used)) > min(i + 1, 3) * 20
        assert i < 2 or all(len(step) == 32 for step in used)


def test_the_reference_and_batches(judge, shards, generated):
    """3-mers by hand; a last batch that is not full; the reference is the held-out best."""
    x, part = generated[:, :LENGTH].astype(np.int32), load_motifs(part="eval")
    counts = dict.fromkeys(itertools.product(range(4), repeat=3), 0)
    for row, i in itertools.product(x[:37].tolist(), range(LENGTH - 2)):
        counts[tuple(row[i : i + 3])] += 1
    np.testing.assert_array_equal(sd.kmer_counts(x[:37]), list(counts.values()))
    value = np.asarray(motif_score(part, x))
    q = sd.score(SMALL, judge.eval, x[:37].astype(np.uint8), shards[1])
    np.testing.assert_allclose(q, value[:37], atol=1e-4)
    best = x[np.argsort(-value)[:200]]
    np.testing.assert_array_equal(judge.kmers, sd.kmer_counts(best))
    hits = motif_hits(load_motifs(part="control"), best).sum(axis=0)
    np.testing.assert_array_equal(judge.hits, hits)


# ---- the script --------------------------------------------------------------------------------

# One argument before the flags, WHERE:COUNT, kills the run the COUNT-th time it is about to take a
# step of pretrain or finetune; "table" leaves out the table.
PATCHED = f"""
import os
import sys

sys.path.insert(0, {str(ROOT)!r})
import simpo_dna

where, count = sys.argv.pop(1).split(":")
refit, calls = simpo_dna.refit, []

def watched(args, phase, *rest):
    calls.append(phase)
    if calls.count(where) == int(count):
        os.kill(os.getpid(), 9)
    return refit(args, phase, *rest)

simpo_dna.refit = watched
if where == "table":
    simpo_dna.make_judge = lambda *_: sys.exit(0)
simpo_dna.main()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory, generated):
    root = tmp_path_factory.mktemp("dna")
    (root / "patched.py").write_text(PATCHED)
    rows = enumerate(decode(generated[:256, :LENGTH]))
    lines = [f"{seq},{i * 7 % 256},{'ab'[i % 2]}" for i, seq in rows]
    (root / "tiny.csv").write_text("\n".join(["seq,hepg2,cell", *lines, ""]))
    reward = "def gc(seqs):\n    return [s.count('G') + s.count('C') for s in seqs]\n"
    indices = "def a(x):\n    return (x == 0).sum(axis=1)\n\n\na.takes_indices = True\n"
    (root / "reward.py").write_text(f"{reward}\n\n{indices}\n\ndef bad(x):\n    return 1\n")
    return root


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The script with little compiler optimisation."""
    return Script(tmp_path_factory.mktemp("jax-cache"), JAX_DISABLE_MOST_OPTIMIZATIONS="1")


def run(script, root, *flags, end="none:1", **env):
    """-> exit code, stdout, stderr of a run that ends as PATCHED says."""
    script = copy.copy(script)
    script.env = script.env | env
    return script.run(end, *flags, cwd=root, script=root / "patched.py")


def undisturbed(script, root):
    return script.run(*WHOLE, "--run-dir", "whole", cwd=root, script=ROOT / "simpo_dna.py")


def interrupted(script, root):
    """kill -9 between two checkpoints of pretraining and within an iteration of fine-tuning."""
    first = run(script, root, *WHOLE, "--run-dir", "killed", end="pretrain:11")
    second = run(script, root, "--resume", "killed", end="finetune:4")
    return [first, second, run(script, root, "--resume", "killed")]


def spread(script, root):
    """From the pretrained model on 2 and on 4 devices, up to the table; JAX_ENABLE_X64 is set."""
    flags, ends = [*TINY, *FINETUNE, "--pretrained", "whole/pretrained.npz", "--run-dir"], []
    for n in (2, 4):
        env = {"JAX_NUM_CPU_DEVICES": str(n), "JAX_ENABLE_X64": "1"}
        ends.append(run(script, root, *flags, f"devices{n}", end="table:1", **env))
    return ends


def distributed(script, root):
    """The same by two processes, with the table, and a reward that one of them calls."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    flags = "--pretrained whole/pretrained.npz --run-dir distributed --distributed"
    flags = [*TINY, *FINETUNE, *flags.split()]
    with ThreadPoolExecutor(2) as pool:
        start = functools.partial(pool.submit, run, script, root, *flags, **env)
        futures = [start(JAX_PROCESS_ID=str(i)) for i in range(2)]
    return [future.result() for future in futures]


def of_drakes(script, root):
    """Files that convert_drakes.py wrote; the judge is a function of the user's."""
    flags = ["--pretrained", FIXTURES / "pretrained.raw.npz", "--eval-oracle", "reward:gc"]
    oracle = f"enformer:{FIXTURES / 'enformer.npz'}"
    flags += ["--finetune-steps", 1, "--run-dir", "drakes", "--oracle", oracle]
    return run(script, root, *TINY, *flags, "--oracle-column", 1, "--eval-samples", 1)


@pytest.fixture(scope="module")
def outcome(quick, root):
    """outcome(scenario) -> what it returned; two at a time."""
    with ThreadPoolExecutor(2) as pool:
        futures = {f: pool.submit(f, quick, root) for f in (undisturbed, of_drakes)}
        for f in (interrupted, spread, distributed):
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
    return {name: dict(zip(header[1:], map(float, row), strict=True)) for name, *row in lines}


def samples_of(run_dir, name):
    """x [n, L] of a FASTA file and {key: [n]} of its records."""
    lines = (run_dir / f"{name}.fasta").read_text().splitlines()
    keys = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in lines[::2]]
    assert [line.split()[0] for line in lines[::2]] == [f">{name}_{i}" for i in range(len(keys))]
    x = encode("".join(lines[1::2])).reshape(len(keys), LENGTH).astype(np.int32)
    return x, {key: np.array([float(row[key]) for row in keys]) for key in keys[0]}


def curve_of(run_dir, phase="finetune"):
    return np.genfromtxt(run_dir / f"{phase}.csv", delimiter=",", names=True, ndmin=1)


def test_a_run_writes_its_folder(outcome, root, call):
    code, out, err = outcome(undisturbed)
    assert code == 0, err
    assert out.startswith("run folder  whole\ndevice      1 x cpu\n") and "Trace" not in err
    assert "\nfinetune 3/3 q_median " in out  # without a terminal a line tells that it lives
    assert "\nreference   best 200 of 256 sequences by column hepg2\n" in out
    whole = root / "whole"
    found = {path.name for path in whole.iterdir() if not path.name.startswith("events.")}
    assert found == {
        *(f"{name}.fasta" for name in ("pretrained", "simpo-linear_neg0.2_floor0.05")),
        *(f"{x}{y}" for x in ("pretrain", "finetune") for y in (".csv", "_checkpoint.npz")),
        *("pretrained.npz", "finetuned.npz", "args.json", "versions.json", "metrics.csv"),
        "curves.png",
    }
    args, versions = (json.loads((whole / f"{x}.json").read_text()) for x in ("args", "versions"))
    assert {"jax", "commit"} < set(versions)
    assert any(b"neg_clip: -0.2" in path.read_bytes() for path in whole.glob("events.*"))
    assert (args["neg_clip"], args["data"], args["batch_size"]) == (-0.2, "tiny.csv", 16)
    pretrain, finetune = (curve_of(whole, phase) for phase in ("pretrain", "finetune"))
    np.testing.assert_array_equal([*pretrain["step"], *finetune["step"]], [50, 60, 1, 2, 3])
    assert np.all(np.abs(pretrain["valid_nll"] - 1.386) < 0.1)  # of 24 sequences
    np.testing.assert_array_equal(finetune["nll"] == finetune["nll_pretrained"], [1, 0, 0])
    assert finetune["w_negative"].max() > 0
    assert call("--resume whole")[:2] == (0, "whole is complete\n")


def test_the_table_follows_from_the_samples(outcome, root):
    """Every number of metrics.csv from the FASTA files, and on stdout."""
    code, out, err = outcome(undisturbed)
    assert code == 0, err
    values = np.arange(256) * 7 % 256
    data = sd.read_data(root / "tiny.csv", "hepg2")
    best = data.x[np.argsort(-values)[:200]].astype(np.int32)
    sets = {part: load_motifs(part=part) for part in ("ft", "eval", "control")}
    for (name, row), calls in zip(table_of(root / "whole").items(), (0, 96), strict=True):
        x, keys = samples_of(root / "whole", name)
        mixed = sd.shuffle_dinucleotides(x, np.random.default_rng(1))
        expected = {"log_lik": np.median(keys["loglik"]), "oracle_calls": calls}
        for part in ("ft", "eval"):
            q = motif_score(sets[part], x)
            np.testing.assert_allclose(keys[part], q, atol=1e-3)
            expected[part] = np.median(q)
            expected[f"{part}_shuffled"] = np.median(motif_score(sets[part], mixed))
        hits = [motif_hits(sets["control"], y).sum(axis=0) for y in (x, best)]
        kmers = [sd.kmer_counts(y) for y in (x, best)]
        expected["corr_3mer"] = np.corrcoef(*kmers)[0, 1]
        expected["corr_motif"] = stats.spearmanr(*hits).statistic
        expected["gc"] = np.isin(x, (1, 2)).mean()
        expected["unique"] = len(np.unique(x, axis=0)) / 32
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-3)
        [line] = re.findall(rf"^{re.escape(name)} +(\S.*)$", out, re.MULTILINE)
        shown = [float(cell) for cell in line.split()]
        assert shown == pytest.approx(list(row.values()), abs=6e-4)


def test_killed_ends_bit_identical(outcome, root):
    ends = outcome(interrupted)
    assert [end[0] for end in ends] == [-9, -9, 0], ends
    assert outcome(undisturbed)[0] == 0
    for name in "pretrain.csv finetune.csv metrics.csv simpo-linear_neg0.2_floor0.05.fasta".split():
        ours, theirs = ((root / x / name).read_bytes() for x in ("killed", "whole"))
        assert ours == theirs, name
    for name in ("finetuned.npz", "finetune_checkpoint.npz"):
        with np.load(root / "killed" / name) as ours, np.load(root / "whole" / name) as theirs:
            assert ours.files == theirs.files
            assert all(np.array_equal(ours[key], theirs[key]) for key in ours.files)


def assert_same_curve(run_dir, other):
    ours, theirs = curve_of(run_dir), curve_of(other)
    assert ours.dtype.names == theirs.dtype.names and len(ours) == 3
    for name in ours.dtype.names:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_the_number_of_devices_and_processes_does_not_matter(outcome, root):
    """Nor does JAX_ENABLE_X64, nor whether pretraining was a run of its own; of two processes one
    writes and prints."""
    assert outcome(undisturbed)[0] == 0
    for n, (code, out, err) in zip((2, 4), outcome(spread), strict=True):
        assert code == 0, err
        assert f"\ndevice      {n} x cpu\n" in out
        assert_same_curve(root / f"devices{n}", root / "whole")
    (code, out, err), (code2, out2, err2) = outcome(distributed)
    assert (code, code2) == (0, 0), err + err2
    assert "device      2 x cpu\n" in out and "\nmethod" in out and "method" not in out2
    assert_same_curve(root / "distributed", root / "whole")
    table, alone = (table_of(root / name) for name in ("distributed", "whole"))
    for name in alone:
        assert table[name] == pytest.approx(alone[name], rel=1e-3, abs=2e-3), name


def test_files_of_drakes_and_a_judge_of_your_own(outcome, root):
    code, out, err = outcome(of_drakes)
    assert code == 0, err
    oracle = load_oracle(f"enformer:{FIXTURES / 'enformer.npz'}", column=1)
    for name in table_of(root / "drakes"):
        x, keys = samples_of(root / "drakes", name)
        assert x.shape == (1, LENGTH)  # --eval-samples 1
        q = np.asarray(oracle.apply(oracle.params, x))
        assert keys["ft"] == pytest.approx(q, rel=1e-3, abs=1e-4)
        assert keys["eval"] == np.isin(x, (1, 2)).sum()


@pytest.fixture
def call(monkeypatch, capsys, root):
    """call(line) -> exit code, stdout, stderr of the script in this process and folder."""
    monkeypatch.chdir(root)
    small = Data(np.eye(100, 48, dtype=np.uint8), [], None)
    monkeypatch.setattr(sd, "generate_data", lambda: small)

    def run(line):
        monkeypatch.setattr("sys.argv", ["simpo_dna.py", *line.split()])
        try:
            sd.main()
            code = 0
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


BAD_FLAGS = """
    --eps-kl 3.5 => log N = 3.466 | --num-samples 1 => at least 2 | --neg-clip 0.1 => at most 0
    --neg-clip -0.1 --weighting exp => linear or square | --neg-floor 0.1 => weights >= 0
    --grad-steps 0 => --grad-steps must be >= 1 | --num-layers 7 => multiple of 5
    --oracle kind => KIND:NAME | --oracle reward:gc => --eval-oracle | --unknown 1 => --unknown
    --score-column k562 => needs --data | --weighting square2 => square2
    --pretrained a.npz --hidden-dim 8 => its own size
"""
BAD_INPUT = f"""
    --pretrained absent.npz => absent.npz does not exist | --data absent.csv => absent.csv
    --pretrained tiny.csv --data tiny.csv => tiny.csv is no generator
    --pretrained {FIXTURES}/pretrained.raw.npz => trained on gosai_all.csv; --data
    --oracle motif:tiny.csv --eval-oracle motif => motif:tiny.csv
    --oracle enformer:absent --eval-oracle motif => absent does not exist
    --oracle enformer:{FIXTURES}/enformer.npz --oracle-column 3 --eval-oracle motif => 3
    --oracle enformer:{FIXTURES}/finetuned.raw.npz --eval-oracle motif => enformer
    --oracle absent:f --eval-oracle motif => No module named 'absent'
    --oracle reward:bad --eval-oracle motif --score tiny.csv => expected (256,)
    --data tiny.csv --score-column k562 => has no column k562, but seq, hepg2, cell
    --data tiny.csv --run-dir used => --run-dir used exists
    --data tiny.csv --num-devices 3 => --num-devices must be at most 2
    --resume absent => absent is no run folder | --resume used --seed 2 => --seed must stay
"""


@pytest.mark.parametrize("line,word", pairs(BAD_FLAGS))
def test_bad_flags_end_with_2(line, word, call):
    code, _, err = call(line)
    assert code == 2 and word in " ".join(re.sub("[^ -~]", " ", err).split()), err


@pytest.mark.parametrize("line,word", pairs(BAD_INPUT))
def test_bad_input_is_one_line(line, word, call, root):
    used = root / "used"
    used.mkdir(exist_ok=True)
    (used / "args.json").write_text(json.dumps(vars(Args(run_dir="used"))))
    code, out, err = call(line)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err) and word in err, err
    assert len(list(used.iterdir())) == 1 and not (root / "runs").exists()


def test_verify_and_score(call, root):
    """Correlations with a column, the AUC of two labels, the last one positive; scores as CSV."""
    data = sd.read_data(root / "tiny.csv", "hepg2")
    x, column = data.x.astype(int), np.array(data.values, float)
    q = {p: np.array(motif_score(load_motifs(part=p), x)) for p in ("ft", "eval")}
    code, out, err = call("--data tiny.csv --verify-oracle hepg2")
    assert code == 0, err
    expected = [(stats.pearsonr(q[p], column)[0], stats.spearmanr(q[p], column)[0]) for p in q]
    text = "{} oracle, 256 sequences: Pearson {:.3f}, Spearman {:.3f}\n"
    assert out == "".join(text.format(p, *two) for p, two in zip(q, expected, strict=True))
    _, out, err = call("--data tiny.csv --verify-oracle cell")
    area = {p: np.mean(q[p][1::2, None] > q[p][None, ::2]) for p in q}
    text = "{} oracle, 256 sequences: AUC of b against a {:.3f}\n"
    assert out == "".join(text.format(p, area[p]) for p in q)
    flags = "--score tiny.csv --oracle reward:a --eval-oracle motif --sampling-steps 8"
    _, out, err = call(f"{flags} --pretrained {FIXTURES}/pretrained.raw.npz")
    header, *rows = csv.reader(out.splitlines())
    assert header == ["name", "ft", "eval", "loglik"] and len(rows) == 256, err
    rows = np.float64([row[1:] for row in rows])
    np.testing.assert_allclose(rows[:, 0], (x == 0).sum(axis=1))
    np.testing.assert_allclose(rows[:, 1], q["eval"], atol=1e-3)
    assert rows[:, 2].max() < -20


def test_a_tuned_model_is_named_for_what_it_is(call, root):
    save_arrays(root / "t.npz", THETA, "generator", method="simpo-exp", data=None)
    flags = "--pretrained t.npz --finetune-steps 0 --sampling-steps 4 --eval-samples 32"
    assert call(f"{flags} --run-dir tuned")[0] == 0
    assert list(table_of(root / "tuned")) == ["simpo-exp"]


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sd.time, "strftime", lambda _: "now")
    assert len({sd.make_run_dir(SMALL) for _ in range(3)}) == 3
