"""Lays one choice of home, formats and rows out on a machine: a plan, or what it lacks. Pure.

The cut into units is chosen as `offload.attach` chooses it, and its memory laid out by the runtime's own
`plan_memory`, so what fits here fits there. Two things come on top that the runtime finds out by running:
the saved inputs of the whole batch, and torch's temporaries on the device. Room for the first is asked for
(`activations_nbytes`), so that a run takes what its plan says, and on the drives (`activations_disk_nbytes`)
where no budget of host memory with that much fits; the second is kept off the device budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..device.cuda_staging import STAGING_NBYTES
from ..errors import CapacityError
from ..runtime.memory import memory_request
from ..runtime.options import RuntimeOptions
from ..sizes import GIB, MIB, align_down, align_up, format_bytes
from ..specs import MEMORY_SAVE_STEPS, MomentDType, Tier
from ..store.records import num_extents
from ..tiers.gradient_homes import PartLayout
from ..tiers.memory_plan import MemoryPlan
from ..tiers.memory_planning import plan_memory, smallest_plan
from ..tiers.memory_request import MemoryRequest
from ..tiers.records import RecordSet, record_sets, store_records
from .inputs import saved_inputs
from .model import ModelFacts
from .plan import Lack, TrainingPlan
from .question import Question
from .times import drive_shares, link_times, step_seconds
from .traffic import step_traffic
from .work import step_flops, temporaries_nbytes

__all__ = ["Choice", "lay_out", "row_choices"]

# A cache of less than this share of the state saves less than it costs: commits are further apart with one.
LEAST_CACHED_SHARE = 0.05
# Where there is room, saved inputs get an eighth more than what the units hand to each other: a model may
# pass something else as well, a mask say.
_SPARE = 8


@dataclass(frozen=True, slots=True)
class Choice:
    """What is chosen for a run.

    Attributes:
        home: where records rest.
        moments: how AdamW's moments are stored.
        rows: of a micro-batch; None computes the whole batch at once.
    """

    home: Tier
    moments: MomentDType
    rows: int | None


def row_choices(question: Question) -> tuple[int | None, ...]:
    """Return the micro-batches worth trying, the largest first: the device works best on many rows.

    Those that the user left open are the batch at once, and what divides it: a loop asks for whole ones.
    """
    if question.rows is not None:
        return (None,) if question.rows == question.batch else (question.rows,)
    return (None, *(rows for rows in range(question.batch // 2, 0, -1) if question.batch % rows == 0))


def lay_out(question: Question, model: ModelFacts, choice: Choice) -> TrainingPlan | Lack:
    """Return the plan of a choice, or the first tier that is too small for it."""
    options = _options(question, choice)
    lacks = []
    for cut in model.cuts:
        setup = _Setup(question, cut, choice, options)
        lack = _lack_of_memory(setup)
        if lack is None:
            break
        lacks.append(lack)
    else:
        # A finer cut may lack another tier: what opened layers keep between their parts is on the device.
        alike = (lack for lack in lacks if lack.tier is lacks[0].tier)
        return min(alike, key=lambda lack: lack.missing_nbytes)
    lack = _lack_of_room(setup, None)
    if lack is not None:
        return lack
    memory = _plan(setup)
    cache_nbytes = _spare_nbytes(setup, memory)
    if cache_nbytes:
        setup = _Setup(question, setup.model, choice, _options(question, choice, cache_nbytes))
        memory = _plan(setup)
    lack = _lack_of_room(setup, memory)
    if lack is not None:
        return lack
    options = replace(
        setup.options,
        activations_nbytes=memory.activations_nbytes,
        activations_disk_nbytes=setup.saved.disk_room_nbytes(memory.activations_nbytes),
    )
    return _finish(setup, options, memory)


class _Setup:
    """Figures of a choice that several steps need."""

    def __init__(
        self, question: Question, model: ModelFacts, choice: Choice, options: RuntimeOptions
    ) -> None:
        self.question = question
        self.model = model
        self.options = options
        self.records = record_sets(
            (unit.layout for unit in model.units), options.record_format, options.torch_compute_dtype
        )
        self.schedule = model.schedule(wraps=not options.parks)
        itemsize = options.torch_compute_dtype.itemsize
        self.saved = saved_inputs(model, question.batch, question.length, itemsize)
        rows = choice.rows or question.batch
        # Those of a chunk are in the runtime's own plan.
        self.full_logits = model.loss_head is None or options.loss_chunk_nbytes is None
        self.temporaries_nbytes = temporaries_nbytes(
            model, question.batch, rows, question.length, itemsize, full_logits=self.full_logits
        )
        # A GPU's copies that change the dtype pass through buffers of their own.
        self.staging_nbytes = 0 if question.machine.device is None else 2 * STAGING_NBYTES

    def memory_request(self, activations_nbytes: int) -> MemoryRequest:
        """Return what the runtime asks its memory plan for, with so much for saved inputs."""
        return memory_request(
            self.options,
            self.schedule,
            self.records,
            self.model.trains,
            activations_nbytes,
            self.model.loss_head,
        )

    @property
    def arena_limit_nbytes(self) -> int:
        """What is left of the device budget for the runtime's slots and the largest gradient."""
        left = self.question.device_memory - self.staging_nbytes - self.temporaries_nbytes
        return align_down(left, MIB)


def _options(question: Question, choice: Choice, cache_nbytes: int | None = None) -> RuntimeOptions:
    """Return how a run of that choice is attached, with a cache of its own size or the one asked for."""
    if cache_nbytes is None:
        cache_nbytes = (question.host_cache or 0) if choice.home is Tier.DISK else 0
    apart = 1 if choice.home is Tier.DISK and not cache_nbytes else MEMORY_SAVE_STEPS
    return RuntimeOptions(
        disk=tuple(drive.path for drive in question.machine.drives),
        home=choice.home,
        host_memory=question.host_memory,
        host_cache_nbytes=cache_nbytes,
        device_memory=question.device_memory,
        device="cpu" if question.machine.device is None else "cuda",
        dtype=question.dtype,
        moments=choice.moments,
        compute_dtype=question.compute,
        rows=choice.rows,
        max_grad_norm=question.max_grad_norm,
        gradient_dtype=question.gradient_dtype,
        save_steps=question.save_steps or apart,
        commit=question.commit,
    )


def _plan(setup: _Setup) -> MemoryPlan:
    """Return the memory that the runtime lays out when it is told of the saved inputs."""
    asked_nbytes = setup.question.activations_nbytes
    exact = _plan_memory(setup, asked_nbytes or setup.saved.nbytes)
    if exact is None:
        # What is left of the host budget keeps as many of them as it can.
        filled = _plan_memory(setup, setup.saved.least_nbytes, fill=True)
        assert filled is not None, "the smallest plan fits"
        exact = _plan_memory(setup, filled.activations_nbytes)
        assert exact is not None, "what was filled fits as asked for"
        return exact
    if asked_nbytes is not None:
        return exact
    spare = _plan_memory(setup, setup.saved.nbytes + setup.saved.nbytes // _SPARE)
    if spare is None or (spare.window, spare.parked_disk_nbytes) != (exact.window, exact.parked_disk_nbytes):
        return exact
    return spare


def _spare_nbytes(setup: _Setup, memory: MemoryPlan) -> int:
    """Return the host memory that a plan without a cache leaves, where the size of one was not asked for."""
    if memory.home is not Tier.DISK or setup.question.host_cache is not None:
        return 0
    left = setup.question.host_memory - memory.host_nbytes
    least = LEAST_CACHED_SHARE * sum(_resident(setup.records).values())
    # The runtime rounds the saved inputs up to a page; and people read whole MiB.
    return align_down(left - 4096, MIB if left >= GIB else 4096) if left > least else 0


def _plan_memory(setup: _Setup, activations_nbytes: int, *, fill: bool = False) -> MemoryPlan | None:
    try:
        return plan_memory(
            setup.memory_request(activations_nbytes),
            host_limit_nbytes=setup.question.host_memory,
            device_limit_nbytes=setup.arena_limit_nbytes,
            fill_activations=fill,
        )
    except CapacityError:
        return None


def _finish(setup: _Setup, options: RuntimeOptions, memory: MemoryPlan) -> TrainingPlan:
    question, model = setup.question, setup.model
    traffic = step_traffic(setup.schedule, setup.records, model.trains, options, memory, setup.saved)
    flops = step_flops(model, question.batch, question.length)
    links = link_times(question.machine, traffic, flops, question.speed, options.moments)
    step_s, bottleneck = step_seconds(links, commits_apart=memory.home is not Tier.DISK)
    written = traffic.disk_written_nbytes
    steps = None
    if question.tbw_nbytes is not None and written:
        steps = question.tbw_nbytes / (written * max(drive_shares(question.machine)))
    return TrainingPlan(
        # The runtime gets what is left beside the temporaries, and so lays out the same memory.
        options=replace(options, device_memory=setup.arena_limit_nbytes + setup.staging_nbytes),
        memory=memory,
        batch=question.batch,
        length=question.length,
        units=model.units,
        num_parameters=model.num_parameters,
        traffic=traffic,
        links=links,
        step_s=step_s,
        bottleneck=bottleneck,
        host_nbytes=memory.host_nbytes,
        device_nbytes=memory.device_nbytes
        + memory.device_reserve_nbytes
        + setup.staging_nbytes
        + setup.temporaries_nbytes,
        temporaries_nbytes=setup.temporaries_nbytes,
        uncached_nbytes=sum(_resident(setup.records).values()) - memory.host_resident_nbytes,
        drives_nbytes=_drives_nbytes(setup, memory),
        snapshot_nbytes=max(_snapshots_nbytes(setup), default=0),
        step_written_nbytes=written,
        steps_to_tbw=steps,
        notes=_notes(setup, options),
    )


def _notes(setup: _Setup, options: RuntimeOptions) -> tuple[str, ...]:
    notes = []
    question = setup.question
    if question.speed is None:
        notes.append(
            "nothing is known of how fast the device computes, so the time is that of the links alone: give"
            " --tflops"
        )
    if question.machine.memory_bytes_per_s is None:
        notes.append(
            "the speed of host memory is not known, so neither it nor AdamW is in the time: measure it with"
            " 'offload bench'"
        )
    if options.activations_disk_nbytes:
        notes.append(
            f"saved inputs need {format_bytes(setup.saved.nbytes)}, more than host memory holds of them: the"
            f" first go to disk, activations_disk_nbytes={options.activations_disk_nbytes}"
        )
    if setup.model.between_width:
        notes.append(
            "layers are cut into parts to fit the device, so some activations of each stay on it from forward"
            " to backward: rows of a step cost more there"
        )
    limit = setup.model.max_positions
    if limit is not None and question.length > limit:
        notes.append(f"rows of {question.length} tokens are longer than the model's {limit} positions")
    return tuple(notes)


# -- what is lacking -----------------------------------------------------------------------------


def _lack_of_memory(setup: _Setup) -> Lack | None:
    asked = setup.question.activations_nbytes
    if asked is not None and asked < setup.saved.nbytes and not setup.options.disk:
        return Lack(
            Tier.HOST, setup.saved.nbytes, asked, "activations_nbytes is for the inputs that a batch saves"
        )
    least = smallest_plan(setup.memory_request(asked or setup.saved.nbytes))
    if least.host_nbytes > setup.question.host_memory and setup.options.disk and asked is None:
        least = smallest_plan(setup.memory_request(setup.saved.least_nbytes))
    device = least.device_nbytes + least.device_reserve_nbytes
    if device > setup.arena_limit_nbytes:
        # Rounded as `arena_limit_nbytes` is, which would lose a part of a MiB otherwise.
        needed = align_up(align_up(device, MIB) + setup.staging_nbytes + setup.temporaries_nbytes, MIB)
        return Lack(Tier.DEVICE, needed, setup.question.device_memory, _device_reason(setup))
    if least.host_nbytes > setup.question.host_memory:
        return Lack(Tier.HOST, least.host_nbytes, setup.question.host_memory, _host_reason(setup))
    return None


def _lack_of_room(setup: _Setup, memory: MemoryPlan | None) -> Lack | None:
    rooms = setup.question.room_nbytes
    snapshots = _snapshots_nbytes(setup)
    lacking = [
        (needed + snapshot, room)
        for needed, snapshot, room in zip(_drives_nbytes(setup, memory), snapshots, rooms, strict=False)
        if room is not None and needed + snapshot > room
    ]
    if not lacking:
        return None
    needed, limit = max(lacking, key=lambda pair: pair[0] - pair[1])
    kept = "every mutable record twice, so that a commit never overwrites the one before"
    if not setup.options.commit:
        kept = "every record once, since commit is off"
    if memory is not None and (room := setup.saved.disk_room_nbytes(memory.activations_nbytes)):
        kept += f"; {format_bytes(room)} for saved inputs that host memory does not hold"
    if any(snapshots):
        kept += f", and {format_bytes(max(snapshots))} for a snapshot"
    return Lack(Tier.DISK, needed, limit, kept)


def _drives_nbytes(setup: _Setup, memory: MemoryPlan | None) -> tuple[int, ...]:
    """Return what the state takes on each drive, and what `memory` sends there; without the manifests."""
    if not setup.options.disk:
        return ()
    in_place = not setup.options.commit
    nbytes = sum(spec.nbytes * num_extents(spec, in_place=in_place) for spec in store_records(setup.records))
    if memory is not None:
        layout = PartLayout(setup.options.chunk_numel, setup.options.torch_gradient_dtype.itemsize)
        numel = {owner: setup.records[owner].layout.trainable_numel for owner in memory.parked_on_disk}
        nbytes += sum(layout.record_nbytes(count) for count in numel.values())
        nbytes += setup.saved.disk_room_nbytes(memory.activations_nbytes)
    return tuple(math.ceil(nbytes * share) for share in drive_shares(setup.question.machine))


def _snapshots_nbytes(setup: _Setup) -> tuple[int, ...]:
    """Return what a snapshot takes on each drive: what a step changes, once more; 0 when none is taken."""
    if not setup.options.disk:
        return ()
    mutable = sum(spec.nbytes for spec in store_records(setup.records) if spec.mutable)
    nbytes = mutable if setup.question.snapshots else 0
    return tuple(math.ceil(nbytes * share) for share in drive_shares(setup.question.machine))


def _host_reason(setup: _Setup) -> str:
    inputs = setup.saved.least_nbytes if setup.options.disk else setup.saved.nbytes
    saved = f"of them {format_bytes(inputs)} for the inputs that the batch saves"
    if setup.options.resolved_home is Tier.DISK:
        cache = setup.options.host_cache_nbytes
        kept = f"{format_bytes(cache)} for records kept there, " if cache else ""
        return f"{kept}buffers for weights, gradients and optimizer chunks on their way; {saved}"
    resident = sum(_resident(setup.records).values())
    return f"of them {format_bytes(resident)} for records at home there; {saved}"


def _resident(records: Mapping[str, RecordSet]) -> dict[str, int]:
    return {owner: unit.host_nbytes + unit.optimizer_nbytes for owner, unit in records.items()}


def _device_reason(setup: _Setup) -> str:
    batch, chunk = " and the logits of the batch", ""
    if not setup.full_logits:
        batch, chunk = "", ", and the logits of a chunk"
    return (
        f"of them about {format_bytes(setup.temporaries_nbytes)} for activations{batch}; the rest for weights"
        f" and gradients of the units at work{chunk}"
    )
