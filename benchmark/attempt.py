"""One attempt at a run, on a Ray worker: starts guard.py, keeps the log and the record."""

import dataclasses
import itertools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from results import read_json, write_atomically

ROOT = Path(__file__).resolve().parents[1]
POLL, NOTE_EVERY = 0.1, 50  # seconds between looks at the script; looks between two records


def environment(cores, gpus):
    """Of a script: as many XLA devices as cores, no GPU unless asked for, its share of a card."""
    option = "--xla_force_host_platform_device_count"
    flags = re.sub(rf"{option}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    env = os.environ | {"XLA_FLAGS": f"{flags} {option}={cores}".strip()}
    if not gpus:
        env["JAX_PLATFORMS"] = "cpu"
    elif gpus < 1:
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 * gpus:.3f}"
    return env


def device(output, cores):
    """What a run computes on: the script's own line, or for a CPU its name."""
    found = re.findall(r"^device +(\d+ x .+)$", output, re.MULTILINE)
    if found and not found[-1].endswith("cpu"):
        return found[-1]
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    name = re.search(r"^model name\s*: (.+)$", info, re.MULTILINE)
    return f"{cores} x {name[1].strip() if name else platform.machine()}"


def attempt(root, run, cores, gpus, commit, cwd):
    """Starts or resumes a run and waits for it -> exit code, last line of its output.

    On `ray.cancel`, a KeyboardInterrupt here, the script saves a checkpoint and ends.
    """
    # ray.cancel acts as SIGINT, which a driver in the background of a shell script has ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logs, start = root / "logs", time.monotonic()
    record, old = logs / f"{run.name}.json", read_json(logs / f"{run.name}.json")
    log = (logs / f"{run.name}.log").open("a+b")
    begin = log.seek(0, os.SEEK_END)
    what = os.getpid(), cores, root / run.name, logs / f"{run.name}.lock", ROOT / run.script
    command = [sys.executable, ROOT / "benchmark" / "guard.py", *what, *run.flags]

    def together(name, value):
        """The value of all attempts, where they differ."""
        return "; ".join(dict.fromkeys([*filter(None, old.get(name, "").split("; ")), value]))

    def note(status):
        """Writes the record; -> what the script has printed."""
        log.seek(begin)
        output = log.read().decode(errors="replace")
        content = dataclasses.asdict(run) | {
            "status": status,
            "attempts": old.get("attempts", 0) + 1,
            "seconds": old.get("seconds", 0) + time.monotonic() - start,
            "device": together("device", device(output, cores)),
            "commit": together("commit", commit),
        }
        write_atomically(record, json.dumps(content, indent=2))
        return output

    process = subprocess.Popen(
        [str(x) for x in command],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment(cores, gpus),
        cwd=cwd,
        start_new_session=True,  # Ctrl-C in a terminal is for the driver
    )
    try:
        for i in itertools.count():
            if process.poll() is not None:
                break
            if i % NOTE_EVERY == 0:
                note("unfinished")
            time.sleep(POLL)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait()
        note("unfinished")
        raise
    code, output = process.returncode, note("unfinished")
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
    if code == 0:
        note("done")
    elif code == 1 and last.startswith("error: "):  # else an exception of Python's
        note("diverged")
    return code, last
