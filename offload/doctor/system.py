"""The facts of the machine, its kernel and the limits of this process.

Read from /proc, /sys and getrlimit; what is not there is left empty. `root` is where /proc, /sys and the
marks of containers lie, so that tests can show another machine.
"""

from __future__ import annotations

import os
import platform
import re
import resource
from pathlib import Path

import psutil

from ..probe import host
from .facts import HostFacts, Limits
from .pcie import read_text

__all__ = ["look_at_host"]

# What the path of a control group tells, in this order: Kubernetes runs other runtimes.
_GROUPS = (
    ("kubepods", "kubernetes"),
    ("docker", "docker"),
    ("libpod", "podman"),
    ("lxc", "lxc"),
)


def look_at_host(root: Path = Path("/")) -> HostFacts:
    """Return the facts of this machine."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    limit = host.memory_nbytes(root)
    cpufreq = root / "sys/devices/system/cpu/cpu0/cpufreq"
    kernel = platform.release()
    cpuinfo = read_text(root / "proc/cpuinfo")
    return HostFacts(
        system=platform.system(),
        kernel=kernel,
        distribution=_distribution(root),
        architecture=platform.machine(),
        container=_container(root, kernel),
        virtual=bool(re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, flags=re.MULTILINE)),
        cpu=host.cpu_name(cpuinfo),
        num_cores=host.num_cores(root),
        num_cpus=os.cpu_count() or 1,
        governor=read_text(cpufreq / "scaling_governor"),
        governor_driver=read_text(cpufreq / "scaling_driver"),
        energy_preference=read_text(cpufreq / "energy_performance_preference"),
        memory_nbytes=memory.total,
        limit_nbytes=limit,
        available_nbytes=min(memory.available, limit),
        swap_nbytes=swap.total,
        swap_used_nbytes=swap.used,
        huge_pages=_chosen(read_text(root / "sys/kernel/mm/transparent_hugepage/enabled")),
        limits=Limits(
            memlock_nbytes=_limit(resource.RLIMIT_MEMLOCK),
            address_space_nbytes=_limit(resource.RLIMIT_AS),
            file_nbytes=_limit(resource.RLIMIT_FSIZE),
            open_files=_limit(resource.RLIMIT_NOFILE),
        ),
    )


def _limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _distribution(root: Path) -> str:
    for line in read_text(root / "etc/os-release").splitlines():
        name, _, value = line.partition("=")
        if name == "PRETTY_NAME":
            return value.strip("\"'")
    return ""


def _container(root: Path, kernel: str) -> str:
    groups = read_text(root / "proc/self/cgroup")
    for mark, name in _GROUPS:
        if mark in groups:
            return name
    if (root / "run/.containerenv").exists():
        return "podman"
    if (root / ".dockerenv").exists():
        return "docker"
    if named := read_text(root / "run/systemd/container"):
        return named
    # WSL is a virtual machine, but one whose memory and drives are rationed as a container's are.
    return "wsl" if "microsoft" in kernel.lower() else ""


def _chosen(options: str) -> str:
    """Return the word in brackets of `always [madvise] never`."""
    match = re.search(r"\[(\w+)\]", options)
    return match[1] if match else ""
