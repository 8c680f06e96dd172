"""Peers without training for runs of simpo_dna.py, from their pretrained model: best-of-n and SMC.

    python benchmark/dna/peers.py runs/table3/*__exp__*

Reads args.json and pretrained.npz of each run folder; writes best-of-n.fasta, smc.fasta and
peers.csv, whose columns are those of metrics.csv; an existing peers.csv is left as it is.

best-of-n draws n samples for each one it keeps, so that the oracle is called as often as in
fine-tuning. smc is that of DRAKES' evaluation (controlled_sample_SMC): after every step the whole
batch is resampled, multinomially, with weights exp((r(x_s) - r(x_t)) / 0.5), where r is the oracle
of the argmax prediction of x0. Every row has --eval-samples sequences.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import simpo_dna as sd
from benchmark.results import fail
from dna.data import write_fasta
from dna.oracles import load_oracle

ALPHA = 0.5  # DRAKES' temperature of SMC


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # run folders of simpo_dna.py


@jax.jit
def smc_step(theta, x, t, s, key):
    """-> x_s drawn from x_t = x [B, L], and its argmax prediction of x0."""
    x = sd.unmask(sd.log_probs(theta, x), x, t, s, key)
    return x, jnp.argmax(sd.log_probs(theta, x), axis=-1)


def smc(args, theta, r, num, length, key, split):
    """num sequences [num, L] that resampling by r(x0 [num, L]) -> [num] leaves; oracle calls."""
    rng, ts = np.random.default_rng(args.seed), sd.times(args.sampling_steps)
    x = np.full((num, length), sd.MASK)
    predicted = sd.in_batches(args, lambda p, _: jnp.argmax(sd.log_probs(theta, p), -1), x, split)
    before = r(predicted)
    for i in range(args.sampling_steps):

        def step(part, batch, i=i):
            k = jax.random.fold_in(jax.random.fold_in(key, i), batch)
            return jnp.stack(smc_step(theta, part, ts[i], ts[i + 1], k), axis=1)

        x, predicted = np.moveaxis(sd.in_batches(args, step, x, split), 1, 0)
        after = r(predicted)
        log_w = (after - before) / ALPHA
        p = np.exp(log_w - log_w.max(), dtype=np.float64)
        pick = rng.choice(num, num, p=p / p.sum())
        x, predicted, before = x[pick], predicted[pick], after[pick]
    return predicted, (args.sampling_steps + 1) * num


def best_of_n(args, theta, r, calls, length, key, split):
    """The best of n = calls / eval_samples samples, eval_samples times; oracle calls."""
    n = max(calls // args.eval_samples, 1)
    x = sd.sample(args, theta, n * args.eval_samples, length, key, split)
    q = r(x).reshape(-1, n)
    x = x.reshape(-1, n, length)
    return x[np.arange(len(x)), q.argmax(axis=1)], q.size


def main(run):
    if (run / "peers.csv").exists():
        return print(f"{run}/peers.csv is complete")
    if not (run / "pretrained.npz").exists():
        fail(f"{run} has no pretrained.npz, which a run of simpo_dna.py has")
    args = sd.Args(**json.loads((run / "args.json").read_text()))
    whole, split = shards = sd.make_shards(args)
    data = sd.load_data(args)
    theta = sd.place(sd.load_theta(args, run / "pretrained.npz")[0], whole)
    specs = (args.oracle, "ft"), (args.held_out, "eval")
    oracles = [load_oracle(*spec, args.oracle_column) for spec in specs]
    judge, length = sd.make_judge(args, data, theta, oracles, shards), data.x.shape[1]
    k_best, k_smc = jax.random.split(jax.random.fold_in(jax.random.key(args.seed), 100))

    def r(x):
        return sd.score(args, oracles[0], x, split)

    calls = args.finetune_steps * args.num_groups * args.num_samples
    rows = {
        "best-of-n": best_of_n(args, theta, r, calls, length, k_best, split),
        "smc": smc(args, theta, r, args.eval_samples, length, k_smc, split),
    }
    table = {}
    for name, (x, used) in rows.items():
        values, table[name] = sd.measure(args, judge, x, used, jax.random.fold_in(k_smc, 1), split)
        write_fasta(run / f"{name}.fasta", name, x, values)
    sd.write_table(table, run / "peers.csv")


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "float32")  # as simpo_dna.py
    for run in tyro.cli(Args).runs:
        main(run)
