"""Joins run folders into one CSV, a row for each evaluation episode.

    python benchmark/collect.py runs/mujoco/* --out benchmark/returns.csv

A folder is named {env_id}__{method}__{seed}. Columns: env_id, method, seed, those of eval.csv, and
spread, the last value of losses/spread logged by then (empty before training starts).
"""

import csv
import dataclasses
import struct
from pathlib import Path

import tyro
from tensorboardX.proto.event_pb2 import Event


@dataclasses.dataclass(frozen=True)
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders"""
    out: Path = Path("benchmark/returns.csv")
    """the CSV to write"""


def read_scalars(run_dir, tag):
    """{step: value} of one TensorBoard tag over all event files of a run."""
    scalars = {}
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        data, start = path.read_bytes(), 0
        while start + 12 <= len(data):  # a record: length u64, its crc u32, payload, crc u32
            (length,) = struct.unpack_from("<Q", data, start)
            if start + 16 + length > len(data):  # killed while it wrote
                break
            event = Event.FromString(data[start + 12 : start + 12 + length])
            for value in event.summary.value:
                if value.tag == tag:
                    scalars[event.step] = value.simple_value
            start += 16 + length
    return scalars


def main(args):
    with (args.runs[0] / "eval.csv").open() as file:
        columns = ["env_id", "method", "seed", *csv.DictReader(file).fieldnames, "spread"]
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for run_dir in args.runs:
            env_id, method, seed = run_dir.name.split("__")
            spread = read_scalars(run_dir, "losses/spread")
            for row in csv.DictReader((run_dir / "eval.csv").open()):
                before = [value for step, value in spread.items() if step <= int(row["step"])]
                row["spread"] = f"{before[-1]:.4f}" if before else ""
                writer.writerow({"env_id": env_id, "method": method, "seed": seed, **row})


if __name__ == "__main__":
    main(tyro.cli(Args))
