"""What the doctor knows of a machine: plain data, as JSON holds it. Nothing here looks anything up.

What could not be found is None or empty, and a `problem` beside it says why. No fact names the host or
its user: all of them go into a bug report.

Sizes are bytes. Of a limit, None is none at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..aio import EngineName
from ..probe.host import Mount

__all__ = [
    "BlockDevice",
    "DirectoryFacts",
    "EngineFacts",
    "ExtensionFacts",
    "Facts",
    "Gpu",
    "GpuFacts",
    "HostFacts",
    "Limits",
    "Link",
    "MeasuredFacts",
    "Origin",
    "PackageFacts",
    "SoftwareFacts",
    "TorchFacts",
]

# Why a directory was looked at: the user named it, `offload bench` measured it, or nobody named one.
Origin = Literal["named", "measured", "working directory"]

_UNKNOWN_MOUNT = Mount(source="unknown", file_system="unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageFacts:
    """A package that offload needs to run.

    Attributes:
        name: as the package index has it.
        needed: the oldest version that is supported, `2.10`; empty for any.
        version: the installed one; None when there is none.
    """

    name: str
    needed: str
    version: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtensionFacts:
    """One of the two C++ extensions.

    Attributes:
        name: `_aio` or `_adam`.
        problem: why it cannot be used; empty when it can.
        files: the built files in the package, whatever Python they were built for.
        suffix: what this Python wants such a file to end with.
        isas: what its vectorised kernels may use here, the best first; the last one is plain C++.
    """

    name: str
    problem: str
    files: tuple[str, ...]
    suffix: str
    isas: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFacts:
    """torch, imported in a process of its own, which may hang or crash without taking the doctor along.

    Attributes:
        version: with its build, `2.13.0+cu130`; None when it was not imported.
        cuda: the CUDA version it was built with; None for a build without.
        hip: the ROCm version it was built with; None for a build without.
        num_gpus: GPUs it can use.
        problem: why the import, or the question for GPUs, failed; empty when neither did.
        timed_out: whether it was ended because it took too long.
    """

    version: str | None = None
    cuda: str | None = None
    hip: str | None = None
    num_gpus: int = 0
    problem: str = ""
    timed_out: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftwareFacts:
    """Python and what is installed in it.

    Attributes:
        offload: its version; empty for a source tree that is not installed.
        python: `3.11.2`.
        packages: what offload needs.
        extensions: `_aio` and `_adam`.
        torch: what an import of it says.
    """

    offload: str
    python: str
    packages: tuple[PackageFacts, ...]
    extensions: tuple[ExtensionFacts, ...]
    torch: TorchFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Resource limits of this process (getrlimit(2), the soft ones). None: unlimited.

    Attributes:
        memlock_nbytes: memory that may be locked (`ulimit -l`).
        address_space_nbytes: virtual memory (`ulimit -v`).
        file_nbytes: the longest file (`ulimit -f`).
        open_files: descriptors (`ulimit -n`).
    """

    memlock_nbytes: int | None
    address_space_nbytes: int | None
    file_nbytes: int | None
    open_files: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """The machine and its kernel.

    Attributes:
        system: `Linux`.
        kernel: its release.
        distribution: as /etc/os-release calls it.
        architecture: `x86_64`.
        container: `docker`, `podman`, `kubernetes`, `lxc`, `wsl` or what systemd says; empty for none.
        virtual: whether this is a virtual machine, as the processor tells (x86 only).
        cpu: its name.
        num_cores: that this process may keep busy.
        num_cpus: that the machine has.
        governor: of the first processor's frequency; empty where none is shown.
        governor_driver: `intel_pstate`, `acpi-cpufreq`, ...
        energy_preference: what some drivers go by instead of the governor.
        memory_nbytes: physical.
        limit_nbytes: that this process may use: the least of the machine and its control groups.
        available_nbytes: that can be had without swapping.
        swap_nbytes: swap space.
        swap_used_nbytes: of it, in use.
        huge_pages: the setting of transparent huge pages; empty for a kernel without.
        limits: of this process.
    """

    system: str
    kernel: str
    distribution: str
    architecture: str
    container: str
    virtual: bool
    cpu: str
    num_cores: int
    num_cpus: int
    governor: str
    governor_driver: str
    energy_preference: str
    memory_nbytes: int
    limit_nbytes: int
    available_nbytes: int
    swap_nbytes: int
    swap_used_nbytes: int
    huge_pages: str
    limits: Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """The I/O engines.

    Attributes:
        chosen: what a run would use here; None when none can be had.
        asked: what OFFLOAD_IO_ENGINE says; empty when it is not set.
        available: the engines that work.
        refused: (engine, why it does not work).
    """

    chosen: EngineName | None
    asked: str
    available: tuple[EngineName, ...]
    refused: tuple[tuple[EngineName, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A PCI Express link. Generations count from 1 (2.5 GT/s a lane) to 6 (64 GT/s).

    Attributes:
        generation: now; a GPU that is idle lowers it.
        width: lanes in use.
        max_generation: of the device; of NVML, of the device in its slot.
        max_width: likewise.
    """

    generation: int
    width: int
    max_generation: int
    max_width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: as the driver has it.
        memory_nbytes: all of its memory; None when NVML was not asked.
        used_nbytes: of it, by anybody.
        link: to the host; None where nothing tells.
        performance_state: 0 at full clocks to 15; None when it is not known.
    """

    name: str
    memory_nbytes: int | None = None
    used_nbytes: int | None = None
    link: Link | None = None
    performance_state: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """What the driver says.

    Attributes:
        source: `nvml`, or `proc` where nvidia-ml-py is not installed, or empty when there is no driver.
        driver: its version.
        gpus: in its order, which need not be torch's.
        problem: what went wrong with asking; empty when nothing did.
    """

    source: Literal["nvml", "proc", ""] = ""
    driver: str = ""
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDevice:
    """The drive below a file system, as the kernel sees it.

    Attributes:
        name: of the whole drive, as in /sys/block.
        model: as the drive has it.
        bus: `nvme`, `usb`, `virtio`, `scsi`, ..., or empty.
        rotational: whether the kernel takes it for a spinning disk.
        write_cache: `write back` (volatile, flushed by a sync) or `write through`; empty when not known.
        scheduler: the active one.
        parts: of a device mapper or RAID, the devices below it.
        encrypted: whether it is dm-crypt.
        link: of an NVMe drive.
    """

    name: str
    model: str = ""
    bus: str = ""
    rotational: bool = False
    write_cache: str = ""
    scheduler: str = ""
    parts: tuple[str, ...] = ()
    encrypted: bool = False
    link: Link | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryFacts:
    """A directory that a run may lie in.

    Attributes:
        path: absolute.
        origin: why it is looked at.
        problem: why nothing more is known; empty when it is.
        mount: what is mounted there.
        file_system_id: equal for directories on one file system.
        mode: its permissions.
        total_nbytes: of the file system.
        free_nbytes: of it, for us.
        direct: whether O_DIRECT works; None when nothing could be written, or when the engine has none.
        write_problem: why no file could be written there; empty when one could.
        clock_skew_s: seconds by which the file system's clock is ahead of ours.
        device: the drive below; None where the kernel shows none.
    """

    path: str
    origin: Origin
    problem: str = ""
    mount: Mount = _UNKNOWN_MOUNT
    file_system_id: str = ""
    mode: int = 0o700
    total_nbytes: int = 0
    free_nbytes: int = 0
    direct: bool | None = None
    write_problem: str = ""
    clock_skew_s: float = 0.0
    device: BlockDevice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredFacts:
    """What `offload bench` left: `machine.json`.

    Attributes:
        path: of the file; empty when there is no place for one.
        problem: why it cannot be read; empty when it can, or is not there.
        measured_at: empty when nothing was measured.
        directories: that were measured.
        file_system_ids: of them, as they were then.
    """

    path: str = ""
    problem: str = ""
    measured_at: str = ""
    directories: tuple[str, ...] = ()
    file_system_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything, at one moment.

    Attributes:
        taken_at: UTC, ISO 8601.
        software: Python and packages.
        host: machine and kernel.
        gpu: GPUs.
        engine: I/O engines.
        measured: what `offload bench` left.
        directories: in the order given.
    """

    taken_at: str
    software: SoftwareFacts
    host: HostFacts
    gpu: GpuFacts
    engine: EngineFacts
    measured: MeasuredFacts
    directories: tuple[DirectoryFacts, ...]
