"""A bench as JSON: stable keys, a version of the schema, every raw sample.

Within one schema version keys are only added. Sizes are bytes, times seconds, rates bytes per second;
`bytes_per_s` of a sample includes its flush, as in the tables. Infinities and NaN never occur.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, Literal

from ..machine import IoSetting
from ..probe.results import BenchResult, Cell
from .sections import best_setting, drive_groups

__all__ = ["SCHEMA", "bench_document", "to_json"]

SCHEMA: Literal["offload-bench-1"] = "offload-bench-1"


def bench_document(result: BenchResult) -> dict[str, Any]:
    """Return `result` as what JSON can hold."""
    return {
        "schema": SCHEMA,
        "measured_at": result.machine.measured_at,
        "drives": [asdict(drive) for drive in result.drives],
        "cells": [_cell(cell) for cell in result.cells],
        "best": [_best(result, group) for group in drive_groups(result)],
        "sustained": [asdict(run) for run in result.sustained],
        "machine": asdict(result.machine),
        "notes": list(result.notes),
    }


def to_json(result: BenchResult) -> str:
    """Return `result` as indented JSON text, ending in a newline."""
    return json.dumps(bench_document(result), indent=2, allow_nan=False) + "\n"


def _cell(cell: Cell) -> dict[str, Any]:
    rates = [sample.bytes_per_s for sample in cell.samples]
    bandwidth = None
    if rates:
        bandwidth = {
            "median_bytes_per_s": cell.bytes_per_s,
            "min_bytes_per_s": min(rates),
            "max_bytes_per_s": max(rates),
            "cpu_s_per_gb": cell.cpu_s_per_gb,
        }
    return {
        "pattern": cell.workload.pattern,
        "mode": cell.workload.mode,
        "drives": list(cell.workload.drives),
        **_setting(cell.workload.setting),
        "bandwidth": bandwidth,
        "latency": asdict(cell.latency) if cell.latency is not None else None,
        "samples": [{**asdict(sample), "bytes_per_s": sample.bytes_per_s} for sample in cell.samples],
    }


def _best(result: BenchResult, group: tuple[int, ...]) -> dict[str, Any]:
    setting = best_setting(result, group)
    return {"drives": list(group), "setting": None if setting is None else _setting(setting)}


def _setting(setting: IoSetting) -> dict[str, int]:
    return {"segment_nbytes": setting.segment_nbytes, "queue_depth": setting.queue_depth}
