"""The order of visits and what is near: pure functions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offload.tiers.schedule import Pass, Phase, Schedule, Visit, completion_order, window_slots

TIED = Schedule(
    ("embed", "a", "b", "head"), {"embed": ("embed",), "a": ("a",), "b": ("b",), "head": ("embed",)}
)


def test_a_training_pass_goes_forward_then_backward() -> None:
    visits = TIED.visits(Pass.TRAIN)
    assert [visit.unit for visit in visits] == ["embed", "a", "b", "head", "head", "b", "a", "embed"]
    assert [visit.phase for visit in visits] == [Phase.FORWARD] * 4 + [Phase.BACKWARD] * 4


def test_upcoming_records_turn_around_and_count_a_borrowed_record_once() -> None:
    position = TIED.locate(Visit("b", Phase.FORWARD), -1, Pass.TRAIN)
    assert position == 2
    assert TIED.upcoming_records(position, Pass.TRAIN, 4) == ("embed", "b", "a")


def test_the_last_visit_of_a_pass_is_followed_by_the_first_of_the_next() -> None:
    assert TIED.upcoming_records(7, Pass.TRAIN, 2) == ("embed", "a")
    assert TIED.upcoming_records(3, Pass.INFER, 2) == ("embed", "a")


def test_a_unit_called_twice_is_located_behind_the_last_position() -> None:
    schedule = Schedule(("a", "b", "a"), {"a": ("a",), "b": ("b",)})
    first = schedule.locate(Visit("a", Phase.FORWARD), -1, Pass.INFER)
    assert first == 0
    assert schedule.locate(Visit("a", Phase.FORWARD), first, Pass.INFER) == 2


def test_an_unknown_visit_is_not_located() -> None:
    assert TIED.locate(Visit("c", Phase.FORWARD), -1, Pass.TRAIN) is None
    assert TIED.locate(Visit("a", Phase.BACKWARD), -1, Pass.INFER) is None


def test_a_shared_record_completes_at_its_owner() -> None:
    trained = {"embed": ("embed",), "a": ("a",), "b": ("b",), "head": ("embed",)}
    assert completion_order(TIED.order, trained) == ("b", "a", "embed")


@given(
    st.lists(
        st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 1000), max_size=3), min_size=1, max_size=12
    ),
    st.integers(1, 5),
)
def test_any_window_fits_its_slots_one_record_to_a_slot(sizes: list[dict[str, int]], length: int) -> None:
    # A record has one size wherever it stands.
    size_of = {owner: nbytes for visit in sizes for owner, nbytes in visit.items()}
    visits = [{owner: size_of[owner] for owner in visit} for visit in sizes]
    slots = window_slots(visits, length)
    assert list(slots) == sorted(slots, reverse=True)
    for start in range(len(visits)):
        window: dict[str, int] = {}
        for step in range(min(length, len(visits))):
            window.update(visits[(start + step) % len(visits)])
        needed = sorted(window.values(), reverse=True)
        assert len(needed) <= len(slots)
        assert all(slot >= size for slot, size in zip(slots, needed, strict=False))
