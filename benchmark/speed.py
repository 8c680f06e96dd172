"""Speed of simpo_mujoco.py on this machine, at the shapes of Hopper and Humanoid.

    python benchmark/speed.py
    python benchmark/speed.py --peer "env JAX_PLATFORMS=cpu peer/bin/python serve.py {shape}"

Three minutes, or five with a peer, on two idle cores. Prints and writes to a CSV (shape, quantity,
value, unit); whatever is timed has a median, a min and a max over the repeats. Sizes, devices and
sharding are the trainer's defaults, the transitions random; the physics is never run or counted.
    update     `update` on a batch that is on the device, mean over policy_delay updates (one of
               them also trains the policy)
    act        `act`, 5 observations from and actions to the host
    iteration  act, `step_envs` with stored answers for the physics, replay, transfer, update, in
               the order of `train` and as little waited for as there, mean over policy_delay
    host_*     the same with networks that leave the device next to nothing to do, `tiny`
    sampler    `sample_actions` for a batch; its matrix products alone are `products`
    peer_*     another program, and ours_* beside it; ratio is peer over ours, update + act

A peer is a program that prints "ready" once it has compiled, and answers each line "run K" on its
stdin by K updates and K acts and a line "<ms per update> <ms per act>"; it leaves at end of file.
{shape} becomes hopper or humanoid. It runs in turns with ours, each idle while the other works;
both updates start at a replay in host memory and both acts end there. The one we compare with is
the authors' DPMD: clone github.com/mahaitongdae/diffusion_policy_online_rl, build the agent as its
scripts/train_mujoco.py does for --alg dpmd, and wrap the loop above around DPMD.update and
get_action. None of its code is part of this repository.
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

ENVIRON = dict(os.environ)  # for the peer: the import below sets XLA_FLAGS
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
    """XLA devices that share a batch, as the trainer's flag"""
    # --- peer ---
    peer: str | None = None
    """command of another implementation, see above"""
    rounds: int = 10
    """turns of each of the two"""
    calls: int = 10
    """K, updates and acts a turn; a multiple of the trainer's policy_delay"""

    def __post_init__(self):
        for name in ("repeats", "rounds", "calls"):
            if getattr(self, name) < 1:
                raise simpo.UsageError(f"--{name} must be at least 1")
        if self.rows < simpo.Args.batch_size:
            raise simpo.UsageError(f"--rows must be at least {simpo.Args.batch_size}")
        if self.calls % simpo.Args.policy_delay:
            raise simpo.UsageError(f"--calls must be a multiple of {simpo.Args.policy_delay}")


# ---- pieces of an iteration -------------------------------------------------------------------


class Pieces:
    """The pieces of one iteration of `train` on a full replay of random transitions."""

    def __init__(self, args, shape, folder, rows):
        """Sets up as `run` does and compiles; args are the trainer's, shape a key of SHAPES."""
        (o, d), self.args, e = SHAPES[shape], args, args.num_envs
        whole, self.split = simpo.shardings(args)
        keys = jax.device_put(jax.random.split(jax.random.key(args.seed), 4), whole)
        _, self.k_act, self.k_update, _ = keys
        self.state = jax.device_put(simpo.init_state(args, o, d, keys[0]), whole)
        self.rng = rng = np.random.default_rng(args.seed)
        self.replay = simpo.Replay(Path(folder) / "replay.dat", (rows, 2 * o + d + 2), rows)
        for i in range(0, rows, 10_000):
            block = self.replay.rows[i : i + 10_000]
            block[:] = rng.standard_normal(block.shape, np.float32).clip(-1, 1)
            block[:, -1] = 0  # terminated
        self.replay.written = rows
        self.obs, no = rng.standard_normal((e, o)), np.zeros(e, bool)
        answer = rng.standard_normal((e, o)), rng.standard_normal(e), no, no, {}
        box = SimpleNamespace(low=-np.ones(d, np.float32), high=np.ones(d, np.float32))
        self.envs = SimpleNamespace(step=lambda action: answer, single_action_space=box)
        for _ in range(args.policy_delay):
            self.iteration()
        self.wait()

    def act(self):
        """`act` from host to host; it waits for the update before it, as in `train`."""
        obs, step = self.obs.astype(np.float32), np.int32(self.replay.written)
        a0 = simpo.act(self.args, True, self.state, obs, self.k_act, step)
        self.a0 = np.asarray(a0)

    def add(self):
        """`step_envs`: action range, checks, `Replay.add`; the physics answers at once."""
        self.obs, _ = simpo.step_envs(self.args, self.envs, self.replay, self.obs, self.a0)

    def sample(self):
        """`Replay.sample` and the transfer of the batch."""
        rows = self.replay.sample(self.rng, self.args.batch_size)
        self.batch = jax.device_put(rows, self.split)

    def update(self):
        self.state, _ = simpo.update(self.args, self.state, self.batch, self.k_update)

    def wait(self):
        jax.block_until_ready((self.state, self.batch))

    def iteration(self):
        """All of them, not waiting for the update."""
        self.act()
        self.add()
        self.sample()
        self.update()


def clock(*functions, calls=1):
    """Wall time of calling the functions in turn, mean of `calls` rounds, in ms."""
    start = time.perf_counter()
    for _ in range(calls):
        for function in functions:
            function()
    return (time.perf_counter() - start) / calls * 1e3


def tiny(args):
    """The trainer's args with networks that cost next to nothing, the batch as it is."""
    sizes = {"hidden_dim": 8, "num_samples": 2, "sampling_steps": 1, "eps_kl": 0.3}
    return dataclasses.replace(args, **sizes)


# ---- quantities: each returns {name: ms of each repeat} ---------------------------------------


def time_iteration(pieces, repeats):
    """Ms of an iteration in a free-running loop: `act` waits for the update before it, nothing
    else waits, so the clock is read after every policy_delay-th act."""
    delay, stamps = pieces.args.policy_delay, []
    for i in range(repeats * delay + 1):
        pieces.act()
        if i % delay == 0:
            stamps.append(time.perf_counter())
        pieces.add()
        pieces.sample()
        pieces.update()
    pieces.wait()
    return np.diff(stamps) / delay * 1e3


def time_calls(pieces, repeats):
    """`update` and `act` alone, then whole iterations."""
    delay = pieces.args.policy_delay
    return {
        "update": [clock(pieces.update, pieces.wait, calls=delay) for _ in range(repeats)],
        "act": [clock(pieces.act) for _ in range(repeats)],
        "iteration": time_iteration(pieces, repeats),
    }


def time_host(pieces, repeats):
    """An iteration with `tiny` networks: everything but physics, progress bar and log.

    Counted: the calls of `act` and `update` (dispatch, argument handling, the wait and what the
    tiny device programs take, thus an upper bound), `step_envs` and `Replay.add`, `Replay.sample`
    and the transfer. The pieces are waited for one by one, the iteration runs as in `train`.
    """
    names, delay = ("act", "add", "sample", "update"), pieces.args.policy_delay
    times = {name: [] for name in names}
    for _ in range(repeats):
        turns = [
            [clock(getattr(pieces, name), pieces.wait) for name in names] for _ in range(delay)
        ]
        for name, ms in zip(names, np.mean(turns, axis=0), strict=True):
            times[name].append(ms)
    times["iteration"] = time_iteration(pieces, repeats)
    return {f"host_{name}": ms for name, ms in times.items()}


def products(layers, x, num_steps):
    """The matrix products of `sample_actions` and nothing else: x [B, N, d] through num_steps
    chains d -> H -> H -> H -> d (the parts of state and time are made once there, not counted)."""

    def chain(x, _):
        for layer in layers:
            x = x @ layer["w"]
        return x, None

    return jax.lax.scan(chain, x, length=num_steps)[0]


def time_sampler(pieces, shape, repeats):
    """The sampler and its bare products, in turns on the same devices, and their ratio."""
    args, (o, d) = pieces.args, SHAPES[shape]
    whole, split = simpo.shardings(args)
    obs = jax.device_put(pieces.rng.standard_normal((args.batch_size, o), np.float32), split)
    x = pieces.rng.standard_normal((args.batch_size, args.num_samples, d), np.float32)
    sizes = [d, *[args.hidden_dim] * 3, d]
    layers = jax.device_put(simpo.init_mlp(jax.random.key(0), sizes), whole)
    sampler = jax.jit(functools.partial(simpo.sample_actions, args))
    bare = jax.jit(functools.partial(products, num_steps=args.sampling_steps))
    calls = (
        lambda: jax.block_until_ready(sampler(pieces.state.theta, obs, pieces.k_act)),
        lambda x=jax.device_put(x, split): jax.block_until_ready(bare(layers, x)),
    )
    clock(*calls)  # compiles
    full, bare_ms = np.array([[clock(call) for call in calls] for _ in range(repeats)]).T
    return {"sampler": full, "products": bare_ms, "sampler_over_products": full / bare_ms}


def time_peer(pieces, command, rounds, calls):
    """Ours and the peer in turns, `calls` updates and then acts each; ours starts a round."""
    turns, pipe = [], subprocess.PIPE
    command = shlex.split(command)

    def reply():
        line = peer.stdout.readline()
        if not line:
            raise simpo.UsageError(f"--peer ended early: {shlex.join(command)}")
        return line.split()

    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=ENVIRON) as peer:
        while reply() != ["ready"]:
            pass
        for _ in range(rounds):
            update = clock(pieces.sample, pieces.update, pieces.wait, calls=calls)
            ours = update, clock(pieces.act, calls=calls)
            peer.stdin.write(f"run {calls}\n")
            peer.stdin.flush()
            turns.append((*ours, *map(float, reply())))
    turns = np.array(turns).T
    names = ("ours_update", "ours_act", "peer_update", "peer_act")
    ratio = turns[2:].sum(axis=0) / turns[:2].sum(axis=0)
    return {**dict(zip(names, turns, strict=True)), "ratio": ratio}


# ---- main -------------------------------------------------------------------------------------


def machine(args):
    """Rows that say where the numbers come from."""
    info, devices = Path("/proc/cpuinfo"), jax.devices()
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    values = {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": simpo.CORES,
        "device": devices[0].device_kind,
        "devices": simpo.shardings(args)[1].num_devices,
        "jax": jax.__version__,
    }
    return [("machine", name, value, "") for name, value in values.items()]


def report(shape, times):
    """Prints {name: values of each repeat} -> rows of the CSV."""
    rows = []
    for name, values in times.items():
        unit = "1" if "over" in name or name == "ratio" else "ms"
        stats = {"median": np.median(values), "min": np.min(values), "max": np.max(values)}
        numbers = "  ".join(f"{stat} {value:9.3f}" for stat, value in stats.items())
        print(f"{shape:9} {name:22} {numbers}  {unit.replace('1', '')}", flush=True)
        rows += [(shape, f"{name}_{stat}", f"{x:.4f}", unit) for stat, x in stats.items()]
    return rows


def main():
    """Times every shape and rewrites the CSV after each; returns the exit code."""
    try:
        args = tyro.cli(Args, description=__doc__)
        trainer = simpo.Args(num_devices=args.num_devices)
        rows = machine(trainer)
        for _, name, value, _ in rows:
            print(f"{name:9} {value}")
        for shape in args.shapes:
            with tempfile.TemporaryDirectory() as folder:
                pieces = Pieces(tiny(trainer), shape, folder, args.rows)
                rows += report(shape, time_host(pieces, 10 * args.repeats))
            with tempfile.TemporaryDirectory() as folder:
                pieces = Pieces(trainer, shape, folder, args.rows)
                rows += report(shape, time_calls(pieces, args.repeats))
                rows += report(shape, time_sampler(pieces, shape, args.repeats))
                if args.peer:
                    command = args.peer.replace("{shape}", shape)
                    rows += report(shape, time_peer(pieces, command, args.rounds, args.calls))
            with open(args.out, "w", newline="") as file:
                csv.writer(file).writerows([("shape", "quantity", "value", "unit"), *rows])
    except (simpo.UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
