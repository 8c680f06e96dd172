"""Rewards of simpo_dna.py: the motif grammar, DRAKES' oracle, or your function."""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dna.data import REWARD, decode
from dna.devices import Layout, in_batches
from dna.enformer import enformer
from dna.files import load_arrays, nest
from dna.motifs import load_motifs, motif_score


class Oracles(NamedTuple):
    """x [n, L] on the host -> scores [n] float32."""

    ft: Callable  # that is optimised
    held_out: Callable  # that judges


def load_oracle(spec, part="ft", column=0, layout=Layout(64)):  # noqa: B008
    """The reward that a flag names, a function of x [n, L] on the host -> [n] float32.

    motif: the embedded motif grammar, its set `part`. motif:FILE.json: one of yours.
    enformer:FILE: of DRAKES, by dna/convert_drakes.py; column 0 is HepG2, 1 K562.
    MODULE:FUNCTION: your function of a list of strings or, with the attribute
    `takes_indices`, of x [n, L] uint8; it returns n scores, or [n, k] of which column
    counts.
    """
    kind, _, rest = spec.partition(":")
    if kind == "motif":
        params = load_motifs(rest or REWARD, part)
        apply = motif_score
    elif kind == "enformer":
        params = load_enformer(rest, column)
        apply = jax.jit(lambda params, x: enformer(params, x)[:, column])
    else:
        function = import_function(spec)
        return functools.partial(call_function, function, spec, column, layout.size)
    params = jax.device_put(params, layout.whole)

    def score(x):
        return in_batches(lambda batch, _: apply(params, batch), x, layout)

    return score


def check_oracles(oracles, x):
    """Both score a few sequences before anything is trained."""
    for name, oracle in oracles._asdict().items():
        q = oracle(x)
        if np.ptp(q) == 0:
            found = f"gives {len(x)} training sequences the score {q[0]}"
            raise SystemExit(f"error: the {name} oracle {found}")


def load_enformer(path, column):
    """Parameters of an Enformer that dna/convert_drakes.py wrote."""
    arrays, _ = load_arrays(path, "enformer")
    params = nest(arrays)
    try:
        x = jnp.zeros((1, 128), jnp.int32)
        outputs = jax.eval_shape(enformer, params, x).shape[1]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise SystemExit(f"error: {path} is no whole Enformer") from None
    if column >= outputs:
        reason = f"--oracle-column {column}, but {path} has {outputs} outputs"
        raise SystemExit(f"error: {reason}")
    return params


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


def import_function(spec):
    """MODULE:FUNCTION, also of a module in the working directory."""
    module, _, name = spec.partition(":")
    sys.path.insert(0, "")
    try:
        function = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:  # whatever a module of the user's raises
        raise SystemExit(f"error: oracle {spec}: {one_line(error)}") from None
    if not callable(function):
        raise SystemExit(f"error: oracle {spec} is no function")
    return function


def call_function(function, spec, column, size, x):
    """Scores [n] of x [n, L] by a user's function, `size` sequences a call."""
    scores = []
    for start in range(0, len(x), size):
        part = x[start : start + size].astype(np.uint8)
        takes_indices = getattr(function, "takes_indices", False)
        try:
            q = np.asarray(function(part if takes_indices else decode(part)))
        except Exception as error:  # whatever a function of the user's raises
            raise SystemExit(f"error: oracle {spec}: {one_line(error)}") from None
        if q.ndim == 2 and q.shape[1] > column:
            q = q[:, column]
        if q.dtype.kind not in "fiub" or q.shape != (len(part),):
            found = f"returned {q.dtype} of shape {q.shape}"
            reason = f"{found}, expected {len(part)} numbers"
            raise SystemExit(f"error: oracle {spec} {reason}")
        with np.errstate(over="ignore"):  # what is too large becomes inf
            q = q.astype(np.float32)
        if not np.isfinite(q).all():
            bad = decode(part[~np.isfinite(q)][:1])[0]
            raise SystemExit(f"error: oracle {spec}: not finite for {bad}")
        scores.append(q)
    return np.concatenate(scores)
