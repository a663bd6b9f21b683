"""Numbers and tables for people."""

import pytest

from jpo_ray.planning.show import WIDTH, duration, listed, number, table


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "?"), (0, "0"), (11_800, "11,800"), (99_999, "99,999"), (123_456, "123k"), (999_900, "1000k"),
        (4_718_592, "4.72M"), (7_241_732_096, "7.24G"), (2.5e12, "2.5T"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float | None, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "?"),
        (2.34, "2.3 s"),
        (60, "60 s"),
        (600, "10 min"),
        (5000, "83 min"),
        (9000, "2.5 h"),
        (400_000, "4.6 d"),
    ],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_table_stands_in_columns() -> None:
    assert list(table(("A", "B"), [("one", "1"), ("three", "22")], (8, 4))) == [
        "A          B", "one        1", "three     22",
    ]  # fmt: skip


def test_lines_are_wrapped_and_paths_are_not_cut() -> None:
    [first, second] = listed(["a line of words " * 4 + "/a/path/that-is-long"])
    assert len(first) <= WIDTH
    assert second == "    /a/path/that-is-long"
