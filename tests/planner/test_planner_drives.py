"""Drives in a plan: unequal ones have unequal parts, and without commits the state is there once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_cases import drive, llama, machine, question, shape

from offload.errors import ConfigError
from offload.machine import SharedSpeed, stripe_weights
from offload.planner import plan_training
from offload.planner.layout import Choice, lay_out
from offload.planner.pages import answer_sections, refusal_text
from offload.planner.plan import Lack, TrainingPlan
from offload.planner.times import drive_rates, drive_shares
from offload.specs import Tier

SMALL = llama(256, 4, 512, 4, 4, 1000)
CHOICE = Choice(Tier.DISK, "float32", None)


def on_drives(*speeds: tuple[float, float]):
    drives = tuple(drive(number, *speed) for number, speed in enumerate(speeds))
    return replace(machine(), drives=drives)


def disk_s(on) -> float:
    plan = lay_out(question(on, batch=8, length=256), SMALL, CHOICE)
    assert isinstance(plan, TrainingPlan)
    (seconds,) = [link.seconds for link in plan.links if link.name == "disk"]
    return seconds


def test_drives_of_unequal_speed_add_up():
    slow, fast = disk_s(on_drives((1e9, 1e9))), disk_s(on_drives((3e9, 3e9)))
    both = disk_s(on_drives((1e9, 1e9), (3e9, 3e9)))
    assert both == pytest.approx(1 / (1 / slow + 1 / fast), rel=0.01)
    # Dealt alike, the slow one would set the pace.
    assert both == pytest.approx(slow / 4, rel=0.01)


@pytest.mark.parametrize(
    ("speeds", "shares"),
    [
        ([(1e9, 1e9), (3e9, 3e9)], (0.25, 0.75)),
        ([(7e9, 5e9)], (1.0,)),
        # Days of one drive differ by as much.
        ([(7e9, 5e9), (6.5e9, 4.7e9)], (0.5, 0.5)),
        # What it writes slowly it reads fast: 2 / (1 / 6 + 1 / 2) = 3.
        ([(6e9, 2e9), (3e9, 3e9)], (0.5, 0.5)),
    ],
)
def test_a_drive_has_its_part_by_what_it_reads_and_writes(speeds, shares):
    assert drive_shares(on_drives(*speeds)) == pytest.approx(shares, abs=0.002)


def test_the_slowest_for_its_part_sets_the_pace_and_all_at_once_are_a_limit():
    on = on_drives((6e9, 2e9), (3e9, 3e9))
    # Each has half: 20 and 10 GB take the first 1.67 + 2.5 s and the second 3.33 + 1.67 s.
    assert drive_rates(on, 20 * 10**9, 10 * 10**9) == pytest.approx((6e9, 6e9))
    # 10 and 20 GB take the first 0.83 + 5 s and the second 1.67 + 3.33 s.
    assert drive_rates(on, 10 * 10**9, 20 * 10**9) == pytest.approx((12e9, 4e9))
    together = SharedSpeed(setting=on.drives[0].setting, read_bytes_per_s=5e9, write_bytes_per_s=9e9)
    assert drive_rates(replace(on, together=together), 20 * 10**9, 10 * 10**9) == pytest.approx((5e9, 6e9))
    assert drive_rates(replace(on, drives=()), 1, 1) is None
    assert stripe_weights([]) == ()


def test_each_drive_has_to_hold_its_part():
    on = on_drives((1e9, 1e9), (3e9, 3e9))
    plan = lay_out(question(on, batch=8, length=256), SMALL, CHOICE)
    assert isinstance(plan, TrainingPlan)
    small, large = plan.drives_nbytes
    assert large == pytest.approx(3 * small, rel=0.01)
    assert plan.drive_nbytes == large
    fits = question(on, batch=8, length=256, room_nbytes=(small, large))
    assert isinstance(lay_out(fits, SMALL, CHOICE), TrainingPlan)
    lack = lay_out(replace(fits, room_nbytes=(None, large - 1)), SMALL, CHOICE)
    assert isinstance(lack, Lack)
    assert (lack.needed_nbytes, lack.limit_nbytes) == (large, large - 1)


def test_unequal_drives_are_a_row_each_and_wear_as_the_one_with_most():
    on = on_drives((1e9, 1e9), (3e9, 3e9))
    answer = plan_training(question(on, batch=8, length=256, home=Tier.DISK, tbw_nbytes=10**12), SMALL)
    assert answer.plan is not None
    (peaks,) = [section for section in answer_sections(answer) if section.title == "Peaks"]
    names = [row[0] for row in peaks.tables[0].rows]
    assert names == ["device", "host", "/nowhere/0, 25%", "/nowhere/1, 75%"]
    assert answer.plan.steps_to_tbw == pytest.approx(10**12 / (0.75 * answer.plan.step_written_nbytes))


def test_without_commits_the_state_is_on_the_drives_once():
    asked = question(batch=8, length=256)
    twice, once = (lay_out(replace(asked, commit=commit), SMALL, CHOICE) for commit in (True, False))
    assert isinstance(twice, TrainingPlan) and isinstance(once, TrainingPlan)
    assert twice.drive_nbytes == 2 * once.drive_nbytes
    assert (twice.step_s, twice.step_written_nbytes) == (once.step_s, once.step_written_nbytes)
    assert "commit" not in twice.settings and once.settings["commit"] is False


def test_a_home_in_memory_writes_nothing_in_a_step_that_is_not_committed():
    plan = lay_out(question(batch=8, length=256, commit=False), SMALL, Choice(Tier.HOST, "float32", None))
    assert isinstance(plan, TrainingPlan)
    assert plan.step_written_nbytes == 0


def test_commit_off_is_named_where_the_drives_lack_the_room_for_two():
    asked = question(batch=4, room_nbytes=(10**11,), home=Tier.DISK)
    answer = plan_training(asked, shape("llama-7b"))
    flags = [suggestion.flags for suggestion in answer.suggestions]
    assert (("commit", "off"),) in flags
    text = refusal_text(answer, ["offload plan"] * len(flags))
    assert "no commits: half the room on the drives, and a crash loses the run" in text
    there = plan_training(replace(asked, commit=False), shape("llama-7b"))
    assert there.plan is not None
    sections = {section.title: section for section in answer_sections(there)}
    assert "commit: off\n" in sections["For the configuration of offload finetune"].code
    assert "save_steps" not in sections["For the configuration of offload finetune"].code
    assert any("a crash loses the run" in value for _, value in sections["A step"].facts)


def test_commit_off_is_refused_without_a_drive():
    with pytest.raises(ConfigError, match="the machine has none"):
        question(machine(drives=0), commit=False)
