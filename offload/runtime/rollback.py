"""Snapshots of a run and the way back to one: what stands still meanwhile, and what is set anew.

Owns how often the run went back, which is committed with it, so that a run that was killed stops at the
same rollback as one that was not.

Between two steps nothing uses a record but what fetches and reads ahead; both give everything back here
before a record's bytes become other ones, and begin again behind it. Records are copied through the
memory of saved inputs, which is free between steps, so a snapshot needs no memory of its own.

Thread rule: the thread that drives the model, between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import CapacityError, StateError
from ..sizes import MIB, format_bytes
from ..store import SnapshotInfo, Store
from .parts import Parts
from .resume_point import count_in, read_resume_point
from .rng import check_rng, restore_rng
from .step import Step

__all__ = ["Rollback", "Snapshots"]

# More does not make a copy faster; see `offload.store.copying`.
_MAX_BUFFER_NBYTES = 64 * MIB

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Rollback:
    """What became of a step that was not to be kept, nor those before it.

    Attributes:
        reason: why.
        from_step: optimizer steps done before.
        step: optimizer steps done now: those of the snapshot.
        snapshot: its name.
    """

    reason: str
    from_step: int
    step: int
    snapshot: str


class Snapshots:
    """See the module.

    Attributes:
        num_rollbacks: how often the run went back, since it was created.
    """

    def __init__(self, parts: Parts, step: Step) -> None:
        self._parts = parts
        self._step = step
        store = parts.store
        self.num_rollbacks = (
            0 if store is None else count_in(store.state, "rollbacks", f"run {store.run_id}", default=0)
        )

    def take(self, name: str, progress: Progress | None) -> SnapshotInfo:
        """Copy what is committed; see `Runtime.snapshot`. Every step done was committed."""
        store = self._store("a snapshot")
        with self._standing_still(), self._memory(store) as memory:
            return store.snapshot(name, buffer=memory, progress=self._counted(progress))

    def list(self) -> tuple[SnapshotInfo, ...]:
        """Return the snapshots of the run, the oldest first."""
        return () if self._parts.store is None else self._parts.store.snapshots()

    def drop(self, name: str) -> None:
        """Remove a snapshot."""
        self._store("a snapshot").drop_snapshot(name)

    def newest(self) -> str | None:
        """Return the newest snapshot that is whole; None when there is none.

        Raises:
            StorageError: one cannot be read at present, so it is not known which is the newest.
        """
        found = self.list()
        for info in found:
            if info.error is not None and not info.is_lost:
                raise info.error.restated(
                    f"snapshot {info.name!r} cannot be read, and it may be the one to go back to:"
                    f" {info.error}; resume the run when it can be read, or drop it"
                )
        names = [info.name for info in found if info.error is None]
        return names[-1] if names else None

    def restore(
        self, name: str, user: Mapping[str, Any] | None, progress: Progress | None, *, count: bool
    ) -> Mapping[str, Any]:
        """Bring a snapshot back, whatever the step in progress has done.

        Args:
            name: the snapshot.
            user: what to commit as the loop's own state; the snapshot's when None.
            progress: called with bytes written so far and in all.
            count: whether it is a rollback.

        Returns:
            The loop's own state.
        """
        store = self._store("a snapshot")
        kept = self._state_of(store, name)
        point = read_resume_point(kept, f"snapshot {name} of run {store.run_id}")
        check_rng(point.rng)
        self._step.give_up(restoring=True)
        state = {
            **kept,
            "user": dict(point.user if user is None else user),
            "rollbacks": self.num_rollbacks + count,
        }
        try:
            generation = self._bring_back(store, name, state, progress)
        except BaseException as error:
            # Records at home in memory may hold updates of a step that is no more; the last commit stands.
            self._step.abandon(error)
            raise
        self.num_rollbacks += count
        self._step.num_done = point.step
        self._parts.progress.committed(point.step, generation)
        restore_rng(point.rng)
        return state["user"]  # type: ignore[no-any-return]

    def _bring_back(
        self, store: Store, name: str, state: Mapping[str, Any], progress: Progress | None
    ) -> int:
        with self._standing_still(), self._memory(store) as memory:
            generation = store.restore(name, state=state, buffer=memory, progress=self._counted(progress))
            self._parts.masters.load_residents(self._parts.records.values())
        return generation

    def _store(self, what: str) -> Store:
        if self._parts.store is None:
            raise StateError(
                f"{what} lies on the run's drives, and this run has none: attach with disk=[...]"
            )
        return self._parts.store

    def _state_of(self, store: Store, name: str) -> Mapping[str, Any]:
        for info in store.snapshots():
            if info.name == name:
                if info.error is not None:
                    raise info.error.restated(f"snapshot {name!r} cannot be restored: {info.error}")
                assert info.state is not None
                return info.state
        raise StateError(
            f"run {store.run_id} has no snapshot {name!r}; runtime.snapshots() lists what there is"
        )

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Inside, nothing is fetched, read ahead or under update, and nothing written is uncommitted."""
        parts = self._parts
        self._step.settle()
        parts.updater.drain()
        parts.transfer.drop(tuple(parts.records))
        parts.updater.roll_back()
        parts.updater.quiet()
        try:
            yield
        finally:
            # There is nothing to undo by now: it reads ahead again.
            parts.updater.roll_back()

    @contextmanager
    def _memory(self, store: Store) -> Iterator[memoryview]:
        mutable = [spec.nbytes for spec in store.records.values() if spec.mutable]
        needed = min(store.chunk_nbytes, max(mutable, default=0))
        activations = self._parts.activations
        free = activations.free_nbytes()
        if free < max(needed, 1):
            raise CapacityError(
                f"a snapshot is copied through the memory of saved inputs, which has {format_bytes(free)} "
                f"({free:,} bytes) and needs {format_bytes(needed)} ({needed:,} bytes): raise "
                "activations_nbytes, or host_memory where that is not set"
            )
        with activations.lend(min(free, _MAX_BUFFER_NBYTES), "snapshot") as memory:
            yield memory

    def _counted(self, progress: Progress | None) -> Progress:
        counted = 0

        def moved(done: int, total: int) -> None:
            nonlocal counted
            for counter in ("disk_read_nbytes", "disk_written_nbytes"):
                self._parts.trace.count(counter, done - counted)
            counted = done
            if progress is not None:
                progress(done, total)

        return moved
