"""A run of a few generations for crash tests: what each writes, and what a store must then hold."""

from __future__ import annotations

from store_content import content, read_all, write_all
from store_doubles import Journal

from offload.store import RecordSpec, Store

CHUNK = 4096
SPECS = [
    RecordSpec("w", 5 * CHUNK),
    RecordSpec("o", 2 * CHUNK),
    RecordSpec("base", CHUNK, mutable=False),
]
# Which records each generation writes.
WRITES = {1: ("w", "o", "base"), 2: ("w", "o"), 3: ("w",), 4: ("o", "w"), 5: ("o",)}
LAST = 5


def expected(generation: int) -> dict[str, bytes]:
    """What a store must hold after `generation` was committed."""
    found = {}
    for spec in SPECS:
        written = [g for g in range(1, generation + 1) if spec.name in WRITES[g]]
        if written:
            found[spec.name] = content(spec.name, written[-1], spec.nbytes)
    return found


def build(store: Store, generation: int) -> None:
    """Write a generation; its first record twice, with something else before."""
    first = store.records[WRITES[generation][0]]
    store.write(first.name, content("junk", generation, first.nbytes)).wait()
    write_all(store, generation, names=WRITES[generation])


def train(store: Store, journal: Journal, last: int = LAST) -> None:
    """Build and commit the generations that are left, noting each commit that returns."""
    for generation in range(store.generation + 1, last + 1):
        build(store, generation)
        assert store.commit({"step": generation}) == generation
        journal.ops.append(("committed", "", generation))


def check_recovered(store: Store, committed: int) -> None:
    assert store.generation in (committed, committed + 1)
    assert store.state == ({"step": store.generation} if store.generation else {})
    assert read_all(store) == expected(store.generation)
    assert store.verify().ok


def two_dirs(root):
    dirs = [root / "a", root / "b"]
    for path in dirs:
        path.mkdir(parents=True)
    return dirs
