"""The step in progress: which units ran, whose gradients are complete, what becomes of them.

Owns the state between one optimizer step and the next; streamed units talk to it (`UnitHost`).

[Note: when an update starts] Every forward with a graph announces a backward visit. A record's
gradient is complete when its announced visits have run; its update starts then, while backward goes
on. Whatever was announced and never ran (an output that the loss does not use) is settled by
`measure`, as torch would: with the gradient that there is.

[Note: parked gradients] Clipping by the global norm needs all gradients before the first update, and
several backwards before a step need their sum. With `parks` gradients stay where `Gradients.park` put
them until `end`, which queues the updates in the order in which the next forward needs the records, and
returns: a visit of that forward waits for the updates of its own records only. Whoever waits for the
update thread between passes stops fetching first (`settle`): a record that was updated hands its buffer
on to the device, and on a full device would hold it until the next visit.

It neither commits nor counts what the user sees; that is `runtime.py`.

Thread rule: one thread drives the model; backward may run on autograd's thread while that thread
waits in `loss.backward()`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import torch

from ..errors import StateError
from ..optim import ParameterSettings, StreamedAdamW
from ..optim.norms import GlobalNorm, clip_factor
from ..optim.updater import Update
from ..tiers.gradients import FinishedGradient, GradientBuffer
from ..tiers.schedule import Pass, Phase, Visit, completion_order, first_use_order
from ..tiers.transfer import WeightsOnDevice
from ..units import Unit
from .calls import DroppedCall
from .parts import Parts
from .placeholders import StreamedGradient
from .stream import StreamedUnit

__all__ = ["Step"]


class Step:
    """See the module.

    Attributes:
        attempt: tells calls of one step from those of another: counts steps, those given up as well.
        num_done: optimizer steps done.
        norm: of the step's gradients, once it was measured.
    """

    def __init__(self, parts: Parts, num_done: int) -> None:
        self._parts = parts
        self.rows = parts.options.rows
        self.activations = parts.activations
        self.trace = parts.trace
        self.rng = parts.rng
        # See [Note: the anchor] in stream.py.
        self.anchor = torch.zeros((), requires_grad=True)
        # [Note: dropped graphs] Forwards whose graph went without a backward (a metric computed without
        # no_grad): the garbage collector, on whatever thread, only notes them here.
        self.dropped: deque[DroppedCall] = deque()
        self.attempt = num_done
        self.num_done = num_done
        self.norm: GlobalNorm | None = None
        self._parks = parts.options.parks
        self._unmeasured: set[str] = set()
        self._clip_scale: float | None = None
        self._schedule = parts.schedule
        self._seen_order: list[str] = []
        self._in_backward = False
        self._expected: dict[str, int] = {}
        self._updated: set[str] = set()
        self._settings: dict[str, ParameterSettings] | None = None
        self._failure: BaseException | None = None
        self._running: str | None = None
        self._optimizer: StreamedAdamW
        self._streamed: Mapping[str, StreamedUnit] = {}
        self._trained: dict[str, tuple[str, ...]] = {}

    def install(self, optimizer: StreamedAdamW, streamed: Mapping[str, StreamedUnit]) -> None:
        """Take the settings from `optimizer`, and visits from `streamed`; called once."""
        self._optimizer = optimizer
        self._streamed = streamed
        self._trained = {name: unit.trained_owners for name, unit in streamed.items()}

    @property
    def has_updates(self) -> bool:
        """Whether the step has changed weights already."""
        return bool(self._updated)

    @property
    def is_open(self) -> bool:
        """Whether a backward has run since the last step."""
        return self.has_updates or bool(self._parts.gradients.pending())

    def check_usable(self) -> None:
        """Raise what went wrong in a visit of this step, or in the background.

        Raises:
            StateError: a visit failed, so the step cannot be completed.
            OffloadError: background work of this step or an earlier one failed.
        """
        if self._failure is not None:
            store = self._parts.store
            kept = (
                f"nothing of it was committed: resume the run at step {self._parts.progress.committed_step}"
            )
            if store is not None and store.in_use:
                kept = "the run is lost, since it is written in place (commit=False): begin it anew"
            raise StateError(
                f"a unit of this step failed ({type(self._failure).__name__}: {self._failure}), so the step"
                f" cannot be completed; {kept}"
            ) from self._failure
        self._parts.transfer.check()

    def check_gradients(self) -> None:
        """Raise when there is nothing to step with.

        Raises:
            StateError: no backward has run since the last step, or settings of the optimizer changed
                since it did.
        """
        self._count_dropped()
        if not self._updated and not self._parts.gradients.pending():
            raise StateError("step() without a backward: call loss.backward() on the model's output first")
        if self._settings is not None and self._settings != self._present_settings():
            raise StateError(
                "settings of the optimizer (lr, betas, eps, weight_decay) changed between backward() and"
                " step(): updates run during backward and used the ones before; change them behind step()"
            )

    def settle(self) -> None:
        """Make it safe to wait for the update thread; see [Note: parked gradients]. Between passes only."""
        if self._parks:
            self._parts.transfer.quiet()

    def measure(self) -> GlobalNorm:
        """Settle what is left of the step's gradients and return their norm.

        Raises:
            OffloadError: background work failed.
        """
        if self.norm is None:
            self.settle()
            self._settle_unfinished()
            self.norm = self._wait_for_norm()
        return self.norm

    def clip(self, max_norm: float) -> float:
        """Let the step's updates scale the gradients down to `max_norm`; return the norm until now.

        Raises:
            StateError: gradients are not parked.
        """
        if not self._parks:
            raise StateError(
                "the gradients of this step have gone into updates already: attach with max_grad_norm, or"
                " with park_gradients=True to clip in the loop"
            )
        scale = 1.0 if self._clip_scale is None else self._clip_scale
        norm = self.measure().value * scale
        self._clip_scale = scale * clip_factor(norm, max_norm)
        return norm

    def end(self) -> None:
        """Queue the updates of parked gradients and begin the next step; `measure` was called."""
        assert self.norm is not None and not self.norm.not_finite
        self._learn_order()
        if self._parks:
            self._update_parked(self.norm.value)
        self.num_done += 1
        self._begin_next()

    def give_up(self, *, restoring: bool = False) -> None:
        """Drop everything of the step, as if its batches had never been seen, and begin the next one.

        Args:
            restoring: the caller brings the records of a snapshot back: updates need not be undone.

        Raises:
            StateError: updates have run that cannot be undone here; the runtime is then of no further use.
            OffloadError: background work failed.
        """
        self._count_dropped()
        self.settle()
        self._wait_for_norm()
        if self._updated and not restoring:
            self._roll_back()
        self._seen_order.clear()
        self._parts.gradients.discard()
        self._begin_next()

    def _begin_next(self) -> None:
        self._parts.activations.reset()
        self._parts.arrivals.forget_norms()
        self.attempt += 1
        self.norm = None
        self._clip_scale = None
        self._unmeasured.clear()
        self._expected.clear()
        self._updated.clear()
        self._settings = None

    # -- what the units call (UnitHost) ------------------------------------------------------

    def enter(self, visit: Visit, kind: Pass) -> Mapping[str, WeightsOnDevice]:
        """Fetch the weights of a visit; see `Transfer.enter`."""
        self.check_usable()
        if visit.phase is Phase.FORWARD:
            self._check_not_updated(visit.unit)
        if self._running is not None:
            raise StateError(
                f"unit {visit.unit!r} was called while unit {self._running!r} runs: units run one at a time;"
                " call it before or behind, or register it as a part of the other (a child module)"
            )
        if visit.phase is Phase.BACKWARD:
            self._in_backward = True
        elif kind is Pass.TRAIN:
            if self._in_backward and self._parks:
                # The next forward of the same step: a pass by itself.
                self._seen_order.clear()
            self._in_backward = False
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
        if self._clip_scale is not None:
            raise StateError(
                "backward() after clip_grad_norm_(): call step() first; clip behind the last one"
            )
        self.norm = None
        gradients = self._parts.gradients
        buffers = {owner: gradients.begin(owner) for owner in self._streamed[unit.name].trained_owners}
        if self._parks:
            # A sum that the next visit goes on with is brought back from disk meanwhile.
            for owner in self._trained_next(unit.name):
                gradients.read_ahead(owner)
        return buffers

    def finish_gradients(self, unit: Unit, buffers: Mapping[str, GradientBuffer]) -> None:
        """Hand gradients over: park them, or start the update of every record that is complete."""
        self._count_dropped()
        for owner, buffer in buffers.items():
            self._expected[owner] -= 1
            complete = self._expected[owner] == 0
            if self._parks:
                self._park(owner, buffer, complete=complete)
                continue
            finished = self._parts.gradients.finish(owner, buffer, complete=complete)
            if finished is not None:
                self._start_update(owner, finished)

    def abandon(self, error: BaseException) -> None:
        """See `UnitHost`."""
        self._failure = self._failure or error

    # -- parts of a step ---------------------------------------------------------------------

    def _park(self, owner: str, buffer: GradientBuffer, *, complete: bool) -> None:
        parts = self._parts
        parked = parts.gradients.park(owner, buffer)
        if complete or owner in parts.plan.parked_on_disk:
            # On its way to disk it is measured whether or not it is complete: it is not read again for that.
            self._unmeasured.discard(owner)
            parts.arrivals.take(owner, parked)
        else:
            self._unmeasured.add(owner)
        self._show_gradient(owner)

    def _update_parked(self, norm: float) -> None:
        parts = self._parts
        settings = self._present_settings()
        scale = self._clip_scale
        if scale is None:
            limit = parts.options.max_grad_norm
            scale = 1.0 if limit is None else clip_factor(norm, limit)
        pending = parts.gradients.pending()
        ahead = first_use_order(self._schedule.order, self._trained)
        parts.transfer.begin_updates(pending)
        # A record that this forward did not use can have a gradient of an earlier one.
        places = {owner: place for place, owner in enumerate(ahead)}
        for owner in sorted(pending, key=lambda owner: places.get(owner, len(places))):
            gradient = parts.gradients.take_parked(owner)
            step = self.num_done + 1
            parts.updater.submit(Update(owner, None, gradient, settings, step, scale, commits=self._commits))

    def _start_update(self, owner: str, gradient: FinishedGradient) -> None:
        if self._settings is None:
            # The learning rate of a step is fixed when its first unit is updated.
            self._settings = self._present_settings()
        self._updated.add(owner)
        weights = self._parts.transfer.take_host(owner)
        measurement = self._parts.arrivals.take(owner, gradient)
        self._parts.updater.submit(
            Update(
                owner,
                weights,
                gradient,
                self._settings,
                step=self.num_done + 1,
                measurement=measurement,
                commits=self._commits,
            )
        )
        self._show_gradient(owner)

    def _show_gradient(self, owner: str) -> None:
        for spec in self._parts.records[owner].layout.trainable:
            parameter = self._parts.model.get_parameter(spec.name)
            # empty_like takes ten times as long on the meta device, for each parameter in each step.
            empty = torch.empty_strided(
                parameter.shape, parameter.stride(), dtype=parameter.dtype, device=parameter.device
            )
            parameter.grad = empty.as_subclass(StreamedGradient)

    @property
    def _commits(self) -> bool:
        """Whether the runtime commits the step in progress by itself."""
        options = self._parts.options
        return options.commit and (self.num_done + 1) % options.save_steps == 0

    def _present_settings(self) -> dict[str, ParameterSettings]:
        return {
            name: self._optimizer.settings_for(name)
            for group in self._optimizer.param_groups
            for name in group["param_names"]
        }

    def _settle_unfinished(self) -> None:
        """Take the gradients whose announced visits did not all run; see [Note: when an update starts]."""
        if self._parks:
            for owner in sorted(self._unmeasured):
                self._parts.arrivals.take(owner, self._parts.gradients.parked(owner))
            self._unmeasured.clear()
            return
        for owner in self._parts.gradients.pending():
            visit = Visit(owner, Phase.BACKWARD)
            self._parts.transfer.enter(visit, Pass.TRAIN)
            self._start_update(owner, self._parts.gradients.take_partial(owner))
            self._parts.transfer.leave(visit, Pass.TRAIN)

    def _wait_for_norm(self) -> GlobalNorm:
        norm = self._parts.arrivals.global_norm()
        self._parts.updater.check()
        return norm

    def _trained_next(self, unit: str) -> tuple[str, ...]:
        """Return the owners that the backward visit behind that of `unit` adds to, by the order predicted."""
        order = self._schedule.order
        place = order.index(unit) if unit in order else 0
        return self._trained[order[place - 1]] if place else ()

    def _roll_back(self) -> None:
        """Undo updates that have run: read the last committed state again, which is the one before."""
        parts = self._parts
        if not parts.options.rolls_back:
            error = StateError(
                "updates of this step have run during backward and cannot be undone: give a disk and leave"
                " save_steps at 1 and commit at True, or set park_gradients"
            )
            self.abandon(error)
            raise error
        parts.updater.drain()
        parts.transfer.drop(tuple(parts.records))
        parts.updater.roll_back()
        parts.masters.load_residents([parts.records[owner] for owner in parts.residents.uncommitted])

    def _count_dropped(self) -> None:
        """Expect no backward of calls whose graph is gone; see [Note: dropped graphs]."""
        while self.dropped:
            call = self.dropped.popleft()
            for saved in call.saved:
                self._parts.activations.drop(saved)
            if call.attempt == self.attempt:
                for owner in self._streamed[call.unit].trained_owners:
                    self._expected[owner] -= 1

    def _learn_order(self) -> None:
        order = tuple(self._seen_order)
        self._seen_order.clear()
        if order != self._schedule.order:
            self._schedule = replace(self._schedule, order=order)
            self._parts.transfer.follow(self._schedule)
            predict = first_use_order if self._parks else completion_order
            self._parts.updater.expect(predict(order, self._trained))

    def _check_not_updated(self, unit: str) -> None:
        updated = [owner for owner in self._schedule.needs[unit] if owner in self._updated]
        if updated:
            raise StateError(
                f"unit {unit!r} was already updated in this step: call runtime.step() after every backward."
                " To sum the gradients of a larger batch, give the whole batch to one forward and set rows,"
                " or set park_gradients"
            )
