"""The device tier: an arena under a budget, copies on their own streams, events. CUDA or a stand-in."""

from .arena import DeviceArena
from .cpu import CpuDevice
from .cuda import CudaDevice
from .opening import open_device
from .protocol import Device, Event

__all__ = ["CpuDevice", "CudaDevice", "Device", "DeviceArena", "Event", "open_device"]
