"""The live object over an attached model: it drives a step from first fetch to commit.

Owns the state of a step: which units ran, whose gradients are complete, what was updated. The parts
it drives are made by `compose.py` and are closed here.

[Note: when an update starts] Every forward with a graph announces a backward visit. A record's
gradient is complete when its announced visits have run; its update starts then, while backward goes
on. Whatever was announced and never ran (an output that the loss does not use) is settled by
`step()`, as torch would: with the gradient that there is.

[Note: commits lag] `step()` queues a commit behind the step's updates and returns; the next forward
runs meanwhile, and its first writes come after the commit. `synchronize()` waits for it. After a crash
the run resumes at `committed_step`, which is at most one step behind.

Thread rule: one thread drives the model; backward may run on autograd's thread while that thread
waits in `loss.backward()`.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from .activations import Activations
from .buffers import Budget
from .calls import DroppedCall
from .checkpoint import ExportOptions, export
from .errors import StateError
from .gradients import FinishedGradient, GradientBuffer, Gradients
from .masters import Masters
from .optim import ParameterSettings, StreamedAdamW
from .optim.updater import Update, Updater
from .options import RuntimeOptions
from .placeholders import StreamedGradient, replace_parameters
from .plan import MemoryPlan
from .records import RecordSet
from .residents import ResidentRecords
from .rng import DeviceRng, capture_rng
from .schedule import Pass, Phase, Schedule, Visit, completion_order
from .store import Store
from .stream import StreamedUnit
from .trace import Tracer
from .transfer import Transfer, WeightsOnDevice
from .units import Unit

__all__ = ["Committed", "Parts", "Runtime", "RuntimeStats"]


@dataclass(frozen=True)
class RuntimeStats:
    """Totals since the runtime was attached or since `reset_stats`.

    Attributes:
        steps: optimizer steps.
        disk_read_nbytes: bytes asked from drives.
        disk_written_nbytes: bytes given to drives, manifests aside.
        busy_s: seconds in which each link or worker was busy, by track name.
        stall_s: seconds in which someone waited; included in `busy_s` as "stall".
        host_high_water_nbytes: the most host memory under lease.
        device_high_water_nbytes: the most device memory under lease.
    """

    steps: int
    disk_read_nbytes: int
    disk_written_nbytes: int
    busy_s: Mapping[str, float]
    stall_s: float
    host_high_water_nbytes: int
    device_high_water_nbytes: int


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
    masters: Masters
    store: Store | None
    residents: ResidentRecords | None
    host_budget: Budget
    device_budget: Budget
    rng: DeviceRng
    trace: Tracer
    closers: list[Any] = field(default_factory=list)


class Committed:
    """How far updates and commits have come; written by the update thread, read by any."""

    def __init__(self, step: int, generation: int) -> None:
        self.committed_step = step
        self.generation = generation

    def committed(self, step: int, generation: int) -> None:
        """Note a commit."""
        self.committed_step, self.generation = step, generation


class Runtime:
    """A model attached to the tiers; see the module. Made by `offload.attach`."""

    def __init__(self, parts: Parts, progress: Committed, state: Mapping[str, Any]) -> None:
        self._parts = parts
        self._progress = progress
        self._state = state
        self.rows = parts.options.rows
        self.activations = parts.activations
        self.trace = parts.trace
        self.rng = parts.rng
        # See [Note: the anchor] in stream.py.
        self.anchor = torch.zeros((), requires_grad=True)
        self._global_step = progress.committed_step
        self._steps_counted = 0
        self._schedule = parts.schedule
        self._seen_order: list[str] = []
        self._expected: dict[str, int] = {}
        # [Note: dropped graphs] Forwards whose graph went without a backward (a metric computed without
        # no_grad): the garbage collector, on whatever thread, only notes them here.
        self.dropped: deque[DroppedCall] = deque()
        self._updated: set[str] = set()
        self._settings: dict[str, ParameterSettings] | None = None
        self._failure: BaseException | None = None
        self._running: str | None = None
        self._closed = False
        self.optimizer: StreamedAdamW
        self._streamed: dict[str, StreamedUnit] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def install(
        self,
        optimizer: StreamedAdamW,
        streamed: Mapping[str, StreamedUnit],
        hooks: list[torch.utils.hooks.RemovableHandle],
    ) -> None:
        """Take over the model's units; called once, by `compose.py`."""
        self.optimizer = optimizer
        self._streamed = dict(streamed)
        self._hooks = hooks
        for unit in self._streamed.values():
            unit.install()

    # -- what the user calls -----------------------------------------------------------------

    @property
    def global_step(self) -> int:
        """Optimizer steps done, committed or not."""
        return self._global_step

    @property
    def committed_step(self) -> int:
        """The step a crash now would resume at."""
        return self._progress.committed_step

    @property
    def generation(self) -> int:
        """The newest committed generation of the store, 0 without one."""
        return self._progress.generation

    @property
    def run_id(self) -> str | None:
        """The run's id, None without a disk."""
        return None if self._parts.store is None else self._parts.store.run_id

    @property
    def state(self) -> Mapping[str, Any]:
        """The `state` given at the commit this runtime resumed from; empty for a new run."""
        return self._state

    @property
    def plan(self) -> MemoryPlan:
        """How the budgets are spent."""
        return self._parts.plan

    def step(self, state: Mapping[str, Any] | None = None) -> None:
        """End an optimizer step: settle its updates and queue its commit.

        Args:
            state: JSON-able values to find again in `state` after a resume, such as the position in
                the data.

        Raises:
            StateError: no backward has run since the last step, a visit of this step failed, settings
                of the optimizer changed since the backward, or the runtime is closed.
            TypeError, ValueError: `state` is not JSON.
            OffloadError: background work of this step or an earlier one failed.
        """
        parts = self._parts
        self._check_usable()
        self._count_dropped()
        if not self._updated and not parts.gradients.pending():
            raise StateError("step() without a backward: call loss.backward() on the model's output first")
        # A copy, since the commit lags behind the loop that goes on to change its own.
        user = json.loads(json.dumps(dict(state or {})))
        if self._settings is not None and self._settings != self._present_settings():
            raise StateError(
                "settings of the optimizer (lr, betas, eps, weight_decay) changed between backward() and"
                " step(): updates run during backward and used the ones before; change them behind step()"
            )
        self._settle_unfinished()
        parts.activations.reset()
        self._global_step += 1
        self._steps_counted += 1
        self._learn_order()
        if self._global_step % parts.options.save_steps == 0:
            parts.updater.commit(
                {"step": self._global_step, "rng": capture_rng(), "user": user},
                self._global_step,
            )
        self._expected.clear()
        self._updated.clear()
        self._settings = None

    def synchronize(self) -> None:
        """Wait until every queued update and commit is done.

        Raises:
            OffloadError: one of them failed.
        """
        self._parts.updater.drain()
        self._parts.transfer.check()

    def parameters_by_unit(self) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
        """Stream the true values: fp32 masters of trainable parameters, frozen ones as stored.

        Yields:
            (unit name, values by full parameter name). The values are valid until the next unit.
        """
        self._check_between_steps("parameters_by_unit()")
        self.synchronize()
        self._parts.updater.quiet()
        self._parts.transfer.quiet()
        for owner, record in self._parts.records.items():
            with self._parts.masters.read(record) as values:
                yield owner, values

    def export(self, directory: str | Path, options: ExportOptions | None = None) -> Path:
        """Write the model as a plain Hugging Face directory; see `offload.checkpoint.export`."""
        shapes = {
            spec.name: spec.shape
            for record in self._parts.records.values()
            for spec in (*record.layout.trainable, *record.layout.frozen)
        }
        ordered = {name: shapes[name] for name, _ in self._parts.model.named_parameters() if name in shapes}
        return export(directory, self.parameters_by_unit(), ordered, model=self._parts.model, options=options)

    def stats(self) -> RuntimeStats:
        """Return totals since the start or `reset_stats`."""
        counters = self.trace.counters()
        busy_s = self.trace.busy_s()
        return RuntimeStats(
            steps=self._steps_counted,
            disk_read_nbytes=counters.get("disk_read_nbytes", 0),
            disk_written_nbytes=counters.get("disk_written_nbytes", 0),
            busy_s=busy_s,
            stall_s=busy_s.get("stall", 0.0),
            host_high_water_nbytes=self._parts.host_budget.high_water_nbytes,
            device_high_water_nbytes=self._parts.device_budget.high_water_nbytes,
        )

    def reset_stats(self) -> None:
        """Start the totals over."""
        self._steps_counted = 0
        self.trace.reset()

    def detach(self) -> torch.nn.Module:
        """Bring all values back into the model's parameters, in memory, and close the runtime."""
        values = {
            name: value.clone() for _, unit in self.parameters_by_unit() for name, value in unit.items()
        }
        self.close()
        model = self._parts.model
        replace_parameters(
            model,
            lambda name, parameter: torch.nn.Parameter(
                values[name].to(parameter.dtype), requires_grad=parameter.requires_grad
            ),
        )
        return model

    def close(self) -> None:
        """Finish queued work, give the model its own forward back, and free everything.

        The model's parameters stay placeholders; the run can be resumed. Closing twice is harmless.
        """
        if self._closed:
            return
        self._closed = True
        for unit in self._streamed.values():
            unit.remove()
        for hook in self._hooks:
            hook.remove()
        parts = self._parts
        parts.updater.close()
        parts.transfer.close()
        parts.gradients.discard()
        parts.activations.reset()
        for closer in reversed(parts.closers):
            closer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._closed:
                self.synchronize()
        finally:
            self.close()

    # -- what the units call (UnitHost) ------------------------------------------------------

    def enter(self, visit: Visit, kind: Pass) -> Mapping[str, WeightsOnDevice]:
        """Fetch the weights of a visit; see `Transfer.enter`."""
        self._check_usable()
        if visit.phase is Phase.FORWARD:
            self._check_not_updated(visit.unit)
        if self._running is not None:
            raise StateError(
                f"unit {visit.unit!r} was called while unit {self._running!r} runs: units run one at a time;"
                " call it before or behind, or register it as a part of the other (a child module)"
            )
        if visit.phase is Phase.FORWARD and kind is Pass.TRAIN:
            self._seen_order.append(visit.unit)
        weights = self._parts.transfer.enter(visit, kind)
        self._running = visit.unit
        return weights

    def leave(self, visit: Visit, kind: Pass) -> None:
        """Release the weights of a visit; see `Transfer.leave`."""
        self._running = None
        self._parts.transfer.leave(visit, kind)

    def expect_backward(self, unit: Unit) -> None:
        """See `UnitHost`."""
        self._count_dropped()
        for owner in self._streamed[unit.name].trained_owners:
            self._expected[owner] = self._expected.get(owner, 0) + 1

    def begin_gradients(self, unit: Unit) -> Mapping[str, GradientBuffer]:
        """Lease gradient buffers for the records that `unit` trains."""
        return {
            owner: self._parts.gradients.begin(owner) for owner in self._streamed[unit.name].trained_owners
        }

    def finish_gradients(self, unit: Unit, buffers: Mapping[str, GradientBuffer]) -> None:
        """Hand gradients over; start the update of every record that is complete."""
        self._count_dropped()
        for owner, buffer in buffers.items():
            self._expected[owner] -= 1
            complete = self._expected[owner] == 0
            finished = self._parts.gradients.finish(owner, buffer, complete=complete)
            if finished is not None:
                self._start_update(owner, finished)

    def abandon(self, error: BaseException) -> None:
        """See `UnitHost`."""
        self._failure = self._failure or error

    # -- parts of a step ---------------------------------------------------------------------

    def _start_update(self, owner: str, gradient: FinishedGradient) -> None:
        if self._settings is None:
            # The learning rate of a step is fixed when its first unit is updated.
            self._settings = self._present_settings()
        self._updated.add(owner)
        weights = self._parts.transfer.take_host(owner)
        self._parts.updater.submit(
            Update(owner, weights, gradient, self._settings, step=self._global_step + 1)
        )
        for spec in self._parts.records[owner].layout.trainable:
            parameter = self._parts.model.get_parameter(spec.name)
            parameter.grad = torch.empty_like(parameter).as_subclass(StreamedGradient)

    def _present_settings(self) -> dict[str, ParameterSettings]:
        return {
            name: self.optimizer.settings_for(name)
            for group in self.optimizer.param_groups
            for name in group["param_names"]
        }

    def _settle_unfinished(self) -> None:
        """Update the records whose announced visits did not all run; see [Note: when an update starts]."""
        for owner in self._parts.gradients.pending():
            visit = Visit(owner, Phase.BACKWARD)
            self._parts.transfer.enter(visit, Pass.TRAIN)
            self._start_update(owner, self._parts.gradients.take_partial(owner))
            self._parts.transfer.leave(visit, Pass.TRAIN)

    def _count_dropped(self) -> None:
        """Expect no backward of calls whose graph is gone; see [Note: dropped graphs]."""
        while self.dropped:
            call = self.dropped.popleft()
            for saved in call.saved:
                self._parts.activations.drop(saved)
            if call.step == self._global_step:
                for owner in self._streamed[call.unit].trained_owners:
                    self._expected[owner] -= 1

    def _learn_order(self) -> None:
        order = tuple(self._seen_order)
        self._seen_order.clear()
        if order != self._schedule.order:
            self._schedule = Schedule(order, self._schedule.needs)
            self._parts.transfer.follow(self._schedule)
            self._parts.updater.expect(
                completion_order(order, {name: unit.trained_owners for name, unit in self._streamed.items()})
            )

    def _check_usable(self) -> None:
        if self._closed:
            raise StateError("the runtime is closed: attach the model again")
        if self._failure is not None:
            raise StateError(
                f"a unit of this step failed ({type(self._failure).__name__}: {self._failure}), so the step"
                f" cannot be completed; nothing of it was committed: resume the run at step"
                f" {self.committed_step}"
            ) from self._failure
        self._parts.transfer.check()

    def _check_not_updated(self, unit: str) -> None:
        updated = [owner for owner in self._schedule.needs[unit] if owner in self._updated]
        if updated:
            raise StateError(
                f"unit {unit!r} was already updated in this step: call runtime.step() after every backward."
                " To sum the gradients of a larger batch, give the whole batch to one forward and set rows"
            )

    def _check_between_steps(self, what: str) -> None:
        self._check_usable()
        if self._updated:
            raise StateError(f"{what} in the middle of a step: call runtime.step() first")
