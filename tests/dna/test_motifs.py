"""The motif reward against loops, and what composition earns by it."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dna.data import (
    REWARD,
    decode,
    encode,
    generate_data,
    shuffle_dinucleotides,
    site_shares,
)
from dna.motifs import load_motifs, motif_hits, motif_score
from dna.oracles import load_oracle

pytestmark = pytest.mark.usefixtures("quick_compiler")
SITES = Path(__file__).resolve().parents[3] / "shared/data/dhs_hepg2_k562.csv.gz"
UNIFORM = np.full(4, 0.25)
PARTS = pytest.mark.parametrize("part", ["ft", "eval"])


def read_set(part):
    return json.loads(REWARD.read_text())[part]


def random_letters(seed, num, gc=0.5):
    p = np.array([1 - gc, gc, gc, 1 - gc]) / 2
    return np.random.default_rng(seed).choice(4, (num, 200), p=p)


def sites_by_hand(counts, x, shares):
    """log p(site | motif) / p(site | shares) of every site of x on both strands."""
    p = site_shares(counts)
    width = len(p)
    backward = x[::-1]
    strands = [(x, x), (3 - backward, backward)]
    found = []
    for letters, bases in strands:
        for i in range(len(x) - width + 1):
            site = letters[i : i + width]
            background = shares[bases[i : i + width]]
            ratio = 1.0
            for j in range(width):
                ratio *= p[j, site[j]] / background[j]
            found.append(np.log(ratio))
    return np.array(found)


def bound_by_hand(counts, x):
    """Chance that at least one site is bound, each with even odds at e^7."""
    counts_of_x = np.bincount(x, minlength=4) + 1
    own = counts_of_x / counts_of_x.sum()
    free = 1.0
    by_own = sites_by_hand(counts, x, own)
    by_uniform = sites_by_hand(counts, x, UNIFORM)
    for log_odds in np.minimum(by_own, by_uniform):
        free *= 1 - 1 / (1 + np.exp(7 - log_odds))
    return 1 - free


def hits_by_hand(counts, x):
    log_odds = np.log(site_shares(counts) / 0.25)
    low = log_odds.min(axis=1).sum()
    high = log_odds.max(axis=1).sum()
    threshold = low + 0.8 * (high - low)
    sites = sites_by_hand(counts, x, UNIFORM)
    return np.sum(sites >= threshold)


@PARTS
def test_the_motif_reward_against_loops(part):
    motifs = read_set(part)
    matrices = motifs["pfm_counts"]
    *w, intercept = motifs["w"]
    x = generate_data(6).x[:, 20:90]
    x = x.astype(np.int32)
    scores = []
    hits = []
    for row in x:
        features = np.array([bound_by_hand(counts, row) for counts in matrices])
        z = (features - motifs["mean"]) / motifs["sd"]
        scores.append(z @ w + intercept)
        hits.append([hits_by_hand(counts, row) for counts in matrices])
    params = load_motifs(part=part)
    for strand in (x, 3 - x[:, ::-1]):
        np.testing.assert_allclose(motif_score(params, strand), scores, atol=1e-3)
        np.testing.assert_array_equal(motif_hits(params, strand), hits)
    assert np.sum(hits) > 5
    short = motif_score(params, x[:, :5])  # shorter than a motif
    assert np.isfinite(short).all()


@PARTS
def test_composition_earns_nothing(part):
    """Medians of random letters, 5 to 95 % G + C, span 0.4 sd of the real scores;
    0.03 sd more are twice the error of medians of 2,000 sequences."""
    params = load_motifs(part=part)
    medians = []
    for seed, percent in enumerate([5, 10, 20, 30, 50, 70, 80, 90, 95]):
        x = random_letters(seed, 2000, percent / 100)
        medians.append(np.median(motif_score(params, x)))
    assert np.ptp(medians) <= 0.43 * read_set(part)["score_sd"]

    x = generate_data(2000).x[1::2]  # with sites of factors of positive weight
    shuffled = shuffle_dinucleotides(x, np.random.default_rng(1))
    medians = []
    for letters in (x, shuffled):
        q = motif_score(params, letters.astype(np.int32))
        medians.append(np.median(q))
    assert medians[0] > medians[1] + 2


@PARTS
def test_a_site_earns_no_more_where_its_bases_are_rare(part):
    """The best site of each factor that counts, in the midst of random letters: least
    likely among 95 % G + C or A + T, and there at most 0.3 sd above 50 %."""
    params = load_motifs(part=part)
    motifs = read_set(part)
    *weights, _ = motifs["w"]
    for counts, w in zip(motifs["pfm_counts"], weights, strict=True):
        if w < 0:
            continue
        site = np.argmax(counts, axis=0)
        medians = []
        for gc in (0.5, 0.05, 0.95):
            x = random_letters(2, 500, gc)
            x[:, 90 : 90 + len(site)] = site
            medians.append(np.median(motif_score(params, x)))
        most = medians[0] + 0.3 * motifs["score_sd"]
        assert max(medians[1:]) <= most


WORDS = {  # repeated over 200 bases: shares of top by ft and eval
    "GCAATGT": (0.69, 0.46),
    "TATCAAAGTCAA": (1.01, 0.83),
    "AATATTGACTGTGA": (1.27, 1.08),
}


def shares_of_top(x):
    shares = []
    for part in ("ft", "eval"):
        q = motif_score(load_motifs(part=part), x)
        shares.append(np.median(q) / read_set(part)["top"])
    return shares


@pytest.mark.parametrize("word", WORDS)
def test_what_a_repeated_word_earns(word):
    """A flaw that dna/README.md names: many weak sites count as a strong one."""
    x = np.resize(encode(word), (1, 200)).astype(np.int32)
    assert shares_of_top(x) == pytest.approx(WORDS[word], abs=0.011)


STRONG = ("HNF1A", "HNF4A", "CEBPA")


@pytest.mark.parametrize(
    "names, shares", [(None, (1.95, 1.89)), (STRONG, (1.08, 1.21))]
)
def test_what_one_site_of_each_factor_earns(names, shares):
    """In random letters: of the seven of ft with positive weight, and of three."""
    motifs = read_set("ft")
    sites = []
    for name, counts, w in zip(motifs["names"], motifs["pfm_counts"], motifs["w"]):
        if w > 0 and (names is None or name in names):
            sites.append(np.argmax(counts, axis=0))
    assert len(sites) == (7 if names is None else 3)
    x = random_letters(4, 500)
    start = 5
    for site in sites:
        x[:, start : start + len(site)] = site
        start += len(site) + 5
    assert shares_of_top(x) == pytest.approx(shares, abs=0.05)


@pytest.mark.skipif(not SITES.exists(), reason="real sites are not part of the project")
@pytest.mark.parametrize("part,auc", [("ft", 0.896), ("eval", 0.901)])
def test_the_motif_reward_on_real_sites(part, auc):
    with gzip.open(SITES, "rt") as file:
        rows = list(csv.DictReader(file))
    x = np.stack([encode(row["seq"]) for row in rows])
    q = load_oracle("motif", part)(x)
    groups = {}
    for row, score in zip(rows, q, strict=True):
        groups.setdefault((row["cell"], row["chrom"] == "chr1"), []).append(score)
    liver = groups["HepG2", True]
    other = groups["K562", True]
    pairs = len(liver) * len(other)
    found = stats.mannwhitneyu(liver, other).statistic / pairs
    assert found == pytest.approx(auc, abs=6e-4)
    motifs = read_set(part)
    assert q.std() == pytest.approx(motifs["score_sd"], abs=2e-3)
    all_liver = liver + groups["HepG2", False]
    top = np.quantile(all_liver, 0.999)
    assert top == pytest.approx(motifs["top"], abs=0.02)


@PARTS
def test_sites_saturate(part):
    """Nine more sites of a factor add less than a fifth of the first, and the best
    sites of all factors stay below the ceiling."""
    motifs = read_set(part)
    params = load_motifs(part=part)
    *weights, intercept = motifs["w"]
    weights = np.array(weights)
    sites = [np.argmax(counts, axis=0) for counts in motifs["pfm_counts"]]
    site = sites[np.argmax(weights)]
    scores = []
    for number in (0, 1, 10):
        x = random_letters(2, 500)
        for start in range(0, 19 * number, 19):
            x[:, start : start + len(site)] = site
        scores.append(np.median(motif_score(params, x)))
    first, more = np.diff(scores)
    assert first > 5 * more > -first

    best = (weights > 0) - np.array(motifs["mean"])
    ceiling = best / motifs["sd"] @ weights + intercept
    x = random_letters(3, 500)
    start = 0
    for site, w in zip(sites, weights, strict=True):
        if w > 0:
            x[:, start : start + len(site)] = site
            start += len(site)
    everything = np.median(motif_score(params, x))
    assert 0.5 * ceiling < everything < ceiling


ACG = (9 * np.eye(4, 3)).tolist()


def test_a_motif_file_of_your_own(tmp_path):
    path = tmp_path / "m.json"
    content = {"pfm_counts": [ACG], "w": [2, 1]}
    path.write_text(json.dumps(content))
    params = load_motifs(path)
    x = generate_data(8).x.astype(np.int32)
    count = 0
    for letters in decode(x):
        count += letters.count("ACG") + letters.count("CGT")
    assert motif_hits(params, x).sum() == count
    score = load_oracle(f"motif:{path}", "eval")
    np.testing.assert_allclose(score(x), motif_score(params, x), rtol=1e-5)


BAD_FILES = [
    {},
    [],
    {"pfm_counts": [[[1], [2]]]},
    {"pfm_counts": [ACG], "w": [1]},
    {"pfm_counts": [ACG], "sd": [0]},
]


@pytest.mark.parametrize("content", BAD_FILES)
def test_a_bad_motif_file_is_one_line(content, tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=f"^error: motif:{path}: .+"):
        load_oracle(f"motif:{path}")


def test_a_shuffle_keeps_the_pairs():
    """And is uniform: AAABAC has three such shuffles that begin and end as it does."""
    x = generate_data(50).x
    shuffled = shuffle_dinucleotides(x, np.random.default_rng(0))
    pairs = []
    for rows in (x.astype(int), shuffled.astype(int)):
        first = rows[:, :-1]
        second = rows[:, 1:]
        both = 4 * first + second
        pairs.append([np.bincount(row, minlength=16) for row in both])
    np.testing.assert_array_equal(*pairs)
    assert np.mean(x == shuffled) < 0.4
    row = [0, 0, 0, 1, 0, 2]
    rows = np.tile(row, (3000, 1))
    rows = shuffle_dinucleotides(rows, np.random.default_rng(1))
    _, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(counts) == 3
    assert stats.chisquare(counts).pvalue > 1e-3
