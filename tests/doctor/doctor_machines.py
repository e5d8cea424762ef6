"""Facts of machines that the tests judge: one in good order, and changes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from offload.doctor.facts import (
    BlockDevice,
    DirectoryFacts,
    EngineFacts,
    ExtensionFacts,
    Facts,
    Gpu,
    GpuFacts,
    HostFacts,
    Limits,
    Link,
    MeasuredFacts,
    PackageFacts,
    SoftwareFacts,
    TorchFacts,
)
from offload.probe.host import Mount
from offload.sizes import GIB

SUFFIX = ".cpython-311-x86_64-linux-gnu.so"
FULL_LINK = Link(generation=4, width=4, max_generation=4, max_width=4)

DRIVE = BlockDevice(
    name="nvme0n1",
    model="Example 990",
    bus="nvme",
    write_cache="write back",
    scheduler="none",
    link=FULL_LINK,
)

DIRECTORY = DirectoryFacts(
    path="/mnt/nvme0",
    origin="named",
    mount=Mount(source="/dev/nvme0n1p1", file_system="ext4", options=("rw", "noatime")),
    file_system_id="fsid-1",
    mode=0o755,
    total_nbytes=1000 * GIB,
    free_nbytes=500 * GIB,
    direct=True,
    device=DRIVE,
)

GPU = Gpu(
    name="NVIDIA Example",
    memory_nbytes=24 * GIB,
    used_nbytes=GIB,
    link=Link(generation=4, width=16, max_generation=4, max_width=16),
    performance_state=0,
)

SOFTWARE = SoftwareFacts(
    offload="0.1.0",
    python="3.11.7",
    packages=(
        PackageFacts(name="torch", needed="2.10", version="2.13.0+cu130"),
        PackageFacts(name="numpy", needed="1.26", version="2.4.6"),
        PackageFacts(name="tqdm", needed="", version="4.70.1"),
    ),
    extensions=(
        ExtensionFacts(
            name="_aio", problem="", files=(f"_aio{SUFFIX}",), suffix=SUFFIX, isas=("sse4.2", "scalar")
        ),
        ExtensionFacts(
            name="_adam", problem="", files=(f"_adam{SUFFIX}",), suffix=SUFFIX, isas=("avx2", "scalar")
        ),
    ),
    torch=TorchFacts(version="2.13.0+cu130", cuda="13.0", num_gpus=1),
)

HOST = HostFacts(
    system="Linux",
    kernel="6.1.0-21-amd64",
    distribution="Example Linux",
    architecture="x86_64",
    container="",
    virtual=False,
    cpu="Example CPU",
    num_cores=8,
    num_cpus=8,
    governor="powersave",
    governor_driver="intel_pstate",
    energy_preference="balance_performance",
    memory_nbytes=64 * GIB,
    limit_nbytes=64 * GIB,
    available_nbytes=50 * GIB,
    swap_nbytes=8 * GIB,
    swap_used_nbytes=GIB,
    huge_pages="madvise",
    limits=Limits(memlock_nbytes=None, address_space_nbytes=None, file_nbytes=None, open_files=1024),
)

ENGINE = EngineFacts(chosen="uring", asked="", available=("uring", "threads", "portable"), refused=())

# Nothing is wrong with it.
SOUND = Facts(
    taken_at="2026-11-21T12:00:00+00:00",
    software=SOFTWARE,
    host=HOST,
    gpu=GpuFacts(source="nvml", driver="580.65.06", gpus=(GPU,)),
    engine=ENGINE,
    measured=MeasuredFacts(path="/home/u/machine.json", file_system_ids=("fsid-1",)),
    directories=(DIRECTORY,),
)


def with_host(**changes: Any) -> Facts:
    """The sound machine with another host."""
    return replace(SOUND, host=replace(HOST, **changes))


def with_limits(**changes: Any) -> Facts:
    """The sound machine with other resource limits."""
    return with_host(limits=replace(HOST.limits, **changes))


def with_directory(**changes: Any) -> Facts:
    """The sound machine with another directory."""
    return replace(SOUND, directories=(replace(DIRECTORY, **changes),))


def with_options(*options: str, kind: str = "ext4") -> Facts:
    """The sound machine with its directory mounted otherwise."""
    return with_directory(mount=Mount(source="/dev/nvme0n1p1", file_system=kind, options=options))


def with_drive(**changes: Any) -> Facts:
    """The sound machine with another drive."""
    return with_directory(device=replace(DRIVE, **changes))


def with_gpu(**changes: Any) -> Facts:
    """The sound machine with another GPU."""
    return replace(SOUND, gpu=replace(SOUND.gpu, gpus=(replace(GPU, **changes),)))


def with_torch(**changes: Any) -> Facts:
    """The sound machine with another torch."""
    return replace(SOUND, software=replace(SOFTWARE, torch=replace(SOFTWARE.torch, **changes)))


def with_package(name: str, version: str | None) -> Facts:
    """The sound machine with another version of a package."""
    packages = tuple(replace(one, version=version) if one.name == name else one for one in SOFTWARE.packages)
    return replace(SOUND, software=replace(SOFTWARE, packages=packages))


def with_extension(name: str, **changes: Any) -> Facts:
    """The sound machine with another extension."""
    extensions = tuple(replace(one, **changes) if one.name == name else one for one in SOFTWARE.extensions)
    return replace(SOUND, software=replace(SOFTWARE, extensions=extensions))


def with_engine(**changes: Any) -> Facts:
    """The sound machine with other engines."""
    return replace(SOUND, engine=replace(ENGINE, **changes))
