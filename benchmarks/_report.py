"""What every benchmark prints and keeps: machine, versions, command, figures with their bars, raw samples.

A report goes to the terminal line by line, and with `--save DIR` to DIR/README.md and DIR/raw.csv as
well. It names the kind of machine and not the machine: no host name, no user, no absolute paths of its
own making.

Thread rule: the caller's thread only.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from offload.sizes import GIB, format_bytes

__all__ = ["Report", "add_report_arguments"]

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "numpy")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--save", type=Path, metavar="DIR", help="write README.md and raw.csv into DIR")


class Report:
    """One run of one benchmark.

    Args:
        script: its `__file__`.
        question: the one it answers.
        argv: its arguments, for the command line in the report.
        disk: a directory on the drive under test, None when no drive takes part.
    """

    def __init__(self, script: str, question: str, argv: Sequence[str], disk: Path | None = None) -> None:
        self.name = Path(script).stem
        self._lines: list[str] = []
        self._samples: list[dict[str, object]] = []
        self._misses: list[str] = []
        self.say(f"# {self.name}: {question}")
        self.say()
        for key, value in _facts(self.name, argv, disk):
            self.say(f"- {key}: {value}")
        self.say()

    def say(self, line: str = "") -> None:
        """Print a line and keep it."""
        print(line, flush=True)
        self._lines.append(line)

    def sample(self, **values: object) -> None:
        """Keep one raw sample: a row of raw.csv."""
        self._samples.append(values)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print a Markdown table."""
        self.say("| " + " | ".join(columns) + " |")
        self.say("|" + " --- |" * len(columns))
        for row in rows:
            self.say("| " + " | ".join(str(value) for value in row) + " |")
        self.say()

    def bar(self, what: str, value: float, limit: float, unit: str = "", *, least: bool = False) -> None:
        """Compare a figure with the most it may be, or with the least."""
        held = value >= limit if least else value <= limit
        figure = f"{value:.3f} {unit}".rstrip()
        sense = "at least " if least else ""
        self.say(f"- {what}: {figure}, bar {sense}{limit:.3f}: {'held' if held else 'MISSED'}")
        if not held:
            self._misses.append(what)

    def fact(self, what: str, held: bool) -> None:
        """State something that must be true."""
        self.say(f"- {what}: {'yes' if held else 'NO'}")
        if not held:
            self._misses.append(what)

    def finish(self, directory: Path | None) -> int:
        """Write what was asked for and return the exit status: 1 when a bar was missed."""
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "README.md").write_text("\n".join(self._lines).rstrip() + "\n", encoding="ascii")
            columns = list(dict.fromkeys(key for sample in self._samples for key in sample))
            with open(directory / "raw.csv", "w", newline="", encoding="ascii") as file:
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self._samples)
        if self._misses:
            print(f"missed: {'; '.join(self._misses)}", file=sys.stderr)
        return 1 if self._misses else 0


def _facts(name: str, argv: Sequence[str], disk: Path | None) -> Iterable[tuple[str, str]]:
    yield "date", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    yield "command", f"`{shlex.join(['python', f'benchmarks/{name}.py', *argv])}`"
    yield "offload", _commit()
    versions = " ".join(f"{package} {_version(package)}" for package in PACKAGES)
    yield "versions", f"Python {platform.python_version()}, {versions}, Linux {platform.release()}"
    memory_nbytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield "machine", f"{_cpu()}, {os.cpu_count()} cores, {memory_nbytes / GIB:.0f} GiB memory"
    yield "load average at the start", f"{os.getloadavg()[0]:.1f}"
    if disk is not None:
        fs = _file_system(disk)
        yield "drive", f"{fs}, {format_bytes(shutil.disk_usage(disk).free)} free"


def _commit() -> str:
    """Return the commit measured, and whether tracked files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return _version("offload")
    diff = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "offload", "csrc"], check=False)
    return f"commit {head.stdout.strip()}{' with changes' if diff.returncode else ''}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(absent)"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(directory: Path) -> str:
    """Return the type and device of the mount that holds `directory`."""
    wanted = directory.resolve()
    best, found = -1, "unknown file system"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, mount, kind = line.split()[:3]
        if wanted.is_relative_to(mount) and len(mount) > best:
            best, found = len(mount), f"{kind} on {device}"
    return found
