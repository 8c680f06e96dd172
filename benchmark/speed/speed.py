"""Where the time of simpo_mujoco.py goes on this machine, by task shape and setting.

    python benchmark/speed.py
    python benchmark/speed.py --shapes Hopper-v4 Humanoid-v4 --settings fast --num-seeds 4
    python benchmark/speed.py --peer "env JAX_PLATFORMS=cpu peer/bin/python serve.py {shape}"

A minute a shape on two idle cores, more with a peer. Prints and writes to a CSV (shape, setting,
num_seeds, quantity, value, unit); what is timed has a median, a min and a max over the repeats.
Batch, networks, devices and sharding are the trainer's defaults, N, T and sampler those of the
setting, the transitions random; `machine` rows say which device it was.
    update     `update_seeds` on a batch that is on the device, mean over policy_delay of them;
               update_policy one that refits the policy, update_critics one that does not
    act        `act_seeds`, from num_envs observations a seed to actions, both on the host
    iteration  the loop of `train` with stored answers for the physics: act, sample, transfer and
               update, waiting only where `train` does, mean over policy_delay
    physics    one step of num_envs real environments a seed, random actions
    host_*     the host's part of an iteration, see `time_host`; tiny_iteration is its upper bound
    sampler    `sample_actions` for one seed's batch; `products` are its matrix products alone,
               products_rate what they reach on this device
    peer_*     another program, ours_* taken beside it; peer_over_ours is of update + act

A peer is a program that prints "ready" once it has compiled, then answers a line "run K" on its
stdin by K updates, K acts and a line "<ms per update> <ms per act>", and leaves at end of file;
{shape} becomes the task's name. It and ours take turns, each idle while the other works. Both
updates begin with a replay in host memory, both acts end there. We compare with the authors' DPMD:
clone github.com/mahaitongdae/diffusion_policy_online_rl, build the agent as its
scripts/train_mujoco.py does for --alg dpmd, and answer the lines by buffer.sample and DPMD.update,
and by DPMD.get_action for 5 observations. None of its code is part of this repository.
"""

import csv
import dataclasses
import functools
import itertools
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

ENVIRON = dict(os.environ)  # for the peer: the trainer sets XLA_FLAGS on import
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402

import simpo_mujoco as simpo  # noqa: E402

SHAPES = {  # o, d
    "HalfCheetah-v4": (17, 6),
    "Humanoid-v4": (376, 17),
    "Ant-v4": (27, 8),
    "Walker2d-v4": (17, 6),
    "Hopper-v4": (11, 3),
    "Swimmer-v4": (8, 2),
}
SETTINGS = {
    "default": {},
    "fast": {"sampler": "dpm2", "sampling_steps": 6, "num_samples": 6, "eps_kl": 0.8},
    "tiny": {"hidden_dim": 8, "num_samples": 2, "sampling_steps": 1, "eps_kl": 0.3},
}


# ---- Args -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args:
    shapes: tuple[str, ...] = ("Hopper-v4", "Humanoid-v4")
    """tasks whose sizes of observation and action are timed, of the six in SHAPES"""
    settings: tuple[Literal["default", "fast"], ...] = ("default", "fast")
    """default is Table 4, fast the README's fast setting"""
    num_seeds: tuple[int, ...] = (1,)
    """seeds side by side, as --num-seeds of the trainer"""
    out: str = "benchmark/speed.csv"
    """CSV to write"""
    repeats: int = 20
    """measurements of each quantity"""
    rows: int = 100_000
    """transitions in the replay; 300 MB of temporary disk at Humanoid's shape"""
    num_devices: int | None = None
    """XLA devices that share a batch, as in the trainer"""
    peer: str | None = None
    """command of another implementation, see above"""
    rounds: int = 10
    """turns of each of the two"""
    calls: int = 10
    """K, updates and acts a turn; a multiple of policy_delay"""

    def __post_init__(self):
        size, delay = simpo.Args.batch_size, simpo.Args.policy_delay
        for ok, rule in (
            (set(self.shapes) <= set(SHAPES), f"--shapes must be among {', '.join(SHAPES)}"),
            (min(self.num_seeds, default=0) > 0, "--num-seeds must be at least 1"),
            (min(self.repeats, self.rounds) > 0, "--repeats and --rounds must be at least 1"),
            (self.rows >= size, f"--rows must be at least {size}"),
            (self.calls > 0 and self.calls % delay == 0, f"--calls must be a multiple of {delay}"),
        ):
            if not ok:
                raise simpo.UsageError(rule)


# ---- pieces of an iteration -------------------------------------------------------------------


class Pieces:
    """The pieces of one iteration of `train`, on full replays of random transitions."""

    def __init__(self, args, shape, folder, rows):
        """Sets up as `run` does and compiles; args are the trainer's, the replays are in folder."""
        (o, d), e, k = SHAPES[shape], args.num_envs, args.num_seeds
        self.args, self.shape, (place, self.batches) = args, shape, simpo.shardings(args)
        keys = jax.random.split(jax.random.key(args.seed), (3, k))
        k_init, self.k_act, self.k_update = jax.device_put(keys, place.step)
        states = [simpo.init_state(args, o, d, key) for key in k_init]
        self.state = jax.device_put(simpo.stack_seeds(states), place)
        self.rng = rng = np.random.default_rng(args.seed)
        self.replays = []
        for seed in range(k):
            path = Path(folder) / f"replay-{seed}.dat"
            replay = simpo.Replay(path, (rows, 2 * o + d + 2), rows)
            for block in np.array_split(replay.rows, rows // 256):  # views of the file
                block[:] = rng.standard_normal(block.shape, np.float32).clip(-1, 1)
                block[:, -1] = 0  # terminated
            replay.written = rows
            self.replays.append(replay)
        self.obs, no = rng.standard_normal((k, e, o)), np.zeros(e, bool)
        answer = rng.standard_normal((e, o)), rng.standard_normal(e), no, no, {}
        box = SimpleNamespace(low=-np.ones(d, np.float32), high=np.ones(d, np.float32))
        self.envs = SimpleNamespace(step=lambda action: answer, single_action_space=box)
        time_iteration(self, 1)

    def act(self):
        """Returns once the device has the work, not the result."""
        obs, step = self.obs.astype(np.float32), np.int32(self.replays[0].written)
        self.a0 = simpo.act_seeds(self.args, self.state, obs, self.k_act, step)

    def fetch(self):
        """Waits for the actions of `act`, and so for the update before it."""
        self.a0 = np.asarray(self.a0)

    def add(self):
        """`step_envs`: action range, checks and `Replay.add`; the physics answers at once."""
        for k, (replay, a0) in enumerate(zip(self.replays, self.a0, strict=True)):
            self.obs[k], _ = simpo.step_envs(self.envs, replay, self.obs[k], a0)

    def sample(self):
        """`Replay.sample` and the transfer of the batches."""
        rows = [replay.sample(self.rng, self.args.batch_size) for replay in self.replays]
        self.batch = jax.device_put(np.stack(rows), self.batches)

    def update(self):
        """Returns once the device has the work, not the result."""
        self.state, _ = simpo.update_seeds(self.args, self.state, self.batch, self.k_update)

    def wait(self):
        jax.block_until_ready((self.state, self.batch))


def clock(*functions, calls=1):
    """Wall time of calling the functions one after the other, mean over `calls` times, in ms."""
    start = time.perf_counter()
    for _ in range(calls):
        for function in functions:
            function()
    return (time.perf_counter() - start) / calls * 1e3


# ---- quantities -------------------------------------------------------------------------------


def time_iteration(pieces, repeats):
    """Ms of an iteration, `repeats` times the mean over policy_delay of them.

    The loop runs freely: nothing but `fetch` waits, so the clock is read after every
    policy_delay-th of them.
    """
    stamps, delay = [], pieces.args.policy_delay
    for i in range(repeats * delay + 1):
        pieces.act()
        pieces.sample()
        pieces.update()
        pieces.fetch()
        if i % delay == 0:
            stamps.append(time.perf_counter())
        pieces.add()
    pieces.wait()
    return np.diff(stamps) / delay * 1e3


def time_physics(pieces, repeats):
    """Ms of a step of all environments of all seeds with actions at random."""
    args = dataclasses.replace(pieces.args, env_id=pieces.shape)
    envs = [simpo.make_envs(args, args.num_envs, seed) for seed in range(args.num_seeds)]
    for env in envs:
        env.reset()
        env.action_space.seed(0)

    def step():
        for env in envs:
            env.step(env.action_space.sample())

    times = [clock(step, calls=50) for _ in range(repeats)]
    for env in envs:
        env.close()
    return times


def time_device(pieces, repeats):
    """`update` and `act` alone, then whole iterations. -> {name: ms of each repeat}"""
    delay, updates, act = pieces.args.policy_delay, [], (pieces.act, pieces.fetch)
    while int(pieces.state.step) % delay:
        pieces.update()
    for _ in range(repeats):
        updates.append([clock(pieces.update, pieces.wait) for _ in range(delay)])
    updates = np.array(updates)  # the first of each row refits the policy
    return {
        "update": updates.mean(axis=1),
        "update_policy": updates[:, 0],
        "update_critics": updates[:, 1:].mean(axis=1),
        "act": [clock(*act) for _ in range(repeats)],
        "iteration": time_iteration(pieces, repeats),
        "physics": time_physics(pieces, repeats),
    }


def time_host(pieces, repeats):
    """The host's part of an iteration: wall time of what is not physics and not device work.

    pieces have tiny networks (H = 8, N = 2, one level; the batch as it is). Counted: host_act, the
    whole call with its tiny device work and the fetch; host_add, `step_envs` with `Replay.add`;
    host_sample, `Replay.sample` and transfer, waited for; host_update, the call until it returns,
    while its device work is waited for off the clock. host is their sum. tiny_iteration is the
    free-running loop, so it also holds the device's tiny update. Progress bar and log are left out.
    """
    names, times = ("act", "add", "sample", "update"), []
    for _ in range(repeats):
        act, add = clock(pieces.act, pieces.fetch), clock(pieces.add)
        times.append((act, add, clock(pieces.sample, pieces.wait), clock(pieces.update)))
        pieces.wait()
    times = np.array(times).T
    parts = {f"host_{name}": ms for name, ms in zip(names, times, strict=True)}
    tiny = time_iteration(pieces, repeats)
    return {**parts, "host": times.sum(axis=0), "tiny_iteration": tiny}


def products(layers, x, num_steps):
    """The matrix products of `sample_actions`: x [B, N, d] through num_steps chains d-H-H-H-d.

    The products of state and time, made once for all samples and steps, are not among them.
    """

    def chain(x, _):
        for layer in layers:
            x = x @ layer["w"]
        return x, None

    return jax.lax.scan(chain, x, length=num_steps)[0]


def time_sampler(pieces, repeats):
    """The sampler and its bare products in turns, same devices and sharding, their ratio, and the
    rate of the products."""
    args, rng, (o, d) = pieces.args, pieces.rng, SHAPES[pieces.shape]
    mesh = pieces.batches.mesh
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    x = rng.standard_normal((args.batch_size, args.num_samples, d), np.float32)
    obs = rng.standard_normal((args.batch_size, o), np.float32)
    x, obs = jax.device_put((x, obs), split)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    theta = jax.device_put(simpo.take_seed(pieces.state, 0).theta, whole)
    key = jax.device_put(jax.random.key(0), whole)
    layers = simpo.init_mlp(key, sizes := [d, *[args.hidden_dim] * 3, d])
    layers = jax.device_put(layers, whole)
    sampler = jax.jit(functools.partial(simpo.sample_actions, args))
    bare = jax.jit(functools.partial(products, num_steps=args.sampling_steps))
    calls = (
        lambda: jax.block_until_ready(sampler(theta, obs, key)),
        lambda: jax.block_until_ready(bare(layers, x)),
    )
    clock(*calls)  # compiles
    ours, floor = np.array([[clock(call) for call in calls] for _ in range(repeats)]).T
    work = 2 * sum(a * b for a, b in zip(sizes[:-1], sizes[1:], strict=True))
    work *= args.batch_size * args.num_samples * args.sampling_steps
    return {
        "sampler": ours,
        "products": floor,
        "sampler_over_products": ours / floor,
        "products_rate": work / floor / 1e6,
    }


def time_peer(pieces, command, rounds, calls):
    """Ours and the peer in turns, `calls` updates and then acts each. -> {name: ms per round}"""
    turns, pipe = [], subprocess.PIPE

    def reply():
        if not (line := peer.stdout.readline()):
            raise simpo.UsageError(f"--peer ended early: {command}")
        return line.split()

    with subprocess.Popen(
        shlex.split(command), stdin=pipe, stdout=pipe, text=True, env=ENVIRON
    ) as peer:
        while reply() != ["ready"]:
            pass
        for _ in range(rounds):
            update = clock(pieces.sample, pieces.update, pieces.wait, calls=calls)
            act = clock(pieces.act, pieces.fetch, calls=calls)
            print(f"run {calls}", file=peer.stdin, flush=True)
            turns.append((update, act, *map(float, reply())))
    turns = np.array(turns).T
    names = ("ours_update", "ours_act", "peer_update", "peer_act")
    ratio = turns[2:].sum(axis=0) / turns[:2].sum(axis=0)
    return {**dict(zip(names, turns, strict=True)), "peer_over_ours": ratio}


# ---- main -------------------------------------------------------------------------------------


def machine(args):
    """Prints where the numbers come from -> rows of the CSV."""
    info, devices = Path("/proc/cpuinfo"), jax.devices()
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    values = {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "device": devices[0].device_kind,
        "devices": simpo.shardings(args)[1].num_devices,
        "jax": jax.__version__,
    }
    for name, value in values.items():
        print(f"{name:9} {value}", flush=True)
    return [("machine", "", "", name, value, "") for name, value in values.items()]


def report(case, times):
    """Prints {name: values of each repeat} of a (shape, setting, num_seeds) -> rows of the CSV."""
    rows = []
    for name, values in times.items():
        unit = "1" if "over" in name else "GFLOP/s" if "rate" in name else "ms"
        stats = {"median": np.median(values), "min": np.min(values), "max": np.max(values)}
        numbers = "  ".join(f"{stat} {x:9.3f}" for stat, x in stats.items())
        title = "{:15} {:8} {:2}".format(*case)
        print(f"{title} {name:22} {numbers}  {unit.replace('1', '')}".rstrip(), flush=True)
        rows += [(*case, f"{name}_{stat}", f"{x:.4f}", unit) for stat, x in stats.items()]
    return rows


def measure(args):
    """Every quantity of every case; yields rows of the CSV as they come."""
    yield machine(simpo.Args(num_devices=args.num_devices))
    for shape, k in itertools.product(args.shapes, args.num_seeds):
        for setting in ("tiny", *args.settings):
            flags = SETTINGS[setting] | {"num_devices": args.num_devices, "num_seeds": k}
            with tempfile.TemporaryDirectory() as folder:
                pieces = Pieces(simpo.Args(**flags), shape, folder, args.rows)
                case = shape, setting, k
                if setting == "tiny":
                    yield report(case, time_host(pieces, 10 * args.repeats))
                    continue
                yield report(case, time_device(pieces, args.repeats))
                yield report(case, time_sampler(pieces, args.repeats))
                if args.peer and k == 1:
                    command = args.peer.replace("{shape}", shape)
                    yield report(case, time_peer(pieces, command, args.rounds, args.calls))


def main():
    """Writes the CSV; returns the exit code."""
    try:
        args = tyro.cli(Args, description=__doc__)
        parts = measure(args)
        first = next(parts)  # what cannot run leaves the last table as it is
        with open(args.out, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("shape", "setting", "num_seeds", "quantity", "value", "unit"))
            for rows in itertools.chain([first], parts):
                writer.writerows(rows)
                file.flush()
    except (simpo.UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
