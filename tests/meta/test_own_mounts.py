"""`own_mounts.py`: a process that is killed leaves no mount and no loop device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

CHILD = """
import os, signal, subprocess, sys
from own_mounts import leave_shared_mounts
leave_shared_mounts()
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", sys.argv[1]], check=True)
open(os.path.join(sys.argv[1], "seen by the child alone"), "w").close()
print(os.listdir(sys.argv[1]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.usefixtures("own_mounts")
def test_a_process_that_is_killed_leaves_no_mount(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "['seen by the child alone']\n"), done.stderr
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


@pytest.mark.usefixtures("own_mounts")
def test_the_mounts_of_a_test_are_not_those_of_the_machine() -> None:
    # The parent of the test process, or its parent, is in the machine's own.
    assert os.readlink("/proc/self/ns/mnt") != os.readlink(f"/proc/{os.getppid()}/ns/mnt")
