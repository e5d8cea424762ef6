"""A real process with a real engine, killed with SIGKILL again and again in its commit loop."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from store_content import content, read_all

from offload.aio import open_engine
from offload.store import RecordSpec, Store

HERE = Path(__file__).resolve().parent
KILLS = 10


def test_a_killed_process_loses_no_commit_it_reported(dirs):
    specs = [RecordSpec("w", 200 * 4096), RecordSpec("o", 50 * 4096), RecordSpec("base", 4096, mutable=False)]
    rng = random.Random(11)
    with open_engine() as engine:
        with Store.create(dirs, specs, engine=engine, chunk_nbytes=4 * 4096) as store:
            run_id = store.run_id
        reported = 0
        for _ in range(KILLS):
            reported = run_and_kill(run_id, dirs, reported, rng.randrange(1, 8))
            with Store.open(dirs, engine=engine, run_id=run_id) as store:
                assert store.generation in (reported, reported + 1)
                assert store.state == {"step": store.generation}
                assert store.verify().ok
                for name, data in read_all(store).items():
                    written = 1 if name == "base" else store.generation
                    assert data == content(name, written, store.records[name].nbytes)
                reported = store.generation
    assert reported >= KILLS


def run_and_kill(run_id, dirs, generation, num_commits) -> int:
    """Return the last generation that the process reported before it was killed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    with subprocess.Popen(
        [sys.executable, str(HERE / "commit_loop.py"), run_id, *map(str, dirs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout.readline().split() == ["open", str(generation)]
        for _ in range(num_commits):
            line = process.stdout.readline()
        process.kill()
        lines = [line, *process.stdout.read().splitlines()]
    last = [line for line in lines if line.startswith("committed ")][-1]
    return int(last.split()[1])
