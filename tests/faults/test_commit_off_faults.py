"""A run without commits, on drives that fail or lose their power: the same end or a refusal.

Each operation of the run may fail or be the last. What is left is opened again: a run that had not gone
over its import, or had ended in order, goes on to the golden losses and bytes; any other is refused.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from machine import Config, Image, Machine, Run, Trained, go_on, golden
from watchdog import within

from offload.aio.sim import Fault, FaultKind
from offload.errors import CorruptionError, OffloadError

CONFIGS = (
    Config("disk", settings={"commit": False}),
    Config("two drives", num_drives=2, settings={"commit": False}),
    Config("clip", settings={"commit": False, "max_grad_norm": 0.05}),
)
KINDS: tuple[FaultKind, ...] = ("short", "EIO", "ENOSPC", "EINTR", "stuck", "EROFS")
SAMPLE = 25
CASE_TIMEOUT_S = 60


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Trained, int]:
    config: Config = request.param
    return config, *golden(tmp_path_factory.mktemp("golden") / "run", config)


def open_again(machine: Machine, config: Config, wanted: Trained, first: Run) -> str:
    """Go on with what is left; return whether that was refused."""
    second = Run()
    try:
        found = go_on(machine, config, second)
    except CorruptionError as error:
        if "did not end in order" not in str(error):
            raise
        return "refused"
    assert found.records == wanted.records, "the run that went on ended with other weights"
    assert found.losses == wanted.losses[second.first_step :]
    assert second.resumed or not first.generation, "a committed run cannot be found"
    return f"from step {second.first_step}" if second.resumed else "anew"


def run_fault(root: Path, config: Config, wanted: Trained, fault: Fault, *, loses_power: bool) -> str:
    machine = Machine(root, config.num_drives, seed=fault.operation, faults=[fault])
    first = Run()
    try:
        assert go_on(machine, config, first) == wanted, "the run ended with other weights or losses"
        ended = True
    except OffloadError:
        ended = False
    if loses_power:
        machine = Image.of(machine, first).power_on(root, config.num_drives, fault.operation)
    else:
        machine.disk.heal()
    outcome = open_again(machine, config, wanted, first)
    assert outcome == "from step 3" or not ended, "a run that ended in order does not stand"
    shutil.rmtree(root)
    return outcome


def test_after_a_fault_the_run_is_refused_or_ends_the_same(
    reference: tuple[Config, Trained, int], tmp_path: Path
) -> None:
    config, wanted, num_operations = reference
    rng = random.Random(30)
    outcomes: Counter[str] = Counter()
    for _ in range(SAMPLE):
        fault = Fault(rng.randrange(num_operations), rng.choice(KINDS), forever=rng.random() < 0.5)
        power = rng.random() < 0.5
        outcomes[
            within(
                CASE_TIMEOUT_S,
                f"{config}: {fault}",
                lambda: run_fault(tmp_path / "run", config, wanted, fault, loses_power=power),  # noqa: B023
            )
        ] += 1
    # All must have been met, or the loop shows nothing.
    assert outcomes["refused"] and outcomes["from step 3"]


def test_after_a_crash_the_run_is_refused_or_ends_the_same(
    reference: tuple[Config, Trained, int], tmp_path: Path
) -> None:
    config, wanted, _ = reference
    root, run = tmp_path / "run", Run()
    images: list[Image] = []
    machine = Machine(root, config.num_drives, on_operation=lambda _: images.append(Image.of(machine, run)))
    assert go_on(machine, config, run) == wanted
    images.append(Image.of(machine, run))
    rng = random.Random(31)
    outcomes: Counter[str] = Counter()
    for operation in [*rng.sample(range(len(images)), SAMPLE), len(images) - 1]:
        image, seed = images[operation], rng.choice((None, operation))
        left = (
            image.start_again(root, config.num_drives)
            if seed is None
            else image.power_on(root, config.num_drives, seed)
        )
        outcomes[
            within(
                CASE_TIMEOUT_S,
                f"{config}: a crash before operation {operation}",
                lambda: open_again(left, config, wanted, Run(generation=image.generation)),  # noqa: B023
            )
        ] += 1
    assert outcomes["refused"] and outcomes["from step 3"]
