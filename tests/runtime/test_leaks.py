"""A process that attaches many times, after failures too, is no larger for it."""

from __future__ import annotations

import atexit
import gc
import shutil
import weakref
from pathlib import Path

import pytest
import torch

import offload
from offload import Runtime
from offload.aio import EngineName, open_engine, probe_engines
from offload.errors import StateError
from offload.sizes import MIB

WARM_UP = 20
# malloc keeps some of what was freed. An arena of an attach is 1 MiB: 40 kept ones are 40 MiB.
MAX_ANONYMOUS_NBYTES = 12 * MIB


class BrokenError(Exception):
    """What a unit of the test raises."""


class Brittle(torch.nn.Module):
    """Adds nothing; raises when it is recomputed in backward, if it is broken."""

    def __init__(self, *, broken: bool) -> None:
        super().__init__()
        self.broken = broken

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.broken and torch.is_grad_enabled():
            raise BrokenError
        return hidden


def build(*, broken: bool = False) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Linear(8, 8), Brittle(broken=broken)),
        torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()),
    )


def attempt(folder: Path, alive: weakref.WeakSet[Runtime], *, broken: bool) -> None:
    """Attach, train a step or fail in it, and close."""
    folder.mkdir()
    model = build(broken=broken)
    settings = {"device": "cpu", "host_memory": "1MiB", "device_memory": "1MiB", "activations_nbytes": 65536}
    try:
        with offload.attach(model, disk=[folder], chunk_nbytes=4096, chunk_numel=2048, **settings) as runtime:
            alive.add(runtime)
            # The frame that has the loss is in the traceback of the error that the runtime keeps.
            loss = model(torch.ones(2, 8)).sum()
            loss.backward()
            runtime.step()
    except BrokenError:
        assert broken
    else:
        assert not broken
    shutil.rmtree(folder)


def anonymous_nbytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("Anonymous:")]
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("rounds", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("broken", [False, True], ids=["trains", "fails"])
def test_attaching_again_and_again_leaves_neither_objects_nor_memory(
    broken: bool, rounds: int, tmp_path: Path
) -> None:
    alive: weakref.WeakSet[Runtime] = weakref.WeakSet()
    for _ in range(WARM_UP):
        attempt(tmp_path / "run", alive, broken=broken)
    gc.collect()
    num_objects, nbytes = len(gc.get_objects()), anonymous_nbytes()
    for _ in range(rounds):
        attempt(tmp_path / "run", alive, broken=broken)
    gc.collect()
    assert not alive
    # One object of an attach would be `rounds`; caches that fill late are a few in all.
    assert len(gc.get_objects()) - num_objects < rounds // 2
    assert anonymous_nbytes() - nbytes < MAX_ANONYMOUS_NBYTES


def test_backward_through_a_model_that_is_gone_says_so(tmp_path: Path) -> None:
    model = build()
    with offload.attach(
        model, device="cpu", host_memory="64MiB", device_memory="64MiB", disk=[tmp_path]
    ) as runtime:
        loss = model(torch.ones(2, 8)).sum()
    del model, runtime
    gc.collect()
    with pytest.raises(StateError, match="a model that is gone"):
        loss.backward()


@pytest.mark.parametrize("name", ["uring", "threads", "portable"])
def test_opening_engines_leaves_nothing_for_the_interpreters_end(name: EngineName) -> None:
    if not {row.name: row for row in probe_engines()}[name].available:
        pytest.skip(f"no {name} here")
    open_engine(name).close()
    before = atexit._ncallbacks()
    for _ in range(20):
        open_engine(name).close()
    assert atexit._ncallbacks() == before
