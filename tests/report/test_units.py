from __future__ import annotations

import math

import pytest

from fedmp.report.marks import bar, shade_strip, spark_line
from fedmp.report.units import (
    format_bytes,
    format_count,
    format_memory,
    format_seconds,
    format_share,
    shorten,
    shorten_layer,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_234_567, "1.2 MB"),
        (999_999, "1.0 MB"),
        (math.inf, "-"),
    ],
)
def test_bytes_are_decimal(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(("value", "text"), [(1024, "1.0 KiB"), (4 << 30, "4.0 GiB"), (512 << 20, "512 MiB")])
def test_memory_is_binary(value: int, text: str) -> None:
    assert format_memory(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (0.00085, "0.85 ms"),
        (0.0123, "12.3 ms"),
        (0.9999, "1.0 s"),
        (4.13, "4.1 s"),
        (59.97, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
        (187_200, "2 d 04 h"),
        (math.nan, "-"),
    ],
)
def test_seconds_choose_their_unit(value: float, text: str) -> None:
    assert format_seconds(value) == text


def test_counts_and_shares() -> None:
    assert format_count(9876) == "9,876"
    assert format_count(1_234_567) == "1.2 M"
    assert format_share(0.831) == "83.1 %"
    assert format_share(None) == "-"


def test_shortened_names_fit_and_keep_what_tells_them_apart() -> None:
    assert len(shorten("workstation-17", 9)) == 9
    assert shorten_layer("encoder.layers.13.feed_forward", 18) == "enco.laye.13.feed"
    assert len(shorten_layer(".".join("abcdefghij" * 4), 20)) == 20


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.001, 0.5, 1.0, 7.0, math.nan])
def test_a_bar_is_exactly_as_wide_as_asked(share: float) -> None:
    assert len(bar(share, 7).plain) == 7


@pytest.mark.parametrize("count", [0, 1, 2, 39, 40, 41, 500])
def test_lines_of_marks_never_exceed_their_width(count: int) -> None:
    values = [index / 500 for index in range(count)]
    assert len(spark_line(values, 40).plain) == min(count, 40)
    assert len(shade_strip(values, 40, 1.0).plain) == min(count, 40)


def test_a_spark_line_keeps_the_last_value_and_skips_nan() -> None:
    assert spark_line([0.0, math.nan, 1.0], 40).plain == "▁ █"
    assert spark_line([0.0] * 99 + [1.0], 10).plain.endswith("█")
