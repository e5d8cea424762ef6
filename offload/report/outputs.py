"""The files a bench leaves: JSON, Markdown, and the machine that later runs read.

Writes what it is told to, where it is told to; whether that makes sense was checked before the bench.
The picture is written by `page`, which needs matplotlib.
"""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, DiskFullError, StorageError
from ..machine import MACHINE_VARIABLE, default_machine_path, load_machine, save_machine
from ..probe.results import BenchResult
from .document import to_json
from .markdown import to_markdown
from .sections import best_setting, drive_groups, format_setting, group_title, sections_of

__all__ = ["Outputs", "keep_machine", "write_files", "write_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where results go; None where they do not.

    Attributes:
        json: every figure and sample.
        markdown: the tables.
        plot: the charts: an `.svg` picture, else a page.
        machine: what later runs read.
        unkept: why there is no `machine`; empty when there is.
    """

    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None
    machine: Path | None = None
    unkept: str = ""


def write_files(result: BenchResult, outputs: Outputs) -> None:
    """Write the JSON and the Markdown that are asked for, over what was there.

    Raises:
        StorageError: a file cannot be written.
    """
    if outputs.json is not None:
        write_text(outputs.json, to_json(result))
    if outputs.markdown is not None:
        write_text(outputs.markdown, to_markdown("offload bench", sections_of(result)))


def keep_machine(result: BenchResult, outputs: Outputs) -> str:
    """Save the machine where it is to be kept, and return one line about it.

    Raises:
        StorageError: it cannot be written.
    """
    group = drive_groups(result)[-1]
    best = best_setting(result, group)
    if best is None:
        return f"No setting was chosen and none kept: {outputs.unkept or 'see the notes'}."
    text = f"Best for {group_title(result, group)}: {format_setting(best)}."
    if outputs.machine is None:
        return f"{text} Not kept: {outputs.unkept}."
    forgotten = _forgotten(result, outputs.machine)
    save_machine(result.machine, outputs.machine)
    return f"{text} Kept in {outputs.machine}{_use(outputs.machine)}.{forgotten}"


def write_text(path: Path, text: str) -> None:
    """Write `text` over what was at `path`.

    Raises:
        DiskFullError: no room, with the bytes needed and free.
        StorageError: it cannot be written for another reason.
    """
    try:
        # A directory's name may be no UTF-8, and is then shown with the bytes escaped.
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        number, message = error.errno or 0, f"cannot write {path}: {error.strerror}"
        if number not in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(message, errno=number, path=str(path)) from error
        needed, free = len(text.encode("utf-8", "backslashreplace")), shutil.disk_usage(path.parent).free
        raise DiskFullError(
            f"{message}: {needed:,} bytes needed, {free:,} free; free space, or name a file on another drive",
            errno=number,
            path=str(path),
            asked_nbytes=needed,
            got_nbytes=free,
        ) from error


def _use(path: Path) -> str:
    try:
        if path.absolute() == default_machine_path().absolute():
            return " and used from now on"
    except ConfigError:
        pass  # there is no home: no other place either
    return f"; runs with {MACHINE_VARIABLE}={path} use it"


def _forgotten(result: BenchResult, path: Path) -> str:
    """Return what overwriting `path` forgets, or nothing: one file holds one measurement."""
    try:
        before = load_machine(path)
    except FileNotFoundError:
        return ""
    except (ConfigError, OSError):
        return " It replaces a file that could not be read."
    measured = {drive.device for drive in result.machine.drives}
    lost = [drive.path for drive in before.drives if drive.device not in measured]
    if not lost:
        return ""
    return f" It replaces what was kept of {', '.join(lost)}: measure all drives of your runs in one call."
