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

"""ROC curve, reliability diagram and confusion matrix as matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_jointdiff.metrics import area_under_roc, macro_auc, reliability_bins, roc_curve
from monai_jointdiff.metrics.inputs import as_array, check_labels, check_probabilities, is_multi_label

__all__ = ["confusion_matrix_figure", "reliability_figure", "roc_curve_figure", "save_figure"]

matplotlib_figure, _ = optional_import("matplotlib.figure")
matplotlib_agg, _ = optional_import("matplotlib.backends.backend_agg")

# color-blind safe (Okabe and Ito 2008)
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":")
_GRAY = "#8a8a8a"


def _new_figure(width: float, height: float) -> Any:
    """A figure of its own, without pyplot's global state or a display; sizes in inches."""
    figure = matplotlib_figure.Figure(figsize=(width, height), layout="constrained")
    matplotlib_agg.FigureCanvasAgg(figure)
    return figure


def _plain_axes(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def roc_curve_figure(probabilities: Any, labels: Any, class_names: Sequence[str] | None = None) -> Any:
    """ROC curves with their areas: of class 1 when binary, else of each class against the rest.

    Args:
        probabilities: (N, K).
        labels: (N,) class indices, -1 unlabelled; or (N, K) entries 0, 1, -1 (multi-label).
        class_names: K names; None: "0", "1", ...

    Returns:
        a matplotlib `Figure`. Classes that all or no images have get no curve.

    Raises:
        ValueError: for input of the wrong shape or range, or when no class has images with and without it.
        OptionalImportError: without matplotlib.
    """
    scores, truth = _checked(probabilities, labels, "roc_curve_figure")
    names = _names(class_names, scores.shape[1], "roc_curve_figure")
    binary = truth.ndim == 1 and scores.shape[1] == 2
    figure = _new_figure(5, 5)
    axes = figure.subplots()
    drawn = 0
    for k in range(1 if binary else 0, scores.shape[1]):
        hot = truth[:, k] if truth.ndim == 2 else np.where(truth < 0, -1, truth == k)
        if not {0, 1} <= set(hot.tolist()):
            continue
        false_positive, true_positive, _ = roc_curve(scores[:, k], hot)
        style = {"color": _COLORS[drawn % len(_COLORS)], "linestyle": _STYLES[drawn // len(_COLORS) % len(_STYLES)]}
        area = area_under_roc(scores[:, k], hot)
        axes.plot(false_positive, true_positive, linewidth=2, label=f"{names[k]}: AUC {area:.3f}", **style)
        drawn += 1
    if not drawn:
        raise ValueError("roc_curve_figure: labelled images with and without a class are needed.")
    axes.plot([0, 1], [0, 1], color=_GRAY, linewidth=1, linestyle=(0, (4, 3)))
    axes.set(xlabel="false positive rate (1 - specificity)", ylabel="true positive rate (sensitivity)")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set_title("ROC curve" if drawn == 1 else f"ROC curves, macro AUC {macro_auc(scores, truth):.3f}")
    size = "small" if drawn > 7 else None
    axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=size)
    _plain_axes(axes)
    return figure


def reliability_figure(probabilities: Any, labels: Any, num_bins: int = 15) -> Any:
    """Reliability diagram with the number of predictions in each bin.

    Binary: the probability of class 1 against its frequency; multi-class: the largest probability against accuracy;
    multi-label: all entries together.

    Args:
        probabilities: (N, K).
        labels: (N,) class indices, -1 unlabelled; or (N, K) entries 0, 1, -1 (multi-label).
        num_bins: bins of equal width.

    Returns:
        a matplotlib `Figure`.

    Raises:
        ValueError: for input of the wrong shape or range, or no known label.
        OptionalImportError: without matplotlib.
    """
    scores, truth = _checked(probabilities, labels, "reliability_figure")
    bins = reliability_bins(scores, truth, num_bins)
    centers, width = (bins.edges[1:] + bins.edges[:-1]) / 2, 1 / num_bins
    filled = bins.counts > 0
    figure = _new_figure(5, 6)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.bar(centers[filled], bins.frequency[filled], 0.92 * width, color=_COLORS[5], label="observed")
    left, right = centers - 0.46 * width, centers + 0.46 * width
    axes.hlines(
        bins.confidence[filled], left[filled], right[filled], color=_COLORS[1], linewidth=2.5, label="predicted (mean)"
    )
    axes.plot([0, 1], [0, 1], color=_GRAY, linewidth=1, linestyle=(0, (4, 3)), label="perfect calibration")
    top_label = truth.ndim == 1 and scores.shape[1] > 2
    axes.set(ylabel="accuracy" if top_label else "observed frequency", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"Reliability, expected calibration error {bins.expected_error:.3f}")
    axes.legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none")
    below.bar(centers, bins.counts, 0.92 * width, color=_GRAY)
    for center, count in zip(centers[filled], bins.counts[filled], strict=True):
        below.annotate(str(count), (center, count), (0, 1.5), textcoords="offset points", ha="center", fontsize=7)
    below.set(xlabel="largest probability" if top_label else "predicted probability", ylabel="predictions")
    below.margins(y=0.25)
    for part in (axes, below):
        _plain_axes(part)
    return figure


def confusion_matrix_figure(predictions: Any, labels: Any, class_names: Sequence[str] | None = None) -> Any:
    """Confusion matrix: counts, and under each its share of the true class, which is also the color.

    Args:
        predictions: (N,) class indices.
        labels: (N,) class indices, -1 unlabelled (left out).
        class_names: K names; None: as many numbers as occur.

    Returns:
        a matplotlib `Figure`.

    Raises:
        ValueError: for shapes that differ, indices out of range, or no labelled image.
        OptionalImportError: without matplotlib.
    """
    decided, truth = as_array(predictions), as_array(labels)
    if decided.ndim != 1 or decided.shape != truth.shape or not (truth >= 0).any():
        raise ValueError(
            f"confusion_matrix_figure: predictions and labels (N,) with a labelled image expected, "
            f"got {decided.shape}, {truth.shape}."
        )
    count = int(max(decided.max(), truth.max(), 1)) + 1 if class_names is None else len(class_names)
    names = _names(class_names, count, "confusion_matrix_figure")
    known = truth >= 0
    chosen = check_labels(decided[known], count, "confusion_matrix_figure")
    if (chosen < 0).any():
        raise ValueError("confusion_matrix_figure: predictions must be class indices from 0 on.")
    truth = check_labels(truth[known], count, "confusion_matrix_figure")
    matrix = np.bincount(truth * count + chosen, minlength=count**2).reshape(count, count)
    return _matrix_figure(matrix, names)


def _matrix_figure(matrix: np.ndarray, names: Sequence[str]) -> Any:
    count = len(matrix)
    share = matrix / matrix.sum(1, keepdims=True).clip(min=1)
    side = max(4.0, 1.5 + 0.85 * count)
    figure = _new_figure(side + 0.6, side)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row in range(count):
        for column in range(count):
            color = "white" if share[row, column] > 0.55 else "#222222"
            text = f"{matrix[row, column]}\n{100 * share[row, column]:.0f} %"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=12 if count < 4 else 9)
    slanted = max(map(len, names)) * count > 40
    axes.set_xticks(range(count), names, rotation=40 if slanted else 0, ha="right" if slanted else "center")
    axes.set_yticks(range(count), names)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"Confusion matrix, {matrix.sum()} images")
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(1, count) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, count) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    bar.outline.set_visible(False)
    return figure


def save_figure(figure: Any, path: str | Path, dpi: int = 150) -> None:
    """Write a figure; the ending of the name decides the format; missing folders are made.

    Args:
        figure: a matplotlib `Figure`.
        path: file name, such as `roc.png` or `roc.pdf`.
        dpi: dots per inch of pixel formats.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=dpi, facecolor="white")


def _checked(probabilities: Any, labels: Any, caller: str) -> tuple[np.ndarray, np.ndarray]:
    truth = as_array(labels)
    scores = check_probabilities(probabilities, truth, is_multi_label(truth, None, caller), caller)
    return scores, check_labels(truth, scores.shape[1], caller)


def _names(class_names: Sequence[str] | None, count: int, caller: str) -> list[str]:
    names = [str(name) for name in (range(count) if class_names is None else class_names)]
    if len(names) != count:
        raise ValueError(f"{caller}: {count} class names expected, got {names}.")
    return names
