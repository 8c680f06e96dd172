"""dna/devices.py: memory that is freed stays with the process."""

import subprocess
import sys

import pytest
from conftest import ROOT

FAULTS = """
import resource
import numpy as np
from dna.devices import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(10_000_000)  # 80 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(5)))
keep_freed_memory()
faults()
print(max(faults() for _ in range(5)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_large_buffers_fault_once():
    command = [sys.executable, "-c", FAULTS]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    fresh, kept = map(int, out.stdout.split())
    assert fresh > 30  # 40 huge pages, or 20,000 small ones
    assert kept < fresh / 5
