"""Contents of records that say which generation and record they are."""

from __future__ import annotations

import random

from offload.store import Store


def content(name: str, generation: int, nbytes: int) -> bytes:
    """Bytes that no other record or generation has."""
    return random.Random(f"{name} {generation}").randbytes(nbytes)


def write_all(store: Store, generation: int, names=None) -> None:
    """Write the named records, all mutable ones and unwritten ones by default, and wait."""
    for name, spec in store.records.items():
        if name in names if names is not None else spec.mutable or not store.is_written(name):
            store.write(name, content(name, generation, spec.nbytes)).wait()


def read_all(store: Store) -> dict[str, bytes]:
    """The newest bytes of every record that was written."""
    found = {}
    for name, spec in store.records.items():
        if store.is_written(name):
            buffer = bytearray(spec.nbytes)
            store.read(name, buffer).wait()
            found[name] = bytes(buffer)
    return found
