"""What the doctor learns of the machine, from files as kernels and containers write them."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

import psutil
import pytest

from offload.doctor.system import look_at_host


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "container"),
    [
        ({}, ""),
        ({".dockerenv": ""}, "docker"),
        ({"run/.containerenv": ""}, "podman"),
        ({".dockerenv": "", "run/.containerenv": ""}, "podman"),
        ({"run/systemd/container": "systemd-nspawn\n"}, "systemd-nspawn"),
        ({"proc/self/cgroup": "0::/kubepods.slice/docker-1.scope\n"}, "kubernetes"),
        ({"proc/self/cgroup": "3:memory:/docker/0123\n"}, "docker"),
        ({"proc/self/cgroup": "0::/user.slice/session-1.scope\n"}, ""),
    ],
)
def test_a_container_is_known_by_its_marks(tmp_path, files, container):
    assert look_at_host(write(tmp_path, files)).container == container


def test_wsl_is_known_by_its_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    assert look_at_host(tmp_path).container == "wsl"


def test_processor_governor_and_pages_are_read(tmp_path):
    cpufreq = "sys/devices/system/cpu/cpu0/cpufreq/"
    found = look_at_host(
        write(
            tmp_path,
            {
                "proc/cpuinfo": "model name\t: Example CPU\nflags\t\t: fpu avx2 hypervisor\n",
                "etc/os-release": 'NAME="x"\nPRETTY_NAME="Example Linux 1"\n',
                cpufreq + "scaling_governor": "powersave\n",
                cpufreq + "scaling_driver": "intel_pstate\n",
                cpufreq + "energy_performance_preference": "balance_performance\n",
                "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
            },
        )
    )
    assert (found.cpu, found.virtual, found.distribution) == ("Example CPU", True, "Example Linux 1")
    assert (found.governor, found.governor_driver) == ("powersave", "intel_pstate")
    assert (found.energy_preference, found.huge_pages) == ("balance_performance", "never")


def test_what_is_not_there_is_empty(tmp_path):
    found = look_at_host(tmp_path)
    assert (found.distribution, found.governor, found.huge_pages, found.virtual) == ("", "", "", False)


def test_the_limit_of_a_control_group_bounds_what_is_available(tmp_path):
    found = look_at_host(
        write(tmp_path, {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "1000000\n"})
    )
    assert found.memory_nbytes == psutil.virtual_memory().total
    assert (found.limit_nbytes, found.available_nbytes) == (1_000_000, 1_000_000)


def test_limits_are_those_of_this_process(monkeypatch):
    limits = {resource.RLIMIT_MEMLOCK: 65536, resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_FSIZE: 1 << 30}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits.get(which, resource.RLIM_INFINITY), -1))
    found = look_at_host().limits
    assert (found.memlock_nbytes, found.open_files, found.file_nbytes) == (65536, 1024, 1 << 30)
    assert found.address_space_nbytes is None
