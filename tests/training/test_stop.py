"""Real processes of `offload finetune` that are stopped: what they say, commit, leave and end with."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from offload.training.config import FinetuneConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start(make_config: Callable[..., FinetuneConfig], tmp_path: Path):
    """Return a function that starts the command in a process of its own; keywords are flags."""

    def begin(before: str = "", **flags: object) -> subprocess.Popen[str]:
        path = tmp_path / "run.yaml"
        path.write_text(make_config(max_steps=4000, **flags).to_yaml())
        script = f"import sys\n{before}\nfrom offload.cli import main\nmain(['finetune', sys.argv[1]])\n"
        return subprocess.Popen(
            [sys.executable, "-u", "-c", script, str(path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return begin


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(pattern, line):
            return line
    raise AssertionError(f"it ended without {pattern!r}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_has_committed_its_step_and_goes_on(start, number, code, tmp_path: Path) -> None:
    with start() as process:
        said = read_until(process, r"^a stop ")
        assert re.search(
            r"within about \d.*: its commit takes \d.*; wait longer than that before SIGKILL", said
        )
        process.send_signal(number)
        assert process.stdout is not None
        rest = process.stdout.read()
        assert process.wait(timeout=60) == code, rest
    assert f"{number.name}: finishing this step, then stopping" in rest
    stopped = re.search(r"stopped after step (\d+) of 4000, which is committed", rest)
    assert stopped is not None, rest
    with start() as process:
        assert f"at step {stopped[1]} of 4000" in read_until(process, "^resuming run")
        process.kill()


def test_a_second_signal_leaves_within_three_seconds(start) -> None:
    with start() as process:
        read_until(process, r"^a stop ")
        process.send_signal(signal.SIGTERM)
        began_s = time.monotonic()
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=60)
        assert time.monotonic() - began_s < 3
    assert code in (130, 143)


def test_a_signal_while_importing_takes_back_what_was_begun(start, tmp_path: Path) -> None:
    before = (
        "import os, signal, time\nimport offload.training.start as start\nreal = start.attach\n"
        "def attach(*arguments, on_progress=None, **settings):\n"
        "    def ended(*_):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n        time.sleep(30)\n"
        "    return real(*arguments, on_progress=ended, **settings)\n"
        "start.attach = attach\n"
    )
    with start(before) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait(timeout=60) == 143, said
    assert said.splitlines()[-1] == "terminated; run the same command again to go on"
    assert not (tmp_path / "out").exists()
