"""Numbers as people read them."""

import math

import pytest

from cats_llm.number_format import change, counted, fixed, number, percent, signed, size, target


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(17.533), "17.53"),
        (number(8.012, 3), "8.01"),
        (number(9.9996), "10.00"),
        (number(123456.7), "123,457"),
        (number(2.5e9), "2.50 × 10⁹"),
        (number(3.2e-7, 3), "3.20 × 10⁻⁷"),
        (number(0.06152, 3), "0.0615"),
        (number(-1.5, 2), "−1.5"),
        (number(0.0), "0"),
        (number(math.nan), "–"),
        (number(None), "–"),
        (fixed(17.90712), "17.9071"),
        (fixed(-0.25, 1), "−0.2"),
        (fixed(None), "–"),
        (fixed(math.inf), "–"),
        (percent(0.49951, 1), "50.0 %"),
        (percent(0.49951), "49.95 %"),
        (percent(0.0), "0 %"),
        (percent(1.0), "100 %"),
        (percent(0.9999, 1), "99.99 %"),
        (percent(0.0002, 1), "0.02 %"),
        (percent(math.inf), "–"),
        (target(0.5), "50 %"),
        (target(0.333), "33.3 %"),
        (target(0.07), "7 %"),
        (target(None), "–"),
        (signed(0.5), "+0.500"),
        (signed(-12.345, 1), "−12.3"),
        (change(18.6, 17.533), "+6.1 %"),
        (change(9.0, 10.0), "−10.0 %"),
        (change(50.0, 10.0), "+400 %"),
        (change(1000.0, 10.0), "× 100"),
        (change(1.0, None), "–"),
        (change(math.inf, 1.0), "–"),
        (size(999), "999 B"),
        (size(12_340), "12.34 kB"),
        (size(5e6), "5.00 MB"),
        (size(7.25e12), "7250.00 GB"),
        (counted(1, "thread"), "1 thread"),
        (counted(2, "thread"), "2 threads"),
    ],
)
def test_numbers_are_text(text, expected):
    assert text == expected
