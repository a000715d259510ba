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

"""Whether a map, such as a counterfactual's change, is where a mask says the disease is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from monai.metrics import CumulativeIterationMetric, compute_iou

from monai_jointdiff.metrics.bootstrap import Interval, Statistics, bootstrap_intervals
from monai_jointdiff.metrics.counterfactual import group_keys
from monai_jointdiff.metrics.inputs import as_array

__all__ = [
    "BestThresholdMetric",
    "LocalizationMetric",
    "LocalizationReport",
    "Preservation",
    "PreservationMetric",
    "best_threshold",
    "change_map",
    "localization_auprc",
    "localization_dice",
    "localization_iou",
    "localization_report",
    "pointing_game",
    "pooled_localization_auprc",
    "preservation",
]

_LEVELS = 1024  # of the scores in the interval of the pooled area: equal portions of the mask's pixels


def change_map(difference: Any) -> np.ndarray:
    """How much each pixel changed.

    Args:
        difference: (N, C, *spatial), signed or not.

    Returns:
        (N, *spatial) mean of the absolute values over channels.

    Raises:
        ValueError: for no spatial axis, no image, or values that are not finite.
    """
    values = as_array(difference)
    if values.ndim < 3 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"change_map: finite maps (N, C, *spatial) expected, got shape {values.shape}.")
    return np.abs(values).mean(1)


def _flat(maps: Any, masks: Any, caller: str) -> tuple[np.ndarray, np.ndarray]:
    """Changes (N, P) float64 and masks (N, P) bool."""
    change, inside = change_map(maps), as_array(masks)
    if inside.shape not in (change.shape, (len(change), 1, *change.shape[1:])):
        raise ValueError(
            f"{caller}: maps (N, C, *spatial) and masks (N, 1, *spatial) or (N, *spatial) expected, "
            f"got {np.shape(maps)} and {inside.shape}."
        )
    if not np.isin(inside, (0, 1)).all():
        raise ValueError(f"{caller}: masks must hold 0 and 1 only.")
    return change.reshape(len(change), -1), inside.reshape(len(change), -1) == 1


def localization_auprc(maps: Any, masks: Any) -> np.ndarray:
    """Area under the precision-recall curve of each map's pixels (average precision, as scikit-learn defines it).

    A map that knows nothing has about the share of the mask in the image.

    Args:
        maps: (N, C, *spatial): what grows in absolute value with the evidence. A map of intensities in [-1, 1] has to
            be moved to [0, 1] first.
        masks: (N, 1, *spatial) or (N, *spatial), 0 and 1.

    Returns:
        (N,) in [0, 1]; NaN for an image whose mask is empty.

    Raises:
        ValueError: for shapes that do not fit, maps that are not finite, or masks of other values.
    """
    values, inside = _flat(maps, masks, "localization_auprc")
    return np.array([_auprc(change, mask) for change, mask in zip(values, inside, strict=True)])


def pooled_localization_auprc(maps: Any, masks: Any) -> float:
    """Area under the precision-recall curve of all pixels of all images together.

    It asks that maps of different images have one scale; images with an empty mask take part, with pixels outside.

    Args:
        maps: as in :func:`localization_auprc`.
        masks: as in :func:`localization_auprc`.

    Returns:
        value in [0, 1]; NaN when all masks are empty.

    Raises:
        ValueError: as :func:`localization_auprc`.
    """
    values, inside = _flat(maps, masks, "pooled_localization_auprc")
    return _auprc(values.ravel(), inside.ravel())


def _auprc(values: np.ndarray, inside: np.ndarray) -> float:
    """Average precision of pixels (P,), equal values counting at once."""
    order = np.argsort(-values, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(values[order]) < 0]))
    hits = np.add.reduceat(inside[order].astype(np.float64), starts)
    return float(_average_precision(hits, np.diff(np.append(starts, len(values))) - hits))


def _average_precision(hits: np.ndarray, misses: np.ndarray) -> np.ndarray:
    """Sum of the steps in recall times the precision, from pixels (..., G) inside and outside, highest values first."""
    found = hits.cumsum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(hits > 0, found / (found + misses.cumsum(-1)), 0)
        return (hits * precision).sum(-1) / found[..., -1]


def localization_iou(maps: Any, masks: Any, threshold: float) -> np.ndarray:
    """Intersection over union of the mask with the pixels whose map reaches a threshold.

    Args:
        maps: as in :func:`localization_auprc`.
        masks: as in :func:`localization_auprc`.
        threshold: |map| >= threshold is taken for the finding; chosen on other images (see :func:`best_threshold`).

    Returns:
        (N,) in [0, 1]; NaN for an image whose mask is empty.

    Raises:
        ValueError: as :func:`localization_auprc`.
    """
    values, inside = _flat(maps, masks, "localization_iou")
    found, truth = (torch.from_numpy(part[:, None]).double() for part in (values >= threshold, inside))
    return compute_iou(found, truth)[:, 0].double().numpy()


def localization_dice(maps: Any, masks: Any, threshold: float) -> np.ndarray:
    """Dice coefficient of the mask with the pixels whose map reaches a threshold: 2 IoU / (1 + IoU).

    Args:
        maps: as in :func:`localization_auprc`.
        masks: as in :func:`localization_auprc`.
        threshold: as in :func:`localization_iou`.

    Returns:
        (N,) in [0, 1]; NaN for an image whose mask is empty.

    Raises:
        ValueError: as :func:`localization_auprc`.
    """
    iou = localization_iou(maps, masks, threshold)
    return 2 * iou / (1 + iou)


def best_threshold(maps: Any, masks: Any, candidates: int = 256) -> float:
    """The threshold with the highest mean IoU on these images, to be applied to others.

    Between the values of two mask pixels a higher threshold only drops pixels outside, so the best one is the value of
    a mask pixel: candidates are quantiles of those, all of them where they are few.

    Args:
        maps: as in :func:`localization_auprc`.
        masks: as in :func:`localization_auprc`; images with an empty one are left out.
        candidates: number of quantiles.

    Returns:
        the threshold, of equal ones the lowest.

    Raises:
        ValueError: as :func:`localization_auprc`, when all masks are empty, or for fewer than two candidates.
    """
    values, inside = _flat(maps, masks, "best_threshold")
    if not inside.any() or candidates < 2:
        raise ValueError(
            f"best_threshold: a mask that is not empty and at least 2 candidates expected, got {candidates} candidates "
            f"and {int(inside.any(1).sum())} masks."
        )
    thresholds = np.unique(values[inside])
    if len(thresholds) > candidates:
        thresholds = np.unique(np.quantile(values[inside], np.linspace(0, 1, candidates), method="nearest"))
    total = np.zeros(len(thresholds))
    for change, mask in zip(values, inside, strict=True):
        if mask.any():
            order = np.argsort(change)
            below = np.searchsorted(change[order], thresholds)  # pixels that a threshold leaves out
            hits = mask.sum() - np.append(0, np.cumsum(mask[order]))[below]
            total += hits / (len(change) - below + mask.sum() - hits)
    return float(thresholds[total.argmax()])


def pointing_game(maps: Any, masks: Any) -> np.ndarray:
    """Whether a map is highest inside the mask (pointing game; Zhang et al., ECCV 2016, without its margin).

    Args:
        maps: as in :func:`localization_auprc`.
        masks: as in :func:`localization_auprc`.

    Returns:
        (N,) 1 or 0, or the share inside the mask of several equal maxima: a constant map has the share of the mask in
        the image. NaN for an image whose mask is empty.

    Raises:
        ValueError: as :func:`localization_auprc`.
    """
    values, inside = _flat(maps, masks, "pointing_game")
    highest = values == values.max(1, keepdims=True)
    return np.where(inside.any(1), (highest & inside).sum(1) / highest.sum(1), np.nan)


@dataclass(frozen=True)
class Preservation:
    """How much an image changed inside and outside a mask.

    Args:
        inside: (N,) mean absolute change per pixel inside; NaN where the mask is empty.
        outside: (N,) the same outside; NaN where the mask is the whole image.
        ratio: (N,) outside over inside, lower is better; infinite where only the outside changed, NaN where nothing
            did or one of the two is NaN.
    """

    inside: np.ndarray
    outside: np.ndarray
    ratio: np.ndarray


def preservation(difference: Any, masks: Any) -> Preservation:
    """How much an image changed inside and outside a mask, per pixel.

    Args:
        difference: (N, C, *spatial) change of the image, signed or not; not normalized.
        masks: as in :func:`localization_auprc`.

    Returns:
        the changes of each image and their ratio.

    Raises:
        ValueError: as :func:`localization_auprc`.
    """
    values, inside = _flat(difference, masks, "preservation")
    with np.errstate(divide="ignore", invalid="ignore"):
        within, without = ((values * part).sum(1) / part.sum(1) for part in (inside, ~inside))
        return Preservation(within, without, without / within)


@dataclass(frozen=True)
class LocalizationReport:
    """How well maps find masks, each figure with a bootstrap interval.

    Args:
        count: images with a mask that is not empty; all figures are over these.
        left_out: images whose mask is empty.
        threshold: chosen elsewhere, for `iou` and `dice`.
        best_threshold: the best for these very images, for `iou_best`.
        prevalence: share of mask pixels: the `auprc_pooled` of a map that knows nothing.
        auprc: mean over images of :func:`localization_auprc`.
        auprc_pooled: :func:`pooled_localization_auprc`.
        iou: mean over images of :func:`localization_iou`.
        dice: mean over images of :func:`localization_dice`.
        iou_best: mean IoU at `best_threshold`: a ceiling, not what other images can expect.
        pointing: mean over images of :func:`pointing_game`.
        inside: mean over images of the change per pixel inside the mask (see :func:`preservation`).
        outside: the same outside.
        ratio: `outside` over `inside`, a ratio of means, so that images with little change do not rule it.
        bootstrap: number of resamples, confidence, seed, and what was drawn.
    """

    count: int
    left_out: int
    threshold: float
    best_threshold: float
    prevalence: float
    auprc: Interval
    auprc_pooled: Interval
    iou: Interval
    dice: Interval
    iou_best: Interval
    pointing: Interval
    inside: Interval
    outside: Interval
    ratio: Interval
    bootstrap: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """A dictionary for JSON: no NaN; what is not defined is None with a reason."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content["bootstrap"] = dict(self.bootstrap)
        return {name: part.as_dict() if isinstance(part, Interval) else part for name, part in content.items()}


def localization_report(
    maps: Any,
    masks: Any,
    threshold: float,
    *,
    groups: Any = None,
    bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> LocalizationReport:
    """Compare maps with masks.

    Args:
        maps: (N, C, *spatial), as in :func:`localization_auprc`; for the change inside and outside not normalized.
        masks: (N, 1, *spatial) or (N, *spatial), 0 and 1. Images with an empty one are left out and counted.
        threshold: for IoU and Dice, chosen on other images (see :func:`best_threshold`).
        groups: (N,) keys such as patients: whole groups are drawn. None: every image for itself.
        bootstrap: number of resamples; 0: no intervals.
        seed: of the resamples.
        confidence: of the intervals.

    Returns:
        the report.

    Raises:
        ValueError: for input that does not fit, or when all masks are empty.
    """
    values, inside = _flat(maps, masks, "localization_report")
    keys = group_keys(groups, len(values), "localization_report")
    keep = inside.any(1)
    if not keep.any():
        raise ValueError(f"localization_report: all {keep.size} masks are empty.")
    values, inside, keys = values[keep], inside[keep], keys if keys is None else keys[keep]
    maps, masks = values[:, None], inside  # as images with one long axis
    best, parts = best_threshold(maps, masks), preservation(maps, masks)
    per_image = {
        "auprc": localization_auprc(maps, masks),
        "iou": localization_iou(maps, masks, threshold),
        "dice": localization_dice(maps, masks, threshold),
        "iou_best": localization_iou(maps, masks, best),
        "pointing": pointing_game(maps, masks),
        "inside": parts.inside,
        "outside": parts.outside,
    }
    figures = bootstrap_intervals(
        _statistics(per_image, values, inside),
        len(values),
        bootstrap,
        seed,
        groups=keys,
        confidence=confidence,
        undefined={"outside": "all masks are whole images", "ratio": "no outside, or nothing changed inside"},
    )
    pooled = figures.pop("auprc_pooled")
    return LocalizationReport(
        count=len(values),
        left_out=int((~keep).sum()),
        threshold=float(threshold),
        best_threshold=best,
        prevalence=float(inside.mean()),
        auprc_pooled=_moved(pooled, pooled_localization_auprc(maps, masks)),
        **figures,
        bootstrap={
            "resamples": bootstrap,
            "confidence": confidence,
            "seed": seed,
            "drawn": "images" if keys is None else "groups",
        },
    )


def _statistics(per_image: Mapping[str, np.ndarray], values: np.ndarray, inside: np.ndarray) -> Statistics:
    """All figures as a function of bootstrap weights (b, N)."""
    columns = np.stack(list(per_image.values()), axis=1)
    known = ~np.isnan(columns)
    columns = np.where(known, columns, 0)
    hits, misses = _counts(values, inside)

    def evaluate(weights: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(divide="ignore", invalid="ignore"):
            means = dict(zip(per_image, (weights @ columns / (weights @ known)).T, strict=True))
            ratio = np.where(means["inside"] > 0, means["outside"] / means["inside"], np.nan)
        pooled = _average_precision(weights @ hits, weights @ misses)
        return {**means, "ratio": ratio, "auprc_pooled": pooled}

    return evaluate


def _counts(values: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels inside and outside the mask for each image and level of its values, (N, G) each, highest level first."""
    edges = np.unique(np.quantile(values[inside], np.linspace(0, 1, _LEVELS), method="nearest"))
    size = len(edges) + 1
    level = len(edges) - np.searchsorted(edges, values, side="right")
    rows = np.arange(len(values))[:, None] * size + level
    counts = (np.bincount(rows[part], minlength=len(values) * size) for part in (inside, ~inside))
    hits, misses = (count.reshape(len(values), size).astype(np.float64) for count in counts)
    return hits, misses


def _moved(interval: Interval, value: float) -> Interval:
    """The interval of a figure from rounded scores, moved by what rounding did to the figure."""
    if interval.value is None or interval.low is None or interval.high is None:
        return Interval(value, reason=interval.reason)
    shift = value - interval.value
    return Interval(value, max(0.0, interval.low + shift), min(1.0, interval.high + shift))


class LocalizationMetric(CumulativeIterationMetric):
    """How well maps find masks, mean over the images of a whole run whose mask is not empty.

    For :class:`monai.handlers.IgniteMetricHandler`, with batches or decollated lists, on one process or many:
    predictions are maps (N, C, *spatial), labels masks (N, 1, *spatial).

    Args:
        figure: `"auprc"`, `"iou"`, `"dice"` or `"pointing"`: :func:`localization_auprc`, :func:`localization_iou`,
            :func:`localization_dice`, :func:`pointing_game`.
        threshold: for `"iou"` and `"dice"`, chosen on other images; None for the others.

    Raises:
        ValueError: for another figure, a threshold that is missing, or one that is not used.
    """

    def __init__(self, figure: str = "auprc", threshold: float | None = None) -> None:
        super().__init__()
        plain: dict[str, Callable[[Any, Any], np.ndarray]]
        plain = {"auprc": localization_auprc, "pointing": pointing_game}
        thresholded = {"iou": localization_iou, "dice": localization_dice}
        if figure not in {**plain, **thresholded} or (figure in thresholded) != (threshold is not None):
            raise ValueError(
                f"{type(self).__name__}: figure must be one of {sorted(plain)}, or of {sorted(thresholded)} with a "
                f"threshold, got {figure!r} with threshold {threshold}."
            )
        self.figure = figure
        self.threshold = threshold
        self.evaluate = plain.get(figure) or thresholded[figure]

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """(N,) figure of each image, NaN where the mask is empty."""
        options = {} if self.threshold is None else {"threshold": self.threshold}
        return torch.as_tensor(self.evaluate(y_pred, y, **options), device=y_pred.device)

    def aggregate(self) -> float:  # type: ignore[override]
        """Mean over all images with a mask since the last reset; NaN when there is none."""
        values = self.get_buffer()
        return float(values.nanmean())


class BestThresholdMetric(CumulativeIterationMetric):
    """Mean IoU over a whole run at the one threshold that is best for these very images: a ceiling.

    For :class:`monai.handlers.IgniteMetricHandler`, with batches or decollated lists, on one process or many:
    predictions are maps (N, C, *spatial) of one size, labels masks (N, 1, *spatial). All maps are kept until the end.
    """

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:  # type: ignore[override]
        """Changes (N, 1, P) and masks (N, 1, P) of all pixels."""
        values, inside = _flat(y_pred, y, type(self).__name__)
        return [torch.as_tensor(part[:, None], device=y_pred.device) for part in (values, inside)]

    def aggregate(self) -> float:  # type: ignore[override]
        """Mean over all images with a mask since the last reset; NaN when there is none."""
        maps, masks = self.get_buffer()
        if not bool(masks.any()):
            return float("nan")
        return float(np.nanmean(localization_iou(maps, masks, best_threshold(maps, masks))))


class PreservationMetric(CumulativeIterationMetric):
    """How much images change inside and outside their masks, over a whole run: :func:`preservation`.

    For :class:`monai.handlers.IgniteMetricHandler`, with batches or decollated lists, on one process or many:
    predictions are changes (N, C, *spatial), not normalized, labels masks (N, 1, *spatial).

    Args:
        figure: `"inside"` or `"outside"`, the mean change per pixel there over the images where that is defined; or
            `"ratio"`, outside over inside, a ratio of means as in :class:`LocalizationReport`.

    Raises:
        ValueError: for another figure.
    """

    def __init__(self, figure: str = "ratio") -> None:
        super().__init__()
        if figure not in ("inside", "outside", "ratio"):
            raise ValueError(
                f"{type(self).__name__}: figure must be one of ['inside', 'outside', 'ratio'], got {figure!r}."
            )
        self.figure = figure

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:  # type: ignore[override]
        """(N,) change inside and (N,) outside, NaN in both where the mask is empty."""
        parts = preservation(y_pred, y)
        outside = np.where(np.isnan(parts.inside), np.nan, parts.outside)
        return [torch.as_tensor(part, device=y_pred.device) for part in (parts.inside, outside)]

    def aggregate(self) -> float:  # type: ignore[override]
        """The figure over all images with a mask since the last reset; NaN when there is none."""
        inside, outside = (part.nanmean() for part in self.get_buffer())
        return float({"inside": inside, "outside": outside, "ratio": outside / inside}[self.figure])
