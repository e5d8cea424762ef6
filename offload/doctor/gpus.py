"""The NVIDIA GPUs of this machine: by NVML where nvidia-ml-py is installed, else from /proc and /sys.

Nothing here uses a GPU: no context is made on it and none of its memory is taken. A GPU that does not
tell one thing (a laptop's memory clock, a virtual GPU's link) still tells the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from .facts import Gpu, GpuFacts, Link
from .pcie import link_of, read_text

__all__ = ["look_at_gpus"]

Answer = TypeVar("Answer")

# NVML's performance states are P0 to P15; 32 stands for unknown.
_LAST_STATE = 15


def look_at_gpus(root: Path = Path("/")) -> GpuFacts:
    """Return what the NVIDIA driver says.

    Args:
        root: where /proc and /sys lie.

    Source: the NVML API reference, device queries.
    """
    try:
        import pynvml as nvml
    except ImportError:
        return _from_proc(root)
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        # Without a driver there is nothing to say; with one, why NVML does not speak to it.
        known = _from_proc(root)
        return GpuFacts(source=known.source, driver=known.driver, gpus=known.gpus, problem=str(error))
    try:
        gpus = tuple(_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
        return GpuFacts(source="nvml", driver=nvml.nvmlSystemGetDriverVersion(), gpus=gpus)
    except nvml.NVMLError as error:
        return GpuFacts(source="nvml", problem=str(error))
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: ModuleType, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(question: Callable[..., Answer]) -> Answer | None:
        try:
            return question(handle)
        except nvml.NVMLError:
            return None  # NotSupported, mostly: by this GPU or this driver

    memory = ask(nvml.nvmlDeviceGetMemoryInfo)
    state = ask(nvml.nvmlDeviceGetPerformanceState)
    return Gpu(
        name=nvml.nvmlDeviceGetName(handle),
        memory_nbytes=None if memory is None else int(memory.total),
        used_nbytes=None if memory is None else int(memory.used),
        link=_link(
            ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration),
            ask(nvml.nvmlDeviceGetCurrPcieLinkWidth),
            ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
            ask(nvml.nvmlDeviceGetMaxPcieLinkWidth),
        ),
        performance_state=state if state is not None and 0 <= state <= _LAST_STATE else None,
    )


def _link(
    generation: int | None, width: int | None, max_generation: int | None, max_width: int | None
) -> Link | None:
    # Zeros come from virtual GPUs, which have no link of their own.
    if not (generation and width and max_generation and max_width):
        return None
    return Link(generation=generation, width=width, max_generation=max_generation, max_width=max_width)


def _from_proc(root: Path) -> GpuFacts:
    """Return what the driver shows without NVML: its version, names and, from /sys, links."""
    driver = root / "proc/driver/nvidia"
    version = re.search(r"Kernel Module(?: for \w+)?\s+(\d+(?:\.\d+)+)", read_text(driver / "version"))
    try:
        folders = sorted((driver / "gpus").iterdir())
    except OSError:
        folders = []
    gpus = []
    for folder in folders:
        model = re.search(r"^Model:\s*(.+)$", read_text(folder / "information"), flags=re.MULTILINE)
        link = link_of(root / "sys/bus/pci/devices" / folder.name)
        gpus.append(Gpu(name=model[1].strip() if model else folder.name, link=link))
    if version is None and not gpus:
        return GpuFacts()
    return GpuFacts(source="proc", driver=version[1] if version else "", gpus=tuple(gpus))
