#!/usr/bin/env bash
# The runs behind figure5.csv and dmc.csv: cheetah-run under the flattest and the steepest reward,
# three weightings, two seeds. N and T are cut to 8 and 5, eps_kl shrinks with log N (0.9 of log 8
# is as 1.5 of log 32); everything else is the default. STEPS (environment steps of a run), SEEDS
# and REWARDS may be set from outside; a complete run is skipped and a started one goes on. Pin it
# to a core with taskset: on several cores a batch is split over devices, which changes the last
# digits.
set -euo pipefail
cd "$(dirname "$0")/.."

train() { # train REWARD WEIGHTING SEED
  local run_dir="runs/dmc/cheetah-run-$1__$2__$3"
  if [ -e "$run_dir/args.json" ]; then
    python simpo_dmc.py --resume "$run_dir"
  else
    python simpo_dmc.py --run-dir "$run_dir" --reward "$1" --weighting "$2" --seed "$3" \
      --total-timesteps "${STEPS:-100000}" --num-samples 8 --diffusion-steps 5 --sampling-steps 5 --eps-kl 0.9 \
      --eval-every 10000
  fi
}

for seed in ${SEEDS:-1 2}; do
  for reward in ${REWARDS:-sqrt exp}; do
    for weighting in linear square exp; do
      train "$reward" "$weighting" "$seed"
    done
  done
done
python benchmark/collect.py runs/dmc/* --out benchmark/dmc.csv
python benchmark/figure5.py runs/dmc/*
