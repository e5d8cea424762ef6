"""How tensors look in a record: the bytes of weights, frozen and optimizer records.

`layout.py` says where the arrays of each record lie, `masters.py` what the exact 4-byte form of an fp32
master is, and `parameters.py` writes and reads parameters through both. Frozen parameters are rounded as
`Tensor.to` rounds, since no residual makes up for it. Codes and scales of 8-bit moments are the
optimizer's: bytes of zero are moments of zero, and that is all that is known of them here.

Arrays are little-endian. Everything is a pure function of its arguments on CPU tensors, callable from any
thread. It does no I/O, knows no generation, and leaves checksums to the store.
"""

from .layout import OptimizerChunk, RecordFormat
from .masters import CANONICAL_NAN_BITS, join_master, split_master
from .parameters import (
    OptimizerViews,
    RecordBuffer,
    read_masters,
    view_elements,
    view_optimizer_chunk,
    write_frozen,
    write_residual,
    write_weights,
)

__all__ = [
    "CANONICAL_NAN_BITS",
    "OptimizerChunk",
    "OptimizerViews",
    "RecordBuffer",
    "RecordFormat",
    "join_master",
    "read_masters",
    "split_master",
    "view_elements",
    "view_optimizer_chunk",
    "write_frozen",
    "write_residual",
    "write_weights",
]
