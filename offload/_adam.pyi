"""The optimizer kernels (csrc/adam), over the buffer protocol, and DLPack for many tensors at once.

Buffers are contiguous, hold their own element type or raw bytes, begin at a multiple of their
element size and are disjoint; they are held until the call returns. The GIL is released meanwhile.
Every instruction set and every thread count gives the same bits; a NaN is stored as 0x7FC00000.

Threads wait in a pool between calls: started when first needed, never more than the process may use
processors, joined when the interpreter exits. A forked child has its own.

`OFFLOAD_ADAM_ISA` (`auto`, `avx512`, `avx2`, `neon`, `scalar`), read when the module is loaded, chooses
what `isa="auto"` means; an instruction set that the processor lacks makes the import fail.

[Note: 8-bit moments]
A moment of n elements is n codes of a byte and ceil(n / 128) scales of two bytes (bf16): element i has
scale i // 128. For both moments that is 2 n + 4 ceil(n / 128) bytes, 2.03 per parameter. Bytes of zero
are moments of zero. csrc/adam/moments8.h defines the codes, docs/optimizer.md says why they are so.
"""

from typing import Any, Literal

from typing_extensions import Buffer

# A tensor of a library that has DLPack's C exchange interface; torch from 2.10.
Tensor = Any
# A moment: fp32, or 8-bit (codes, scales).
Moment = Tensor | tuple[Tensor, Tensor]
# gradient, weights, residual, exp_avg, exp_avg_sq, step, seed
TensorRow = tuple[Tensor, Tensor, Tensor | None, Moment, Moment, Tensor, int]
# lr, beta1, beta2, eps, weight_decay, grad_scale
GroupSettings = tuple[float, float, float, float, float, float]

GradientDType = Literal["float32", "bfloat16", "float16"]

def active_isa() -> str:
    """Return the instruction set that `isa="auto"` runs."""

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
    gradient_dtype: GradientDType = "float32",
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
        num_threads: most threads to use, the caller's included.

    Raises:
        ValueError: a buffer is read-only, misaligned, of the wrong size or format; or a setting is
            out of range.
        RuntimeError: a thread could not be started; nothing was changed.
    """

def adamw_8bit(
    gradient: Buffer,
    weights: Buffer,
    residual: Buffer | None,
    exp_avg: tuple[Buffer, Buffer],
    exp_avg_sq: tuple[Buffer, Buffer],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    seed: int = 0,
    first_element: int = 0,
    gradient_dtype: GradientDType = "float32",
    num_threads: int = 1,
    isa: str = "auto",
) -> None:
    """Apply one AdamW step with 8-bit moments, in place and in one pass; else as `adamw`.

    The new moments are rounded up or down at random, right on average. The random numbers are a hash
    of `seed`, `step` and each element's number, counted from `first_element`: one call equals several
    on parts that begin at multiples of 128.

    Args:
        exp_avg: (codes, scales), see [Note: 8-bit moments]; n is the number of codes.
        exp_avg_sq: (codes, scales).
        seed: 0 to 2^64 - 1.
        first_element: a multiple of 128.

    Raises:
        ValueError: as for `adamw`, or `first_element` is not a multiple of 128.
        RuntimeError: a thread could not be started; nothing was changed.
    """

def adamw_tensors(
    groups: list[tuple[list[TensorRow], GroupSettings]], *, num_threads: int = 1, isa: str = "auto"
) -> None:
    """Apply one AdamW step to every tensor of every group, and add one to its `step`.

    The bits are those of `adamw` or `adamw_8bit` for each tensor. Tensors are contiguous, in memory that
    the processor addresses, disjoint, and of the shape of the weights; scales have one dimension, `step`
    is one fp32 number, the updates so far. The type of a gradient is its own. All are checked before one is
    changed. They are held until the call returns, and no other thread may touch them meanwhile.

    Raises:
        ValueError: a tensor does not fit, or a setting is out of range; the message has the numbers of
            group and row. Nothing was changed.
        RuntimeError: a thread could not be started; nothing was changed.
    """

def encode_8bit(
    which: Literal["exp_avg", "exp_avg_sq"], values: Buffer, codes: Buffer, scales: Buffer
) -> None:
    """Write n fp32 values as 8-bit codes and scales, each rounded to the nearest code.

    NaNs and negative second moments become zero, magnitudes above 2^126 become that.

    Raises:
        ValueError: as for `adamw`, or there is no moment `which`.
    """

def decode_8bit(
    which: Literal["exp_avg", "exp_avg_sq"], codes: Buffer, scales: Buffer, values: Buffer
) -> None:
    """Write the n fp32 values that 8-bit codes and scales stand for, exactly.

    Raises:
        ValueError: as for `adamw`, or there is no moment `which`.
    """

def squared_norm(
    gradient: Buffer,
    *,
    gradient_dtype: GradientDType = "float32",
    num_threads: int = 1,
    isa: str = "auto",
) -> tuple[float, bool]:
    """Return the sum of squares, added in double in a fixed order, and whether all are finite.

    Raises:
        ValueError: as for `adamw`.
    """
