"""sampler.py on a policy at its first weights, saved as a run saves it."""

import csv
import dataclasses
import json
import subprocess
import sys

import jax
from conftest import ROOT

import simpo_mujoco as simpo


def test_samplers_are_compared_with_the_default(env, tmp_path):
    args = simpo.Args(env_id="Pendulum-v1", num_samples=4, hidden_dim=32)
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    state = simpo.init_state(args, 3, 1, jax.random.key(0))
    simpo.save(tmp_path / "checkpoint.npz", state, 0)
    flags = tmp_path, "--states", "16", "--samples", "256", "--steps", "3", "20"
    command = [sys.executable, ROOT / "benchmark" / "mujoco" / "sampler.py", *flags]
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    rows = list(csv.DictReader((tmp_path / "sampler.csv").open()))
    distance = {(row["sampler"], int(row["steps"])): float(row["w1"]) for row in rows}
    floor = float(rows[0]["w1_floor"])
    assert len(distance) == 4 and {row["w1_floor"] for row in rows} == {rows[0]["w1_floor"]}
    assert 0 < distance["ddpm", 20] < 1.1 * floor < distance["ddpm", 3]
    assert floor < distance["dpm2", 20] < 2 * floor < distance["dpm2", 3]  # 0.063, 0.091, 0.140
