"""`scripts/sanitize.py` notices what it is for: each defect here is planted, and is reported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

PLANTED = """
#include <cstdlib>
#include <thread>
#include <vector>
extern "C" {
int clean(int n) { return n; }
int overflow(int n) { std::vector<int> four(4); return four.data()[n]; }
int undefined(int n) { return 1 << n; }
int leak(int n) { int* volatile lost = new int[n]; lost = nullptr; return lost == nullptr; }
int race(int n) {
  int sum = 0;
  std::thread other([&] { for (int i = 0; i < n; ++i) ++sum; });
  for (int i = 0; i < n; ++i) ++sum;
  other.join();
  return sum;
}
}
"""
CALL = "import ctypes, sys; getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])(int(sys.argv[3]))"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """`scripts/sanitize.py`, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("sanitize_script", ROOT / "scripts" / "sanitize.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("kind", "function", "argument", "report"),
    [
        ("asan", "clean", 1, None),
        ("asan", "overflow", 4, "heap-buffer-overflow"),
        ("asan", "undefined", 40, "shift exponent 40 is too large"),
        ("asan", "leak", 999, "leak of 3996 byte"),
        ("tsan", "clean", 1, None),
        ("tsan", "race", 1000, "data race"),
    ],
)
def test_a_planted_defect_is_reported(
    script: ModuleType,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    kind: str,
    function: str,
    argument: int,
    report: str | None,
) -> None:
    if reason := script.missing_reason(kind):
        pytest.skip(reason)
    source = tmp_path / "csrc" / "aio" / "planted.cc"  # a name that counts as ours
    source.parent.mkdir(parents=True)
    source.write_text(PLANTED)
    library = tmp_path / "planted.so"
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fno-omit-frame-pointer", "-pthread"]
    sanitizer = f"-fsanitize={script.KINDS[kind].flags}"
    subprocess.run(["g++", *flags, sanitizer, str(source), "-o", str(library)], check=True)
    command = [sys.executable, "-c", CALL, str(library), function, str(argument)]
    status = script.run(kind, tmp_path, command, leaks=True)
    found = script.reports(tmp_path)
    if report is None:
        assert (status, found) == (0, [])
    elif function == "undefined":
        assert status != 0  # gcc's libubsan writes to stderr whatever it is told, and ends the process
        assert report in capfd.readouterr().err
    else:
        assert len(found) == 1
        assert report in found[0]
