"""Chooses and opens the device that a configuration names."""

from __future__ import annotations

import torch

from ..errors import PlanError
from .cpu import CpuDevice
from .cuda import CudaDevice
from .protocol import Device

__all__ = ["open_device"]


def open_device(name: str | torch.device | None = None, *, device_memory: int) -> Device:
    """Open a device with a budget of `device_memory` bytes.

    Args:
        name: `cpu` (the stand-in), `cuda` (torch's current GPU) or `cuda:1`; None takes a GPU where
            torch sees one, else the CPU.

    Raises:
        PlanError: there is no such device here.
        CapacityError: the GPU has less memory free than `device_memory`.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        asked = torch.device(name)
    except RuntimeError as error:
        raise PlanError(f"device {name!r} is not a device name; write cpu, cuda or cuda:0") from error
    if asked.type == "cpu":
        return CpuDevice(device_memory=device_memory)
    if asked.type != "cuda":
        raise PlanError(f"device {str(asked)!r} is not supported; use cpu, cuda or cuda:0")
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        raise PlanError(
            f"device {str(asked)!r} was asked for, but torch {torch.__version__} (built with {built}) sees "
            f"no CUDA device; check nvidia-smi, install a CUDA build of torch, or use the device cpu"
        )
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if asked.index is None else asked.index
    if index >= count:
        raise PlanError(
            f"device {str(asked)!r} was asked for, but torch sees {count}: cuda:0 to cuda:{count - 1}"
        )
    return CudaDevice(index, device_memory=device_memory)
