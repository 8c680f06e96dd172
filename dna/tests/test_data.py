"""dna/: the motif reward and its invariance, readers of sequences, npz files from strangers."""

import csv
import gzip
import itertools
import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats

import simpo_dna
from dna import data, oracles
from dna.data import UsageError, generate_data, load_arrays, read_data, save_arrays
from dna.oracles import load_motifs, load_oracle, motif_hits, motif_score

SITES = Path(__file__).resolve().parents[3] / "shared/data/dhs_hepg2_k562.csv.gz"

# ---- motif reward ------------------------------------------------------------------------------


def sites_by_hand(counts, x, shares):
    """log p(site | motif) / p(site | shares) of every site of x on both strands."""
    p = (np.array(counts).T + 0.25) / (np.sum(counts, axis=0) + 1)[:, None]
    return np.array(
        [
            sum(np.log(p[j, s[i + j]] / shares[b[i + j]]) for j in range(len(p)))
            for s, b in ((x, x), (3 - x[::-1], x[::-1]))
            for i in range(len(x) - len(p) + 1)
        ]
    )


@pytest.mark.parametrize("part", ["ft", "eval"])
def test_the_motif_reward_against_loops(part):
    sets, x = json.loads(data.REWARD.read_text())[part], generate_data(6).x[:, 20:90]
    params, score, hits = load_motifs(part=part), [], []
    for row in x.astype(int):
        shares = (np.bincount(row, minlength=4) + 1) / (len(row) + 4)
        odds = [
            [sites_by_hand(c, row, p) for p in (shares, [0.25] * 4)] for c in sets["pfm_counts"]
        ]
        ratio = [np.exp(np.min(both, axis=0)).mean() for both in odds]
        z = (np.log(1 + 0.5 * np.array(ratio)) - sets["mean"]) / sets["sd"]
        score.append(np.dot(sets["w"], [*z, 1]))
        odds = [sites_by_hand(c, row, [0.25] * 4) for c in sets["pfm_counts"]]
        log_p = [np.log(data.site_shares(c) / 0.25) for c in sets["pfm_counts"]]
        low, high = ([f(p, axis=1).sum() for p in log_p] for f in (np.min, np.max))
        hits.append(
            [(o >= a + 0.8 * (b - a)).sum() for o, a, b in zip(odds, low, high, strict=True)]
        )
    for strand in (x.astype(np.int32), 3 - x[:, ::-1].astype(np.int32)):
        np.testing.assert_allclose(motif_score(params, strand), score, atol=1e-3)
        np.testing.assert_array_equal(motif_hits(params, strand), hits)
    assert np.sum(hits) > 5
    assert np.isfinite(motif_score(params, x[:, :5].astype(np.int32))).all()  # shorter than a motif


@pytest.mark.parametrize("part", ["ft", "eval"])
def test_composition_earns_nothing(part):
    """Medians of letters at random, 5 to 95 % G and C, within 0.3 sd of the real sites' scores."""
    params, rng = load_motifs(part=part), np.random.default_rng(1)
    gc = np.array((0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95))
    draws = [rng.choice(4, (2000, 200), p=np.array([1 - g, g, g, 1 - g]) / 2) for g in gc]
    medians = [np.median(motif_score(params, x)) for x in draws]
    assert np.ptp(medians) <= 0.3 * json.loads(data.REWARD.read_text())[part]["score_sd"]
    x = generate_data(2000).x
    mixed = data.shuffle_dinucleotides(x, rng)
    q, q_mixed = (np.asarray(motif_score(params, y.astype(np.int32))) for y in (x, mixed))
    assert np.median(q[1::2]) > np.median(q_mixed) + 3  # sites do


@pytest.mark.parametrize("part", ["ft", "eval"])
def test_a_site_earns_no_more_where_its_bases_are_rare(part):
    """The best site of each factor that counts, in the midst of letters at random: least likely
    among 95 % G and C or 95 % A and T, and there not more than 0.3 sd above 50 %."""
    params, sets = load_motifs(part=part), json.loads(data.REWARD.read_text())[part]
    for counts, w in zip(sets["pfm_counts"], sets["w"], strict=False):
        medians, site = [], np.argmax(counts, axis=0)
        for gc in (0.5, 0.05, 0.95):
            p = np.array([1 - gc, gc, gc, 1 - gc]) / 2
            x = np.random.default_rng(2).choice(4, (500, 200), p=p)
            x[:, 90 : 90 + len(site)] = site
            medians.append(np.median(motif_score(params, x)))
        assert w < 0 or max(medians[1:]) <= medians[0] + 0.3 * sets["score_sd"]


@pytest.mark.skipif(not SITES.exists(), reason="the real sites are not part of the project")
def test_the_motif_reward_on_real_sites():
    with gzip.open(SITES, "rt") as file:
        _, *rows = csv.reader(file)
    letters, cell, chrom, _ = np.array(rows).T
    x = data.encode("".join(letters)).reshape(len(rows), 200).astype(np.int32)
    liver, chr1 = cell == "HepG2", chrom == "chr1"
    for part, auc in (("ft", 0.890), ("eval", 0.894)):
        q = np.concatenate([motif_score(load_motifs(part=part), y) for y in np.split(x, 8)])
        rank = stats.mannwhitneyu(q[liver & chr1], q[~liver & chr1]).statistic
        assert rank / np.sum(liver & chr1) / np.sum(~liver & chr1) == pytest.approx(auc, abs=6e-4)
        sd = json.loads(data.REWARD.read_text())[part]["score_sd"]
        assert q.std() == pytest.approx(sd, abs=2e-3)


def test_a_motif_file_of_your_own(tmp_path):
    path, x = tmp_path / "m.json", generate_data(8).x.astype(np.int32)
    counts = [[9, 0, 0], [0, 9, 0], [0, 0, 9], [0, 0, 0]]  # ACG
    path.write_text(json.dumps({"pfm_counts": [counts], "w": [2, 1]}))
    oracle = load_oracle(f"motif:{path}", "eval")
    assert (motif_hits(oracle.params, x).sum(), oracle.params["mean"]) == (
        sum(s.count("ACG") + s.count("CGT") for s in data.decode(x)),
        0,
    )
    for bad in ({}, [], {"pfm_counts": [[[1], [2]]]}, {"pfm_counts": [counts], "w": [1]}):
        path.write_text(json.dumps(bad))
        with pytest.raises(UsageError, match=f"^motif:{path}: .+"):
            load_oracle(f"motif:{path}")


def test_a_shuffle_keeps_the_pairs():
    """And is uniform: AABAB has four such shuffles, AABAB ABAAB ... with the same ends."""
    x = generate_data(50).x
    mixed = data.shuffle_dinucleotides(x, np.random.default_rng(0))
    pairs = [
        [np.bincount(4 * r[:-1].astype(int) + r[1:], minlength=16) for r in y] for y in (x, mixed)
    ]
    np.testing.assert_array_equal(*pairs)
    assert np.mean(x == mixed) < 0.4
    rows = data.shuffle_dinucleotides(
        np.tile([0, 0, 0, 1, 0, 2], (3000, 1)), np.random.default_rng(1)
    )
    _, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(counts) == 3 and stats.chisquare(counts).pvalue > 1e-3


# ---- sequences ---------------------------------------------------------------------------------

ROWS = ["".join(row) for row in itertools.product("ACGT", repeat=4)][:100]
FASTA = "".join(f">{i} some words\n{s[:2]}\n{s[2:].lower()}\n" for i, s in enumerate(ROWS))
CSV = "id,seq,value\n" + "".join(f"{i},{s},{i}\n" for i, s in enumerate(ROWS))
FORMATS = {
    "csv": CSV,
    "lower": CSV.lower().rstrip("\n"),
    "crlf": CSV.replace("\n", "\r\n"),
    "byte-order mark": "\ufeff" + CSV,
    "blank lines": "\n \n" + CSV.replace("\n", "\n\n"),
    "Sequence": CSV.replace("seq", "Sequence"),
    "tsv": CSV.replace(",", "\t").replace("seq", "Seq"),
    "semicolons": CSV.replace(",", ";"),
    "spaces": CSV.replace(",", ", "),
    "csv.gz": CSV,
    "fasta": FASTA,
    "fasta-crlf": "\r\n" + FASTA.replace("\n", "\r\n"),
    "fasta.gz": FASTA,
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_data(name, tmp_path):
    path, text = tmp_path / "data", FORMATS[name].encode()
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    column = None if "fasta" in name else "value"
    found = read_data(path, column)
    assert data.decode(found.x) == ROWS and found.x.dtype == np.uint8
    assert found.values == (column and [str(i) for i in range(100)])
    with pytest.raises(UsageError, match="no column absent"):
        read_data(path, "absent")


BAD_ROWS = {
    "line 103 repeats the sequence of line 3": "200,AAAA,1",
    "line 103 has 5 bases, most have 4": "200,ACGTA,1",
    "line 103 has the letter 'N', expected A, C, G and T alone": "200,ACGN,1",
    "line 103 has no sequence": "200,,1",
    "line 103 has '' in value, expected a value": "200,TTTT",
    "line 103 has 'nan' in value": "200,TTTT,nan",
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_bad_rows_are_named_or_dropped(fault, tmp_path, capsys):
    """Also if the first row is the bad one; lines are those of the file."""
    path = tmp_path / "data.csv"
    path.write_text("\n" + CSV + BAD_ROWS[fault])
    with pytest.raises(UsageError) as error:
        read_data(path, "value")
    assert str(error.value).startswith(f"{path}: {fault}")
    found = read_data(path, "value", drop_bad_rows=True)
    assert capsys.readouterr().out == f"{path}: 1 of 101 sequences dropped\n"
    assert data.decode(found.x) == ROWS and len(found.values) == 100
    path.write_text(CSV.replace("value\n", f"value\n{BAD_ROWS[fault]}\n"))
    assert len(read_data(path, "value", drop_bad_rows=True).x) == 100


BAD_FILES = {
    "a column seq or sequence, found the first line 'name,x'": b"name,x\n1,2",
    "first line ''": b"",
    "has 3 usable sequences, expected at least 64": b"seq\nAC\nAG\nAT\n",
    "codec can't decode": b"\x89PNG\r\n\x1a\n\xff\xfe",
    "ended before": gzip.compress(CSV.encode())[:40],
    "decompress": gzip.compress(CSV.encode())[:30] + b"\xff" * 300,
    "No such file": None,
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_files_are_one_line(fault, tmp_path):
    path = tmp_path / "data.csv"
    if BAD_FILES[fault] is not None:
        path.write_bytes(BAD_FILES[fault])
    with pytest.raises(UsageError) as error:
        read_data(path, drop_bad_rows=True)
    message = str(error.value)
    assert str(path) in message and fault in message and message.isprintable()


# ---- npz files ---------------------------------------------------------------------------------

THETA = simpo_dna.init_generator(jax.random.key(0), 4, 5)


def entry(declared, size):
    """An npy file that declares a float32 array of a shape and has `size` bytes of it."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {declared}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(size)


def damaged(kind, path):
    """A generator's npz with a fault."""
    tree, meta = jax.tree.map(np.asarray, THETA), {"method": "pretrained", "data": None}
    if kind == "another kind":
        return save_arrays(path, tree, "finetune checkpoint", **meta)
    if kind == "not finite":
        tree["head"][0]["b"] = np.full(4, np.nan, np.float32)
    elif kind == "complex":
        tree["head"][0]["b"] = np.zeros(4, np.complex64)
    elif kind == "another shape":
        tree["head"][0]["b"] = np.zeros(1, np.float32)
    elif kind == "six layers":
        tree["layers"].append(tree["layers"][0])
    elif kind == "a layer less":
        tree["layers"][2].pop("norm")
    elif kind == "one more":
        tree["more"] = np.zeros(1)
    save_arrays(path, tree, "generator", **meta)
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[content.index(b"['first']['w']") + 400] ^= 255  # in the numbers
    elif kind == "cut short":
        content = content[: len(content) // 2]
    path.write_bytes(content)
    if kind == "another script":
        np.savez(path, x=np.zeros(3), meta=np.zeros(3))
    elif kind in ("huge", "bomb"):
        method = zipfile.ZIP_STORED if kind == "huge" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "a", method) as file:
            file.writestr("x.npy", entry("(1000000, 100000)", 0 if kind == "huge" else 10**7))


KINDS = "flipped, cut short, huge, bomb, another kind, another script, not finite, complex"
KINDS = f"{KINDS}, another shape, six layers, a layer less, one more"


@pytest.mark.parametrize("kind", KINDS.split(", "))
def test_a_bad_npz_is_one_line(kind, tmp_path):
    path = tmp_path / "x.npz"
    damaged(kind, path)
    with pytest.raises(UsageError) as error:
        simpo_dna.load_theta(simpo_dna.Args(), path)
    message = str(error.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 400


def test_an_npz_is_read_back(tmp_path):
    damaged("not at all", tmp_path / "x.npz")
    theta, meta = simpo_dna.load_theta(simpo_dna.Args(), tmp_path / "x.npz")
    jax.tree.map(np.testing.assert_array_equal, theta, THETA)
    assert meta["method"] == "pretrained"
    tree = data.nest(load_arrays(tmp_path / "x.npz", "generator")[0])
    assert jax.tree.structure(tree) == jax.tree.structure(THETA)
    assert oracles.Oracle._fields == ("apply", "params")
