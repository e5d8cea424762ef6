"""Decides what becomes of a step whose loss or gradient is not finite, or whose loss jumps.

Owns the position in the data, the losses that spikes are measured against, and the rolling snapshots.
What it decides is committed by the runtime together with the position behind the batches that led
there, and everything else follows from committed state and the metrics, so that a run that is killed
at any moment decides what an unbroken one does.

Thread rule: the thread that trains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DiskFullError, StateError
from ..runtime.resume_point import count_in, read_resume_point
from ..runtime.rollback import Rollback
from ..runtime.runtime import Runtime
from ..store import SnapshotInfo
from .config import FinetuneConfig
from .output import OutputDirectory
from .progress import Progress
from .spikes import LossSpikes

__all__ = ["StepGuard"]

# Snapshots of this name, of a step and a generation, are the guard's own: the newest is kept. What others
# took stays. The generation makes the name a new one when a step is reached again.
_ROLLING = re.compile(r"rolling-(\d+)-(\d+)")


class StepGuard:
    """Watches the steps of one run; see the module.

    Attributes:
        num_batches: batches seen, those of steps that were given up as well.
    """

    def __init__(
        self, config: FinetuneConfig, runtime: Runtime, output: OutputDirectory, progress: Progress
    ) -> None:
        self._config = config
        self._runtime = runtime
        self._output = output
        self._progress = progress
        # Runs from before batches could be skipped have seen one a step.
        self.num_batches = count_in(
            runtime.state, "batches", f"run {runtime.run_id}", default=runtime.global_step
        )
        self._note_rollback()
        self._spikes = self._spikes_at(runtime.state, f"run {runtime.run_id}")
        self._kept_step = self._keep_newest()

    @property
    def state(self) -> dict[str, Any]:
        """What to commit with the step in progress."""
        return {
            "step": self._runtime.global_step + 1,
            "batches": self.num_batches,
            # Not only in the metrics, which a power cut may leave behind the commit.
            "losses": self._spikes.losses,
        }

    def next_batch(self) -> int:
        """Return the number of the next batch, from 0, and count it as seen."""
        self.num_batches += 1
        return self.num_batches - 1

    def accepts(self, loss: float, problem: str) -> bool:
        """Return whether the step in progress is to be applied; if not, it was given up.

        Args:
            loss: of its batch.
            problem: what is not finite; empty when everything is.

        Raises:
            StateError: the run shall not go on; nothing of the step was applied.
        """
        step = self._runtime.global_step + 1
        if problem:
            record = {"step": step, "batch": self.num_batches, "not_finite": problem}
            self._output.append_metrics(record)
            self._progress.line(f"step {step}, batch {self.num_batches}: {problem}")
            done = self._runtime.give_up_step(problem, self._state_of_rollback(problem))
            if done is None:
                self._progress.line(f"skipped batch {self.num_batches}; nothing of it was applied")
            else:
                self._went_back(done)
            return False
        spike = self._spikes.check(loss)
        if spike is None:
            return True
        jump = (
            f"the loss of step {step} jumped to {loss:.4f}; the median of the last {spike.num_losses} is"
            f" {spike.median:.4f}"
        )
        if self._config.on_loss_spike == "warn":
            self._progress.line(f"warning: {jump}")
            return True
        self._progress.line(f"step {step}, batch {self.num_batches}: {jump}")
        self._went_back(self._runtime.roll_back(jump, self._state_of_rollback(jump)))
        return False

    def keep(self) -> bool:
        """Take the rolling snapshot when it is due; called before the first step and behind each.

        Returns:
            Whether it was due.

        Raises:
            DiskFullError: no room, with the bytes needed and free; the run stands at its last commit.
        """
        every, runtime = self._config.snapshot_steps, self._runtime
        if every is None or runtime.global_step == self._kept_step:
            return False
        if self._kept_step is not None and runtime.global_step % every:
            return False
        runtime.synchronize()
        older = [info.name for info in self._rolling()]
        name = f"rolling-{runtime.global_step}-{runtime.generation}"
        try:
            self._take(name)
        except DiskFullError as error:
            if not older:
                raise
            # A run that is killed before the new one is there takes one when it is resumed.
            self._progress.line(f"{error.message}; taking the place of the one before instead")
            self._drop(older)
            self._take(name)
        else:
            self._drop(older)
        self._kept_step = runtime.global_step
        return True

    def _take(self, name: str) -> None:
        with self._progress.phase(f"snapshot of step {self._runtime.global_step}") as moved:
            info = self._runtime.snapshot(name, on_progress=moved)
            moved(info.nbytes, info.nbytes)

    def _drop(self, names: Sequence[str]) -> None:
        for name in names:
            self._runtime.drop_snapshot(name)

    def _rolling(self) -> list[SnapshotInfo]:
        """Return the guard's own snapshots, those that cannot be restored first, then the oldest first."""
        return [info for info in self._runtime.snapshots() if _ROLLING.fullmatch(info.name)]

    def _keep_newest(self) -> int | None:
        """Return the step of the newest snapshot of ours; older ones go, which a kill may have left.

        One that cannot be read at present may be whole: it stays, and so does the newest one that is whole.
        """
        if self._config.snapshot_steps is None:
            return None
        found = self._rolling()
        kept = [info for info in found if info.error is not None and not info.is_lost]
        for info in kept:
            self._progress.line(f"warning: snapshot {info.name} stays, but cannot be read: {info.error}")
        kept += [info for info in found if info.error is None][-1:]
        if not kept:
            return None
        self._drop([info.name for info in found if info not in kept])
        return max(_taken_at(info.name) for info in kept)[1]

    def _state_of_rollback(self, reason: str) -> dict[str, Any]:
        """Return what to commit if the run goes back now: the data goes on behind this batch."""
        # Without losses: those of the step gone back to count, and that is not known yet. A resume has them
        # of the metrics, so these must be on the drive.
        self._output.sync_metrics()
        event = {"batch": self.num_batches, "from_step": self._runtime.global_step, "reason": reason}
        return {"batches": self.num_batches, "rolled_back": event}

    def _went_back(self, done: Rollback) -> None:
        taken = next(info for info in self._runtime.snapshots() if info.name == done.snapshot)
        assert taken.state is not None
        user = read_resume_point(taken.state, f"snapshot {taken.name}").user
        first = count_in(user, "batches", f"snapshot {taken.name}", default=done.step) + 1
        self._kept_step = done.step
        self._output.cut_metrics(done.step)
        self._note_rollback()
        self._spikes = self._spikes_at(user, f"snapshot {taken.name}")
        self._progress.line(
            f"went back from step {done.from_step} to step {done.step} (snapshot {done.snapshot});"
            f" batches {first} to {self.num_batches} are skipped"
        )

    def _note_rollback(self) -> None:
        """Record the rollback that the run stands behind, unless that was done before it was killed."""
        event = self._runtime.state.get("rolled_back")
        if event is None:
            return
        record = {"step": self._runtime.global_step, "rolled_back": event}
        if record not in self._output.read_metrics():
            self._output.append_metrics(record)

    def _spikes_at(self, user: Mapping[str, Any], what: str) -> LossSpikes:
        """Return the range of the losses before a committed point; of the metrics where it does not say."""
        losses = user.get("losses")
        if losses is None:
            losses = [record["loss"] for record in self._output.read_metrics() if "loss" in record]
        elif not isinstance(losses, list) or not all(type(loss) is float for loss in losses):
            raise StateError(f"{what} cannot be resumed: its committed 'losses' are no list of numbers")
        return LossSpikes(losses)


def _taken_at(name: str) -> tuple[int, int]:
    """Return the generation and the step of a rolling snapshot, which may be one that cannot be read."""
    found = _ROLLING.fullmatch(name)
    assert found is not None
    return int(found[2]), int(found[1])
