"""Runs fio on a file and reads what it reports. It makes no file and chooses no cell.

fio is asked for what our engine does, and spared what it need not do:

- `--io_size`: so many bytes, wrapping around the file, equal to ours; `--invalidate=1`, `--direct=1`.
- Reads are `--rw=rw --rwmixread=100`, which are reads alone: fio fills the buffers of a job that may
  write before it starts the clock, and else the first read of each would pay for the page faults
  (256 MiB of them at 8m x 32: a third of the bandwidth). Ours are touched beforehand too.
- `--scramble_buffers=0`: by default fio changes each block that it writes, which costs CPU time.
- No `--thread`: a job is a process of one thread, fio's default, in which the kernel's table of files
  is not shared and so is cheaper to look up.
- Neither side flushes: no `--end_fsync` here, no sync there; direct writes of a preallocated file.
- Polling and registering are left off, as by default, unless `extra` asks for them.

fio takes the time in whole milliseconds. CPU seconds are its `usr_cpu` + `sys_cpu`, per cent of
`job_runtime`: of the job's thread alone. Threads that the kernel starts for io_uring (io-wq) would be
missing, so `process_cpu_s` has what the operating system charged to all of fio, its start included.

Thread rule: the caller's thread only; an interrupted `run_fio` ends fio first.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _cells import Cell, Transfer

from offload.errors import ConfigError, StorageError

__all__ = ["fio_arguments", "fio_version", "parse_fio", "run_fio"]

HOW_TO_GET = "install it (Debian and Ubuntu: apt-get install fio), or leave it out with --without-fio"


def fio_version() -> str:
    """Return what `fio --version` says.

    Raises:
        ConfigError: there is no fio; says how to get it.
    """
    if shutil.which("fio") is None:
        raise ConfigError(f"no fio on this machine, which ours is compared with: {HOW_TO_GET}")
    return subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True).stdout.strip()


def fio_arguments(
    cell: Cell, files: Sequence[Path], file_nbytes: int, nbytes: int, extra: Sequence[str] = ()
) -> list[str]:
    """Return the command line: one job for each file, `nbytes` each."""
    direction = (
        ["--rw=rw", "--rwmixread=100"] if cell.op == "read" else ["--rw=write", "--scramble_buffers=0"]
    )
    shared = [
        "--ioengine=io_uring",
        "--direct=1",
        "--invalidate=1",
        f"--bs={cell.block_nbytes}",
        f"--iodepth={cell.depth}",
        f"--size={file_nbytes}",
        f"--io_size={nbytes}",
        *direction,
        *extra,
    ]
    jobs = [part for file in files for part in (f"--name={file.name}", f"--filename={file}", *shared)]
    return ["fio", "--output-format=json", *jobs]


def run_fio(
    cell: Cell,
    files: Sequence[Path],
    file_nbytes: int,
    nbytes: int,
    extra: Sequence[str] = (),
    *,
    huge_pages: bool = False,
) -> Transfer:
    """Move `nbytes` to or from each file and return what that took.

    Args:
        cell: direction, block size, and blocks in flight on each file.
        files: existing files; each gets a job of its own.
        file_nbytes: their size.
        nbytes: bytes to move on each.
        extra: options of fio's, for each job.
        huge_pages: let the C library ask for huge pages for fio's buffers, which is not its default.

    Raises:
        StorageError: fio failed, or moved another number of bytes.
    """
    command = fio_arguments(cell, files, file_nbytes, nbytes, extra)
    before_s = _children_cpu_s()
    environment = os.environ | ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if huge_pages else {})
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as child:
        try:
            output, complaints = child.communicate()
        except BaseException:
            # Once more until the pipes close: the jobs hold the file, so that its disk can be taken down
            # only when they are gone as well. (After Ctrl-C `with` would not wait for long.)
            child.terminate()
            child.communicate()
            raise
    if child.returncode:
        raise StorageError(
            f"fio ended with status {child.returncode} on {files[0]}; it says:"
            f" {(complaints or output).strip()[-500:]}; the command was: {' '.join(command)}"
        )
    # fio may print a warning before the braces.
    transfer = parse_fio(json.loads(output[output.index("{") :]), cell)
    if transfer.nbytes != nbytes * len(files):
        raise StorageError(f"fio moved {transfer.nbytes:,} bytes, not the {nbytes * len(files):,} asked for")
    return dataclasses.replace(transfer, process_cpu_s=_children_cpu_s() - before_s)


def parse_fio(report: dict[str, Any], cell: Cell) -> Transfer:
    """Return the sum of all jobs of a JSON report: bytes, the longest job's time, CPU seconds."""
    jobs = report["jobs"]
    cpu_s = sum((job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3 for job in jobs)
    return Transfer(
        nbytes=sum(job[cell.op]["io_bytes"] for job in jobs),
        elapsed_s=max(job[cell.op]["runtime"] for job in jobs) / 1e3,
        cpu_s=cpu_s,
        process_cpu_s=cpu_s,
    )


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
