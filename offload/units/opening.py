"""Whether a module may be cut into its children, and in which order its forward calls them.

A module whose parameters move with its children computes outside every unit, so its forward may only call
the children: a weight that it reads itself would be a placeholder. That is read from the source of the
forward, and of the methods that it uses. Whatever cannot be followed (a child handed to a function, `self`
handed to one, a closure, no source) keeps the module whole, so that a mistake costs memory and not a value.
What it cannot see is a weight that is reached through an object in an object; torch refuses most of what is
then computed with a placeholder, though not all: a product of matrices on the CPU it does not.

Pure: reads classes and module trees, runs nothing, keeps nothing.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Opening", "inspect_forward"]

# What a forward may read of a child without running it: settings, never tensors or modules.
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True)
class Opening:
    """What was found about a module.

    Attributes:
        calls: names of the children with parameters, in the order in which forward first calls them.
        obstacle: what keeps the module whole, in words; empty where it may be cut into `calls`.
    """

    calls: tuple[str, ...] = ()
    obstacle: str = ""


class _Obstacle(Exception):
    """What keeps a module whole."""


def inspect_forward(module: nn.Module) -> Opening:
    """Return whether `module` may be cut into its children.

    >>> inspect_forward(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))).calls
    ('0', '2')
    >>> inspect_forward(nn.TransformerEncoderLayer(4, 2)).obstacle
    "its forward uses 'self.self_attn.in_proj_bias'"
    """
    children = {
        name: child for name, child in module.named_children() if next(child.parameters(), None) is not None
    }
    forward = type(module).forward
    if forward is nn.Sequential.forward and "forward" not in vars(module):
        return Opening(tuple(children))
    try:
        reader = _Reader(module, frozenset(children))
        if not children:
            raise _Obstacle("it has no child with parameters")
        if "forward" in vars(module):
            raise _Obstacle("its forward was replaced")
        reader.read(forward)
        missing = [name for name in children if name not in reader.calls]
        if missing:
            raise _Obstacle(f"its forward does not call {missing[0]!r}")
    except _Obstacle as obstacle:
        return Opening(obstacle=str(obstacle))
    return Opening(tuple(reader.calls))


class _Reader(ast.NodeVisitor):
    """Walks the methods that a forward uses, in the order of evaluation: arguments before their call."""

    def __init__(self, module: nn.Module, children: frozenset[str]) -> None:
        self._module = module
        self._children = children
        self._read: set[Callable[..., Any]] = set()
        self._self = ""
        self.calls: dict[str, None] = {}

    def read(self, function: Callable[..., Any]) -> None:
        """Walk one method."""
        function = inspect.unwrap(function)
        if function in self._read:
            return
        self._read.add(function)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        # A class typed into a prompt has no source, a method made by a macro one that does not parse.
        except (OSError, TypeError, SyntaxError) as error:
            raise _Obstacle(f"the source of {function.__qualname__} cannot be read") from error
        definition = tree.body[0]
        if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
            raise _Obstacle(f"{function.__qualname__} is not an ordinary method")
        outer, self._self = self._self, definition.args.args[0].arg
        for statement in definition.body:
            self.visit(statement)
        self._self = outer

    def visit_Call(self, node: ast.Call) -> None:
        """A call of a child: what it is given is computed before it."""
        name = self._attribute(node.func)
        asks = isinstance(node.func, ast.Name) and node.func.id == "hasattr"
        for argument in node.args:
            if not (asks and self._is_self(argument)):
                self.visit(argument)
        for keyword in node.keywords:
            self.visit(keyword)
        if name in self._children:
            self.calls[name] = None
        else:
            self.visit(node.func)

    def visit_Compare(self, node: ast.Compare) -> None:
        """`self.child is None` asks whether there is one."""
        if all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in node.ops) and all(
            isinstance(side, ast.Constant) and side.value is None for side in node.comparators
        ):
            if self._attribute(node.left) is None:
                self.visit(node.left)
            return
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """`self.name`, or an attribute of it."""
        name = self._attribute(node)
        if name is not None:
            self._use(name)
            return
        child = self._attribute(node.value)
        if child in self._children:
            value = getattr(self._module.get_submodule(child), node.attr, self)
            if not isinstance(value, _PLAIN):
                raise _Obstacle(f"its forward uses '{self._self}.{child}.{node.attr}'")
            return
        self.visit(node.value)

    def visit_Name(self, node: ast.Name) -> None:
        """`self` by itself, and `super()`, lead where nothing can be followed."""
        if self._is_self(node) or node.id == "super":
            raise _Obstacle(f"its forward hands '{node.id}' on")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """A message may show the module."""

    def _use(self, name: str) -> None:
        if name in self._children:
            raise _Obstacle(f"its forward uses '{self._self}.{name}' without calling it")
        found = inspect.getattr_static(type(self._module), name, None)
        if isinstance(found, property):
            found = found.fget
        elif isinstance(found, functools.cached_property):
            found = found.func
        if not inspect.isfunction(found):
            self._check_value(name)
            return
        if found.__module__ == nn.Module.__module__:
            raise _Obstacle(f"its forward uses '{self._self}.{name}'")
        self.read(found)

    def _check_value(self, name: str) -> None:
        value = vars(self._module).get(name)
        bound = inspect.ismethod(value) or isinstance(value, functools.partial)
        if name == "__dict__" or bound or getattr(value, "__closure__", None) or _holds_tensors(value):
            raise _Obstacle(f"its forward uses '{self._self}.{name}'")

    def _attribute(self, node: ast.expr) -> str | None:
        """Return the name of an attribute of `self`, None for anything else."""
        if isinstance(node, ast.Attribute) and self._is_self(node.value):
            return node.attr
        return None

    def _is_self(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id == self._self


def _holds_tensors(value: Any) -> bool:
    """Return whether `value`, no module of the tree, has modules or tensors in it, one level deep."""
    if isinstance(value, Mapping):
        held = [*value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        held = [*value]
    else:
        held = [*getattr(value, "__dict__", {}).values()]
    return any(isinstance(one, (nn.Module, torch.Tensor)) for one in held)
