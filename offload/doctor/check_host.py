"""What is wrong with the machine, its memory and limits, and the I/O engines it allows. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..aio.select import ENGINE_VARIABLE
from ..sizes import GIB, MIB, format_bytes
from .facts import EngineFacts, HostFacts, SoftwareFacts
from .finding import Finding, Severity

__all__ = ["check_engine", "check_host"]

_HOST, _ENGINE = "host", "I/O engine"

# torch and its libraries take about 1 GiB; the smallest run measured, 1 GiB of budgets more.
_LEAST_MEMORY_NBYTES = 4 * GIB

# Used swap is normal on a machine that was busy once; this share of memory is not.
_MUCH_SWAP = 0.05

# Rings are counted as locked memory before Linux 5.12; one of 4096 entries takes 0.4 MiB, one a drive.
_RING_COUNTED_BEFORE = (5, 12)
_RINGS_NBYTES = 2 * MIB

# These vary the frequency under any governor; `powersave` is their normal setting.
_SELF_GOVERNED = ("intel_pstate", "amd-pstate-epp")


def check_host(host: HostFacts) -> Iterator[Finding]:
    """Yield what is wrong with the machine."""
    if host.system != "Linux":
        yield Finding(
            id="not-linux",
            severity=Severity.ERROR,
            about=_HOST,
            problem=f"this is {host.system}, and offload runs on Linux alone",
            fix="use Linux, or WSL 2 on Windows",
        )
    yield from _check_memory(host)
    yield from _check_limits(host)
    yield from _check_processor(host)
    if host.huge_pages == "never":
        yield Finding(
            id="huge-pages-off",
            severity=Severity.NOTE,
            about=_HOST,
            problem="transparent huge pages are off: the first use of a large buffer is slower",
            fix="echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )


def _check_memory(host: HostFacts) -> Iterator[Finding]:
    if host.limit_nbytes < _LEAST_MEMORY_NBYTES:
        yield Finding(
            id="memory-small",
            severity=Severity.WARNING,
            about=_HOST,
            problem=f"this process may use {format_bytes(host.limit_nbytes)} of memory, of which torch takes "
            "about 1 GiB",
            fix="give it more; or keep host_memory, and with the CPU device_memory too, to some hundred MiB",
        )
    if host.limit_nbytes < host.memory_nbytes:
        yield Finding(
            id="memory-limited",
            severity=Severity.NOTE,
            about=_HOST,
            problem=f"a control group allows {format_bytes(host.limit_nbytes)} of the "
            f"{format_bytes(host.memory_nbytes)} of memory",
            fix="keep host_memory below that, or raise it: docker run --memory, systemd MemoryMax=",
        )
    if host.swap_used_nbytes > _MUCH_SWAP * host.memory_nbytes:
        yield Finding(
            id="swap-in-use",
            severity=Severity.WARNING,
            about=_HOST,
            problem=f"{format_bytes(host.swap_used_nbytes)} of swap are in use: what is kept in memory may "
            "wait for a drive",
            fix="end what else runs, or lower host_memory; then: sudo swapoff -a && sudo swapon -a",
        )


def _check_limits(host: HostFacts) -> Iterator[Finding]:
    limits = host.limits
    if limits.address_space_nbytes is not None:
        yield Finding(
            id="address-space-limited",
            severity=Severity.WARNING,
            about=_HOST,
            problem=f"virtual memory is limited to {format_bytes(limits.address_space_nbytes)}, and CUDA "
            "reserves many times what it uses",
            fix="ulimit -v unlimited",
        )
    if limits.file_nbytes is not None:
        yield Finding(
            id="file-size-limited",
            severity=Severity.WARNING,
            about=_HOST,
            problem=f"files are limited to {format_bytes(limits.file_nbytes)}, and a run keeps its state in "
            "one file a drive",
            fix="ulimit -f unlimited",
        )
    memlock = limits.memlock_nbytes
    if memlock is not None and memlock < _RINGS_NBYTES and _kernel(host) < _RING_COUNTED_BEFORE:
        yield Finding(
            id="memlock-low",
            severity=Severity.WARNING,
            about=_HOST,
            problem=f"{format_bytes(memlock)} of memory may be locked, and Linux {host.kernel} counts the "
            "rings of io_uring, one a drive, as locked",
            fix="raise memlock in /etc/security/limits.conf, or: docker run --ulimit memlock=-1",
        )


def _check_processor(host: HostFacts) -> Iterator[Finding]:
    if host.governor_driver in _SELF_GOVERNED:
        slow, setting = host.energy_preference == "power", "energy_performance_preference"
        normal = "balance_performance"
    else:
        slow, setting, normal = host.governor == "powersave", "scaling_governor", "performance"
    if slow:
        yield Finding(
            id="cpu-powersave",
            severity=Severity.WARNING,
            about=_HOST,
            problem=f"the processor is held at its lowest frequencies ({host.governor_driver or 'cpufreq'}, "
            f"{host.energy_preference or host.governor})",
            fix=f"echo {normal} | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/{setting}",
        )


def check_engine(engine: EngineFacts, host: HostFacts, software: SoftwareFacts) -> Iterator[Finding]:
    """Yield what is wrong with the choice of the I/O engine."""
    reasons: dict[str, str] = dict(engine.refused)
    if engine.asked and engine.chosen is None:
        why = reasons.get(engine.asked, f"there is no such engine, only {', '.join(_names(engine))}")
        yield Finding(
            id="engine-asked-for-missing",
            severity=Severity.ERROR,
            about=_ENGINE,
            problem=f"{ENGINE_VARIABLE} asks for {engine.asked}: {why}",
            fix=f"unset {ENGINE_VARIABLE}",
        )
    elif engine.chosen is None:
        yield Finding(
            id="no-engine",
            severity=Severity.ERROR,
            about=_ENGINE,
            problem="none can be used: " + "; ".join(f"{name}: {why}" for name, why in engine.refused),
            fix="in the checkout: python3 -m pip install . (it needs g++ and python3-dev)",
        )
    elif engine.asked and engine.asked != "uring" and "uring" in engine.available:
        yield Finding(
            id="engine-asked-for",
            severity=Severity.NOTE,
            about=_ENGINE,
            problem=f"{ENGINE_VARIABLE} asks for {engine.asked}, and io_uring would work",
            fix=f"unset {ENGINE_VARIABLE}",
        )
    without = any(extension.name == "_aio" and extension.problem for extension in software.extensions)
    # Without the extension that is what has to be mended, and it is said there.
    if "uring" in reasons and not without:
        yield Finding(
            id="io-uring-refused",
            severity=Severity.WARNING,
            about=_ENGINE,
            problem=f"io_uring cannot be used: {reasons['uring']}; threads do the same with more CPU time",
            fix=_uring_fix(reasons["uring"], host),
        )


def _uring_fix(reason: str, host: HostFacts) -> str:
    if "kernel.io_uring_disabled" in reason:
        return "sudo sysctl kernel.io_uring_disabled=0"
    if "ulimit -l" in reason:
        return "raise memlock in /etc/security/limits.conf, or: docker run --ulimit memlock=-1"
    old = _kernel(host) < (5, 6)
    if "seccomp" in reason and not old:
        if host.container == "podman":
            return "podman run --security-opt seccomp=unconfined, or a profile that allows io_uring_*"
        if host.container in ("", "docker"):
            return "docker run --security-opt seccomp=unconfined, or a profile that allows io_uring_*"
        return "let the container's seccomp profile allow io_uring_setup, io_uring_enter, io_uring_register"
    return "use Linux 5.6 or newer, built with CONFIG_IO_URING"


def _names(engine: EngineFacts) -> tuple[str, ...]:
    return (*engine.available, *(name for name, _ in engine.refused))


def _kernel(host: HostFacts) -> tuple[int, ...]:
    """Return the first two numbers of the kernel's release."""
    return tuple(map(int, re.findall(r"\d+", host.kernel)[:2]))
