"""The engines under test, and a drive that can be filled and frozen."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_workbench import QUEUE_DEPTH, SEGMENT_NBYTES, Drive

from offload.aio import Engine, open_engine
from offload.errors import PlanError

ENGINES: dict[str, dict[str, Any]] = {
    "uring": {"name": "uring"},
    "uring-buffered": {"name": "uring", "direct": False},
    "threads": {"name": "threads"},
    "threads-buffered": {"name": "threads", "direct": False},
    "portable": {"name": "portable"},
}


@pytest.fixture(params=ENGINES)
def make_engine(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """Opens an engine of the kind under test; keyword arguments override the small defaults."""
    kind = ENGINES[request.param]

    def make(**options: Any) -> Engine:
        sizes = {"queue_depth": QUEUE_DEPTH, "segment_nbytes": SEGMENT_NBYTES}
        try:
            return open_engine(**{**sizes, **kind, **options})
        except PlanError as error:
            pytest.skip(str(error))

    return make


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Iterator[Engine]:
    with make_engine() as opened:
        yield opened


@pytest.fixture(scope="session")
def _mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("mounting a file system needs root and mkfs.ext4")
    folder = tmp_path_factory.mktemp("mount")
    image, mount_point = folder / "image", folder / "drive"
    mount_point.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(image)], check=True)
    mounted = subprocess.run(["mount", "-o", "loop", str(image), str(mount_point)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mount: {mounted.stderr.decode().strip()}")
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)


@pytest.fixture
def drive(_mounted: Path) -> Iterator[Drive]:
    """An empty drive of about 15 MiB; skips where mounting is not allowed."""
    folder = _mounted / "test"
    folder.mkdir()
    yield Drive(folder)
    shutil.rmtree(folder)
