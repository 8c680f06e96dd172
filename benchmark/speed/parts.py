"""Times the parts of an iteration of simpo_mujoco.py and prints a CSV.

    python -m benchmark.speed.parts --env-id Humanoid-v4 --num-samples 32 > humanoid.csv

All flags of the trainer are taken. Columns are the median, the minimum and the maximum
over --repeats measurements, in ms, each the mean of policy_delay calls:
    update     of the networks, from a batch on the device; one of policy_delay refits
               the policy
    act        from the observations of num_envs environments to actions on the host
    host       a step of the environments, the replay, the transfer of a batch
    iteration  all of it as main() does it, where the device updates while the
               environments step
The replay holds random transitions, the actions are the policy's at its first weights.
"""

import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tyro

import simpo_mujoco as simpo

ROWS = 25_000  # of the replay


class Trainer:
    """The state of a run between two iterations, and the parts of an iteration."""

    def __init__(self, args, folder):
        self.args = args
        self.whole, self.split = simpo.shardings(args)
        self.envs, obs_dim, act_dim = simpo.make_envs(args, args.num_envs)
        self.obs, _ = self.envs.reset(seed=0)
        k_init, self.k_act, self.k_update = jax.random.split(jax.random.key(0), 3)
        state = simpo.init_state(args, obs_dim, act_dim, k_init)
        self.state = jax.device_put(state, self.whole)
        self.updates = 0

        self.rng = np.random.default_rng(0)
        sizes = (obs_dim, obs_dim, act_dim, (), ())
        fields = [(name, "f4", x) for name, x in zip(simpo.Batch._fields, sizes)]
        path = Path(folder) / "replay.dat"
        self.replay = np.memmap(path, fields, "w+", shape=args.buffer_size)
        for name in ("obs", "next_obs", "act", "reward"):
            shape = self.replay[name][:ROWS].shape
            self.replay[name][:ROWS] = self.rng.uniform(-1, 1, shape)

    def act(self):
        """Returns once the device has the work, not the result."""
        args = self.args
        step = self.updates * args.num_envs
        self.a0 = simpo.best_action(
            args, self.state, self.obs, args.act_samples, self.k_act, step, True
        )

    def sample(self):
        batch = simpo.sample_batch(self.replay, ROWS, self.rng, self.args.batch_size)
        self.batch = jax.device_put(batch, self.split)

    def update(self):
        """Returns once the device has the work, not the result."""
        with_policy = self.updates % self.args.policy_delay == 0
        self.state, _ = simpo.update(
            self.args, with_policy, self.state, self.batch, self.k_update
        )
        self.updates += 1

    def fetch(self):
        self.a0 = np.asarray(self.a0)

    def step(self):
        last_obs = self.obs
        next_obs, reward, terminated, _, self.obs = simpo.step_envs(self.envs, self.a0)
        rows = list(zip(last_obs, next_obs, self.a0, reward, terminated))
        self.replay[ROWS : ROWS + len(rows)] = rows

    def wait(self):
        jax.block_until_ready((self.state, self.batch))

    def iteration(self):
        self.act()
        self.sample()
        self.update()
        self.fetch()
        self.step()

    def measure(self):
        """-> {part: ms}, means over policy_delay calls."""
        parts = {
            "update": (self.update, self.wait),
            "act": (self.act, self.fetch),
            "host": (self.step, self.sample, self.wait),
            "iteration": (self.iteration,),
        }
        times = {}
        for name, calls in parts.items():
            start = time.perf_counter()
            for _ in range(self.args.policy_delay):
                for call in calls:
                    call()
            self.wait()
            times[name] = 1000 * (time.perf_counter() - start) / self.args.policy_delay
        return times


def prepare(args, folder):
    """-> a Trainer of which all is compiled."""
    jax.config.update("jax_default_matmul_precision", "float32")  # as main() does
    trainer = Trainer(args, folder)
    for _ in range(2 * args.policy_delay):
        trainer.iteration()
    trainer.measure()
    return trainer


def machine():
    """-> {"cpu", "device", "jax", "commit"}."""
    cpu = ""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            cpu = line.partition(": ")[2]
    git = ["git", "-C", Path(__file__).parent, "rev-parse", "--short", "HEAD"]
    return {
        "cpu": cpu,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def summary(values):
    """Median, minimum and maximum as text."""
    return [f"{f(values):.3f}" for f in (np.median, np.min, np.max)]


def main(args: tyro.conf.OmitArgPrefixes[simpo.Args], repeats: int = 20):
    with tempfile.TemporaryDirectory() as folder:
        trainer = prepare(args, folder)
        times = [trainer.measure() for _ in range(repeats)]
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["env_id", "num_samples", "quantity", "median", "min", "max"])
    for name, value in machine().items():
        table.writerow([args.env_id, args.num_samples, name, value, "", ""])
    for name in times[0]:
        values = summary([row[name] for row in times])
        table.writerow([args.env_id, args.num_samples, name, *values])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
