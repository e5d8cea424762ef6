"""The parts of a runtime: made by `compose.py`, driven by `runtime.py` and `step.py`.

Owns nothing by itself; the runtime closes what `closers` lists. No behaviour.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..buffers import Budget
from ..machine import DriveSpeed
from ..optim.arrivals import Arrivals
from ..optim.updater import Updater
from ..store import Store
from ..tiers.activations import Activations
from ..tiers.disk_gradients import DiskGradients
from ..tiers.gradients import Gradients
from ..tiers.masters import Masters
from ..tiers.memory_plan import MemoryPlan
from ..tiers.records import RecordSet
from ..tiers.residents import ResidentRecords
from ..tiers.schedule import Schedule
from ..tiers.transfer import Transfer
from ..trace import Tracer
from ..units import Unit
from .options import RuntimeOptions
from .rng import DeviceRng

__all__ = ["Committed", "Opened", "Parts"]


class Opened:
    """What was opened, in order: closed last to first by `undo` when attaching fails, later by the runtime.

    Attributes:
        undo: closes what was opened, and whatever else is entered into it.
        closers: what the runtime closes.
    """

    def __init__(self, undo: contextlib.ExitStack) -> None:
        self.undo = undo
        self.closers: list[Any] = []

    def own(self, part: Any) -> Any:
        """Take `part` over, to be closed, and return it."""
        self.closers.append(part)
        self.undo.callback(part.close)
        return part


class Committed:
    """How far updates and commits have come; written by the update thread, read by any."""

    def __init__(self, step: int, generation: int) -> None:
        self.committed_step = step
        self.generation = generation

    def committed(self, step: int, generation: int) -> None:
        """Note a commit."""
        self.committed_step, self.generation = step, generation


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What `compose.py` builds and a runtime drives; closed by it, last to first of `closers`."""

    model: torch.nn.Module
    options: RuntimeOptions
    units: tuple[Unit, ...]
    records: Mapping[str, RecordSet]
    plan: MemoryPlan
    schedule: Schedule
    transfer: Transfer
    gradients: Gradients
    activations: Activations
    updater: Updater
    arrivals: Arrivals
    disk_gradients: DiskGradients | None
    masters: Masters
    store: Store | None
    drive_speeds: Mapping[str, DriveSpeed]
    residents: ResidentRecords
    host_budget: Budget
    device_budget: Budget
    rng: DeviceRng
    trace: Tracer
    progress: Committed
    closers: list[Any] = field(default_factory=list)
