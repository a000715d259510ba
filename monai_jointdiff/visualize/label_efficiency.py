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

"""How well algorithms do with how many labels, as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_jointdiff.metrics import mean_of_repeats
from monai_jointdiff.visualize.plots import _COLORS, _STYLES, _new_figure, _plain_axes

__all__ = ["label_efficiency_figure"]

matplotlib_ticker, _ = optional_import("matplotlib.ticker")

_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_SHIFT = 0.025  # between the points of two algorithms, as a share of the axis: error bars stand side by side


def label_efficiency_figure(metrics: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]) -> Any:
    """Each metric against the number of labels, a curve for each algorithm.

    The curve passes through the means over the repeats (draws of the labels); every repeat is a small dot, and with two
    or more repeats a bar is the 95 % interval of the mean (:func:`~monai_jointdiff.metrics.mean_of_repeats`). The axis
    of a metric shows what was measured: bars of two or three repeats are long, and are cut where it ends.

    Args:
        metrics: for each metric (the title of its panel) and each algorithm the values of the repeats, each in [0, 1],
            by the number of labels.

    Returns:
        a matplotlib `Figure`.

    Raises:
        ValueError: for no metrics, metrics without the same algorithms, an algorithm without points, a number of labels
            below 1, or values that are none or not in [0, 1].
        OptionalImportError: without matplotlib.
    """
    algorithms = _algorithms(metrics)
    counts = sorted({n for curves in metrics.values() for points in curves.values() for n in points})
    figure = _new_figure(1 + 3.6 * len(metrics), 4.2)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    span = np.log(counts[-1] / counts[0]) or 1.0
    for axes, (title, curves) in zip(panels, metrics.items(), strict=True):
        for index, algorithm in enumerate(algorithms):
            shift = np.exp(span * _SHIFT * (index - (len(algorithms) - 1) / 2))
            _draw_curve(axes, curves[algorithm], shift, index, algorithm)
        _scale(axes, counts, [value for points in curves.values() for one in points.values() for value in one])
        axes.set(xlabel="labelled images", title=title)
        _plain_axes(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
    return figure


def _algorithms(metrics: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]) -> list[str]:
    """Names of the algorithms, after a look at everything that is to be drawn."""
    name = "label_efficiency_figure"
    first = list(next(iter(metrics.values()), ()))
    if not first or any(set(curves) != set(first) for curves in metrics.values()):
        raise ValueError(
            f"{name}: every metric needs the same algorithms, at least one; got "
            f"{ {metric: list(curves) for metric, curves in metrics.items()} }."
        )
    for metric, curves in metrics.items():
        for algorithm, points in curves.items():
            if not points or not all(n >= 1 and len(values) for n, values in points.items()):
                raise ValueError(
                    f"{name}: {algorithm!r} needs values of {metric!r} at numbers of labels >= 1, got {dict(points)}."
                )
            if not all(0 <= value <= 1 for values in points.values() for value in values):
                raise ValueError(f"{name}: values of {metric!r} must be in [0, 1], got {dict(points)}.")
    return first


def _draw_curve(axes: Any, points: Mapping[int, Sequence[float]], shift: float, index: int, label: str) -> None:
    """Means with bars, and the repeats beside them."""
    counts = sorted(points)
    places = np.array(counts) * shift
    means = [mean_of_repeats(points[n]) for n in counts]
    color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
    style = {"color": color, "linestyle": _STYLES[index // len(_COLORS) % len(_STYLES)]}
    axes.plot(places, [mean.value for mean in means], marker=marker, markersize=6, linewidth=2, label=label, **style)
    for place, n, mean in zip(places, counts, means, strict=True):
        if mean.low is None:
            continue
        axes.vlines(place, mean.low, mean.high, color=color, linewidth=1.5, alpha=0.6)
        repeats = points[n]
        axes.plot([place] * len(repeats), repeats, ".", color=color, markersize=5, alpha=0.6)


def _scale(axes: Any, counts: Sequence[int], values: Sequence[float]) -> None:
    """A logarithmic axis of labels with a tick at each number; heights from the values, not from their bars."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib_ticker.FixedLocator(counts))
    axes.xaxis.set_major_formatter(matplotlib_ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(matplotlib_ticker.NullLocator())
    axes.set_xlim(counts[0] / 1.25, counts[-1] * 1.25)
    margin = max(0.25 * (max(values) - min(values)), 0.02)
    axes.set_ylim(max(min(values) - margin, -0.01), min(max(values) + margin, 1.01))
