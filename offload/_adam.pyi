"""The optimizer kernels (csrc/adam), over the buffer protocol.

Buffers are contiguous, hold their own element type or raw bytes, begin at a multiple of their
element size and are disjoint; they are held until the call returns. The GIL is released meanwhile.
Every instruction set and every thread count gives the same bits; a NaN is stored as 0x7FC00000.

`OFFLOAD_ADAM_ISA` (`auto`, `avx2`, `scalar`), read when the module is loaded, chooses what
`isa="auto"` means; an instruction set that the processor lacks makes the import fail.
"""

from typing import Literal

from typing_extensions import Buffer

def active_isa() -> str:
    """Return the instruction set that `isa="auto"` runs: `avx2` or `scalar`."""

def supported_isas() -> tuple[str, ...]:
    """Return what this build and processor support, best first; the last is `scalar`."""

def adamw(
    gradient: Buffer,
    weights: Buffer,
    residual: Buffer | None,
    exp_avg: Buffer,
    exp_avg_sq: Buffer,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    gradient_dtype: Literal["float32", "bfloat16"] = "float32",
    num_threads: int = 1,
    isa: str = "auto",
) -> None:
    """Apply one AdamW step to every element of the buffers, in place and in one pass.

    Args:
        gradient: n elements of `gradient_dtype`; only read.
        weights: n fp32 master weights, or n bf16 high halves when `residual` is given.
        residual: n int16: master bits = (high << 16) + residual; None for fp32 weights.
        exp_avg: n fp32; n is taken from this buffer.
        exp_avg_sq: n fp32.
        step: 1 for the first update.
        grad_scale: the gradient is multiplied with it first (unscale and clip factor).
        num_threads: threads to use, the caller's included.

    Raises:
        ValueError: a buffer is read-only, misaligned, of the wrong size or format; or a setting is
            out of range.
        RuntimeError: a thread could not be started; nothing was changed.
    """

def squared_norm(
    gradient: Buffer,
    *,
    gradient_dtype: Literal["float32", "bfloat16"] = "float32",
    num_threads: int = 1,
    isa: str = "auto",
) -> tuple[float, bool]:
    """Return the sum of squares, added in double in a fixed order, and whether all are finite.

    Raises:
        ValueError: as for `adamw`.
    """
