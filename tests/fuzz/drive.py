"""Run one harness under atheris, guided by coverage, or all of them one after the other.

    python tests/fuzz/drive.py manifest --seconds 60
    python tests/fuzz/drive.py all --seconds 60

Ends with 1 when an input makes a finding; libFuzzer writes it to `--work` and prints where. Put it into
`tests/fuzz/corpus/HARNESS/`, mend what it found, and the ordinary tests keep it.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

__all__ = ["main", "names_of_harnesses"]

# Seconds for one input, and memory of the process in MiB: torch and transformers alone take 700.
TIMEOUT_S = 20
RSS_MIB = 2500
MAX_NBYTES = 1 << 16


def main() -> int:
    """Read the command line and fuzz."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("harness", help="name of a harness, or all")
    parser.add_argument("--seconds", type=int, default=60, help="for each harness")
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "fuzz",
        help="where findings and the grown corpus go; kept between calls (default: build/fuzz)",
    )
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    work = given.work.absolute()
    if given.scratch is not None:
        return _fuzz(given.harness, given.seconds, work, given.scratch)
    return _all(names_of_harnesses() if given.harness == "all" else [given.harness], given.seconds, work)


def names_of_harnesses() -> list[str]:
    """Return the names of the harnesses without importing what they test."""
    found: list[str] = []
    for path in sorted(Path(__file__).parent.glob("*_parsers.py")):
        found += re.findall(r'\bname="([a-z_]+)"', path.read_text())
    return found


def _all(names: list[str], seconds: int, work: Path) -> int:
    failed = []
    for name in names:
        command = [sys.executable, __file__, name, "--seconds", str(seconds), "--work", str(work)]
        # libFuzzer leaves without cleaning up, so a process of its own has its folder from here.
        with tempfile.TemporaryDirectory(prefix="offload-fuzz-") as scratch:
            done = subprocess.run(
                [*command, "--scratch", scratch],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                env={**os.environ, "TMPDIR": scratch},
            )
        log = work / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout + done.stderr)
        runs = re.findall(r"^(?:Done (\d+) runs|#(\d+)\s)", done.stderr, re.M)
        count = int("".join(runs[-1])) if runs else 0
        print(f"{name:12}{count:>12,} executions   {'ok' if done.returncode == 0 else 'FINDING'}", flush=True)
        if done.returncode:
            failed.append(name)
            print("\n".join((done.stdout + done.stderr).splitlines()[-25:]), flush=True)
    return 1 if failed else 0


def _fuzz(name: str, seconds: int, work: Path, scratch: Path) -> int:
    import atheris

    # What is imported before is not instrumented, so it costs nothing and guides nothing.
    import torch
    import transformers  # noqa: F401

    with atheris.instrument_imports(include=["offload", "json", "yaml"]):
        from fuzz.harness import check
        from fuzz.harnesses import HARNESSES
        from fuzz.mutation import mutate

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    harness = HARNESSES[name]
    corpus, seeds, folder = work / f"{name}.corpus", scratch / "seeds", scratch / "folder"
    for path in (corpus, seeds, folder):
        path.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate([*harness.seeds(), *harness.corpus()]):
        (seeds / str(number)).write_bytes(data)

    def one_input(data: bytes) -> None:
        check(harness, data, folder)

    def custom_mutator(data: bytes, max_nbytes: int, seed: int) -> bytes:
        return mutate(harness.kind, data, max_nbytes, seed, blind=atheris.Mutate)

    options = [
        f"-max_total_time={seconds}",
        f"-max_len={MAX_NBYTES}",
        f"-timeout={TIMEOUT_S}",
        f"-rss_limit_mb={RSS_MIB}",
        f"-artifact_prefix={work}/{name}.",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus), str(seeds)], one_input, custom_mutator=custom_mutator)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
