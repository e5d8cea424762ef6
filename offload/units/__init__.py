"""Units: which modules of a model move together, and how their parameters lie in records."""

from .layout import Binding, Unit, find_units

__all__ = ["Binding", "Unit", "find_units"]
