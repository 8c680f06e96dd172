#!/usr/bin/env bash
# The runs behind dna.csv: one pretrained model a seed, then every weighting from it, with a quarter
# of the default's sampling steps; the peers beside exp. DATA (a file of sequences; default the
# generated set), NAME (of the folders), SEEDS and METHODS may be set from outside; a complete run
# is skipped and a started one goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${NAME:-generated}
data=${DATA:+--data $DATA --drop-bad-rows}

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
  for method in ${METHODS:-exp linear square wd1 linear_neg square_neg}; do
    flags="--weighting ${method%_neg}"
    [ "$method" = exp ] || flags+=" --no-compare"
    [ "${method%_neg}" = "$method" ] || flags+=" --neg-clip ${NEG_CLIP:--1}"
    train "runs/dna/${name}__${method}__$seed" $start $flags
  done
done
