"""What is wrong with Python's packages, our extensions, and torch. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .facts import ExtensionFacts, PackageFacts, SoftwareFacts
from .finding import Finding, Severity

__all__ = ["check_software"]

_ABOUT = "software"
_VERSION = re.compile(r"\d+(?:\.\d+)*")

# Kernels in these are vectorised; without any of them they are plain C++. NEON is on every AArch64.
_WIDE = {"avx2", "avx512", "neon"}


def check_software(software: SoftwareFacts) -> Iterator[Finding]:
    """Yield what is wrong."""
    for package in software.packages:
        yield from _check_package(package)
    yield from _check_torch(software)
    for extension in software.extensions:
        yield from _check_extension(extension)


def _check_package(package: PackageFacts) -> Iterator[Finding]:
    if package.version is None:
        yield Finding(
            id="package-missing",
            severity=Severity.ERROR,
            about=_ABOUT,
            problem=f"{package.name} is not installed",
            fix=f"python3 -m pip install '{_wanted(package)}'",
        )
    elif _numbers(package.version) < _numbers(package.needed):
        yield Finding(
            id="package-too-old",
            severity=Severity.ERROR,
            about=_ABOUT,
            problem=f"{package.name} is {package.version}, and {package.needed} is the oldest supported",
            fix=f"python3 -m pip install --upgrade '{_wanted(package)}'",
        )


def _check_torch(software: SoftwareFacts) -> Iterator[Finding]:
    torch = software.torch
    missing = any(package.name == "torch" and package.version is None for package in software.packages)
    if torch.timed_out:
        yield Finding(
            id="torch-slow",
            severity=Severity.WARNING,
            about=_ABOUT,
            problem=f"importing torch was given up: {torch.problem}; nothing is known of its GPUs",
            fix="run it again (a first import reads much), then: python3 -X importtime -c 'import torch'",
        )
    elif torch.version is None and not missing:
        yield Finding(
            id="torch-broken",
            severity=Severity.ERROR,
            about=_ABOUT,
            problem=f"torch cannot be imported: {torch.problem}",
            fix="python3 -m pip install --force-reinstall torch",
        )


def _check_extension(extension: ExtensionFacts) -> Iterator[Finding]:
    if extension.problem:
        yield _unusable(extension)
    elif not _is_vectorised(extension):
        yield Finding(
            id="no-simd",
            severity=Severity.WARNING,
            about=_ABOUT,
            problem=f"offload.{extension.name} finds no vector instructions here "
            f"({', '.join(extension.isas)}): {_SLOW[extension.name]}",
            fix="use a processor with AVX2; in a virtual machine, pass the host's processor on (-cpu host)",
        )


def _is_vectorised(extension: ExtensionFacts) -> bool:
    if extension.name == "_adam":
        return bool(_WIDE & set(extension.isas))
    return len(extension.isas) > 1


def _unusable(extension: ExtensionFacts) -> Finding:
    rebuild = "in the checkout: python3 -m pip install . (it needs g++ and python3-dev)"
    others = [name for name in extension.files if not name.endswith(extension.suffix)]
    mine = len(extension.files) > len(others)
    if others and not mine:
        # `_aio.cpython-312-x86_64-linux-gnu.so`
        built = ", ".join(name.removeprefix(f"{extension.name}.").removesuffix(".so") for name in others)
        wanted = extension.suffix.removeprefix(".").removesuffix(".so")
        problem = f"offload.{extension.name} is built for {built}, and this Python is {wanted}"
    else:
        problem = extension.problem
    return Finding(
        id="extension-unusable",
        # Without _adam no step can be taken; without _aio files are read by other means.
        severity=Severity.ERROR if extension.name == "_adam" else Severity.WARNING,
        about=_ABOUT,
        problem=f"{problem}: {_WITHOUT[extension.name]}",
        fix=rebuild,
    )


_WITHOUT = {
    "_aio": "transfers go through plain Python and checksums take a second for some MB",
    "_adam": "no optimizer step can be taken",
}
_SLOW = {"_aio": "checksums are slow", "_adam": "the optimizer's update is several times slower"}


def _wanted(package: PackageFacts) -> str:
    return f"{package.name}>={package.needed}" if package.needed else package.name


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release of a version; its build (`+cu130`) and stage (`rc1`) do not matter here."""
    match = _VERSION.match(version)
    return tuple(map(int, match[0].split("."))) if match else ()
