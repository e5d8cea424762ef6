"""A plan in words and tables, for a terminal or a file. Pure; nothing here prints.

A table by link with the slowest marked, peaks by tier, wear, what to run, and every other home and format
beside it; or what is lacking, and what would do.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..machine import Machine
from ..report.sections import Section, Table
from ..sizes import MIB, format_bytes, format_time
from ..specs import Tier
from .plan import Lack, TrainingPlan
from .question import Question
from .search import Answer, Outcome
from .times import Link, drive_shares

__all__ = ["answer_sections", "comparison_section", "explain_section", "refusal_text"]

_MOMENTS = {"float32": "fp32", "8bit": "8-bit"}


def answer_sections(answer: Answer) -> tuple[Section, ...]:
    """Return all that is to be said where there is a plan, in reading order."""
    assert answer.plan is not None
    return (
        _question_section(answer),
        _plan_section(answer.plan),
        _memory_section(answer.question, answer.plan),
        _others_section(answer),
        _run_section(answer.plan),
    )


def explain_section(answer: Answer) -> Section:
    """Return the formulas of the plan, with its numbers put in."""
    plan = answer.plan
    assert plan is not None
    question, model, traffic = answer.question, answer.model, plan.traffic
    numel = model.num_parameters
    lines = [
        f"P = {numel / 1e9:,.3f} x 10^9 parameters, of which a token is multiplied with"
        f" {model.multiplied_numel / 1e9:,.3f} x 10^9",
        f"B = {question.batch} rows x {question.length} tokens = {question.tokens:,} tokens a step;"
        f" L = {model.num_layers} layers, a = {model.attention_width} wide, s = {question.length}",
        f"R = {traffic.disk_read_nbytes / 1e9:,.2f} GB read from disk, {traffic.disk_read_nbytes / numel:.2f}"
        f" bytes a parameter; at most {traffic.most_disk_read_nbytes / numel:.2f}, where updates run ahead",
        f"W = {traffic.disk_written_nbytes / 1e9:,.2f} GB written, {traffic.disk_written_nbytes / numel:.2f}"
        " bytes a parameter",
        f"h = {traffic.to_device_nbytes / 1e9:,.2f} GB to the device, g ="
        f" {traffic.to_host_nbytes / 1e9:,.2f} GB to the host;"
        f" {traffic.saved_inputs_nbytes / 1e9:,.2f} GB of each are saved inputs of units",
        f"c = {traffic.update_nbytes / 1e9:,.2f} GB that AdamW reads and writes in host memory,"
        f" {traffic.update_nbytes / numel:.1f} bytes a parameter",
    ]
    lines += [f"{link.name}: {link.formula} = {link.figures} = {_seconds(link)}" for link in plan.links]
    lines.append(f"a step takes the longest, {plan.bottleneck}{_commit_words(plan)}: {plan.step_s:,.2f} s")
    lines.append(f"tokens/s = B / T = {question.tokens:,} / {plan.step_s:,.2f} s = {plan.tokens_per_s:,.1f}")
    return Section("Formulas", lines=tuple(lines))


def comparison_section(before: Answer, after: Answer, what: str) -> Section:
    """Return both answers side by side.

    Args:
        before: as asked.
        after: with what `--what-if` changed.
        what: it changed.
    """
    rows = []
    both = [_column(before), _column(after)]
    for key in both[0]:
        rows.append((key, both[0][key], both[1][key]))
    return Section("What if", tables=(Table(("", "as it is", what), tuple(rows)),))


def refusal_text(answer: Answer, commands: Sequence[str]) -> str:
    """Return the message of a question that no plan answers.

    Args:
        answer: without a plan.
        commands: that ask for each of its suggestions.
    """
    question = answer.question
    lines = [
        f"no plan fits {answer.model.name} with {question.batch} rows of {question.length} tokens on this"
        " machine:"
    ]
    lines += [f"  home {one.home.value}: {_lack_words(one)}" for one in answer.refused]
    for number, (suggestion, command) in enumerate(zip(answer.suggestions, commands, strict=True)):
        lines.append("the nearest plan that fits:" if number == 0 else "or:")
        plan = suggestion.plan
        lines.append(
            f"  {suggestion.what}: {plan.tokens_per_s:,.0f} tokens/s, a step in {format_time(plan.step_s)}"
        )
        lines.append(f"    {command}")
    if not answer.suggestions:
        lines.append("no single change would do: begin with a smaller model, or a machine with more of each")
    return "\n".join(lines)


# -- sections ------------------------------------------------------------------------------------


def _question_section(answer: Answer) -> Section:
    question, model = answer.question, answer.model
    num_units = len(model.units) if answer.plan is None else answer.plan.num_units
    return Section(
        f"Plan for {model.name}",
        (
            ("model", f"{model.num_parameters / 1e9:,.2f} x 10^9 parameters in {num_units} units"),
            ("machine", _machine_words(question.machine)),
            ("figures", question.machine.measured_at),
            (
                "budgets",
                f"host {format_bytes(question.host_memory)}, device {format_bytes(question.device_memory)}",
            ),
            (
                "batch",
                f"{question.batch} rows x {question.length} tokens = {question.tokens:,} tokens a step",
            ),
        ),
    )


def _plan_section(plan: TrainingPlan) -> Section:
    rows = tuple(
        (f"{'  ' if link.part_of else ''}{link.name}", _amount(link), _seconds(link)) for link in plan.links
    )
    marked = frozenset(index for index, link in enumerate(plan.links) if link.name == plan.bottleneck)
    lines = [*plan.notes, *_tokens_for_compute(plan)]
    return Section(
        "A step",
        (
            ("home", _home_words(plan)),
            (
                "time",
                f"{format_time(plan.step_s)} a step, {plan.tokens_per_s:,.0f} tokens/s{_commit_words(plan)}",
            ),
        ),
        (Table(("link", "a step", "busy"), rows, marked, "slowest"),),
        tuple(lines),
    )


def _memory_section(question: Question, plan: TrainingPlan) -> Section:
    count = len(plan.options.disk)
    saved, spilled = plan.traffic.saved_inputs_nbytes, plan.traffic.spilled_nbytes
    rows = [
        ("device", format_bytes(plan.device_nbytes), format_bytes(question.device_memory)),
        ("host", format_bytes(plan.host_nbytes), format_bytes(question.host_memory)),
    ]
    if count:
        rows += _drive_rows(question, plan)
    lines = [
        f"device: about {format_bytes(plan.temporaries_nbytes)} of it are torch's temporaries, an estimate;"
        f" host: {format_bytes(saved - spilled)} are saved inputs of units"
    ]
    if cached := _cache_words(plan):
        lines.append(cached)
    if spilled:
        lines.append(
            f"on disk: {format_bytes(spilled)} of saved inputs, the first ones, written and read once a step"
        )
    if parked := plan.memory.describe_parked():
        lines.append(parked)
    if plan.snapshot_nbytes:
        lines.append(
            f"each drive: {format_bytes(plan.snapshot_nbytes)} more for a snapshot; for a moment twice that,"
            " when one takes the place of the one before"
        )
    if count:
        lines.append(_wear_words(question, plan))
    return Section("Peaks", tables=(Table(("tier", "most", "there is"), tuple(rows)),), lines=tuple(lines))


def _others_section(answer: Answer) -> Section:
    rows = []
    marked = set()
    for index, one in enumerate(answer.outcomes):
        if one.result is answer.plan:
            marked.add(index)
        rows.append((f"{one.home.value}, {_MOMENTS[one.moments]} moments", *_cells(one.result)))
    columns = ("home", "time", "tokens/s", "host", "a drive", "written", "lacks")
    return Section("Homes and formats", tables=(Table(columns, tuple(rows), frozenset(marked), "chosen"),))


def _run_section(plan: TrainingPlan) -> Section:
    keys = {
        "home": plan.memory.home.value,
        "host_memory": _yaml_size(plan.options.host_memory),
        "host_cache": _yaml_size(plan.options.host_cache_nbytes) if plan.options.host_cache_nbytes else None,
        "device_memory": _yaml_size(plan.options.device_memory),
        "moments": plan.options.moments,
        "dtype": plan.options.dtype,
        "compute_dtype": plan.options.compute_dtype,
        "per_device_train_batch_size": plan.rows,
        "gradient_accumulation_steps": plan.batch // plan.rows,
        "max_length": plan.length,
        "save_steps": plan.options.save_steps if plan.options.commit else None,
        "commit": None if plan.options.commit else "off",
        "max_grad_norm": plan.options.max_grad_norm,
        "gradient_dtype": plan.options.gradient_dtype,
        "activations_nbytes": plan.options.activations_nbytes,
        "activations_disk_nbytes": plan.options.activations_disk_nbytes or None,
    }
    code = "".join(f"{key}: {value}\n" for key, value in keys.items() if value is not None)
    return Section("For the configuration of offload finetune", code=code, language="yaml")


# -- words ---------------------------------------------------------------------------------------


def _machine_words(machine: Machine) -> str:
    words = [f"{machine.cpu}, {machine.num_cores} cores, {format_bytes(machine.memory_nbytes)}"]
    if machine.device is not None:
        words.append(f"{machine.device.name} with {format_bytes(machine.device.memory_nbytes)}")
    words.append(f"{len(machine.drives)} drive{'s' * (len(machine.drives) != 1)}")
    return "; ".join(words)


def _cache_words(plan: TrainingPlan) -> str:
    cached = plan.memory.host_cache_nbytes
    if not cached:
        return ""
    state = cached + plan.uncached_nbytes
    share = f"{cached / state:.0%} of the state"
    return f"host: {format_bytes(cached)} are records kept there, {share}, which commits alone write"


def _home_words(plan: TrainingPlan) -> str:
    options, memory = plan.options, plan.memory
    words = [f"{memory.home.value}, {_MOMENTS[options.moments]} moments, {options.dtype} weights"]
    words.append(f"{plan.rows} row{'s' * (plan.rows > 1)} at once")
    if memory.home is not Tier.DEVICE:
        words.append(f"window of {memory.window}")
    if not options.commit:
        words.append("no commits: a crash loses the run")
    elif options.disk:
        words.append(
            "a commit every step" if options.save_steps == 1 else f"a commit every {options.save_steps} steps"
        )
    return "; ".join(words)


def _commit_words(plan: TrainingPlan) -> str:
    if not plan.traffic.commit_nbytes:
        return ""
    return ", with the share of a commit"


def _tokens_for_compute(plan: TrainingPlan) -> list[str]:
    compute = next(link.seconds for link in plan.links if link.name == "compute")
    if plan.bottleneck == "compute" or not compute:
        return []
    rows = -(-plan.batch * plan.step_s // compute)
    return [
        f"{plan.bottleneck} is the slowest: from about {rows:,.0f} rows a step on the device would be,"
        " at the same bytes a step"
    ]


def _wear_words(question: Question, plan: TrainingPlan) -> str:
    written = f"{plan.step_written_nbytes / 1e12:.3f} TB written a step"
    if question.tbw_nbytes is None:
        return f"{written}; --tbw says how many steps wear the drives out"
    if plan.steps_to_tbw is None:
        return f"{written}: nothing wears the drives"
    return (
        f"{written}: {plan.steps_to_tbw:,.0f} steps until drives rated for"
        f" {question.tbw_nbytes / 1e12:,.0f} TB each have taken that"
    )


def _lack_words(one: Outcome) -> str:
    lack = one.result
    assert isinstance(lack, Lack)
    where = "each drive" if lack.tier is Tier.DISK else f"{lack.tier.value} memory"
    return (
        f"{where} lacks {format_bytes(lack.missing_nbytes)}: it needs {format_bytes(lack.needed_nbytes)}"
        f" ({lack.needed_nbytes:,} bytes) and has {format_bytes(lack.limit_nbytes)}; {lack.reason}"
    )


def _cells(result: TrainingPlan | Lack) -> tuple[str, ...]:
    if isinstance(result, Lack):
        where = "a drive" if result.tier is Tier.DISK else result.tier.value
        return ("-", "-", "-", "-", "-", f"{format_bytes(result.missing_nbytes)} {where}")
    return (
        format_time(result.step_s),
        f"{result.tokens_per_s:,.0f}",
        format_bytes(result.host_nbytes),
        format_bytes(result.drive_nbytes),
        f"{result.step_written_nbytes / 1e9:,.1f} GB",
        "",
    )


def _column(answer: Answer) -> dict[str, str]:
    plan = answer.plan
    if plan is None:
        lacks = "; ".join(
            f"{format_bytes(one.result.missing_nbytes)} {one.result.tier.value}"
            for one in answer.refused
            if isinstance(one.result, Lack)
        )
        keys = ("home", "time", "tokens/s", "slowest", "device", "host", "a drive", "written a step")
        return dict.fromkeys(keys, "-") | {"home": f"lacks {lacks}"}
    return {
        "home": plan.memory.home.value,
        "time": format_time(plan.step_s),
        "tokens/s": f"{plan.tokens_per_s:,.0f}",
        "slowest": plan.bottleneck,
        "device": format_bytes(plan.device_nbytes),
        "host": format_bytes(plan.host_nbytes),
        "a drive": format_bytes(plan.drive_nbytes),
        "written a step": f"{plan.step_written_nbytes / 1e9:,.1f} GB",
    }


def _amount(link: Link) -> str:
    if link.unit == "operations":
        return f"{link.amount / 1e12:,.1f} TFLOP"
    return f"{link.amount / 1e9:,.2f} GB"


def _seconds(link: Link) -> str:
    return "not known" if link.seconds is None else format_time(link.seconds)


def _drive_rows(question: Question, plan: TrainingPlan) -> list[tuple[str, str, str]]:
    """Return one row for drives that share alike, else one for each."""
    drives, rooms = question.machine.drives, question.room_nbytes
    if len(set(plan.drives_nbytes)) == 1:
        known = [room for room in rooms if room is not None]
        name = f"{len(drives)} drive{'s' * (len(drives) > 1)}, each"
        return [(name, format_bytes(plan.drive_nbytes), _room(min(known, default=None)))]
    return [
        (
            f"{drive.path}, {share:.0%}",
            format_bytes(nbytes),
            _room(rooms[index] if index < len(rooms) else None),
        )
        for index, (drive, share, nbytes) in enumerate(
            zip(drives, drive_shares(question.machine), plan.drives_nbytes, strict=True)
        )
    ]


def _room(nbytes: int | None) -> str:
    return "not known" if nbytes is None else format_bytes(nbytes)


def _yaml_size(nbytes: int) -> str | int:
    return f"{nbytes // MIB}MiB" if nbytes % MIB == 0 else nbytes
