"""A `Machine` in seconds: drives, host memory, a GPU's link, and the processor's share of a step.

The drives are measured as `offload bench` does it, but briefly: one file of some tens of MiB on each, one
setting, one sample. What is measured longer belongs into `machine.json`.

Thread rule: the caller's thread; others are started and ended meanwhile.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..machine import Machine, ProcessorSpeed
from ..probe.options import MIN_FILE_NBYTES, BenchOptions
from ..probe.run import run_bench
from ..sizes import MIB
from .update import update_bytes_per_s

__all__ = ["probe_machine"]

# Enough for a fast drive to show its rate, and written within a second by a slow one.
_FILE_NBYTES = 128 * MIB
_SAMPLE_S = 0.15
_BLOCK_NBYTES = MIB
_DEPTH = 32

# Of what is free on a drive, a probe takes no more.
_ROOM_SHARE = 8


def probe_machine(directories: Sequence[str], *, device: bool) -> Machine | None:
    """Measure the machine in a few seconds.

    Args:
        directories: one on each drive; they exist.
        device: measure copies to and from the GPU.

    Returns:
        None where a drive has too little room for a file to measure with.

    Raises:
        StorageError: a directory cannot be written to, or a transfer failed.
    """
    free = min(shutil.disk_usage(directory).free for directory in directories)
    size_nbytes = min(_FILE_NBYTES, free // _ROOM_SHARE)
    if size_nbytes < MIN_FILE_NBYTES:
        return None
    options = BenchOptions(
        size_nbytes=size_nbytes,
        patterns=("read", "write"),
        block_nbytes=(_BLOCK_NBYTES,),
        depths=(_DEPTH if size_nbytes >= 2 * _DEPTH * _BLOCK_NBYTES else 4,),
        rounds=1,
        sample_s=_SAMPLE_S,
        latency=False,
        device=device,
        buffer_nbytes=64 * MIB,
    )
    found = run_bench(directories, options).machine
    processor = ProcessorSpeed(
        num_threads=torch.get_num_threads(),
        update_bytes_per_s=update_bytes_per_s("float32", num_threads=found.num_cores),
        update_8bit_bytes_per_s=update_bytes_per_s("8bit", num_threads=found.num_cores),
    )
    return replace(found, processor=processor)
