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

"""Classification figures with bootstrap intervals: binary, multi-class and multi-label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from monai_jointdiff.metrics.bootstrap import Interval, Statistics, bootstrap_intervals
from monai_jointdiff.metrics.calibration import bin_index, confidence_and_outcome
from monai_jointdiff.metrics.inputs import as_array, check_labels, check_probabilities, is_multi_label

__all__ = ["ClassificationReport", "area_under_roc", "classification_report", "macro_auc", "roc_curve"]

_OVERALL = ("auc", "accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity", "ece", "brier")
_PER_CLASS = ("auc", "sensitivity", "specificity", "precision", "f1")
_UNDEFINED = {
    "auc": "needs images with and without the class",
    "sensitivity": "no image with the class",
    "specificity": "no image without the class",
    "precision": "the class is never predicted",
    "f1": "no image with the class",
    "balanced_accuracy": "needs images with and without the class",
}


@dataclass(frozen=True)
class ClassificationReport:
    """How well a classifier does on labelled images, each figure with a bootstrap interval.

    Args:
        task: `"binary"`, `"multi-class"` or `"multi-label"`.
        class_names: (K,) names.
        thresholds: decision thresholds: one for class 1 when binary, K when multi-label, none when multi-class.
        count: images with a known label.
        ignored: images without one.
        support: (K,) images with each class.
        auc: area under the ROC curve; macro mean of one-against-rest unless binary.
        accuracy: share of right decisions; multi-label: macro mean over labels.
        balanced_accuracy: mean of the classes' recalls; multi-label: macro mean of (sensitivity + specificity) / 2.
        f1: of class 1 when binary, else macro mean.
        sensitivity: recall of class 1 when binary, else macro mean.
        specificity: recall of class 0 when binary, else macro mean of one-against-rest.
        ece: expected calibration error, bins of equal width (see
            :func:`~monai_jointdiff.metrics.calibration.confidence_and_outcome`); its interval is recentred.
        brier: mean of (p - y)^2 of class 1 (binary) or over all entries (multi-label); multi-class: summed over classes
            (Brier 1950).
        per_class: for each class name one-against-rest `auc, sensitivity, specificity, precision, f1`.
        confusion_matrix: (K, K) counts, rows true, columns predicted; empty when multi-label.
        bootstrap: number of resamples, confidence, seed, and how they were drawn.
        notes: what a reader has to know, such as classes left out of macro means for want of images.
    """

    task: str
    class_names: tuple[str, ...]
    thresholds: tuple[float, ...]
    count: int
    ignored: int
    support: tuple[int, ...]
    auc: Interval
    accuracy: Interval
    balanced_accuracy: Interval
    f1: Interval
    sensitivity: Interval
    specificity: Interval
    ece: Interval
    brier: Interval
    per_class: Mapping[str, Mapping[str, Interval]]
    confusion_matrix: tuple[tuple[int, ...], ...]
    bootstrap: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def overall(self) -> dict[str, Interval]:
        """The figures over all classes, by name."""
        return {name: getattr(self, name) for name in _OVERALL}

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it: no NaN; what is not defined is None with a reason.

        Returns:
            the figures by name (`{"value", "low", "high"}` each), `per_class`, `confusion_matrix`, and the settings.
        """
        return {
            "task": self.task,
            "class_names": list(self.class_names),
            "thresholds": list(self.thresholds),
            "count": self.count,
            "ignored": self.ignored,
            "support": dict(zip(self.class_names, self.support, strict=True)),
            **{name: interval.as_dict() for name, interval in self.overall.items()},
            "per_class": {
                name: {figure: interval.as_dict() for figure, interval in figures.items()}
                for name, figures in self.per_class.items()
            },
            "confusion_matrix": [list(row) for row in self.confusion_matrix],
            "bootstrap": dict(self.bootstrap),
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """The figures as text, for a terminal."""
        heads = {"auc": "AUC", "f1": "F1", "ece": "calibration error", "brier": "Brier score"}
        rows: list[tuple[str, ...]]
        rows = [(heads.get(name, name.replace("_", " ")), str(interval)) for name, interval in self.overall.items()]
        rules = {"binary": f"{self.class_names[-1]} from p >= ", "multi-class": "largest probability"}
        decided = rules.get(self.task, "p >= ") + ", ".join(f"{threshold:.4g}" for threshold in self.thresholds)
        ignored = f", {self.ignored} without a label left out" if self.ignored else ""
        lines = [f"{self.task}, {self.count} images{ignored}; decided by {decided}", *_columns(rows)]
        if len(self.class_names) > 2 or self.task == "multi-label":
            header = ("class", "images", *(heads.get(name, name) for name in _PER_CLASS))
            lines += ["", *_columns([header, *map(self._class_row, range(len(self.class_names)))])]
        if self.confusion_matrix:
            counts = zip(self.class_names, self.confusion_matrix, strict=True)
            rows = [("true \\ predicted", *self.class_names)]
            rows += [(name, *map(str, row)) for name, row in counts]
            lines += ["", *_columns(rows)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _class_row(self, index: int) -> tuple[str, ...]:
        name = self.class_names[index]
        values = [self.per_class[name][figure].value for figure in _PER_CLASS]
        return (name, str(self.support[index]), *("-" if value is None else f"{value:.3f}" for value in values))


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as lines with the columns aligned: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    right = [False, *([last > 1] * last)]  # two columns (name, value) read best from the left
    return [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]


def classification_report(
    probabilities: Any,
    labels: Any,
    thresholds: float | Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    *,
    multi_label: bool | None = None,
    stratified: bool = False,
    groups: Any = None,
    confidence: float = 0.95,
    num_bins: int = 15,
) -> ClassificationReport:
    """Evaluate predicted probabilities against labels.

    Args:
        probabilities: (N, K); rows sum to 1 unless multi-label. K = 2 is the binary task with class 1 as positive.
        labels: (N,) class indices, -1 unlabelled; or (N, K) entries 0, 1, and -1 or NaN for unknown (multi-label).
        thresholds: binary: p >= threshold decides for class 1; multi-label: one for each label; None: 0.5. Multi-class
            decides by the largest probability and takes none.
        class_names: K distinct names; None: "0", "1", ...
        bootstrap: number of resamples; 0: no intervals.
        seed: of the resamples.
        multi_label: None leaves it to the shape of `labels`.
        stratified: draw within each class, so that the classes keep their sizes (not for multi-label).
        groups: (N,) keys such as patients: whole groups are drawn, which is right where images of a group resemble
            each other. None: every image for itself.
        confidence: of the intervals.
        num_bins: bins of the calibration error.

    Returns:
        the report.

    Raises:
        ValueError: for input of the wrong shape or range, no known label, or options that exclude each other.
    """
    name = "classification_report"
    truth = as_array(labels)
    multi_label = is_multi_label(truth, multi_label, name)
    scores = check_probabilities(probabilities, truth, multi_label, name)
    truth = check_labels(truth, scores.shape[1], name)
    names = _class_names(class_names, scores.shape[1])
    limits = _thresholds(thresholds, scores.shape[1], multi_label)
    known = (truth >= 0).reshape(len(truth), -1).any(1)
    if not known.any():
        raise ValueError(f"{name}: none of the {len(truth)} images has a known label.")
    keys = _group_keys(groups, len(truth), stratified, multi_label)
    keys = keys if keys is None else keys[known]
    scores, truth = scores[known], truth[known]

    task = "multi-label" if multi_label else "binary" if scores.shape[1] == 2 else "multi-class"
    hot, decided = _one_against_rest(scores, truth, limits, task)
    support = (hot == 1).sum(0)
    intervals = bootstrap_intervals(
        _statistics(scores, truth, hot, decided, task, num_bins),
        len(truth),
        bootstrap,
        seed,
        strata=truth if stratified else None,
        groups=keys,
        confidence=confidence,
        recentred=("all/ece",),
        undefined={f"{k}/{figure}": why for figure, why in _UNDEFINED.items() for k in ("all", *range(len(names)))},
    )
    return ClassificationReport(
        task=task,
        class_names=names,
        thresholds=limits,
        count=len(truth),
        ignored=int((~known).sum()),
        support=tuple(support.tolist()),
        **{figure: intervals[f"all/{figure}"] for figure in _OVERALL},
        per_class={
            label: {figure: intervals[f"{k}/{figure}"] for figure in _PER_CLASS} for k, label in enumerate(names)
        },
        confusion_matrix=() if multi_label else _confusion(truth, decided),
        bootstrap={
            "resamples": bootstrap,
            "confidence": confidence,
            "seed": seed,
            "drawn": "groups" if keys is not None else "images within classes" if stratified else "images",
        },
        notes=tuple(
            f"class {label!r} has no image {which} it and is left out of the macro means"
            for label, column in zip(names, hot.T, strict=True)
            for value, which in ((1, "with"), (0, "without"))
            if task != "binary" and not (column == value).any()
        ),
    )


def _class_names(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    result = tuple(map(str, range(num_classes) if names is None else names))
    if len(result) != num_classes or len(set(result)) != num_classes:
        raise ValueError(f"classification_report: {num_classes} distinct class names expected, got {list(result)}.")
    return result


def _thresholds(thresholds: float | Sequence[float] | None, num_classes: int, multi_label: bool) -> tuple[float, ...]:
    count = num_classes if multi_label else 1 if num_classes == 2 else 0
    if thresholds is None:
        return (0.5,) * count
    values = tuple(float(value) for value in np.atleast_1d(np.asarray(thresholds, dtype=np.float64)))
    if len(values) != count or not all(0 <= value <= 1 for value in values):
        rule = "decides by the largest probability" if count == 0 else f"takes {count} in [0, 1]"
        raise ValueError(f"classification_report: this task {rule}, got thresholds {values}.")
    return values


def _group_keys(groups: Any, count: int, stratified: bool, multi_label: bool) -> np.ndarray | None:
    if stratified and (multi_label or groups is not None):
        raise ValueError("classification_report: stratified goes neither with multi-label data nor with groups.")
    if groups is None:
        return None
    keys = np.asarray(groups)
    if keys.shape != (count,):
        raise ValueError(f"classification_report: groups must be ({count},), got {keys.shape}.")
    return keys


def _one_against_rest(
    scores: np.ndarray, truth: np.ndarray, thresholds: tuple[float, ...], task: str
) -> tuple[np.ndarray, np.ndarray]:
    """Truth (N, K) with entries 0, 1, -1, and decisions (N, K) bool."""
    if task == "multi-label":
        return truth, scores >= np.asarray(thresholds)
    classes = np.arange(scores.shape[1])
    chosen = scores[:, 1] >= thresholds[0] if task == "binary" else scores.argmax(1)
    return (truth[:, None] == classes).astype(np.int64), np.asarray(chosen).astype(int)[:, None] == classes


def _confusion(truth: np.ndarray, decided: np.ndarray) -> tuple[tuple[int, ...], ...]:
    num_classes = decided.shape[1]
    counts = np.bincount(truth * num_classes + decided.argmax(1), minlength=num_classes**2)
    return tuple(map(tuple, counts.reshape(num_classes, num_classes).tolist()))


def _statistics(
    scores: np.ndarray, truth: np.ndarray, hot: np.ndarray, decided: np.ndarray, task: str, num_bins: int
) -> Statistics:
    """All figures as a function of bootstrap weights (b, N); names are `all/<figure>` and `<class number>/<figure>`."""
    num_classes = scores.shape[1]
    one_class = [_class_statistics(scores[:, k], hot[:, k], decided[:, k]) for k in range(num_classes)]
    proper = _probability_statistics(scores, truth, num_bins)
    both = [k for k in range(num_classes) if {0, 1} <= set(hot[:, k].tolist())]  # classes that enter macro means
    right = (hot[:, :num_classes] == decided).all(1).astype(np.float64)

    def evaluate(weights: np.ndarray) -> dict[str, np.ndarray]:
        classes = [statistics(weights) for statistics in one_class]

        def macro(figure: str) -> np.ndarray:
            return np.mean([classes[k][figure] for k in both], axis=0) if both else np.full(len(weights), np.nan)

        overall = classes[1] if task == "binary" else {figure: macro(figure) for figure in classes[0]}
        overall = {figure: overall[figure] for figure in _OVERALL if figure in overall}
        if task != "multi-label":
            overall["accuracy"] = weights @ right / weights.sum(1)
        if task == "multi-class":
            overall["balanced_accuracy"] = overall["sensitivity"]
        named = {f"all/{figure}": values for figure, values in {**overall, **proper(weights)}.items()}
        return named | {f"{k}/{figure}": classes[k][figure] for k in range(num_classes) for figure in _PER_CLASS}

    return evaluate


def _class_statistics(scores: np.ndarray, truth: np.ndarray, decided: np.ndarray) -> Statistics:
    """Figures of one yes-or-no question; entries with truth -1 count for nothing."""
    known = np.flatnonzero(truth >= 0)
    yes, said = truth[known] == 1, decided[known]
    cells = np.stack([yes & said, yes & ~said, ~yes & said, ~yes & ~said], axis=1).astype(np.float64)
    auc = _auc_statistic(scores[known], yes)

    def evaluate(weights: np.ndarray) -> dict[str, np.ndarray]:
        weights = weights[:, known]
        tp, fn, fp, tn = (weights @ cells).T
        with np.errstate(divide="ignore", invalid="ignore"):
            sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
            return {
                "auc": auc(weights),
                "accuracy": (tp + tn) / (tp + fn + fp + tn),
                "balanced_accuracy": (sensitivity + specificity) / 2,
                "f1": np.where(tp + fn > 0, 2 * tp / (2 * tp + fp + fn), np.nan),
                "sensitivity": sensitivity,
                "specificity": specificity,
                "precision": tp / (tp + fp),
            }

    return evaluate


def _auc_statistic(scores: np.ndarray, positive: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Weighted Mann-Whitney statistic: the share of (positive, negative) pairs in the right order, ties for half."""
    order = np.argsort(scores, kind="stable")
    ordered, sign = scores[order], positive[order].astype(np.float64)
    starts = np.flatnonzero(np.concatenate([[True], np.diff(ordered) > 0])) if len(scores) else np.empty(0, int)

    def evaluate(weights: np.ndarray) -> np.ndarray:
        if not len(scores):
            return np.full(len(weights), np.nan)
        weights = weights[:, order]
        up = np.add.reduceat(weights * sign, starts, axis=1)  # (b, G): one column per distinct score
        down = np.add.reduceat(weights * (1 - sign), starts, axis=1)
        below = np.cumsum(down, axis=1) - down / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            return (up * below).sum(1) / (up.sum(1) * down.sum(1))

    return evaluate


def _probability_statistics(scores: np.ndarray, truth: np.ndarray, num_bins: int) -> Statistics:
    """Calibration error and Brier score."""
    if num_bins < 1:
        raise ValueError(f"classification_report: num_bins must be at least 1, got {num_bins}.")
    confidence, outcome = confidence_and_outcome(scores, truth)
    known = ~np.isnan(outcome)
    gap = np.where(known, np.nan_to_num(outcome) - confidence, 0)
    index = bin_index(confidence, num_bins)
    in_bins = np.stack([(gap * (index == b)).sum(1) for b in range(num_bins)], axis=1)  # (N, num_bins)
    squares, entries = squared_distances(scores, truth)

    def evaluate(weights: np.ndarray) -> dict[str, np.ndarray]:
        total = weights @ entries
        return {"ece": np.abs(weights @ in_bins).sum(1) / total, "brier": weights @ squares / total}

    return evaluate


def squared_distances(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the Brier score is the mean of: squared distances of each image, and of how many entries it is the sum.

    Args:
        scores: probabilities (N, K).
        truth: (N,) class indices, or (N, K) entries 0, 1; -1 unknown.

    Returns:
        (N,) each. Binary: (p - y)^2 of class 1; more classes: the sum over them, for one entry; multi-label: the sum
        over the known entries. An image without a label has no entry.
    """
    known = truth >= 0
    if truth.ndim == 2:
        return (np.where(known, scores - truth, 0) ** 2).sum(1), known.sum(1).astype(np.float64)
    distances = (scores - np.eye(scores.shape[1])[truth]) ** 2
    squares = distances[:, 1] if scores.shape[1] == 2 else distances.sum(1)
    return np.where(known, squares, 0), known.astype(np.float64)


def area_under_roc(scores: Any, labels: Any) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Args:
        scores: (N,) any real numbers that grow with the belief in class 1.
        labels: (N,) 0, 1, or -1 (ignored).

    Returns:
        value in [0, 1]; NaN when one class is missing.

    Raises:
        ValueError: for shapes that differ, scores that are not finite, or other labels.
    """
    values, truth = _scores_and_truth(scores, labels, "area_under_roc")
    return float(_auc_statistic(values, truth == 1)(np.ones((1, len(values))))[0])


def macro_auc(probabilities: Any, labels: Any) -> float:
    """Mean over classes of the one-against-rest area under the ROC curve; the area itself when binary.

    Args:
        probabilities: (N, K).
        labels: (N,) class indices, -1 unlabelled; or (N, K) entries 0, 1, -1 (unknown).

    Returns:
        value in [0, 1]; classes that all or no images have are left out; NaN when none is left.

    Raises:
        ValueError: for wrong shapes or labels out of range.
    """
    scores = as_array(probabilities)
    if scores.ndim != 2:
        raise ValueError(f"macro_auc: probabilities must be (N, K), got shape {scores.shape}.")
    truth = check_labels(labels, scores.shape[1], "macro_auc")
    if is_multi_label(truth, None, "macro_auc"):
        hot = truth
    else:
        hot = np.where(truth[:, None] < 0, -1, truth[:, None] == np.arange(scores.shape[1]))
    columns = range(1, 2) if truth.ndim == 1 and scores.shape[1] == 2 else range(scores.shape[1])
    areas = np.array([area_under_roc(scores[:, k], hot[:, k]) for k in columns])
    return float(np.nan if np.isnan(areas).all() else np.nanmean(areas))


def roc_curve(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of the ROC curve, one for each distinct score.

    Args:
        scores: (N,) real numbers.
        labels: (N,) 0, 1, or -1 (ignored).

    Returns:
        false positive rates, true positive rates and thresholds (positive where score >= threshold), each (G + 1,),
        from (0, 0) at an infinite threshold to (1, 1).

    Raises:
        ValueError: for shapes that differ, scores that are not finite, other labels, or a missing class.
    """
    values, truth = _scores_and_truth(scores, labels, "roc_curve")
    if len(np.unique(truth)) < 2:
        raise ValueError("roc_curve: labelled images of both classes are needed.")
    thresholds = np.unique(values)[::-1]
    negative, positive = (np.sort(-values[truth == k]) for k in (0, 1))
    rates = [np.searchsorted(group, -thresholds, side="right") / len(group) for group in (negative, positive)]
    return np.append(0.0, rates[0]), np.append(0.0, rates[1]), np.append(np.inf, thresholds)


def _scores_and_truth(scores: Any, labels: Any, caller: str) -> tuple[np.ndarray, np.ndarray]:
    values, truth = as_array(scores), check_labels(labels, 2, caller)
    if values.ndim != 1 or values.shape != truth.shape or not np.isfinite(values).all():
        raise ValueError(f"{caller}: finite scores (N,) and labels (N,) expected, got {values.shape}, {truth.shape}.")
    return values[truth >= 0], truth[truth >= 0]
