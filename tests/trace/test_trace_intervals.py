"""The union of spans against a reference on a grid, and its bound."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from offload.trace.intervals import MAX_INTERVALS, Intervals

SPANS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 9)).map(lambda s: (s[0], s[0] + s[1])), max_size=30
)


def union(spans: list[tuple[int, int]]) -> set[int]:
    """The unit cells that the spans cover."""
    return {cell for start, end in spans for cell in range(start, end)}


def intervals(spans: list[tuple[int, int]], horizon_s: float = -math.inf) -> Intervals:
    result = Intervals(horizon_s)
    for start, end in spans:
        result.add(start, end)
    return result


@given(SPANS)
def test_total_is_the_length_of_the_union(spans: list[tuple[int, int]]) -> None:
    assert intervals(spans).total_s() == len(union(spans))


@given(SPANS, SPANS)
@example([(0, 9)], [(1, 2), (3, 4)])
@example([(1, 2), (3, 4)], [(0, 9)])
def test_overlap_is_the_length_of_the_intersection(
    a: list[tuple[int, int]], b: list[tuple[int, int]]
) -> None:
    assert intervals(a).overlap_s(intervals(b)) == len(union(a) & union(b))


@given(SPANS, st.integers(0, 50))
def test_nothing_counts_before_the_horizon(spans: list[tuple[int, int]], horizon: int) -> None:
    assert intervals(spans, horizon).total_s() == sum(cell >= horizon for cell in union(spans))


def test_older_intervals_are_summed_up_and_the_total_stays() -> None:
    result = Intervals(-math.inf)
    for i in range(3 * MAX_INTERVALS):
        result.add(2 * i, 2 * i + 1)
        assert len(result._starts) == len(result._ends) <= MAX_INTERVALS
    assert result.total_s() == 3 * MAX_INTERVALS


def test_span_that_reaches_behind_the_horizon_counts_no_time_twice() -> None:
    result = Intervals(-math.inf)
    for i in range(MAX_INTERVALS + 1):
        result.add(2 * i, 2 * i + 1)
    end = 2 * MAX_INTERVALS + 1
    result.add(0, end)
    gaps_lost = MAX_INTERVALS // 2 - 1
    assert result.total_s() == end - gaps_lost


def test_touching_spans_are_one_interval() -> None:
    result = intervals([(0, 1), (2, 3), (1, 2)])
    assert result.total_s() == 3
    assert len(result._starts) == 1


def test_empty_span_adds_nothing() -> None:
    result = intervals([(1, 1)])
    assert result.total_s() == 0
    assert result._starts == []


@pytest.mark.parametrize("spans", [[], [(0, 1)]])
def test_overlap_with_nothing_is_zero(spans: list[tuple[int, int]]) -> None:
    assert intervals(spans).overlap_s(intervals([])) == 0
