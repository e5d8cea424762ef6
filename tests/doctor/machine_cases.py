"""What can be wrong with software, host, GPU and engine; nothing else is."""

from __future__ import annotations

from dataclasses import replace

from doctor_machines import (
    GPU,
    SOUND,
    SUFFIX,
    with_engine,
    with_extension,
    with_gpu,
    with_host,
    with_limits,
    with_package,
    with_torch,
)

from offload.doctor.facts import Facts, GpuFacts, Link
from offload.doctor.finding import Severity
from offload.sizes import GIB, MIB

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

# A machine, and what is found of it: id, severity, and a part of the problem and of the fix.
MACHINE_CASES: list[tuple[Facts, str, Severity, str, str]] = [
    # Software
    (with_package("numpy", None), "package-missing", ERROR, "numpy is not installed", "'numpy>=1.26'"),
    (
        with_package("torch", "2.9.1+cpu"),
        "package-too-old",
        ERROR,
        "torch is 2.9.1+cpu, and 2.10",
        "torch>=2.10",
    ),
    (
        with_torch(version=None, problem="ImportError: libcudart.so.13"),
        "torch-broken",
        ERROR,
        "libcudart.so.13",
        "--force-reinstall torch",
    ),
    (
        with_torch(version=None, timed_out=True, problem="it did not end within 10 s"),
        "torch-slow",
        WARNING,
        "within 10 s",
        "importtime",
    ),
    (
        with_extension("_aio", problem="not built", files=()),
        "extension-unusable",
        WARNING,
        "not built: transfers go through plain Python",
        "pip install .",
    ),
    (
        with_extension("_adam", problem="not built", files=()),
        "extension-unusable",
        ERROR,
        "no optimizer step",
        "pip",
    ),
    (
        with_extension("_adam", problem="no module", files=("_adam.cpython-312-x86_64-linux-gnu.so",)),
        "extension-unusable",
        ERROR,
        "built for cpython-312-x86_64-linux-gnu, and this Python is cpython-311-x86_64-linux-gnu",
        "pip install .",
    ),
    (
        with_extension("_adam", problem="GLIBC_2.38 not found", files=(f"_adam{SUFFIX}",)),
        "extension-unusable",
        ERROR,
        "GLIBC_2.38 not found",
        "pip install .",
    ),
    (with_extension("_adam", isas=("scalar",)), "no-simd", WARNING, "_adam finds no vector", "AVX2"),
    (with_extension("_aio", isas=("scalar",)), "no-simd", WARNING, "checksums are slow", "AVX2"),
    # Host
    (with_host(system="Darwin"), "not-linux", ERROR, "this is Darwin", "WSL 2"),
    (
        with_host(memory_nbytes=3 * GIB, limit_nbytes=3 * GIB, swap_used_nbytes=0),
        "memory-small",
        WARNING,
        "3.0 GiB",
        "host_memory",
    ),
    (with_host(limit_nbytes=16 * GIB), "memory-limited", NOTE, "16.0 GiB of the 64.0 GiB", "--memory"),
    (with_host(swap_used_nbytes=4 * GIB), "swap-in-use", WARNING, "4.0 GiB of swap", "swapoff"),
    (
        with_limits(address_space_nbytes=GIB),
        "address-space-limited",
        WARNING,
        "1.0 GiB",
        "ulimit -v unlimited",
    ),
    (with_limits(file_nbytes=GIB), "file-size-limited", WARNING, "1.0 GiB", "ulimit -f unlimited"),
    (
        with_host(governor="powersave", governor_driver="acpi-cpufreq", energy_preference=""),
        "cpu-powersave",
        WARNING,
        "acpi-cpufreq, powersave",
        "scaling_governor",
    ),
    (
        with_host(energy_preference="power"),
        "cpu-powersave",
        WARNING,
        "power",
        "energy_performance_preference",
    ),
    (with_host(huge_pages="never"), "huge-pages-off", NOTE, "huge pages are off", "madvise"),
    # GPU
    (
        replace(SOUND, gpu=GpuFacts(source="proc", driver="580.1", gpus=(GPU,), problem="version mismatch")),
        "driver-silent",
        WARNING,
        "version mismatch",
        "reboot",
    ),
    (
        replace(SOUND, gpu=GpuFacts(source="proc", driver="580.1", gpus=(GPU,))),
        "nvml-missing",
        NOTE,
        "nvidia-ml-py",
        "pip install nvidia-ml-py",
    ),
    (
        with_torch(version="2.13.0+cpu", cuda=None, num_gpus=0),
        "torch-without-cuda",
        WARNING,
        "NVIDIA Example",
        "CUDA build",
    ),
    (
        with_torch(num_gpus=0),
        "torch-sees-no-gpu",
        WARNING,
        "driver 580.65.06 has 1",
        "new enough for CUDA 13.0",
    ),
    (
        replace(with_torch(num_gpus=0), host=with_host(container="docker").host),
        "torch-sees-no-gpu",
        WARNING,
        "sees no GPU",
        "--gpus all",
    ),
    (
        replace(with_torch(num_gpus=0), gpu=GpuFacts()),
        "no-gpu",
        WARNING,
        "CUDA 13.0 and there is no GPU",
        "CPU build",
    ),
    (with_torch(problem="CUDA error 803"), "torch-gpu-failed", WARNING, "CUDA error 803", "nvidia-smi"),
    (with_limits(memlock_nbytes=8 * MIB), "memlock-below-memory", NOTE, "8.0 MiB", "memlock=-1"),
    (with_host(container="wsl"), "pinned-memory-rationed", NOTE, "WSL", "half"),
    (
        with_gpu(link=Link(generation=4, width=8, max_generation=4, max_width=16)),
        "gpu-link-narrow",
        WARNING,
        "PCIe 4 x8 of 4 x16",
        "slot",
    ),
    (
        with_gpu(link=Link(generation=1, width=16, max_generation=4, max_width=16)),
        "gpu-link-slow",
        WARNING,
        "PCIe 1 x16 of 4 x16 while it works",
        "BIOS",
    ),
    (
        with_gpu(link=Link(generation=1, width=16, max_generation=4, max_width=16), performance_state=8),
        "gpu-link-slow",
        NOTE,
        "an idle GPU lowers it",
        "offload bench",
    ),
    (with_gpu(used_nbytes=20 * GIB), "gpu-memory-in-use", NOTE, "20.0 GiB of 24.0 GiB", "device_memory"),
    # Engine
    (
        with_engine(asked="urin", chosen=None),
        "engine-asked-for-missing",
        ERROR,
        "no such engine, only uring, threads, portable",
        "unset OFFLOAD_IO_ENGINE",
    ),
    (
        with_engine(chosen=None, available=(), refused=(("threads", "EAGAIN"),)),
        "no-engine",
        ERROR,
        "threads: EAGAIN",
        "pip install .",
    ),
    (with_engine(asked="threads", chosen="threads"), "engine-asked-for", NOTE, "asks for threads", "unset"),
]
