"""Times an iteration of simpo_mujoco.py on this machine, and its parts.

    python benchmark/speed/speed.py --out benchmark/speed/speed.csv
    python benchmark/speed/speed.py --vs ../other-checkout --shapes Hopper-v4 --settings fast

Prints and writes the median, minimum and maximum of --repeats measurements, in ms:
    update     on a batch on the device, mean over policy_delay of them, of which one refits policy
    act        from the observations of num_envs environments to actions on the host
    host       step of the environments, replay's add and sample, transfer of the batch
    iteration  all of it as `train` does it, where the device updates while the environments step
Networks, batch and devices are the trainer's defaults; the replay has random transitions, the
actions are the policy's at its first weights. With --vs a second process does the same with the
simpo_mujoco.py of another checkout, and the two take turns, so that a slow minute slows both;
`ratio` is its iteration over ours. Hold ratios of one run against each other, never times of two.
"""

import argparse
import csv
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "default": {},
    "fast": {"sampler": "dpm2", "sampling_steps": 6, "num_samples": 8},
    "tiny": {"hidden_dim": 8, "num_samples": 2, "sampling_steps": 2, "batch_size": 16},
}
PARTS, ROWS = ("update", "act", "host", "iteration"), 25_000  # rows of the replay


# ---- the process that is timed -----------------------------------------------------------------


class Pieces:
    """The pieces of an iteration of `train`, set up and compiled."""

    def __init__(self, simpo, shape, setting, folder):
        import jax
        import numpy as np

        rows = {"buffer_size": ROWS, "total_timesteps": ROWS}
        args = simpo.Args(env_id=shape, **rows, **SETTINGS[setting])
        self.jax, self.np, self.simpo, self.args = jax, np, simpo, args
        self.envs = simpo.make_envs(args)
        (o,), (d,) = self.envs.single_observation_space.shape, self.envs.single_action_space.shape
        devices = jax.devices()  # as in `train`
        count = np.gcd(len(devices), args.batch_size) if devices[0].platform == "cpu" else 1
        mesh = jax.sharding.Mesh(np.array(devices[:count]), ("batch",))
        named, spec = jax.sharding.NamedSharding, jax.sharding.PartitionSpec
        self.split = named(mesh, spec("batch"))
        k_init, *self.keys = jax.random.split(jax.random.key(args.seed), 3)
        state = simpo.init_state(args, o, d, k_init)
        self.state = jax.device_put(state, named(mesh, spec()))
        self.rng = rng = np.random.default_rng(args.seed)
        self.replay = simpo.Replay(args, Path(folder) / "replay.dat", 2 * o + d + 2, 0)
        rows = rng.standard_normal((ROWS, 2 * o + d + 2), np.float32).clip(-1, 1)
        rows[:, -1] = 0  # terminated
        self.replay.add(rows)
        self.obs, _ = self.envs.reset(seed=0)
        self.updates = 0
        for _ in range(2 * args.policy_delay):
            self.iteration()
        jax.block_until_ready(self.state)

    def act(self):
        """Returns once the device has the work, not the result."""
        n, key = self.args.act_samples, self.keys[0]
        step = self.updates
        self.a0 = self.simpo.best_action(self.args, self.state, self.obs, n, key, step, noisy=True)

    def sample(self):
        rows = self.replay.sample(self.rng, self.args.batch_size)
        self.batch = self.jax.device_put(rows, self.split)

    def update(self):
        """Returns once the device has the work, not the result."""
        with_policy = self.updates % self.args.policy_delay == 0
        self.state, _ = self.simpo.update(
            self.args, with_policy, self.state, self.batch, self.keys[1]
        )
        self.updates += 1

    def fetch(self):
        self.a0 = self.np.asarray(self.a0)

    def step(self):
        next_obs, reward, terminated, _, _ = self.envs.step(self.a0)
        self.replay.add(self.obs, next_obs, self.a0, reward, terminated)
        self.obs = next_obs

    def iteration(self):
        for piece in (self.act, self.sample, self.update, self.fetch, self.step):
            piece()

    def wait(self):
        self.jax.block_until_ready((self.state, self.batch))

    def measure(self):
        """Ms of each of PARTS, means over policy_delay calls."""
        delay, values = self.args.policy_delay, {}
        for name, pieces in (
            ("update", (self.update, self.wait)),
            ("act", (self.act, self.fetch)),
            ("host", (self.step, self.sample, self.wait)),
            ("iteration", (self.iteration,)),
        ):
            start = time.perf_counter()
            for _ in range(delay):
                for piece in pieces:
                    piece()
            self.wait()
            values[name] = (time.perf_counter() - start) / delay * 1e3
        return values


def serve(repository):
    """Answers lines "SHAPE SETTING" of stdin by what it runs on, then "go" by a measurement."""
    answers, sys.stdout = sys.stdout, sys.stderr
    sys.path.insert(0, repository)
    import jax

    import simpo_mujoco as simpo

    jax.config.update("jax_default_matmul_precision", "float32")  # as its main does
    pieces = None
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            if line.strip() == "go":
                answer = pieces.measure()
            else:
                pieces = Pieces(simpo, *line.split(), folder)
                device = f"{pieces.split.num_devices} x {jax.devices()[0].device_kind}"
                answer = {"device": device, "jax": jax.__version__}
            print(json.dumps(answer), file=answers, flush=True)


# ---- the process that asks ---------------------------------------------------------------------


class Server:
    def __init__(self, repository):
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        flags = f"--xla_force_host_platform_device_count={cores}"  # as an older trainer sets them
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(Path(repository).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(cores), "XLA_FLAGS": flags},
            text=True,
        )

    def ask(self, line):
        print(line, file=self.process.stdin, flush=True)
        if not (answer := self.process.stdout.readline()):
            sys.exit("error: a timed process ended early, see above")
        return json.loads(answer)


def machine(answer):
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    cpu = model[1] if model else platform.processor() or platform.machine()
    git = f"git -C '{ROOT}' rev-parse --short HEAD"
    return {"cpu": cpu, **answer, "commit": subprocess.getoutput(git)}


def compare(servers, shape, setting, repeats):
    """Rows of the CSV of one shape and setting."""
    rows = []
    for name, server in servers.items():
        where = machine(server.ask(f"{shape} {setting}"))
        if name == "ours":
            rows += [(shape, setting, quantity, value, "", "") for quantity, value in where.items()]
    times = {name: [] for name in servers}
    for _ in range(repeats):
        for name, server in servers.items():
            times[name].append(server.ask("go"))
    columns = {}
    for name, answers in times.items():
        for part in PARTS:
            columns[f"{name}_{part}"] = [answer[part] for answer in answers]
    if "other" in times:
        pairs = zip(columns["other_iteration"], columns["ours_iteration"], strict=True)
        columns["ratio"] = [other / ours for other, ours in pairs]
    for name, x in columns.items():
        numbers = statistics.median(x), min(x), max(x)
        rows.append((shape, setting, name, *(f"{value:.3f}" for value in numbers)))
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["Hopper-v4", "Humanoid-v4"], help="tasks")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["default", "fast"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--vs", help="another checkout of this repository")
    parser.add_argument("--out", default="speed.csv", help="the CSV to write")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if args.vs and not (Path(args.vs) / "simpo_mujoco.py").exists():
        parser.error(f"--vs {args.vs} has no simpo_mujoco.py")
    servers = {"ours": Server(ROOT)} | ({"other": Server(args.vs)} if args.vs else {})
    rows = [("shape", "setting", "quantity", "median", "min", "max")]
    for shape in args.shapes:
        for setting in args.settings:
            new = compare(servers, shape, setting, args.repeats)
            rows += new
            for row in new:
                print("{:12} {:8} {:16} {:>10} {:>10} {:>10}".format(*row).rstrip(), flush=True)
    for server in servers.values():
        server.process.stdin.close()
        server.process.wait()
    with open(args.out, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
