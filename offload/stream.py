"""Runs one unit with streamed weights: forward without a graph, backward by recomputation.

Owns the autograd function that stands in for a unit in the outer graph, and the binding of fetched
weights to the unit's modules while it runs. Each call of a unit becomes one node: its forward cuts
the batch into micro-batches and runs them without a graph, saving their inputs; its backward fetches
the weights again, recomputes each micro-batch with a graph, and adds the gradients into one flat
buffer per record, which the runtime then hands to the optimizer.

[Note: taking over a unit's forward] `attach` gives each unit's module an instance attribute
`forward`, as accelerate's hooks do, and `detach` deletes it again. Unlike a wrapper module it leaves
names, classes, isinstance checks, hooks and attributes that the model reads as they are.

[Note: the anchor] Autograd calls a node's backward only if an input requires grad. The first unit
gets token ids; a scalar that requires grad, given to every call, makes all nodes part of the graph.

[Note: binding] While a unit runs, its `_parameters` hold views of the fetched buffers: plain leaf
tensors whose `.grad` is a view of the gradient buffer, so that autograd accumulates in place and no
gradient of a whole unit exists beside it. Outside, they hold parameters on the meta device, which
refuse to give values.

Thread rule: forward on the caller's thread, backward on autograd's (the same one on CPU).
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from .activations import Activations, SavedTensor
from .errors import StateError
from .gradients import GradientBuffer
from .records import RecordSet
from .rng import DeviceRng
from .rows import cut, join, join_gradient, micro_batches
from .schedule import Pass, Phase, Visit
from .trace import Tracer
from .transfer import WeightsOnDevice
from .units import Unit

__all__ = ["DroppedCall", "StreamedUnit", "UnitHost"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DroppedCall:
    """A forward with a graph whose backward will never come, because the graph is gone."""

    unit: str
    step: int
    saved: tuple[SavedTensor, ...]


class UnitHost(Protocol):
    """What a streamed unit needs from the runtime around it."""

    rows: int | None
    activations: Activations
    anchor: torch.Tensor
    trace: Tracer
    rng: DeviceRng
    dropped: deque[DroppedCall]

    @property
    def global_step(self) -> int: ...

    def enter(self, visit: Visit, kind: Pass) -> Mapping[str, WeightsOnDevice]: ...

    def leave(self, visit: Visit, kind: Pass) -> None: ...

    def expect_backward(self, unit: Unit) -> None:
        """Note that a forward with a graph ran: a backward visit of `unit` is to come."""

    def begin_gradients(self, unit: Unit) -> Mapping[str, GradientBuffer]: ...

    def finish_gradients(self, unit: Unit, buffers: Mapping[str, GradientBuffer]) -> None: ...

    def abandon(self, error: BaseException) -> None:
        """Note that a visit failed: the step cannot be completed."""


@dataclass(frozen=True)
class _Place:
    """Where one tensor of a record is bound: `module._parameters[name]`."""

    module: torch.nn.Module
    name: str
    owner: str
    tensor: str


@dataclass
class _Call:
    """One call of a unit, kept from its forward to its backward.

    Attributes:
        tree: the pytree structure of (args, kwargs).
        leaves: its leaves; None where a tensor was saved.
        kept: for each leaf that is a tensor kept by reference, its index in the saved tensors.
        saved: for each leaf that was copied to the host.
        rows: the cut of the batch, (start, stop) for each micro-batch.
        batch: the size of the first dimension of what is cut, None when nothing is.
        rng: generator states before each micro-batch.
        changed_buffers: buffers of the unit that the forward wrote (running statistics).
        autocast: the state of autocast in the forward, which holds for the recompute, too.
        output_tree: structure of the result.
        step: `global_step` of the forward.
        awaited: notes the call as dropped when it is collected; dead once its backward has begun.
    """

    tree: pytree.TreeSpec
    leaves: list[Any]
    tensor_indices: tuple[int, ...]
    saved: dict[int, SavedTensor]
    wants_grad: tuple[bool, ...]
    cuts: tuple[tuple[int, int], ...]
    batch: int | None
    rng: list[Any]
    output_tree: pytree.TreeSpec | None = None
    output_leaves: list[Any] | None = None
    changed_buffers: tuple[torch.Tensor, ...] = ()
    autocast: list[tuple[str, torch.dtype, bool]] = field(default_factory=list)
    step: int = 0
    awaited: weakref.finalize[Any, _Call] | None = None


class StreamedUnit:
    """One unit of an attached model; `install` takes over its forward, `remove` gives it back."""

    def __init__(
        self, unit: Unit, module: torch.nn.Module, records: Mapping[str, RecordSet], host: UnitHost
    ) -> None:
        self.unit = unit
        self.module = module
        self._records = records
        self._host = host
        self._places = [
            _Place(*_split_path(module, binding.path), binding.owner, binding.tensor)
            for binding in unit.bindings
        ]
        self._trained_owners = tuple(
            dict.fromkeys(binding.owner for binding in unit.bindings if binding.trainable)
        )
        self._original: Callable[..., Any] = module.forward
        self._had_override = "forward" in vars(module)
        self._warned_cache = False

    @property
    def trained_owners(self) -> tuple[str, ...]:
        """Owners of the records that this unit's backward adds gradients to."""
        return self._trained_owners

    def install(self) -> None:
        """Route calls of the module through the runtime."""
        vars(self.module)["forward"] = self._forward

    def remove(self) -> None:
        """Undo `install`."""
        if self._had_override:
            vars(self.module)["forward"] = self._original
        else:
            vars(self.module).pop("forward", None)

    # -- forward -----------------------------------------------------------------------------

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._infer(args, kwargs)
        args, kwargs = self._without_cache(args, kwargs)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        indices = tuple(index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
        tensors = [leaves[index] for index in indices]
        batch, cuts = micro_batches(tensors, self._host.rows)
        call = _Call(
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
        outputs = _RunUnit.apply(self, call, self._host.anchor, *tensors)  # type: ignore[no-untyped-call]
        assert call.output_tree is not None and call.output_leaves is not None
        results = iter(outputs)
        filled = [next(results) if leaf is _TENSOR else leaf for leaf in call.output_leaves]
        return pytree.tree_unflatten(filled, call.output_tree)

    def _autocast(self) -> list[tuple[str, torch.dtype, bool]]:
        devices = dict.fromkeys(("cpu", self._host.activations.device_type))
        return [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in devices]

    def _infer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        visit = Visit(self.unit.name, Phase.FORWARD)
        with (
            self._visit(visit, Pass.INFER) as weights,
            self._bound(weights, None),
            self._host.trace.span(self.unit.name, "compute", phase="infer"),
        ):
            result = self._original(*args, **kwargs)
            leaves, tree = pytree.tree_flatten(result)
            kept = _apart_from(weights, leaves)
            return result if kept is leaves else pytree.tree_unflatten(kept, tree)

    def _without_cache(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Drop KV caches: a recompute would append the same keys to them a second time."""
        if not any(_is_cache(value) for value in (*args, *kwargs.values())) and not kwargs.get("use_cache"):
            return args, kwargs
        if not self._warned_cache:
            self._warned_cache = True
            logger.info("%s: a KV cache was given to it and is dropped while training", self.unit.name)
        args = tuple(None if _is_cache(value) else value for value in args)
        kwargs = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        return args, kwargs

    def run_forward(self, call: _Call, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run all micro-batches without a graph; fill `call` with what backward needs."""
        host = self._host
        for index, tensor, wants in zip(call.tensor_indices, tensors, call.wants_grad, strict=True):
            if wants:
                # Outputs of the unit before: one per unit, so they go to the host. What does not
                # require grad (masks, positions, token ids) is shared by all units and stays.
                call.saved[index] = host.activations.save(tensor, self.unit.name)
        versions = [_version(tensor) for tensor in tensors]
        buffers = [(buffer, _version(buffer)) for buffer in self.module.buffers()]
        statistics = _running_statistics(self.module)
        visit = Visit(self.unit.name, Phase.FORWARD)
        parts: list[list[torch.Tensor]] = []
        with self._visit(visit, Pass.TRAIN) as weights, self._bound(weights, None):
            for start, stop in call.cuts:
                call.rng.append(host.rng.get())
                with host.trace.span(self.unit.name, "compute", phase="forward", row=start):
                    result = self._original_on(call, cut(tensors, call.batch, start, stop))
                parts.append(_apart_from(weights, _tensor_leaves(call, result)))
            if versions != [_version(tensor) for tensor in tensors]:
                raise StateError(
                    f"unit {self.unit.name!r} changes an argument in place, so its backward could not run its"
                    " forward a second time on the same values; let it work on a copy (x = x + y, not x += y)"
                )
        call.changed_buffers = tuple(
            buffer for buffer, version in buffers if _version(buffer) != version or id(buffer) in statistics
        )
        host.expect_backward(self.unit)
        call.step = host.global_step
        dropped = DroppedCall(self.unit.name, call.step, tuple(call.saved.values()))
        call.awaited = weakref.finalize(call, host.dropped.append, dropped)
        call.awaited.atexit = False
        return [join(pieces, call.batch, call.cuts) for pieces in zip(*parts, strict=True)]

    # -- backward ----------------------------------------------------------------------------

    def run_backward(
        self,
        call: _Call,
        kept: Sequence[torch.Tensor | None],
        grad_outputs: Sequence[torch.Tensor | None],
    ) -> list[torch.Tensor | None]:
        """Recompute every micro-batch with a graph and back-propagate; return the inputs' gradients."""
        host = self._host
        if call.step != host.global_step:
            raise StateError(
                f"backward reached unit {self.unit.name!r} of a step that is over: call backward() once,"
                " before runtime.step()"
            )
        if call.awaited is None or call.awaited.detach() is None:
            raise StateError(
                f"backward reached unit {self.unit.name!r} a second time: its saved input is gone and its"
                " update may have begun; sum the losses and call backward() once, without retain_graph"
            )
        inputs = [
            host.activations.restore(call.saved[index]) if index in call.saved else tensor
            for index, tensor in zip(call.tensor_indices, kept, strict=True)
        ]
        visit = Visit(self.unit.name, Phase.BACKWARD)
        gradients: list[list[torch.Tensor | None]] = [[] for _ in inputs]
        with self._visit(visit, Pass.TRAIN) as weights:
            buffers = host.begin_gradients(self.unit)
            with self._bound(weights, buffers), host.rng.preserved(), _buffers_preserved(call):
                for (start, stop), state in zip(call.cuts, call.rng, strict=True):
                    host.rng.set(state)
                    with host.trace.span(self.unit.name, "compute", phase="backward", row=start):
                        part = self._backward_micro_batch(call, inputs, grad_outputs, start, stop)
                        for buffer in buffers.values():
                            buffer.end_micro_batch()
                    for pieces, piece in zip(gradients, part, strict=True):
                        pieces.append(piece)
            host.finish_gradients(self.unit, buffers)
        for saved in call.saved.values():
            host.activations.drop(saved)
        return [
            join_gradient(pieces, tensor, call.batch, call.cuts) if wants else None
            for pieces, tensor, wants in zip(gradients, inputs, call.wants_grad, strict=True)
        ]

    def _backward_micro_batch(
        self,
        call: _Call,
        inputs: Sequence[torch.Tensor | None],
        grad_outputs: Sequence[torch.Tensor | None],
        start: int,
        stop: int,
    ) -> list[torch.Tensor | None]:
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(wants)
            for tensor, wants in zip(cut(inputs, call.batch, start, stop), call.wants_grad, strict=True)
        ]
        with torch.enable_grad(), _autocast_as(call):
            outputs = _tensor_leaves(call, self._original_on(call, leaves))
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, cut(grad_outputs, call.batch, start, stop), strict=True)
            if output.requires_grad and grad is not None
        ]
        if pairs:
            torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
        return [None if leaf is None else leaf.grad for leaf in leaves]

    # -- binding -----------------------------------------------------------------------------

    def _original_on(self, call: _Call, tensors: Sequence[torch.Tensor | None]) -> Any:
        leaves = list(call.leaves)
        for index, tensor in zip(call.tensor_indices, tensors, strict=True):
            leaves[index] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, call.tree)
        return self._original(*args, **kwargs)

    @contextlib.contextmanager
    def _visit(self, visit: Visit, kind: Pass) -> Iterator[Mapping[str, WeightsOnDevice]]:
        weights = self._host.enter(visit, kind)
        try:
            yield weights
        except BaseException as error:
            # Not handled here: noted, so that a half-done step is never committed, and raised on. A
            # forward without a graph is no part of the step.
            if kind is Pass.TRAIN:
                self._host.abandon(error)
            raise
        finally:
            self._host.leave(visit, kind)

    @contextlib.contextmanager
    def _bound(
        self, weights: Mapping[str, WeightsOnDevice], buffers: Mapping[str, GradientBuffer] | None
    ) -> Iterator[None]:
        """Bind fetched weights (and gradient views) to the modules for the time of a run."""
        leaves: dict[tuple[str, str], torch.Tensor] = {}
        before: list[tuple[_Place, Any]] = []
        try:
            for place in self._places:
                key = (place.owner, place.tensor)
                if key not in leaves:
                    leaves[key] = self._leaf(place, weights[place.owner], buffers)
                before.append((place, place.module._parameters[place.name]))
                # The annotation says Parameter; modules only read the entry, as a tensor.
                place.module._parameters[place.name] = leaves[key]  # type: ignore[assignment]
            yield
        finally:
            for place, parameter in before:
                place.module._parameters[place.name] = parameter

    def _leaf(
        self, place: _Place, weights: WeightsOnDevice, buffers: Mapping[str, GradientBuffer] | None
    ) -> torch.Tensor:
        spec, trainable = self._records[place.owner].locate(place.tensor)
        flat = weights.trainable if trainable else weights.frozen
        leaf = flat[spec.offset : spec.end].view(spec.shape).detach()
        if trainable and buffers is not None:
            leaf.requires_grad_()
            leaf.grad = buffers[place.owner].micro[spec.offset : spec.end].view(spec.shape)
        return leaf


class _RunUnit(torch.autograd.Function):
    """The node that stands for one call of a unit."""

    @staticmethod
    def forward(
        ctx: Any, streamed: StreamedUnit, call: _Call, anchor: torch.Tensor, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        outputs = streamed.run_forward(call, tensors)
        ctx.streamed, ctx.call = streamed, call
        ctx.save_for_backward(
            *(None if wants else tensor for tensor, wants in zip(tensors, call.wants_grad, strict=True))
        )
        ctx.mark_non_differentiable(*(output for output in outputs if not _may_have_gradient(output)))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise StateError(
                "backward with create_graph=True: the graph of a streamed unit's gradient is not kept, so a"
                " gradient of it (a gradient penalty) would be wrong; leave create_graph out"
            )
        gradients = ctx.streamed.run_backward(ctx.call, ctx.saved_tensors, grad_outputs)
        return (None, None, None, *gradients)


_TENSOR = object()


@contextlib.contextmanager
def _buffers_preserved(call: _Call) -> Iterator[None]:
    """Undo what a recompute writes into buffers: the forward has counted this batch already."""
    before = [(buffer, buffer.clone()) for buffer in call.changed_buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)


@contextlib.contextmanager
def _autocast_as(call: _Call) -> Iterator[None]:
    """Cast as the forward of `call` did. Without autocast's cache: it would keep every cast weight."""
    with contextlib.ExitStack() as entered:
        for kind, dtype, enabled in call.autocast:
            entered.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        yield


def _tensor_leaves(call: _Call, result: Any) -> list[torch.Tensor]:
    """Return the tensors of a result, and note the rest of it in `call`."""
    leaves, tree = pytree.tree_flatten(result)
    for leaf in leaves:
        if _hides_tensors(leaf):
            raise StateError(
                f"a unit returned a {type(leaf).__name__}, which holds tensors where torch.utils._pytree does"
                " not see them: their gradients would be lost; return tuples or dicts, or register the class"
            )
    call.output_tree = tree
    call.output_leaves = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _apart_from(weights: Mapping[str, WeightsOnDevice], leaves: list[Any]) -> list[Any]:
    """Copy what is a view of a weight (a table of positions, cut to length): the next unit's weights
    will lie in its bytes. Return `leaves` itself when there is nothing to copy."""
    buffers = {
        space.untyped_storage().data_ptr()
        for unit in weights.values()
        for space in (unit.trainable, unit.frozen)
        if space.numel()
    }

    def is_view(leaf: Any) -> bool:
        strided = isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_meta
        return strided and leaf.untyped_storage().data_ptr() in buffers

    if not any(is_view(leaf) for leaf in leaves):
        return leaves
    return [leaf.clone() if is_view(leaf) else leaf for leaf in leaves]


def _running_statistics(module: torch.nn.Module) -> set[int]:
    # torch's batch norms write them without counting a version.
    norms = (inner for inner in module.modules() if isinstance(inner, _NormBase))
    return {id(buffer) for norm in norms for buffer in norm.buffers() if norm.training}


def _hides_tensors(leaf: Any) -> bool:
    if isinstance(leaf, torch.Tensor) or _is_cache(leaf):
        return False
    return any(
        isinstance(value, torch.Tensor) and _may_have_gradient(value)
        for value in getattr(leaf, "__dict__", {}).values()
    )


def _version(tensor: torch.Tensor) -> int:
    # Tensors made in inference mode count no versions; autograd refuses to save them.
    return 0 if tensor.is_inference() else tensor._version


def _may_have_gradient(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_cache(value: Any) -> bool:
    """Return whether `value` is a KV cache, by the methods that all of transformers' caches have.

    By methods and not by name or position: GPT-2 gives its blocks the cache as a positional argument.
    """
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def _split_path(module: torch.nn.Module, path: str) -> tuple[torch.nn.Module, str]:
    prefix, _, name = path.rpartition(".")
    return (module.get_submodule(prefix) if prefix else module), name
