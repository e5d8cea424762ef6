"""What was measured of this machine: drives, host memory, links; and the file that keeps it.

`offload bench` writes a `Machine` to `machine.json`; plans are reckoned with it, and attaching a model
takes its I/O setting. Pure data and its JSON; nothing here measures, and nothing imports torch.

Figures are bytes per second of what moved, once: a copy of 1 GB that reads and writes memory counts 1 GB.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .errors import ConfigError, StorageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "FORMAT",
    "MACHINE_VARIABLE",
    "DeviceSpeed",
    "DriveSpeed",
    "IoSetting",
    "Machine",
    "ProcessorSpeed",
    "SharedSpeed",
    "default_machine_path",
    "file_system_id",
    "load_machine",
    "save_machine",
    "stripe_weights",
]

FORMAT: Literal["offload-machine-1"] = "offload-machine-1"

# Measurements of one drive differ by this much from day to day: drives that differ by less are dealt alike.
_ALIKE = 1.1

# The environment variable that names the file instead of the default place.
MACHINE_VARIABLE = "OFFLOAD_MACHINE"


@dataclass(frozen=True, slots=True, kw_only=True)
class IoSetting:
    """How an I/O engine is to be opened.

    Attributes:
        segment_nbytes: the most bytes of one operation, a multiple of 4096.
        queue_depth: operations in flight on each drive.
    """

    segment_nbytes: int
    queue_depth: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DriveSpeed:
    """One drive alone, at its best setting.

    Attributes:
        path: the directory measured, absolute.
        device: what the file system is recognised by; see `file_system_id`.
        file_system: `ext4`, `xfs`, `tmpfs`, ...
        engine: the I/O engine it was measured with.
        direct: whether transfers bypassed the page cache (O_DIRECT).
        setting: the best one; used when a later engine works on this drive.
        read_bytes_per_s: median.
        write_bytes_per_s: median, completion included, flush (fdatasync) included.
        mixed_bytes_per_s: reads and writes at once, half each, their sum; None when not measured.
        cpu_s_per_gb: CPU seconds of this process for each 10^9 bytes read.
        capacity_nbytes: of the drive; not measured, for machines that are only described.
    """

    path: str
    device: str
    file_system: str
    engine: str
    direct: bool
    setting: IoSetting
    read_bytes_per_s: float
    write_bytes_per_s: float
    mixed_bytes_per_s: float | None = None
    cpu_s_per_gb: float | None = None
    capacity_nbytes: int | None = None

    @property
    def rewrite_bytes_per_s(self) -> float:
        """What it moves where as much is read as written: a step reads about what it writes."""
        return 2 / (1 / self.read_bytes_per_s + 1 / self.write_bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSpeed:
    """All drives at once, in sum, with one setting for all.

    Attributes:
        setting: used when a later engine works on several drives.
        read_bytes_per_s: sum over the drives.
        write_bytes_per_s: sum over the drives.
    """

    setting: IoSetting
    read_bytes_per_s: float
    write_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpeed:
    """A GPU and its link.

    Attributes:
        name: as the driver has it.
        memory_nbytes: all of its memory.
        pinned_to_device_bytes_per_s: from page-locked host memory.
        device_to_pinned_bytes_per_s: into page-locked host memory.
        both_ways_bytes_per_s: sum of both, at once, page-locked.
        pageable_to_device_bytes_per_s: from ordinary memory.
        device_to_pageable_bytes_per_s: into ordinary memory.
        flops_per_s: operations that training sustains in bf16; not measured, None where nobody said.
    """

    name: str
    memory_nbytes: int
    pinned_to_device_bytes_per_s: float
    device_to_pinned_bytes_per_s: float
    both_ways_bytes_per_s: float
    pageable_to_device_bytes_per_s: float
    device_to_pageable_bytes_per_s: float
    flops_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorSpeed:
    """What the processor does in a training step.

    Attributes:
        num_threads: that torch computes with.
        update_bytes_per_s: that AdamW with fp32 moments reads and writes on all cores.
        update_8bit_bytes_per_s: the same with 8-bit moments.
        flops_per_s: operations that training sustains in fp32; None where nobody measured a model.
    """

    num_threads: int
    update_bytes_per_s: float
    update_8bit_bytes_per_s: float
    flops_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A measured machine.

    Attributes:
        format: version of this description.
        measured_at: UTC, ISO 8601.
        cpu: model name.
        num_cores: CPUs this process may use.
        memory_nbytes: host memory, or the limit of the control group when that is less.
        drives: each alone, in the order given.
        together: all drives at once; None with a single drive.
        memory_bytes_per_s: copy of host memory on all cores, bytes copied.
        crc32c_bytes_per_s: checksum on one core.
        device: the GPU; None without one.
        processor: its share of a step; None where only `offload bench` measured.
    """

    format: Literal["offload-machine-1"] = FORMAT
    measured_at: str
    cpu: str
    num_cores: int
    memory_nbytes: int
    drives: tuple[DriveSpeed, ...] = ()
    together: SharedSpeed | None = None
    memory_bytes_per_s: float | None = None
    crc32c_bytes_per_s: float | None = None
    device: DeviceSpeed | None = None
    processor: ProcessorSpeed | None = None

    def setting_for(self, devices: tuple[str, ...]) -> IoSetting | None:
        """Return the best setting for these `DriveSpeed.device`s; None when one was not measured.

        For several drives it is the one they were measured with together, when those are the same
        drives; else the one with the largest product of both numbers among theirs.
        """
        known = {drive.device: drive.setting for drive in self.drives}
        wanted = set(devices)
        if not wanted or not wanted <= known.keys():
            return None
        if len(wanted) > 1 and self.together is not None and wanted == known.keys():
            return self.together.setting
        return max((known[device] for device in wanted), key=lambda one: one.segment_nbytes * one.queue_depth)


def stripe_weights(rates: Sequence[float]) -> tuple[float, ...]:
    """Return the weights with which a run's bytes are dealt to drives of these speeds.

    Args:
        rates: `DriveSpeed.rewrite_bytes_per_s` of each; half of it for one of two directories on one drive.

    Returns:
        The rates themselves; all 1.0 where they differ by no more than measurements of one drive do.
    """
    if not rates or max(rates) <= _ALIKE * min(rates):
        return (1.0,) * len(rates)
    return tuple(rates)


def default_machine_path() -> Path:
    """Return where `machine.json` is kept: `$OFFLOAD_MACHINE`, else the user's configuration folder.

    Raises:
        ConfigError: there is no home directory, and no variable says where else.
    """
    if named := os.environ.get(MACHINE_VARIABLE):
        return Path(named)
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    try:
        return Path(folder).expanduser() / "offload" / "machine.json"
    except RuntimeError as error:
        raise ConfigError(
            f"no place for machine.json ({error}): name a file in the environment, as {MACHINE_VARIABLE}"
        ) from error


def file_system_id(directory: str | os.PathLike[str]) -> str:
    """Return what tells the file system of `directory` from others, if possible across reboots.

    It is `f_fsid` of statvfs, which ext4 and btrfs derive from the UUID; some file systems have the
    device number there, and where it is zero the device number is what is returned.

    Raises:
        OSError: the directory is not there.
    """
    if fsid := os.statvfs(directory).f_fsid:
        return f"fsid-{fsid:x}"
    number = os.stat(directory).st_dev
    return f"{os.major(number)}:{os.minor(number)}"


@functools.cache  # takes milliseconds to make
def _adapter() -> TypeAdapter[Machine]:
    from pydantic import TypeAdapter

    return TypeAdapter(Machine)


def load_machine(path: Path) -> Machine:
    """Read a `machine.json`. Needs pydantic (`ImportError` without), unlike the rest of this module.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it is no machine file; names the key that is wrong.
    """
    # Late: a model can be attached where pydantic is not installed.
    from pydantic import ValidationError

    try:
        return _adapter().validate_json(path.read_bytes(), strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(
            f"{path}: {where}: {first['msg']}; measure again with 'offload bench DIR --machine {path}'"
        ) from error


def save_machine(machine: Machine, path: Path) -> None:
    """Write `machine` to `path` atomically, making its folder.

    Raises:
        StorageError: it cannot be written.
    """
    # A name that is no UTF-8 could be written and not be read again.
    drives = tuple(replace(one, path=one.path.encode(errors="replace").decode()) for one in machine.drives)
    text = json.dumps(asdict(replace(machine, drives=drives)), indent=2) + "\n"
    try:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            with open(staged, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}", errno=error.errno or 0, path=str(path)
        ) from error
