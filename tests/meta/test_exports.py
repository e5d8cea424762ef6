"""What each module shows: a docstring that says what it is, and `__all__` equal to its public names."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "offload").rglob("*.py"))
}
PUBLIC = [name for name in MODULES if not any(part.startswith("_") for part in name.split("."))]


def defined_names(path: Path) -> set[str]:
    """The names that a module defines at its top level, imported ones aside."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            names.add(ast.unparse(node.target))
        elif isinstance(node, ast.Assign):
            names |= {
                name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }
    return names


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name):
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text()))
    assert docstring, f"{name} has no docstring"
    assert not docstring.startswith("Placeholder"), f"{name} still has a placeholder docstring"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_class_and_function_says_what_it_does(name):
    public = set(importlib.import_module(name).__all__)
    silent = [
        node.name
        for node in ast.parse(MODULES[name].read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.name in public
        and not ast.get_docstring(node)
    ]
    assert not silent, f"{name}: no docstring on {silent}"


@pytest.mark.parametrize("name", PUBLIC)
def test_all_equals_what_is_visible(name):
    module = importlib.import_module(name)
    shown = getattr(module, "__all__", None)
    assert shown is not None, f"{name} has no __all__"
    assert len(set(shown)) == len(shown), f"{name}.__all__ names something twice"
    missing = [public for public in shown if not hasattr(module, public)]
    assert not missing, f"{name}.__all__ names {missing}, which it does not have"
    if MODULES[name].name == "__init__.py":
        return  # a package shows names of its modules
    visible = {public for public in defined_names(MODULES[name]) if not public.startswith("_")}
    assert visible == set(shown), (
        f"{name}: {sorted(visible - set(shown))} are public but not in __all__ (underscore or add them); "
        f"{sorted(set(shown) - visible)} are in __all__ but defined elsewhere"
    )


def test_importing_the_storage_layers_leaves_torch_alone(run_python):
    out = run_python("import sys, offload.store, offload.aio; print('torch' in sys.modules)")
    assert out == "False"


def test_no_module_hides_a_public_name(run_python):
    """Importing `offload.x` sets the attribute `x` of the package, over a function of that name."""
    hidden = run_python(
        "import importlib, pkgutil, types, offload\n"
        "for module in pkgutil.walk_packages(offload.__path__, 'offload.'):\n"
        "    importlib.import_module(module.name)\n"
        "print([name for name in offload.__all__ if isinstance(getattr(offload, name), types.ModuleType)])"
    )
    assert hidden == "[]"
