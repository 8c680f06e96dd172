#!/usr/bin/env bash
# The runs behind fast.csv: the default's sampler and number of samples against cheaper ones, at equal
# environment steps, two tasks, three seeds. The batch is 64, the random start 5,000 steps and the
# run 20,000, so that the default setting takes a quarter of an hour on one core; eps_kl shrinks with
# log N (0.9 of log 8 and 0.8 of log 6 are as 1.5 of log 32). SETTINGS, TASKS and SEEDS may be set
# from outside; a complete run is skipped and a started one goes on. Pin it to a core with taskset:
# on several cores a batch is split over devices, which changes the last digits.
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A flags=(
  [ddpm-20-N32]=""
  [dpm2-6-N8]="--sampler dpm2 --sampling-steps 6 --num-samples 8 --eps-kl 0.9"
  [dpm2-6-N6]="--sampler dpm2 --sampling-steps 6 --num-samples 6 --eps-kl 0.8"
  [dpm2-5-N8]="--sampler dpm2 --sampling-steps 5 --num-samples 8 --eps-kl 0.9"
)

for seed in ${SEEDS:-1 2 3}; do
  for task in ${TASKS:-InvertedDoublePendulum-v4 Reacher-v4}; do
    for setting in ${SETTINGS:-ddpm-20-N32 dpm2-6-N6 dpm2-6-N8 dpm2-5-N8}; do
      run_dir="runs/fast/${task}__${setting}__$seed"
      if [ -e "$run_dir/args.json" ]; then
        python simpo_mujoco.py --resume "$run_dir"
      else
        python simpo_mujoco.py --run-dir "$run_dir" --env-id "$task" --seed "$seed" \
          --neg-clip -0.05 --batch-size 64 --learning-starts 5000 --total-timesteps 20000 \
          --noise-steps 15000 --eval-every 5000 ${flags[$setting]}
      fi
    done
  done
done
python benchmark/collect.py runs/fast/* --out benchmark/fast.csv
