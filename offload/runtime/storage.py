"""Opens what a run has on its drives: the store, and the scratch areas of parked gradients and saved inputs.

Owns nothing: what is opened goes to `own`, which closes it. A new run whose scratch areas find no room is
removed again, so that a refusal leaves nothing behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..aio import open_engine
from ..errors import StorageError
from ..machine import DriveSpeed
from ..store import RecordSpec, Store, remove_run
from ..store.scratch import Scratch
from ..tiers.gradient_homes import PartLayout
from ..tiers.memory_plan import MemoryPlan
from ..tiers.records import store_records
from ..tiers.spill import Spill, chunk_nbytes_of
from .blueprint import Blueprint
from .identity import run_identity
from .io_setting import choose_io_setting
from .measured import MeasuredDrives
from .options import RuntimeOptions
from .stripes import choose_weights, log_stripes

__all__ = ["OpenRun", "create_run", "open_run", "open_scratch", "open_spill_scratch"]

_log = logging.getLogger("offload")


@dataclass(frozen=True)
class OpenRun:
    """A run that is open.

    Attributes:
        store: None without a disk.
        drive_speeds: what was measured of its drives, by directory.
    """

    store: Store | None
    drive_speeds: Mapping[str, DriveSpeed]


def open_run(options: RuntimeOptions, own: Callable[[Any], Any]) -> OpenRun | None:
    """Open the run that goes on; None where a new one begins.

    Args:
        options: of the run.
        own: takes over an engine or a store, to be closed, and returns it.

    Raises:
        StorageError: as `Store.open`.
    """
    if not options.resume:
        return None
    assert options.run_id is not None
    measured = MeasuredDrives.read(options.disk)
    engine = _open_engine(options, measured, own)
    store = own(Store.open(options.disk, engine=engine, run_id=options.run_id))
    return _opened(store, measured, "as the run was begun")


def create_run(blueprint: Blueprint, own: Callable[[Any], Any]) -> OpenRun:
    """Create a new run, without a store where there is no disk.

    Raises:
        StorageError: a directory cannot be used, or the drives have too little room.
    """
    options = blueprint.options
    if not options.disk:
        return OpenRun(None, {})
    measured = MeasuredDrives.read(options.disk)
    weights, reason = choose_weights(measured)
    store = own(
        Store.create(
            options.disk,
            store_records(blueprint.records),
            engine=_open_engine(options, measured, own),
            run_id=options.run_id,
            chunk_nbytes=options.chunk_nbytes or options.record_format.store_chunk_nbytes,
            weights=weights,
            identity=run_identity(blueprint.model, options, blueprint.records),
            room_for_snapshot=options.room_for_snapshot,
            in_place=not options.commit,
        )
    )
    return _opened(store, measured, reason)


def _open_engine(options: RuntimeOptions, measured: MeasuredDrives, own: Callable[[Any], Any]) -> Any:
    setting = choose_io_setting(options, measured)
    return own(
        open_engine(options.io_engine, queue_depth=setting.queue_depth, segment_nbytes=setting.segment_nbytes)
    )


def _opened(store: Store, measured: MeasuredDrives, reason: str) -> OpenRun:
    log_stripes([meter.load() for meter in store.meters], measured.speeds(), reason)
    if store.in_place:
        _log.warning(
            "commit is off: run %s is written in place, and a crash, a kill or a power cut loses it; it can"
            " be resumed only where it ends in order",
            store.run_id,
        )
    return OpenRun(store, measured.speeds())


def open_scratch(
    blueprint: Blueprint, plan: MemoryPlan, store: Store | None, own: Callable[[Any], Any]
) -> Scratch | None:
    """Reserve room on the drives for the gradients that the plan parks there; None when it parks none.

    Raises:
        StorageError: the drives have too little room.
    """
    if not plan.parked_on_disk:
        return None
    options = blueprint.options
    layout = PartLayout(options.chunk_numel, options.torch_gradient_dtype.itemsize)
    specs = [
        RecordSpec(owner, layout.record_nbytes(blueprint.records[owner].layout.trainable_numel))
        for owner in plan.parked_on_disk
    ]
    return _make_scratch(options, specs, layout.chunk_nbytes, "raise host_memory", store, own)


def open_spill_scratch(
    options: RuntimeOptions, store: Store | None, own: Callable[[Any], Any]
) -> Scratch | None:
    """Reserve room on the drives for saved inputs; None when the options ask for none.

    Raises:
        StorageError: the drives have too little room.
    """
    if not options.activations_disk_nbytes:
        return None
    room = Spill.record(options.activations_disk_nbytes)
    knob = "lower activations_disk_nbytes"
    return _make_scratch(options, [room], chunk_nbytes_of(room.nbytes), knob, store, own)


def _make_scratch(
    options: RuntimeOptions,
    specs: list[RecordSpec],
    chunk_nbytes: int,
    knob: str,
    store: Store | None,
    own: Callable[[Any], Any],
) -> Scratch:
    assert store is not None, "only a run with drives asks for a scratch area"
    # A run that goes on has its snapshot, or is told when it takes one, before its first step.
    room_for_snapshot = options.room_for_snapshot and not options.resume
    try:
        scratch = store.scratch(
            specs, chunk_nbytes=chunk_nbytes, room_for_snapshot=room_for_snapshot, knob=knob
        )
    except StorageError:
        if not options.resume:
            # Nothing was written into the run: it goes again, as when its own room is not there.
            store.close()
            remove_run(options.disk, store.run_id)
        raise
    own(scratch)
    return scratch
