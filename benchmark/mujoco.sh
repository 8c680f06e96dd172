#!/usr/bin/env bash
# The runs behind returns.csv and entropy.csv, one seed each: 15 minutes for 100,000 environment
# steps on one core. N and T are cut to 8 and 5 to get there, eps_kl shrinks with log N (0.9 of
# log 8 is as 1.5 of log 32); everything else is the default. A complete run is skipped and a
# started one goes on. Pin a run to a core with taskset: on several cores a batch is split over
# devices, which changes the last digits.
set -euo pipefail
cd "$(dirname "$0")/.."

train() { # train NAME ENV STEPS FLAGS...
  local run_dir="runs/mujoco/$2__$1__1"
  if [ -e "$run_dir/args.json" ]; then
    python simpo_mujoco.py --resume "$run_dir"
  else
    python simpo_mujoco.py --run-dir "$run_dir" --env-id "$2" --total-timesteps "$3" \
      --num-samples 8 --diffusion-steps 5 --sampling-steps 5 --eps-kl 0.9 --eval-every 10000 "${@:4}"
  fi
}

# three weightings
for run in "HalfCheetah-v4 100000" "Hopper-v4 100000"; do train linneg $run --neg-clip -0.05; done
for run in "HalfCheetah-v4 100000" "Hopper-v4 60000"; do
  train linear $run
  train exp $run --weighting exp
done
python benchmark/collect.py runs/mujoco/* --out benchmark/returns.csv
python benchmark/curves.py benchmark/returns.csv benchmark/dpmd.csv --out benchmark/returns.png

# remedies against the loss of entropy, all with --neg-clip -0.05 like linneg
for run in "HalfCheetah-v4 80000" "Hopper-v4 60000"; do
  train noise-0.1 $run --neg-clip -0.05 --noise-start 0.1
  train act-noise-only $run --neg-clip -0.05 --no-train-noise
done
python benchmark/collect.py runs/mujoco/*{linneg,noise-0.1,act-noise-only}* \
  --out benchmark/entropy.csv
python benchmark/curves.py benchmark/entropy.csv --spread --out benchmark/entropy.png
