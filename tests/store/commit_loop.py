"""A process that commits generation after generation until it is killed; says each one it committed.

Usage: commit_loop.py RUN_ID DIRECTORY...
"""

from __future__ import annotations

import os
import sys

from store_content import write_all

from offload.aio import open_engine
from offload.store import Store


def say(word: str, generation: int) -> None:
    """Write a line in one call: print makes several where Python is unbuffered; the kill comes between."""
    os.write(sys.stdout.fileno(), f"{word} {generation}\n".encode())


def main(run_id: str, directories: list[str]) -> None:
    with open_engine() as engine, Store.open(directories, engine=engine, run_id=run_id) as store:
        say("open", store.generation)
        while True:
            generation = store.generation + 1
            write_all(store, generation)
            store.commit({"step": generation})
            say("committed", generation)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
