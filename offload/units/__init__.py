"""Units: which modules of a model move together, and how their parameters lie in records."""

from .cut import why_whole
from .layout import Binding, Unit, find_cuts, find_units
from .loss_head import LossHead, find_loss_head, logits_nbytes

__all__ = [
    "Binding",
    "LossHead",
    "Unit",
    "find_cuts",
    "find_loss_head",
    "find_units",
    "logits_nbytes",
    "why_whole",
]
