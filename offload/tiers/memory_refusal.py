"""Says why not even the smallest memory plan fits: the bytes of each part, and the knobs. Pure."""

from __future__ import annotations

from ..sizes import format_bytes
from .memory_plan import MemoryPlan

__all__ = ["refusal_text"]


def refusal_text(plan: MemoryPlan, host_limit_nbytes: int, device_limit_nbytes: int) -> str:
    """Return why `plan`, the smallest, does not fit the budgets of host and device memory."""
    host = {
        "weights": sum(plan.host_weights),
        "weights under update": sum(plan.host_updates),
        "gradients": sum(plan.host_gradients) - plan.parked_nbytes,
        "parked gradients": plan.parked_nbytes,
        "gradients on their way to disk and back": sum((*plan.gradient_ring, *plan.gradient_parts)),
        "optimizer chunks": sum(plan.staging),
        "resident records": plan.host_resident_nbytes - plan.host_cache_nbytes,
        "cached records": plan.host_cache_nbytes,
        "saved inputs": plan.activations_nbytes,
    }
    device = {
        "weights": sum(plan.device_weights),
        "gradients": sum(plan.device_gradients),
        "temporaries": plan.device_reserve_nbytes,
    }
    lines = ["the smallest plan does not fit:"]
    tiers = (("host_memory", host, host_limit_nbytes), ("device_memory", device, device_limit_nbytes))
    for knob, parts, limit in tiers:
        needed = sum(parts.values())
        if needed > limit:
            listing = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in parts.items() if nbytes)
            lines.append(
                f"  {knob}: needs {format_bytes(needed)} ({listing}), the budget is {format_bytes(limit)};"
                f" set {knob} to at least {needed} bytes"
            )
    if sum(host.values()) > host_limit_nbytes and (plan.parked_nbytes or plan.parked_on_disk):
        lines.append(_refusal_of_parking(plan))
    if sum(host.values()) > host_limit_nbytes and plan.host_cache_nbytes:
        lines.append(
            f"  of these, {plan.host_cache_nbytes} bytes are records kept in host memory as a cache: lower"
            " host_cache_nbytes"
        )
    return "\n".join(lines)


def _refusal_of_parking(plan: MemoryPlan) -> str:
    knobs = (
        "max_grad_norm=None and park_gradients=False need none, gradient_dtype='bfloat16' needs 2 bytes"
        " per trainable parameter"
    )
    if plan.parked_on_disk:
        return (
            f"  all {plan.parked_disk_nbytes} bytes of gradients kept until the step ends are on disk in this"
            f" plan, and pass through {sum((*plan.gradient_ring, *plan.gradient_parts))} of these bytes:"
            f" {knobs}"
        )
    return f"  of these, {plan.parked_nbytes} bytes are gradients kept until the step ends: {knobs}"
