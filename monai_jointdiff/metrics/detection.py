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


"""Out-of-distribution detection: how well a score tells unusual images apart, and controls that need no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_jointdiff.metrics.bootstrap import Interval, Statistics, bootstrap_intervals
from monai_jointdiff.metrics.classification import _auc_statistic, _columns
from monai_jointdiff.metrics.inputs import as_array, check_probabilities
from monai_jointdiff.metrics.localization import _average_precision

__all__ = [
    "DetectionReport",
    "MomentsDetector",
    "PrincipalComponentDetector",
    "detection_report",
    "max_softmax_score",
]

decomposition, _ = optional_import("sklearn.decomposition")

_SENSITIVITY = 0.95  # share of the unusual images that a threshold has to find
_RIDGE = 1e-6  # of the mean variance, added to every variance: replicated channels leave directions without any


@dataclass(frozen=True)
class DetectionReport:
    """How well a score tells out-of-distribution images, the positive class, from usual ones.

    Args:
        auroc: area under the ROC curve: the chance that an unusual image scores above a usual one, ties for half.
        aupr: area under the precision-recall curve (average precision, as scikit-learn defines it); a score that knows
            nothing reaches `prevalence`.
        fpr_at_95_tpr: lowest share of the usual images that a threshold flags which flags 95 % of the unusual ones.
        count_in: number of usual images.
        count_out: number of out-of-distribution images.
        bootstrap: number of resamples, confidence, seed, and how they were drawn.
    """

    auroc: Interval
    aupr: Interval
    fpr_at_95_tpr: Interval
    count_in: int
    count_out: int
    bootstrap: Mapping[str, Any]

    @property
    def prevalence(self) -> float:
        """Share of the images that are out of distribution."""
        return self.count_out / (self.count_in + self.count_out)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return {
            "auroc": self.auroc.as_dict(),
            "aupr": self.aupr.as_dict(),
            "fpr_at_95_tpr": self.fpr_at_95_tpr.as_dict(),
            "count_in": self.count_in,
            "count_out": self.count_out,
            "prevalence": self.prevalence,
            "bootstrap": dict(self.bootstrap),
        }

    def table(self) -> str:
        """The figures as text, for a terminal."""
        rows = [
            ("AUROC", str(self.auroc)),
            ("AUPR", f"{self.aupr}; chance {self.prevalence:.3f}"),
            ("FPR at 95 % TPR", str(self.fpr_at_95_tpr)),
        ]
        head = f"{self.count_out} out-of-distribution images against {self.count_in} usual ones"
        return "\n".join([head, *_columns(rows)])


def detection_report(
    scores_in: Any, scores_out: Any, bootstrap: int = 1000, seed: int = 0, *, confidence: float = 0.95
) -> DetectionReport:
    """Evaluate a score that grows with how unusual an image is.

    Args:
        scores_in: (N,) real numbers of usual images that had no part in fitting the score.
        scores_out: (M,) of out-of-distribution images.
        bootstrap: number of resamples, drawn among the usual and among the unusual images apart; 0: no intervals.
        seed: of the resamples.
        confidence: of the intervals.

    Returns:
        the report.

    Raises:
        ValueError: for no images, another shape, or scores that are not finite.
    """
    usual, unusual = as_array(scores_in), as_array(scores_out)
    for name, values in (("scores_in", usual), ("scores_out", unusual)):
        if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
            raise ValueError(f"detection_report: {name} must be finite and (N,) with N >= 1, got shape {values.shape}.")
    positive = np.repeat([False, True], [len(usual), len(unusual)])
    intervals = bootstrap_intervals(
        _statistics(np.concatenate([usual, unusual]), positive),
        len(positive),
        bootstrap,
        seed,
        strata=positive,
        confidence=confidence,
    )
    return DetectionReport(
        **intervals,
        count_in=len(usual),
        count_out=len(unusual),
        bootstrap={
            "resamples": bootstrap,
            "confidence": confidence,
            "seed": seed,
            "drawn": "images within usual and unusual",
        },
    )


def _statistics(scores: np.ndarray, positive: np.ndarray) -> Statistics:
    """The figures as a function of bootstrap weights (b, N)."""
    auroc = _auc_statistic(scores, positive)
    order = np.argsort(-scores, kind="stable")
    sign = positive[order].astype(np.float64)
    starts = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) < 0]))  # equal scores are flagged together

    def evaluate(weights: np.ndarray) -> dict[str, np.ndarray]:
        ordered = weights[:, order]
        hits, misses = (np.add.reduceat(ordered * part, starts, axis=1) for part in (sign, 1 - sign))
        found, flagged = hits.cumsum(1), misses.cumsum(1)
        first = (found / found[:, -1:] < _SENSITIVITY).sum(1, keepdims=True)
        return {
            "auroc": auroc(weights),
            "aupr": _average_precision(hits, misses),
            "fpr_at_95_tpr": np.take_along_axis(flagged, first, axis=1)[:, 0] / flagged[:, -1],
        }

    return evaluate


def max_softmax_score(probabilities: Any) -> np.ndarray:
    """How unusual an image is to a classifier: 1 - largest probability (Hendrycks and Gimpel 2017, arXiv:1610.02136).

    Args:
        probabilities: (N, K), rows sum to 1.

    Returns:
        (N,) in [0, 1 - 1/K], higher where the classifier is less sure.

    Raises:
        ValueError: for another shape, or values that are no probabilities.
    """
    values = as_array(probabilities)
    return 1 - check_probabilities(values, values, False, "max_softmax_score").max(1)


class MomentsDetector:
    """Mahalanobis distance of three plain numbers per channel from those of usual images; no network.

    The numbers are mean, standard deviation, and mean absolute difference of neighbouring pixels. A detector that looks
    at content has to beat this one, which sees only brightness, contrast and sharpness. Scores do not change when all
    images are scaled or shifted in intensity, or turned.
    """

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()
        self._mean = np.empty(0)
        self._whitening = np.empty((0, 0))

    def fit(self, images: Any) -> MomentsDetector:
        """Take mean and covariance of the numbers from usual images.

        Args:
            images: (N, C, *spatial) with N > 3 C, in 2D or 3D, every spatial axis of two pixels or more.

        Returns:
            the detector itself.

        Raises:
            ValueError: for another shape, too few images, values that are not finite, or images that do not differ.
        """
        values = _check_images(images, "MomentsDetector.fit")
        moments = _moments(values, "MomentsDetector.fit")
        count, size = moments.shape
        if count <= size:
            raise ValueError(f"MomentsDetector.fit: more than {size} images expected for {size} numbers, got {count}.")
        covariance = np.cov(moments.T)
        variance = covariance.trace() / size
        if not variance > 0:
            raise ValueError("MomentsDetector.fit: the images do not differ in mean, contrast or sharpness.")
        factor = np.linalg.cholesky(covariance + _RIDGE * variance * np.eye(size))
        self._shape, self._mean, self._whitening = values.shape[1:], moments.mean(0), np.linalg.inv(factor).T
        return self

    def score(self, images: Any) -> np.ndarray:
        """How far images are from the usual ones.

        Args:
            images: (N, C, *spatial) of the shape that was fitted.

        Returns:
            (N,) distance in standard deviations, 0 for the mean of the usual images.

        Raises:
            ValueError: for another shape or values that are not finite.
            RuntimeError: before :meth:`fit`.
        """
        values = _check_images(images, "MomentsDetector.score", self._shape)
        return np.linalg.norm((_moments(values, "MomentsDetector.score") - self._mean) @ self._whitening, axis=1)


class PrincipalComponentDetector:
    """Distance of an image from the space of the principal components of usual images; no network.

    Args:
        components: number of principal components, fewer than images and than pixels.
        seed: of the randomized decomposition.

    Raises:
        ValueError: for less than one component.
        OptionalImportError: without scikit-learn.
    """

    def __init__(self, components: int = 64, seed: int = 0) -> None:
        if components < 1:
            raise ValueError(f"PrincipalComponentDetector: components must be at least 1, got {components}.")
        self.components = components
        self._shape: tuple[int, ...] = ()
        self._model = decomposition.PCA(components, svd_solver="randomized", random_state=seed)

    def fit(self, images: Any) -> PrincipalComponentDetector:
        """Take mean and principal components from usual images.

        Args:
            images: (N, C, *spatial), in 2D or 3D.

        Returns:
            the detector itself.

        Raises:
            ValueError: for another shape, values that are not finite, or no fewer components than images or pixels.
        """
        values = _check_images(images, "PrincipalComponentDetector.fit")
        flat = values.reshape(len(values), -1)
        if self.components >= min(flat.shape):
            raise ValueError(
                f"PrincipalComponentDetector.fit: {self.components} components need more images and more pixels, "
                f"got {flat.shape[0]} images of {flat.shape[1]} pixels."
            )
        self._model.fit(flat)
        self._shape = values.shape[1:]
        return self

    def score(self, images: Any) -> np.ndarray:
        """What the components leave of images.

        Args:
            images: (N, C, *spatial) of the shape that was fitted.

        Returns:
            (N,) root mean square over channels and pixels of the residual, in units of intensity.

        Raises:
            ValueError: for another shape or values that are not finite.
            RuntimeError: before :meth:`fit`.
        """
        values = _check_images(images, "PrincipalComponentDetector.score", self._shape)
        flat = values.reshape(len(values), -1)
        residual = flat - self._model.inverse_transform(self._model.transform(flat))
        return np.sqrt(np.square(residual, dtype=np.float64).mean(1))


def _check_images(images: Any, caller: str, fitted: tuple[int, ...] | None = None) -> np.ndarray:
    """Images (N, C, *spatial) as float32, of the shape (C, *spatial) that was fitted where one has to be."""
    if fitted == ():
        raise RuntimeError(f"{caller}: call fit first.")
    values = as_array(images, np.float32)
    if values.ndim not in (4, 5) or not values.size or not np.isfinite(values).all():
        raise ValueError(f"{caller}: finite images (N, C, *spatial) in 2D or 3D expected, got shape {values.shape}.")
    if fitted is not None and values.shape[1:] != fitted:
        raise ValueError(f"{caller}: images of the fitted shape {fitted} expected, got {values.shape[1:]}.")
    return values


def _moments(images: np.ndarray, caller: str) -> np.ndarray:
    """(N, 3 C): mean, standard deviation, and mean absolute difference of neighbours over all axes, per channel."""
    axes = tuple(range(2, images.ndim))
    if min(images.shape[2:]) < 2:
        raise ValueError(f"{caller}: every spatial axis needs two pixels or more, got {images.shape[2:]}.")
    slopes = [np.abs(np.diff(images, axis=axis)).mean(axes, dtype=np.float64) for axis in axes]
    mean, std = images.mean(axes, dtype=np.float64), images.std(axes, dtype=np.float64)
    return np.concatenate([mean, std, np.mean(slopes, axis=0)], axis=1)
