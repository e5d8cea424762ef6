"""Parse and print sizes, rates and times; round up to an alignment. Pure functions, no state.

Memory is counted in GiB (2^30 bytes) and bandwidth in GB/s (10^9 bytes per second), and the unit is
always printed.
"""

from __future__ import annotations

import re
from decimal import Decimal

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "align_down",
    "align_up",
    "format_bytes",
    "format_rate",
    "format_time",
    "parse_bytes",
]

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_UNITS = {
    "": 1,
    "b": 1,
    "k": KIB,
    "kib": KIB,
    "kb": 10**3,
    "m": MIB,
    "mib": MIB,
    "mb": 10**6,
    "g": GIB,
    "gib": GIB,
    "gb": 10**9,
    "t": 1 << 40,
    "tib": 1 << 40,
    "tb": 10**12,
}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:_\d+)*(?:\.\d+)?)\s*(?P<unit>[a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Return the number of bytes that `text` names.

    `GiB`, `MiB`, `KiB`, `TiB` and the single letters `G`, `M`, `K`, `T` are binary; `GB`, `MB`, `KB`,
    `TB` are decimal; a bare number is bytes.

    Raises:
        ValueError: `text` is not a size, or is negative.

    >>> parse_bytes("1.5GiB"), parse_bytes("2 GB"), parse_bytes(4096)
    (1610612736, 2000000000, 4096)
    """
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"a size cannot be negative: {text}")
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    unit = _UNITS.get(match["unit"].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(
            f"not a size: {text!r:.80}; write bytes with a unit, for example 8GiB, 512MiB or 200GB"
        )
    # Decimal: a float would lose the low bits of a long byte count.
    return round(Decimal(match["number"].replace("_", "")) * unit)


def format_bytes(nbytes: int) -> str:
    """Return `nbytes` in the largest binary unit that keeps the number at or above one.

    >>> format_bytes(0), format_bytes(4096), format_bytes(5 * GIB // 2)
    ('0 B', '4.0 KiB', '2.5 GiB')
    """
    if nbytes < KIB:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1023.95:  # what rounds to 1024.0 is one of the next unit
            return f"{value:.1f} {unit}"
    return f"{value / 1024:,.2f} TiB"


def format_rate(bytes_per_s: float) -> str:
    """Return a bandwidth in GB/s (10^9 bytes per second).

    >>> format_rate(3_210_000_000)
    '3.21 GB/s'
    """
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def format_time(seconds: float) -> str:
    """Return a duration for people: `850 ms`, `12.3 s`, `4:05`, `3:04:05`.

    >>> format_time(0.85), format_time(12.34), format_time(245), format_time(11045)
    ('850 ms', '12.3 s', '4:05', '3:04:05')
    """
    # The bounds are those of the rounded figure: never `1000 ms` or `60.0 s`.
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def align_up(nbytes: int, alignment: int) -> int:
    """Return the smallest multiple of `alignment` that is at least `nbytes`.

    >>> align_up(1, 4096), align_up(4096, 4096), align_up(0, 4096)
    (4096, 4096, 0)
    """
    return -(-nbytes // alignment) * alignment


def align_down(nbytes: int, alignment: int) -> int:
    """Return the largest multiple of `alignment` that is at most `nbytes`."""
    return nbytes // alignment * alignment
