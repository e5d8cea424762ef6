"""The extension `offload._aio`, or the reason why this installation has none. Nothing else."""

from __future__ import annotations

__all__ = ["extension", "missing_reason"]

# Empty when there is an `extension`; else `extension` does not exist.
missing_reason: str = ""
try:
    from offload import _aio as extension
except ImportError as error:
    missing_reason = f"the extension offload._aio is not built ({error})"
