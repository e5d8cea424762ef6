"""The import rules of the package, read from the source: which module may import which, and when.

Nothing is imported here, so the rules are checked even where a module does not run.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "offload"
CSRC = ROOT / "csrc"

# The one place that orders the layers, from the top. A module imports only from lines above its own,
# so that each can be read, tested and replaced knowing only what stands above it. A module that is
# not in the list has no place yet: give it one here and in docs/design.md.
LAYERS = (
    "errors",
    "sizes",
    "redaction",
    "specs",
    "machine",
    "trace",
    "aio",
    "buffers",
    "store",
    "device",
    "runtime.rng",
    "runtime.resume_point",
    "runtime.placeholders",
    "sources",
    "codec",
    "units",
    "tiers.records",
    "export.contents",
    "tiers.residency",  # pure: which records live in host memory
    "tiers.residents",  # and their bytes; transfer and optim look here before the disk
    "tiers.masters",
    "tiers.schedule",  # pure order and window; plan reckons with both
    "tiers.fetches",
    "tiers.host_cache",
    "tiers.gradient_homes",  # pure: which parked gradients stay in host memory
    "tiers.memory_plan",
    "tiers.memory_request",
    "tiers.memory_refusal",
    "tiers.memory_planning",
    "probe",
    "tiers.disk_gradients",
    "tiers.gradients",
    "tiers.transfer",
    "tiers.spill",
    "tiers.activations",
    "runtime.rows",
    "runtime.calls",
    "runtime.binding",
    "runtime.uses",  # the gradient of each use of a tensor
    "runtime.stream",
    "runtime.deferred_logits",
    "runtime.chunked_loss",
    "optim",
    "runtime.options",
    "runtime.memory",
    "report",
    "planner",  # pure: what a run would cost; calls plan_memory as compose does
    "runtime.measured",
    "preflight",  # the machine as it is now, before a run
    "runtime.io_setting",
    "runtime.stripes",
    "runtime.blueprint",
    "export.shards",
    "export.folder",
    "export.checkpoint",  # runtime exports through it
    "export.run",
    "runtime.identity",
    "runtime.storage",
    "runtime.parts",
    "runtime.building",
    "runtime.step",
    "runtime.rollback",  # snapshots of a run, and the way back to one
    "runtime.slow_drives",
    "runtime.stats",
    "runtime.runtime",
    "runtime.compose",
    "hf",
    "kv_cache",
    "experts",
    "training.config",
    "training.data",
    "training.pointer",
    "training.output",
    "training.signals",
    "training.progress",
    "training.spikes",
    "training.guard",
    "training.job",
    "training.planning",
    "training.outcome",
    "training.start",
    "training.evaluation",
    "training.loop",
    "training.finetune",
    "generate",
    "doctor",
    "cli",
)

# Packages whose modules have lines of their own; their `__init__.py` imports nothing.
SPLIT = {entry.split(".")[0] for entry in LAYERS if "." in entry}

# `offload/__init__.py` gathers the public names, so it stands below everything.
ROOT_MODULE = "offload"

# The extensions import nothing; each is known to few layers.
EXTENSIONS = {"_aio": {"aio", "store"}, "_adam": {"optim", "doctor"}}

# These work in a process without torch (I/O benchmarks, checking a store).
WITHOUT_TORCH = {"errors", "sizes", "specs", "machine", "trace", "buffers", "aio", "store"}

# A sub-command imports what it needs when it runs, so that `offload --help` is quick; the root
# resolves its public names on first use for the same reason.
MAY_IMPORT_LATE = {"cli", ROOT_MODULE}

# What stands at the top level of a module and runs at import: definitions, and no more.
DEFINITIONS = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
)

# Calls that do work (I/O, devices, threads, randomness) and so never stand at the top level.
WORKING_CALLS = re.compile(
    r"(open|os\.|io\.|torch\.|subprocess\.|threading\.|time\.|random\.|psutil\.|_aio\.|_adam\.)"
)

SOURCES = sorted(PACKAGE.rglob("*.py"))
C_SOURCES = sorted([*CSRC.rglob("*.cc"), *CSRC.rglob("*.h")])


def module_name(path: Path) -> str:
    """`offload.store.format` for `offload/store/format.py`, `offload.store` for its `__init__.py`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """The entry of LAYERS that a module belongs to: `store` for `offload.store.format`, `tiers.records`."""
    parts = module.split(".")
    if len(parts) == 1:
        return ROOT_MODULE
    return ".".join(parts[1:3]) if parts[1] in SPLIT else parts[1]


def imported_modules(path: Path, node: ast.Import | ast.ImportFrom) -> list[str]:
    """The full names of what one import statement names; relative ones are resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        here = module_name(path).split(".")
        package = here if path.name == "__init__.py" else here[:-1]
        package = package[: len(package) - (node.level - 1)]
        base = ".".join([*package, node.module] if node.module else package)
    if base == ROOT_MODULE or layer_of(base) in SPLIT:  # `from . import sizes` names modules
        return [f"{base}.{alias.name}" for alias in node.names]
    return [base]


def imports(path: Path) -> list[tuple[int, str, bool]]:
    """(line, module, whether inside a function) for each import of a file."""
    tree = ast.parse(path.read_text())
    late = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(outer)
    }
    return [
        (node.lineno, module, id(node) in late)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in imported_modules(path, node)
    ]


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def is_guarded_import(node: ast.stmt) -> bool:
    """`try: import x` with an `except ImportError` that only takes note."""
    return (
        isinstance(node, ast.Try)
        and all(isinstance(inner, ast.Import | ast.ImportFrom) for inner in node.body)
        and all(handler.type and ast.unparse(handler.type) == "ImportError" for handler in node.handlers)
        and all(isinstance(inner, DEFINITIONS) for handler in node.handlers for inner in handler.body)
        and not node.orelse
        and not node.finalbody
    )


def each_source(test):
    """Run `test` once for each Python file of the package."""
    return pytest.mark.parametrize("path", SOURCES, ids=module_name)(test)


def each_c_source(test):
    """Run `test` once for each C++ file."""
    return pytest.mark.parametrize("path", C_SOURCES, ids=lambda path: str(path.relative_to(CSRC)))(test)


@each_source
def test_every_module_has_a_place_in_the_layers(path):
    layer = layer_of(module_name(path))
    if path.name == "__init__.py" and layer in SPLIT:
        assert not imports(path), f"{path.relative_to(ROOT)} imports; its modules have lines of their own"
        return
    assert layer in {*LAYERS, ROOT_MODULE}, (
        f"offload/{layer} is not in LAYERS of {Path(__file__).name}: decide which modules it may import, "
        "and add it there and to docs/design.md"
    )


@each_source
def test_modules_import_only_layers_above_their_own(path):
    layer = layer_of(module_name(path))
    if layer not in LAYERS:
        return
    above = set(LAYERS[: LAYERS.index(layer) + 1])
    wrong = []
    for line, module, _ in imports(path):
        if module.split(".")[0] != ROOT_MODULE:
            continue
        target = layer_of(module)
        if target in EXTENSIONS:
            allowed = layer in EXTENSIONS[target]
        else:
            allowed = target in above
        if not allowed:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}, which is not above {layer!r}")
    assert not wrong, "\n".join(wrong)


@each_source
def test_no_function_imports_from_the_own_package(path):
    if layer_of(module_name(path)) in MAY_IMPORT_LATE:
        return
    late = [
        f"line {line}: {module}"
        for line, module, inside in imports(path)
        if inside and module.startswith("offload")
    ]
    assert not late, f"{path.relative_to(ROOT)} imports inside functions: {late}; import at the top"


@each_source
def test_imports_do_no_work(path):
    work = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring
        if is_type_checking(node) or is_guarded_import(node):
            continue
        if not isinstance(node, DEFINITIONS):
            work.append(f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}")
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            work += [
                f"line {call.lineno}: {ast.unparse(call)}"
                for call in ast.walk(node.value)
                if isinstance(call, ast.Call) and WORKING_CALLS.match(ast.unparse(call.func))
            ]
    assert not work, f"{path.relative_to(ROOT)} does work when it is imported: {work}"


@each_source
def test_no_function_rebinds_a_module_global(path):
    lines = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Global)]
    assert not lines, f"{path.relative_to(ROOT)} has `global` on lines {lines}; give the state an owner"


@each_source
def test_storage_layers_do_not_import_torch(path):
    if layer_of(module_name(path)) not in WITHOUT_TORCH:
        return
    tree = ast.parse(path.read_text())
    for_types = {
        line
        for node in tree.body
        if is_type_checking(node)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = [
        line for line, module, _ in imports(path) if module.split(".")[0] == "torch" and line not in for_types
    ]
    assert not lines, f"{path.relative_to(ROOT)} imports torch on lines {lines}"


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)


@each_c_source
def test_c_sources_know_neither_torch_nor_cuda(path):
    wrong = [name for name in includes(path) if re.match(r"(torch|ATen|c10|cuda|cublas|nv)", name)]
    assert not wrong, f"{path.relative_to(ROOT)} includes {wrong}"


@each_c_source
def test_the_extensions_do_not_know_each_other(path):
    own = path.relative_to(CSRC).parts[0]
    others = {folder.name for folder in CSRC.iterdir() if folder.is_dir()} - {own}
    wrong = [name for name in includes(path) if others & set(Path(name).parts)]
    assert not wrong, f"{path.relative_to(ROOT)} includes {wrong}"


@each_c_source
def test_only_bindings_see_python(path):
    """Python is for bind.cc and its parts bind_*, and for headers that these alone include."""
    if not [n for n in includes(path) if n.startswith(("pybind11", "Python.h"))]:
        return
    if path.suffix == ".cc" and is_binding(path.name):
        return
    name = str(path.relative_to(CSRC))
    users = {user.name for user in C_SOURCES if name in includes(user)}
    assert path.suffix == ".h", f"{name} includes Python's headers"
    assert all(is_binding(user) for user in users), (
        f"{name} includes Python's headers and is included by {sorted(users)}"
    )


def is_binding(name: str) -> bool:
    """Whether a source or header is (a part of) the module as Python sees it."""
    return name == "bind.cc" or name.startswith("bind_")
