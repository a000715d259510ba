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


"""Risk against coverage, and accuracy against the number of network calls, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_jointdiff.metrics import Interval, RiskCoverageCurve
from monai_jointdiff.visualize.plots import _COLORS, _GRAY, _STYLES, _new_figure, _plain_axes

__all__ = ["accuracy_against_calls_figure", "risk_coverage_figure"]

matplotlib_ticker, _ = optional_import("matplotlib.ticker")

_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_MOST_MARKS = 50  # above, thresholds lie so close that marks would hide the curve
_NOISY_COVERAGE = 0.05  # below, the risk of a handful of images swings from 0 to 1


def risk_coverage_figure(curves: Mapping[str, RiskCoverageCurve]) -> Any:
    """Error rate of the images decided against their share, for each way of measuring uncertainty.

    Marks are the coverages that thresholds reach, where there are few of them, as with votes; the line between two is
    the expectation for a random choice among equally uncertain images. The axis of the risk is cut to what
    occurs from a coverage of 5 % on.

    Args:
        curves: curves by name.

    Returns:
        a matplotlib `Figure`.

    Raises:
        ValueError: for no curves.
        OptionalImportError: without matplotlib.
    """
    if not curves:
        raise ValueError("risk_coverage_figure: at least one curve expected, got none.")
    figure = _new_figure(6, 5)
    axes = figure.subplots()
    highest = 0.0
    for index, (name, curve) in enumerate(curves.items()):
        # a line straight between the points would not be the expected risk, which is a hyperbola
        coverage = np.union1d(np.linspace(0, 1, 501)[1:], curve.coverage)
        risk = curve.risk_at(coverage)
        style = {"color": _COLORS[index % len(_COLORS)], "linestyle": _STYLES[index // len(_COLORS) % len(_STYLES)]}
        axes.plot(coverage, risk, linewidth=2, label=f"{name}: AURC {curve.area:.4f}", **style)
        if len(curve.coverage) <= _MOST_MARKS:
            marks = {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 5, "color": style["color"]}
            axes.plot(curve.coverage, curve.risk, linestyle="none", **marks)
        highest = max(highest, risk[coverage >= _NOISY_COVERAGE].max())
    axes.set(xlabel="coverage (share of the images decided)", ylabel="risk (error rate among them)")
    axes.set(xlim=(0, 1.01), ylim=(-0.03 * (highest or 1), 1.08 * (highest or 1)))
    axes.set_title("Risk and coverage")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # curves may pass through any corner
    _plain_axes(axes)
    return figure


def accuracy_against_calls_figure(
    curves: Mapping[str, Mapping[float, Interval]], published: Mapping[str, Mapping[float, float]] | None = None
) -> Any:
    """Accuracy against network calls per image, on a logarithmic axis.

    A curve of several points has a band where its points have intervals; a single point, such as a classifier of one
    call, has an error bar.

    Args:
        curves: for each name the accuracy by the (mean) number of network calls per image.
        published: for each name the accuracies of a published result by the number of calls, drawn in gray.

    Returns:
        a matplotlib `Figure`.

    Raises:
        ValueError: for no curves, a curve without points, a number of calls that is not above 0, or an accuracy that
            is not defined.
        OptionalImportError: without matplotlib.
    """
    if not curves:
        raise ValueError("accuracy_against_calls_figure: at least one curve expected, got none.")
    figure = _new_figure(6.5, 4.5)
    axes = figure.subplots()
    for index, (name, points) in enumerate((published or {}).items()):
        calls = _sorted_calls(points, name)
        line = {"color": _GRAY, "linestyle": (0, (4, 2 + 2 * index)), "linewidth": 1.5}
        marker = {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 4, "markerfacecolor": "white"}
        axes.plot(calls, [points[call] for call in calls], label=name, **line, **marker)
    for index, (name, intervals) in enumerate(curves.items()):
        calls = _sorted_calls(intervals, name)
        values, low, high = _bounds([intervals[call] for call in calls], name)
        color = _COLORS[index % len(_COLORS)]
        marker = {"color": color, "marker": _MARKERS[index % len(_MARKERS)], "markersize": 5, "label": name}
        if len(calls) == 1:
            axes.errorbar(calls, values, yerr=[values - low, high - values], linestyle="none", capsize=3, **marker)
        else:
            axes.plot(calls, values, linewidth=2, linestyle=_STYLES[index // len(_COLORS) % len(_STYLES)], **marker)
            axes.fill_between(calls, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib_ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib_ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(matplotlib_ticker.NullLocator())
    axes.set(xlabel="network calls per image", ylabel="accuracy", title="Accuracy and cost")
    axes.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none")
    _plain_axes(axes)
    return figure


def _sorted_calls(points: Mapping[float, Any], name: str) -> list[float]:
    if not points or not all(np.isfinite(calls) and calls > 0 for calls in points):
        raise ValueError(
            f"accuracy_against_calls_figure: {name!r} needs points at numbers of calls above 0, got {list(points)}."
        )
    return sorted(points)


def _bounds(intervals: list[Interval], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values and ends of the intervals, NaN (nothing is drawn) where there is a value without an interval."""
    for interval in intervals:
        if interval.value is None:
            raise ValueError(
                f"accuracy_against_calls_figure: {name!r} has an accuracy that is not defined ({interval.reason})."
            )
    columns = zip(*((part.value, part.low, part.high) for part in intervals), strict=True)
    values, low, high = (np.array(column, dtype=np.float64) for column in columns)
    return values, low, high
