"""What a plan is asked for: a machine, budgets, a batch, and what is decided already. No behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from ..codec import RecordFormat
from ..errors import ConfigError
from ..machine import Machine
from ..runtime.options import ComputeDType
from ..sizes import MIB, align_down, format_bytes
from ..specs import MomentDType, RecordDType, Tier

__all__ = ["Question", "default_budgets"]

# Of the host's memory that a run may have when the user does not say: the rest is Python's, torch's and the
# page cache's. Of the device's, as in `offload finetune`: a tenth is left to what torch allocates by itself.
HOST_SHARE = 0.85
DEVICE_SHARE = 0.9
# Without a GPU both budgets are host memory, as in `offload finetune`.
CPU_HOST_SHARE = 0.5
CPU_DEVICE_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Question:
    """See the module.

    Attributes:
        machine: measured or described.
        host_memory: budget of host memory in bytes.
        device_memory: budget of the device in bytes, torch's temporaries included.
        batch: rows that one optimizer step learns from.
        length: tokens of a row.
        home: where records are to rest; None leaves it to the plan.
        host_cache: bytes of host memory for records whose home is the disk; None takes what a plan leaves.
        rows: of a micro-batch; None leaves it to the plan.
        dtype: of weights records.
        moments: of AdamW.
        compute_dtype: None for bfloat16 on a GPU, float32 without.
        max_grad_norm: None does not clip, so gradients need not be parked.
        gradient_dtype: of parked gradients.
        save_steps: between commits; None for 1 where all records are on disk, else 100, as in `offload
            finetune`.
        commit: False keeps mutable records once on the drives, and a crash loses the run.
        flops_per_s: that the device sustains; None takes the machine's.
        tbw_nbytes: bytes that a drive is rated to take in its life; None says nothing of wear.
        activations_nbytes: host bytes for saved inputs; None leaves it to the plan.
        snapshots: whether the run takes snapshots, which need room beside it.
        room_nbytes: free on each drive, in the machine's order; None where nobody knows.
    """

    machine: Machine
    host_memory: int
    device_memory: int
    batch: int = 16
    length: int = 1024
    home: Tier | None = None
    host_cache: int | None = None
    rows: int | None = None
    dtype: RecordDType = "bfloat16"
    moments: MomentDType = "float32"
    compute_dtype: ComputeDType | None = None
    max_grad_norm: float | None = None
    gradient_dtype: ComputeDType | None = None
    save_steps: int | None = None
    commit: bool = True
    flops_per_s: float | None = None
    tbw_nbytes: int | None = None
    activations_nbytes: int | None = None
    snapshots: bool = False
    room_nbytes: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "length", "host_memory", "device_memory"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.rows is not None and not 0 < self.rows <= self.batch:
            raise ConfigError(f"rows must be 1 to {self.batch}, the rows of a step, got {self.rows}")
        if self.host_cache is not None and self.host_cache < 0:
            raise ConfigError(f"host_cache must not be negative, got {self.host_cache}")
        # Raises for a format that cannot be.
        RecordFormat(self.dtype, moments=self.moments)
        if self.home is Tier.DISK and not self.machine.drives:
            raise ConfigError(
                "home is the disk, and the machine has no drive: measure one with 'offload bench'"
            )
        if not self.commit and not self.machine.drives:
            raise ConfigError("commit: off is for a run on drives, and the machine has none")
        if self.machine.device is not None and self.device_memory > self.machine.device.memory_nbytes:
            raise ConfigError(
                f"device_memory is {format_bytes(self.device_memory)} and {self.machine.device.name} has"
                f" {format_bytes(self.machine.device.memory_nbytes)}: lower it"
            )
        if self.host_memory > self.machine.memory_nbytes:
            raise ConfigError(
                f"host_memory is {format_bytes(self.host_memory)} and the machine has"
                f" {format_bytes(self.machine.memory_nbytes)}: lower it, or ask --what-if host=SIZE"
            )

    @property
    def tokens(self) -> int:
        """Tokens that one optimizer step learns from."""
        return self.batch * self.length

    @property
    def compute(self) -> ComputeDType:
        """The compute dtype in force."""
        return self.compute_dtype or ("float32" if self.machine.device is None else "bfloat16")

    @property
    def speed(self) -> float | None:
        """Operations per second of the device, None when nobody knows."""
        if self.flops_per_s is not None:
            return self.flops_per_s
        known = self.machine.device or self.machine.processor
        return None if known is None else known.flops_per_s


def default_budgets(machine: Machine) -> tuple[int, int]:
    """Return the budgets of host and device memory that a run gets when the user does not say."""
    if machine.device is None:
        return _share(machine.memory_nbytes, CPU_HOST_SHARE), _share(machine.memory_nbytes, CPU_DEVICE_SHARE)
    return _share(machine.memory_nbytes, HOST_SHARE), _share(machine.device.memory_nbytes, DEVICE_SHARE)


def _share(nbytes: int, share: float) -> int:
    return max(MIB, align_down(int(nbytes * share), MIB))
