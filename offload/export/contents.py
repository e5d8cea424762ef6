"""What the records of a run hold, as JSON in its manifests, and back: without the model that was trained.

A run then tells by itself which tensor lies where: an export needs no model object, and a damaged chunk
has the names of its tensors. The model's class and directory stand beside, for people and for exports.

Nothing read here is trusted: it comes from a file. Pure; any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import torch

from ..codec import OptimizerChunk, RecordFormat
from ..errors import ConfigError, StateError
from ..specs import ELEMENT_ALIGNMENT, TensorSpec, UnitLayout
from ..tiers.records import RecordSet

__all__ = ["CONTENTS_KEY", "Contents", "describe_contents", "read_contents", "tensors_at"]

# Where a run's identity keeps it.
CONTENTS_KEY = "contents"

# Far above any model, and small enough that nothing overflows or takes much memory.
_MAX_NAME = 1024
_MAX_RANK = 8
_MAX_NUMEL = 1 << 48
_MAX_CHUNKS = 1 << 20
_MAX_CHUNK_NUMEL = 1 << 32

_COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Contents:
    """What a run holds.

    Attributes:
        records: every unit's records, by unit name, in the order of the model.
        model: the class of the model, for people.
        directory: the model directory that it was begun from, None where there was none.
        buffers: full names of the model's persistent buffers, whose values the run does not hold.
    """

    records: Mapping[str, RecordSet]
    model: str
    directory: str | None
    buffers: tuple[str, ...]


def describe_contents(contents: Contents) -> dict[str, Any]:
    """Return `contents` as JSON for a run's identity; formats and dtypes stand elsewhere in it."""
    return {
        "buffers": list(contents.buffers),
        "directory": contents.directory,
        "model": contents.model,
        "units": [
            [owner, _tensors(record.layout.trainable), _tensors(record.layout.frozen)]
            for owner, record in contents.records.items()
        ],
    }


def read_contents(identity: Mapping[str, Any]) -> Contents:
    """Return what a run's identity says that it holds; the inverse of `describe_contents`.

    Raises:
        StateError: the run does not say; it was begun by an older offload.
        ConfigError: what it says is impossible.
    """
    value = identity.get(CONTENTS_KEY)
    if value is None:
        raise StateError(
            "the run does not say which tensors it holds, since an older offload began it; resume it with"
            " its model, whose export holds them"
        )
    try:
        # Only those that this version knows: a run begun before one existed has its default.
        known = {field.name for field in fields(RecordFormat)}
        record_format = RecordFormat(**{name: identity[name] for name in known if name in identity})
        if type(record_format.chunk_numel) is not int or record_format.chunk_numel > _MAX_CHUNK_NUMEL:
            _refuse(f"a chunk has {record_format.chunk_numel!r:.40} elements")
        compute_dtype = _COMPUTE_DTYPES[identity.get("compute_dtype", "float32")]
        records: dict[str, RecordSet] = {}
        for owner, trainable, frozen in value["units"]:
            layout = UnitLayout(_name(owner), _specs(trainable), _specs(frozen))
            if owner in records:
                _refuse(f"unit {owner!r} is there twice")
            if layout.trainable_numel > _MAX_CHUNKS * record_format.chunk_numel:
                _refuse(f"unit {owner!r} has more than {_MAX_CHUNKS:,} chunks")
            records[owner] = RecordSet(layout, record_format, compute_dtype)
        names = [
            spec.name
            for record in records.values()
            for spec in (*record.layout.trainable, *record.layout.frozen)
        ]
        if len(set(names)) != len(names):
            _refuse("a tensor is there twice")
        directory = value["directory"]
        return Contents(
            records,
            _name(value["model"]),
            None if directory is None else _name(directory, 4096),
            tuple(_name(name) for name in value["buffers"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the run says impossible things about what it holds: {error!r:.300}") from error


def tensors_at(records: Mapping[str, RecordSet], record: str, begin: int, end: int) -> tuple[str, ...]:
    """Return what lies in bytes `begin` to `end` of a record: tensors, and of which kind.

    >>> layout = UnitLayout("block", (TensorSpec("block.w", (4096,), 0), TensorSpec("block.b", (8,), 4096)))
    >>> records = {"block": RecordSet(layout, RecordFormat("float32"), torch.float32)}
    >>> tensors_at(records, "block:weights", 0, 4096)
    ('block.w',)
    >>> tensors_at(records, "block:optimizer", 0, 64)
    ('exp_avg of block.w',)
    """
    owner, _, kind = record.rpartition(":")
    unit = records.get(owner)
    if unit is None:
        return ()
    if kind == "weights":
        itemsize = unit.format.torch_dtype.itemsize
        return _overlapping(unit.layout.trainable, begin // itemsize, -(-end // itemsize))
    if kind == "frozen":
        itemsize = unit.compute_dtype.itemsize
        return _overlapping(unit.layout.frozen, begin // itemsize, -(-end // itemsize))
    found: list[str] = []
    for chunk in unit.format.optimizer_chunks(unit.layout.trainable_numel):
        if chunk.offset_bytes < end and chunk.offset_bytes + chunk.nbytes > begin:
            found += _in_chunk(unit.layout, chunk, begin - chunk.offset_bytes, end - chunk.offset_bytes)
    return tuple(dict.fromkeys(found))


def _in_chunk(layout: UnitLayout, chunk: OptimizerChunk, begin: int, end: int) -> list[str]:
    """Return what lies in bytes `begin` to `end` of an optimizer chunk, array by array."""
    found = []
    for field in fields(chunk):
        array = getattr(chunk, field.name)
        if not isinstance(array, slice) or array.start >= end or array.stop <= begin:
            continue
        # An array holds the chunk's elements in order; of scales, one stands for several.
        nbytes = array.stop - array.start
        first = (max(begin, array.start) - array.start) * chunk.numel // nbytes
        last = -(-(min(end, array.stop) - array.start) * chunk.numel // nbytes)
        names = _overlapping(layout.trainable, chunk.start + first, chunk.start + last)
        found += [f"{field.name} of {name}" for name in names]
    return found


def _overlapping(tensors: tuple[TensorSpec, ...], begin: int, end: int) -> tuple[str, ...]:
    return tuple(spec.name for spec in tensors if spec.offset < end and spec.end > begin)


def _tensors(specs: tuple[TensorSpec, ...]) -> list[list[Any]]:
    return [[spec.name, list(spec.shape), spec.offset] for spec in specs]


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    specs: list[TensorSpec] = []
    free = 0
    for name, shape, offset in values:
        if len(shape) > _MAX_RANK or any(type(size) is not int or size < 0 for size in shape):
            _refuse(f"the shape of {name!r:.80} is {shape!r:.80}")
        spec = TensorSpec(_name(name), tuple(shape), offset)
        if type(offset) is not int or offset < free or offset % ELEMENT_ALIGNMENT or spec.end > _MAX_NUMEL:
            _refuse(f"{name!r:.80} lies at {offset!r:.40}")
        free = spec.end
        specs.append(spec)
    return tuple(specs)


def _name(value: Any, limit: int = _MAX_NAME) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= limit or not value.isprintable():
        _refuse(f"{value!r:.80} is no name")
    return value


def _refuse(what: str) -> NoReturn:
    raise ConfigError(f"the run says impossible things about what it holds: {what}")
