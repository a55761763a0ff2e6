"""Numbers as people read them, the same on the command line and in reports; None and what is not finite are a dash."""

import math
from typing import TypeGuard

MISSING = "–"
Z95 = 1.959963984540054
"""Half of a normal distribution's 95 % interval, in standard errors."""


def known(value: float | None) -> TypeGuard[float]:
    """Whether there is a number to show."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 4) -> str:
    """So many significant digits, never an exponent that must be decoded."""
    if not known(value):
        return MISSING
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not -4 <= exponent < 6:
        mantissa = f"{value / 10.0**exponent:.{min(digits, 3) - 1}f}"
        power = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return _minus(f"{mantissa} × 10{power}")
    return _minus(f"{value:,.{max(0, digits - 1 - exponent)}f}")


def fixed(value: float | None, decimals: int = 4) -> str:
    """So many decimals, for columns."""
    return _minus(f"{value:.{decimals}f}") if known(value) else MISSING


def percent(value: float | None, decimals: int = 2) -> str:
    """A measured share: so many decimals, and more only where they would read as none or as all."""
    if not known(value):
        return MISSING
    points = value * 100
    if value in (0, 1):
        return f"{points:.0f} %"
    while decimals < 4 and float(f"{points:.{decimals}f}") in (0.0, 100.0):
        decimals += 1
    return _minus(f"{points:.{decimals}f} %")


def target(value: float | None) -> str:
    """A share that was asked for: as many digits as it was asked with."""
    return _minus(f"{value * 100:.6g} %") if known(value) else MISSING


def signed(value: float, decimals: int | None = None) -> str:
    """A difference with its sign, with so many decimals; without them with three significant digits."""
    return ("+" if value >= 0 else "−") + (number(abs(value), 3) if decimals is None else f"{abs(value):.{decimals}f}")


def change(value: float | None, base: float | None) -> str:
    """By how much a value differs from a base, in percent of it; as a factor where that is clearer."""
    if not known(value) or not known(base) or base <= 0:
        return MISSING
    ratio = value / base
    if ratio >= 10:
        return f"× {number(ratio, 3)}"
    return f"{signed((ratio - 1) * 100, 1 if abs(ratio - 1) < 1 else 0)} %"


def size(count: float) -> str:
    """Bytes, in a decimal unit that suits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.{0 if unit == 'B' else 2}f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def counted(count: int, noun: str) -> str:
    """A number of things, as "1 thread" and "2 threads"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _minus(text: str) -> str:
    return text.replace("-", "−")
