"""Lines where there is no terminal, a bar where there is one, and never a line too many."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload.training import progress
from offload.training.progress import Progress, StepReport


def report(step: int) -> StepReport:
    return StepReport(
        step=step,
        loss=2.5,
        learning_rate=1e-4,
        num_tokens=500,
        seconds=0.5,
        read_nbytes=10**9,
        written_nbytes=5 * 10**8,
    )


def make(terminal: bool, lines: list[str]) -> Progress:
    return Progress(num_steps=5, logging_steps=2, terminal=terminal, echo=lines.append)


def test_a_line_every_logging_steps_and_at_the_end() -> None:
    lines: list[str] = []
    shown = make(False, lines)
    with shown.training(0):
        for step in range(1, 6):
            shown.step(report(step))
    assert [line.split("  ")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    assert lines[0] == (
        "step 2/5  loss 2.5000  lr 1.00e-04  1,000 tokens/s  read 2.00 GB/s  write 1.00 GB/s  1.5 s left"
    )


def test_the_norm_of_the_gradients_is_shown_where_it_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    make(False, lines).step(replace(report(2), grad_norm=0.123456))
    assert lines[0].startswith("step 2/5  loss 2.5000  grad norm 0.1235  lr 1.00e-04  ")
    shown = make(True, lines)
    with shown.training(2):
        shown.step(replace(report(3), grad_norm=0.123456))
    assert "loss 2.5000, norm 0.123, lr 1.00e-04, " in capsys.readouterr().err


def test_a_terminal_gets_a_bar_and_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    shown = make(True, lines)
    with shown.training(2):
        for step in range(3, 6):
            shown.step(report(step))
        shown.line("between")
    assert lines == ["between"]
    assert "loss 2.5000, lr 1.00e-04, 1,000 tok/s, read 2.00 write 1.00 GB/s" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_a_phase_ends_with_its_total(terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    with make(terminal, lines).phase("import") as moved:
        moved(5 * 10**8, 10**9)
        moved(10**9, 10**9)
    assert len(lines) == 1
    assert lines[0].startswith("import: 1.00 GB in ")
    assert capsys.readouterr().out == ""


def test_a_long_phase_says_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    lines: list[str] = []
    with make(False, lines).phase("import") as moved:
        for done in range(1, 6):
            moved(done * 10**8, 5 * 10**8)
    assert lines[:-1] == ["import: 40 % of 0.50 GB", "import: 80 % of 0.50 GB"]


def test_a_phase_that_fails_says_nothing_of_its_end() -> None:
    lines: list[str] = []
    with pytest.raises(ValueError, match="x"), make(False, lines).phase("import"):
        raise ValueError("x")
    assert lines == []
