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


def sites_by_hand(counts, x, shares):
    """log p(site | motif) / p(site | shares) of every site of x on both strands."""
    p = site_shares(counts)
    found = []
    for site, base in ((x, x), (3 - x[::-1], x[::-1])):
        for i in range(len(x) - len(p) + 1):
            ratio = 1.0
            for j in range(len(p)):
                ratio *= p[j, site[i + j]] / shares[base[i + j]]
            found.append(np.log(ratio))
    return np.array(found)


def bound_by_hand(counts, x):
    """Chance that at least one site is bound, each with even odds at e^7."""
    own = (np.bincount(x, minlength=4) + 1) / (len(x) + 4)
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
    return np.sum(sites_by_hand(counts, x, UNIFORM) >= low + 0.8 * (high - low))


@PARTS
def test_the_motif_reward_against_loops(part):
    motifs = json.loads(REWARD.read_text())[part]
    x = generate_data(6).x[:, 20:90].astype(np.int32)
    scores = []
    hits = []
    for row in x:
        features = [bound_by_hand(counts, row) for counts in motifs["pfm_counts"]]
        z = (np.array(features) - motifs["mean"]) / motifs["sd"]
        scores.append(z @ motifs["w"][:-1] + motifs["w"][-1])
        hits.append([hits_by_hand(counts, row) for counts in motifs["pfm_counts"]])
    params = load_motifs(part=part)
    for strand in (x, 3 - x[:, ::-1]):
        np.testing.assert_allclose(motif_score(params, strand), scores, atol=1e-3)
        np.testing.assert_array_equal(motif_hits(params, strand), hits)
    assert np.sum(hits) > 5
    assert np.isfinite(motif_score(params, x[:, :5])).all()  # shorter than a motif


@PARTS
def test_composition_earns_nothing(part):
    """Medians of random letters, 5 to 95 % G + C, span 0.4 sd of the real scores, and
    0.01 sd are the error of 2,000 letters."""
    params = load_motifs(part=part)
    rng = np.random.default_rng(1)
    medians = []
    for gc in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
        p = np.array([1 - gc, gc, gc, 1 - gc]) / 2
        x = rng.choice(4, (2000, 200), p=p)
        medians.append(np.median(motif_score(params, x)))
    score_sd = json.loads(REWARD.read_text())[part]["score_sd"]
    assert np.ptp(medians) <= 0.41 * score_sd

    x = generate_data(2000).x
    shuffled = shuffle_dinucleotides(x, rng)
    q = np.asarray(motif_score(params, x.astype(np.int32)))
    q_shuffled = np.asarray(motif_score(params, shuffled.astype(np.int32)))
    assert np.median(q[1::2]) > np.median(q_shuffled) + 2  # sites do


@PARTS
def test_a_site_earns_no_more_where_its_bases_are_rare(part):
    """The best site of each factor that counts, in the midst of random letters: least
    likely among 95 % G + C or A + T, and there at most 0.3 sd above 50 %."""
    params = load_motifs(part=part)
    motifs = json.loads(REWARD.read_text())[part]
    for counts, w in zip(motifs["pfm_counts"], motifs["w"][:-1], strict=True):
        site = np.argmax(counts, axis=0)
        medians = []
        for gc in (0.5, 0.05, 0.95):
            p = np.array([1 - gc, gc, gc, 1 - gc]) / 2
            x = np.random.default_rng(2).choice(4, (500, 200), p=p)
            x[:, 90 : 90 + len(site)] = site
            medians.append(np.median(motif_score(params, x)))
        assert w < 0 or max(medians[1:]) <= medians[0] + 0.3 * motifs["score_sd"]


@pytest.mark.skipif(not SITES.exists(), reason="real sites are not part of the project")
@pytest.mark.parametrize("part,auc", [("ft", 0.896), ("eval", 0.901)])
def test_the_motif_reward_on_real_sites(part, auc):
    with gzip.open(SITES, "rt") as file:
        rows = list(csv.DictReader(file))
    x = np.stack([encode(row["seq"]) for row in rows]).astype(np.int32)
    liver = np.array([row["cell"] == "HepG2" for row in rows])
    chr1 = np.array([row["chrom"] == "chr1" for row in rows])
    q = load_oracle("motif", part)(x)
    rank = stats.mannwhitneyu(q[liver & chr1], q[~liver & chr1]).statistic
    found = rank / np.sum(liver & chr1) / np.sum(~liver & chr1)
    assert found == pytest.approx(auc, abs=6e-4)
    score_sd = json.loads(REWARD.read_text())[part]["score_sd"]
    assert q.std() == pytest.approx(score_sd, abs=2e-3)


@PARTS
def test_sites_saturate(part):
    """Nine more sites of a factor add less than a fifth of the first, and the best
    sites of all factors stay below the ceiling."""
    motifs = json.loads(REWARD.read_text())[part]
    params = load_motifs(part=part)
    w = np.array(motifs["w"])
    best = np.where(w[:-1] > 0, 1, 0) - np.array(motifs["mean"])
    ceiling = best / motifs["sd"] @ w[:-1] + w[-1]
    f = int(np.argmax(w[:-1]))
    site = np.argmax(motifs["pfm_counts"][f], axis=0)
    scores = []
    for number in (0, 1, 10):
        x = np.random.default_rng(2).choice(4, (500, 200))
        for i in range(number):
            x[:, 19 * i : 19 * i + len(site)] = site
        scores.append(np.median(motif_score(params, x)))
    first, more = np.diff(scores)
    assert first > 5 * more > -first
    everything = np.random.default_rng(3).choice(4, (500, 200))
    start = 0
    for counts, weight in zip(motifs["pfm_counts"], w[:-1], strict=True):
        site = np.argmax(counts, axis=0)
        if weight > 0:
            everything[:, start : start + len(site)] = site
            start += len(site)
    assert 0.5 * ceiling < np.median(motif_score(params, everything)) < ceiling


ACG = [[9, 0, 0], [0, 9, 0], [0, 0, 9], [0, 0, 0]]


def test_a_motif_file_of_your_own(tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"pfm_counts": [ACG], "w": [2, 1]}))
    x = generate_data(8).x.astype(np.int32)
    hits = motif_hits(load_motifs(path), x).sum()
    assert hits == sum(s.count("ACG") + s.count("CGT") for s in decode(x))
    score = load_oracle(f"motif:{path}", "eval")
    np.testing.assert_allclose(score(x), motif_score(load_motifs(path), x), rtol=1e-5)


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
        both = 4 * rows[:, :-1] + rows[:, 1:]
        pairs.append([np.bincount(row, minlength=16) for row in both])
    np.testing.assert_array_equal(*pairs)
    assert np.mean(x == shuffled) < 0.4
    rows = np.tile([0, 0, 0, 1, 0, 2], (3000, 1))
    rows = shuffle_dinucleotides(rows, np.random.default_rng(1))
    _, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(counts) == 3
    assert stats.chisquare(counts).pvalue > 1e-3
