"""Fine-tune and run models several times larger than memory on one workstation.

    runtime = offload.attach(model, disk=["/mnt/nvme"], host_memory="8GiB", device_memory="20GiB")
    loss = model(**batch).loss
    loss.backward()
    runtime.step()

The names below are imported when they are first used: `offload.aio` and `offload.store` work without
torch, and a command can set the environment before torch reads it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import OffloadError
    from .export.checkpoint import ExportOptions
    from .optim import AdamWOptions
    from .runtime.compose import attach
    from .runtime.options import RuntimeOptions
    from .runtime.runtime import Runtime
    from .runtime.stats import RuntimeStats
    from .sources import WeightSource
    from .specs import Tier
    from .trace import Tracer

__all__ = [
    "AdamWOptions",
    "ExportOptions",
    "OffloadError",
    "Runtime",
    "RuntimeOptions",
    "RuntimeStats",
    "Tier",
    "Tracer",
    "WeightSource",
    "attach",
]

_HOMES = {
    "AdamWOptions": "optim",
    "ExportOptions": "export.checkpoint",
    "OffloadError": "errors",
    "Runtime": "runtime.runtime",
    "RuntimeOptions": "runtime.options",
    "RuntimeStats": "runtime.stats",
    "Tier": "specs",
    "Tracer": "trace",
    "WeightSource": "sources",
    "attach": "runtime.compose",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
