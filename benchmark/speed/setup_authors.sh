#!/usr/bin/env bash
# The environments of authors.py in a folder: bash benchmark/speed/setup_authors.sh PEERS;
# needs Python 3.11 and a C compiler. None of the authors' code is part of this repository;
# what is changed in a copy of it is below.
set -euo pipefail
mkdir -p "$1" && cd "$1"

venv() { # venv NAME PACKAGES...
  python3.11 -m venv "$1" && "$1/bin/pip" install -q "${@:2}"
}
source_of() { # source_of FOLDER REPOSITORY COMMIT
  [ -d "$1" ] || git clone -q "https://github.com/$2" "$1"
  git -C "$1" checkout -q "$3"
}

# DPMD. Its package stores jaxprs by pickle for a second process that evaluates, which
# today's JAX does not allow, and a value function that DPMD does not have. These are taken
# out; a type hint that names what JAX has moved is left unevaluated. Algorithm, networks,
# replay and environments stay as they are.
venv dpmd "gymnasium[mujoco]==1.4.0" mujoco==3.4.0 jax==0.10.2 optax dm-haiku numpyro numba \
  tensorboardX tqdm setproctitle dill scikit-learn wandb pyyaml setuptools wheel
source_of dpmd-src mahaitongdae/diffusion_policy_online_rl a50cf41
git -C dpmd-src checkout -q .
sed -i '1i from __future__ import annotations' dpmd-src/relax/utils/persistence.py
sed -i -e '/save_policy_structure(/,/^        )$/d' -e '/if self.save_value:/,/stdin.write/d' \
  -e '/evaluator.stdin.close/d' -e '/evaluator.wait/d' dpmd-src/relax/trainer/off_policy.py
CONDA_PREFIX=/usr dpmd/bin/pip install -q --no-deps --no-build-isolation -e dpmd-src

# GeMPO, unchanged; it runs from its folder.
venv gempo jax==0.5.3 flax==0.10.5 orbax-checkpoint==0.11.23 distrax hydra-core tensorboardX tqdm \
  scikit-learn wandb matplotlib "gymnasium[mujoco]==1.4.0" mujoco==3.4.0
source_of flow-rl typoverflow/flow-rl bae22f4
