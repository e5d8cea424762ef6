"""Where chunks lie: every chunk once, in proportion, aligned, without overlaps."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.store.stripe import MAX_DEAL, Deal, Stripe, deal_by_weight, pack_extents

weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=8)
chunk_lengths = st.integers(1, 8).map(lambda n: 4096 * n)
lengths = st.integers(1, 200).map(lambda n: 4096 * n)


@st.composite
def tables(draw):
    """Stripes of a table of records on up to four drives."""
    deal = deal_by_weight(draw(st.lists(st.floats(0.1, 10), min_size=1, max_size=4)))
    chunk_nbytes = draw(chunk_lengths)
    stripes, first = [], 0
    for nbytes in draw(st.lists(lengths, min_size=1, max_size=6)):
        stripes.append(Stripe(nbytes, chunk_nbytes, first, deal))
        first += stripes[-1].num_chunks
    return stripes


@given(weights)
def test_every_prefix_of_a_deal_is_within_one_chunk_of_proportion(weights):
    deal = deal_by_weight(weights)
    length = len(deal.order)
    for drive in range(len(weights)):
        share = deal.order.count(drive)
        for chunk in range(2 * length + 1):
            assert abs(deal.count(drive, chunk) * length - share * chunk) < length


@given(weights)
def test_a_deal_follows_the_weights(weights):
    deal = deal_by_weight(weights)
    assert len(deal.order) <= MAX_DEAL
    for drive, weight in enumerate(weights):
        assert abs(deal.order.count(drive) / len(deal.order) - weight / sum(weights)) <= 1 / MAX_DEAL


@pytest.mark.parametrize(
    ("weights", "order"),
    [([5], (0,)), ([1, 1], (0, 1)), ([1, 1, 1], (0, 1, 2)), ([3, 1], (0, 0, 0, 1)), ([1e-9, 1], (1,))],
)
def test_deals_of_simple_weights(weights, order):
    assert deal_by_weight(weights).order == order


def test_equal_weights_deal_evenly_whatever_their_number():
    for num_drives in range(1, 65):
        assert deal_by_weight([0.7] * num_drives).order == tuple(range(num_drives))


@pytest.mark.parametrize("weights", [[], [0.0], [1, -1], [float("nan")], [1, float("inf")]])
def test_weights_that_are_not_positive_numbers_are_refused(weights):
    with pytest.raises(ValueError, match="positive"):
        deal_by_weight(weights)


@pytest.mark.parametrize("order", [(), (2,), (-1,), (0,) * (MAX_DEAL + 1)])
def test_a_deal_that_no_run_has_is_refused(order):
    with pytest.raises(ValueError, match="deal"):
        Deal(order, 2)


@given(tables())
def test_count_is_what_dealing_one_by_one_counts(stripes):
    deal = stripes[0].deal
    for chunk in (0, 1, 7, 2 * len(deal.order) + 3):
        dealt = [deal.drive(number) for number in range(chunk)]
        assert [deal.count(d, chunk) for d in range(deal.num_drives)] == [
            dealt.count(d) for d in range(deal.num_drives)
        ]


@given(tables())
def test_chunks_of_all_extents_have_places_of_their_own(stripes):
    offsets = pack_extents(stripes, [2] * len(stripes))
    taken: dict[int, list[tuple[int, int]]] = {}
    for stripe, of_record in zip(stripes, offsets, strict=True):
        for extent in of_record:
            for chunk in range(stripe.num_chunks):
                drive, offset = stripe.place(chunk)
                begin, end = stripe.chunk_span(chunk)
                assert offset % 4096 == 0
                assert offset + end - begin <= stripe.drive_nbytes(drive)
                taken.setdefault(drive, []).append(
                    (extent[drive] + offset, extent[drive] + offset + end - begin)
                )
    for drive, spans in taken.items():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        # Nothing lies between them either: the data file is exactly what the extents need.
        assert spans[0][0] == 0
        assert sum(end - begin for begin, end in spans) == spans[-1][1]
        assert spans[-1][1] == 2 * sum(stripe.drive_nbytes(drive) for stripe in stripes)


@given(tables(), st.data(), st.integers(4096, 1 << 18))
def test_runs_cover_a_range_in_order_and_contiguously(stripes, data, max_nbytes):
    stripe = data.draw(st.sampled_from(stripes))
    first = data.draw(st.integers(0, stripe.num_chunks - 1))
    end = data.draw(st.integers(first + 1, stripe.num_chunks))
    runs = list(stripe.runs(first, end, max_nbytes))
    assert [chunk for run in runs for chunk in range(run.first, run.end)] == list(range(first, end))
    for run in runs:
        assert run.nbytes <= max(max_nbytes, stripe.chunk_nbytes)
        at = run.offset_bytes
        for chunk in range(run.first, run.end):
            assert stripe.place(chunk) == (run.drive, at)
            begin, stop = stripe.chunk_span(chunk)
            at += stop - begin
        assert at == run.offset_bytes + run.nbytes


def test_one_drive_reads_a_record_in_one_request():
    stripe = Stripe(40960, 4096, 3, deal_by_weight([1]))
    assert [(run.first, run.end, run.nbytes) for run in stripe.runs(0, 10, 1 << 20)] == [(0, 10, 40960)]


def test_records_of_one_chunk_are_spread_over_the_drives():
    deal = deal_by_weight([1, 1])
    places = [Stripe(4096, 4096, number, deal).place(0)[0] for number in range(6)]
    assert places == [0, 1, 0, 1, 0, 1]
