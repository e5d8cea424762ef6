"""What else loads weights from a drive, beside our engine: the same tensors, cold.

Each loader gets the tensors in the format that it asks for and returns them as arrays; then one byte
of every page is added up, for all alike, since those that map a file have not read it yet. Before each
run the pages of all files are dropped from the page cache; that the bytes then came from the drive is
checked with /proc/self/io. What each loader returns is compared with what was written, once.

The memory is what the interface forces: fresh memory, whose first touch is part of the cost, except
where a caller may give a buffer of its own.

Thread rule: the caller's thread only.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import aiofiles
import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from _cells import Cell, Spread, Transfer
from _report import Report
from _turns import take_turns
from accelerate.utils import OffloadedWeightsLoader, offload_state_dict

from offload.aio import Engine, crc32c, open_engine
from offload.buffers import Arena, Budget
from offload.errors import CorruptionError
from offload.sizes import format_bytes

__all__ = ["measure_peers"]


NUM_TENSORS = 16
PAGE_NBYTES = 4096
# Bytes that must have come from the drive, as a share of those loaded.
LEAST_COLD = 0.95

Arrays = Sequence[npt.NDArray[np.uint8]]
Loader = Callable[[], Arrays]

MEMORY = {
    "offload, own buffers": "reused",
    "offload": "fresh, huge pages",
    "aiofiles": "fresh",
    "numpy.fromfile": "fresh",
    "torch.load": "fresh",
    "safetensors.load_file": "mapped file",
    "accelerate": "fresh, copied from a mapped file",
}


def measure_peers(report: Report, place: str, directory: Path, nbytes: int, rounds: int) -> None:
    """Write tensors of `nbytes` in all into `directory`, load them with each loader in turn, and print."""
    tensor_nbytes = nbytes // NUM_TENSORS // PAGE_NBYTES * PAGE_NBYTES
    checksums = _write(directory, tensor_nbytes)
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine())
        loaders = _loaders(directory, stack, engine, tensor_nbytes)
        cold: dict[str, list[float]] = {name: [] for name in loaders}
        for name, load in loaders.items():
            if [crc32c(array) for array in load()] != checksums:
                raise CorruptionError(f"{name} returned other bytes than were written to {directory}")
        cell = Cell("read", tensor_nbytes, NUM_TENSORS)
        contenders = {
            name: lambda _, name=name, load=load: _timed(directory, load, cold[name])
            for name, load in loaders.items()
        }
        measured = take_turns(report, f"{place}: loaders", cell, contenders, rounds)
    report.say(f"## {place}: what loads weights")
    report.say()
    report.say(
        f"{NUM_TENSORS} tensors of {format_bytes(tensor_nbytes)}; the page cache is dropped before each run,"
        " and one byte of each page is read at its end. Last column: bytes from the drive / bytes loaded."
    )
    report.say()
    _print_table(report, measured, cold)
    least = min(min(shares) for shares in cold.values())
    report.fact(f"every run read from the drive (least {least:.2f} of the bytes)", least >= LEAST_COLD)
    report.say()


def _write(directory: Path, tensor_nbytes: int) -> list[int]:
    """Write the tensors in every format and return their checksums, in order."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{number:02}": torch.randn(tensor_nbytes // 4, generator=generator) for number in range(NUM_TENSORS)
    }
    offload_state_dict(str(directory / "raw"), tensors)
    torch.save(tensors, directory / "all.pt")
    safetensors.torch.save_file(tensors, directory / "all.safetensors")
    for path in _files(directory):  # pages that are not written back cannot be dropped
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return [crc32c(tensor.numpy()) for tensor in tensors.values()]


def _loaders(directory: Path, stack: ExitStack, engine: Engine, tensor_nbytes: int) -> dict[str, Loader]:
    names = [f"t{number:02}" for number in range(NUM_TENSORS)]
    raw = [directory / "raw" / f"{name}.dat" for name in names]
    total_nbytes = tensor_nbytes * NUM_TENSORS
    own = stack.enter_context(Arena(Budget("host", total_nbytes), total_nbytes, "tensors"))
    np.frombuffer(own.memory, np.uint8)[:] = 0  # touched, as in a run

    def read_into(memory: memoryview) -> Arrays:
        with ExitStack() as opened:
            requests, arrays = [], []
            for number, path in enumerate(raw):
                part = memory[number * tensor_nbytes : (number + 1) * tensor_nbytes]
                file = opened.enter_context(engine.open(str(path)))
                requests.append(engine.submit("read", file, part, 0))
                arrays.append(np.frombuffer(part, np.uint8))
            for request in requests:
                request.wait()
        return arrays

    def into_fresh() -> Arrays:
        # Not closed: the arrays keep the mapping, and the caller reads them.
        return read_into(Arena(Budget("host", total_nbytes), total_nbytes, "fresh tensors").memory)

    async def read_file(path: Path) -> bytes:
        async with aiofiles.open(path, "rb") as file:
            return await file.read()

    async def read_files() -> Arrays:
        return [np.frombuffer(data, np.uint8) for data in await asyncio.gather(*map(read_file, raw))]

    def from_accelerate() -> Arrays:
        weights = OffloadedWeightsLoader(save_folder=str(directory / "raw"))
        return _arrays({name: weights[name] for name in names})

    return {
        "offload, own buffers": lambda: read_into(own.memory),
        "offload": into_fresh,
        "aiofiles": lambda: asyncio.run(read_files()),
        "numpy.fromfile": lambda: [np.fromfile(path, np.uint8) for path in raw],
        "torch.load": lambda: _arrays(torch.load(directory / "all.pt", weights_only=True)),
        "safetensors.load_file": lambda: _arrays(safetensors.torch.load_file(directory / "all.safetensors")),
        "accelerate": from_accelerate,
    }


def _arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    return [tensors[name].view(torch.uint8).numpy() for name in sorted(tensors)]


def _timed(directory: Path, load: Loader, cold: list[float]) -> Transfer:
    """Load once, cold, and note which share of the bytes came from the drive."""
    for path in _files(directory):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read_before, before = _read_nbytes(), resource.getrusage(resource.RUSAGE_SELF)
    began_s = time.perf_counter()
    arrays = load()
    for array in arrays:
        int(array[::PAGE_NBYTES].sum())
    elapsed_s, after = time.perf_counter() - began_s, resource.getrusage(resource.RUSAGE_SELF)
    nbytes = sum(array.nbytes for array in arrays)
    cold.append((_read_nbytes() - read_before) / nbytes)
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Transfer(nbytes, elapsed_s, cpu_s, cpu_s)


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def _read_nbytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def _print_table(
    report: Report, measured: Mapping[str, Sequence[Transfer]], cold: Mapping[str, Sequence[float]]
) -> None:
    ours = [each.bytes_per_s for each in measured["offload, own buffers"]]
    rows = []
    for name, runs in measured.items():
        rate = Spread.of(each.bytes_per_s / 1e9 for each in runs)
        times = Spread.paired(ours, [each.bytes_per_s for each in runs]).median
        cost = Spread.of(each.cpu_s_per_gb for each in runs).median
        share = Spread.of(cold[name]).median
        rows.append(
            (
                name,
                MEMORY[name],
                f"{rate.median:.2f} [{rate.least:.2f}..{rate.most:.2f}]",
                f"{times:.1f}",
                f"{cost:.3f}",
                f"{share:.2f}",
            )
        )
    columns = ("", "memory", "GB/s", "ours is faster by", "CPU s/GB", "from the drive")
    report.table(columns, rows)
