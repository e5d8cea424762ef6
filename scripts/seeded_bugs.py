"""Break the package on purpose, one way at a time, and see that a test notices each.

    python scripts/seeded_bugs.py                    # every bug, minutes
    python scripts/seeded_bugs.py no-data-sync       # some of them
    python scripts/seeded_bugs.py --list

A bug is a line that somebody might leave out or get wrong where the promises of docs/durability.md are
kept. Each is planted in a copy of the package in a temporary folder; the checkout is never changed. The
tests that should notice it run there, first without any bug. A bug that no test notices is a hole in the
tests; one whose place is not found any more has to be planted anew: see `BUGS`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BUGS", "Bug", "Outcome", "plant", "run_tests", "select"]

ROOT = Path(__file__).resolve().parents[1]

# What a copy needs beside the package, to run tests in.
_BESIDE = ("tests", "pyproject.toml", "README.md", "docs")

_TIMEOUT_S = 600


@dataclass(frozen=True)
class Bug:
    """One way to get it wrong.

    Args:
        name: short, for the command line.
        path: the file, from the package's folder.
        text: what stands there, once.
        planted: what stands there with the bug.
        tests: what should notice: pytest's arguments.
    """

    name: str
    path: str
    text: str
    planted: str
    tests: tuple[str, ...]


_CRASH = (
    "tests/faults/test_crash_enumeration.py"
    "::test_a_sample_of_crashes_leaves_a_commit_and_the_run_ends_the_same[disk]"
)
_FAULT = (
    "tests/faults/test_fault_loop.py::test_a_sample_of_faults_gives_the_same_run_or_a_clean_error[disk-0]"
)
_STORE_CRASH = "tests/store/test_store_crash.py"
_STORE_SIM = "tests/store/test_store_sim.py"
_IN_PLACE = "tests/store/test_store_in_place.py"

BUGS = (
    Bug(
        "no-data-sync",
        "store/committing.py",
        "            engine.sync(drive.file)\n",
        "            pass\n",
        (_CRASH,),
    ),
    Bug(
        "no-manifest-fsync",
        "store/rundir.py",
        "            files.write_file(fd, data, path)\n            files.sync(fd, path)\n",
        "            files.write_file(fd, data, path)\n",
        (_STORE_CRASH,),
    ),
    Bug(
        "no-directory-fsync",
        "store/rundir.py",
        '        files.rename(self.fd, name + ".tmp", name, self.path_of(name))\n        self.sync()\n',
        '        files.rename(self.fd, name + ".tmp", name, self.path_of(name))\n',
        (_STORE_CRASH,),
    ),
    Bug(
        "rename-before-data-sync",
        "store/committing.py",
        "        for drive in drives:\n            engine.sync(drive.file)\n        try:\n",
        "        manifests.stage(folders, manifest.generation, data)\n"
        "        manifests.publish(folders, manifest.generation)\n"
        "        for drive in drives:\n            engine.sync(drive.file)\n        try:\n",
        (_STORE_CRASH,),
    ),
    Bug(
        "overwrite-the-committed",
        "store/table.py",
        "                extent = (self.committed.extent + 1) % len(self.offsets)\n",
        "                extent = self.committed.extent\n",
        (_STORE_SIM,),
    ),
    Bug(
        "no-healing",
        "store/drives.py",
        "        manifests.heal(folders, recovered)\n",
        "",
        ("tests/store/test_store_recovery.py", _STORE_CRASH),
    ),
    Bug(
        "prune-the-last-but-one",
        "store/manifests.py",
        "                if old < generation - 1:\n",
        "                if old < generation:\n",
        ("tests/store/test_store_recovery.py",),
    ),
    Bug(
        "ignore-a-failed-write",
        "store/ticket.py",
        "        except StorageError as error:\n            self._fail(self._located(error, part))\n",
        "        except StorageError:\n            pass\n",
        ("tests/store/test_store_transfers.py", _STORE_SIM),
    ),
    Bug(
        "forgive-a-failed-sync",
        "store/store.py",
        "        self._poison = Poison(error, permanent=True, in_place=self.in_use)\n",
        "        self._poison = Poison(error)\n",
        (_STORE_CRASH,),
    ),
    Bug(
        "no-mark-before-a-write-in-place",
        "store/store.py",
        "        return self.in_place and not self.in_use and self.generation > 0\n",
        "        return False\n",
        (_IN_PLACE,),
    ),
    Bug(
        "open-what-was-left-in-use",
        "store/drives.py",
        "        if recovered.manifest.in_use:\n",
        "        if False:\n",
        (_IN_PLACE,),
    ),
    Bug(
        "checksums-off",
        "store/ticket.py",
        "        if got != check.expected:\n",
        "        if False:\n",
        (_STORE_SIM,),
    ),
    Bug(
        "checksum-without-generation",
        "store/table.py",
        "        return chunk_seed(self.run_id, self.index, chunk, generation)\n",
        "        return chunk_seed(self.run_id, self.index, chunk, 0)\n",
        ("tests/store",),
    ),
    Bug(
        "commit-without-waiting",
        "store/store.py",
        "            for ticket in writes:\n                ticket.settle()\n            with self._lock:\n"
        '                self._check_poison("be committed")\n',
        '            with self._lock:\n                self._check_poison("be committed")\n',
        ("tests/store/test_store_commit.py", "tests/store/test_store_transfers.py"),
    ),
    Bug(
        "ignore-a-short-transfer",
        "aio/segments.py",
        "        if 0 < result < segment.nbytes:\n",
        "        if False:\n",
        ("tests/aio/test_sim_faults.py", "tests/aio/test_sim_disk.py"),
    ),
    Bug(
        "free-on-cancel",
        "aio/segments.py",
        "        transfer.fail(transfer.cut_nbytes, errno.ECANCELED)\n",
        "        transfer.fail(transfer.cut_nbytes, errno.ECANCELED)\n        transfer.num_live = 0\n",
        # The one engine that cannot hang by it.
        ("tests/aio/test_engine_cancel.py::test_a_cancelled_read_leaves_the_rest_of_its_buffer_alone[sim]",),
    ),
    Bug(
        "two-runs-at-once",
        "store/lock.py",
        "            fcntl.flock(fd, kind | fcntl.LOCK_NB)\n            return\n",
        "            return\n",
        ("tests/store/test_store_recovery.py",),
    ),
    Bug(
        "no-reservation",
        "store/room.py",
        "        file.allocate(nbytes)\n",
        "        pass\n",
        ("tests/store/test_store_create.py",),
    ),
    Bug(
        "keep-slots-of-a-failed-update",
        "optim/updater.py",
        "            if isinstance(item, Update):\n                self._give_up(item)\n",
        "",
        ("tests/faults/test_failed_update.py",),
    ),
    Bug(
        "forget-the-random-state",
        "runtime/compose.py",
        "    restore_rng(point.rng)\n",
        "",
        (_CRASH,),
    ),
    Bug(
        "keep-a-step-in-the-cache",
        "runtime/step.py",
        "load_residents([parts.records[owner] for owner in parts.residents.uncommitted])",
        "load_residents([])",
        ("tests/runtime/test_host_cache.py",),
    ),
    Bug(
        "commit-without-the-cache",
        "tiers/residents.py",
        "            self._dirty.add(owner)\n",
        "",
        ("tests/runtime/test_host_cache.py",),
    ),
    Bug(
        "swallow-an-update-error",
        "optim/updater.py",
        "        self._on_error(error)\n        self._settle()\n",
        "        self._error = None\n        self._settle()\n",
        ("tests/faults/test_failed_update.py", _FAULT),
    ),
    Bug(
        "fetch-under-update",
        "tiers/transfer.py",
        "                    if owner not in self._updating and owner not in self._copies:\n",
        "                    if owner not in self._copies:\n",
        ("tests/faults/test_under_update.py",),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What the tests said.

    Attributes:
        passed: whether every test passed.
        first: the first test that did not, or what pytest said instead.
        seconds: how long it took.
    """

    passed: bool
    first: str
    seconds: float


def select(names: Sequence[str]) -> tuple[Bug, ...]:
    """Return the bugs of these names, or all.

    Raises:
        ValueError: there is none of a name.
    """
    known = {bug.name: bug for bug in BUGS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no bug is called {unknown[0]!r}; there are {', '.join(known)}")
    return tuple(known[name] for name in names) or BUGS


def plant(bug: Bug | None, folder: Path) -> None:
    """Copy the package and its tests to `folder`, which is empty, with one bug in it or none.

    Raises:
        ValueError: the text that the bug replaces is not there once.
    """
    # The extensions are linked, everything else is copied, so that nothing here can reach the checkout.
    package = folder / "offload"
    shutil.copytree(ROOT / "offload", package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for extension in (ROOT / "offload").glob("*.so"):
        (package / extension.name).symlink_to(extension)
    for name in _BESIDE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    if bug is None:
        return
    path = package / bug.path
    text = path.read_text()
    if text.count(bug.text) != 1:
        raise ValueError(
            f"{bug.name}: its text is {text.count(bug.text)} times in offload/{bug.path}, not once; plant it "
            "where the code does this now (BUGS in scripts/seeded_bugs.py)"
        )
    path.write_text(text.replace(bug.text, bug.planted))


def run_tests(folder: Path, tests: Sequence[str]) -> Outcome:
    """Run tests in a folder that `plant` made, up to the first that fails.

    Raises:
        RuntimeError: the tests would not see the package in `folder`, or there are none.
    """
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    where = [sys.executable, "-c", "import offload; print(offload.__file__)"]
    found = subprocess.run(
        where, cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
    ).stdout.strip()
    if not Path(found).is_relative_to(folder):
        raise RuntimeError(f"the tests would import {found}, not the package in {folder}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", f"--basetemp={folder / 'tmp'}", *tests]
    began_s = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
    )
    seconds = time.perf_counter() - began_s
    # 0: all passed, 1: some failed; anything else says that nothing was shown.
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    first = failed[0].split(" - ")[0].split(maxsplit=1)[1] if failed else ""
    return Outcome(done.returncode == 0, first, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Plant each bug and print what noticed it; return how many nothing noticed."""
    parser = argparse.ArgumentParser(description="Plant bugs and see that tests notice them.")
    parser.add_argument("names", nargs="*", help="which bugs; all when none is named")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    options = parser.parse_args(arguments)
    try:
        bugs = select(options.names)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print(*(f"{bug.name:32} offload/{bug.path}" for bug in bugs), sep="\n")
        return 0
    num_missed = 0
    with tempfile.TemporaryDirectory(prefix="offload-bugs-") as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        plant(None, whole)
        tests = sorted({test for bug in bugs for test in bug.tests})
        outcome = run_tests(whole, tests)
        if not outcome.passed:
            print(f"without a bug {outcome.first} fails: mend that first")
            return 1
        print(f"{'(no bug)':32} passes    {outcome.seconds:4.0f} s", flush=True)
        for bug in bugs:
            folder = Path(temporary) / bug.name
            folder.mkdir()
            plant(bug, folder)
            outcome = run_tests(folder, bug.tests)
            num_missed += outcome.passed
            verdict = "MISSED" if outcome.passed else "noticed"
            print(f"{bug.name:32} {verdict:9} {outcome.seconds:4.0f} s  {outcome.first}", flush=True)
            shutil.rmtree(folder)
    print(f"{len(bugs) - num_missed} of {len(bugs)} noticed")
    return num_missed


if __name__ == "__main__":
    sys.exit(main())
