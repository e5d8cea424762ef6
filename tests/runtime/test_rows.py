"""A batch cut into micro-batches, and put together again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import StateError
from offload.runtime.rows import cut, join, join_gradient, micro_batches


@given(batch=st.integers(1, 12), rows=st.one_of(st.none(), st.integers(1, 13)))
def test_what_is_cut_joins_to_the_same_batch(batch: int, rows: int | None) -> None:
    hidden = torch.arange(batch * 15).view(batch, 15, 1).float()
    positions = torch.arange(15).view(1, 15)
    size, cuts = micro_batches([hidden, positions], rows)
    parts = [cut([hidden, positions], size, start, stop) for start, stop in cuts]
    assert all(part[1] is positions for part in parts)
    assert rows is None or all(part[0] is not None and part[0].shape[0] <= rows for part in parts)
    whole = [part[0] for part in parts if part[0] is not None]
    assert torch.equal(join(whole, size, cuts), hidden)
    gradient = join_gradient(whole, hidden, size, cuts)
    assert gradient is not None
    assert torch.equal(gradient, hidden)


def test_the_gradient_of_what_every_micro_batch_saw_is_their_sum() -> None:
    table = torch.ones(1, 3)
    gradient = join_gradient([table, 2 * table], table, 4, ((0, 2), (2, 4)))
    assert gradient is not None
    assert torch.equal(gradient, 3 * table)


def test_as_many_rows_as_tokens_are_refused_where_another_argument_could_be_either() -> None:
    hidden, mask = torch.zeros(6, 6, 8), torch.zeros(6, 6)
    with pytest.raises(StateError, match="cannot tell rows from tokens"):
        micro_batches([hidden, mask], 2)


def test_as_many_rows_as_tokens_are_cut_where_nothing_else_begins_with_them() -> None:
    hidden, positions = torch.zeros(6, 6, 8), torch.zeros(1, 6)
    assert micro_batches([hidden, positions], 4) == (6, ((0, 4), (4, 6)))


def test_an_output_without_the_batch_in_front_is_refused() -> None:
    with pytest.raises(StateError, match="rows=None"):
        join([torch.zeros(1, 4), torch.zeros(1, 4)], 4, ((0, 2), (2, 4)))
