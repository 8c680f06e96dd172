"""Times an update and an action in turns with the authors' two programs, at equal N and T.

    bash benchmark/peers/setup.sh PEERS
    python benchmark/speed/authors.py --peers PEERS --out benchmark/speed/authors.csv

dpmd is their DPMD, which steps its policy every second time, as ours does; gempo is GeMPO of their
flow-rl, which does every time, and ours then too (--policy-delay 1). N = 32, T = 20, a batch of
256, five environments, float32, random data, all cores. Prints and writes the median, minimum and
maximum over --repeats turns in ms, and of `ratio`: their update and action over ours.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
B, N, T, E = 256, 32, 20, 5
PROGRAMS = ("dpmd", "gempo")


def dpmd(peers, o, d, batch, obs):
    """-> update and act, as scripts/train_mujoco.py has them; both wait for their result."""
    import jax
    from relax.algorithm.dpmd import DPMD
    from relax.network.diffv2 import create_diffv2_net
    from relax.utils.experience import Experience

    def mish(x):
        return x * jax.numpy.tanh(jax.nn.softplus(x))

    options = {"num_timesteps": T, "num_particles": N, "noise_scale": 0.1}
    options |= {"beta_schedule_scale": 0.8}
    key, hidden = jax.random.key(0), [256] * 3
    agent, params = create_diffv2_net(key, o, d, hidden, hidden, mish, **options)
    options = {"alpha_lr": 7e-3, "delay_alpha_update": 250, "lr_schedule_end": 3e-5}
    algorithm = DPMD(agent, params, lr=3e-4, **options)
    batch = Experience(**batch)
    return lambda: algorithm.update(key, batch), lambda: algorithm.get_action(key, obs)


def gempo(peers, o, d, batch, obs):
    """-> update and act, as examples/online/main_mujoco_offpolicy.py has them."""
    sys.path.insert(0, str(Path(peers, "flow-rl")))
    import jax
    from flowrl.agent.online.gempo import GeMPOAgent
    from flowrl.types import Batch
    from omegaconf import OmegaConf

    file = Path(peers, "flow-rl/examples/online/config/mujoco/algo/gempo_linear.yaml")
    config = OmegaConf.merge(OmegaConf.load(file), {"task": "Hopper-v5"})
    config.algo.num_particles, config.algo.diffusion.steps = N, T
    agent = GeMPOAgent(o, d, config.algo, seed=0)
    columns = {k: x[:, None] if x.ndim == 1 else x for k, x in batch.items()}
    columns["terminal"] = columns.pop("done").astype(np.float32)
    batch = Batch(**columns, next_action=None)

    def update():
        jax.block_until_ready(agent.train_step(batch, 0))

    return update, lambda: np.asarray(agent.sample_actions(obs, deterministic=False)[0])


def serve(program, peers):
    """In their Python: answers lines "o d" of stdin, then "go" by the ms of an update and an act,
    means over two, of which DPMD refits the policy in one."""
    answers, sys.stdout = sys.stdout, sys.stderr
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        if line.strip() != "go":
            o, d = map(int, line.split())
            obs, next_obs = (rng.standard_normal((B, o), np.float32) for _ in range(2))
            action = rng.uniform(-1, 1, (B, d)).astype(np.float32)
            reward, done = rng.standard_normal(B, np.float32), np.zeros(B, bool)
            batch = {"obs": obs, "action": action, "reward": reward, "done": done}
            pieces = globals()[program](peers, o, d, batch | {"next_obs": next_obs}, obs[:E])
            for piece in pieces * 2:  # compiles
                piece()
        times = []
        for piece in pieces:
            start = time.perf_counter()
            for _ in range(2):
                piece()
            times.append((time.perf_counter() - start) / 2 * 1e3)
        print(json.dumps(times), file=answers, flush=True)


# ---- the process that asks and times ours ------------------------------------------------------


def compare(program, peers, shape, repeats):
    """Rows of the CSV of one program and shape."""
    import speed

    import simpo_mujoco as simpo

    command = [peers / program / "bin/python", __file__, "--serve", program, "--peers", peers]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    env = {k: x for k, x in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "PYTHONPATH")}
    theirs = subprocess.Popen(command, **pipes, text=True, env=env)

    def ask(line):
        print(line, file=theirs.stdin, flush=True)
        return json.loads(theirs.stdout.readline())

    times = []
    with tempfile.TemporaryDirectory() as folder:
        pieces = speed.Pieces(simpo, shape, f"as_{program}", folder)
        ask(f"{pieces.obs.shape[1]} {pieces.envs.single_action_space.shape[0]}")
        for _ in range(repeats):
            ours = pieces.measure()
            times.append([ours["update"], ours["act"], *ask("go")])
        pieces.envs.close()
    theirs.stdin.close()
    theirs.wait()
    times = np.array(times).T
    rows = dict(zip(("ours_update", "ours_act", "their_update", "their_act"), times, strict=True))
    rows["ratio"] = times[2:].sum(axis=0) / times[:2].sum(axis=0)
    for name, x in rows.items():
        numbers = statistics.median(x), min(x), max(x)
        yield program, shape, name, *(f"{value:.3f}" for value in numbers)


def main(
    peers: Path,
    programs: tuple[str, ...] = PROGRAMS,
    shapes: tuple[str, ...] = ("Hopper-v4", "Humanoid-v4"),
    repeats: int = 6,
    out: Path = Path("authors.csv"),
):
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
    import jax
    import speed
    from results import fail

    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))  # as our main does
    for program in programs:
        if program not in PROGRAMS or not (peers / program / "bin/python").exists():
            fail(f"--peers {peers} has no {program}; see benchmark/peers/setup.sh")
    speed.SETTINGS |= {"as_dpmd": {}, "as_gempo": {"policy_delay": 1}}
    where = speed.machine({"device": f"{jax.device_count()} x cpu", "jax": jax.__version__})
    rows = [("program", "shape", "quantity", "median", "min", "max")]
    rows += [("", "", name, value, "", "") for name, value in where.items()]
    for program in programs:
        for shape in shapes:
            for row in compare(program, peers.absolute(), shape, repeats):
                print("{:8} {:12} {:14} {:>10} {:>10} {:>10}".format(*row), flush=True)
                rows.append(row)
    with out.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[4])
    else:
        import tyro

        tyro.cli(main, description=__doc__)
