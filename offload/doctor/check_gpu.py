"""What is wrong with the GPUs, and between them and torch. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from ..sizes import format_bytes
from .facts import Facts, Gpu, Link
from .finding import Finding, Severity

__all__ = ["check_gpu", "describe_link"]

# In states P0 to P2 a GPU is at work, and so is its link; below, it saves power and lowers the rate.
_AT_WORK = 2

# What a desktop takes on the GPU is less than this share.
_MUCH_USED = 0.25

_ABOUT = "GPU"


def check_gpu(facts: Facts) -> Iterator[Finding]:
    """Yield what is wrong."""
    gpu = facts.gpu
    if gpu.problem and gpu.source:
        mismatch = "mismatch" in gpu.problem
        yield Finding(
            id="driver-silent",
            severity=Severity.WARNING,
            about=_ABOUT,
            problem=f"the NVIDIA driver was asked by NVML and failed: {gpu.problem}",
            fix="reboot: the driver was updated while it ran" if mismatch else "nvidia-smi, and sudo dmesg",
        )
    if gpu.source == "proc" and gpu.gpus and not gpu.problem:
        yield Finding(
            id="nvml-missing",
            severity=Severity.NOTE,
            about=_ABOUT,
            problem="nvidia-ml-py is not installed: memory and clocks of the GPU are not known",
            fix="python3 -m pip install nvidia-ml-py",
        )
    yield from _check_torch(facts)
    if gpu.gpus:
        yield from _check_memlock(facts)
    for index, one in enumerate(gpu.gpus):
        about = f"{_ABOUT} {index}"
        if one.link is not None:
            yield from _check_link(about, one, one.link)
        if one.memory_nbytes and one.used_nbytes and one.used_nbytes > _MUCH_USED * one.memory_nbytes:
            yield Finding(
                id="gpu-memory-in-use",
                severity=Severity.NOTE,
                about=about,
                problem=f"{format_bytes(one.used_nbytes)} of {format_bytes(one.memory_nbytes)} are in use",
                fix="nvidia-smi shows by whom; device_memory must fit into the rest",
            )


def _check_torch(facts: Facts) -> Iterator[Finding]:
    torch, gpu = facts.software.torch, facts.gpu
    if torch.version is None:
        return  # that is said where it is checked
    built = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}"
    has_gpu = bool(gpu.gpus)
    if torch.cuda is None and torch.hip is None:
        if has_gpu:
            yield Finding(
                id="torch-without-cuda",
                severity=Severity.WARNING,
                about=_ABOUT,
                problem=f"torch {torch.version} is built without CUDA and cannot use the {gpu.gpus[0].name}",
                fix="install torch's CUDA build: https://pytorch.org/get-started/locally",
            )
    elif torch.problem:
        yield Finding(
            id="torch-gpu-failed",
            severity=Severity.WARNING,
            about=_ABOUT,
            problem=f"torch {torch.version} cannot say what GPUs there are: {torch.problem}",
            fix="nvidia-smi, and sudo dmesg",
        )
    elif torch.num_gpus == 0 and has_gpu:
        started = facts.host.container in ("docker", "podman")
        yield Finding(
            id="torch-sees-no-gpu",
            severity=Severity.WARNING,
            about=_ABOUT,
            problem=f"torch {torch.version} ({built}) sees no GPU, and the driver"
            f"{f' {gpu.driver}' if gpu.driver else ''} has {len(gpu.gpus)}",
            fix="docker run --gpus all, and look at CUDA_VISIBLE_DEVICES"
            if started
            else f"look at CUDA_VISIBLE_DEVICES; install a driver that is new enough for {built}",
        )
    elif torch.num_gpus == 0:
        yield Finding(
            id="no-gpu",
            severity=Severity.WARNING,
            about=_ABOUT,
            problem=f"torch {torch.version} is built for {built} and there is no GPU: the CPU stands in",
            fix="install the GPU's driver; without a GPU, torch's CPU build is smaller",
        )


def _check_memlock(facts: Facts) -> Iterator[Finding]:
    memlock = facts.host.limits.memlock_nbytes
    if memlock is not None and memlock < facts.host.limit_nbytes // 2:
        yield Finding(
            id="memlock-below-memory",
            severity=Severity.NOTE,
            about=_ABOUT,
            problem=f"{format_bytes(memlock)} of memory may be locked (ulimit -l); NVIDIA's driver pins more "
            "all the same, others may refuse",
            fix="where pinning host_memory is refused: docker run --ulimit memlock=-1, or limits.conf",
        )
    if facts.host.container == "wsl":
        yield Finding(
            id="pinned-memory-rationed",
            severity=Severity.NOTE,
            about=_ABOUT,
            problem="under WSL only a part of the memory can be pinned",
            fix="keep host_memory well below half of the memory of Windows",
        )


def _check_link(about: str, gpu: Gpu, link: Link) -> Iterator[Finding]:
    if link.width < link.max_width:
        yield Finding(
            id="gpu-link-narrow",
            severity=Severity.WARNING,
            about=about,
            problem=f"{gpu.name} is linked by {describe_link(link)}: transfers are bound by that",
            fix="seat it in a slot with all lanes that no other card shares, without a riser",
        )
    if link.generation < link.max_generation:
        working = gpu.performance_state is not None and gpu.performance_state <= _AT_WORK
        yield Finding(
            id="gpu-link-slow",
            severity=Severity.WARNING if working else Severity.NOTE,
            about=about,
            problem=f"{gpu.name} is linked by {describe_link(link)}"
            + (" while it works" if working else "; an idle GPU lowers it"),
            fix="look at the slot and the BIOS's PCIe setting"
            if working
            else "offload bench measures the link",
        )


def describe_link(link: Link) -> str:
    """Return `PCIe 3 x8 of 4 x16`; only the first half when the link is at its best.

    >>> describe_link(Link(generation=3, width=8, max_generation=4, max_width=16))
    'PCIe 3 x8 of 4 x16'
    """
    text = f"PCIe {link.generation} x{link.width}"
    if (link.generation, link.width) == (link.max_generation, link.max_width):
        return text
    return f"{text} of {link.max_generation} x{link.max_width}"
