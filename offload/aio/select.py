"""Chooses the I/O engine for this machine, and says which and why.

Order: `uring`, `threads`, `portable`. Each is tried by making one; a refusal (a seccomp filter as in
Docker, a sysctl, an old kernel, no extension) is a reason that is logged once and that `doctor` shows.
Nothing is chosen silently, and a name that was asked for is that engine or an error.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import logging
import os
import weakref
from pathlib import Path
from typing import NamedTuple, get_args

from offload.aio import native, portable
from offload.aio.engine import Engine, EngineName
from offload.errors import ConfigError, PlanError, StorageError
from offload.sizes import MIB

__all__ = ["ENGINE_VARIABLE", "EngineProbe", "open_engine", "probe_engines"]

# The environment variable that names the engine when the caller does not.
ENGINE_VARIABLE = "OFFLOAD_IO_ENGINE"

_NAMES: tuple[EngineName, ...] = get_args(EngineName)
_SYSCTL = Path("/proc/sys/kernel/io_uring_disabled")
_log = logging.getLogger("offload.aio")


class EngineProbe(NamedTuple):
    """Whether one engine can be had here, and why (not)."""

    name: EngineName
    available: bool
    reason: str


def open_engine(
    name: EngineName | None = None,
    *,
    queue_depth: int = 32,
    segment_nbytes: int = MIB,
    threads: int | None = None,
    direct: bool = True,
) -> Engine:
    """Return a new engine, the best that this machine allows or the one that is named.

    The caller owns it and closes it. One that is still open when the interpreter ends is closed then,
    which finishes its requests.

    Args:
        name: which one; None takes `OFFLOAD_IO_ENGINE` from the environment, else the first that works.
        queue_depth: the most segments in flight on each drive, 1 to 4096. 32 of 1 MiB saturate the
            drives measured; `offload bench` finds the best setting of yours.
        segment_nbytes: the most bytes of one operation, a multiple of 4096.
        threads: threads of `threads` (on each drive) and `portable` (in all); None: 8, or fewer for a
            smaller `queue_depth`. For `threads` it is the number of segments in flight.
        direct: bypass the page cache where the file system allows it; False never does.

    Raises:
        ConfigError: there is no engine of that name.
        PlanError: the engine that was named cannot be had here; says why.

    >>> with open_engine("portable") as engine:
    ...     engine.name
    'portable'
    """
    forced = _forced_name(name)
    num_threads = min(queue_depth, 8) if threads is None else threads
    refused: list[str] = []
    for candidate in [forced] if forced else _NAMES:
        engine = _make(candidate, queue_depth, segment_nbytes, num_threads, direct)
        if isinstance(engine, str):
            refused.append(f"{candidate}: {engine}")
            continue
        _announce(candidate, engine.queue_depth, "; ".join(refused))
        _alive().add(engine)
        return engine
    raise PlanError(f"no usable I/O engine; {'; '.join(refused)}")


def probe_engines() -> list[EngineProbe]:
    """Try each engine and return one row for each, in order of preference."""
    rows = []
    for name in _NAMES:
        engine = _make(name, 1, MIB, 1, True)
        if isinstance(engine, str):
            rows.append(EngineProbe(name, False, engine))
        else:
            engine.close()
            rows.append(EngineProbe(name, True, "works"))
    return rows


def _forced_name(name: EngineName | None) -> EngineName | None:
    wanted, origin = (name, "name") if name else (os.environ.get(ENGINE_VARIABLE), ENGINE_VARIABLE)
    if not wanted:
        return None
    if wanted not in _NAMES:
        raise ConfigError(f"{origin}: no I/O engine is called {wanted!r}; there are {', '.join(_NAMES)}")
    return wanted


def _make(
    name: EngineName, queue_depth: int, segment_nbytes: int, threads: int, direct: bool
) -> Engine | str:
    """Return the engine, or the reason why there is none."""
    if name == "portable":
        if portable.missing_reason:
            return portable.missing_reason
        return portable.PortableEngine(
            queue_depth=queue_depth, segment_nbytes=segment_nbytes, threads=threads
        )
    if native.missing_reason:
        return native.missing_reason
    try:
        return native.extension.Engine(
            name, queue_depth=queue_depth, segment_nbytes=segment_nbytes, threads=threads, direct=direct
        )
    except StorageError as error:
        return _refusal(error)


def _refusal(error: StorageError) -> str:
    if error.errno == errno.EPERM:
        setting = _SYSCTL.read_text().strip() if _SYSCTL.exists() else "0"
        if setting != "0":
            return f"the sysctl kernel.io_uring_disabled is {setting}"
        return "a seccomp filter refuses io_uring (EPERM), as Docker's default profile does"
    if error.errno == errno.ENOSYS:
        return "this kernel has no io_uring, or a seccomp filter hides it (ENOSYS)"
    if error.errno == errno.ENOMEM:
        return "no memory may be locked for the ring (ENOMEM): raise ulimit -l"
    return str(error)


@functools.cache  # once per choice and process, however many engines are opened
def _announce(name: EngineName, queue_depth: int, refused: str) -> None:
    if refused:
        _log.warning("I/O engine: %s, queue depth %d, because %s", name, queue_depth, refused)
    else:
        _log.info("I/O engine: %s, queue depth %d", name, queue_depth)


@functools.cache  # one entry with atexit, however many engines are opened
def _alive() -> weakref.WeakSet[Engine]:
    """Return the set of this process's engines, all of which are closed when the interpreter ends."""
    engines: weakref.WeakSet[Engine] = weakref.WeakSet()
    atexit.register(_close_all, engines)
    return engines


def _close_all(engines: weakref.WeakSet[Engine]) -> None:
    with contextlib.ExitStack() as closing:  # one that fails keeps none of the others from it
        for engine in engines:
            closing.callback(engine.close)
