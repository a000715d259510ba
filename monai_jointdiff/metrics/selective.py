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


"""Selective prediction: how right a classifier is on the images it is sure of, and the scores it goes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from monai_jointdiff.metrics.bootstrap import Interval, Statistics, bootstrap_intervals
from monai_jointdiff.metrics.classification import _columns, squared_distances
from monai_jointdiff.metrics.counterfactual import group_keys
from monai_jointdiff.metrics.cumulative import MacroAUCMetric
from monai_jointdiff.metrics.inputs import as_array, check_labels, check_probabilities, is_multi_label

__all__ = [
    "BrierScoreMetric",
    "RiskCoverageCurve",
    "SelectiveReport",
    "abstention_threshold",
    "accuracy_at_coverage",
    "area_under_risk_coverage",
    "brier_score",
    "excess_area_under_risk_coverage",
    "predictive_entropy",
    "risk_coverage_curve",
    "selective_report",
]

# Relative distance within which uncertainties are tied: 0.3 x 0.7 and 0.7 x (1 - 0.7) are the same share of votes, and
# differ by rounding, in single precision by 2e-7.
_TIE = 5e-7


@dataclass(frozen=True)
class RiskCoverageCurve:
    """Error of a classifier that decides for the least uncertain images only (El-Yaniv and Wiener 2010).

    One point for each distinct uncertainty, since images of the same uncertainty enter together. Between two points
    the images of the next one enter in random order, and the risk is its expectation.

    Args:
        coverage: (M,) share of the images with at most the threshold's uncertainty, increasing to 1.
        risk: (M,) share of wrong decisions among them.
        thresholds: (M,) distinct uncertainties, increasing.
        count: number of images N.
    """

    coverage: np.ndarray
    risk: np.ndarray
    thresholds: np.ndarray
    count: int

    def risk_at(self, coverage: Any) -> np.ndarray:
        """Expected risk at any coverage: the rule accepts images at the last threshold at random to reach it exactly.

        Args:
            coverage: one share or an array of them, each in (0, 1].

        Returns:
            risk in [0, 1], of the shape of `coverage`.

        Raises:
            ValueError: for a coverage outside (0, 1].
        """
        shares = _coverages(coverage, "RiskCoverageCurve.risk_at")
        return _risk(np.append(0.0, self.coverage), np.append(0.0, self.coverage * self.risk), shares)

    @property
    def area(self) -> float:
        """Area under the curve: see :func:`area_under_risk_coverage`."""
        counts = np.append(0.0, np.round(self.coverage * self.count))
        return float(_area(counts[None], counts[None] * np.append(0.0, self.risk))[0])


def risk_coverage_curve(uncertainty: Any, correct: Any) -> RiskCoverageCurve:
    """Risk against coverage, one point for each distinct uncertainty: no order of the input decides between ties.

    Args:
        uncertainty: (N,) real numbers, any scale: only their order counts. Values whose relative distance is at most
            5e-7 are tied, so that the rounding of equal shares of votes makes no order; a confidence close to 1 is
            therefore better given as 1 - p than as -p.
        correct: (N,) whether each decision is right: bool, 0 and 1, or a share in [0, 1].

    Returns:
        the curve.

    Raises:
        ValueError: for no images, shapes that differ, or values that are not finite or not in range.
    """
    values, loss = _uncertainty_and_loss(uncertainty, correct, "risk_coverage_curve")
    order, starts = _tie_groups(values)
    counts, errors = (part[0] for part in _cumulative(values, loss)(np.ones((1, len(values)))))
    return RiskCoverageCurve(
        coverage=counts[1:] / len(values),
        risk=errors[1:] / counts[1:],
        thresholds=values[order][np.append(starts[1:], len(values)) - 1],
        count=len(values),
    )


def accuracy_at_coverage(uncertainty: Any, correct: Any, coverage: float) -> float:
    """Accuracy on the least uncertain share of the images.

    Where the share ends among images of the same uncertainty, the accuracy is the expectation over a random order of
    them; where it ends within an image, that image counts with the part that is covered.

    Args:
        uncertainty: as in :func:`risk_coverage_curve`.
        correct: as in :func:`risk_coverage_curve`.
        coverage: share of the images, in (0, 1].

    Returns:
        value in [0, 1].

    Raises:
        ValueError: as :func:`risk_coverage_curve`, or for a coverage outside (0, 1].
    """
    share = _coverages(coverage, "accuracy_at_coverage")
    return 1 - float(risk_coverage_curve(uncertainty, correct).risk_at(share))


def area_under_risk_coverage(uncertainty: Any, correct: Any) -> float:
    """Area under the risk-coverage curve (AURC): the mean risk over the coverages 1/N, 2/N, ..., 1.

    Geifman and El-Yaniv 2017, arXiv:1705.08500 (the curve); Geifman et al. 2019, arXiv:1805.08206 (the area). Images of
    the same uncertainty come in random order, and the area is its expectation. Uncertainty that says nothing gives
    the error rate.

    Args:
        uncertainty: as in :func:`risk_coverage_curve`.
        correct: as in :func:`risk_coverage_curve`.

    Returns:
        value in [0, 1], the lower the better.

    Raises:
        ValueError: as :func:`risk_coverage_curve`.
    """
    values, loss = _uncertainty_and_loss(uncertainty, correct, "area_under_risk_coverage")
    return risk_coverage_curve(values, 1 - loss).area


def excess_area_under_risk_coverage(uncertainty: Any, correct: Any) -> float:
    """Excess area (E-AURC): the area minus that of the best order, which puts all wrong decisions last.

    Geifman et al. 2019, arXiv:1805.08206, with the area of the best order as the sum itself. Unlike the
    area it does not reward a classifier for being right more often.

    Args:
        uncertainty: as in :func:`risk_coverage_curve`.
        correct: as in :func:`risk_coverage_curve`.

    Returns:
        value in [0, 1], 0 for the best order.

    Raises:
        ValueError: as :func:`risk_coverage_curve`.
    """
    values, loss = _uncertainty_and_loss(uncertainty, correct, "excess_area_under_risk_coverage")
    return risk_coverage_curve(values, 1 - loss).area - risk_coverage_curve(loss, 1 - loss).area


def abstention_threshold(uncertainty: Any, coverage: float) -> float:
    """Smallest threshold at which a reference sample is covered: decide where uncertainty <= threshold, else abstain.

    Where many images have the same uncertainty, more of the sample may be covered than was asked for.

    Args:
        uncertainty: (N,) of a reference sample, such as the validation images.
        coverage: share of the sample to decide on, in (0, 1].

    Returns:
        the threshold, one of the sample's uncertainties.

    Raises:
        ValueError: for no images, values that are not finite, or a coverage outside (0, 1].
    """
    share = float(_coverages(coverage, "abstention_threshold"))
    values = _check_uncertainty(uncertainty, "abstention_threshold")
    curve = risk_coverage_curve(values, np.ones(len(values)))
    # a share such as 0.1 + 0.2 is a rounding error away from 3 images in 10
    return float(curve.thresholds[np.argmax(curve.coverage >= share - 1e-12)])


def _check_uncertainty(uncertainty: Any, caller: str) -> np.ndarray:
    values = as_array(uncertainty)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"{caller}: finite uncertainty (N,) with N >= 1 expected, got shape {values.shape}.")
    return values


def _uncertainty_and_loss(uncertainty: Any, correct: Any, caller: str) -> tuple[np.ndarray, np.ndarray]:
    values, right = _check_uncertainty(uncertainty, caller), as_array(correct)
    if right.shape != values.shape:
        raise ValueError(f"{caller}: correct must be {values.shape} as uncertainty is, got {right.shape}.")
    if not ((right >= 0) & (right <= 1)).all():  # NaN fails too
        raise ValueError(f"{caller}: correct must be True or False, or a share in [0, 1].")
    return values, 1 - right


def _coverages(coverage: Any, caller: str) -> np.ndarray:
    shares = as_array(coverage)
    if not shares.size or not ((shares > 0) & (shares <= 1)).all():
        raise ValueError(f"{caller}: coverage must lie in (0, 1], got {shares.tolist()}.")
    return shares


def _tie_groups(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order from the smallest value on, and where in it each group of tied values starts."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    size = np.maximum(np.abs(ordered[1:]), np.abs(ordered[:-1]))
    return order, np.flatnonzero(np.concatenate([[True], np.diff(ordered) > _TIE * size]))


def _cumulative(uncertainty: np.ndarray, loss: np.ndarray) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images and errors up to each distinct uncertainty, (b, M + 1) from 0 on, as a function of weights (b, N)."""
    order, starts = _tie_groups(uncertainty)
    sorted_loss = loss[order]

    def evaluate(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = weights[:, order]
        groups = (np.add.reduceat(part, starts, axis=1) for part in (weights, weights * sorted_loss))
        counts, errors = (np.pad(group.cumsum(1), ((0, 0), (1, 0))) for group in groups)
        return counts, errors

    return evaluate


def _risk(counts: np.ndarray, errors: np.ndarray, coverages: np.ndarray) -> np.ndarray:
    """Errors per covered image: in a random order within ties, expected errors grow linearly with the images."""
    covered = coverages * counts[-1]
    return np.interp(covered, counts, errors) / covered


def _area(counts: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Mean over m = 1, ..., N of the expected risk on the first m images, from cumulative (b, M + 1).

    Among images of one uncertainty, with error rate r and after N' images with E' errors, the expected risk on m is
    (E' + r (m - N')) / m = r + (E' - r N') / m, so that a sum over m is one of harmonic numbers.
    """
    images, wrong = np.diff(counts), np.diff(errors)
    rate = wrong / np.maximum(images, 1)  # a resample may have none of them
    harmonic = np.append(0.0, np.cumsum(1 / np.arange(1, counts.max() + 1)))
    steps = np.diff(harmonic[counts.astype(np.int64)])
    return (wrong + (errors[:, :-1] - rate * counts[:, :-1]) * steps).sum(1) / counts[:, -1]


@dataclass(frozen=True)
class SelectiveReport:
    """How right a classifier is when it may abstain from the most uncertain images, with bootstrap intervals.

    Args:
        coverages: shares of the images it decides on.
        accuracy: for each coverage the accuracy on the images decided (see :func:`accuracy_at_coverage`).
        aurc: area under the risk-coverage curve.
        e_aurc: the same minus the area of the best order.
        curve: the risk-coverage curve.
        count: images with a known label.
        ignored: images without one.
        bootstrap: number of resamples, confidence, seed, and how they were drawn.
    """

    coverages: tuple[float, ...]
    accuracy: tuple[Interval, ...]
    aurc: Interval
    e_aurc: Interval
    curve: RiskCoverageCurve
    count: int
    ignored: int
    bootstrap: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the curve, as JSON holds it.

        Returns:
            `accuracy_at_coverage`, a list of `{"coverage", "value", "low", "high"}`; `aurc` and `e_aurc`; the number
            of distinct uncertainties; counts and settings.
        """
        return {
            "count": self.count,
            "ignored": self.ignored,
            "distinct_uncertainties": len(self.curve.thresholds),
            "accuracy_at_coverage": [
                {"coverage": coverage, **interval.as_dict()}
                for coverage, interval in zip(self.coverages, self.accuracy, strict=True)
            ],
            "aurc": self.aurc.as_dict(),
            "e_aurc": self.e_aurc.as_dict(),
            "bootstrap": dict(self.bootstrap),
        }

    def table(self) -> str:
        """The figures as text, for a terminal."""
        rows = [
            (f"accuracy on {100 * coverage:g} %", str(interval))
            for coverage, interval in zip(self.coverages, self.accuracy, strict=True)
        ]
        rows += [("AURC", _four_decimals(self.aurc)), ("E-AURC", _four_decimals(self.e_aurc))]
        ignored = f", {self.ignored} without a label left out" if self.ignored else ""
        distinct = f"{len(self.curve.thresholds)} distinct uncertainties"
        return "\n".join([f"{self.count} images{ignored}; {distinct}", *_columns(rows)])


def _four_decimals(interval: Interval) -> str:
    """As `str` of an interval, with one decimal more: the area of a good classifier is a few thousandths."""
    text = f"{interval.value:.4f}"
    return text if interval.low is None else f"{text} ({interval.low:.4f} to {interval.high:.4f})"


def selective_report(
    probabilities: Any,
    uncertainty: Any,
    labels: Any,
    coverages: Sequence[float] = (1.0, 0.9, 0.8, 0.5),
    decided: Any = None,
    bootstrap: int = 1000,
    seed: int = 0,
    *,
    multi_label: bool | None = None,
    groups: Any = None,
    confidence: float = 0.95,
) -> SelectiveReport:
    """Evaluate predictions of which the most uncertain ones may be withheld.

    Calibration error and Brier score, which look at the probabilities themselves, are in
    :func:`~monai_jointdiff.metrics.classification.classification_report`.

    Args:
        probabilities: (N, K); rows sum to 1 unless multi-label.
        uncertainty: (N,) real numbers, such as :func:`predictive_entropy` or what voting gives.
        labels: (N,) class indices, -1 unlabelled; or (N, K) entries 0, 1, and -1 or NaN for unknown (multi-label): an
            image then counts with the share of its known entries that are decided right.
        coverages: shares of the images to decide on, each in (0, 1].
        decided: (N,) class indices, or (N, K) entries 0 and 1 when multi-label, where the decision is not by the
            probabilities alone; None: the largest probability; binary and multi-label: p >= 0.5.
        bootstrap: number of resamples; 0: no intervals.
        seed: of the resamples.
        multi_label: None leaves it to the shape of `labels`.
        groups: (N,) keys such as patients: whole groups are drawn. None: every image for itself.
        confidence: of the intervals.

    Returns:
        the report.

    Raises:
        ValueError: for input of the wrong shape or range, or no known label.
    """
    name = "selective_report"
    scores, truth = _checked(probabilities, labels, multi_label, name)
    values = _check_uncertainty(uncertainty, name)
    if len(values) != len(truth):
        raise ValueError(f"{name}: {len(values)} uncertainties for {len(truth)} labels.")
    shares = np.atleast_1d(_coverages(coverages, name))
    keys = group_keys(groups, len(truth), name)
    chosen = _decisions(scores, truth.ndim == 2) if decided is None else _check_decided(decided, truth, scores.shape[1])
    known = (truth >= 0).reshape(len(truth), -1)
    kept = known.any(1)
    right = ((chosen == truth).reshape(known.shape) & known).sum(1)[kept] / known.sum(1)[kept]
    values = values[kept]

    intervals = bootstrap_intervals(
        _statistics(values, 1 - right, shares),
        len(values),
        bootstrap,
        seed,
        groups=None if keys is None else keys[kept],
        confidence=confidence,
    )
    return SelectiveReport(
        coverages=tuple(shares.tolist()),
        accuracy=tuple(intervals[f"accuracy/{k}"] for k in range(len(shares))),
        aurc=intervals["aurc"],
        e_aurc=intervals["e_aurc"],
        curve=risk_coverage_curve(values, right),
        count=len(values),
        ignored=int((~kept).sum()),
        bootstrap={
            "resamples": bootstrap,
            "confidence": confidence,
            "seed": seed,
            "drawn": "images" if keys is None else "groups",
        },
    )


def _statistics(uncertainty: np.ndarray, loss: np.ndarray, coverages: np.ndarray) -> Statistics:
    """The figures as a function of bootstrap weights (b, N)."""
    ranked, best = _cumulative(uncertainty, loss), _cumulative(loss, loss)

    def evaluate(weights: np.ndarray) -> dict[str, np.ndarray]:
        counts, errors = ranked(weights)
        area = _area(counts, errors)
        accuracy = 1 - np.stack([_risk(*row, coverages) for row in zip(counts, errors, strict=True)])
        named = {f"accuracy/{k}": column for k, column in enumerate(accuracy.T)}
        return named | {"aurc": area, "e_aurc": area - _area(*best(weights))}

    return evaluate


def _checked(probabilities: Any, labels: Any, multi_label: bool | None, caller: str) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, K) and labels, (N,) or (N, K), of which one at least is known."""
    truth = as_array(labels)
    scores = check_probabilities(probabilities, truth, is_multi_label(truth, multi_label, caller), caller)
    truth = check_labels(truth, scores.shape[1], caller)
    if not (truth >= 0).any():
        raise ValueError(f"{caller}: none of the {len(truth)} images has a known label.")
    return scores, truth


def _decisions(scores: np.ndarray, multi_label: bool) -> np.ndarray:
    if multi_label:
        return scores >= 0.5
    return scores[:, 1] >= 0.5 if scores.shape[1] == 2 else scores.argmax(1)


def _check_decided(decided: Any, truth: np.ndarray, num_classes: int) -> np.ndarray:
    chosen = as_array(decided)
    if chosen.shape != truth.shape:
        raise ValueError(f"selective_report: decided must be {truth.shape} as labels are, got {chosen.shape}.")
    chosen = check_labels(chosen, num_classes, "selective_report")
    if (chosen < 0).any():
        raise ValueError("selective_report: decided must be from 0 on for every image; uncertainty says which to drop.")
    return chosen


def brier_score(probabilities: Any, labels: Any, multi_label: bool | None = None) -> float:
    """Brier score: squared distance of the probabilities from what came true (Brier 1950).

    Of two classes it is that of class 1 alone, half the sum over both, as scikit-learn's `brier_score_loss` and
    :func:`~monai_jointdiff.metrics.classification.classification_report` have it.

    Args:
        probabilities: (N, K); rows sum to 1 unless multi-label.
        labels: (N,) class indices, -1 unlabelled; or (N, K) entries 0, 1, and -1 or NaN for unknown (multi-label).
        multi_label: None leaves it to the shape of `labels`.

    Returns:
        binary: mean over labelled images of (p - y)^2 of class 1, in [0, 1]; more classes: mean of the sum over
        classes, in [0, 2]; multi-label: mean over known entries, in [0, 1].

    Raises:
        ValueError: for input of the wrong shape or range, or no known label.
    """
    scores, truth = _checked(probabilities, labels, multi_label, "brier_score")
    squares, entries = squared_distances(scores, truth)
    return float(squares.sum() / entries.sum())


class BrierScoreMetric(MacroAUCMetric):
    """Brier score over a whole validation run, as :func:`brier_score` has it; unlabelled images are left out.

    For :class:`monai.handlers.IgniteMetricHandler`, with what :class:`~monai_jointdiff.metrics.MacroAUCMetric` takes.
    The lower the better: where it selects a checkpoint, `key_metric_negative_sign=True` says so.

    Args:
        multi_label: labels are (N, K) entries 0, 1, -1, and logits go through a sigmoid instead of a softmax.
        from_logits: False when the predictions are probabilities already.
    """

    def aggregate(self) -> float:
        """The score over all images since the last reset.

        Returns:
            value in [0, 1], of more than two classes in [0, 2]; NaN when no label is known.
        """
        scores, labels = self.get_buffer()
        return brier_score(scores, labels, self.multi_label) if (labels >= 0).any() else float("nan")


def predictive_entropy(probabilities: Any, multi_label: bool = False) -> np.ndarray:
    """Entropy of each image's predicted distribution, in nats.

    Args:
        probabilities: (N, K); rows sum to 1 unless multi-label.
        multi_label: columns are independent.

    Returns:
        (N,) in [0, log K]; multi-label: mean over labels of the binary entropy, in [0, log 2].

    Raises:
        ValueError: for another shape, or values that are no probabilities.
    """
    values = as_array(probabilities)
    scores = torch.from_numpy(check_probabilities(values, values, multi_label, "predictive_entropy"))
    if multi_label:
        return (torch.special.entr(scores) + torch.special.entr(1 - scores)).mean(1).numpy()
    return torch.special.entr(scores).sum(1).numpy()
