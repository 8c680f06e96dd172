"""Becomes a training script that is alone in its run folder and ends with the Ray worker.

    python benchmark/guard.py PARENT CORES RUN_DIR LOCK SCRIPT FLAGS...

In this order: asks Linux for a SIGTERM when PARENT, the worker, dies, however it dies; waits for
the lock on the file LOCK, which an earlier attempt may still hold while it saves its checkpoint;
binds itself to CORES cores of its own; and becomes `python SCRIPT`, with --resume RUN_DIR where a
run was begun and --run-dir RUN_DIR where not. Locks and request outlive the change of program.
"""

import ctypes
import fcntl
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

PATIENCE = 300  # seconds for an earlier attempt to end; then it is killed, if on this machine
NO_RESUME = ("simpo_bandit.py",)  # takes a minute and starts again


def die_with(parent):
    """SIGTERM at the death of the parent, on which the scripts save a checkpoint and end."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before
        sys.exit(128 + signal.SIGTERM)


def keep_open(file):
    """Lets the file, and so its lock, pass to the next program."""
    os.set_inheritable(file.fileno(), True)
    return file


def is_free(file):
    """Takes the lock on an open file, if no other process has it; the end of a process frees it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take_folder(lock):
    """Waits until this process has the lock; the file says on which machine and who has it."""
    file, deadline = lock.open("a"), time.monotonic() + PATIENCE
    while not is_free(file):
        host, _, pid = lock.read_text().partition(" ")
        if time.monotonic() > deadline and host == socket.gethostname():
            print(f"process {pid} holds {lock} and does not end: killed", flush=True)
            os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"{socket.gethostname()} {os.getpid()}")
    file.flush()
    return keep_open(file)


def take_cores(count):
    """Binds this process to `count` cores that no other guard here has, or shares where there are
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
            mine[core] = keep_open(file)
            rest.remove(core)
    shared = random.sample(rest, min(count - len(mine), len(rest)))
    os.sched_setaffinity(0, [*mine, *shared])
    return list(mine.values())


def place_flags(run_dir, script):
    """Flags that begin a run in its folder or go on with it. What was killed before its args.json
    was whole holds nothing and is removed."""
    try:
        json.loads((run_dir / "args.json").read_text())
        begun = script not in NO_RESUME
    except (OSError, ValueError):
        begun = False
        if any(run_dir.glob("*.npz")):
            print(f"error: {run_dir} has checkpoints but no readable args.json", flush=True)
            sys.exit(2)  # 1 is for a script that diverged
    if begun:
        return ["--resume", str(run_dir)]
    if run_dir.exists():
        shutil.rmtree(run_dir)
    return ["--run-dir", str(run_dir)]


def main(parent, cores, run_dir, lock, script, *flags):
    die_with(int(parent))
    locks = [take_folder(Path(lock)), *take_cores(int(cores))]
    command = [sys.executable, script, *place_flags(Path(run_dir), Path(script).name), *flags]
    print(f"=== {time.strftime('%F %T')} {socket.gethostname()}, {len(locks) - 1} cores")
    print(" ".join(command), flush=True)
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main(*sys.argv[1:])
