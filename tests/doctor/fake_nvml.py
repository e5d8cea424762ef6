"""A stand-in for the module pynvml (nvidia-ml-py 13.615), with what the doctor calls of it."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

__all__ = ["make_nvml"]


class NVMLError(Exception):
    """As pynvml raises for every code but success."""


def make_nvml(gpus: list[dict[str, Any]], *, init_error: str = "", count_error: str = "") -> Any:
    """Return a module for these GPUs; a value that is an NVMLError is raised by its question.

    Its attribute `open` counts the inits without a shutdown.
    """
    nvml: Any = ModuleType("pynvml")
    nvml.NVMLError = NVMLError
    nvml.open = 0

    def init() -> None:
        if init_error:
            raise NVMLError(init_error)
        nvml.open += 1

    def shutdown() -> None:
        nvml.open -= 1

    def count() -> int:
        if count_error:
            raise NVMLError(count_error)
        return len(gpus)

    def ask(key: str) -> Any:
        def question(handle: Any) -> Any:
            assert nvml.open == 1
            value = handle[key]
            if isinstance(value, NVMLError):
                raise value
            return value

        return question

    nvml.nvmlInit = init
    nvml.nvmlShutdown = shutdown
    nvml.nvmlDeviceGetCount = count
    nvml.nvmlSystemGetDriverVersion = lambda: "580.65.06"
    nvml.nvmlDeviceGetHandleByIndex = lambda index: gpus[index]
    nvml.nvmlDeviceGetName = ask("name")
    nvml.nvmlDeviceGetMemoryInfo = ask("memory")
    nvml.nvmlDeviceGetPerformanceState = ask("state")
    nvml.nvmlDeviceGetCurrPcieLinkGeneration = ask("generation")
    nvml.nvmlDeviceGetCurrPcieLinkWidth = ask("width")
    nvml.nvmlDeviceGetMaxPcieLinkGeneration = ask("max_generation")
    nvml.nvmlDeviceGetMaxPcieLinkWidth = ask("max_width")
    return nvml


def gpu(**changes: Any) -> dict[str, Any]:
    """What one GPU answers."""
    return {
        "name": "NVIDIA Example",
        "memory": SimpleNamespace(total=24 << 30, used=1 << 30, free=23 << 30),
        "state": 0,
        "generation": 4,
        "width": 16,
        "max_generation": 4,
        "max_width": 16,
        **changes,
    }
