"""Speed of simpo_mujoco.py on this machine, at the shapes of Hopper and Humanoid.

    python benchmark/speed.py
    python benchmark/speed.py --peer "env JAX_PLATFORMS=cpu peer/bin/python serve.py {shape}"

Two minutes, five with a peer, on two idle cores. Prints and writes to a CSV (shape, quantity,
value, unit); what is timed has a median, a min and a max over the repeats. Sizes, devices and
sharding are the trainer's defaults and the transitions random; no physics is run or counted.
    update     `update` on a batch that is on the device, mean over policy_delay of them
    act        `act`, from 5 observations to actions, both on the host
    iteration  act, `step_envs` with stored answers for the physics, sample, transfer and update,
               waiting only where `train` does, mean over policy_delay
    host_*     the host's part of an iteration, see `time_host`; tiny_iteration is its upper bound
    sampler    `sample_actions` for a batch; `products` are its matrix products alone
    peer_*     another program, ours_* taken beside it; peer_over_ours is of update + act

A peer is a program that prints "ready" once it has compiled, then answers a line "run K" on its
stdin by K updates, K acts and a line "<ms per update> <ms per act>", and leaves at end of file;
{shape} becomes hopper or humanoid. It and ours take turns, each idle while the other works. Both
updates begin with a replay in host memory, both acts end there. We compare with the authors' DPMD:
clone github.com/mahaitongdae/diffusion_policy_online_rl, build the agent as its
scripts/train_mujoco.py does for --alg dpmd, and answer the lines by buffer.sample and DPMD.update,
and by DPMD.get_action for 5 observations. None of its code is part of this repository.
"""

import csv
import dataclasses
import functools
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

SHAPES = {"hopper": (11, 3), "humanoid": (376, 17)}  # o, d


# ---- Args -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args:
    shapes: tuple[Literal["hopper", "humanoid"], ...] = ("hopper", "humanoid")
    """sizes of observation and action to time"""
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
            (min(self.repeats, self.rounds) > 0, "--repeats and --rounds must be at least 1"),
            (self.rows >= size, f"--rows must be at least {size}"),
            (self.calls > 0 and self.calls % delay == 0, f"--calls must be a multiple of {delay}"),
        ):
            if not ok:
                raise simpo.UsageError(rule)


# ---- pieces of an iteration -------------------------------------------------------------------


class Pieces:
    """The pieces of one iteration of `train`, on a full replay of random transitions."""

    def __init__(self, args, shape, folder, rows):
        """Sets up as `run` does and compiles; args are the trainer's, the replay is in folder."""
        (o, d), e = SHAPES[shape], args.num_envs
        self.args, self.shape, (self.whole, self.split) = args, shape, simpo.shardings(args)
        keys = jax.device_put(jax.random.split(jax.random.key(args.seed), 4), self.whole)
        _, self.k_act, self.k_update, _ = keys
        self.state = jax.device_put(simpo.init_state(args, o, d, keys[0]), self.whole)
        self.rng = rng = np.random.default_rng(args.seed)
        self.replay = simpo.Replay(Path(folder) / "replay.dat", (rows, 2 * o + d + 2), rows)
        for block in np.array_split(self.replay.rows, rows // 256):  # views of the file
            block[:] = rng.standard_normal(block.shape, np.float32).clip(-1, 1)
            block[:, -1] = 0  # terminated
        self.replay.written = rows
        self.obs, no = rng.standard_normal((e, o)), np.zeros(e, bool)
        answer = rng.standard_normal((e, o)), rng.standard_normal(e), no, no, {}
        box = SimpleNamespace(low=-np.ones(d, np.float32), high=np.ones(d, np.float32))
        self.envs = SimpleNamespace(step=lambda action: answer, single_action_space=box)
        time_iteration(self, 1)

    def act(self):
        """`act` from host to host; waits for the update before it, as in `train`."""
        obs, step = self.obs.astype(np.float32), np.int32(self.replay.written)
        self.a0 = np.asarray(simpo.act(self.args, True, self.state, obs, self.k_act, step))

    def add(self):
        """`step_envs`: action range, checks and `Replay.add`; the physics answers at once."""
        self.obs, _ = simpo.step_envs(self.envs, self.replay, self.obs, self.a0)

    def sample(self):
        """`Replay.sample` and the transfer of the batch."""
        rows = self.replay.sample(self.rng, self.args.batch_size)
        self.batch = jax.device_put(rows, self.split)

    def update(self):
        """Returns once the device has the work, not the result."""
        self.state, _ = simpo.update(self.args, self.state, self.batch, self.k_update)

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

    The loop runs freely: `act` waits for the update before it and nothing else waits, so the clock
    is read after every policy_delay-th act.
    """
    stamps, delay = [], pieces.args.policy_delay
    for i in range(repeats * delay + 1):
        pieces.act()
        if i % delay == 0:
            stamps.append(time.perf_counter())
        if i < repeats * delay:
            pieces.add()
            pieces.sample()
            pieces.update()
    return np.diff(stamps) / delay * 1e3


def time_device(pieces, repeats):
    """`update` and `act` alone, then whole iterations. -> {name: ms of each repeat}"""
    update = functools.partial(clock, pieces.update, pieces.wait, calls=pieces.args.policy_delay)
    return {
        "update": [update() for _ in range(repeats)],
        "act": [clock(pieces.act) for _ in range(repeats)],
        "iteration": time_iteration(pieces, repeats),
    }


def time_host(pieces, repeats):
    """The host's part of an iteration: wall time of what is not physics and not device work.

    pieces have tiny networks (H = 8, N = 2, T = 1; the batch as it is). Counted: host_act, the
    whole call with its tiny device work and the fetch; host_add, `step_envs` with `Replay.add`;
    host_sample, `Replay.sample` and transfer, waited for; host_update, the call until it returns,
    while its device work is waited for off the clock. host is their sum. tiny_iteration is the
    free-running loop, so it also holds the device's tiny update. Progress bar and log are left out.
    """
    names, times = ("act", "add", "sample", "update"), []
    for _ in range(repeats):
        act, add = clock(pieces.act), clock(pieces.add)
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
    """The sampler and its bare products in turns, same devices and sharding, and their ratio."""
    args, rng, (o, d) = pieces.args, pieces.rng, SHAPES[pieces.shape]
    x = rng.standard_normal((args.batch_size, args.num_samples, d), np.float32)
    obs = rng.standard_normal((args.batch_size, o), np.float32)
    x, obs = jax.device_put((x, obs), pieces.split)
    layers = simpo.init_mlp(pieces.k_act, [d, *[args.hidden_dim] * 3, d])
    layers = jax.device_put(layers, pieces.whole)
    sampler = jax.jit(functools.partial(simpo.sample_actions, args))
    bare = jax.jit(functools.partial(products, num_steps=args.sampling_steps))
    calls = (
        lambda: jax.block_until_ready(sampler(pieces.state.theta, obs, pieces.k_act)),
        lambda: jax.block_until_ready(bare(layers, x)),
    )
    clock(*calls)  # compiles
    ours, floor = np.array([[clock(call) for call in calls] for _ in range(repeats)]).T
    return {"sampler": ours, "products": floor, "sampler_over_products": ours / floor}


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
            act = clock(pieces.act, calls=calls)
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
    return [("machine", name, value, "") for name, value in values.items()]


def report(shape, times):
    """Prints {name: values of each repeat} -> rows of the CSV."""
    rows = []
    for name, values in times.items():
        unit = "1" if "over" in name else "ms"
        stats = {"median": np.median(values), "min": np.min(values), "max": np.max(values)}
        numbers = "  ".join(f"{stat} {x:9.3f}" for stat, x in stats.items())
        print(f"{shape:9} {name:22} {numbers}  {unit.replace('1', '')}".rstrip(), flush=True)
        rows += [(shape, f"{name}_{stat}", f"{x:.4f}", unit) for stat, x in stats.items()]
    return rows


def measure(args):
    """Every quantity of every shape; yields rows of the CSV as they come."""
    trainer = simpo.Args(num_devices=args.num_devices)
    sizes = {"hidden_dim": 8, "num_samples": 2, "sampling_steps": 1, "eps_kl": 0.3}
    yield machine(trainer)
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            pieces = Pieces(dataclasses.replace(trainer, **sizes), shape, folder, args.rows)
            yield report(shape, time_host(pieces, 10 * args.repeats))
            pieces = Pieces(trainer, shape, folder, args.rows)
            yield report(shape, time_device(pieces, args.repeats))
            yield report(shape, time_sampler(pieces, args.repeats))
            if args.peer:
                command = args.peer.replace("{shape}", shape)
                yield report(shape, time_peer(pieces, command, args.rounds, args.calls))


def main():
    """Writes the CSV; returns the exit code."""
    try:
        args = tyro.cli(Args, description=__doc__)
        with open(args.out, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("shape", "quantity", "value", "unit"))
            for rows in measure(args):
                writer.writerows(rows)
                file.flush()
    except (simpo.UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
