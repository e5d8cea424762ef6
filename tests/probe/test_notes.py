"""What a reader is told beside the figures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload.probe.notes import Traffic, busy_notes, drive_notes, shared_notes, slow_notes
from offload.probe.options import BenchOptions
from offload.probe.results import DriveFacts
from offload.sizes import GIB

DRIVE = DriveFacts(
    path="/mnt/a",
    device="259:1",
    source="/dev/nvme0n1p1",
    file_system="ext4",
    engine="uring",
    engine_reason="",
    direct=True,
    file_nbytes=4 * GIB,
    free_nbytes=100 * GIB,
    verified_nbytes=4 * GIB,
)
OPTIONS = BenchOptions()


def test_a_drive_as_it_should_be_needs_no_note():
    assert drive_notes(DRIVE, OPTIONS, "nvme0n1") == []


@pytest.mark.parametrize(
    ("changes", "options", "name", "said"),
    [
        ({"file_system": "tmpfs", "direct": False}, OPTIONS, None, "figures of memory"),
        ({"file_system": "nfs4"}, OPTIONS, None, "of the network and of a server"),
        ({"file_system": "zfs", "direct": False}, OPTIONS, None, "because zfs refuses O_DIRECT"),
        ({"direct": False}, BenchOptions(direct=False), "sda", "through the page cache, as asked"),
        ({"direct": False, "engine": "portable"}, OPTIONS, "sda", "the portable engine has no O_DIRECT"),
        ({"file_system": "overlay"}, OPTIONS, None, "the layer of a container"),
        ({}, OPTIONS, "vda", "a virtual drive"),
        ({}, OPTIONS, "loop3", "no drive but a file"),
    ],
)
def test_what_is_no_plain_drive_is_said_once(changes, options, name, said):
    notes = drive_notes(replace(DRIVE, **changes), options, name)
    assert len(notes) == 1
    assert said in notes[0]
    assert "/mnt/a" in notes[0]


def test_directories_on_one_drive_are_named_together():
    (note,) = shared_notes(["/a", "/b", "/c"], ["nvme0n1", "nvme1n1", "nvme0n1"])
    assert note.startswith("/a, /c are on one drive (nvme0n1)")


def test_a_drive_below_0_7_of_the_fastest_is_named():
    drives = [replace(DRIVE, path=path) for path in ("/a", "/b", "/c")]
    (note,) = slow_notes(drives, [7e9, 4.8e9, 5e9], "read")
    assert note.startswith("/b is slow: read 4.80 GB/s, and /a 7.00 GB/s")


def test_a_drive_is_not_slow_beside_memory():
    assert slow_notes([DRIVE, replace(DRIVE, path="/b", file_system="tmpfs")], [1e9, 9e9], "read") == []
    assert slow_notes([replace(DRIVE, file_system="tmpfs")], [1e9], "read") == []


def test_a_drive_that_others_use_is_busy():
    quiet = Traffic(name="nvme0n1", drive_nbytes=102 * GIB, own_nbytes=100 * GIB)
    loud = Traffic(name="nvme1n1", drive_nbytes=110 * GIB, own_nbytes=100 * GIB)
    (note,) = busy_notes([quiet, loud])
    assert note.startswith("nvme1n1 was busy: others moved 10.0 GiB while we moved 100.0 GiB")
