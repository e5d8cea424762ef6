"""What the fault loop found: a failure on the update thread must not leave the model's thread waiting."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest
from toy_models import SETTINGS, build, loss_of, make_batch
from watchdog import within

import offload
from offload.errors import OffloadError, StorageError
from offload.optim.pipeline import ChunkPipeline


def test_an_update_that_fails_gives_its_slots_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward behind it waits for a slot that nobody else would give back."""

    def failing(*_: object) -> NoReturn:
        raise StorageError("read failed: injected")

    monkeypatch.setattr(ChunkPipeline, "take", failing)

    def train() -> None:
        model = build("mlp")
        with offload.attach(model, disk=[tmp_path], **SETTINGS) as runtime:
            pool = runtime._parts.gradients._host_pool
            # Whichever of the two meets it first.
            with suppress(OffloadError):
                loss_of("mlp", model, make_batch("mlp", 0)).backward()
                runtime.step()
            with pytest.raises(StorageError, match="injected"):
                runtime._parts.updater.drain()
            assert pool.in_use() == ()
            runtime.close()

    within(60, "a failing update", train)
