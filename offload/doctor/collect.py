"""Collects the facts, in three seconds at most; torch, which may be slow to import, gets ten.

What may hang (a network file system whose server is gone, a driver) is asked in a thread of its own and
left behind when it does not answer; that it did not is then the fact.

Thread rule: the caller's thread; the others hand over one result each and touch nothing else.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from ..aio import probe_engines
from ..aio.select import ENGINE_VARIABLE
from ..errors import ConfigError
from ..machine import default_machine_path, load_machine
from .directories import look_at_directory
from .facts import DirectoryFacts, EngineFacts, Facts, GpuFacts, MeasuredFacts, Origin, SoftwareFacts
from .gpus import look_at_gpus
from .software import TorchImport, look_at_extensions, look_at_packages, offload_version, python_version
from .system import look_at_host

__all__ = ["collect_facts"]

Result = TypeVar("Result")

_LIMIT_S = 3.0
# A first import of a CUDA build reads gigabytes of libraries; after that it takes a second or two.
_TORCH_LIMIT_S = 10.0


def collect_facts(
    directories: Sequence[str], *, limit_s: float = _LIMIT_S, torch_limit_s: float = _TORCH_LIMIT_S
) -> Facts:
    """Return the facts of this machine and of the directories.

    Args:
        directories: named by the user; with none, those that `offload bench` measured and the working
            directory.
        limit_s: for everything but torch.
        torch_limit_s: for torch.
    """
    begin_s = time.monotonic()
    with TorchImport() as torch:
        gpus = _Answer(look_at_gpus)
        engine = _look_at_engines()
        measured = _look_at_measured()
        answers = [
            (place, _Answer(partial(look_at_directory, *place, engine.chosen)))
            for place in _places(directories, measured)
        ]
        host = look_at_host()
        extensions, packages = look_at_extensions(), look_at_packages()
        until_s = begin_s + limit_s
        silent = f"no answer within {limit_s:.0f} s"
        found = tuple(
            answer.until(until_s) or DirectoryFacts(path=os.path.abspath(path), origin=origin, problem=silent)
            for (path, origin), answer in answers
        )
        gpu = gpus.until(until_s) or GpuFacts(source="nvml", problem=silent)
        software = SoftwareFacts(
            offload=offload_version(),
            python=python_version(),
            packages=packages,
            extensions=extensions,
            torch=torch.result(begin_s + torch_limit_s - time.monotonic()),
        )
    return Facts(
        taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
        software=software,
        host=host,
        gpu=gpu,
        engine=engine,
        measured=measured,
        directories=found,
    )


class _Answer(Generic[Result]):
    """What a call in another thread returns, or None when it takes too long."""

    def __init__(self, call: Callable[[], Result]) -> None:
        self._call = call
        self._result: Result | None = None
        self._error: BaseException | None = None
        # A daemon: one that hangs must not keep the process.
        self._thread = threading.Thread(target=self._run, name="offload-doctor", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that asks
            self._error = error

    def until(self, when_s: float) -> Result | None:
        """Wait until `when_s` of time.monotonic() and return the result, or raise what the call raised."""
        self._thread.join(max(0.0, when_s - time.monotonic()))
        if self._error is not None:
            raise self._error
        return self._result


def _places(directories: Sequence[str], measured: MeasuredFacts) -> list[tuple[str, Origin]]:
    if directories:
        return [(path, "named") for path in directories]
    places: list[tuple[str, Origin]] = [(path, "measured") for path in measured.directories]
    return [*places, (os.curdir, "working directory")]


def _look_at_engines() -> EngineFacts:
    probes = probe_engines()
    available = tuple(probe.name for probe in probes if probe.available)
    asked = os.environ.get(ENGINE_VARIABLE, "")
    return EngineFacts(
        chosen=next((name for name in available if asked in ("", name)), None),
        asked=asked,
        available=available,
        refused=tuple((probe.name, probe.reason) for probe in probes if not probe.available),
    )


def _look_at_measured() -> MeasuredFacts:
    path: Path | None = None
    try:
        path = default_machine_path()
        machine = load_machine(path)
    except FileNotFoundError:
        return MeasuredFacts(path=str(path))
    except (ConfigError, ImportError, OSError) as error:
        return MeasuredFacts(path=str(path or ""), problem=str(error))
    return MeasuredFacts(
        path=str(path),
        measured_at=machine.measured_at,
        directories=tuple(drive.path for drive in machine.drives),
        file_system_ids=tuple(drive.device for drive in machine.drives),
    )
