"""Parity with the original classes, time and memory at the full size of DRAKES' networks.

    python dna/tests/make_fixtures.py --full --out FOLDER --drakes DIR --grelu DIR
    python benchmark/dna/full_size.py FOLDER

The first command (its docstring says what it needs) writes checkpoints of the published sizes with
random weights, and their outputs, to FOLDER. --out gets the rows `network, quantity, value`. Each
network is measured in a process of its own; memory is that process's peak so far.
"""

import csv
import dataclasses
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@dataclasses.dataclass(frozen=True)
class Args:
    folder: tyro.conf.Positional[Path]
    """where make_fixtures.py --full wrote"""
    batch_size: int = 64
    """sequences of a call"""
    repeats: int = 3
    """calls after the first, which compiles; the fastest counts"""
    out: Path = Path("benchmark/dna/full_size.csv")
    """the CSV to write"""


def seconds(f, repeats):
    """Of the fastest of `repeats` calls, after one that compiles."""
    import jax

    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(f())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def peak_memory():
    """Of this process so far, GB (Linux counts in kB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def convert(args, name, send):
    """{name}.ckpt -> {name}.converted.npz, in this process."""
    from dna.convert_drakes import convert
    from dna.data import save_arrays

    path, start = args.folder / f"{name}.ckpt", time.perf_counter()
    kind, params = convert(path)
    save_arrays(args.folder / f"{name}.converted.npz", params, kind, data=None)
    rows = {"file, GB": path.stat().st_size / 1e9, "converting, s": time.perf_counter() - start}
    send(rows | {"peak memory of converting, GB": peak_memory()})


def measure_oracle(args, name, send):
    import jax
    import numpy as np

    from dna.oracles import load_oracle

    start = time.perf_counter()
    oracle = load_oracle(f"enformer:{args.folder / 'oracle.converted.npz'}")
    params = jax.block_until_ready(jax.tree.map(jax.numpy.asarray, oracle.params))
    rows = {"reading, s": time.perf_counter() - start}
    rows["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    expected = np.load(args.folder / "oracle.npz")
    y = expected["y200"][:, 0]
    error = np.abs(oracle.apply(params, expected["x200"].astype(np.int32)) - y)
    rows["largest error / largest output"] = error.max() / np.abs(y).max()
    x = jax.random.randint(jax.random.key(0), (args.batch_size, 200), 0, 4)
    call = seconds(lambda: oracle.apply(params, x), args.repeats)
    rows[f"call on {args.batch_size} sequences, s"] = call
    send(rows | {"peak memory, GB": peak_memory()})


def measure_generator(args, name, send):
    import jax
    import numpy as np

    import simpo_dna as sd

    start = time.perf_counter()
    theta, _ = sd.load_theta(sd.Args(), args.folder / "pretrained.converted.npz")
    theta = jax.block_until_ready(jax.tree.map(jax.numpy.asarray, theta))
    rows = {"reading, s": time.perf_counter() - start}
    rows["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(theta))
    expected = np.load(args.folder / "pretrained.npz")
    found = jax.jit(sd.logits)(theta, expected["x"].astype(np.int32))
    rows["largest error / largest output"] = (
        np.abs(found - expected["raw"]).max() / np.abs(expected["raw"]).max()
    )
    masks = np.full((args.batch_size, 200), sd.MASK, np.int32)
    key = jax.random.key(0)
    time_128 = seconds(lambda: sd.sample_sequences(theta, 128, masks, key), args.repeats)
    rows[f"sampling {args.batch_size} sequences in 128 steps, s"] = time_128
    send(rows | {"peak memory, GB": peak_memory()})


def main(args):
    for name in ("oracle", "pretrained"):
        if not (args.folder / f"{name}.ckpt").exists():
            sys.exit(f"error: {args.folder} has no {name}.ckpt of make_fixtures.py --full")
    spawn = multiprocessing.get_context("spawn")
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("network", "quantity", "value"))
        for name, measure in (
            ("oracle", convert),
            ("oracle", measure_oracle),
            ("pretrained", convert),
            ("pretrained", measure_generator),
        ):
            receiver, sender = spawn.Pipe(duplex=False)
            process = spawn.Process(target=measure, args=(args, name, sender.send))
            process.start()
            sender.close()
            for quantity, value in receiver.recv().items():
                value = value if isinstance(value, int) else f"{value:.4g}"
                writer.writerow((name, quantity, value))
                print(f"{name:10} {quantity:45} {value}", flush=True)
            process.join()


if __name__ == "__main__":
    main(tyro.cli(Args))
