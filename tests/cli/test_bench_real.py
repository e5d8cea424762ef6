"""`offload bench` with the true probe, at toy size, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from offload.machine import load_machine

ROOT = Path(__file__).resolve().parents[2]

# A process in which some packages cannot be imported; torch never, since drives are measured where it is
# not installed. Samples are short, since nothing here looks at a figure.
COMMAND = """
import sys

absent = sys.argv.pop(1).split(",")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import functools
import signal
import offload.probe.options as options
from offload.cli import main
# Whoever runs the tests in the background may have it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
options.BenchOptions = functools.partial(options.BenchOptions, sample_s=0.01)
main(["bench", *sys.argv[1:]])
"""

TOY = ("--size", "8MiB", "--rounds", "1", "--block", "256KiB", "--depth", "1,2")


def start(*arguments: object, machine: Path, absent: str = "torch") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, absent, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OFFLOAD_MACHINE": str(machine), "PYTHONWARNINGS": "error"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("engine", ["threads", "portable"])
def test_a_real_bench_without_torch_leaves_results_and_nothing_else(tmp_path: Path, engine: str) -> None:
    drives = [tmp_path / "a", tmp_path / "b"]
    for drive in drives:
        drive.mkdir()
    kept, page, data = tmp_path / "machine.json", tmp_path / "b.svg", tmp_path / "b.json"
    outputs = ("--machine", kept, "--plot", page, "--json", data)
    with start(*drives, *TOY, "--engine", engine, *outputs, "--no-memory", machine=kept) as process:
        out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "")
    assert [list(drive.iterdir()) for drive in drives] == [[], []]
    assert "2 drives at once" in out
    machine = load_machine(kept)
    assert [drive.path for drive in machine.drives] == [str(drive) for drive in drives]
    assert machine.setting_for((machine.drives[0].device,)) is not None
    document = json.loads(data.read_text())
    patterns = {(cell["mode"], cell["pattern"], tuple(cell["drives"])) for cell in document["cells"]}
    assert {("bandwidth", name, (0, 1)) for name in ("read", "write", "mixed")} <= patterns
    assert page.read_text().count('id="axes_') == 3 * 3 + 2


def test_a_missing_matplotlib_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    drive, kept, page = tmp_path / "drive", tmp_path / "machine.json", tmp_path / "b.html"
    drive.mkdir()
    with start(drive, *TOY, "--plot", page, machine=kept, absent="torch,matplotlib") as process:
        out, err = process.communicate(timeout=60)
    needed = "error: --plot needs matplotlib: python3 -m pip install 'offload[plot]'\n"
    assert (process.returncode, out, err) == (2, "", needed)
    assert not kept.exists() and not page.exists()


def test_without_a_plot_matplotlib_is_not_needed(tmp_path: Path) -> None:
    kept = tmp_path / "machine.json"
    arguments = (tmp_path, *TOY, "--machine", kept, "--no-memory")
    with start(*arguments, machine=kept, absent="torch,matplotlib") as process:
        _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "")
    assert kept.exists()


def test_ctrl_c_ends_a_real_bench_with_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    drive, kept = tmp_path / "drive", tmp_path / "machine.json"
    drive.mkdir()
    # Long enough that it is still measuring whenever the signal comes.
    arguments = (drive, "--size", "8MiB", "--no-memory", "--no-latency", "--sustained", "1h")
    with start(*arguments, machine=kept) as process:
        wait_until_measuring(process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted; nothing is left on the drives\n")
    assert list(drive.iterdir()) == [] and not kept.exists()


def wait_until_measuring(process: subprocess.Popen[str]) -> None:
    """Return when the process has a bench file open, which has no name any more."""
    folder = Path(f"/proc/{process.pid}/fd")
    while process.poll() is None:
        for name in os.listdir(folder):
            try:
                target = os.readlink(folder / name)
            except FileNotFoundError:  # closed since it was listed
                continue
            if "offload-bench-" in target and target.endswith("(deleted)"):
                return
    raise AssertionError(f"it ended before it measured: {process.communicate()}")
