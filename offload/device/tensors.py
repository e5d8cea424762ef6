"""Typed 1-D tensors over leased bytes, and what the two ends of a copy must be. Nothing is copied.

Each tensor made here has an autograd version counter of its own: were they views of one arena tensor,
an upload into one slot would make autograd refuse the weights saved from every other slot.

Thread rule: pure; any thread.
"""

from __future__ import annotations

import torch

from ..buffers import Arena, Lease

__all__ = ["check_copy", "device_tensor", "host_tensor", "nbytes_of"]


def host_tensor(
    arena: Arena, lease: Lease, dtype: torch.dtype, numel: int, offset_bytes: int = 0
) -> torch.Tensor:
    """Return a 1-D tensor over bytes of a host lease; it keeps the arena's mapping alive.

    Raises:
        StateError: the lease was released, or is of another arena.
        ValueError: the tensor would not lie within the lease, or is misaligned.
    """
    _check_offset(offset_bytes, dtype)
    view = arena.view(lease, offset_bytes, numel * dtype.itemsize)
    # frombuffer refuses an empty buffer; a unit without frozen weights has an empty frozen record.
    return torch.frombuffer(view, dtype=dtype) if numel else torch.empty(0, dtype=dtype)


def device_tensor(memory: torch.Tensor, dtype: torch.dtype, numel: int, offset_bytes: int) -> torch.Tensor:
    """Return a 1-D tensor over `memory` (uint8, one arena) from `offset_bytes` on.

    Raises:
        ValueError: `offset_bytes` is not a multiple of the element size.
    """
    _check_offset(offset_bytes, dtype)
    tensor = torch.empty(0, dtype=dtype, device=memory.device)
    return tensor.set_(memory.untyped_storage(), offset_bytes // dtype.itemsize, (numel,), (1,))


def nbytes_of(tensor: torch.Tensor) -> int:
    """Return how many bytes the elements of a contiguous tensor take."""
    return tensor.numel() * tensor.element_size()


def check_copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Check that a copy between the two is one run of bytes on each side.

    Raises:
        ValueError: not 1-D, not contiguous, or not of one length.
    """
    for name, tensor in (("source", source), ("target", target)):
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"the {name} of a copy must be 1-D and contiguous, not of shape {tuple(tensor.shape)} and "
                f"strides {tensor.stride()}"
            )
    if source.numel() != target.numel():
        raise ValueError(f"a copy of {source.numel():,} elements into {target.numel():,}")


def _check_offset(offset_bytes: int, dtype: torch.dtype) -> None:
    if offset_bytes % dtype.itemsize:
        raise ValueError(
            f"offset {offset_bytes:,} is not a multiple of the {dtype.itemsize} bytes of {dtype}"
        )
