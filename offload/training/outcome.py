"""What a run did beside what its plan said: time, bytes of each link, peaks. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..planner import TrainingPlan
from ..runtime.stats import RuntimeStats
from ..sizes import format_bytes, format_time
from .progress import format_amount

__all__ = ["Figure", "compare_with_plan", "outcome_lines"]

# The first step warms up, so it is not compared.
_WARM_UP = 1


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a run.

    Attributes:
        name: its key in the metrics.
        predicted: by the plan: seconds or bytes, as the name's end says.
        measured: in this run.
    """

    name: str
    predicted: float
    measured: float

    @property
    def difference(self) -> float | None:
        """By how much of the prediction the measurement is more; None where nothing was predicted."""
        return None if not self.predicted else self.measured / self.predicted - 1


def compare_with_plan(
    plan: TrainingPlan, records: Sequence[Mapping[str, Any]], stats: RuntimeStats
) -> tuple[Figure, ...]:
    """Return every figure that the plan has and the run measured; none of a run of a single step.

    Args:
        plan: that was obeyed.
        records: of the steps that this process took, as in the metrics.
        stats: at the end of the run.
    """
    steps = records[_WARM_UP:]
    if not steps:
        return ()
    traffic = plan.traffic

    def median(key: str) -> float:
        return statistics.median(float(record[key]) for record in steps)

    return (
        Figure("step_s", plan.step_s, median("seconds")),
        Figure("disk_read_nbytes", traffic.disk_read_nbytes, median("disk_read_nbytes")),
        # Of all steps: writes lag behind, and commits that are some steps apart write in few of them.
        Figure("disk_written_nbytes", traffic.disk_written_nbytes, stats.disk_written_nbytes / len(records)),
        Figure("to_device_nbytes", traffic.to_device_nbytes, median("to_device_nbytes")),
        Figure("to_host_nbytes", traffic.to_host_nbytes, median("to_host_nbytes")),
        Figure("host_peak_nbytes", plan.host_nbytes, stats.host_high_water_nbytes),
        Figure("device_peak_nbytes", plan.memory.device_nbytes, stats.device_high_water_nbytes),
    )


def outcome_lines(figures: Sequence[Figure]) -> tuple[str, ...]:
    """Return a table of the figures, a line each; empty without figures."""
    if not figures:
        return ()
    rows = [("", "predicted", "measured", "difference")]
    for figure in figures:
        difference = "-" if figure.difference is None else f"{100 * figure.difference:+.1f} %"
        rows.append(
            (_WORDS[figure.name], _show(figure, figure.predicted), _show(figure, figure.measured), difference)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return tuple(
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]).rstrip()
        for row in rows
    )


_WORDS = {
    "step_s": "time of a step",
    "disk_read_nbytes": "read from disk",
    "disk_written_nbytes": "written to disk",
    "to_device_nbytes": "to the device",
    "to_host_nbytes": "from the device",
    "host_peak_nbytes": "host memory",
    "device_peak_nbytes": "device memory under lease",
}


def _show(figure: Figure, value: float) -> str:
    if figure.name == "step_s":
        return format_time(value)
    return format_bytes(int(value)) if "peak" in figure.name else format_amount(value)
