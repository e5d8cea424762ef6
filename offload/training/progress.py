"""What a run shows: bars on a terminal, plain lines elsewhere.

Owns the wording and the rates. Lines go to standard output; bars go to standard error and only when
that is a terminal, so that a log file holds lines. It measures nothing itself: the loop hands in what
happened and when.

Thread rule: one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

from tqdm import tqdm

from ..sizes import format_rate, format_time

__all__ = ["Progress", "StepReport", "format_amount"]

# Rates and the remaining time come from the last steps, not from the slow first ones: half the weight
# is on the last five.
SMOOTHING = 0.13

# Between the lines of a phase without a terminal: often enough to see that it lives.
PHASE_LINE_S = 10.0


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did.

    Attributes:
        step: number of steps done, this one included.
        loss: mean over the step's tokens.
        learning_rate: that its updates used.
        num_tokens: tokens it learned from.
        seconds: since the step before ended.
        read_nbytes: bytes read from drives since then.
        written_nbytes: bytes written to drives since then.
        to_device_nbytes: bytes copied to the device since then.
        to_host_nbytes: bytes copied from the device since then.
        grad_norm: 2-norm of all gradients, before clipping; None where it was not measured.
        commit_s: what the last commit took, in the background; None before the first.
    """

    step: int
    loss: float
    learning_rate: float
    num_tokens: int
    seconds: float
    read_nbytes: int
    written_nbytes: int
    to_device_nbytes: int = 0
    to_host_nbytes: int = 0
    grad_norm: float | None = None
    commit_s: float | None = None


class Progress:
    """Shows phases with bytes and the steps of a run.

    Args:
        num_steps: steps of the whole run.
        logging_steps: steps between lines where there is no terminal.
        terminal: draw bars; whether standard error is a terminal when None.
        echo: prints a line; standard output when None.
    """

    def __init__(
        self,
        *,
        num_steps: int,
        logging_steps: int,
        terminal: bool | None = None,
        echo: Callable[[str], None] | None = None,
    ) -> None:
        self._num_steps = num_steps
        self._logging_steps = logging_steps
        self._terminal = sys.stderr.isatty() if terminal is None else terminal
        self._echo = echo or _print
        self._bar: Any = None
        self._rates: dict[str, float] = {}

    def line(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.clear()
        self._echo(text)
        if self._bar is not None:
            self._bar.refresh()

    @contextmanager
    def phase(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """Show a phase that moves bytes; gives a function to call with (bytes done, bytes in all).

        A line with the total and the rate is printed at the end, and now and then without a terminal.
        """
        began_s = monotonic()
        seen = _Seen(line_s=began_s)
        bar: Any = None

        def moved(done_nbytes: int, total_nbytes: int) -> None:
            nonlocal bar
            if self._terminal and bar is None:
                bar = tqdm(
                    total=total_nbytes, desc=title, unit="B", unit_scale=True, leave=False, dynamic_ncols=True
                )
            if bar is not None:
                bar.update(done_nbytes - seen.done_nbytes)
            seen.done_nbytes = done_nbytes
            now_s = monotonic()
            if not self._terminal and now_s - seen.line_s >= PHASE_LINE_S and done_nbytes < total_nbytes:
                self._echo(f"{title}: {100 * done_nbytes // total_nbytes} % of {format_amount(total_nbytes)}")
                seen.line_s = now_s

        try:
            yield moved
        finally:
            if bar is not None:
                bar.close()
        seconds = monotonic() - began_s
        rate = format_rate(seen.done_nbytes / max(seconds, 1e-9))
        self.line(f"{title}: {format_amount(seen.done_nbytes)} in {format_time(seconds)}, {rate}")

    @contextmanager
    def training(self, first_step: int) -> Iterator[None]:
        """Show the steps from `first_step` (from 0) on; `step` is called inside."""
        if self._terminal:
            self._bar = tqdm(
                total=self._num_steps,
                initial=first_step,
                desc="training",
                unit="step",
                smoothing=SMOOTHING,
                dynamic_ncols=True,
            )
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def step(self, report: StepReport) -> None:
        """Show one step."""
        seconds = max(report.seconds, 1e-9)
        tokens_per_s = self._smooth("tokens", report.num_tokens / seconds)
        read = self._smooth("read", report.read_nbytes / seconds)
        written = self._smooth("written", report.written_nbytes / seconds)
        norm = report.grad_norm
        commit = "" if report.commit_s is None else f"commit {format_time(report.commit_s)}"
        mark = ", " if commit else ""
        if self._bar is not None:
            shown = "" if norm is None else f"norm {norm:.3g}, "
            self._bar.set_postfix_str(
                f"loss {report.loss:.4f}, {shown}lr {report.learning_rate:.2e}, {tokens_per_s:,.0f} tok/s, "
                f"read {read / 1e9:.2f} write {written / 1e9:.2f} GB/s{mark}{commit}",
                refresh=False,
            )
            self._bar.update(1)
        elif report.step % self._logging_steps == 0 or report.step == self._num_steps:
            left_s = (self._num_steps - report.step) * self._smooth("seconds", seconds)
            shown = "" if norm is None else f"grad norm {norm:.4g}  "
            self._echo(
                f"step {report.step}/{self._num_steps}  loss {report.loss:.4f}  {shown}"
                f"lr {report.learning_rate:.2e}  "
                f"{tokens_per_s:,.0f} tokens/s  read {format_rate(read)}  write {format_rate(written)}  "
                f"{commit}{'  ' if commit else ''}{format_time(left_s)} left"
            )
        else:
            self._smooth("seconds", seconds)

    def _smooth(self, name: str, value: float) -> float:
        old = self._rates.get(name, value)
        self._rates[name] = old + SMOOTHING * (value - old)
        return self._rates[name]


def format_amount(nbytes: float) -> str:
    """Return bytes moved in GB, or in MB when they are few; moved bytes are counted in powers of ten.

    >>> format_amount(1.6e9), format_amount(2.5e6)
    ('1.60 GB', '2.5 MB')
    """
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


@dataclass(slots=True)
class _Seen:
    line_s: float
    done_nbytes: int = 0


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
