#!/usr/bin/env bash
# The runs behind dna_sweep.csv, all from the pretrained model of seed 1 (benchmark/dna.sh makes it)
# and with a quarter of the default's sampling steps and half of its evaluation: what bounds the
# negative weights, and what the replay does. ONLY, a regular expression, selects run folders. A
# complete run is skipped, a started one goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

train() { # train GROUP METHOD FLAGS
  local run_dir="runs/dna_sweep/$1__$2__1"
  [[ $run_dir =~ ${ONLY:-.} && ! -e $run_dir/metrics.csv ]] || return 0
  if [ -e "$run_dir/args.json" ]; then
    python simpo_dna.py --resume "$run_dir"
  else
    python simpo_dna.py --run-dir "$run_dir" --no-compare --sampling-steps 32 \
      --eval-samples 320 --pretrained runs/dna/generated__pretraining__1/pretrained.npz "${@:3}"
  fi
}

train weights exp --weighting exp
for weighting in linear square; do
  train weights "$weighting" --weighting "$weighting"
  for clip in -0.5 -1 -2; do
    train floor-0.05 "$weighting($clip)" --weighting "$weighting" --neg-clip "$clip"
  done
done
for floor in 0 0.2; do
  train "floor-$floor" "linear(-1)" --neg-clip -1 --neg-floor "$floor"
done
# eps_kl 0.001 makes lam so large that all weights are nearly 1: what the model does by itself
for replay in 1 8; do
  train "uniform-replay-$replay" exp --weighting exp --eps-kl 0.001 --replay "$replay"
done
