"""Describes the units of a model: what each owns, where it lies in its records, what it borrows.

Invariants: every parameter has one owner, the first unit in order that holds it, so an owner comes
before its borrowers; every tensor begins at a multiple of `ELEMENT_ALIGNMENT` elements; tensors and
bindings keep the order of definition.

Only names, shapes, dtypes, flags and identities are read, so a model on the meta device is as good
as a loaded one. Buffers stay with their modules and are not described. Nothing is changed or kept;
any thread may call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import UnitError
from ..sizes import align_up
from ..specs import ELEMENT_ALIGNMENT, TensorSpec, UnitLayout
from .cut import Cut, cut_model, finer_cut

__all__ = ["Binding", "Unit", "find_cuts", "find_units"]

# float32 holds every value of these. A record would change the values of any other dtype.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Binding:
    """One parameter as a unit's module sees it.

    Attributes:
        path: its name relative to the unit's module: `self_attn.q_proj.weight`, `weight` for a leaf.
        owner: name of the unit whose record holds it: the unit itself unless the parameter is shared.
        tensor: name of its `TensorSpec` in the owner's layout.
        trainable: whether it has a gradient, and so lies in the owner's trainable space.
    """

    path: str
    owner: str
    tensor: str
    trainable: bool


@dataclass(frozen=True, slots=True)
class Unit:
    """One module of the cut: what it owns and what it needs.

    Attributes:
        index: place in the expected order of execution, which is the order of definition. It is a
            guess: OPT defines its final norm before its layers.
        name: full name of its module, for `model.get_submodule`; never empty.
        layout: the parameters it owns; without tensors when every parameter is borrowed.
        bindings: every parameter its module reaches, one entry a path, in order of definition.
        is_part: whether a module around it was cut, and computes outside units.
    """

    index: int
    name: str
    layout: UnitLayout
    bindings: tuple[Binding, ...]
    is_part: bool = False

    @property
    def records(self) -> tuple[str, ...]:
        """Names of the owners it needs: itself first if it owns anything, the others as they appear."""
        owners = dict.fromkeys(binding.owner for binding in self.bindings)
        return tuple(sorted(owners, key=lambda owner: owner != self.name))

    @property
    def trained_records(self) -> tuple[str, ...]:
        """Names of the owners whose gradients its backward adds to, in order of its bindings."""
        return tuple(dict.fromkeys(binding.owner for binding in self.bindings if binding.trainable))


def find_units(model: nn.Module) -> tuple[Unit, ...]:
    """Cut `model` into units, in expected order of execution.

    A parameter that several modules hold (tied embeddings) is owned by the first unit that holds it
    and borrowed by the others.

    Args:
        model: a module tree, on any device, meta included.

    Raises:
        UnitError: `cut_model` finds no cut; a parameter is uninitialised, a quantised or distributed
            tensor, or of another dtype than float32, bfloat16 and float16; or two parameters share
            memory without being one.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.ReLU(), nn.Linear(4, 10, bias=False))
    >>> model[2].weight = model[0].weight
    >>> [(unit.name, unit.records) for unit in find_units(model)]
    [('0', ('0',)), ('2', ('0',))]
    """
    cut = cut_model(model)
    return _describe(cut, cut)


def find_cuts(model: nn.Module) -> Iterator[tuple[Unit, ...]]:
    """Yield every cut of `model` that is worth a try: that of `find_units` first, then finer ones.

    Each cuts the largest units of the one before into their parts, until none is left that may be cut. They
    depend on the model alone, so a run can be found again among them.

    Args:
        model: as for `find_units`.

    Raises:
        UnitError: as `find_units` does.

    >>> blocks = [nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2)]
    >>> [[unit.name for unit in units] for units in find_cuts(nn.Sequential(*blocks))]
    [['0', '1'], ['0.0', '0.1', '1.0', '1.1']]
    """
    coarsest = cut_model(model)
    cut: Cut | None = coarsest
    while cut is not None:
        yield _describe(cut, coarsest)
        cut = finer_cut(cut)


def _describe(cut: Cut, coarsest: Cut) -> tuple[Unit, ...]:
    homes = _Homes()
    whole = {name for name, _ in coarsest}
    return tuple(
        _describe_unit(index, name, module, homes, is_part=name not in whole)
        for index, (name, module) in enumerate(cut)
    )


class _Homes:
    """Who owns each parameter seen so far, by identity."""

    def __init__(self) -> None:
        self._homes: dict[int, tuple[str, str]] = {}
        self._names_by_memory: dict[tuple[int, int], str] = {}

    def claim(self, parameter: nn.Parameter, unit: str, tensor: str) -> bool:
        """Make `unit` the owner of `parameter` and return True, or return False where it has one."""
        if id(parameter) in self._homes:
            return False
        _check_parameter(parameter, tensor)
        self._check_memory(parameter, tensor)
        self._homes[id(parameter)] = (unit, tensor)
        return True

    def home(self, parameter: nn.Parameter) -> tuple[str, str]:
        """Return the owner's name and the tensor's name."""
        return self._homes[id(parameter)]

    def _check_memory(self, parameter: nn.Parameter, tensor: str) -> None:
        if parameter.numel() == 0:
            return
        # The identity of the storage, not its address: on the meta device every address is 0. Only
        # the first element is compared, so parameters cut out of one buffer side by side pass.
        memory = (
            parameter.untyped_storage()._cdata,
            int(parameter.storage_offset()) * parameter.element_size(),
        )
        other = self._names_by_memory.setdefault(memory, tensor)
        if other != tensor:
            raise UnitError(
                f"parameters {other!r} and {tensor!r} share memory but are two Parameters, so they would be "
                "trained, or frozen, apart; tie them by assigning one to the other (a.weight = b.weight), "
                "or separate them with clone()"
            )


def _describe_unit(index: int, name: str, module: nn.Module, homes: _Homes, *, is_part: bool) -> Unit:
    spaces: dict[bool, list[TensorSpec]] = {True: [], False: []}
    bindings = []
    for path, parameter in module.named_parameters(remove_duplicate=False):
        tensor = f"{name}.{path}"
        if homes.claim(parameter, name, tensor):
            space = spaces[parameter.requires_grad]
            offset = align_up(space[-1].end, ELEMENT_ALIGNMENT) if space else 0
            space.append(TensorSpec(tensor, tuple(parameter.shape), offset))
        bindings.append(Binding(path, *homes.home(parameter), parameter.requires_grad))
    layout = UnitLayout(name, trainable=tuple(spaces[True]), frozen=tuple(spaces[False]))
    return Unit(index, name, layout, tuple(bindings), is_part)


def _check_parameter(parameter: nn.Parameter, tensor: str) -> None:
    if is_lazy(parameter):
        raise UnitError(
            f"parameter {tensor!r} is uninitialised, so its shape is unknown; run one forward pass "
            "with a sample input before attaching"
        )
    if not _is_plain(parameter):
        raise UnitError(
            f"parameter {tensor!r} is a {type(parameter).__name__} of layout {parameter.layout}, not a plain "
            "dense tensor; give the model before it is quantised, distributed or made sparse"
        )
    if parameter.dtype not in _DTYPES:
        raise UnitError(
            f"parameter {tensor!r} has dtype {parameter.dtype}, and a record holds float32, bfloat16 and "
            "float16 values; convert it (model.float()), load the model unquantised, or make it a buffer: "
            "buffers stay as they are"
        )


def _is_plain(tensor: torch.Tensor) -> bool:
    # Wrapper subclasses (DTensor, torchao's quantised tensors) show a dtype and shape that are not
    # those of the tensors inside.
    return tensor.layout is torch.strided and not is_traceable_wrapper_subclass(tensor)
