"""The frame around every small file of a run, and what a checksum covers: pure, no I/O.

A framed file is one ASCII line and a body of canonical JSON. The line names the kind, the version of
the format, the body's length and a crc32c over the line's own beginning and the body, so that any
changed bit of the file is found. The form of the line is the same in every version of the format.

Checksums of chunks begin with who the chunk is (run, record, chunk, generation): right bytes in the
wrong place, or an older generation's, do not verify.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from math import isfinite
from typing import Any
from uuid import UUID

from ..aio import crc32c
from ..errors import CorruptionError, StorageError

__all__ = ["FORMAT_MAJOR", "FORMAT_MINOR", "canonical_json", "chunk_seed", "frame", "json_copy", "unframe"]

FORMAT_MAJOR = 1
FORMAT_MINOR = 1

# The longest first line is under 80 bytes; more is not ours.
_MAX_LINE = 128
_LINE = re.compile(
    rb"(?P<summed>(?P<kind>offload-[a-z]{1,16}) (?P<major>\d{1,4})\.(?P<minor>\d{1,4})"
    rb" nbytes=(?P<nbytes>\d{1,10})) crc32c=(?P<crc>[0-9a-f]{8})"
)
_CHUNK = struct.Struct("<16sIIQ")

# Values a body may hold, by its separators. Parsed JSON takes up to about 100 bytes a value, so a
# hostile file cannot make us allocate more than about 100 MB.
_MAX_VALUES = 1_000_000


def chunk_seed(run: UUID, record: int, chunk: int, generation: int) -> int:
    """Return what the crc32c of a chunk's bytes is continued from: the crc32c of its 32-byte identity.

    Args:
        run: the run's id.
        record: the record's index in the table.
        chunk: the chunk's index in the record.
        generation: the generation in which the chunk was written.
    """
    return crc32c(_CHUNK.pack(run.bytes, record, chunk, generation))


def canonical_json(value: Any, what: str) -> str:
    """Return `value` as JSON that is the same for equal values: sorted keys, no spaces, ASCII.

    Raises:
        ValueError: `value` holds something that JSON does not, NaN included; the message names `what`.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be stored as JSON: {error}") from error


def json_copy(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return a copy of `value` that equals what a file with it reads back; errors as of `canonical_json`."""
    copy: dict[str, Any] = json.loads(canonical_json(dict(value), what))
    return copy


def frame(kind: str, body: dict[str, Any]) -> tuple[bytes, str]:
    """Return the bytes of a framed file, and its checksum as eight hexadecimal digits."""
    text = canonical_json(body, f"the body of {kind}").encode("ascii")
    line = f"{kind} {FORMAT_MAJOR}.{FORMAT_MINOR} nbytes={len(text)}".encode("ascii")
    checksum = f"{crc32c(text, crc32c(line)):08x}"
    return b"%b crc32c=%b\n%b" % (line, checksum.encode("ascii"), text), checksum


def unframe(kind: str, data: bytes, path: str) -> tuple[dict[str, Any], str]:
    """Return the body and the checksum of a framed file; the inverse of `frame`.

    Args:
        kind: the kind it must be.
        data: the whole file.
        path: its path, for messages.

    Raises:
        CorruptionError: it is torn, changed, of another kind, or not a JSON object.
        StorageError: it is whole, and written by a newer major version of the format.
    """
    line, newline, text = data[:_MAX_LINE].partition(b"\n")
    match = _LINE.fullmatch(line)
    if not newline or match is None:
        raise CorruptionError(f"{path} does not begin with an {kind} line", path=path)
    text = data[len(line) + 1 :]
    if len(text) != int(match["nbytes"]):
        raise CorruptionError(
            f"{path} is torn: {len(text):,} of {int(match['nbytes']):,} body bytes", path=path
        )
    checksum = f"{crc32c(text, crc32c(match['summed'])):08x}"
    stated = match["crc"].decode("ascii")
    if checksum != stated:
        raise CorruptionError(
            f"{path} fails its checksum: crc32c {checksum}, its first line says {stated}", path=path
        )
    if int(match["major"]) > FORMAT_MAJOR:
        raise StorageError(
            f"{path} has format version {match['major'].decode()}.{match['minor'].decode()} and this offload "
            f"reads up to {FORMAT_MAJOR}: use the newer offload that wrote it",
            path=path,
        )
    if match["kind"].decode("ascii") != kind:
        raise CorruptionError(f"{path} is an {match['kind'].decode()} file, expected {kind}", path=path)
    return _parse(text, path), checksum


def _parse(text: bytes, path: str) -> dict[str, Any]:
    if sum(map(text.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise CorruptionError(f"{path} holds more than {_MAX_VALUES:,} values", path=path)
    try:
        body = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{path} is not JSON: {error}", path=path) from error
    if not isinstance(body, dict):
        raise CorruptionError(f"{path} is not a JSON object", path=path)
    return body


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    """Read a number; one that overflows would be infinite, which we never write."""
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text:.40} is too large a number")
    return value
