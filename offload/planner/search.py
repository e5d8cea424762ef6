"""Chooses among the plans that fit, or says what is lacking and which small change would do. Pure.

What changes no result is searched: home, windows, micro-batch rows. What changes it (the format of the
moments, the batch, clipping) stays as asked for; the other formats are laid out beside, to compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..machine import Machine
from ..sizes import GIB, align_up
from ..specs import MomentDType, Tier
from .inputs import saved_inputs
from .layout import Choice, lay_out, row_choices
from .model import ModelFacts
from .plan import Lack, TrainingPlan
from .question import CPU_HOST_SHARE, DEVICE_SHARE, HOST_SHARE, Question
from .work import temporaries_nbytes

__all__ = ["Answer", "Outcome", "Suggestion", "plan_training"]

MOMENTS: tuple[MomentDType, ...] = ("float32", "8bit")

# Plans that differ by less in time are alike: the one that wears the drives least is taken.
_ALIKE = 0.02

# What ordinary training keeps on the device for a parameter: fp32 weights, gradient and two moments; autocast
# adds a copy of the weights in bf16.
_PLAIN_NBYTES = {"float32": 16, "bfloat16": 18}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One home with one format of the moments, and what came of it.

    Attributes:
        home: where records rest.
        moments: their format.
        result: the plan with the most rows that fits, or what the one with the fewest lacks.
    """

    home: Tier
    moments: MomentDType
    result: TrainingPlan | Lack


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One change to what was asked, with which there is a plan.

    Attributes:
        what: in words.
        flags: of `offload plan`, with their values.
        plan: that comes of it.
    """

    what: str
    flags: tuple[tuple[str, str], ...]
    plan: TrainingPlan


@dataclass(frozen=True)
class Answer:
    """What there is to say to a question.

    Attributes:
        question: that was asked.
        model: it was asked of.
        plain_nbytes: what ordinary training would take on the device, one row at a time.
        plain_limit_nbytes: what the device has for it.
        plan: the one that was chosen; None when none fits.
        outcomes: every home with every format, fitting or not.
        suggestions: when none fits, the nearest that do, the smallest change first.
    """

    question: Question
    model: ModelFacts
    plain_nbytes: int
    plain_limit_nbytes: int
    plan: TrainingPlan | None
    outcomes: tuple[Outcome, ...]
    suggestions: tuple[Suggestion, ...] = ()

    @property
    def fits_without(self) -> bool:
        """Whether ordinary training fits on the device, so that nothing need be offloaded."""
        return self.plain_nbytes <= self.plain_limit_nbytes

    @property
    def refused(self) -> tuple[Outcome, ...]:
        """What was asked for and does not fit."""
        return tuple(
            one
            for one in self.outcomes
            if isinstance(one.result, Lack) and _was_asked(self.question, one.home, one.moments)
        )


def plan_training(question: Question, model: ModelFacts) -> Answer:
    """Return the fastest plan that fits what was asked, or the nearest that would."""
    outcomes = tuple(
        Outcome(home, moments, _best_rows(question, model, home, moments))
        for home in _homes(question.machine)
        for moments in dict.fromkeys((question.moments, *MOMENTS))
    )
    fitting = [
        one.result
        for one in outcomes
        if isinstance(one.result, TrainingPlan) and _was_asked(question, one.home, one.moments)
    ]
    plan = _choose(fitting)
    limit = question.device_memory + (question.host_memory if question.machine.device is None else 0)
    return Answer(
        question=question,
        model=model,
        plain_nbytes=_plain_nbytes(question, model),
        plain_limit_nbytes=limit,
        plan=plan,
        outcomes=outcomes,
        suggestions=() if plan is not None else tuple(_suggest(question, model, outcomes)),
    )


def _homes(machine: Machine) -> tuple[Tier, ...]:
    return (Tier.DISK, Tier.HOST, Tier.DEVICE) if machine.drives else (Tier.HOST, Tier.DEVICE)


def _was_asked(question: Question, home: Tier, moments: MomentDType) -> bool:
    return moments == question.moments and question.home in (None, home)


def _best_rows(
    question: Question, model: ModelFacts, home: Tier, moments: MomentDType
) -> TrainingPlan | Lack:
    lack: Lack | None = None
    for rows in row_choices(question):
        result = lay_out(question, model, Choice(home, moments, rows))
        if isinstance(result, TrainingPlan):
            return result
        # One with fewer rows may need more for sums in fp32: what lacks least is told.
        lack = result if lack is None or result.missing_nbytes < lack.missing_nbytes else lack
        if lack.tier is Tier.DISK:
            break
    assert lack is not None, "there is at least one choice of rows"
    return lack


def _choose(plans: Sequence[TrainingPlan]) -> TrainingPlan | None:
    if not plans:
        return None
    fastest_s = min(plan.step_s for plan in plans)
    alike = [plan for plan in plans if plan.step_s <= fastest_s * (1 + _ALIKE)]
    # With everything in host memory, a home there is the plainer way to say so.
    return min(alike, key=lambda plan: (plan.step_written_nbytes, plan.step_s, plan.memory.home is Tier.DISK))


def _plain_nbytes(question: Question, model: ModelFacts) -> int:
    itemsize = 4 if question.compute == "float32" else 2
    activations = temporaries_nbytes(model, 1, 1, question.length, itemsize, full_logits=True)
    kept = saved_inputs(model, 1, question.length, itemsize).nbytes
    return model.num_parameters * _PLAIN_NBYTES[question.compute] + activations + kept


# -- what would do -------------------------------------------------------------------------------


def _suggest(question: Question, model: ModelFacts, outcomes: Sequence[Outcome]) -> Iterator[Suggestion]:
    """Yield changes that give a plan: of a budget within the machine, of a choice, of the machine."""
    lacks = [
        one.result
        for one in outcomes
        if isinstance(one.result, Lack) and _was_asked(question, one.home, one.moments)
    ]
    tried = [
        *_budgets(question, lacks),
        *_choices(question, lacks),
        *_smaller_batches(question),
        *_machines(question, lacks),
    ]
    seen: set[str] = set()
    for what, flags, changed in tried:
        # One of a kind: the smallest budget, the largest batch.
        kind = flags[0][0] + flags[0][1].split("=")[0] if flags[0][0] == "what-if" else flags[0][0]
        if kind in seen:
            continue
        plan = _choose(
            [
                result
                for home in _homes(changed.machine)
                if changed.home in (None, home)
                for result in [_best_rows(changed, model, home, changed.moments)]
                if isinstance(result, TrainingPlan)
            ]
        )
        if plan is not None:
            seen.add(kind)
            yield Suggestion(what, flags, plan)


_Change = tuple[str, tuple[tuple[str, str], ...], Question]


def _budgets(question: Question, lacks: Sequence[Lack]) -> Iterator[_Change]:
    physical = {Tier.HOST: question.machine.memory_nbytes}
    device = question.machine.device
    physical[Tier.DEVICE] = question.machine.memory_nbytes if device is None else device.memory_nbytes
    for lack in sorted(lacks, key=lambda lack: lack.missing_nbytes):
        if lack.needed_nbytes <= physical.get(lack.tier, 0):
            key = f"{lack.tier.value}_memory"
            needed = min(align_up(lack.needed_nbytes, 1 << 20), physical[lack.tier])
            what = f"a larger budget of {lack.tier.value} memory, which the machine has"
            flags = ((key.replace("_", "-"), _size(needed)),)
            changed = (
                replace(question, host_memory=needed)
                if lack.tier is Tier.HOST
                else replace(question, device_memory=needed)
            )
            yield what, flags, changed


def _choices(question: Question, lacks: Sequence[Lack]) -> Iterator[_Change]:
    if question.home is not None:
        for home in _homes(question.machine):
            if home is not question.home:
                yield f"another home: {home.value}", (("home", home.value),), replace(question, home=home)
    if question.rows is not None and question.rows > 1:
        yield "one row at a time", (("rows", "1"),), replace(question, rows=1)
    if question.max_grad_norm is not None and question.gradient_dtype is None:
        yield (
            "parked gradients in bf16",
            (("gradient-dtype", "bfloat16"),),
            replace(question, gradient_dtype="bfloat16"),
        )
    if question.moments != "8bit":
        yield "moments in 8 bits", (("moments", "8bit"),), replace(question, moments="8bit")
    if question.commit and any(lack.tier is Tier.DISK for lack in lacks):
        what = "no commits: half the room on the drives, and a crash loses the run"
        yield what, (("commit", "off"),), replace(question, commit=False)


def _smaller_batches(question: Question) -> Iterator[_Change]:
    batch = question.batch // 2
    while batch:
        rows = None if question.rows is None else min(question.rows, batch)
        yield (
            f"a smaller batch: {batch} rows a step",
            (("batch", str(batch)), *((("rows", str(rows)),) if rows is not None else ())),
            replace(question, batch=batch, rows=rows),
        )
        batch //= 2
    if question.length > 1024:
        yield "shorter rows", (("length", "1024"),), replace(question, length=1024)


def _machines(question: Question, lacks: Sequence[Lack]) -> Iterator[_Change]:
    machine = question.machine
    for lack in sorted(lacks, key=lambda lack: lack.missing_nbytes):
        size = align_up(lack.needed_nbytes, GIB)
        if lack.tier is Tier.HOST:
            memory = align_up(int(size / (HOST_SHARE if machine.device else CPU_HOST_SHARE)) + 1, GIB)
            changed = replace(question, machine=replace(machine, memory_nbytes=memory), host_memory=size)
            yield "more host memory", (("what-if", f"host={_size(memory)}"),), changed
        elif lack.tier is Tier.DEVICE and machine.device is not None:
            memory = align_up(int(size / DEVICE_SHARE) + 1, GIB)
            larger = replace(machine, device=replace(machine.device, memory_nbytes=memory))
            yield (
                "a device with more memory",
                (("what-if", f"device={_size(memory)}"),),
                replace(question, machine=larger, device_memory=size),
            )
        elif lack.tier is Tier.DISK:
            count = -(-lack.needed_nbytes * len(machine.drives) // max(lack.limit_nbytes, 1))
            drives = tuple(machine.drives[index % len(machine.drives)] for index in range(count))
            yield (
                f"{count} drives of that size",
                (("what-if", f"disks={count}"),),
                replace(
                    question,
                    machine=replace(machine, drives=drives, together=None),
                    room_nbytes=(lack.limit_nbytes,) * count,
                ),
            )


def _size(nbytes: int) -> str:
    return f"{nbytes // GIB}GiB" if nbytes % GIB == 0 else f"{nbytes >> 20}MiB"
