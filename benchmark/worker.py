"""One attempt at a run. `attempt` runs on a Ray worker; what it starts is this file as a program:

    python benchmark/worker.py PARENT CORES RUN_DIR LOCK SCRIPT FLAGS...

It becomes a training script that is alone in its run folder and ends with the worker. In this
order: asks Linux for a SIGTERM when PARENT, the worker, dies, however it dies; waits for the lock
on the file LOCK, which an earlier attempt may still hold while it saves its checkpoint; binds
itself to CORES cores of its own; and becomes `python SCRIPT`, with --resume RUN_DIR where a run was
begun and --run-dir RUN_DIR where not. Locks and request outlive the change of program.
"""

import ctypes
import dataclasses
import fcntl
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import read_json, share_done, write_atomically

ROOT = Path(__file__).resolve().parents[1]


# ---- on the Ray worker -------------------------------------------------------------------------


def environment(cores, gpus):
    """Of a script: a JAX device for each of its cores, or its share of the GPUs given by Ray."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(cores)}
    if not gpus:
        env["JAX_PLATFORMS"] = "cpu"
    elif gpus < 1:
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * gpus:.3f}"
    return env


def device(output, cores):
    """What a run computes on: as its script says, or for a CPU the name of it."""
    found = re.findall(r"^(?:run folder|device) .*?(\d+ x .+)$", output, re.MULTILINE)
    if found and not found[-1].endswith("cpu"):
        return found[-1]
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return f"{cores} x {name[1].strip() if name else platform.machine()}"


def attempt(root, run, cores, gpus, cwd):
    """Starts or resumes a run and waits for it -> exit code, last line of its output.

    On `ray.cancel`, a KeyboardInterrupt here, the script saves a checkpoint and ends.
    """
    # ray.cancel acts as SIGINT, which a driver in the background of a shell script has ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logs, start = root / "logs", time.monotonic()
    old, log = read_json(logs / f"{run.name}.json"), (logs / f"{run.name}.log").open("a+b")
    begin = log.seek(0, os.SEEK_END)
    what = os.getpid(), cores, root / run.name, logs / f"{run.name}.lock", ROOT / run.script
    command = [str(x) for x in (sys.executable, Path(__file__).resolve(), *what, *run.flags)]

    def note(status):
        """Writes the record; -> what the script has printed."""
        log.seek(begin)
        output = log.read().decode(errors="replace")
        devices = *filter(None, old.get("device", "").split("; ")), device(output, cores)
        content = dataclasses.asdict(run) | {
            "status": status,
            "attempts": old.get("attempts", 0) + 1,
            "seconds": old.get("seconds", 0) + time.monotonic() - start,
            "device": "; ".join(dict.fromkeys(devices)),  # of all attempts, where they differ
        }
        write_atomically(logs / f"{run.name}.json", json.dumps(content, indent=2))
        return output

    env = environment(cores, gpus)
    process = subprocess.Popen(  # a session of its own: Ctrl-C in a terminal is for the driver
        command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True
    )
    try:
        while (code := process.poll()) is None:
            note("unfinished")
            time.sleep(1)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait()
        note("unfinished")
        raise
    last = next((line for line in reversed(note("unfinished").splitlines()) if line.strip()), "")
    if code == 1 and last.startswith("error: "):  # else an exception of Python's
        note("diverged")
    return code, last


# ---- the program it starts ---------------------------------------------------------------------


def die_with(parent):
    """SIGTERM at the death of the parent, on which the scripts save a checkpoint and end."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before
        sys.exit(128 + signal.SIGTERM)


def is_free(file):
    """Takes the lock on an open file, if no other process has it; the end of a process frees it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    os.set_inheritable(file.fileno(), True)  # lets it pass to the next program
    return True


def take_folder(lock):
    """Waits until this process has the lock; the file says on which machine and who has it."""
    file = lock.open("a")
    if not is_free(file):
        print(f"waits for an earlier attempt, {lock.read_text()}", flush=True)
    while not is_free(file):
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"{socket.gethostname()} {os.getpid()}")
    file.flush()
    return file


def take_cores(count):
    """Binds this process to `count` cores that no other run here has, or shares where there are
    too few. The number of threads, and so the last digits of a result, follow the number of cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        return []
    folder = Path(tempfile.gettempdir()) / f"simpo-cores-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    rest, mine = sorted(os.sched_getaffinity(0)), {}
    for core in rest[:]:
        file = (folder / str(core)).open("w")
        if len(mine) < count and is_free(file):
            mine[core] = file
            rest.remove(core)
    shared = random.sample(rest, min(count - len(mine), len(rest)))
    os.sched_setaffinity(0, [*mine, *shared])
    return list(mine.values())


def place_flags(run_dir):
    """Flags that begin a run in its folder or go on with it. What was killed before its first
    checkpoint holds nothing and is removed."""
    if {*run_dir.glob("*.npz")} - {*run_dir.glob("*.tmp.npz")}:  # the latter it was just writing
        return ["--resume", str(run_dir)]
    if run_dir.exists():
        shutil.rmtree(run_dir)
    return ["--run-dir", str(run_dir)]


def main(parent, cores, run_dir, lock, script, *flags):
    die_with(int(parent))
    locks = [take_folder(Path(lock)), *take_cores(int(cores))]
    print(f"=== {time.strftime('%F %T')} {socket.gethostname()}, {len(locks) - 1} cores")
    if share_done(Path(run_dir)) == 1:  # the attempt before ended, but its worker was lost
        return print("complete", flush=True)
    command = [sys.executable, script, *place_flags(Path(run_dir)), *flags]
    print(" ".join(command), flush=True)
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main(*sys.argv[1:])
