"""The engines that measure, memory, and small files of known contents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from offload.aio import Engine, open_engine
from offload.errors import PlanError
from offload.probe.drives import transfer_memory
from offload.probe.scratch import ScratchFile
from offload.sizes import MIB

FILE_NBYTES = 8 * MIB


@pytest.fixture
def memory() -> memoryview:
    return transfer_memory(8 * MIB)


@pytest.fixture(params=["uring", "threads", "portable"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    try:
        engine = open_engine(request.param)
    except PlanError as error:
        pytest.skip(str(error))
    with engine:
        yield engine


@pytest.fixture
def threads() -> Iterator[Engine]:
    """One engine, for what does not depend on which."""
    with open_engine("threads") as engine:
        yield engine


@pytest.fixture
def make_file(tmp_path: Path, memory: memoryview) -> Iterator[Callable[..., ScratchFile]]:
    """Makes filled files in `tmp_path`, or in a folder of it."""
    with ExitStack() as stack:

        def make(engine: Engine, folder: str = ".", nbytes: int = FILE_NBYTES, seed: int = 1) -> ScratchFile:
            directory = tmp_path / folder
            directory.mkdir(exist_ok=True)
            file = stack.enter_context(ScratchFile(engine, str(directory), nbytes, seed=seed))
            file.fill(memory)
            return file

        yield make
