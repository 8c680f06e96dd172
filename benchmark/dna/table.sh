#!/usr/bin/env bash
# The runs behind table.csv: one pretrained model a seed, every method from it with T = 32 sampling
# steps, best-of-n and SMC from it. DATA (a file of sequences; default the generated set), NAME (of
# the folders), SEEDS and METHODS may be set from outside. A complete run is skipped, a started one
# goes on, so that the script may be stopped and started at any time.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=${NAME:-generated}
data=${DATA:+--data $DATA --drop-bad-rows}

declare -A flags=(
  [uniform]="--weighting uniform"
  [wd1]="--weighting wd1"
  [wd1-floor]="--weighting wd1 --neg-floor 0.05"
  [exp]="--weighting exp"
  [linear]="--weighting linear"
  [square]="--weighting square"
  [linear-neg0.05]="--weighting linear --neg-clip -0.05"
  [square-neg0.05]="--weighting square --neg-clip -0.05"
  [linear-neg1]="--weighting linear --neg-clip -1"
  [square-neg1]="--weighting square --neg-clip -1"
  [linear-neg1-floor]="--weighting linear --neg-clip -1 --neg-floor 0.05"
  [square-neg1-floor]="--weighting square --neg-clip -1 --neg-floor 0.05"
  [square-anchor]="--weighting square --kl-weight 1"
)
order="exp linear square linear-neg1 square-neg1 wd1 uniform linear-neg0.05 square-neg0.05
  wd1-floor linear-neg1-floor square-neg1-floor square-anchor"

train() { # train RUN_DIR FLAGS
  if [ -e "$1/metrics.csv" ]; then
    return
  elif [ -e "$1/args.json" ]; then
    python simpo_dna.py --resume "$1"
  else
    python simpo_dna.py --run-dir "$@" $data
  fi
}

for seed in ${SEEDS:-1 2 3}; do
  pretrained="runs/dna/${name}__pretraining__$seed"
  if [ ! -e "$pretrained/pretrained.npz" ]; then
    train "$pretrained" --pretrain-only --seed "$seed"
  fi
  start="--pretrained $pretrained/pretrained.npz --sampling-steps 32 --seed $seed"
  for method in ${METHODS:-$order}; do
    train "runs/dna/${name}__${method}__$seed" $start ${flags[$method]}
    if [ "$method" = exp ]; then
      python benchmark/dna/peers.py "runs/dna/${name}__${method}__$seed"
    fi
  done
done
