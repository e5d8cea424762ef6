"""What each unit owns and borrows, and where its tensors lie."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from offload.errors import UnitError
from offload.specs import ELEMENT_ALIGNMENT, TensorSpec
from offload.units import Binding, find_units


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False))
    model[2].weight = model[0].weight
    return model


def test_units_are_numbered_in_order() -> None:
    assert [(unit.index, unit.name) for unit in find_units(tied())] == [(0, "0"), (1, "1"), (2, "2")]


def test_name_finds_the_module() -> None:
    model = tied()
    assert [model.get_submodule(unit.name) for unit in find_units(model)] == list(model)


def test_tensors_lie_in_order_at_aligned_offsets() -> None:
    (unit,) = find_units(nn.Sequential(nn.Linear(5, 13)))
    assert unit.layout.trainable == (TensorSpec("0.weight", (13, 5), 0), TensorSpec("0.bias", (13,), 128))
    assert unit.layout.trainable_numel == 256
    assert unit.layout.frozen_numel == 0


def test_bindings_name_path_owner_and_tensor() -> None:
    (unit,) = find_units(nn.Sequential(nn.Linear(2, 2)))
    assert unit.bindings == (Binding("weight", "0", "0.weight", True), Binding("bias", "0", "0.bias", True))


def test_frozen_parameters_have_a_space_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    (unit,) = find_units(model)
    assert unit.layout.frozen == (TensorSpec("0.weight", (2, 2), 0),)
    assert unit.layout.trainable == (TensorSpec("0.bias", (2,), 0),)
    assert [binding.trainable for binding in unit.bindings] == [False, True]


def test_tied_parameter_is_owned_by_the_first_and_borrowed_by_the_other() -> None:
    first, middle, last = find_units(tied())
    assert [tensor.name for tensor in first.layout.trainable] == ["0.weight"]
    assert last.layout.trainable == ()
    assert last.bindings == (Binding("weight", "0", "0.weight", True),)
    assert [unit.records for unit in (first, middle, last)] == [("0",), ("1",), ("0",)]


def test_tied_parameters_on_the_meta_device_are_one() -> None:
    with torch.device("meta"):
        model = tied()
    assert find_units(model) == find_units(tied())


def test_tied_frozen_parameter_is_borrowed_as_frozen() -> None:
    model = tied()
    model[0].weight.requires_grad_(False)
    first, _, last = find_units(model)
    assert [tensor.name for tensor in first.layout.frozen] == ["0.weight"]
    assert last.bindings == (Binding("weight", "0", "0.weight", False),)


def test_records_name_the_unit_itself_first() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[1].weight
    model[1].bias = model[0].bias
    assert [unit.records for unit in find_units(model)] == [("0",), ("1", "0"), ("2", "1")]


def test_parameter_twice_in_one_unit_has_one_tensor_and_two_bindings() -> None:
    block = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    block[1].weight = block[0].weight
    (unit,) = find_units(nn.Sequential(block))
    assert [tensor.name for tensor in unit.layout.trainable] == ["0.0.weight"]
    assert [(b.path, b.tensor) for b in unit.bindings] == [
        ("0.weight", "0.0.weight"),
        ("1.weight", "0.0.weight"),
    ]


def test_module_shared_by_two_blocks_is_owned_by_the_first() -> None:
    shared = nn.Linear(2, 2, bias=False)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2, bias=False), shared) for _ in range(2)])
    first, second = find_units(model)
    assert [tensor.name for tensor in first.layout.trainable] == ["0.0.weight", "0.1.weight"]
    assert second.bindings[1] == Binding("1.weight", "0", "0.1.weight", True)
    assert second.records == ("1", "0")


def test_scalar_and_empty_parameters_have_places() -> None:
    holder = nn.PReLU(1)
    holder.register_parameter("scalar", nn.Parameter(torch.tensor(1.0)))
    holder.register_parameter("empty", nn.Parameter(torch.empty(0, 3)))
    (unit,) = find_units(nn.Sequential(holder))
    offsets = [(tensor.name, tensor.numel, tensor.offset) for tensor in unit.layout.trainable]
    assert offsets == [("0.weight", 1, 0), ("0.scalar", 1, 128), ("0.empty", 0, 256)]


def test_buffers_are_not_described() -> None:
    (unit,) = find_units(nn.Sequential(nn.BatchNorm1d(4)))
    assert [binding.path for binding in unit.bindings] == ["weight", "bias"]


def test_units_pickle() -> None:
    units = find_units(tied())
    assert pickle.loads(pickle.dumps(units)) == units


def test_finding_units_changes_nothing() -> None:
    model = tied()
    before = {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()}
    find_units(model)
    assert before == {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()}


@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.booleans()), min_size=1, max_size=8))
def test_tensors_are_aligned_and_apart(parameters: list[tuple[list[int], bool]]) -> None:
    holder = nn.Identity()
    for i, (shape, trainable) in enumerate(parameters):
        holder.register_parameter(f"p{i}", nn.Parameter(torch.empty(shape, device="meta"), trainable))
    (unit,) = find_units(nn.Sequential(holder))
    layout = unit.layout
    for space, numel in ((layout.trainable, layout.trainable_numel), (layout.frozen, layout.frozen_numel)):
        assert all(tensor.offset % ELEMENT_ALIGNMENT == 0 for tensor in space)
        assert all(a.end <= b.offset for a, b in itertools.pairwise(space))
        assert numel % ELEMENT_ALIGNMENT == 0
        assert numel >= max((tensor.end for tensor in space), default=0)
    assert len(layout.trainable) + len(layout.frozen) == len(parameters)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("trainable", [True, False])
def test_two_parameters_over_one_memory_are_refused(device: str, trainable: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(device)
    model[1].weight = nn.Parameter(model[0].weight.data.T, requires_grad=trainable)
    with pytest.raises(UnitError, match=r"'0.weight' and '1.weight' share memory but are two Parameters"):
        find_units(model)


def test_parameters_side_by_side_in_one_buffer_are_accepted() -> None:
    flat = torch.zeros(32)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for i, layer in enumerate(model):
        layer.weight = nn.Parameter(flat[16 * i : 16 * i + 16].view(4, 4))
    assert len(find_units(model)) == 2


def test_parameters_of_two_dtypes_in_one_buffer_are_compared_by_bytes() -> None:
    flat = torch.zeros(32)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight = nn.Parameter(flat[16:].view(4, 4))
    model[1].weight = nn.Parameter(flat.view(torch.bfloat16)[16:32].view(4, 4))
    assert len(find_units(model)) == 2
    model[1].weight = nn.Parameter(flat.view(torch.bfloat16)[32:48].view(4, 4))
    with pytest.raises(UnitError, match="share memory"):
        find_units(model)


def test_empty_parameters_share_no_memory() -> None:
    flat = torch.zeros(4)
    model = nn.Sequential(nn.PReLU(), nn.PReLU())
    for layer in model:
        layer.weight = nn.Parameter(flat[:0])
    assert len(find_units(model)) == 2


def test_uninitialised_parameter_is_refused_by_name() -> None:
    with pytest.raises(UnitError, match=r"'1.weight' is uninitialised.*run one forward"):
        find_units(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_that_float32_holds_are_accepted(dtype: torch.dtype) -> None:
    assert len(find_units(nn.Sequential(nn.Linear(2, 2, dtype=dtype)))) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    trainable = dtype.is_floating_point or dtype.is_complex
    model[0].weight = nn.Parameter(torch.empty(2, 2, dtype=dtype), requires_grad=trainable)
    with pytest.raises(UnitError, match=rf"'0.weight' has dtype {dtype}, .*unquantised"):
        find_units(model)


def test_sparse_parameter_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.eye(2).to_sparse())
    with pytest.raises(UnitError, match=r"'0.weight' is a Parameter of layout torch.sparse_coo"):
        find_units(model)


def test_wrapper_tensor_is_refused_by_name() -> None:
    # Stands for DTensor and for torchao's quantised tensors, which are made the same way.
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(TwoTensor(torch.eye(2), torch.eye(2)))
    with pytest.raises(UnitError, match=r"'0.weight' is a .*give the model before it is quantised"):
        find_units(model)
