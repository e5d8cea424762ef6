"""Directories for two drives, a plain engine, and a small run."""

from __future__ import annotations

import pytest
from store_doubles import PlainEngine

from offload.store import RecordSpec, Store

CHUNK = 8192


@pytest.fixture
def dirs(tmp_path):
    """Two directories that stand for two drives."""
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
    return paths


@pytest.fixture
def engine():
    with PlainEngine() as engine:
        yield engine


@pytest.fixture
def specs():
    """Records with a short last chunk, of one chunk, and immutable."""
    return [
        RecordSpec("w", 5 * CHUNK + 4096),
        RecordSpec("o", 3 * CHUNK),
        RecordSpec("tiny", 4096),
        RecordSpec("base", 2 * CHUNK, mutable=False),
    ]


@pytest.fixture
def store(dirs, specs, engine):
    with Store.create(dirs, specs, engine=engine, chunk_nbytes=CHUNK) as store:
        yield store
