"""Plan the safetensors files of an export: which tensor lies in which file, at which byte. Pure.

The place of every tensor follows from its shape and dtype alone, so an export can check the space it
needs before it writes and put each tensor where it belongs the moment it arrives, in any order.
It reads and writes no file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from ..sizes import align_up

__all__ = ["SINGLE_NAME", "Shard", "TensorSlot", "header_bytes", "plan_shards"]

SINGLE_NAME = "model.safetensors"

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where one tensor lies: `begin` and `nbytes` count from the start of its file's data."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its name and the slots of its tensors, in file order, without holes."""

    file_name: str
    slots: tuple[TensorSlot, ...]

    @property
    def data_nbytes(self) -> int:
        """Bytes of tensor data, header excluded."""
        return sum(slot.nbytes for slot in self.slots)


def plan_shards(
    shapes: Mapping[str, tuple[Sequence[int], torch.dtype]], max_shard_nbytes: int
) -> tuple[Shard, ...]:
    """Return the files an export will have; pure.

    Args:
        shapes: name -> (shape, dtype in the file), in the order the files shall follow.
        max_shard_nbytes: a file is closed before the tensor that would make it larger.

    Raises:
        ConfigError: nothing to write, or a dtype that safetensors files of ours do not hold.
    """
    if not shapes:
        raise ConfigError("nothing to export: the model has no parameters")
    groups: list[list[tuple[str, tuple[int, ...], torch.dtype, int]]] = [[]]
    used_nbytes = 0
    for name, (shape, dtype) in shapes.items():
        if dtype not in _DTYPE_NAMES:
            known = ", ".join(str(key).removeprefix("torch.") for key in _DTYPE_NAMES)
            raise ConfigError(f"cannot export {name} as {dtype}: a safetensors file of ours holds {known}")
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        if groups[-1] and used_nbytes + nbytes > max_shard_nbytes:
            groups.append([])
            used_nbytes = 0
        groups[-1].append((name, tuple(shape), dtype, nbytes))
        used_nbytes += nbytes
    shards = []
    for number, group in enumerate(groups, start=1):
        many_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        slots = []
        begin = 0
        # Wide elements first: then every tensor begins on a multiple of its own element size.
        for name, shape, dtype, nbytes in sorted(group, key=lambda entry: -entry[2].itemsize):
            slots.append(TensorSlot(name, shape, dtype, begin, nbytes))
            begin += nbytes
        shards.append(Shard(SINGLE_NAME if len(groups) == 1 else many_name, tuple(slots)))
    return tuple(shards)


def header_bytes(shard: Shard) -> bytes:
    """Return the length word and the JSON header of one safetensors file.

    Source: https://github.com/huggingface/safetensors#format
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for slot in shard.slots:
        entries[slot.name] = {
            "dtype": _DTYPE_NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [slot.begin, slot.begin + slot.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text = text.ljust(align_up(len(text), 8), b" ")
    return len(text).to_bytes(8, "little") + text
