# Copyright (c) MONAI-JointDiff Contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Bootstrap intervals of several statistics on shared resamples, as matrix products."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "bootstrap_intervals", "resample_weights"]

Statistics = Callable[[np.ndarray], Mapping[str, np.ndarray]]

FEWEST_UNITS = 10  # percentiles over fewer resampled images or groups cover well below 95 %

_BLOCK_ENTRIES = 4_000_000  # of a weight matrix held at once: 32 MB


@dataclass(frozen=True)
class Interval:
    """A figure and how far it may be trusted.

    Args:
        value: the figure on the data as they are; None where it is not defined.
        low: lower end of the interval; None where there is none.
        high: upper end of the interval.
        reason: why something is None; empty otherwise.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, float | str | None]:
        """A dictionary for JSON: no NaN; `reason` only where there is one."""
        content: dict[str, float | str | None] = {"value": self.value, "low": self.low, "high": self.high}
        return {**content, "reason": self.reason} if self.reason else content

    def __str__(self) -> str:
        if self.value is None:
            return f"- ({self.reason})"
        return f"{self.value:.3f}" + ("" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})")


def resample_weights(
    count: int, resamples: int, seed: int, strata: np.ndarray | None = None, groups: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """How often each image occurs in each bootstrap resample.

    A resample drawn with replacement is a row of multinomial counts, so every statistic of many resamples is one
    matrix product.

    Args:
        count: number of images N.
        resamples: number of resamples B.
        seed: of the draws.
        strata: (N,) keys; drawing is within a stratum, whose size stays fixed. None: one stratum.
        groups: (N,) keys, such as patients; whole groups are drawn. None: every image for itself.

    Yields:
        blocks of rows, (b, N) float64, together B rows.

    Raises:
        ValueError: for strata and groups together.
    """
    if strata is not None and groups is not None:
        raise ValueError("resample_weights: give strata or groups, not both.")
    rng = np.random.default_rng(seed)
    units = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    keys = np.zeros(units.max() + 1, int) if strata is None else np.unique(strata, return_inverse=True)[1]
    members = [np.flatnonzero(keys == key) for key in np.unique(keys)]
    rows = max(1, _BLOCK_ENTRIES // count)
    for start in range(0, resamples, rows):
        weights = np.empty((min(rows, resamples - start), len(keys)))
        for unit in members:
            weights[:, unit] = rng.multinomial(len(unit), np.full(len(unit), 1 / len(unit)), size=len(weights))
        yield weights[:, units]


def bootstrap_intervals(
    statistics: Statistics,
    count: int,
    resamples: int = 1000,
    seed: int = 0,
    strata: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    confidence: float = 0.95,
    recentred: Collection[str] = (),
    undefined: Mapping[str, str] | None = None,
) -> dict[str, Interval]:
    """Percentile bootstrap of several statistics on the same resamples (Efron and Tibshirani 1993, chapter 13).

    Args:
        statistics: maps weights (b, N) to named arrays (b,), NaN where a statistic is not defined.
        count: number of images N.
        resamples: number of resamples; 0 gives figures without intervals.
        seed: of the draws.
        strata: as in :func:`resample_weights`.
        groups: as in :func:`resample_weights`.
        confidence: of the interval.
        recentred: names of statistics that resampling biases (a mean of absolute values grows with the noise that
            resampling adds): their interval is moved by the difference between the mean over resamples and the value.
        undefined: for each name, in words, when it is not defined.

    Returns:
        an :class:`Interval` for each name. Resamples in which a statistic is not defined are left out of its interval;
        where they are half or more there is none, and `reason` says so.

    Raises:
        ValueError: for a negative number of resamples or a confidence outside (0, 1).
    """
    if resamples < 0 or not 0 < confidence < 1:
        raise ValueError(
            f"bootstrap_intervals: resamples >= 0 and 0 < confidence < 1 expected, got {resamples} and {confidence}."
        )
    values = {name: float(value[0]) for name, value in statistics(np.ones((1, count))).items()}
    blocks = [statistics(weights) for weights in resample_weights(count, resamples, seed, strata, groups)]
    reasons = undefined or {}
    return {
        name: _interval(
            value,
            np.concatenate([block[name] for block in blocks]) if blocks else np.empty(0),
            confidence,
            name in recentred,
            reasons.get(name, "not defined for these labels"),
        )
        for name, value in values.items()
    }


def _interval(value: float, draws: np.ndarray, confidence: float, recentre: bool, reason: str) -> Interval:
    if np.isnan(value):
        return Interval(None, reason=reason)
    if not len(draws):
        return Interval(value, reason="no bootstrap")
    defined = draws[~np.isnan(draws)]
    if 2 * len(defined) <= len(draws):
        return Interval(value, reason=f"defined in only {len(defined)} of {len(draws)} resamples")
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    if recentre:
        shift = defined.mean() - value
        low, high = max(0.0, low - shift), max(0.0, high - shift)
    return Interval(value, float(low), float(high))
