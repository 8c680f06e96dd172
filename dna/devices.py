"""How the arrays of simpo_dna.py lie on the devices of its process."""

import ctypes
import math
import os
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


class Layout(NamedTuple):
    """Batches of `size` sequences are split over the devices, all else is on each."""

    size: int  # G N
    whole: NamedSharding | None = None
    split: NamedSharding | None = None

    @property
    def num_devices(self):
        return self.split.num_devices


# mallopt's numbers, and values with which glibc keeps in one place what is freed
MALLOPT = {
    -8: 1,  # M_ARENA_MAX
    -4: 0,  # M_MMAP_MAX
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD
    -2: 2**28,  # M_TOP_PAD
}


def keep_freed_memory():
    """Stops glibc from returning memory to the system. XLA allocates its large buffers
    at every step, and page faults on fresh ones cost a fifth of the time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt:
        for option, value in MALLOPT.items():
            mallopt(option, value)


def use_all_cores():
    """An XLA device of every core, since XLA threads one CPU device badly; products in
    float32, of which a GPU keeps ten bits, unless the user set JAX's flag for this."""
    keep_freed_memory()
    if jax.config.jax_default_matmul_precision is None:
        jax.config.update("jax_default_matmul_precision", "float32")
    if jax.config.jax_num_cpu_devices > 0:
        return  # chosen by the user
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # Linux: the cores that this process may use
        cores = len(os.sched_getaffinity(0))
    jax.config.update("jax_num_cpu_devices", cores)


def make_layout(size, *other_sizes):
    """As many devices as divide all the sizes of a batch."""
    devices = jax.devices()
    count = math.gcd(len(devices), size, *other_sizes)
    mesh = jax.sharding.Mesh(np.array(devices[:count]), ("batch",))
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("batch"))
    return Layout(size, whole, split)


def in_batches(f, x, layout):
    """f(batch [size, L], its number) over integers x [n, L] on the host -> [n, ...].

    The last batch is filled up with the last row, so that f is compiled once."""
    out = []
    for start in range(0, len(x), layout.size):
        rows = np.arange(start, start + layout.size)
        batch = x[np.minimum(rows, len(x) - 1)].astype(np.int32)
        batch = jax.device_put(batch, layout.split)
        out.append(np.asarray(f(batch, start // layout.size)))
    return np.concatenate(out)[: len(x)]
