"""The files of a bench where they cannot be written."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from offload.errors import DiskFullError, StorageError
from offload.report.outputs import write_text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_no_room_is_told_with_the_bytes_needed_and_free() -> None:
    with pytest.raises(DiskFullError, match="cannot write /dev/full: .*: 3 bytes needed, .* free") as error:
        write_text(Path("/dev/full"), "abc")
    assert (error.value.errno, error.value.asked_nbytes) == (errno.ENOSPC, 3)
    assert error.value.got_nbytes is not None


def test_another_failure_keeps_its_errno(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file or directory") as error:
        write_text(tmp_path / "missing" / "x", "abc")
    assert (type(error.value), error.value.errno) == (StorageError, errno.ENOENT)
