"""Sizes, rates and times: what is accepted, what is printed, and that doctests hold."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload import sizes
from offload.sizes import (
    GIB,
    KIB,
    MIB,
    align_down,
    align_up,
    format_bytes,
    format_rate,
    format_time,
    parse_bytes,
)


def test_docstring_examples_hold():
    assert doctest.testmod(sizes).failed == 0


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("4096", 4096),
        (4096, 4096),
        ("1KiB", KIB),
        ("512 MiB", 512 * MIB),
        ("8GiB", 8 * GIB),
        ("8G", 8 * GIB),
        ("8g", 8 * GIB),
        (" 1.5 GiB ", 3 * GIB // 2),
        ("200GB", 200 * 10**9),
        ("2TB", 2 * 10**12),
        ("1TiB", 1 << 40),
        ("1_000_000", 1_000_000),
        ("3B", 3),
    ],
)
def test_parse_bytes_accepts(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "8 GiBs", "8Gbit", "1e9", "0x10", "1.GiB", "8 G iB", "inf", "nan"]
)
def test_parse_bytes_refuses_and_shows_the_text_and_a_remedy(text):
    with pytest.raises(ValueError, match="for example 8GiB") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


def test_parse_bytes_refuses_a_negative_number():
    with pytest.raises(ValueError, match="negative: -1"):
        parse_bytes(-1)


@given(st.integers(min_value=0, max_value=1 << 62))
def test_parse_bytes_of_a_number_in_bytes_is_exact(nbytes):
    assert parse_bytes(str(nbytes)) == nbytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (MIB - 1, "1.0 MiB"),
        (GIB - 1, "1.0 GiB"),
        (1023 * MIB, "1023.0 MiB"),
        (GIB, "1.0 GiB"),
        (24 * GIB, "24.0 GiB"),
        ((1 << 40) - 1, "1.00 TiB"),
        (1 << 40, "1.00 TiB"),
        (1234 << 40, "1,234.00 TiB"),
    ],
)
def test_format_bytes(nbytes, text):
    assert format_bytes(nbytes) == text


@given(st.integers(min_value=KIB, max_value=1 << 50))
def test_format_bytes_parses_back_within_its_rounding(nbytes):
    assert parse_bytes(format_bytes(nbytes).replace(",", "")) == pytest.approx(nbytes, rel=0.051)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0004, "0 ms"),
        (0.85, "850 ms"),
        (0.9996, "1.0 s"),
        (1, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1:00"),
        (60, "1:00"),
        (245, "4:05"),
        (3599.6, "1:00:00"),
        (11045, "3:04:05"),
        (100 * 3600, "100:00:00"),
    ],
)
def test_format_time(seconds, text):
    assert format_time(seconds) == text


def test_format_rate_counts_in_powers_of_ten():
    assert format_rate(GIB) == "1.07 GB/s"
    assert format_rate(0) == "0.00 GB/s"


@given(st.integers(min_value=0, max_value=1 << 62), st.integers(min_value=1, max_value=1 << 21))
def test_alignment_is_the_nearest_multiple_on_either_side(nbytes, alignment):
    below, above = align_down(nbytes, alignment), align_up(nbytes, alignment)
    assert below <= nbytes <= above
    assert below % alignment == above % alignment == 0
    assert above - below in {0, alignment}
    assert (above == below) == (nbytes % alignment == 0)
