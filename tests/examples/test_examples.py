"""The examples that need no model run as a user would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=110
    )


def test_async_io_writes_reads_and_shows_errors(tmp_path: Path) -> None:
    result = run("async_io.py", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "256 MiB written and synced" in result.stdout
    assert "256 MiB read and checked" in result.stdout
    assert "short read: 1,000 of 4,096 bytes" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_async_io_names_a_bad_path(tmp_path: Path) -> None:
    result = run("async_io.py", str(tmp_path / "absent"))
    assert result.returncode == 1
    assert result.stderr.strip().endswith("is no directory; name one on the drive of interest")


def test_async_io_needs_no_torch(tmp_path: Path) -> None:
    script = f"import runpy, sys; sys.modules['torch'] = None; sys.argv = ['x', {str(tmp_path)!r}]; "
    script += f"runpy.run_path({str(EXAMPLES / 'async_io.py')!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr


def test_plain_loop_trains() -> None:
    result = run("plain_loop.py")
    assert result.returncode == 0, result.stderr
