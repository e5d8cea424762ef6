"""Build the extensions under gcc's sanitizers; run the I/O engine's tests and stress, and the kernels' tests.

    python scripts/sanitize.py            # AddressSanitizer with UBSan, then ThreadSanitizer
    python scripts/sanitize.py asan --operations 100000 --seed 7

Each build has a folder of its own, build/asan or build/tsan, whose `lib/offload` is the package with
the instrumented extensions in place of the usual ones; those stay as they are. The interpreter is
not instrumented, so the sanitizer's runtime is preloaded. Reports are written to files, because a
test may not look at what its child prints; one report of whatever process fails the run.
Only UBSan's go to stderr, and end the process that they are about.

[Note: what the sanitizers see]
Only our C++ is instrumented. Bytes that the kernel reads or writes for io_uring are invisible: a
buffer that was freed too early shows up in the `threads` engine (preadv and pwritev are checked)
and, as wrong bytes, in the stress's model. The order that io_uring itself makes between a submission
and its completion is invisible to TSan as well, and not needed by it: both are handled on one thread.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["KINDS", "Kind", "environment", "missing_reason", "reports", "run"]

ROOT = Path(__file__).resolve().parents[1]
STRESS = ROOT / "tests" / "sanitize" / "engine_stress.py"

# What the optimizer kernels' tests are: of their memory for ASan and UBSan, of their threads for TSan.
POOL = "tests/optim/test_kernel_threads.py"
KERNELS = [
    "tests/optim/test_adamw_kernel.py",
    "tests/optim/test_moments_8bit.py",
    "tests/optim/test_multi_tensor.py",
    "tests/optim/test_squared_norm.py",
]


@dataclass(frozen=True)
class Kind:
    """One sanitizer.

    Args:
        flags: what -fsanitize takes.
        runtime: the library that must be in the process first.
        options: environment variables; `{reports}` is where reports go.
        deselected: tests that cannot run under it.
        prefix: a command that others are run through.
    """

    flags: str
    runtime: str
    options: dict[str, str]
    deselected: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()


KINDS = {
    "asan": Kind(
        "address,undefined",
        "libasan.so",
        {
            # Leaks are looked for in the stress only: the tests start programs that leak (mkfs).
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:log_path={reports}",
            # Its reports go to stderr; gcc's libubsan does not heed log_path. The status tells of them.
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        },
    ),
    "tsan": Kind(
        "thread",
        "libtsan.so",
        {
            # Children of the fork test start threads, which TSan refuses unless told otherwise.
            "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1:die_after_fork=0:"
            "log_path={reports}:suppressions={suppressions}",
        },
        (
            # A thread of the parent has the address of one that the child starts; TSan complains.
            "tests/aio/test_engine_lifetime.py::test_a_forked_child_is_refused_and_may_open_its_own",
            # Its processes end in the middle of calls, so nobody joins their engines' threads: "thread leak".
            "tests/aio/test_engine_lifetime.py"
            "::test_the_interpreter_ends_cleanly_with_daemon_threads_in_calls",
            # They count the process's threads, and TSan has one of its own.
            f"{POOL}::test_threads_are_kept_and_are_no_more_than_the_processors",
            f"{POOL}::test_after_the_end_of_the_pool_a_call_has_its_own_thread",
        ),
        # libtsan finds its shadow memory taken where vm.mmap_rnd_bits is large (32 on new kernels).
        ("setarch", "-R"),
    ),
}

# The thread-local memory of a thread that has ended is freed by the next that starts or ends. What
# orders the two is the kernel's word that the first is gone, which TSan does not see.
TSAN_SUPPRESSIONS = "race:_dl_deallocate_tls\n"

# An allocation that pybind11 makes once, for the module, and never frees.
LEAK_IS_MEANT = re.compile(r"pybind11_init_|PyInit_|pybind11::(detail::)?get_internals")
OURS = re.compile(r"csrc/(aio|adam)/|offload/_(aio|adam)\.")


def missing_reason(kind: str) -> str:
    """Return why the sanitizer cannot be used here, or an empty string."""
    if shutil.which("g++") is None:
        return "there is no g++; on Debian: apt install g++"
    runtime = _library(KINDS[kind].runtime)
    if not runtime.is_absolute():
        return f"gcc has no {runtime}; on Debian it comes with g++ (libasan8, libtsan2 for gcc 12)"
    return ""


def environment(kind: str, folder: Path) -> dict[str, str]:
    """Return the environment in which a child is sanitized and leaves its reports in `folder`.

    `folder`/lib, where it exists, is where the child finds the package.
    """
    chosen = KINDS[kind]
    suppressions = folder / "suppressions"
    suppressions.write_text(TSAN_SUPPRESSIONS)
    # libstdc++ as well: the runtimes look for what they intercept (__cxa_throw) when they are loaded.
    preload = [_library(chosen.runtime), _library("libstdc++.so")]
    options = {
        name: value.format(reports=folder / "report", suppressions=suppressions)
        for name, value in chosen.options.items()
    }
    return {
        **os.environ,
        **options,
        "LD_PRELOAD": " ".join(str(path) for path in preload),
        "PYTHONMALLOC": "malloc",  # else small buffers come from arenas that the sanitizers do not know
        "PYTHONPATH": os.pathsep.join([str(folder / "lib"), str(STRESS.parent)]),
        "PYTHONSAFEPATH": "1",  # the folder where it is run holds the usual extensions
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }


def run(kind: str, folder: Path, command: Sequence[str], *, leaks: bool = False) -> int:
    """Run a command under a sanitizer, and where it can have it look for leaks; return the exit status."""
    prefix = list(KINDS[kind].prefix)
    # Docker's default seccomp profile refuses it; most kernels do without.
    if prefix and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        prefix = []
    variables = environment(kind, folder)
    if leaks and kind == "asan":
        variables["ASAN_OPTIONS"] = variables["ASAN_OPTIONS"].replace("detect_leaks=0", "detect_leaks=1")
        # The interpreter leaks a little of its own: reports() tells ours from that, not the status.
        variables["LSAN_OPTIONS"] = "exitcode=0"
    return subprocess.run([*prefix, *command], cwd=ROOT, env=variables, check=False).returncode


def reports(folder: Path) -> list[str]:
    """Return what the sanitizers found since the folder was made, leaks that are not ours aside."""
    found = []
    for path in sorted(folder.glob("report.*")):
        text = path.read_text(errors="replace")
        if "LeakSanitizer" not in text:
            found.append(text)
            continue
        leaks = [block for block in text.split("\n\n") if re.match(r"\s*(Direct|Indirect) leak", block)]
        found += [leak for leak in leaks if OURS.search(leak) and not LEAK_IS_MEANT.search(leak)]
    return found


def build(kind: str, folder: Path) -> None:
    """Build both extensions into `folder`/lib, and put the package's other files beside them."""
    made = folder / "made"
    setup = [sys.executable, "setup.py", "--quiet", "build_ext", "--parallel", "2"]
    subprocess.run(
        [*setup, "--build-temp", str(folder / "temp"), "--build-lib", str(made)],
        cwd=ROOT,
        env={**os.environ, "CC": "gcc", "CXX": "g++", "OFFLOAD_SANITIZE": KINDS[kind].flags},
        check=True,
    )
    package = folder / "lib" / "offload"
    shutil.rmtree(folder / "lib", ignore_errors=True)
    package.mkdir(parents=True)
    for source in (ROOT / "offload").iterdir():
        if source.suffix != ".so" and source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    for extension in (made / "offload").glob("*.so"):
        (package / extension.name).symlink_to(extension)


def check(kind: str, operations: int, seed: int) -> int:
    """Build, test, stress; return how many of these went wrong."""
    folder = ROOT / "build" / kind
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("report.*"):
        old.unlink()
    print(f"{kind}: building", flush=True)
    build(kind, folder)

    where = "import offload._aio as a, offload._adam as b; print(a.__file__, b.__file__)"
    checks = [[sys.executable, "-c", where]]
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        "--timeout=600",
    ]
    skipped = [f"--deselect={test}" for test in KINDS[kind].deselected]
    checks.append([*pytest, *skipped, "tests/aio"])
    kernels = [*KERNELS, POOL] if kind == "asan" else [POOL, "tests/optim/test_multi_tensor.py"]
    checks.append([*pytest, *skipped, *kernels])
    wrong = 0
    for command in checks:
        wrong += run(kind, folder, command) != 0
    with tempfile.TemporaryDirectory() as disk, _in_memory() as memory:
        for engine in ("uring", "threads", "portable"):
            few = operations // 10 if engine == "portable" else operations  # it has no C++ in it
            command = [sys.executable, str(STRESS), "--engine", engine, "--seed", str(seed)]
            command += ["--operations", str(few), disk, memory]
            wrong += run(kind, folder, command, leaks=True) != 0
    found = reports(folder)
    for report in found:
        print(report, file=sys.stderr)
    print(f"{kind}: {wrong} failures, {len(found)} reports in {folder}", flush=True)
    return wrong + len(found)


def _in_memory() -> tempfile.TemporaryDirectory[str]:
    """A folder on a second file system where there is one."""
    shm = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None)


def _library(name: str) -> Path:
    """Where gcc has a library; only its name when it has none."""
    asked = ["gcc", f"-print-file-name={name}"]
    path = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    return path.resolve() if path.is_absolute() else path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="both when none is named")
    parser.add_argument("--operations", type=int, default=10_000, help="requests of each stress")
    parser.add_argument("--seed", type=int, default=20)
    arguments = parser.parse_args()
    kinds = arguments.kinds or list(KINDS)
    for kind in kinds:
        if reason := missing_reason(kind):
            print(f"{kind}: {reason}", file=sys.stderr)
            return 2
    return 1 if sum(check(kind, arguments.operations, arguments.seed) for kind in kinds) else 0


if __name__ == "__main__":
    sys.exit(main())
