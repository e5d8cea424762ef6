"""A training plan, or what stands in its way: the two answers for one choice of home and formats.

A plan is obeyed by `offload.attach(model, plan)`, which takes its options from `options_for`. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..runtime.options import RuntimeOptions
from ..specs import Tier
from ..tiers.memory_plan import MemoryPlan
from ..units import Unit
from .times import Link
from .traffic import Traffic

__all__ = ["Lack", "TrainingPlan"]

# Options that change neither memory, nor bytes, nor time: who attaches chooses them.
_OPEN = frozenset(
    {
        "disk",
        "device",
        "optimizer",
        "on_non_finite",
        "max_non_finite_steps",
        "max_rollbacks",
        "room_for_snapshot",
        "run_id",
        "resume",
        "io_engine",
        "queue_depth",
        "segment_nbytes",
    }
)


@dataclass(frozen=True)
class TrainingPlan:
    """Where everything lives in a run that fits, and what a step of it costs.

    Attributes:
        options: what the run is to be attached with; its budgets are those that make the runtime lay its
            memory out as `memory` says.
        memory: as the runtime lays it out.
        batch: rows of a step.
        length: tokens of a row.
        units: that the model is cut into.
        num_parameters: of the model.
        traffic: bytes of a step.
        links: busy times of a step.
        step_s: seconds of a step.
        bottleneck: name of the link that sets it.
        host_nbytes: the most host memory under lease.
        device_nbytes: the most device memory: the runtime's, and an estimate of torch's temporaries.
        temporaries_nbytes: of `device_nbytes`, the estimate.
        uncached_nbytes: of records that are on disk and not in host memory.
        drives_nbytes: that the state takes on each drive, in the machine's order.
        snapshot_nbytes: that a snapshot takes beside it on each drive; 0 when none is taken.
        step_written_nbytes: written to all drives by one step.
        steps_to_tbw: steps until every drive has taken what it is rated for; None when not asked, or never.
        notes: what to know about the figures.
    """

    options: RuntimeOptions
    memory: MemoryPlan
    batch: int
    length: int
    units: tuple[Unit, ...]
    num_parameters: int
    traffic: Traffic
    links: tuple[Link, ...]
    step_s: float
    bottleneck: str
    host_nbytes: int
    device_nbytes: int
    temporaries_nbytes: int
    uncached_nbytes: int
    drives_nbytes: tuple[int, ...]
    snapshot_nbytes: int
    step_written_nbytes: int
    steps_to_tbw: float | None
    notes: tuple[str, ...] = ()

    @property
    def num_units(self) -> int:
        """Units that the model is cut into."""
        return len(self.units)

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

    def options_for(self, cuts: Iterable[Sequence[Unit]], settings: Mapping[str, Any]) -> RuntimeOptions:
        """Return what to attach the planned model with.

        Args:
            cuts: of the model that is to be attached, the coarsest first; one of them is the plan's.
            settings: options that the plan leaves open: directories, `run_id`, `resume`, `optimizer`, ...

        Raises:
            ConfigError: the model is another one, with what differs; or a setting is decided by the plan.
        """
        decided = [name for name in settings if name not in _OPEN]
        if decided:
            raise ConfigError(
                f"the plan decides {', '.join(decided)}: leave that out, or ask for a plan with another value"
            )
        found = [_differences(self.units, units) for units in cuts]
        if all(found):
            differences = found[0]
            raise ConfigError(
                f"the plan is for another model: {differences[0]}"
                + (f", and {len(differences) - 1} more" if len(differences) > 1 else "")
                + "; plan this one"
            )
        disk = settings.get("disk", self.options.disk)
        given = {**settings, "disk": (disk,) if isinstance(disk, (str, Path)) else tuple(disk)}
        if len(given["disk"]) != len(self.options.disk):
            raise ConfigError(
                f"the plan is for {len(self.options.disk)} drives, and {len(given['disk'])} are given: plan"
                " for those"
            )
        return replace(self.options, **given)

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


def _differences(planned: Sequence[Unit], found: Sequence[Unit]) -> list[str]:
    """Return in words which parameters are not those of the plan, and which lie in other units."""
    before, after = _parameters(planned), _parameters(found)
    words = []
    for name in dict.fromkeys((*before, *after)):
        if name not in after:
            words.append(f"{name} is not in this one")
        elif name not in before:
            words.append(f"{name} is not in the plan")
        elif before[name] != after[name]:
            words.append(f"{name} is {after[name]}, and {before[name]} in the plan")
    return words


def _parameters(units: Sequence[Unit]) -> dict[str, str]:
    """Return each parameter by name: its shape, whether it is trained, the unit that owns it."""
    return {
        spec.name: f"{list(spec.shape)} {kind} in unit {unit.name}"
        for unit in units
        for kind, specs in (("trained", unit.layout.trainable), ("frozen", unit.layout.frozen))
        for spec in specs
    }
