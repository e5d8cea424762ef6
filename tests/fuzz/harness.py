"""What a fuzzing harness is, and what one input must show, under atheris and in the ordinary tests alike.

A harness hands bytes to one parser. The parser may refuse them with an error of `offload.errors`, whose
message is short; anything else is a finding: another exception, a file touched outside of the harness's
folder, a process or a connection begun, a pickle read, memory taken without bound.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from offload.errors import OffloadError

__all__ = ["CORPUS", "MAX_GROWTH_NBYTES", "MAX_MESSAGE", "Finding", "Harness", "check", "touching"]

# One folder for each harness: inputs that once made a finding.
CORPUS = Path(__file__).parent / "corpus"

# What one input may add to the peak of the process. The caps of the formats allow 100 MB of parsed JSON
# for the largest manifest; the inputs here are far smaller.
MAX_GROWTH_NBYTES = 96 << 20

# An error is read by a person. Paths come on top.
MAX_MESSAGE = 4000

# Code may be imported late, and the kernel asked.
_CODE = tuple({os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, CORPUS.parents[2])})
_KERNEL = ("/proc/", "/sys/", "/dev/null", "/dev/urandom")
_PATHS = {
    "open": 1,
    "os.listdir": 1,
    "os.scandir": 1,
    "os.mkdir": 1,
    "os.rmdir": 1,
    "os.remove": 1,
    "os.truncate": 1,
    "os.chmod": 1,
    "os.chown": 1,
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "shutil.rmtree": 1,
}
_NEVER = (
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.putenv",
    "socket.connect",
    "socket.getaddrinfo",
    "ctypes.dlopen",
    "webbrowser.open",
)


class Finding(AssertionError):
    """An input showed what no input may."""


@dataclass(frozen=True, kw_only=True)
class Harness:
    """One parser under test.

    Attributes:
        name: of the harness and of its folder in the corpus.
        parse: gets an input and the only folder that it may touch.
        seeds: gives sound inputs to begin with.
        kind: how inputs are mutated: `json` and `yaml` by their structure, `bytes` blindly.
        allowed: the errors that the parser's documentation names.
        refuses: False for a parser that leaves out what it cannot understand.
    """

    name: str
    parse: Callable[[bytes, Path], object]
    seeds: Callable[[], list[bytes]]
    kind: Literal["bytes", "json", "yaml"] = "json"
    allowed: tuple[type[Exception], ...] = (OffloadError,)
    refuses: bool = True

    def corpus(self) -> list[bytes]:
        """Return the inputs that once made a finding."""
        folder = CORPUS / self.name
        return [path.read_bytes() for path in sorted(folder.iterdir())] if folder.is_dir() else []


@dataclass
class _Watch:
    folder: str = ""
    touched: list[str] = field(default_factory=list)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder:
            return
        if event in _NEVER:
            self.touched.append(f"{event} {arguments!r:.200}")
        for path in arguments[: _PATHS.get(event, 0)]:
            if isinstance(path, str | bytes | os.PathLike) and not self._allows(
                event, os.fsdecode(path), arguments
            ):
                self.touched.append(f"{event} {path!r}")

    def _allows(self, event: str, path: str, arguments: tuple[Any, ...]) -> bool:
        if "/" not in path and path not in ("", ".", ".."):
            return True  # beside a descriptor that was opened under this rule; we open nothing else so
        whole = os.path.abspath(path)
        if whole == self.folder or whole.startswith((self.folder + "/", *_KERNEL)):
            return True
        reads = event in ("os.listdir", "os.scandir") or (event == "open" and not _writes(arguments))
        return reads and whole.startswith(_CODE)


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


_WATCH = _Watch()
# A hook stays for the life of the process, so it does nothing unless an input is being parsed.
_HOOKED: list[bool] = []


def touching(path: object) -> None:
    """Note that code which no audit event tells of (a library in Rust) opens `path`."""
    _WATCH.hear("open", (os.fspath(path), "r", 0))  # type: ignore[call-overload]


@contextmanager
def _watching(folder: Path) -> Iterator[list[str]]:
    if not _HOOKED:
        sys.addaudithook(_WATCH.hear)
        _HOOKED.append(True)
    _WATCH.touched.clear()
    _WATCH.folder = os.path.realpath(folder)
    try:
        yield _WATCH.touched
    finally:
        _WATCH.folder = ""


def check(harness: Harness, data: bytes, folder: Path) -> OffloadError | Exception | None:
    """Give one input to a harness; return the error that it was refused with, None when it was taken.

    Raises:
        Finding: the parser did something that it may not.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused: Exception | None = None
    with _watching(folder) as touched:
        try:
            harness.parse(data, folder)
        except harness.allowed as error:
            refused = error
    if touched:
        raise Finding(f"{harness.name} touched {touched[:5]} with {data!r:.400}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if grown > MAX_GROWTH_NBYTES:
        raise Finding(f"{harness.name} took {grown:,} bytes more for {len(data):,} bytes: {data!r:.400}")
    if refused is not None and len(str(refused)) > MAX_MESSAGE:
        raise Finding(f"{harness.name}: a message of {len(str(refused)):,} characters: {str(refused)[:400]}")
    return refused
