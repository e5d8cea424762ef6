"""Every harness by name: one for each parser of bytes that somebody else may have touched."""

from __future__ import annotations

from fuzz import model_parsers, run_parsers, setting_parsers, store_parsers

__all__ = ["HARNESSES"]

HARNESSES = {
    harness.name: harness
    for module in (store_parsers, setting_parsers, model_parsers, run_parsers)
    for harness in module.HARNESSES
}
