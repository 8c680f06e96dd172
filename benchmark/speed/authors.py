"""Times an update and an action in turns with the authors' two programs.

    bash benchmark/speed/setup_authors.sh PEERS
    python -m benchmark.speed.authors PEERS > authors.csv

dpmd is their DPMD, which steps its policy every second time, as ours does; gempo is
GeMPO of their flow-rl, which does every time, and ours then too (--policy-delay 1).
N = 32, 20 ancestral steps, a batch of 256, five environments, float32, random data, all
cores. Columns are the median, the minimum and the maximum over the turns, in ms;
`ratio` is their update and action over ours.
"""

import csv
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BATCH = 256
SAMPLES = 32
STEPS = 20
ENVS = 5
ENV_IDS = ("Hopper-v4", "Humanoid-v4")
TURNS = 6


# ---- in the authors' Python ----------------------------------------------------------
def random_batch(obs_dim, act_dim):
    rng = np.random.default_rng(0)
    return {
        "obs": rng.standard_normal((BATCH, obs_dim), np.float32),
        "next_obs": rng.standard_normal((BATCH, obs_dim), np.float32),
        "action": rng.uniform(-1, 1, (BATCH, act_dim)).astype(np.float32),
        "reward": rng.standard_normal(BATCH, np.float32),
        "done": np.zeros(BATCH, bool),
    }


def dpmd(peers, batch):
    """-> update() and act() as in scripts/train_mujoco.py; both wait for the result."""
    import jax
    from relax.algorithm.dpmd import DPMD
    from relax.network.diffv2 import create_diffv2_net
    from relax.utils.experience import Experience

    def mish(x):
        return x * jax.numpy.tanh(jax.nn.softplus(x))

    key = jax.random.key(0)
    agent, params = create_diffv2_net(
        key,
        batch["obs"].shape[1],
        batch["action"].shape[1],
        [256] * 3,
        [256] * 3,
        mish,
        num_timesteps=STEPS,
        num_particles=SAMPLES,
        noise_scale=0.1,
        beta_schedule_scale=0.8,
    )
    algorithm = DPMD(
        agent,
        params,
        lr=3e-4,
        alpha_lr=7e-3,
        delay_alpha_update=250,
        lr_schedule_end=3e-5,
    )
    update = functools.partial(algorithm.update, key, Experience(**batch))
    act = functools.partial(algorithm.get_action, key, batch["obs"][:ENVS])
    return update, act


def gempo(peers, batch):
    """-> update() and act() as in examples/online/main_mujoco_offpolicy.py."""
    import jax
    from flowrl.agent.online.gempo import GeMPOAgent
    from flowrl.types import Batch
    from omegaconf import OmegaConf

    file = peers / "flow-rl/examples/online/config/mujoco/algo/gempo_linear.yaml"
    config = OmegaConf.merge(OmegaConf.load(file), {"task": "Hopper-v5"})
    config.algo.num_particles = SAMPLES
    config.algo.diffusion.steps = STEPS
    obs_dim = batch["obs"].shape[1]
    act_dim = batch["action"].shape[1]
    agent = GeMPOAgent(obs_dim, act_dim, config.algo, seed=0)
    columns = Batch(
        obs=batch["obs"],
        next_obs=batch["next_obs"],
        action=batch["action"],
        reward=batch["reward"][:, None],
        terminal=batch["done"][:, None].astype(np.float32),
        next_action=None,
    )

    def update():
        jax.block_until_ready(agent.train_step(columns, 0))

    def act():
        obs = batch["obs"][:ENVS]
        return np.asarray(agent.sample_actions(obs, deterministic=False)[0])

    return update, act


PROGRAMS = {"dpmd": dpmd, "gempo": gempo}


def serve(program, peers, obs_dim, act_dim):
    """Answers each line of stdin by the ms of an update and of an act, means of two."""
    answers = sys.stdout
    sys.stdout = sys.stderr
    batch = random_batch(int(obs_dim), int(act_dim))
    calls = PROGRAMS[program](Path(peers), batch)
    for call in calls * 2:  # compiles
        call()
    for _ in sys.stdin:
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            call()
            times.append(1000 * (time.perf_counter() - start) / 2)
        print(json.dumps(times), file=answers, flush=True)


# ---- in ours -------------------------------------------------------------------------
def compare(program, peers, env_id):
    """-> {quantity: [value of each turn]}."""
    import simpo_mujoco as simpo
    from benchmark.speed.parts import prepare

    args = simpo.Args(
        env_id=env_id,
        num_samples=SAMPLES,
        diffusion_steps=STEPS,
        sampling_steps=STEPS,
        sampler="ddpm",
        target_samples=4,  # as in authors.csv
        policy_delay=2 if program == "dpmd" else 1,
    )
    env = os.environ | {"PYTHONPATH": str(peers / "flow-rl")}  # not installed
    env.pop("JAX_NUM_CPU_DEVICES", None)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = prepare(args, folder)
        dims = [str(trainer.obs.shape[1]), str(trainer.a0.shape[1])]
        python = peers / program / "bin/python"
        theirs = subprocess.Popen(
            [python, Path(__file__).resolve(), "--serve", program, peers, *dims],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        for _ in range(TURNS):
            ours = trainer.measure()
            print(file=theirs.stdin, flush=True)
            update, act = json.loads(theirs.stdout.readline())
            rows.append([ours["update"], ours["act"], update, act])
        theirs.stdin.close()
        theirs.wait()
    our_update, our_act, their_update, their_act = np.transpose(rows)
    return {
        "our_update": our_update,
        "our_act": our_act,
        "their_update": their_update,
        "their_act": their_act,
        "ratio": (their_update + their_act) / (our_update + our_act),
    }


def main(peers):
    from benchmark.results import fail
    from benchmark.speed.parts import machine, summary

    for program in PROGRAMS:
        if not (peers / program / "bin/python").exists():
            fail(f"{peers} has no {program}; see benchmark/speed/setup_authors.sh")
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["program", "env_id", "quantity", "median", "min", "max"])
    for program in PROGRAMS:
        for env_id in ENV_IDS:
            for name, values in compare(program, peers.absolute(), env_id).items():
                table.writerow([program, env_id, name, *summary(values)])
            sys.stdout.flush()
    for name, value in machine().items():
        table.writerow(["", "", name, value, "", ""])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    elif len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        sys.exit(__doc__)
