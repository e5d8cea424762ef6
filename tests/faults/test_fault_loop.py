"""Every operation of a training run fails once, in every way: never wrong weights, never a hang.

For each operation of a 3-step run and each kind of fault, once or from there on for ever: the run ends
with the golden losses and bytes, or with an error of `offload.errors` after which the run, on drives that
work again or have lost their power, goes on to the same end. `make soak` tries every operation, the usual
tests a sample.

[Note: what the number of an operation means] Threads of the runtime decide in which order the drive is
asked, so operation 100 of two runs need not be the same one. What a case must show does not depend on it.
"""

from __future__ import annotations

import gc
import itertools
import logging
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from machine import CHUNK, CONFIGS, STEPS, Config, Image, Machine, Run, Trained, go_on, golden
from watchdog import within

from offload import Runtime
from offload.aio.sim import Fault, FaultKind
from offload.errors import OffloadError

KINDS: tuple[FaultKind, ...] = ("short", "EIO", "ENOSPC", "EINTR", "stuck", "EROFS")
# The runs differ in length, as the order of their operations does.
SPARE = 1.1
SAMPLE = 780  # of each configuration: more than 5,000 together
PARTS = 4  # of a sample, for several cores
CASE_TIMEOUT_S = 60


@dataclass(frozen=True)
class Case:
    """One fault, and how the drives come back after it."""

    operation: int
    kind: FaultKind
    forever: bool
    loses_power: bool

    def __str__(self) -> str:
        often = "for ever" if self.forever else "once"
        after = "then a power loss" if self.loses_power else "then healed"
        return f"{self.kind} at operation {self.operation}, {often}, {after}"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep the warnings about old manifests that stay, thousands of them, from the report of a failure."""
    log = logging.getLogger("offload.store")
    level = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(level)


@pytest.fixture(autouse=True, scope="module")
def frozen() -> Iterator[None]:
    """Keep what torch has made at its import out of the garbage collector's way: a tenth of a case's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[Trained, int]]:
    return {}


@pytest.fixture(params=CONFIGS.values(), ids=str)
def config(request: pytest.FixtureRequest) -> Config:
    chosen: Config = request.param
    return chosen


def reference(
    references: dict[str, tuple[Trained, int]], config: Config, tmp_path: Path
) -> tuple[Trained, int]:
    if config.name not in references:
        references[config.name] = golden(tmp_path / "golden", config)
    return references[config.name]


def all_cases(num_operations: int) -> Iterator[Case]:
    coin = random.Random(1)
    numbers = range(int(num_operations * SPARE))
    for operation, kind, forever in itertools.product(numbers, KINDS, (False, True)):
        yield Case(operation, kind, forever, coin.random() < 0.5)


def run_case(root: Path, config: Config, case: Case, wanted: Trained) -> str:
    """Train with one fault, then go on without; return what became of the first attempt."""
    machine = Machine(
        root,
        config.num_drives,
        seed=case.operation,
        faults=[Fault(case.operation, case.kind, forever=case.forever)],
    )
    first = Run()
    try:
        assert go_on(machine, config, first) == wanted, "the run ended with other weights or losses"
        outcome = "identical"
    except OffloadError as error:
        outcome = type(error).__name__
    if case.operation >= len(machine.disk.journal):
        outcome = "ended before"
    if case.loses_power:
        machine = Image.of(machine, first).power_on(root, config.num_drives, case.operation)
    else:
        machine.disk.heal()
    second = Run()
    found = go_on(machine, config, second)
    assert found.records == wanted.records, "the resumed run ended with other weights"
    assert found.losses == wanted.losses[second.first_step :], "the resumed run had other losses"
    if first.generation:
        assert second.resumed, f"generation {first.generation} was committed and cannot be found"
        assert second.first_generation >= first.generation, (
            f"resumed from generation {second.first_generation}, {first.generation} was committed"
        )
    shutil.rmtree(root)
    return outcome


def check(cases: Iterable[Case], config: Config, wanted: Trained, tmp_path: Path) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for case in cases:
        root = tmp_path / "run"
        outcomes[
            within(CASE_TIMEOUT_S, f"{config}: {case}", lambda: run_case(root, config, case, wanted))  # noqa: B023
        ] += 1
    return outcomes


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
def test_a_sample_of_faults_gives_the_same_run_or_a_clean_error(
    config: Config, references: dict[str, tuple[Trained, int]], tmp_path: Path, part: int
) -> None:
    wanted, num_operations = reference(references, config, tmp_path)
    # These runs are the longest.
    num_cases = SAMPLE // 2 if config.snapshots else SAMPLE
    cases = random.Random(20).sample(list(all_cases(num_operations)), num_cases)[part::PARTS]
    outcomes = check(cases, config, wanted, tmp_path)
    # Both must have been met, or the loop shows nothing.
    assert outcomes["identical"] > len(cases) // 10
    assert outcomes["StorageError"] > len(cases) // 10
    # The drive's own error, with errno and path, and not what follows from it on another thread.
    assert outcomes["StateError"] == 0


def test_every_gradient_is_on_disk_where_the_configuration_says_so(tmp_path: Path) -> None:
    parked = []
    config = CONFIGS["gradients on disk"]
    go_on(Machine(tmp_path, 1), config, Run(), on_begin=lambda run: parked.extend(run.plan.parked_on_disk))
    assert parked == ["0", "1", "2"]


def test_an_input_is_on_disk_where_the_configuration_says_so(tmp_path: Path) -> None:
    runs: list[Runtime] = []
    go_on(Machine(tmp_path, 1), CONFIGS["inputs on disk"], Run(), on_begin=runs.append)
    stats = runs[0].stats()
    assert stats.activations_written_nbytes == stats.activations_read_nbytes == STEPS * CHUNK


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_any_operation_gives_the_same_run_or_a_clean_error(
    config: Config, kind: FaultKind, references: dict[str, tuple[Trained, int]], tmp_path: Path
) -> None:
    wanted, num_operations = reference(references, config, tmp_path)
    cases = [case for case in all_cases(num_operations) if case.kind == kind]
    outcomes = check(cases, config, wanted, tmp_path)
    print(f"\n{config}, {kind}: {len(cases)} cases, {dict(outcomes)}")
    assert outcomes["ended before"] < len(cases) // 2
