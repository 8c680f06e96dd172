#!/usr/bin/env bash
# The runs behind dna_sweep.csv: what bounds the negative weights, --neg-clip against --neg-floor, on
# the pretrained model of seed 1 (benchmark/dna.sh makes it), with a quarter of the default's sampling
# steps and half of its sequences. A complete run is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
for weighting in ${WEIGHTINGS:-linear square}; do
  for bound in ${BOUNDS:-0,0.05 -0.05,0.05 -0.2,0.05 -0.5,0.05 -1,0.05 -0.2,0 -0.5,0 -0.5,0.2}; do
    clip=${bound%,*} floor=${bound#*,}
    bounds="--neg-clip $clip --neg-floor $floor"
    [ "$clip" != 0 ] || bounds=
    run_dir="runs/dna_sweep/floor-${floor}__$weighting($clip)__1"
    [ -e "$run_dir/metrics.csv" ] || python simpo_dna.py --run-dir "$run_dir" \
      --pretrained runs/dna/generated__pretraining__1/pretrained.npz --no-compare \
      --sampling-steps 32 --eval-samples 320 --weighting "$weighting" $bounds
  done
done
