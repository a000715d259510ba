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

"""Temperature, decision threshold and calibration error of predicted probabilities."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from monai_jointdiff.metrics.inputs import as_array, check_labels, check_probabilities, is_multi_label

__all__ = [
    "ReliabilityBins",
    "choose_threshold",
    "confidence_and_outcome",
    "expected_calibration_error",
    "fit_temperature",
    "reliability_bins",
]

_TEMPERATURES = (0.05, 20.0)  # of the spread of the logits; beyond, probabilities are one-hot or uniform to the eye
_SMALLEST_PROBABILITY = 1e-6  # where the logit axis ends, for plateaus that are open on one side


def fit_temperature(logits: Any, labels: Any, multi_label: bool | None = None) -> float:
    r"""Temperature T > 0 that minimizes the negative log-likelihood of softmax(logits / T) (sigmoid when multi-label).

    One scalar for all classes, so accuracy and (binary) AUC do not change. Guo et al., ICML 2017, equation 9,
    arXiv:1706.04599. Found by LBFGS in log T, float64. T goes with the size of the logits: those of a head, logarithms
    of votes, or sums of squared errors.

    Args:
        logits: (N, K), of data the network was not trained on. Minus infinity is a class that has been ruled out; an
            image whose own class has been says nothing about T and is left out.
        labels: (N,) class indices, -1 unlabelled; or (N, K) entries 0, 1, and -1 or NaN for unknown.
        multi_label: None leaves it to the shape of `labels`.

    Returns:
        T from 0.05 to 20 times the spread of the logits: the mean over images of the largest minus the smallest one
        (multi-label: of their size). The likelihood of separable data has no maximum (T would go to 0): the end of the
        range is then returned with a warning. 1 where the logits of no image differ.

    Raises:
        ValueError: for wrong shapes, logits that are NaN or infinite, or no labelled image.
    """
    array = as_array(logits)
    if array.ndim != 2 or not (np.isfinite(array) | np.isneginf(array)).all():
        raise ValueError(
            f"fit_temperature: logits must be (N, K), finite or minus infinity, got shape {array.shape}"
            f"{'' if array.ndim != 2 else ' with NaN or infinity'}."
        )
    targets = check_labels(labels, array.shape[1], "fit_temperature")
    multi_label = is_multi_label(targets, multi_label, "fit_temperature")
    if len(targets) != len(array) or not (targets >= 0).any():
        raise ValueError(f"fit_temperature: {len(array)} rows of logits, {(targets >= 0).sum()} known labels.")
    if multi_label:
        array, targets = _questions(array, targets)
    array, targets = array[targets >= 0], targets[targets >= 0]
    possible = np.isfinite(array[np.arange(len(array)), targets])
    if not possible.any():
        raise ValueError("fit_temperature: the class of every labelled image has been ruled out.")
    array, targets = array[possible], targets[possible]
    ruled_out = np.isneginf(array)
    spread = float((array.max(1) - np.where(ruled_out, np.inf, array).min(1)).mean())
    if spread == 0:
        return 1.0
    in_race, out = torch.from_numpy(np.where(ruled_out, 0.0, array) / spread), torch.from_numpy(ruled_out)
    truth = torch.from_numpy(targets)

    def negative_log_likelihood(log_temperature: torch.Tensor) -> torch.Tensor:
        scaled = (in_race * torch.exp(-log_temperature)).masked_fill(out, -torch.inf)
        return F.cross_entropy(scaled, truth)

    relative = float(np.exp(_minimize(negative_log_likelihood)))
    low, high = _TEMPERATURES
    if not low < relative < high:
        limit = spread * min(max(relative, low), high)
        warnings.warn(f"fit_temperature: the best temperature lies beyond {limit:g}, which is used.", stacklevel=2)
        return limit
    return spread * relative


def _questions(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each label as a question with two answers: the softmax of (0, z) is the sigmoid of z."""
    present = logits.ravel()
    return np.stack([np.zeros_like(present), present], axis=1), labels.ravel().astype(np.int64)


def _minimize(objective: Any) -> float:
    """Where a smooth function of one scalar is smallest, by LBFGS from 0."""
    point = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [point], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value: torch.Tensor = objective(point)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)
    return float(point.detach())


def choose_threshold(probabilities: Any, labels: Any, criterion: str = "balanced_accuracy") -> float:
    """Decision threshold t on validation data: an image is called positive when p >= t.

    Between two neighboring probabilities nothing changes, so the best thresholds form plateaus. The middle of the
    (widest best) plateau in logit space is taken: the largest margin on either side, which a shifted test set needs.

    Args:
        probabilities: (N,) of the positive class, or (N, 2).
        labels: (N,) 0, 1, or -1 (ignored).
        criterion: `"balanced_accuracy"`, `"accuracy"`, or `"youden"` (sensitivity + specificity - 1, which has its
            maximum where balanced accuracy has).

    Returns:
        threshold in (0, 1).

    Raises:
        ValueError: for wrong shapes, an unknown criterion, or labels of a single class.
    """
    scores = as_array(probabilities)
    scores = scores[:, 1] if scores.ndim == 2 and scores.shape[1] == 2 else scores
    truth = check_labels(labels, 2, "choose_threshold")
    if scores.ndim != 1 or scores.shape != truth.shape:
        raise ValueError(
            f"choose_threshold: probabilities (N,) or (N, 2) and labels (N,) expected, "
            f"got {scores.shape}, {truth.shape}."
        )
    scores, truth = scores[truth >= 0], truth[truth >= 0]
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("choose_threshold: probabilities must lie in [0, 1] and be finite; were logits given?")
    if len(np.unique(truth)) < 2:
        raise ValueError("choose_threshold: labelled images of both classes are needed.")
    values = np.unique(scores)
    edges = np.concatenate([[0.0], values, [1.0]])
    # every t in (edges[i], edges[i + 1]] calls the scores from edges[i + 1] on positive
    positive, negative = np.sort(scores[truth == 1]), np.sort(scores[truth == 0])
    sensitivity = np.append(1 - np.searchsorted(positive, values) / len(positive), 0)
    specificity = np.append(np.searchsorted(negative, values) / len(negative), 1)
    quality = _quality(sensitivity, specificity, truth.mean(), criterion)
    quality[np.diff(edges) <= 0] = -np.inf  # no room for a threshold
    return _middle_of_plateau(edges, quality >= quality.max() - 1e-12)


def _quality(sensitivity: np.ndarray, specificity: np.ndarray, prevalence: float, criterion: str) -> np.ndarray:
    if criterion == "balanced_accuracy":
        return (sensitivity + specificity) / 2
    if criterion == "youden":
        return sensitivity + specificity - 1
    if criterion == "accuracy":
        return prevalence * sensitivity + (1 - prevalence) * specificity
    raise ValueError(
        f"choose_threshold: criterion must be 'balanced_accuracy', 'accuracy' or 'youden', got {criterion!r}."
    )


def _middle_of_plateau(edges: np.ndarray, best: np.ndarray) -> float:
    """Middle in logit space of the widest run of best intervals (edges[i], edges[i + 1]]."""
    changes = np.flatnonzero(np.diff(np.concatenate([[0], best.astype(int), [0]])))
    runs = [(edges[start], edges[stop]) for start, stop in changes.reshape(-1, 2)]
    low, high = max(runs, key=lambda run: _logit(run[1]) - _logit(run[0]))
    middle = float(1 / (1 + np.exp(-(_logit(low) + _logit(high)) / 2)))
    # beyond the end of the logit axis, and where low and high differ by rounding only
    return middle if low < middle <= high else float(high if high < 1 else (low + high) / 2)


def _logit(probability: float) -> float:
    clipped = np.clip(probability, _SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY)
    return float(np.log(clipped) - np.log1p(-clipped))


@dataclass(frozen=True)
class ReliabilityBins:
    """What a reliability diagram shows: predictions sorted into bins of equal width over [0, 1].

    Args:
        edges: (B + 1,) borders; a bin holds its left border, the last one both.
        counts: (B,) predictions in each bin.
        confidence: (B,) mean predicted probability; NaN in an empty bin.
        frequency: (B,) how often the prediction came true; NaN in an empty bin.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    frequency: np.ndarray

    @property
    def expected_error(self) -> float:
        """Expected calibration error: the mean of |frequency - confidence| over predictions."""
        filled = self.counts > 0
        gaps = np.abs(self.frequency - self.confidence)[filled]
        return float((gaps * self.counts[filled]).sum() / self.counts.sum())

    @property
    def maximum_error(self) -> float:
        """Largest |frequency - confidence| of a bin that holds something."""
        return float(np.nanmax(np.abs(self.frequency - self.confidence)))


def confidence_and_outcome(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The probabilities whose calibration is judged, and whether what they announce came true.

    Binary: the probability of class 1. Multi-class: the largest probability, and whether that class is right (Guo et
    al., ICML 2017). Multi-label: every entry for itself.

    Args:
        probabilities: (N, K).
        labels: (N,) or (N, K), -1 unknown.

    Returns:
        confidence and outcome, (N, 1) or (N, K); the outcome is 0, 1, or NaN where unknown.
    """
    if labels.ndim == 2:
        return probabilities, np.where(labels < 0, np.nan, labels)
    if probabilities.shape[1] == 2:
        confidence, outcome = probabilities[:, 1], labels == 1
    else:
        confidence, outcome = probabilities.max(1), probabilities.argmax(1) == labels
    return confidence[:, None], np.where(labels < 0, np.nan, outcome)[:, None]


def bin_index(confidence: np.ndarray, num_bins: int) -> np.ndarray:
    """Number of the bin of equal width in which each probability lies."""
    return np.minimum((confidence * num_bins).astype(np.int64), num_bins - 1)


def reliability_bins(
    probabilities: Any, labels: Any, num_bins: int = 15, multi_label: bool | None = None
) -> ReliabilityBins:
    """Sort predictions into bins of equal width (see :func:`confidence_and_outcome` for which probability counts).

    Args:
        probabilities: (N, K).
        labels: (N,) class indices, -1 unlabelled; or (N, K) entries 0, 1, -1.
        num_bins: number of bins.
        multi_label: None leaves it to the shape of `labels`.

    Returns:
        the bins; entries with unknown label are in none.

    Raises:
        ValueError: for wrong input, less than one bin, or no known label.
    """
    if num_bins < 1:
        raise ValueError(f"reliability_bins: num_bins must be at least 1, got {num_bins}.")
    truth, probabilities = as_array(labels), as_array(probabilities)
    multi_label = is_multi_label(truth, multi_label, "reliability_bins")
    probabilities = check_probabilities(probabilities, truth, multi_label, "reliability_bins")
    truth = check_labels(truth, probabilities.shape[1], "reliability_bins")
    confidence, outcome = confidence_and_outcome(probabilities, truth)
    known = ~np.isnan(outcome)
    if not known.any():
        raise ValueError("reliability_bins: no known label.")
    confidence, outcome = confidence[known], outcome[known]
    index = bin_index(confidence, num_bins)
    counts = np.bincount(index, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(index, values, num_bins) / counts for values in (confidence, outcome)]
    return ReliabilityBins(np.linspace(0, 1, num_bins + 1), counts, *means)


def expected_calibration_error(
    probabilities: Any, labels: Any, num_bins: int = 15, multi_label: bool | None = None
) -> float:
    """Expected calibration error with bins of equal width (Guo et al., ICML 2017, equation 3).

    Args:
        probabilities: (N, K).
        labels: (N,) class indices, -1 unlabelled; or (N, K) entries 0, 1, -1.
        num_bins: number of bins.
        multi_label: None leaves it to the shape of `labels`.

    Returns:
        error in [0, 1]. It grows with fewer images per bin, also for a perfectly calibrated model.
    """
    return reliability_bins(probabilities, labels, num_bins, multi_label).expected_error
