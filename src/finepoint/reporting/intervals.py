"""Means with their uncertainty over few seeds: Student's t, exactly, without a statistics library."""

from collections.abc import Sequence
from math import atan, cos, pi, sin, sqrt
from typing import Any

CONFIDENCE = 0.95


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> dict[str, Any]:
    """{"mean", "sd", "low", "high", "n"}: mean ± t sd / sqrt(n), sd with n - 1; a single value has no spread.

    Args:
        values: at least one, one a seed.
    """
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None, "n": n}
    sd = sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(n - 1, confidence) * sd / sqrt(n)
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half, "n": n}


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = confidence for Student's T with so many degrees of freedom."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def t_within(t: float, freedom: int) -> float:
    """P(|T| <= t), by the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = atan(t / sqrt(freedom))
    odd = freedom % 2
    term, total = (cos(angle) if odd else 1.0), 0.0
    for i in range(1 + odd, freedom, 2):
        total += term
        term *= cos(angle) ** 2 * i / (i + 1)
    series = sin(angle) * total
    return 2 / pi * (angle + series) if odd else series
