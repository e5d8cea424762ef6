"""What looks like a password or a token, and its removal from everything that is printed.

Secrets are known by their form (tokens of the usual services, passwords in URLs) and by the environment:
the value of a variable whose name says so is one, whatever its form. JSON for other programs is no exception:
it ends in logs and bug reports. What is written to files needs no
redaction, since nothing of the environment goes there and a configuration that holds a secret is refused.

A secret that is cut in two before it comes here, or has no form and is in no variable, is not recognised.
Pure, the streams aside; any thread.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

__all__ = ["MASK", "holds_secret", "print_redacted_traceback", "redact", "redacted_output"]

MASK = "[redacted]"

# A password in front of a host; with one slash, as a path has it that was made of a URL, too.
_IN_URL = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]{1,20}:(?://[^\s/@'\"]{1,500}|/[^\s/@:'\"]{0,200}:[^\s/@'\"]{1,300}))@"
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/{1,2}")
_IN_QUERY = re.compile(
    r"([?&](?:[a-z-]*(?:token|key|password|passwd|secret|sig|signature|credential))=)[^&\s'\"]{8,}",
    re.IGNORECASE,
)
# Source: the prefixes that the services document for secret scanning. As long as the services' tokens are, at
# the least, so that `sk-finetune-smollm2-135m` and `hf_SmolLM2135MInstruct` stay names of directories.
_TOKENS = re.compile(
    # At the beginning of a word, also behind what JSON and Python's repr write for a line break and the like.
    r"(?:(?<![A-Za-z0-9])|(?<=\\[abfnrtv])|(?<=\\x[0-9a-f]{2})|(?<=\\u[0-9a-f]{4}))(?:"
    r"hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}|sk-(?:[a-z0-9]{1,10}-){0,3}[A-Za-z0-9_]{20,}|gh[opsur]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}|xox[abeoprs]-[0-9]{8,}-[A-Za-z0-9-]{10,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{35}|wandb_v1_[A-Za-z0-9_-]{20,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"
    r")"
)
_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|KEY|PASSPHRASE|CREDENTIALS?)(?:_|$)|PASSWORD|PASSWD", re.IGNORECASE
)
# Shorter values are settings, and would be struck out of ordinary words.
_MIN_LENGTH = 12


def redact(text: str) -> str:
    """Return `text` with every secret in it replaced.

    >>> redact("cannot read https://me:word@host/file?token=12345678")
    'cannot read https://[redacted]@host/file?token=[redacted]'
    """
    return _without(text, _secret_values())


def holds_secret(text: str) -> bool:
    """Return whether `redact` would change `text`."""
    return redact(text) != text


@contextmanager
def redacted_output() -> Iterator[None]:
    """Inside, what is written to standard output and standard error has its secrets replaced.

    The environment is read once, here: a command prints thousands of lines, and gives itself no secrets.
    """
    out, err, values = sys.stdout, sys.stderr, _secret_values()
    sys.stdout, sys.stderr = _Redacted(out, values), _Redacted(err, values)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


def print_redacted_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an exception that nobody caught; for `sys.excepthook`."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _secret_values() -> list[str]:
    """Return the values of variables that are secret by their names, in each form, the longest first."""
    values = {
        form
        for name, value in os.environ.items()
        if len(value) >= _MIN_LENGTH and _NAME.search(name) and not os.path.exists(value)
        for form in _forms(value)
    }
    return sorted(values, key=len, reverse=True)


def _forms(value: str) -> tuple[str, ...]:
    """Return `value` as it is, and as JSON and Python's repr have it."""
    return (
        value,
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        repr(value)[1:-1],
    )


def _without(text: str, values: Sequence[str]) -> str:
    """Return `text` without `values` and without what has the form of a secret."""
    for value in values:
        text = text.replace(value, MASK)
    text = _IN_URL.sub(lambda found: f"{_scheme(found[1])}{MASK}@", text)
    return _TOKENS.sub(MASK, _IN_QUERY.sub(rf"\g<1>{MASK}", text))


def _scheme(text: str) -> str:
    found = _SCHEME.match(text)
    return found[0] if found else ""


class _Redacted:
    """A text stream that redacts each write; everything else is the stream's own."""

    def __init__(self, stream: TextIO, values: Sequence[str]) -> None:
        self._stream = stream
        self._values = values

    def write(self, text: str) -> int:
        self._stream.write(_without(text, self._values))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
