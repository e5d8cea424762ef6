"""The engines under test, the places they work in, and a drive that can be filled and frozen.

A test that asks for `engine` or `make_engine` runs once with each engine; one that asks for `folder`
as well runs with the real ones in a second place too, a tmpfs. The simulated disk is among the
engines: what looks into files does so through `view`, and `real_files` marks what cannot apply to it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_workbench import (
    QUEUE_DEPTH,
    SEGMENT_NBYTES,
    Drive,
    MountedDrive,
    RealView,
    SimDrive,
    SimView,
    View,
)

from offload.aio import Engine, open_engine
from offload.aio.sim import SimDisk, SimEngine
from offload.errors import PlanError

ENGINES: dict[str, dict[str, Any]] = {
    "uring": {"name": "uring"},
    "uring-buffered": {"name": "uring", "direct": False},
    "threads": {"name": "threads"},
    "threads-buffered": {"name": "threads", "direct": False},
    "portable": {"name": "portable"},
    "sim": {},
}
TMPFS = Path("/dev/shm")
ON_TMPFS = ("uring", "threads", "portable")
SIM_SEED = 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test that makes an engine its kinds, and its places where it asks for one."""
    if "make_engine" not in metafunc.fixturenames:
        return
    if "folder" not in metafunc.fixturenames:
        metafunc.parametrize("engine_kind", ENGINES, indirect=True)
        return
    pairs = [(kind, "disk") for kind in ENGINES] + [(kind, "tmpfs") for kind in ON_TMPFS]
    ids = [kind if place == "disk" else f"{kind}-{place}" for kind, place in pairs]
    metafunc.parametrize(("engine_kind", "folder"), pairs, ids=ids, indirect=True)


@pytest.fixture
def engine_kind(request: pytest.FixtureRequest) -> str:
    """Which of ENGINES is under test; empty where a test opens its own."""
    return getattr(request, "param", "")


@pytest.fixture
def sim_disk() -> SimDisk:
    """The disk of the simulated engine, one a test."""
    return SimDisk(seed=SIM_SEED)


@pytest.fixture
def make_engine(engine_kind: str, sim_disk: SimDisk) -> Callable[..., Engine]:
    """Opens an engine of the kind under test; keyword arguments override the small defaults."""

    def make(**options: Any) -> Engine:
        sizes = {"queue_depth": QUEUE_DEPTH, "segment_nbytes": SEGMENT_NBYTES}
        if engine_kind == "sim":
            # It has neither threads nor a page cache to pass by.
            known = {name: value for name, value in options.items() if name in sizes}
            return SimEngine(sim_disk, **{**sizes, **known})
        try:
            return open_engine(**{**sizes, **ENGINES[engine_kind], **options})
        except PlanError as error:
            pytest.skip(str(error))

    return make


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Iterator[Engine]:
    with make_engine() as opened:
        yield opened


@pytest.fixture
def view(engine_kind: str, sim_disk: SimDisk) -> View:
    """Looks into the files that the engine under test works on."""
    return SimView(sim_disk) if engine_kind == "sim" else RealView()


@pytest.fixture
def real_files(engine_kind: str) -> None:
    """For tests of what a disk in memory does not have."""
    if engine_kind == "sim":
        pytest.skip("a disk in memory has no links, descriptors, limits, or other processes")


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty directory in the place under test."""
    if getattr(request, "param", "disk") == "disk":
        yield tmp_path
        return
    if not TMPFS.is_dir() or not os.access(TMPFS, os.W_OK):
        pytest.skip(f"{TMPFS} cannot be written here")
    with tempfile.TemporaryDirectory(dir=TMPFS) as path:
        yield Path(path)


@pytest.fixture(scope="session")
def _mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("mounting a file system needs root and mkfs.ext4")
    folder = tmp_path_factory.mktemp("mount")
    image, mount_point = folder / "image", folder / "drive"
    mount_point.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(image)], check=True)
    mounted = subprocess.run(["mount", "-o", "loop", str(image), str(mount_point)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mount: {mounted.stderr.decode().strip()}")
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)


@pytest.fixture
def drive(engine_kind: str, sim_disk: SimDisk, request: pytest.FixtureRequest) -> Iterator[Drive]:
    """An empty drive of less than 64 MiB; skips where mounting is needed and not allowed."""
    if engine_kind == "sim":
        sim_disk.capacity_nbytes = 15 << 20
        yield SimDrive(sim_disk, Path("/sim/drive"))
        return
    folder = request.getfixturevalue("_mounted") / "test"
    folder.mkdir()
    yield MountedDrive(folder)
    shutil.rmtree(folder)
