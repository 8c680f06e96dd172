"""What no training reaches: best-of-n and SMC from the pretrained model of a run.

    python -m benchmark.dna.baselines runs/table3/*

Writes best-of-{n}.fasta, smc.fasta and baselines.csv, whose columns are those of
metrics.csv, to each run folder that has none.

Best of n draws n samples for each one that it keeps, so that the oracle is called as
often as in fine-tuning. smc is that of DRAKES' evaluation (controlled_sample_SMC):
after every step each population of 64 is resampled with weights
exp((r(x_s) - r(x_t)) / alpha), where r is the score of the argmax prediction of x0.
alpha is half a standard deviation of the pretrained model's scores; it is printed.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import simpo_dna
from dna.data import write_fasta
from dna.devices import in_batches, make_layout, use_all_cores
from dna.metrics import make_reference, measure, write_table
from dna.oracles import Oracles, load_oracle
from dna.runs import read_args

POPULATION = 64
ALPHA = 0.5  # standard deviations of the pretrained model's scores


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # complete runs of simpo_dna.py


@jax.jit
def smc_step(theta, x, t, s, key):
    """x_t [B, L] -> [B, 2, L]: x_s, and its argmax prediction of x0."""
    log_p = simpo_dna.log_probs(theta, x)
    x_s = simpo_dna.unmask(log_p, x, t, s, key)
    log_p = simpo_dna.log_probs(theta, x_s)
    x0 = jnp.argmax(log_p, axis=-1)
    return jnp.stack([x_s, x0], axis=1)


def resample(rng, log_w):
    """Rows [n] that populations of log weights [n] draw from themselves."""
    rows = []
    for start in range(0, len(log_w), POPULATION):
        part = log_w[start : start + POPULATION].astype(np.float64)
        p = np.exp(part - part.max())
        p = p / p.sum()
        drawn = rng.choice(len(p), size=len(p), p=p)
        rows.append(start + drawn)
    return np.concatenate(rows)


def smc(args, theta, oracle, alpha, x, layout, key):
    """Sequences from the masks x [n, L] -> [n, L]; the oracle is called T n times."""
    rng = np.random.default_rng(args.seed)
    ts = simpo_dna.times(args.sampling_steps)
    before = np.zeros(len(x))  # of the masks, one number for all: it cancels
    for i in range(args.sampling_steps):
        k_step = jax.random.fold_in(key, i)

        def step(batch, j, k_step=k_step, i=i):
            k_batch = jax.random.fold_in(k_step, j)
            return smc_step(theta, batch, ts[i], ts[i + 1], k_batch)

        both = in_batches(step, x, layout)  # [n, 2, L]
        x = both[:, 0]
        x0 = both[:, 1]
        after = oracle(x0)
        rows = resample(rng, (after - before) / alpha)
        x = x[rows]
        x0 = x0[rows]
        before = after[rows]
    return x0


def best_of_n(args, theta, oracle, x, n, layout, key):
    """The best of n samples for each row of the masks x [., L]."""
    masks = np.repeat(x, n, axis=0)
    drawn = simpo_dna.sample(args, theta, masks, layout, key)
    scores = oracle(drawn).reshape(-1, n)
    best = np.arange(len(x)) * n + scores.argmax(axis=1)
    return drawn[best]


def main(run):
    # --- The run ---
    args = read_args(run, simpo_dna.Args)
    layout = make_layout(args.num_groups * args.num_samples)
    data, args = simpo_dna.load_data(args)
    models, _ = simpo_dna.load_generator(run / simpo_dna.PRETRAINED)
    theta = jax.device_put(models["pretrained"], layout.whole)
    column = args.oracle_column
    oracles = Oracles(
        ft=load_oracle(args.oracle, "ft", column, layout),
        held_out=load_oracle(args.eval_oracle or "motif", "eval", column, layout),
    )
    reference = make_reference(args, data, oracles.held_out, layout)

    # --- Sequences ---
    key = jax.random.fold_in(jax.random.key(args.seed), 100)
    k_best, k_smc, k_pretrained, k_measure = jax.random.split(key, 4)
    masks = np.full((args.eval_samples, data.x.shape[1]), simpo_dna.MASK)
    pretrained = simpo_dna.sample(args, theta, masks, layout, k_pretrained)
    sd = oracles.ft(pretrained).std()
    alpha = ALPHA * sd
    print(f"alpha       {alpha:.3f}, {ALPHA} sd of {len(masks)} pretrained scores")
    n = max(args.finetune_steps * layout.size // args.eval_samples, 1)
    best = f"best-of-{n}"
    drawn = {
        best: best_of_n(args, theta, oracles.ft, masks, n, layout, k_best),
        "smc": smc(args, theta, oracles.ft, alpha, masks, layout, k_smc),
    }
    calls = {
        best: n * len(masks),
        "smc": args.sampling_steps * len(masks),
    }

    # --- Table ---
    table = {}
    for name, x in drawn.items():
        loglik = simpo_dna.likelihoods(args, theta, x, layout, k_measure)
        values, row = measure(reference, oracles, x, loglik, args.seed)
        row["oracle_calls"] = calls[name]
        row["judge_calls"] = 0
        table[name] = row
        write_fasta(run / f"{name}.fasta", name, x, values)
    write_table(table, run / "baselines.csv")


if __name__ == "__main__":
    use_all_cores()
    for run in tyro.cli(Args).runs:
        if not (run / "baselines.csv").exists():
            main(run)
