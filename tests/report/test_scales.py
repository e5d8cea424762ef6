"""Axes: round ticks, values inside, labels apart."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.report.charts import LATENCY_TICKS
from offload.report.scales import category_scale, linear_scale, log_scale, spread


@given(st.floats(1e-4, 1e4))
def test_a_linear_scale_reaches_from_zero_over_the_top_in_round_steps(top: float) -> None:
    scale = linear_scale(top, 200, 0)
    values = [float(tick.label) for tick in scale.ticks]
    assert values[0] == 0 and scale.at(0) == 200
    assert values[-1] >= top * (1 - 1e-6)
    assert 2 <= len(values) <= 6
    assert all(label == sorted(values)[place] for place, label in enumerate(values))
    assert len(set(values)) == len(values)


def test_a_linear_scale_of_nothing_has_an_axis() -> None:
    assert [tick.label for tick in linear_scale(0.0, 0, 100).ticks] == ["0", "1"]


def test_a_log_scale_puts_equal_factors_equally_far_apart() -> None:
    scale = log_scale(1e-5, 1e-2, 0, 300, LATENCY_TICKS)
    at = {tick.label: tick.at for tick in scale.ticks}
    assert at["100 us"] - at["10 us"] == pytest.approx(at["1 ms"] - at["100 us"], abs=0.2)
    assert list(at)[:4] == ["10 us", "20 us", "50 us", "100 us"]


def test_categories_are_centred() -> None:
    assert [tick.at for tick in category_scale(["a", "b", "c"], 0, 300)] == [50, 150, 250]


@given(st.lists(st.floats(0, 200), min_size=1, max_size=6))
def test_labels_keep_their_distance_and_their_order(wanted: list[float]) -> None:
    places = spread(wanted, 15, 0, 200)
    ordered = sorted(range(len(wanted)), key=lambda index: (wanted[index], index))
    for first, second in itertools.pairwise(ordered):
        assert places[second] - places[first] >= 14.8
    assert all(-0.1 <= place <= 200.1 for place in places)


def test_labels_that_are_apart_stay() -> None:
    assert spread([10, 50, 90], 15, 0, 100) == [10, 50, 90]
