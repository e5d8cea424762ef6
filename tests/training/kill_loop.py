"""Kills `offload finetune` again and again, at random moments and named points, for test_kill_loop.py.

    kill_loop.py CONFIG ROOT KILLS SEED

Each run goes on after every kill, by the same call, until it ends; then its metrics, its exported weights,
its committed state and the bytes of all its records must be those of a run that nobody killed, and a new
one begins, in the next of WAYS, until there were KILLS. What it found is printed; the status is 1 when a
run differed.

One interpreter imports torch once and forks a process for each attempt, which is what dies: a fork takes
milliseconds, an import seconds. So this process starts no thread of its own, and opens no store.
"""

from __future__ import annotations

import faulthandler
import hashlib
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import offload.runtime.storage
import offload.training.finetune
import offload.training.loop
from offload.aio import open_engine
from offload.hf import load_tokenizer, open_pretrained
from offload.store import Store, list_runs, manifests
from offload.store.rundir import RunDirectory
from offload.training.config import FinetuneConfig, load_config
from offload.training.output import OutputDirectory

# Longer than any attempt takes on a loaded machine.
SILENCE_S = 60.0
# An attempt that dies at a point gets so far; a run takes several.
REACH = 0.5

# Everything that is committed differently: where the state is at home, how often, and what else is on disk.
WAYS: dict[str, dict[str, Any]] = {
    "disk": {},
    "host, every 3rd": {"home": "host", "save_steps": 3},
    "disk, every 2nd": {"save_steps": 2},
    "cached": {"host_cache": 40 << 10, "save_steps": 2},
    "clipped": {"max_grad_norm": 0.5},
    "8-bit moments": {"moments": "8bit"},
    "snapshots": {"snapshot_steps": 2},
    "two drives": {"disk": ["a", "b"]},
}
# What metrics say of time and transfers depends on who was killed when.
MEASURED = (
    *("seconds", "commit_seconds", "num_tokens"),
    *("disk_read_nbytes", "disk_written_nbytes", "to_device_nbytes", "to_host_nbytes"),
)
NAMES = re.compile(r"OFFLOAD_RUN|lock|data\.bin|manifest-\d+|snapshot-rolling-[0-9-]+(\.bin)?")


class Points:
    """Counts the named points that a process passes, and kills it at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at
        self.seen: list[str] = []

    def passing(self, name: str) -> None:
        if len(self.seen) == self.kill_at:
            os.write(1, f"{name}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append(name)

    def watch(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.passing(f"before {name}")
            result = original(*args, **kwargs)
            self.passing(f"after {name}")
            return result

        setattr(owner, name, watched)

    def watch_all(self) -> None:
        """Wrap what a run calls; this process is about to end, so nothing is put back."""
        for owner, names in [
            (RunDirectory, ("write_owner", "stage", "publish", "discard")),
            (OutputDirectory, ("begin", "save_config", "append_metrics", "cut_metrics", "_write", "abandon")),
            (manifests, ("prune", "heal")),
            (offload.training.loop, ("_backward",)),
            (offload.training.finetune, ("export",)),
            (Store, ("snapshot", "drop_snapshot")),
        ]:
            for name in names:
                self.watch(owner, name)
        real: Callable[..., Any] = offload.runtime.storage.open_engine
        offload.runtime.storage.open_engine = lambda *args, **kwargs: _Engine(real(*args, **kwargs), self)


class _Engine:
    """An I/O engine that says what it is asked for."""

    def __init__(self, engine: Any, points: Points) -> None:
        self._engine = engine
        self._points = points

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, op: str, *args: Any, **kwargs: Any) -> Any:
        if op == "write":
            self._points.passing("write")
        return self._engine.submit(op, *args, **kwargs)

    def sync(self, file: Any) -> None:
        self._points.passing("before sync")
        self._engine.sync(file)
        self._points.passing("after sync")


def in_child(work: Callable[[], str], *, kill_after_s: float | None = None) -> tuple[int, str]:
    """Run `work` in a process of its own; return how it ended, and what it returned or said before."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            faulthandler.enable()
            os.dup2(write_fd, 1)
            os.write(1, work().encode())
            os._exit(0)
        finally:
            # Only an error comes here.
            traceback.print_exc()
            os._exit(1)
    os.close(write_fd)
    pidfd = os.pidfd_open(pid)
    if kill_after_s is not None:
        select.select([pidfd], [], [], kill_after_s)
        os.kill(pid, signal.SIGKILL)
    # What it says fits into the pipe, so it never waits for a reader.
    if not select.select([pidfd], [], [], SILENCE_S)[0]:
        os.kill(pid, signal.SIGABRT)
        raise AssertionError(f"an attempt did not end within {SILENCE_S:.0f} s; the stacks are above")
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(pidfd)
    with open(read_fd) as said:
        return status, said.read()


def attempt(config: FinetuneConfig, kill_at: int | None, *, watched: bool = True) -> str:
    """Train from wherever the run stands to its end or the kill; return the points passed, as JSON."""
    points = Points(kill_at)
    if watched:
        points.watch_all()
    result = offload.training.finetune.finetune(config, echo=lambda _: None)
    assert result.exit_code == 0 and result.step == config.max_steps
    return json.dumps(len(points.seen))


def found(config: FinetuneConfig) -> str:
    """Return what a finished run is, as JSON."""
    folders = [*config.disk] or [config.output_dir / "state"]
    left = [name for folder in folders for run in folder.iterdir() for name in os.listdir(run)]
    (run,) = list_runs(folders[0])
    with open_engine() as engine, Store.open(folders, engine=engine, run_id=run.run_id) as store:
        digests = {}
        for name, spec in store.records.items():
            memory = bytearray(spec.nbytes)
            store.read(name, memory).wait()
            digests[name] = hashlib.sha256(memory).hexdigest()
        state = hashlib.sha256(json.dumps(dict(store.state), sort_keys=True).encode()).hexdigest()
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    return json.dumps(
        {
            "metrics": [{key: line[key] for key in line if key not in MEASURED} for line in lines],
            "weights": hashlib.sha256(
                (config.output_dir / "final/model.safetensors").read_bytes()
            ).hexdigest(),
            "state": state,
            "records": digests,
            "runs on each drive": [len(os.listdir(folder)) for folder in folders],
            "strange names": sorted({name for name in left if not NAMES.fullmatch(name)}),
        }
    )


def in_way(config: FinetuneConfig, way: str, folder: Path) -> FinetuneConfig:
    """Return the configuration of a run in `folder`, which is made."""
    changes = dict(WAYS[way])
    changes["disk"] = [folder / name for name in changes.get("disk", [])]
    for path in [folder, *changes["disk"]]:
        path.mkdir(mode=0o700, parents=True)
    return config.model_copy(update={**changes, "output_dir": folder / "out"})


def unbroken(config: FinetuneConfig) -> tuple[dict[str, Any], int, float]:
    """Return what a run is that nobody kills, how many points it passes, and how long it takes."""
    began_s = time.monotonic()
    status, said = in_child(lambda: attempt(config, None))
    assert status == 0
    seconds = time.monotonic() - began_s
    status, what = in_child(lambda: found(config))
    assert status == 0
    return json.loads(what), int(said), seconds


def broken(
    config: FinetuneConfig, num_points: int, seconds: float, rng: random.Random, kills: Counter[str]
) -> dict[str, Any]:
    """Run it to the end, with kills on the way; return what it is."""
    while True:
        if rng.random() < 0.5:
            after_s = rng.uniform(0, seconds * REACH)
            status, said = in_child(lambda: attempt(config, None, watched=False), kill_after_s=after_s)
            said = "a random moment"
        else:
            kill_at = rng.randrange(int(num_points * REACH))
            status, said = in_child(partial(attempt, config, kill_at))
        if status == 0:
            break
        assert status == -signal.SIGKILL, "an attempt failed; its traceback is above"
        kills[said.strip()] += 1
    status, what = in_child(lambda: found(config))
    assert status == 0
    return dict(json.loads(what))


def main() -> int:
    config = load_config(Path(sys.argv[1]), {})
    root, wanted, rng = Path(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4]))
    began_s = time.monotonic()
    # transformers imports what a model needs when it is first asked for, which takes seconds.
    _, source = open_pretrained(config.model_name_or_path, dtype=torch.float32)
    source.close()
    load_tokenizer(config.model_name_or_path)
    expected = {}
    for way in WAYS:
        expected[way] = unbroken(in_way(config, way, root / "unbroken"))
        shutil.rmtree(root / "unbroken")
    kills: Counter[str] = Counter()
    runs, differing = 0, 0
    for way in itertools.cycle(WAYS):
        what, num_points, seconds = expected[way]
        got = broken(in_way(config, way, root / "broken"), num_points, seconds, rng, kills)
        shutil.rmtree(root / "broken")
        runs += 1
        wrong = [key for key in what if got[key] != what[key]]
        differing += bool(wrong)
        for key in wrong:
            print(f"{way}: {key}: {got[key]} after kills, {what[key]} without", flush=True)
        if kills.total() >= wanted and runs >= len(WAYS):
            break
    at_random = kills.pop("a random moment", 0)
    print(
        f"{at_random + kills.total()} SIGKILLs, {at_random} at random moments and {kills.total()} at"
        f" {len(kills)} named points; {runs} runs in {len(WAYS)} ways, {runs - differing} ended like one that"
        f" was not killed; {time.monotonic() - began_s:.0f} s"
    )
    print(", ".join(f"{name} {count}" for name, count in sorted(kills.items())))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
