"""What a user chooses about a run, checked at construction. No behaviour."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..aio import EngineName
from ..codec import RecordFormat
from ..errors import ConfigError
from ..optim import AdamWOptions
from ..sizes import GIB, MIB, format_bytes, parse_bytes
from ..specs import MomentDType, RecordDType, Tier

__all__ = [
    "ComputeDType",
    "OnNonFinite",
    "RuntimeOptions",
    "is_queue_depth",
    "is_segment_size",
]

ComputeDType = Literal["float32", "bfloat16"]

# What becomes of a run when a loss or gradient is NaN or infinite.
OnNonFinite = Literal["skip", "rollback", "stop"]

# Options that may be given as text, `"8GiB"`.
SIZES = (
    "host_memory",
    "device_memory",
    "host_cache_nbytes",
    "chunk_nbytes",
    "activations_nbytes",
    "activations_disk_nbytes",
    "segment_nbytes",
    "loss_chunk_nbytes",
)

# What every I/O engine takes.
MAX_QUEUE_DEPTH = 4096
MAX_SEGMENT_NBYTES = GIB


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """How a model is attached.

    Attributes:
        disk: directories on the drives that hold the state, one a drive. Empty: no disk, and nothing
            survives the process.
        home: where records rest between uses: `DISK` where there is one, `HOST`, or `DEVICE`
            (weights on the device, optimizer records in host memory). With a disk and another home,
            commits write what changed to the disk.
        host_memory: budget in bytes for all host buffers.
        host_cache_nbytes: of `host_memory`, bytes for records whose home is the disk, to be neither read nor
            written in a step; commits write them. The records that save most bytes come first, a part of the
            optimizer records last. It changes no result, and may be another one on a resume. 0 keeps none.
        device_memory: budget in bytes for all device buffers, activations included.
        device: `cpu` (a stand-in with a budget of its own), `cuda`, `cuda:1`; None takes CUDA if
            there is one.
        dtype: how trainable weights are stored. `bfloat16` keeps exact fp32 masters too, as high
            halves and residuals; the forward then computes with the high halves. `float32` computes
            with the masters themselves.
        moments: how AdamW's moments are stored: `float32`, or `8bit` for 2 bytes a parameter in place of
            8. The weights stay exact; the moments are rounded at random, right on average.
        compute_dtype: what units compute in. `float32` by default: many CPUs have no bf16 arithmetic.
        rows: rows of a micro-batch inside a unit; None runs a step's batch at once.
        max_grad_norm: clip gradients by their exact global norm, as torch's `clip_grad_norm_` does. None
            does not clip, and needs no room for parked gradients. Infinity only measures the norm.
            Gradients are parked in host memory as far as `host_memory` goes, the others on disk.
        park_gradients: keep a step's gradients until `step()`, as `max_grad_norm` does: for several
            backwards before a step, and for `Runtime.clip_grad_norm_`. They are summed in fp32.
        gradient_dtype: of parked gradients. None is the dtype they are summed in: 4 bytes per trainable
            parameter, or 2 when units compute in bf16 and nothing is summed. `bfloat16` rounds them.
        on_non_finite: `stop` raises when a loss or gradient is not finite; `skip` goes on with the next
            batch; `rollback` does so as well, and restores the newest snapshot where `skip` would stop.
            Nothing of such a step is kept either way.
        max_non_finite_steps: with `skip` and `rollback`, how many such steps in a row are too many.
        max_rollbacks: how often a run may go back to a snapshot before it stops after all.
        room_for_snapshot: refuse to begin a run when its drives have no room for a snapshot beside it, before
            anything is written. The room is not reserved.
        optimizer: AdamW's settings. Its `num_threads` is half of torch's number when None, since the
            other half computes meanwhile.
        run_id: the run to create or resume; a new one when None.
        resume: open the newest committed generation of `run_id` instead of creating the run.
        commit: False writes every record in place: half the room on the drives for what a step changes, and
            a crash, a kill or a power cut loses the run. It is committed where the loop says so
            (`Runtime.commit`, leaving the `with` block in order), whatever `save_steps` is, and a run that
            ended there can be resumed. No snapshots, and no going back.
        save_steps: steps between commits. With everything on disk a commit costs milliseconds.
        io_engine: `uring`, `threads` or `portable`; None takes the first that works.
        queue_depth: I/O segments in flight on each drive, 1 to 4096. None takes what `offload bench`
            measured best for the drives of `disk` (`machine.json`), else 32.
        segment_nbytes: the most bytes of one I/O operation, a multiple of 4096. None as with
            `queue_depth`, else 1 MiB.
        chunk_nbytes: bytes of a store chunk, the unit of striping and checksums. An optimizer chunk must
            be a whole number of them; None takes what is nearest to 4 MiB.
        chunk_numel: elements of an optimizer chunk, the unit of an update's pipeline.
        activations_nbytes: host bytes for saved unit inputs; None takes what the slots leave of the
            budget, at least 16 MiB, and an eighth of it where gradients are parked on disk.
        activations_disk_nbytes: room on the drives for saved inputs that host memory does not hold, reserved
            before the first step. 0 keeps them in host memory. They are written and read once each in a step.
        loss_chunk_nbytes: where a Hugging Face model computes its own loss (`labels`), head and loss run in
            chunks of tokens whose logits take so many bytes of the device, and at most 1,024 tokens. None
            computes the logits of the whole batch at once. Other values give other sums, by their rounding.
    """

    disk: Sequence[Path | str] = ()
    home: Tier | None = None
    host_memory: int = 8 * GIB
    host_cache_nbytes: int = 0
    device_memory: int = 8 * GIB
    device: str | None = None
    dtype: RecordDType = "bfloat16"
    moments: MomentDType = "float32"
    compute_dtype: ComputeDType = "float32"
    rows: int | None = None
    max_grad_norm: float | None = None
    park_gradients: bool = False
    gradient_dtype: ComputeDType | None = None
    on_non_finite: OnNonFinite = "stop"
    max_non_finite_steps: int = 3
    max_rollbacks: int = 3
    room_for_snapshot: bool = False
    optimizer: AdamWOptions = field(default_factory=AdamWOptions)
    run_id: str | None = None
    resume: bool = False
    commit: bool = True
    save_steps: int = 1
    io_engine: EngineName | None = None
    queue_depth: int | None = None
    segment_nbytes: int | None = None
    chunk_nbytes: int | None = None
    chunk_numel: int = 1 << 21
    activations_nbytes: int | None = None
    activations_disk_nbytes: int = 0
    loss_chunk_nbytes: int | None = 64 * MIB

    def __post_init__(self) -> None:
        if self.home is Tier.DISK and not self.disk:
            raise ConfigError("home is the disk, but no directory was given: set disk=[...]")
        if self.resume and (not self.disk or self.run_id is None):
            raise ConfigError("resume needs the run's id and its directories: set run_id and disk")
        for name in ("host_memory", "device_memory", "save_steps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        self._check_cache()
        if self.queue_depth is not None and not is_queue_depth(self.queue_depth):
            raise ConfigError(f"queue_depth must be 1 to {MAX_QUEUE_DEPTH} or None, got {self.queue_depth}")
        if self.segment_nbytes is not None and not is_segment_size(self.segment_nbytes):
            raise ConfigError(
                f"segment_nbytes must be a multiple of 4096 up to {format_bytes(MAX_SEGMENT_NBYTES)} or None,"
                f" got {self.segment_nbytes}"
            )
        if self.activations_disk_nbytes < 0:
            raise ConfigError(
                f"activations_disk_nbytes cannot be negative, got {self.activations_disk_nbytes}"
            )
        if self.activations_disk_nbytes and not self.disk:
            raise ConfigError("activations_disk_nbytes is room on drives, and none was given: set disk=[...]")
        if self.rows is not None and self.rows <= 0:
            raise ConfigError(f"rows must be positive or None, got {self.rows}")
        if self.loss_chunk_nbytes is not None and self.loss_chunk_nbytes <= 0:
            raise ConfigError(f"loss_chunk_nbytes must be positive or None, got {self.loss_chunk_nbytes}")
        self._check_commit()
        self._check_gradients()
        self._check_chunks()

    def _check_commit(self) -> None:
        if type(self.commit) is not bool:
            raise ConfigError(f"commit must be True or False, got {self.commit!r:.40}")
        if self.commit:
            return
        if not self.disk:
            raise ConfigError("commit=False is for a run on drives, and none was given: set disk=[...]")
        if self.on_non_finite == "rollback":
            raise ConfigError(
                "on_non_finite='rollback' goes back to a snapshot, which is copied from extents that no write"
                " goes over; with commit=False there are none: leave commit at True, or skip"
            )
        if self.room_for_snapshot:
            raise ConfigError(
                "room_for_snapshot is for snapshots, which a run with commit=False cannot take: leave commit"
                " at True"
            )

    def _check_cache(self) -> None:
        if self.host_cache_nbytes < 0:
            raise ConfigError(f"host_cache_nbytes must not be negative, got {self.host_cache_nbytes}")
        if self.host_cache_nbytes and self.resolved_home is not Tier.DISK:
            raise ConfigError(
                f"host_cache_nbytes keeps records in host memory whose home is the disk; with"
                f" home={self.resolved_home.value!r} none are there: leave it out"
            )

    def _check_chunks(self) -> None:
        # Raises for a format that cannot be.
        optimizer_chunk_nbytes = self.record_format.chunk_nbytes
        if self.chunk_nbytes is None:
            return
        if self.chunk_nbytes <= 0 or self.chunk_nbytes % 4096:
            raise ConfigError(f"chunk_nbytes must be a multiple of 4096, got {self.chunk_nbytes}")
        if optimizer_chunk_nbytes % self.chunk_nbytes:
            raise ConfigError(
                f"an optimizer chunk of {self.chunk_numel} elements ({optimizer_chunk_nbytes} bytes) is not a"
                f" whole number of store chunks of {self.chunk_nbytes} bytes: leave chunk_nbytes out, or set"
                f" it to {self.record_format.store_chunk_nbytes}"
            )

    def _check_gradients(self) -> None:
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm must be positive or None, got {self.max_grad_norm}")
        if self.gradient_dtype is not None and not self.parks:
            raise ConfigError(
                "gradient_dtype is that of parked gradients: set max_grad_norm or park_gradients with it"
            )
        if self.on_non_finite not in get_args(OnNonFinite):
            raise ConfigError(
                f"on_non_finite must be 'skip', 'rollback' or 'stop', got {self.on_non_finite!r}"
            )
        for name in ("max_non_finite_steps", "max_rollbacks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.on_non_finite == "rollback" and not self.disk:
            raise ConfigError("on_non_finite='rollback' needs a disk for its snapshots: set disk=[...]")
        if self.on_non_finite != "stop" and not (self.parks or self.rolls_back):
            raise ConfigError(
                f"on_non_finite={self.on_non_finite!r} cannot undo updates that run during backward here: set"
                " park_gradients, or give a disk and leave save_steps at 1 and commit at True"
            )

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> RuntimeOptions:
        """Return options from keyword arguments as people write them: sizes as text, tiers as words.

        Raises:
            ConfigError: an unknown name, with the nearest known one, or a value that is not one.
        """
        known = {item.name for item in fields(cls)}
        for name in settings:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ConfigError(f"attach() has no option {name!r}{hint}")
        values = dict(settings)
        try:
            for name in SIZES:
                if isinstance(values.get(name), str):
                    values[name] = parse_bytes(values[name])
            if isinstance(values.get("home"), str):
                values["home"] = Tier(values["home"])
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if isinstance(values.get("disk"), (str, Path)):
            values["disk"] = (values["disk"],)
        return cls(**values)

    @property
    def record_format(self) -> RecordFormat:
        """How the records of the run are laid out."""
        return RecordFormat(self.dtype, self.chunk_numel, self.moments)

    @property
    def resolved_home(self) -> Tier:
        """The home in force: the disk when there is one and nothing else was asked for."""
        if self.home is not None:
            return self.home
        return Tier.DISK if self.disk else Tier.DEVICE

    @property
    def parks(self) -> bool:
        """Whether gradients are kept until the step ends, instead of updating during backward."""
        return self.park_gradients or self.max_grad_norm is not None

    @property
    def rolls_back(self) -> bool:
        """Whether the state before a step can be read again when some of its updates have run."""
        return bool(self.disk) and self.commit and self.save_steps == 1

    @property
    def sums_wide(self) -> bool:
        """Whether gradients are summed in fp32 beside the compute dtype's own."""
        return (self.rows is not None or self.park_gradients) and self.compute_dtype != "float32"

    @property
    def torch_gradient_dtype(self) -> torch.dtype:
        """Dtype of gradients on the host."""
        chosen = self.gradient_dtype or ("float32" if self.sums_wide else self.compute_dtype)
        return torch.float32 if chosen == "float32" else torch.bfloat16

    @property
    def torch_compute_dtype(self) -> torch.dtype:
        """`compute_dtype` as torch names it."""
        return torch.float32 if self.compute_dtype == "float32" else torch.bfloat16


def is_queue_depth(depth: int) -> bool:
    """Return whether an I/O engine can be opened with `depth` operations in flight."""
    return 1 <= depth <= MAX_QUEUE_DEPTH


def is_segment_size(nbytes: int) -> bool:
    """Return whether an I/O engine can be opened with operations of at most `nbytes`."""
    return 0 < nbytes <= MAX_SEGMENT_NBYTES and nbytes % 4096 == 0
