"""What two threads see that list a run's folder at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

from offload.store.rundir import RunDirectory


def test_two_listings_at_once_are_both_whole(tmp_path: Path) -> None:
    """A commit lists manifests while the model's thread looks for snapshots; one that it missed was gone."""
    folder = RunDirectory.create(str(tmp_path), uuid4())
    wanted = [f"snapshot-{number}" for number in range(600)]  # several system calls each
    for name in wanted:
        (Path(folder.path) / name).touch()

    def listed(names: Callable[[], list[str]]) -> bool:
        return all(sorted(names()) == sorted(wanted) for _ in range(150))

    with ThreadPoolExecutor(4) as threads:
        whole = list(threads.map(listed, [folder.names] * 4))
    folder.close()
    assert whole == [True] * 4
