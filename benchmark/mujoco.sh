#!/usr/bin/env bash
# The runs behind returns.csv: two tasks, three weightings, 100,000 environment steps, seed 1.
# N and T are cut to 8 and 5 so that a run takes a quarter of an hour on one core; eps_kl shrinks
# with log N (0.9 of log 8 as 1.5 of log 32). Everything else is the default.
set -euo pipefail
cd "$(dirname "$0")/.."
for env in HalfCheetah-v4 Hopper-v4; do
  for variant in "linneg --neg-clip -0.05" "linear" "exp --weighting exp"; do
    read -r name flags <<< "$variant"
    python simpo_mujoco.py --env-id $env $flags --seed 1 --total-timesteps 100000 \
      --num-samples 8 --sampling-steps 5 --eps-kl 0.9 --eval-every 10000 \
      --run-dir "runs/mujoco/${env}__${name}__1"
  done
done
python benchmark/collect.py runs/mujoco/* --out benchmark/returns.csv
python benchmark/curves.py benchmark/returns.csv benchmark/dpmd.csv --out benchmark/returns.png
