"""A plan as JSON, for other programs. Versioned: a key keeps its meaning while `format` does. Pure."""

from __future__ import annotations

import json
from typing import Any

from .plan import Lack, TrainingPlan
from .search import Answer

__all__ = ["FORMAT", "to_document", "to_json"]

FORMAT = "offload-plan-1"


def to_json(answer: Answer) -> str:
    """Return the answer as indented JSON with a newline; see `to_document`."""
    return json.dumps(to_document(answer), indent=2, ensure_ascii=True) + "\n"


def to_document(answer: Answer) -> dict[str, Any]:
    """Return the answer as plain values: sizes in bytes, times in seconds, `plan` null when none fits."""
    question, model = answer.question, answer.model
    return {
        "format": FORMAT,
        "model": {"name": model.name, "num_parameters": model.num_parameters, "num_units": len(model.units)},
        "machine": {"cpu": question.machine.cpu, "measured_at": question.machine.measured_at},
        "question": {
            "host_memory": question.host_memory,
            "device_memory": question.device_memory,
            "batch": question.batch,
            "length": question.length,
            "home": None if question.home is None else question.home.value,
            "host_cache": question.host_cache,
            "moments": question.moments,
            "commit": question.commit,
            "flops_per_s": question.speed,
        },
        "fits_without_offload": answer.fits_without,
        "plan": None if answer.plan is None else _plan(answer.plan),
        "outcomes": [
            {
                "home": one.home.value,
                "moments": one.moments,
                **(
                    {"lacks": _lack(one.result)}
                    if isinstance(one.result, Lack)
                    else {"step_s": one.result.step_s, "tokens_per_s": one.result.tokens_per_s}
                ),
            }
            for one in answer.outcomes
        ],
        "suggestions": [
            {"what": one.what, "flags": dict(one.flags), "plan": _plan(one.plan)}
            for one in answer.suggestions
        ],
    }


def _plan(plan: TrainingPlan) -> dict[str, Any]:
    memory, traffic = plan.memory, plan.traffic
    return {
        "settings": dict(plan.settings),
        "step_s": plan.step_s,
        "tokens_per_s": plan.tokens_per_s,
        "bottleneck": plan.bottleneck,
        "links": [
            {
                "name": link.name,
                "amount": link.amount,
                "unit": link.unit,
                "seconds": link.seconds,
                "part_of": link.part_of,
            }
            for link in plan.links
        ],
        "bytes": {
            "disk_read": traffic.disk_read_nbytes,
            "disk_read_at_least": traffic.least_disk_read_nbytes,
            "disk_read_at_most": traffic.most_disk_read_nbytes,
            "disk_written": traffic.disk_written_nbytes,
            "commit": traffic.commit_nbytes,
            "to_device": traffic.to_device_nbytes,
            "to_host": traffic.to_host_nbytes,
            "update": traffic.update_nbytes,
        },
        "peaks": {
            "host": plan.host_nbytes,
            "device": plan.device_nbytes,
            "device_temporaries_estimate": plan.temporaries_nbytes,
            "each_drive": plan.drive_nbytes,
            "drives": list(plan.drives_nbytes),
            "each_drive_snapshot": plan.snapshot_nbytes,
        },
        "memory": {
            "window": memory.window,
            "updates_in_flight": memory.updates_in_flight,
            "staging_slots": len(memory.staging),
            "parked_in_host_memory": memory.parked_nbytes,
            "parked_on_disk": memory.parked_disk_nbytes,
            "host_cache": memory.host_cache_nbytes,
            "saved_inputs": traffic.saved_inputs_nbytes,
            "saved_inputs_on_disk": traffic.spilled_nbytes,
        },
        "step_written": plan.step_written_nbytes,
        "steps_to_tbw": plan.steps_to_tbw,
        "notes": list(plan.notes),
    }


def _lack(lack: Lack) -> dict[str, Any]:
    return {
        "tier": lack.tier.value,
        "needed": lack.needed_nbytes,
        "limit": lack.limit_nbytes,
        "missing": lack.missing_nbytes,
        "reason": lack.reason,
    }
