"""Decides which modules of a model are units. Pure: reads the module tree, changes and keeps nothing.

Invariants of a cut: every unit's module has a `forward` of its own, so that running it is an event
to wait for; no unit lies inside another; every parameter of the model is held inside a unit.

[Note: the cut] The walk goes from the root down, in order of definition, and stops at the first
module that is

1. a block by declaration: its class is in some `_no_split_modules`, or is a
   `GradientCheckpointingLayer` (Hugging Face marks its decoder layers in both ways);
2. a block by structure: an element of a ModuleList, ModuleDict or Sequential, or one of several
   siblings of one class;
3. a holder of parameters: an embedding, a norm, a head, or a few modules around a parameter of
   their own (nn.MultiheadAttention, a vision embedding with its class token).

It walks on through a module that contains declared blocks, whatever that module's own shape, and
through one that contains a stack (a container of at least two modules with modules in them), unless
it is one of several equals in a container: the outermost stack wins, experts stay in their layer.

[Note: finer cuts] A unit found so may be too large for a budget. One whose forward only calls its children
(`opening.py`) can be cut into them: they become units in its place, in the order in which they are called.
Others stay whole, however large. What such a module computes between its children (residual sums, the
product in a gated MLP) belongs to no unit, so autograd keeps its tensors on the device until backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import UnitError
from .opening import inspect_forward

__all__ = ["Cut", "cut_model", "finer_cut", "why_whole"]

# The full name and the module of every unit, in order of definition.
Cut = tuple[tuple[str, nn.Module], ...]

# PEFT's layers read the weight of their base layer as well as call it (DoRA, merging), so each moves
# as one. Known by name, like Hugging Face's: neither library need be installed.
_ADAPTER_CLASSES = frozenset({"BaseTunerLayer", "TrainableTokensWrapper"})
_BLOCK_CLASSES = frozenset({"GradientCheckpointingLayer"})

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_NAMES_SHOWN = 8


def cut_model(model: nn.Module) -> Cut:
    """Return the full name and the module of every unit, in order of definition.

    Raises:
        UnitError: there is no unit, units are nested, a parameter is held outside every unit, or a
            module is compiled by TorchScript.
    """
    _check_python_modules(model)
    cut = tuple(_walk(model))
    _check_found(model, cut)
    _check_apart(cut)
    _check_complete(model, cut)
    return cut


def finer_cut(cut: Cut) -> Cut | None:
    """Return `cut` with its largest units cut into their children, or None where no unit may be.

    All units of the same size are cut alike, since they are the layers of one stack; see [Note: finer cuts].
    """
    holders = Counter(id(inner) for _, module in cut for inner in module.modules())
    sizes = {id(module): _numel(module) for _, module in cut}

    def calls(module: nn.Module) -> tuple[str, ...]:
        # A part that another unit holds as well would be a unit inside a unit.
        alone = all(holders[id(inner)] == 1 for inner in module.modules())
        return inspect_forward(module).calls if alone and _may_open(module) else ()

    modules = sorted((module for _, module in cut), key=lambda module: sizes[id(module)], reverse=True)
    largest = next((sizes[id(module)] for module in modules if calls(module)), None)
    if largest is None:
        return None
    finer: list[tuple[str, nn.Module]] = []
    for name, module in cut:
        children = calls(module) if sizes[id(module)] == largest else ()
        finer += [(_join(name, key), module.get_submodule(key)) for key in children] or [(name, module)]
    return tuple(finer)


def why_whole(module: nn.Module) -> str:
    """Return what keeps a unit from being cut into its children, in words; empty where it may be."""
    if _holds_parameters(module):
        return "it holds parameters itself"
    return inspect_forward(module).obstacle if _may_open(module) else "its parts share or read parameters"


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    declared = _declared_classes(model)
    seen: set[int] = set()

    def visit(
        name: str, module: nn.Module, *, element: bool, repeated: bool
    ) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:  # the same module under a second name
            return
        seen.add(id(module))
        # The root is never a unit: nothing would be left to fetch while it runs.
        if name and _has_forward(module) and _is_unit(module, declared, element=element, repeated=repeated):
            yield name, module
            return
        children = [(key, child) for key, child in module.named_children() if _has_parameters(child)]
        counts = Counter(type(child) for _, child in children)
        for key, child in children:
            yield from visit(
                _join(name, key),
                child,
                element=isinstance(module, _CONTAINERS),
                repeated=counts[type(child)] > 1,
            )

    return visit("", model, element=False, repeated=False)


def _may_open(module: nn.Module) -> bool:
    # Adapters and parametrised modules read what their children hold, holders what they hold themselves.
    if _is_a(module, _ADAPTER_CLASSES) or is_parametrized(module) or _holds_parameters(module):
        return False
    # One that two children share is named after the first by definition, not after the first that is called.
    return len(_names(module)) == len(set(module.parameters()))


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _is_unit(module: nn.Module, declared: frozenset[str], *, element: bool, repeated: bool) -> bool:
    # A parametrised module computes its weight from parameters that its children hold.
    if _is_a(module, declared | _ADAPTER_CLASSES) or is_parametrized(module):
        return True
    if any(_is_a(inner, declared) for inner in module.modules()):
        return False
    if any(_is_stack(inner) for inner in module.modules()) and not (element and repeated):
        return False
    return element or repeated or _holds_parameters(module)


def _declared_classes(model: nn.Module) -> frozenset[str]:
    return _BLOCK_CLASSES.union(
        *(getattr(module, "_no_split_modules", None) or () for module in model.modules())
    )


def _is_a(module: nn.Module, class_names: frozenset[str]) -> bool:
    return any(base.__name__ in class_names for base in type(module).__mro__)


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, _CONTAINERS):
        return False
    blocks = [child for child in module.children() if any(map(_has_parameters, child.children()))]
    return len(blocks) > 1


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _has_forward(module: nn.Module) -> bool:
    # ModuleList, ParameterDict and their like have none: their contents are read, they never run.
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def _holds_parameters(module: nn.Module) -> bool:
    """Return whether `module` itself holds a parameter, perhaps in a ParameterDict or the like."""
    return bool(_own_parameters(module)) or any(
        not _has_forward(child) and _holds_parameters(child) for child in module.children()
    )


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(remove_duplicate=False)]


def _own_parameters(module: nn.Module) -> list[str]:
    return [key for key, _ in module.named_parameters(recurse=False, remove_duplicate=False)]


def _check_python_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnitError(
                f"cannot cut {_describe(name, module)}: TorchScript holds its parameters out of reach; "
                "give the Python module that it was made from"
            )


def _check_found(model: nn.Module, cut: Cut) -> None:
    if cut:
        return
    kind = type(model).__name__
    if not _has_parameters(model):
        raise UnitError(f"no units in {kind}: it has no parameters, so there is nothing to move")
    raise UnitError(
        f"no units in {kind}: looked for modules with parameters below the root (decoder layers, elements "
        f"of a ModuleList or Sequential, embeddings, norms, heads), found only {_listed(_own_names(model))} "
        "of the root itself; build the model from several modules, for example nn.Sequential(...), or "
        "keep it in memory: one module alone leaves nothing to stream"
    )


def _own_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _check_apart(cut: Cut) -> None:
    names = {id(module): name for name, module in cut}
    for name, module in cut:
        for inner_path, inner in module.named_modules():
            if inner is not module and id(inner) in names:
                raise UnitError(
                    f"units overlap: {_describe(names[id(inner)], inner)} is also part of unit {name!r}, as "
                    f"{inner_path!r}; register the module in one of the two places, or give each its own and "
                    "tie their weights (a.weight = b.weight)"
                )


def _check_complete(model: nn.Module, cut: Cut) -> None:
    inside = {id(inner) for _, module in cut for inner in module.modules()}
    strays = [
        _join(name, key)
        for name, module in model.named_modules()
        if id(module) not in inside
        for key in _own_parameters(module)
    ]
    if strays:
        raise UnitError(
            f"{len(strays)} parameters of {type(model).__name__} lie outside every unit: {_listed(strays)}; "
            "they are held by the root, or by a module around whole blocks, which cannot be fetched as one; "
            "move each into a small module of its own, whose forward uses it as nn.Embedding does its table"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMES_SHOWN])
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown


def _describe(name: str, module: nn.Module) -> str:
    return f"{name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
