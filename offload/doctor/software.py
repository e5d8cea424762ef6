"""The facts of Python, of the packages that offload needs, of its extensions, and of torch.

torch is imported in a process of its own: that takes seconds, and a broken build of it, or a driver that
hangs, must not end the doctor before it has said so.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

from ..aio import native
from .facts import ExtensionFacts, PackageFacts, TorchFacts

_ADAM_MISSING: str = ""
try:
    from .. import _adam
except ImportError as error:
    _ADAM_MISSING = f"the extension offload._adam is not built ({error})"

__all__ = ["TorchImport", "look_at_extensions", "look_at_packages", "offload_version", "python_version"]

_PACKAGE = Path(__file__).resolve().parents[1]

# `torch>=2.10; extra == "x"`: the name, the oldest version, and whether an extra asks for it.
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:.*?>=\s*(?P<needed>[0-9.]+))?[^;]*(?P<marker>;.*)?")

# Run by a fresh Python. The last line of its output is ours: torch may print what it likes before.
_QUESTION = """
import json, torch
answer = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
try:
    answer["num_gpus"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
except RuntimeError as error:
    answer["problem"] = str(error)
print("\\n" + json.dumps(answer))
"""


def offload_version() -> str:
    """Return our version; empty in a source tree that is not installed."""
    try:
        return version("offload")
    except PackageNotFoundError:
        return ""


def python_version() -> str:
    """Return Python's version, with its kind where that is not CPython."""
    kind = platform.python_implementation()
    return platform.python_version() if kind == "CPython" else f"{platform.python_version()} ({kind})"


def look_at_packages() -> tuple[PackageFacts, ...]:
    """Return what offload needs, as its metadata say; nothing when it is not installed."""
    try:
        requirements = requires("offload") or []
    except PackageNotFoundError:
        return ()
    found = []
    for text in requirements:
        match = _REQUIREMENT.fullmatch(text)
        if match is None or "extra" in (match["marker"] or ""):
            continue
        try:
            installed: str | None = version(match["name"])
        except PackageNotFoundError:
            installed = None
        found.append(PackageFacts(name=match["name"], needed=match["needed"] or "", version=installed))
    return tuple(found)


def look_at_extensions(package: Path = _PACKAGE) -> tuple[ExtensionFacts, ...]:
    """Return the two extensions.

    Args:
        package: the folder they are built into.
    """
    aio = None if native.missing_reason else native.extension
    adam = None if _ADAM_MISSING else _adam
    return (
        _extension("_aio", aio, native.missing_reason, "crc32c_isas", package),
        _extension("_adam", adam, _ADAM_MISSING, "supported_isas", package),
    )


def _extension(
    name: str, module: ModuleType | None, missing: str, isas: str, package: Path
) -> ExtensionFacts:
    question: Callable[[], Any] | None = getattr(module, isas, None)
    if module is not None and question is None:
        missing = f"the extension offload.{name} is older than the package: it has no {isas}"
    return ExtensionFacts(
        name=name,
        problem=missing,
        files=tuple(sorted(path.name for path in package.glob(f"{name}.*.so"))),
        suffix=EXTENSION_SUFFIXES[0],
        isas=tuple(question()) if question is not None else (),
    )


class TorchImport:
    """An import of torch under way in another process. A context manager, which ends it."""

    def __init__(self) -> None:
        # -P: a file torch.py in the working directory is not torch, and is none of ours to run.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", _QUESTION],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def result(self, timeout_s: float) -> TorchFacts:
        """Return what came out, waiting `timeout_s` at most."""
        try:
            out, err = self._process.communicate(timeout=max(timeout_s, 0.0))
        except subprocess.TimeoutExpired:
            return TorchFacts(timed_out=True, problem=f"it did not end within {timeout_s:.0f} s")
        if self._process.returncode != 0:
            return TorchFacts(problem=_reason(self._process.returncode, err))
        try:
            return TorchFacts(**json.loads(out.rstrip().rpartition("\n")[2]))
        except (TypeError, ValueError):
            return TorchFacts(problem=f"its answer makes no sense: {out[-200:]!r}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:  # closes the pipes and reaps it
            if self._process.poll() is None:
                self._process.kill()


def _reason(code: int, stderr: str) -> str:
    if code < 0:
        return f"Python was ended by signal {-code}"
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else f"Python ended with exit code {code} and said nothing"
