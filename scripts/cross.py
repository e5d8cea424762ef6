"""Build the optimizer kernels for AArch64 with a cross compiler and run them under qemu.

    python scripts/cross.py          # Debian: apt install g++-aarch64-linux-gnu qemu-user

Every kernel of this machine, and of the emulated one, is run on the same arrays
(tests/optim/kernels_agree.cc). On each the vector kernels must give the bits of the scalar one, and
both machines must print the same checksums. What is built lies in build/cross.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["HERE", "NEON", "Target", "missing_reason", "outputs"]

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "tests" / "optim" / "kernels_agree.cc"
FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-ffp-contract=off"),
    *("-I", str(ROOT / "csrc")),
]


@dataclass(frozen=True)
class Target:
    """An architecture.

    Args:
        name: of its folder in build/cross.
        compiler: a program.
        flags: by file name suffix; other files with such a suffix are for other architectures.
        runner: programs of which one runs what was built; none when this machine does.
    """

    name: str
    compiler: str
    flags: dict[str, list[str]]
    runner: tuple[str, ...] = ()


# As in setup.py.
HERE = Target(
    "here",
    "g++",
    {
        "_avx2": ["-mavx2", "-mfma", "-mf16c"],
        "_avx512": [
            *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
            *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
        ],
    },
)
NEON = Target("aarch64", "aarch64-linux-gnu-g++", {"_neon": []}, ("qemu-aarch64", "qemu-aarch64-static"))


def missing_reason(target: Target) -> str:
    """Return why a target cannot be built and run here, or an empty string."""
    if shutil.which(target.compiler) is None:
        return f"there is no {target.compiler}; on Debian: apt install g++-aarch64-linux-gnu"
    if target.runner and not any(map(shutil.which, target.runner)):
        return f"there is none of {', '.join(target.runner)}; on Debian: apt install qemu-user"
    return ""


def outputs(target: Target) -> subprocess.CompletedProcess[str]:
    """Build the kernels and the driver for a target, and run them."""
    folder = ROOT / "build" / "cross" / target.name
    folder.mkdir(parents=True, exist_ok=True)
    suffixes = ("_avx2", "_avx512", "_neon")
    objects = []
    for source in [DRIVER, *sorted((ROOT / "csrc" / "adam").glob("*.cc"))]:
        suffix = next((each for each in suffixes if source.stem.endswith(each)), "")
        if source.name == "bind.cc" or (suffix and suffix not in target.flags):
            continue
        made = folder / f"{source.stem}.o"
        flags = [*FLAGS, *target.flags.get(suffix, [])]
        _run([target.compiler, *flags, "-c", str(source), "-o", str(made)])
        objects.append(str(made))
    program = folder / "kernels_agree"
    # Static: the emulator then needs none of the architecture's libraries.
    _run([target.compiler, "-static", *objects, "-pthread", "-o", str(program)])
    runner = [path for name in target.runner if (path := shutil.which(name))][:1]
    return subprocess.run([*runner, str(program)], capture_output=True, text=True, check=False)


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True)


def main() -> int:
    results = []
    for target in (HERE, NEON):
        if reason := missing_reason(target):
            print(f"{target.name}: {reason}", file=sys.stderr)
            return 2
        print(f"{target.name}: building", flush=True)
        result = outputs(target)
        print(f"{target.name}: {result.stderr.strip()}", flush=True)
        results.append(result)
    same = results[0].stdout == results[1].stdout
    print(f"the same checksums on both: {'yes' if same else 'NO'}", flush=True)
    if not same:
        pairs = zip(results[0].stdout.splitlines(), results[1].stdout.splitlines(), strict=False)
        for here, there in pairs:
            if here != there:
                print(f"  {here} here, {there.rsplit(maxsplit=1)[-1]} there", file=sys.stderr)
    return 0 if same and all(result.returncode == 0 for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
