"""`_aio.pyi` says what `_aio` has: the same names, the same arguments and defaults."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import pytest

import offload

_STUB = ast.parse((Path(offload.__file__).parent / "_aio.pyi").read_text())
_aio: ModuleType = pytest.importorskip("offload._aio")

# Every pybind11 class has these; object's are not written in stubs.
_OWN = {"__init__", "__enter__", "__exit__"}


def public_names(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_") or name in _OWN}


def stub_classes() -> list[ast.ClassDef]:
    return [node for node in _STUB.body if isinstance(node, ast.ClassDef)]


def test_the_module_has_the_names_of_the_stub() -> None:
    stub = {node.name for node in _STUB.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    module = {name for name in vars(_aio) if not name.startswith("__") and name != "_pybind11_conduit_v1_"}
    assert module == stub


@pytest.mark.parametrize("node", stub_classes(), ids=lambda node: node.name)
def test_a_class_has_the_members_of_the_stub(node: ast.ClassDef) -> None:
    stub = {member.name for member in node.body if isinstance(member, ast.FunctionDef)}
    members = public_names(getattr(_aio, node.name)) - ({"__init__"} - stub)
    assert members == stub


@pytest.mark.parametrize("node", stub_classes(), ids=lambda node: node.name)
def test_arguments_have_the_names_and_defaults_of_the_stub(node: ast.ClassDef) -> None:
    for member in node.body:
        if not isinstance(member, ast.FunctionDef) or member.name in ("__enter__", "__exit__"):
            continue
        if member.decorator_list:
            continue
        signature = getattr(getattr(_aio, node.name), member.name).__doc__
        position = 0
        for argument in [*member.args.args[1:], *member.args.kwonlyargs]:
            position = signature.find(f"{argument.arg}:", position)
            assert position >= 0, f"{argument.arg} of {node.name}.{member.name} not in {signature}"
        for default in [*member.args.defaults, *member.args.kw_defaults]:
            if default is not None:
                assert f"= {ast.unparse(default)}" in signature
