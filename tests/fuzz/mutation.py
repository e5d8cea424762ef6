"""Changes to an input that keep most of its structure: values of JSON replaced, lines of YAML exchanged.

Used by atheris as its custom mutator and, with a fixed seed, by the ordinary tests, which need no atheris.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

__all__ = ["flip_bytes", "mutate"]

# What `json.dumps` does not write: a string of this form becomes the text inside.
_RAW = "@raw:%s@"
_RAW_TEXTS = (
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "-0",
    "9" * 4301,
    "1e-400",
    "0.1e1",
    "[" * 3000,
    "[" * 500 + "]" * 500,
    '"\\ud800"',
    '"\\u0000"',
    '"\\u001b[31m"',
    '{"a":1,"a":2}',
    "nul",
    "1,",
    "",
)
_NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    8,
    128,
    255,
    256,
    511,
    512,
    624,
    625,
    4095,
    4096,
    4097,
    8192,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    1 << 48,
    1 << 50,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
    1 << 64,
    -(1 << 63),
    10**30,
    10**300,
    0.0,
    0.5,
    1.5,
    1e300,
    -1e-300,
    128.0,
    4096.0,
)
_TEXTS = (
    "",
    "a",
    "x" * 300,
    "x" * 70_000,
    "../../etc/passwd",
    "/etc/passwd",
    ".",
    "..",
    "a\0b",
    "a\nb",
    "\x1b[31mred",
    "\u2028",
    "ffffffff",
    "00000000",
    "00010203-0405-4607-8809-0a0b0c0d0e0f",
    "float32",
    "bfloat16",
    "8bit",
    "F32",
    "BF16",
    "F8_E4M3",
    "BOOL",
    "I64",
    "true",
    "1",
    "1e3",
    "model.safetensors",
    "AAAA",
    "AAAAAAAA",
    "=",
    "\ud800",
)
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"a": {}}, [0, 0], [1 << 62, 1 << 62])
_YAML = (
    "&a",
    "*a",
    "<<: *a",
    "? [a]",
    "? {a: b}",
    "- x",
    "!!int",
    "!!timestamp x",
    "!!float x",
    "!!bool x",
    "!!binary x",
    "!!python/object:os.system x",
    "!!set {a}",
    "!!omap [a: 1]",
    "!!merge x",
    "2020-99-99",
    "2020-01-01",
    "0x",
    "0b",
    "1:99:99",
    ".inf",
    ".nan",
    "1e999",
    "~",
    "yes",
    "|",
    ">",
    "%YAML 1.1",
    "---",
    "...",
    "\t",
    "[",
    "]",
    "{",
    "}",
    "9" * 4301,
    "0x" + "f" * 5000,
    "190:20:30",
    "'",
    '"\\ud800"',
    "\x00",
    "\ufeff",
    "#",
    ":",
    "=",
    "[" * 2000,
    "!<x> y",
)

Blind = Callable[[bytes, int], bytes]


def mutate(kind: str, data: bytes, max_nbytes: int, seed: int, blind: Blind | None = None) -> bytes:
    """Return a changed input of at most `max_nbytes` bytes.

    Args:
        kind: `json`, `yaml` or `bytes`.
        data: the input.
        max_nbytes: its largest length.
        seed: everything that is drawn follows from it.
        blind: changes bytes when the structure is to be left; our own flips when None.
    """
    rng = random.Random(seed)
    blind = blind or (lambda text, limit: flip_bytes(text, rng)[:limit])
    if kind == "bytes" or rng.random() < 0.15:
        return blind(data, max_nbytes)
    changed = _mutate_yaml(data, rng) if kind == "yaml" else _mutate_json(data, rng)
    return blind(data, max_nbytes) if changed is None or len(changed) > max_nbytes else changed


def flip_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with a few bytes changed, removed or repeated."""
    text = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 4))):
        position = rng.randrange(len(text))
        what = rng.randrange(4)
        if what == 0:
            text[position] ^= 1 << rng.randrange(8)
        elif what == 1:
            text[position] = rng.randrange(256)
        elif what == 2:
            del text[position : position + rng.choice((1, 2, 8, 64))]
        else:
            text[position:position] = text[position : position + rng.choice((1, 4, 16))] * rng.choice(
                (1, 2, 9)
            )
        text = text or bytearray(b"\0")
    return bytes(text)


def _mutate_json(data: bytes, rng: random.Random) -> bytes | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _changed(value, rng)
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        return None
    for raw in _RAW_TEXTS:
        text = text.replace(json.dumps(_RAW % raw), raw)
    return text.encode("utf-8", "surrogatepass")


def _changed(value: Any, rng: random.Random) -> Any:
    """Return `value` with something in it replaced, removed, doubled or renamed."""
    inside = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if type(value) is list
        else []
    )
    if not inside or rng.random() < 0.12:
        return _drawn(value, rng)
    key, old = rng.choice(inside)
    if isinstance(old, list | dict) and old and rng.random() < 0.8:
        new = _changed(old, rng)
    else:
        new = _drawn(old, rng)
    what = rng.random()
    if isinstance(value, dict):
        rest = {name: kept for name, kept in value.items() if name != key}
        if what < 0.1:
            return rest
        if what < 0.15:
            return {**rest, rng.choice(_TEXTS): old}
        return {**value, key: new}
    if what < 0.1:
        return value[:key] + value[key + 1 :]
    if what < 0.2:
        return value[:key] + [old] * rng.choice((2, 3, 70)) + value[key + 1 :]
    return value[:key] + [new] + value[key + 1 :]


def _drawn(old: Any, rng: random.Random) -> Any:
    what = rng.randrange(8)
    if what == 0:
        return _RAW % rng.choice(_RAW_TEXTS)
    if what == 1:
        return rng.choice(_OTHERS)
    if isinstance(old, str):
        if what < 5 and old:
            position = rng.randrange(len(old))
            piece = rng.choice(("", old[position], "0", "f", "A", "/", "\n", old))
            return old[:position] + piece + old[position + 1 :]
        return rng.choice(_TEXTS) if what < 7 else rng.choice(_NUMBERS)
    if type(old) is int and what < 5:
        return old + rng.choice((-4096, -128, -1, 1, 128, 4096)) if what < 4 else -old
    return rng.choice(_NUMBERS) if what < 6 else rng.choice(_TEXTS)


def _mutate_yaml(data: bytes, rng: random.Random) -> bytes | None:
    try:
        lines = data.decode("utf-8", "surrogatepass").split("\n")
    except UnicodeDecodeError:
        return None
    for _ in range(rng.choice((1, 1, 2, 4))):
        position = rng.randrange(len(lines))
        key, colon, value = lines[position].partition(": ")
        what = rng.randrange(7)
        if what == 0:
            del lines[position]
        elif what == 1:
            lines.insert(position, lines[rng.randrange(len(lines))])
        elif what == 2:
            lines[position] = f"{rng.choice(_YAML)} {lines[position]}"
        elif what == 3:
            lines[position] = f"{key}: {rng.choice(_YAML)} {value}"
        elif what == 4:
            lines.insert(position, rng.choice(_YAML))
        else:
            new = rng.choice(
                (*map(str, _NUMBERS), *_TEXTS, *_YAML, f"[{value}, {value}]", f"&a {value}", "*a")
            )
            lines[position] = f"{key}: {new}" if colon else new
        lines = lines or [""]
    return "\n".join(lines).encode("utf-8", "surrogatepass")
