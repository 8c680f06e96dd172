#!/usr/bin/env bash
# The environments of peers.py and ../speed/authors.py in a folder: bash benchmark/peers/setup.sh PEERS;
# needs Python 3.11 and a C compiler. None of the peers' code is part of this repository; what is
# changed in a copy of it is below. They use torch for replay buffers alone, so any build will do.
set -euo pipefail
mkdir -p "$1" && cd "$1"

venv() { # venv NAME PACKAGES...
  python3.11 -m venv "$1" && "$1/bin/pip" install -q "${@:2}"
}
source_of() { # source_of FOLDER REPOSITORY COMMIT
  [ -d "$1" ] || git clone -q "https://github.com/$2" "$1"
  git -C "$1" checkout -q "$3"
}

# The authors' DPMD. Its package stores jaxprs by pickle, which today's JAX does not allow, for a
# second process that evaluates (no program of peers.py evaluates), and a value function that DPMD
# does not have. These are taken out; a type hint that names what JAX has moved is left unevaluated.
# Algorithm, networks, replay and environments stay as they are.
venv dpmd "gymnasium[mujoco]==1.4.0" mujoco==3.4.0 jax==0.10.2 optax dm-haiku numpyro numba \
  tensorboardX tqdm setproctitle dill scikit-learn wandb pyyaml setuptools wheel
source_of dpmd-src mahaitongdae/diffusion_policy_online_rl a50cf41
git -C dpmd-src checkout -q .
sed -i '1i from __future__ import annotations' dpmd-src/relax/utils/persistence.py
sed -i -e '/save_policy_structure(/,/^        )$/d' -e '/if self.save_value:/,/stdin.write/d' \
  -e '/evaluator.stdin.close/d' -e '/evaluator.wait/d' dpmd-src/relax/trainer/off_policy.py
CONDA_PREFIX=/usr dpmd/bin/pip install -q --no-deps --no-build-isolation -e dpmd-src

# The authors' later code, unchanged, for ../speed/authors.py; it runs from its folder.
venv gempo jax==0.5.3 flax==0.10.5 orbax-checkpoint==0.11.23 distrax hydra-core tensorboardX tqdm \
  scikit-learn wandb matplotlib "gymnasium[mujoco]==1.4.0" mujoco==3.4.0
source_of flow-rl typoverflow/flow-rl bae22f4

# CleanRL's TD3, unchanged. It reads the infos of Gymnasium 0.29, with which JAX of today works.
venv cleanrl gymnasium==0.29.1 mujoco==3.4.0 imageio jax==0.10.2 flax optax tyro tensorboard \
  torch==2.13.0
source_of cleanrl-src vwxyzjn/cleanrl fe8d8a0
echo "$PWD/cleanrl-src" > cleanrl/lib/python3.11/site-packages/cleanrl.pth

# SBX's SAC, a library; peers_sbx.py runs it.
venv sbx torch==2.13.0 sbx-rl==0.28.0 "gymnasium[mujoco]==1.4.0" mujoco==3.4.0 jax==0.10.2
