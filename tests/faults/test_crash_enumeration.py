"""The power goes before each operation of a training run, and in the midst of every sync.

One run is watched: before each operation the state of the drives is kept, volatile cache and all. From each
state machines are made that lost power there, with one random subset after another of what was not synced
lost or torn, and one whose process was killed. Each must find the newest commit that was promised or the one
behind it, verify every checksum, hold the bytes of that step, and train on to the golden end.

`make soak` makes 32 machines from every state, the usual tests a sample.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from machine import CONFIGS, STEPS, Config, Image, Machine, Run, Trained, go_on
from watchdog import within

from offload import Runtime

SUBSETS = 32  # of what was not synced, at each operation
SAMPLE = 60  # machines of each configuration
SAMPLE_TWICE = 20
CASE_TIMEOUT_S = 60


@dataclass
class Enumeration:
    """A run, what it holds at each step, and what a crash at each operation would leave."""

    config: Config
    root: Path
    finished: Trained
    by_step: list[dict[str, bytes]]
    images: list[Image] = field(default_factory=list)


def watched(root: Path, config: Config) -> Enumeration:
    by_step = []
    for last_step in range(STEPS + 1):
        by_step.append(go_on(Machine(root, config.num_drives), config, Run(), last_step=last_step).records)
        shutil.rmtree(root)
    run = Run()
    images: list[Image] = []
    machine = Machine(root, config.num_drives, on_operation=lambda _: images.append(Image.of(machine, run)))
    finished = go_on(machine, config, run)
    images.append(Image.of(machine, run))
    assert finished.records == by_step[-1]
    return Enumeration(config, root, finished, by_step, images)


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=str)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Enumeration:
    return watched(tmp_path_factory.mktemp("watched") / "run", request.param)


def check_recovery(wanted: Enumeration, machine: Machine, promised: int, run: Run) -> None:
    """Go on, and compare what was found and what comes of it."""

    def check_found(runtime: Runtime) -> None:
        store = runtime._parts.store
        assert store is not None
        assert store.verify().ok
        assert not promised or run.resumed, f"generation {promised} was committed and cannot be found"
        if run.resumed:
            assert run.first_generation in (promised, promised + 1)
            assert store.state["user"] == ({"next": run.first_step} if run.first_step else {})
        for name, data in wanted.by_step[run.first_step].items():
            memory = bytearray(len(data))
            store.read(name, memory).wait()
            assert memory == data, f"{name} is not that of step {run.first_step}"

    found = go_on(machine, wanted.config, run, on_begin=check_found)
    assert found.records == wanted.finished.records, "other weights at the end"
    assert found.losses == wanted.finished.losses[run.first_step :]


def crash(wanted: Enumeration, operation: int, seed: int | None) -> None:
    """Let the power go before one operation, or kill the process there without a seed, and go on."""
    image, root, drives = wanted.images[operation], wanted.root, wanted.config.num_drives
    machine = image.start_again(root, drives) if seed is None else image.power_on(root, drives, seed)
    check_recovery(wanted, machine, image.generation, Run())


def crash_twice(wanted: Enumeration, operation: int, seed: int) -> None:
    """Lose power, and again before any operation of the recovery or of what comes behind it."""
    image, root, drives = wanted.images[operation], wanted.root, wanted.config.num_drives
    recovering = image.power_on(root, drives, seed)
    run = Run(generation=image.generation)
    images: list[Image] = []
    recovering.disk.watch(lambda _: images.append(Image.of(recovering, run)))
    go_on(recovering, wanted.config, run)
    chosen = random.Random(seed).choice(images)
    check_recovery(wanted, chosen.power_on(root, drives, seed + 1), chosen.generation, Run())


def check(wanted: Enumeration, cases: Iterable[tuple[int, int | None]]) -> None:
    for operation, seed in cases:
        what = "killed" if seed is None else f"power lost, seed {seed},"
        within(
            CASE_TIMEOUT_S,
            f"{wanted.config}: {what} before operation {operation} of {len(wanted.images)}",
            lambda: crash(wanted, operation, seed),  # noqa: B023
        )


def all_cases(wanted: Enumeration) -> list[tuple[int, int | None]]:
    return [(operation, seed) for operation in range(len(wanted.images)) for seed in (None, *range(SUBSETS))]


def test_a_sample_of_crashes_leaves_a_commit_and_the_run_ends_the_same(run: Enumeration) -> None:
    check(run, random.Random(20).sample(all_cases(run), SAMPLE))


def test_a_second_crash_during_or_after_recovery_does_no_more_harm(run: Enumeration) -> None:
    for seed in range(SAMPLE_TWICE):
        operation = random.Random(seed).randrange(len(run.images))
        within(
            CASE_TIMEOUT_S,
            f"{run.config}: power lost before operation {operation}, twice, seed {seed}",
            lambda: crash_twice(run, operation, seed),  # noqa: B023
        )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_crash_at_any_operation_leaves_a_commit_and_the_run_ends_the_same(run: Enumeration) -> None:
    cases = all_cases(run)
    check(run, cases)
    print(f"\n{run.config}: {len(run.images)} operations, {len(cases)} machines")
