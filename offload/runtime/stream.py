"""Runs one unit with streamed weights: forward without a graph, backward by recomputation.

Owns the autograd function that stands in for a unit in the outer graph. Each call of a unit becomes
one node: its forward cuts the batch into micro-batches and runs them without a graph, saving their
inputs; its backward fetches the weights again, recomputes each micro-batch with a graph, and adds the
gradients into one flat buffer per record, which the runtime then hands to the optimizer.

[Note: taking over a unit's forward] `attach` gives each unit's module an instance attribute
`forward`, as accelerate's hooks do, and `detach` deletes it again. Unlike a wrapper module it leaves
names, classes, isinstance checks, hooks and attributes that the model reads as they are.

[Note: the anchor] Autograd calls a node's backward only if an input requires grad. The first unit
gets token ids; a scalar that requires grad, given to every call, makes all nodes part of the graph.

[Note: the graph does not own the runtime] A node knows its unit by a weak reference; the model and the
runtime own it. The runtime keeps the error of a visit that failed, that error its traceback, the
traceback the frames of the loop, and these the loss, which owns the graph. Through a strong reference
the graph would own the runtime again, and part of that circle lies in C++, where Python's garbage
collector does not see it: each failed attempt of a process would stay in memory for good.

Thread rule: forward on the caller's thread, backward on autograd's (the same one on CPU).
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from ..errors import StateError
from ..tiers.activations import Activations
from ..tiers.gradients import GradientBuffer
from ..tiers.records import RecordSet
from ..tiers.schedule import Pass, Phase, Visit
from ..tiers.transfer import WeightsOnDevice
from ..trace import Tracer
from ..units import Unit
from .binding import ParameterBinder, apart_from
from .calls import (
    TENSOR,
    Call,
    DroppedCall,
    autocast_as,
    buffers_preserved,
    is_cache,
    may_have_gradient,
    running_statistics,
    tensor_leaves,
    version_of,
)
from .rng import DeviceRng
from .rows import chunks, cut, join, join_gradient, micro_batches
from .uses import MAX_USES, Uses

__all__ = ["StreamedUnit", "UnitHost"]

logger = logging.getLogger(__name__)

# The size of what is cut, None when nothing is, and the ends of each micro-batch.
Cuts = tuple[int | None, tuple[tuple[int, int], ...]]


class UnitHost(Protocol):
    """What a streamed unit needs from the runtime around it."""

    rows: int | None
    activations: Activations
    anchor: torch.Tensor
    trace: Tracer
    rng: DeviceRng
    dropped: deque[DroppedCall]

    @property
    def attempt(self) -> int:
        """Which try at a step this is: counts steps, those given up as well."""

    def enter(self, visit: Visit, kind: Pass) -> Mapping[str, WeightsOnDevice]: ...

    def leave(self, visit: Visit, kind: Pass) -> None: ...

    def expect_backward(self, unit: Unit) -> None:
        """Note that a forward with a graph ran: a backward visit of `unit` is to come."""

    def begin_gradients(self, unit: Unit) -> Mapping[str, GradientBuffer]: ...

    def finish_gradients(self, unit: Unit, buffers: Mapping[str, GradientBuffer]) -> None: ...

    def abandon(self, error: BaseException) -> None:
        """Note that a visit failed: the step cannot be completed."""


class StreamedUnit:
    """One unit of an attached model; `install` takes over its forward, `remove` gives it back."""

    def __init__(
        self, unit: Unit, module: torch.nn.Module, records: Mapping[str, RecordSet], host: UnitHost
    ) -> None:
        self.unit = unit
        self.module = module
        self._host = host
        self._binder = ParameterBinder(unit, module, records)
        self._trained_owners = unit.trained_records
        self._num_places = MAX_USES if unit.is_part else 1
        self._original: Callable[..., Any] = module.forward
        self._had_override = "forward" in vars(module)
        self._warned_cache = False

    @property
    def trained_owners(self) -> tuple[str, ...]:
        """Owners of the records that this unit's backward adds gradients to."""
        return self._trained_owners

    def install(self) -> None:
        """Route calls of the module through the runtime."""
        vars(self.module)["forward"] = self.run

    def remove(self) -> None:
        """Undo `install`."""
        if self._had_override:
            vars(self.module)["forward"] = self._original
        else:
            vars(self.module).pop("forward", None)

    # -- forward -----------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with streamed weights, on micro-batches of rows.

        Raises:
            StateError: an argument has no values: a module around the unit computed with a placeholder.
        """
        given = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in given):
            raise StateError(
                f"unit {self.unit.name!r} was given a tensor on the meta device, which has no values: what is"
                " around the units computes with a weight of theirs, which lives in the offload runtime; call"
                " the module that holds it instead of reading the weight"
            )
        if not torch.is_grad_enabled():
            return self._infer(self._original, args, kwargs)
        args, kwargs = self._without_cache(args, kwargs)
        return self._train(None, lambda tensors: micro_batches(tensors, self._host.rows), args, kwargs)

    def run_rows(
        self, function: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], rows: int
    ) -> torch.Tensor:
        """Run `function(forward, *chunk)` on chunks of `rows` rows as one call of the unit; join the results.

        What a chunk needs beside its result is computed again in backward, and gone before the next chunk.

        Args:
            function: gets the module's own forward and a chunk of each tensor, and returns a tensor of two
                dimensions or more with a row for each of the chunk. No row may depend on another. It must
                not own the model: see [Note: the graph does not own the runtime].
            tensors: of two dimensions or more, with the same first one.
        """
        result: torch.Tensor
        if torch.is_grad_enabled():
            result = self._train(function, lambda tensors: chunks(tensors, rows), tuple(tensors), {})
            return result
        batch, cuts = chunks(tensors, rows)

        def in_chunks(*tensors: torch.Tensor) -> torch.Tensor:
            parts = [function(self._original, *cut(tensors, batch, *ends)) for ends in cuts]
            return join(parts, batch, cuts)

        result = self._infer(in_chunks, tuple(tensors), {})
        return result

    def _train(
        self,
        function: Callable[..., torch.Tensor] | None,
        cutting: Callable[[Sequence[torch.Tensor]], Cuts],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        indices = tuple(index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
        tensors = [leaves[index] for index in indices]
        batch, cuts = cutting(tensors)
        call = Call(
            function=function,
            tree=tree,
            leaves=[None if index in indices else leaf for index, leaf in enumerate(leaves)],
            tensor_indices=indices,
            saved={},
            wants_grad=tuple(tensor.requires_grad for tensor in tensors),
            cuts=cuts,
            batch=batch,
            rng=[],
            autocast=self._autocast(),
        )
        # See [Note: sums of gradients] in uses.py.
        again = [tensor for tensor in tensors if tensor.requires_grad for _ in range(self._num_places - 1)]
        outputs = _RunUnit.apply(self, call, self._host.anchor, *tensors, *again)  # type: ignore[no-untyped-call]
        assert call.output_tree is not None and call.output_leaves is not None
        results = iter(outputs)
        filled = [next(results) if leaf is TENSOR else leaf for leaf in call.output_leaves]
        return pytree.tree_unflatten(filled, call.output_tree)

    def _autocast(self) -> list[tuple[str, torch.dtype, bool]]:
        devices = dict.fromkeys(("cpu", self._host.activations.device_type))
        return [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in devices]

    def _infer(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        visit = Visit(self.unit.name, Phase.FORWARD)
        with (
            self._visit(visit, Pass.INFER) as weights,
            self._binder.bound(weights, None),
            self._host.trace.span(self.unit.name, "compute", phase="infer"),
        ):
            result = function(*args, **kwargs)
            leaves, tree = pytree.tree_flatten(result)
            kept = apart_from(weights, leaves)
            return result if kept is leaves else pytree.tree_unflatten(kept, tree)

    def _without_cache(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Drop KV caches: a recompute would append the same keys to them a second time."""
        if not any(is_cache(value) for value in (*args, *kwargs.values())) and not kwargs.get("use_cache"):
            return args, kwargs
        if not self._warned_cache:
            self._warned_cache = True
            logger.info("%s: a KV cache was given to it and is dropped while training", self.unit.name)
        args = tuple(None if is_cache(value) else value for value in args)
        kwargs = {name: None if is_cache(value) else value for name, value in kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        return args, kwargs

    def run_forward(self, call: Call, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run all micro-batches without a graph; fill `call` with what backward needs."""
        host = self._host
        with self._noted(Pass.TRAIN):
            for index, tensor, wants in zip(call.tensor_indices, tensors, call.wants_grad, strict=True):
                if wants:
                    # Outputs of the unit before: one per unit, so they go to the host. What does not
                    # require grad (masks, positions, token ids) is shared by all units and stays.
                    call.saved[index] = host.activations.save(tensor, self.unit.name)
        versions = [version_of(tensor) for tensor in tensors]
        buffers = [(buffer, version_of(buffer)) for buffer in self.module.buffers()]
        statistics = running_statistics(self.module)
        visit = Visit(self.unit.name, Phase.FORWARD)
        parts: list[list[torch.Tensor]] = []
        with self._visit(visit, Pass.TRAIN) as weights, self._binder.bound(weights, None):
            for start, stop in call.cuts:
                call.rng.append(host.rng.get())
                with host.trace.span(self.unit.name, "compute", phase="forward", row=start):
                    result = self._run_on(call, cut(tensors, call.batch, start, stop))
                parts.append(apart_from(weights, tensor_leaves(call, result)))
            if versions != [version_of(tensor) for tensor in tensors]:
                raise StateError(
                    f"unit {self.unit.name!r} changes an argument in place, so its backward could not run its"
                    " forward a second time on the same values; let it work on a copy (x = x + y, not x += y)"
                )
        call.changed_buffers = tuple(
            buffer for buffer, version in buffers if version_of(buffer) != version or id(buffer) in statistics
        )
        host.expect_backward(self.unit)
        call.attempt = host.attempt
        dropped = DroppedCall(self.unit.name, call.attempt, tuple(call.saved.values()))
        call.awaited = weakref.finalize(call, host.dropped.append, dropped)
        call.awaited.atexit = False
        return [join(pieces, call.batch, call.cuts) for pieces in zip(*parts, strict=True)]

    # -- backward ----------------------------------------------------------------------------

    def run_backward(
        self,
        call: Call,
        kept: Sequence[torch.Tensor | None],
        grad_outputs: Sequence[torch.Tensor | None],
    ) -> list[torch.Tensor | None]:
        """Recompute every micro-batch with a graph and back-propagate.

        Returns:
            The gradients of the inputs, then those in the further places of each; see
            [Note: sums of gradients] in uses.py.
        """
        host = self._host
        if call.attempt != host.attempt:
            raise StateError(
                f"backward reached unit {self.unit.name!r} of a step that is over: call backward() once,"
                " before runtime.step()"
            )
        if call.awaited is None or call.awaited.detach() is None:
            raise StateError(
                f"backward reached unit {self.unit.name!r} a second time: its saved input is gone and its"
                " update may have begun; sum the losses and call backward() once, without retain_graph"
            )
        with self._noted(Pass.TRAIN):
            inputs = [
                host.activations.restore(call.saved[index]) if index in call.saved else tensor
                for index, tensor in zip(call.tensor_indices, kept, strict=True)
            ]
        visit = Visit(self.unit.name, Phase.BACKWARD)
        gradients: list[list[list[torch.Tensor | None]]] = [[] for _ in inputs]
        with self._visit(visit, Pass.TRAIN) as weights:
            buffers = host.begin_gradients(self.unit)
            with self._binder.bound(weights, buffers), host.rng.preserved(), buffers_preserved(call):
                for (start, stop), state in zip(call.cuts, call.rng, strict=True):
                    host.rng.set(state)
                    with host.trace.span(self.unit.name, "compute", phase="backward", row=start):
                        part = self._backward_micro_batch(call, inputs, grad_outputs, start, stop)
                        for buffer in buffers.values():
                            buffer.end_micro_batch()
                    for pieces, piece in zip(gradients, part, strict=True):
                        pieces.append(piece)
            host.finish_gradients(self.unit, buffers)
        joined = [
            [join_gradient(pieces, tensor, call.batch, call.cuts) for pieces in zip(*parts, strict=True)]
            if wants
            else [None]
            for parts, tensor, wants in zip(gradients, inputs, call.wants_grad, strict=True)
        ]
        return [*(first for first, *_ in joined), *(gradient for _, *rest in joined for gradient in rest)]

    def _backward_micro_batch(
        self,
        call: Call,
        inputs: Sequence[torch.Tensor | None],
        grad_outputs: Sequence[torch.Tensor | None],
        start: int,
        stop: int,
    ) -> list[list[torch.Tensor | None]]:
        """Return for each input the gradient in each of its places."""
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(wants)
            for tensor, wants in zip(cut(inputs, call.batch, start, stop), call.wants_grad, strict=True)
        ]
        uses = Uses([leaf for leaf in leaves if leaf is not None]) if self.unit.is_part else None
        with torch.enable_grad(), autocast_as(call), uses or contextlib.nullcontext():
            outputs = tensor_leaves(call, self._run_on(call, leaves))
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, cut(grad_outputs, call.batch, start, stop), strict=True)
            if output.requires_grad and grad is not None
        ]
        if pairs:
            torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
        return [
            [None] if leaf is None else [leaf.grad] if uses is None else uses.gradients(leaf)
            for leaf in leaves
        ]

    def _run_on(self, call: Call, tensors: Sequence[torch.Tensor | None]) -> Any:
        leaves = list(call.leaves)
        for index, tensor in zip(call.tensor_indices, tensors, strict=True):
            leaves[index] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, call.tree)
        if call.function is None:
            return self._original(*args, **kwargs)
        return call.function(self._original, *args, **kwargs)

    @contextlib.contextmanager
    def _visit(self, visit: Visit, kind: Pass) -> Iterator[Mapping[str, WeightsOnDevice]]:
        weights = self._host.enter(visit, kind)
        try:
            with self._noted(kind):
                yield weights
        finally:
            self._host.leave(visit, kind)

    @contextlib.contextmanager
    def _noted(self, kind: Pass) -> Iterator[None]:
        """Note what is raised inside, so that a half-done step is never committed, and raise it on.

        A forward without a graph is no part of the step.
        """
        try:
            yield
        except BaseException as error:
            if kind is Pass.TRAIN:
                self._host.abandon(error)
            raise


class _RunUnit(torch.autograd.Function):
    """The node that stands for one call of a unit."""

    @staticmethod
    def forward(
        ctx: Any, streamed: StreamedUnit, call: Call, anchor: torch.Tensor, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        # Behind them come further places of the same tensors, for their gradients.
        tensors = tensors[: len(call.wants_grad)]
        outputs = streamed.run_forward(call, tensors)
        # See [Note: the graph does not own the runtime].
        ctx.streamed, ctx.call = weakref.ref(streamed), call
        ctx.save_for_backward(
            *(None if wants else tensor for tensor, wants in zip(tensors, call.wants_grad, strict=True))
        )
        ctx.mark_non_differentiable(*(output for output in outputs if not may_have_gradient(output)))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise StateError(
                "backward with create_graph=True: the graph of a streamed unit's gradient is not kept, so a"
                " gradient of it (a gradient penalty) would be wrong; leave create_graph out"
            )
        streamed = ctx.streamed()
        if streamed is None:
            raise StateError(
                "backward through a model that is gone, as its runtime is: keep them until runtime.step()"
            )
        gradients = streamed.run_backward(ctx.call, ctx.saved_tensors, grad_outputs)
        return (None, None, None, *gradients)
