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


def public_definitions(path: Path) -> dict[str, ast.stmt]:
    """The functions and classes at a module's top level whose names have no underscore in front.

    Constants are left out: those that no other module needs stand in the open, under the comment
    that explains them, and are nobody's interface.
    """
    return {
        node.name: node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    }


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name):
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text()))
    assert docstring, f"{name} has no docstring"
    assert not docstring.startswith("Placeholder"), f"{name} still has a placeholder docstring"


@pytest.mark.parametrize("name", MODULES)
def test_every_public_class_and_function_says_what_it_does(name):
    definitions = public_definitions(MODULES[name])
    silent = [public for public, node in definitions.items() if not ast.get_docstring(node)]
    assert not silent, f"{name}: no docstring on {silent}"


@pytest.mark.parametrize("name", PUBLIC)
def test_all_equals_what_is_visible(name):
    module = importlib.import_module(name)
    shown = getattr(module, "__all__", None)
    assert shown is not None, f"{name} has no __all__"
    assert len(set(shown)) == len(shown), f"{name}.__all__ names something twice"
    missing = [public for public in shown if not hasattr(module, public)]
    assert not missing, f"{name}.__all__ names {missing}, which it does not have"
    left_out = sorted(set(public_definitions(MODULES[name])) - set(shown))
    assert not left_out, f"{name}: {left_out} look public: add them to __all__, or an underscore"


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
