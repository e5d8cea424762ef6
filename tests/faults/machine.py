"""A machine whose drives are simulated, and a toy training run on it.

The run is the real one: `offload.attach` with everything it starts, three steps, a commit each. Only the
I/O engine and the store's system calls are replaced, so every operation of a drive is counted by one
`SimDisk` and may fail there, or be the last one before the power goes.
"""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from small_files import Durable, SmallFiles
from toy_models import record_bytes

import offload
import offload.runtime.storage
import offload.store.files
from offload import AdamWOptions, Runtime
from offload.aio.sim import Fault, SimDisk, SimEngine, SimFile
from offload.store import Store, list_runs

__all__ = ["CHUNK", "CONFIGS", "STEPS", "Config", "Image", "Machine", "Run", "Trained", "go_on", "golden"]

STEPS = 3
CHUNK = 4096
# Longer than the runtime waits for any request, so that a drive that hangs is met by its timeouts too.
STUCK_S = 3600.0


@dataclass(frozen=True)
class Config:
    """A way to run the toy: how many drives, and what `attach` is told beside the usual.

    With `snapshots` each attempt takes one behind the first step, if there is none, goes back to it behind
    the second, and drops it at the end.
    """

    name: str
    num_drives: int = 1
    snapshots: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CONFIGS = {
    config.name: config
    for config in (
        Config("disk"),
        Config("two drives", num_drives=2),
        Config("host", settings={"home": "host", "save_steps": 2}),
        # Weights in memory, of the optimizer records some, none, and the first of three chunks.
        Config(
            "cached",
            settings={
                "host_cache_nbytes": 36_864,
                "dtype": "float32",
                "chunk_numel": 1024,
                "save_steps": 2,
            },
        ),
        Config("clip", settings={"max_grad_norm": 0.05}),
        Config("8bit", settings={"moments": "8bit"}),
        Config("snapshots", num_drives=2, snapshots=True),
        # The least that the run can do with: every gradient passes through the one slot of the ring.
        Config(
            "gradients on disk",
            settings={
                "max_grad_norm": 0.05,
                "dtype": "float32",
                "chunk_numel": 1024,
                "host_memory": 126_976,
            },
        ),
        # Of the two inputs that a step saves, one fits into memory.
        Config(
            "inputs on disk",
            settings={"activations_nbytes": CHUNK, "activations_disk_nbytes": 4 * CHUNK},
        ),
    )
}

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "host_memory": "1MiB",
    "device_memory": "1MiB",
    "activations_nbytes": 1 << 16,
    "chunk_numel": 2048,
    "chunk_nbytes": CHUNK,
    "optimizer": AdamWOptions(lr=1e-2, weight_decay=0.1),
}


class Machine:
    """Drives, simulated, and the real directory below which their small files lie.

    Args:
        root: an empty directory, or one that a power loss has left.
        num_drives: how many.
        disk: what is left of the data files; a new one when None.
    """

    def __init__(
        self,
        root: Path,
        num_drives: int,
        *,
        seed: int = 0,
        faults: Iterable[Fault] = (),
        disk: SimDisk | None = None,
        on_operation: Callable[[int], None] | None = None,
    ) -> None:
        self.root = root
        self.directories = [root / name for name in "abcd"[:num_drives]]
        for directory in self.directories:
            directory.mkdir(parents=True, exist_ok=True)
        self.disk = disk or SimDisk(
            seed=seed, short_rate=1 / 32, faults=faults, stuck_s=STUCK_S, on_operation=on_operation
        )
        self.small_files = SmallFiles(self.disk, root)
        self.small_files.adopt()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the runtime use these drives."""
        with pytest.MonkeyPatch.context() as patch, self.small_files.installed():
            patch.setattr(offload.runtime.storage, "open_engine", self._open_engine)
            # Of a data file there is only an empty one with its name.
            patch.setattr(offload.store.files, "clone_range", lambda *_: False)
            yield

    def _open_engine(self, *_: object, **__: object) -> SimEngine:
        return _Engine(self, queue_depth=4, segment_nbytes=CHUNK)


class _Engine(SimEngine):
    """Tells which names its data files have got."""

    def __init__(self, machine: Machine, **options: int) -> None:
        super().__init__(machine.disk, **options)
        self._machine = machine

    def open(self, path: str, mode: Any = "r", *, dir_fd: int | None = None) -> SimFile:
        file = super().open(path, mode, dir_fd=dir_fd)
        if mode == "x+":
            assert dir_fd is not None
            self._machine.small_files.data_file_created(dir_fd, path)
        return file


@dataclass(frozen=True)
class Image:
    """The drives in the moment before an operation, and what had been promised by then."""

    disk: SimDisk
    small: Durable
    generation: int

    @classmethod
    def of(cls, machine: Machine, run: Run) -> Image:
        """Return what a power loss now would find on `machine`."""
        with machine.disk.lock:
            return cls(machine.disk.snapshot(), machine.small_files.durable.copy(), run.generation)

    def power_on(self, root: Path, num_drives: int, seed: int) -> Machine:
        """Return the machine that a power loss has left, in place of what is in `root`."""
        left = self.disk.crash(seed)
        self._rebuild(root, left, random.Random(seed))
        return Machine(root, num_drives, disk=left)

    def start_again(self, root: Path, num_drives: int) -> Machine:
        """Return the machine after the process was killed: the power stayed on."""
        left = self.disk.snapshot()
        self._rebuild(root, left, None)
        return Machine(root, num_drives, disk=left)

    def _rebuild(self, root: Path, disk: SimDisk, rng: random.Random | None) -> None:
        shutil.rmtree(root)
        root.mkdir()
        self.small.restore(root, disk, rng)


@dataclass(frozen=True)
class Trained:
    """What a finished run is."""

    losses: list[float]
    records: dict[str, bytes]


@dataclass
class Run:
    """An attempt at the training, watched from outside.

    Attributes:
        resumed: whether it found a committed run to go on with.
        first_step: where it began.
        first_generation: the generation that it began from.
        generation: the newest generation whose commit had returned.
        losses: of the steps it did.
    """

    resumed: bool = False
    first_step: int = 0
    first_generation: int = 0
    generation: int = 0
    losses: list[float] = field(default_factory=list)


def build() -> torch.nn.Module:
    """Two records of different size in two optimizer chunks and one, and a small head."""
    seed(0)
    model = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.GELU(), torch.nn.Dropout(0.1)),
        torch.nn.Sequential(torch.nn.Linear(48, 16), torch.nn.GELU(), torch.nn.Dropout(0.1)),
        torch.nn.Linear(16, 8),
    )
    model.train()
    return model


def seed(number: int) -> None:
    """Seed torch's generator of the CPU; `torch.manual_seed` queues a traceback for CUDA's each time."""
    torch.default_generator.manual_seed(number)


@functools.cache
def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(4, 48, generator=generator), torch.randint(8, (4,), generator=generator)


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    inputs, labels = batch(step)
    return torch.nn.functional.cross_entropy(model(inputs), labels)


def newest_run(machine: Machine) -> str | None:
    """Return the run to go on with; None when no import was ever committed."""
    for run in list_runs(machine.directories[0]):
        if run.problem is None and run.generation:
            return run.run_id
    return None


def go_on(
    machine: Machine,
    config: Config,
    run: Run,
    *,
    on_begin: Callable[[Runtime], None] = lambda runtime: None,
    last_step: int = STEPS,
) -> Trained:
    """Train from the newest commit to the last step; an ordinary loop, by way of `offload.attach`.

    Args:
        run: takes note of what is promised, also when this raises.
        on_begin: called before the first step.
        last_step: where to stop.
    """
    with machine.running(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "commit", _noting(Store.commit, run))
        run_id = newest_run(machine)
        run.resumed = run_id is not None
        model = build()
        random.seed(5)
        seed(5)
        chosen = {**SETTINGS, **config.settings, "run_id": run_id, "resume": run_id is not None}
        with offload.attach(model, disk=machine.directories, **chosen) as runtime:
            run.first_step = runtime.global_step
            run.first_generation = runtime.generation
            run.generation = max(run.generation, runtime.generation)  # what was found is durable by now
            on_begin(runtime)
            goes_back = config.snapshots
            while runtime.global_step < last_step:
                if config.snapshots:
                    goes_back = use_snapshots(runtime, goes_back)
                step = runtime.global_step
                loss = loss_of(model, step)
                loss.backward()
                runtime.step({"next": step + 1})
                # A step done again takes the place of the first time, and of those behind it.
                del run.losses[max(0, step - run.first_step) :]
                if step >= run.first_step:
                    run.losses.append(loss.item())
            for info in runtime.snapshots():
                runtime.drop_snapshot(info.name)
            return Trained(run.losses, record_bytes(runtime))


def use_snapshots(runtime: Runtime, goes_back: bool) -> bool:
    """Take the snapshot or go back to it, where this is the place; return whether it is still to go back."""
    there = [info.name for info in runtime.snapshots() if info.problem is None]
    if runtime.global_step == 1 and not there:
        runtime.snapshot("kept")
    if runtime.global_step != 2 or not goes_back or not there:
        return goes_back
    runtime.restore("kept")
    return False


def _noting(commit: Callable[..., int], run: Run) -> Callable[..., int]:
    def noting(store: Store, *args: Any, **kwargs: Any) -> int:
        run.generation = commit(store, *args, **kwargs)
        return run.generation

    return noting


def golden(root: Path, config: Config) -> tuple[Trained, int]:
    """Return what the run is when nothing goes wrong, and how many operations it takes."""
    machine = Machine(root, config.num_drives)
    trained = go_on(machine, config, Run())
    num_operations = len(machine.disk.journal)
    shutil.rmtree(root)
    return trained, num_operations
