"""SAC of SBX with its own settings, for peers.py; SBX is a library and ships no script.

python benchmark/peers/peers_sbx.py ENV_ID SEED STEPS LEARNING_STARTS
"""

import sys

from sbx import SAC


def main(env_id, seed, steps, starts):
    SAC("MlpPolicy", env_id, seed=int(seed), learning_starts=int(starts)).learn(int(steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
