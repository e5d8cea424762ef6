"""The conformance suite: sequences of transfers against a model in memory.

A batch is a set of requests in flight together that do not disturb each other (no write overlaps
anything); batches follow each other and overlap at will. Within one, waits come in any order.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from engine_workbench import QUEUE_DEPTH, SEGMENT_NBYTES, View, aligned, pattern
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload.aio import ALIGNMENT_NBYTES, Engine, Op, Request

# Offsets and sizes meet in the same few places, so that requests of different batches overlap often.
_SPACE_NBYTES = 3 * QUEUE_DEPTH * SEGMENT_NBYTES
_places = st.one_of(
    st.integers(0, _SPACE_NBYTES // ALIGNMENT_NBYTES).map(lambda page: page * ALIGNMENT_NBYTES),
    st.integers(0, _SPACE_NBYTES),
)
_sizes = st.one_of(
    st.integers(1, 2000),
    st.integers(1, 2 * QUEUE_DEPTH).map(lambda pages: pages * ALIGNMENT_NBYTES),
    st.integers(1, QUEUE_DEPTH + 1).map(lambda segments: segments * SEGMENT_NBYTES),
)


class Step(NamedTuple):
    """One request of a batch."""

    op: Op
    offset: int
    nbytes: int
    shift: int  # of the buffer, from a page boundary
    turn: int  # in which order it is waited for

    def disturbs(self, other: Step) -> bool:
        apart = self.offset + self.nbytes <= other.offset or other.offset + other.nbytes <= self.offset
        return not apart and "write" in (self.op, other.op)


_steps = st.builds(
    Step,
    st.sampled_from(["read", "write"]),
    _places,
    _sizes,
    st.sampled_from([0, 0, 0, 1, 512]),
    st.integers(),
)
_batches = st.lists(
    st.tuples(st.lists(_steps, min_size=1, max_size=8), st.booleans()), min_size=1, max_size=6
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=_batches)
def test_any_sequence_of_transfers_equals_the_same_in_memory(
    engine: Engine, folder: Path, view: View, batches: list[tuple[list[Step], bool]]
) -> None:
    path = folder / "data"
    view.remove(path)
    model = bytearray()
    seed = 0
    with engine.open(str(path), "x+") as file:
        for candidates, sync in batches:
            steps: list[Step] = []
            for step in candidates:
                inside = step.op == "write" or step.offset + step.nbytes <= len(model)
                if inside and not any(step.disturbs(other) for other in steps):
                    steps.append(step)
            in_flight: list[tuple[Step, Request, memoryview]] = []
            for step in steps:
                seed += 1
                buffer = aligned(step.nbytes, step.shift)
                if step.op == "write":
                    buffer[:] = pattern(step.nbytes, seed)
                in_flight.append((step, engine.submit(step.op, file, buffer, step.offset), buffer))
            # Reads of a batch see what was there before it; no write of the batch touches that.
            before = bytes(model)
            for step, request, buffer in sorted(in_flight, key=lambda one: one[0].turn):
                stop = step.offset + step.nbytes
                assert request.wait() == step.nbytes
                if step.op == "read":
                    assert buffer == before[step.offset : stop]
                else:
                    model.extend(bytes(max(0, stop - len(model))))
                    model[step.offset : stop] = buffer
            if sync:
                engine.sync(file)
            assert file.size_nbytes == len(model)
    assert view.read_file(path) == model
