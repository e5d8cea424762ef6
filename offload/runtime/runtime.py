"""The live object over an attached model: it drives a step from first fetch to commit.

The step in progress is `step.py`. The parts are made by `compose.py` and are closed here.

[Note: commits lag] `step()` queues a commit behind the step's updates and returns; the next forward
runs meanwhile, and its first writes come after the commit. `synchronize()` waits for it. After a crash
the run resumes at `committed_step`, which is at most one step behind.

Thread rule: one thread drives the model; backward may run on autograd's thread while that thread
waits in `loss.backward()`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from ..errors import StateError
from ..export.checkpoint import ExportOptions, export
from ..optim import StreamedAdamW
from ..optim.norms import GlobalNorm
from ..store import SnapshotInfo
from ..tiers.memory_plan import MemoryPlan
from .chunked_loss import ChunkedLoss
from .parts import Parts
from .placeholders import replace_parameters
from .rng import capture_rng
from .rollback import Rollback, Snapshots
from .stats import RuntimeStats
from .step import Step
from .stream import StreamedUnit

__all__ = ["Runtime"]

_log = logging.getLogger("offload")


class Runtime:
    """A model attached to the tiers; see the module. Made by `offload.attach`."""

    def __init__(self, parts: Parts, step: Step, state: Mapping[str, Any]) -> None:
        self._parts = parts
        self._step = step
        self._state = state
        self.trace = parts.trace
        self._steps_counted = 0
        self._grad_norm: float | None = None
        self._snapshots = Snapshots(parts, step)
        self._uncommitted: Mapping[str, Any] | None = None
        self._skipped = self._skipped_in_a_row = 0
        self._closed = False
        self.optimizer: StreamedAdamW
        self._streamed: dict[str, StreamedUnit] = {}
        self._loss: ChunkedLoss | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def install(
        self,
        optimizer: StreamedAdamW,
        streamed: Mapping[str, StreamedUnit],
        hooks: list[torch.utils.hooks.RemovableHandle],
        loss: ChunkedLoss | None,
    ) -> None:
        """Take over the model's units; called once, by `compose.py`."""
        self.optimizer = optimizer
        self._streamed, self._hooks = dict(streamed), hooks
        self._step.install(optimizer, self._streamed)
        for unit in self._streamed.values():
            unit.install()
        self._loss = loss
        if loss is not None:
            loss.install()

    # -- what the user calls -----------------------------------------------------------------

    @property
    def global_step(self) -> int:
        """Optimizer steps done, committed or not."""
        return self._step.num_done

    @property
    def committed_step(self) -> int:
        """The step of the last commit, which a crash now would resume at if `is_resumable`."""
        return self._parts.progress.committed_step

    @property
    def is_resumable(self) -> bool:
        """Whether a crash now would leave a run that goes on from `committed_step`.

        It would not without a disk, nor with `commit=False` once a step has gone over what was committed.
        """
        return self._parts.store is not None and not self._parts.store.in_use

    @property
    def generation(self) -> int:
        """The newest committed generation of the store, 0 without one."""
        return self._parts.progress.generation

    @property
    def run_id(self) -> str | None:
        """The run's id, None without a disk."""
        return None if self._parts.store is None else self._parts.store.run_id

    @property
    def state(self) -> Mapping[str, Any]:
        """The loop's own state, of the commit this runtime resumed from or the snapshot it restored last.

        Empty for a new run.
        """
        return self._state

    @property
    def plan(self) -> MemoryPlan:
        """How the budgets are spent."""
        return self._parts.plan

    @property
    def grad_norm(self) -> float | None:
        """The 2-norm of all gradients in the last step, before clipping; None before the first."""
        return self._grad_norm

    @property
    def skipped_steps(self) -> int:
        """Steps given up because something was not finite, since the model was attached."""
        return self._skipped

    @property
    def rollbacks(self) -> int:
        """How often the run went back to a snapshot, resumed or not."""
        return self._snapshots.num_rollbacks

    def measure_gradients(self) -> float:
        """Wait for the step's gradients and return their 2-norm, not finite when one of them is not.

        `step` does this by itself; call it behind the last backward to know the norm before the commit.

        Raises:
            StateError: there are no gradients.
            OffloadError: background work failed.
        """
        self._check_usable()
        self._step.check_gradients()
        return self._measure().value

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clip the step's gradients by their global norm, as `torch.nn.utils.clip_grad_norm_` does.

        Call it behind the last backward of a step. `max_grad_norm` does not apply to that step.

        Returns:
            The norm before, fp32.

        Raises:
            StateError: gradients are not parked (`park_gradients`), or there are none.
        """
        self._check_usable()
        self._step.check_gradients()
        return torch.tensor(self._step.clip(max_norm))

    def step(self, state: Mapping[str, Any] | None = None) -> bool:
        """End an optimizer step: clip, settle its updates and queue its commit, unless `commit=False`.

        Args:
            state: JSON-able values to find again in `state` after a resume, such as the position in
                the data: behind this step's batch.

        Returns:
            True; or False when a gradient was not finite and the step was skipped, or the run went back
            to a snapshot (`global_step` is less, then); see `give_up_step`.

        Raises:
            StateError: no backward has run since the last step, a visit of this step failed, settings
                of the optimizer changed since the backward, a gradient was not finite and
                `on_non_finite` does not say to skip it, or the runtime is closed.
            TypeError, ValueError: `state` is not JSON.
            OffloadError: background work of this step or an earlier one failed.
        """
        self._check_usable()
        self._step.check_gradients()
        # A copy: the commit lags behind the loop that goes on to change its own.
        user = json.loads(json.dumps(dict(state or {})))
        norm = self._measure()
        if norm.not_finite:
            others = f" and {len(norm.not_finite) - 1} more" if len(norm.not_finite) > 1 else ""
            self.give_up_step(f"the gradient of unit {norm.not_finite[0]!r}{others} is not finite", user)
            return False
        self._step.end()
        self._skipped_in_a_row = 0
        self._steps_counted += 1
        self._uncommitted = {
            "step": self.global_step,
            "rng": capture_rng(),
            "user": user,
            "rollbacks": self.rollbacks,
        }
        options = self._parts.options
        if options.commit and self.global_step % options.save_steps == 0:
            self._commit()
        else:
            self._parts.updater.turn()
        return True

    def give_up_step(self, reason: str, state: Mapping[str, Any] | None = None) -> Rollback | None:
        """Drop everything since the last step, as if its batches had never been seen.

        The generators of random numbers are left as they are, so that the next batch is another one.
        `step` calls this for gradients that are not finite; a loop may, for a loss.

        Args:
            reason: for the log and the error, `the loss is nan`.
            state: as in `step`. It is kept if the run goes back to a snapshot now, so it should hold the
                position in the data behind this batch; the snapshot's own when None.

        Returns:
            The rollback, or None when only this step was dropped.

        Raises:
            StateError: the step was dropped and the run shall not go on: `on_non_finite` is `stop`, or it
                was the last of `max_non_finite_steps` in a row with `skip`, or `roll_back` says so; or
                updates cannot be undone.
        """
        self._check_usable()
        options = self._parts.options
        number = self.global_step + 1
        self._skipped += 1
        self._skipped_in_a_row += 1
        too_many = self._skipped_in_a_row >= options.max_non_finite_steps
        if options.on_non_finite == "rollback" and too_many:
            return self.roll_back(f"{reason} ({self._skipped_in_a_row} in a row)", state)
        self._step.give_up()
        if options.on_non_finite == "stop" or too_many:
            self._keep_steps()
        if options.on_non_finite == "stop":
            raise StateError(
                f"step {number}: {reason}; nothing of this step was applied. Lower the learning rate, look"
                " at the data, or set on_non_finite='skip'"
            )
        if too_many:
            raise StateError(
                f"step {number}: {reason}; nothing of it was applied, and it was skipped"
                f" {self._skipped_in_a_row} times in a row (max_non_finite_steps). Lower the learning rate,"
                " or look at the data"
            )
        _log.warning("step %d: %s; skipped, nothing of it was applied", number, reason)
        return None

    def roll_back(self, reason: str, state: Mapping[str, Any] | None = None) -> Rollback:
        """Drop the step in progress and every step since the newest snapshot, which is restored.

        It is committed before this returns, so a run that is killed goes on from there. The generators of
        random numbers are as they were when the snapshot was taken.

        Args:
            reason: for the log and the error, `the loss jumped`.
            state: the loop's own, to be committed with it; the snapshot's own when None. Give it the
                present position in the data, or the batches since the snapshot are seen again.

        Raises:
            StateError: the step was dropped and the run shall not go on: there is no snapshot, or the run
                went back `max_rollbacks` times.
            CorruptionError: the snapshot is damaged; the last commit stands, resume the run there.
            StorageError: a snapshot cannot be read at present; likewise.
        """
        self._check_usable()
        number, limit = self.global_step + 1, self._parts.options.max_rollbacks
        name = self._snapshots.newest()
        if name is None or self.rollbacks >= limit:
            self._step.give_up()
            self._keep_steps()
            why = (
                "there is no snapshot to go back to: take one with runtime.snapshot()"
                if name is None
                else f"the run went back to a snapshot {limit} times already (max_rollbacks). Lower the"
                " learning rate, or look at the data"
            )
            raise StateError(f"step {number}: {reason}; nothing of it was applied, and {why}")
        self._restore(name, state, count=True)
        _log.warning(
            "step %d: %s; went back to step %d (snapshot %s)", number, reason, self.global_step, name
        )
        return Rollback(reason, number - 1, self.global_step, name)

    def snapshot(self, name: str, *, on_progress: Callable[[int, int], None] | None = None) -> SnapshotInfo:
        """Keep what the last step left, beside the run on its drives, until `drop_snapshot`; not in place.

        It takes half the room of the run again, reserved first, or none where the file system shares extents.

        Args:
            name: 1 to 64 letters, digits, `_` and `-`; no snapshot of the run has it.
            on_progress: called with bytes copied so far and in all.

        Raises:
            StateError: in the middle of a step, no disk, `commit=False`, or the name is taken.
            DiskFullError: no room, with the bytes needed and free; nothing is left behind.
            CapacityError: too little memory to copy through, with the numbers.
            OffloadError: background work failed.
        """
        self._check_between_steps("snapshot()")
        self.commit()
        return self._snapshots.take(name, on_progress)

    def snapshots(self) -> tuple[SnapshotInfo, ...]:
        """Return the snapshots of the run, the oldest first; one that is damaged says why."""
        return self._snapshots.list()

    def restore(self, name: str, state: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """Go back to a snapshot: weights, optimizer state, step and random generators, committed at once.

        A loop that begins anew at `global_step` and the returned state computes what it computed before.

        Args:
            name: the snapshot; it stays.
            state: the loop's own, to be committed with it; the snapshot's own when None.

        Returns:
            The loop's own state.

        Raises:
            StateError: in the middle of a step, no disk, or no such snapshot.
            CorruptionError: the snapshot is damaged; the last commit stands, resume the run there.
        """
        self._check_between_steps("restore()")
        return self._restore(name, state, count=False)

    def drop_snapshot(self, name: str) -> None:
        """Remove a snapshot, a damaged one as well.

        Raises:
            StateError: there is none of that name.
        """
        self._check_usable()
        self._snapshots.drop(name)

    def commit(self) -> None:
        """Queue a commit of the steps since the last one, whatever `save_steps` and `commit` say.

        `synchronize` waits for it. Leaving the `with` block in order, between two steps, does the same.

        Raises:
            StateError: in the middle of a step, or the runtime is closed.
            OffloadError: background work failed.
        """
        self._check_between_steps("commit()")
        if self._uncommitted is not None:
            self._commit()

    def synchronize(self) -> None:
        """Wait until every queued update and commit is done.

        Raises:
            OffloadError: one of them failed.
        """
        self._step.settle()
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
        """Write the model as a plain Hugging Face directory; see `offload.export.checkpoint.export`."""
        shapes = {
            spec.name: spec.shape
            for record in self._parts.records.values()
            for spec in (*record.layout.trainable, *record.layout.frozen)
        }
        ordered = {name: shapes[name] for name, _ in self._parts.model.named_parameters() if name in shapes}
        return export(directory, self.parameters_by_unit(), ordered, model=self._parts.model, options=options)

    def stats(self) -> RuntimeStats:
        """Return totals since the start or `reset_stats`."""
        return RuntimeStats.collect(self._steps_counted, self._parts)

    def reset_stats(self) -> None:
        """Start the totals over."""
        self._steps_counted = 0
        self.trace.reset()
        for meter in () if self._parts.store is None else self._parts.store.meters:
            meter.reset()

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
        if self._loss is not None:
            self._loss.remove()
        for unit in self._streamed.values():
            unit.remove()
        for hook in self._hooks:
            hook.remove()
        parts = self._parts
        # In this order: a record that was updated may wait for the device in the slot that the next update
        # waits for.
        parts.transfer.close()
        parts.updater.close()
        parts.arrivals.close()
        parts.gradients.discard()
        if parts.disk_gradients is not None:
            parts.disk_gradients.close()
        parts.activations.reset()
        for sentence in self.stats().slow_drives:
            _log.warning("%s", sentence)
        if parts.store is not None and parts.store.in_use:
            _log.warning(
                "run %s is lost: it is written in place (commit=False) and was closed without a commit",
                parts.store.run_id,
            )
        for closer in reversed(parts.closers):
            closer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._closed:
                if self._uncommitted is not None and not self._step.is_open:
                    self.commit()
                self.synchronize()
        finally:
            self.close()

    def _keep_steps(self) -> None:
        self.commit()  # a run that ends here does not reach its next one
        self.synchronize()

    def _commit(self) -> None:
        assert self._uncommitted is not None
        self._parts.updater.commit(self._uncommitted, self.global_step)
        self._uncommitted = None

    def _restore(self, name: str, state: Mapping[str, Any] | None, *, count: bool) -> Mapping[str, Any]:
        user = None if state is None else json.loads(json.dumps(dict(state)))
        self._state = self._snapshots.restore(name, user, None, count=count)
        self._uncommitted = None
        self._grad_norm = None
        self._skipped_in_a_row = 0
        return self._state

    def _measure(self) -> GlobalNorm:
        norm = self._step.measure()
        self._grad_norm = norm.value
        return norm

    def _check_usable(self) -> None:
        if self._closed:
            raise StateError("the runtime is closed: attach the model again")
        self._step.check_usable()

    def _check_between_steps(self, what: str) -> None:
        self._check_usable()
        if self._step.has_updates or (what != "parameters_by_unit()" and self._step.is_open):
            raise StateError(f"{what} in the middle of a step: call runtime.step() first")
