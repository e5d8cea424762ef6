"""A training plan, or what stands in its way: the two answers for one choice of home and formats.

No behaviour beyond figures derived from their own fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..runtime.options import RuntimeOptions
from ..specs import Tier
from ..tiers.memory_plan import MemoryPlan
from .times import Link
from .traffic import Traffic

__all__ = ["Lack", "TrainingPlan"]


@dataclass(frozen=True)
class TrainingPlan:
    """Where everything lives in a run that fits, and what a step of it costs.

    Attributes:
        options: what the run is to be attached with; its budgets are those that make the runtime lay its
            memory out as `memory` says.
        memory: as the runtime lays it out.
        batch: rows of a step.
        length: tokens of a row.
        num_parameters: of the model.
        num_units: that it is cut into.
        traffic: bytes of a step.
        links: busy times of a step.
        step_s: seconds of a step.
        bottleneck: name of the link that sets it.
        host_nbytes: the most host memory under lease, saved inputs as large as the batch needs.
        device_nbytes: the most device memory: the runtime's, and an estimate of torch's temporaries.
        temporaries_nbytes: of `device_nbytes`, the estimate.
        uncached_nbytes: of records that are on disk and not in host memory.
        drives_nbytes: that the state takes on each drive, in the machine's order.
        step_written_nbytes: written to all drives by one step.
        steps_to_tbw: steps until every drive has taken what it is rated for; None when not asked, or never.
        notes: what to know about the figures.
    """

    options: RuntimeOptions
    memory: MemoryPlan
    batch: int
    length: int
    num_parameters: int
    num_units: int
    traffic: Traffic
    links: tuple[Link, ...]
    step_s: float
    bottleneck: str
    host_nbytes: int
    device_nbytes: int
    temporaries_nbytes: int
    uncached_nbytes: int
    drives_nbytes: tuple[int, ...]
    step_written_nbytes: int
    steps_to_tbw: float | None
    notes: tuple[str, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Tokens learned from in a second."""
        return self.batch * self.length / self.step_s

    @property
    def drive_nbytes(self) -> int:
        """Bytes that the state takes on the drive with the largest share of it; 0 without drives."""
        return max(self.drives_nbytes, default=0)

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return self.options.rows or self.batch

    @property
    def settings(self) -> Mapping[str, object]:
        """Keys of `offload.attach` with their values, without the directories."""
        options = self.options
        chosen: dict[str, object] = {
            "home": options.resolved_home.value,
            "host_memory": options.host_memory,
            "device_memory": options.device_memory,
            "dtype": options.dtype,
            "moments": options.moments,
            "compute_dtype": options.compute_dtype,
            "rows": options.rows,
            "save_steps": options.save_steps,
        }
        if options.activations_disk_nbytes:
            chosen["activations_disk_nbytes"] = options.activations_disk_nbytes
        if options.host_cache_nbytes:
            chosen["host_cache_nbytes"] = options.host_cache_nbytes
        optional = {
            "max_grad_norm": options.max_grad_norm,
            "gradient_dtype": options.gradient_dtype,
            "activations_nbytes": options.activations_nbytes,
            "commit": None if options.commit else False,
        }
        return chosen | {key: value for key, value in optional.items() if value is not None}


@dataclass(frozen=True)
class Lack:
    """Why a choice does not fit.

    Attributes:
        tier: what is too small.
        needed_nbytes: that it would take; on drives, on each of them.
        limit_nbytes: that there are.
        reason: what needs them, in words.
    """

    tier: Tier
    needed_nbytes: int
    limit_nbytes: int
    reason: str

    @property
    def missing_nbytes(self) -> int:
        """Bytes that are not there."""
        return self.needed_nbytes - self.limit_nbytes
