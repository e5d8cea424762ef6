"""Every harness with its sound inputs, with every input that once made a finding, and with seeded mutations.

The short form of `make fuzz`, which goes on from here guided by coverage; nothing here needs atheris.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from fuzz.drive import names_of_harnesses
from fuzz.harness import CORPUS, Finding, Harness, check
from fuzz.harnesses import HARNESSES
from fuzz.mutation import mutate

from offload.errors import StateError

# Mutations of a harness; each of the slow two opens, checks and exports a run, or trains with it.
NUM_MUTATIONS = {"run": 40, "resume": 25, "model_config": 60, "tokenizer": 60, "tokenizer_settings": 60}
MANY = 400
MAX_NBYTES = 1 << 16


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """What is refused may be logged as well, thousands of times."""
    caplog.set_level(logging.CRITICAL, logger="offload")


@pytest.fixture(params=HARNESSES.values(), ids=lambda harness: harness.name)
def harness(request: pytest.FixtureRequest) -> Harness:
    return request.param


def test_sound_inputs_are_taken(harness: Harness, tmp_path: Path) -> None:
    taken = [check(harness, data, tmp_path) is None for data in harness.seeds()]
    assert taken.count(True) >= 1
    if harness.name not in ("frame",):  # whose inputs are of three kinds, and one is right at a time
        assert all(taken)


def test_inputs_that_made_a_finding_make_none_any_more(harness: Harness, tmp_path: Path) -> None:
    for number, data in enumerate(harness.corpus()):
        folder = tmp_path / str(number)
        folder.mkdir()
        check(harness, data, folder)


@pytest.mark.parametrize("name", ["numpy-position-behind-its-words", "torch-next-word-behind-its-words"])
def test_a_random_state_that_draws_from_foreign_memory_is_refused(name: str, tmp_path: Path) -> None:
    """numpy ends with a segmentation fault, or draws what lies behind; torch draws what lies behind."""
    refused = check(HARNESSES["state"], (CORPUS / "state" / name).read_bytes(), tmp_path)
    assert isinstance(refused, StateError)


def test_mutations_are_taken_or_refused(harness: Harness, tmp_path: Path) -> None:
    seeds = harness.seeds()
    data = seeds[0]
    refused = 0
    count = NUM_MUTATIONS.get(harness.name, MANY)
    for seed in range(count):
        # A few changes on top of each other, then from the beginning.
        data = seeds[seed % len(seeds)] if seed % 3 == 0 else data
        data = mutate(harness.kind, data, MAX_NBYTES, seed)
        refused += check(harness, data, tmp_path) is not None
    # Mutations that are all taken, or all refused for the same frame, would test nothing.
    assert (count // 20 < refused) == harness.refuses


def test_every_folder_of_the_corpus_is_of_a_harness() -> None:
    assert {path.name for path in CORPUS.iterdir() if path.is_dir()} <= set(HARNESSES)


def test_the_driver_finds_every_harness() -> None:
    assert sorted(names_of_harnesses()) == sorted(HARNESSES)


def test_a_harness_sees_what_a_parser_may_not_do(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    inside = tmp_path / "inside"
    inside.mkdir()

    def of(parse):
        return Harness(name="wrong", parse=parse, seeds=lambda: [b""])

    with pytest.raises(Finding, match="outside"):
        check(of(lambda data, folder: outside.write_bytes(data)), b"", inside)
    with pytest.raises(Finding, match=r"\.\./"):
        check(of(lambda data, folder: (folder / "../outside").read_bytes()), b"", inside)
    with pytest.raises(Finding, match="rmtree"):
        check(of(lambda data, folder: shutil.rmtree(tmp_path / "none", ignore_errors=True)), b"", inside)
    with pytest.raises(Finding, match="bytes more"):
        check(of(lambda data, folder: len(bytearray(b"x") * (256 << 20))), b"", inside)
    with pytest.raises(ZeroDivisionError):
        check(of(lambda data, folder: 1 // 0), b"", inside)
    assert check(of(lambda data, folder: (folder / "new").write_bytes(data)), b"", inside) is None
