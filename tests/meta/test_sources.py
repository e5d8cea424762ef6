"""Rules that hold for every source file: ASCII, length, and what `offload` never calls."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The longest a file may be. The best sit at 150 to 300 lines; past 500 there is a second noun in it.
MAX_LINES = 500
# Headers are contracts, and are read more often than anything else.
MAX_HEADER_LINES = 150

FOLDERS = ("offload", "csrc", "tests", "examples", "benchmarks", "scripts")
SUFFIXES = {".py", ".pyi", ".cc", ".h"}
SOURCES = sorted(
    [
        *(path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.suffix in SUFFIXES),
        ROOT / "setup.py",
    ]
)
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
)
PACKAGE = [path for path in SOURCES if path.is_relative_to(ROOT / "offload") and path.suffix == ".py"]

# Names whose call would run what a file says: our own formats are safetensors and JSON, and a model
# or a configuration from elsewhere is data. `model.eval()` is a method and is not meant.
FORBIDDEN_CALLS = {"eval", "exec", "compile", "torch.load", "torch.save", "yaml.load", "os.system"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*SOURCES, *DOCUMENTS], ids=name_of)
def test_files_are_ascii(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        assert line.isascii(), f"{name_of(path)}:{number}: {line!r}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_hold_one_noun(path):
    limit = MAX_HEADER_LINES if path.suffix == ".h" else MAX_LINES
    lines = len(path.read_text().splitlines())
    assert lines <= limit, (
        f"{name_of(path)} has {lines} lines, {limit} are allowed: find the noun that wants a file"
    )


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_nothing_that_is_read_can_run(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
            found.append(f"line {node.lineno}: {ast.unparse(node.func)}(...)")
        elif isinstance(node, ast.Import):
            found += [
                f"line {node.lineno}: {a.name}"
                for a in node.names
                if a.name.split(".")[0] in FORBIDDEN_MODULES
            ]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            imported = {f"{node.module}.{alias.name}" for alias in node.names}
            if node.module.split(".")[0] in FORBIDDEN_MODULES or imported & FORBIDDEN_CALLS:
                found.append(f"line {node.lineno}: from {node.module}")
    assert not found, f"{name_of(path)}: {found}"


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_asserts_guard_nothing_from_outside(path):
    """`python -O` drops asserts, so one with a call in it (a wait, a read) would be lost with it."""
    allowed = {"isinstance", "len", "all", "any", "type", "hasattr"}
    called = [
        f"line {node.lineno}: {ast.unparse(node.test)}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
        for inner in ast.walk(node.test)
        if isinstance(inner, ast.Call) and ast.unparse(inner.func) not in allowed
    ]
    assert not called, f"{name_of(path)}: {called}"
