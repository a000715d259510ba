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

"""Whether a counterfactual image reaches its class, how little it changes, and whether it looks real."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from monai.metrics import CumulativeIterationMetric, SSIMMetric
from monai.utils import convert_to_tensor

from monai_jointdiff.metrics.bootstrap import FEWEST_UNITS, Interval, bootstrap_intervals
from monai_jointdiff.metrics.generation import frechet_distance, kernel_distance
from monai_jointdiff.metrics.inputs import as_array, check_labels, check_probabilities

__all__ = [
    "CompositionMetric",
    "CounterfactualTransitionMetric",
    "CounterfactualValidityMetric",
    "FlipFigures",
    "FlipReport",
    "ProximityMetric",
    "RealismMetric",
    "ReversibilityMetric",
    "composition",
    "cout",
    "flip_rate",
    "grouped_wilson_interval",
    "l1_distance",
    "l2_distance",
    "reached_target",
    "reversibility",
    "sparsity",
    "split_frechet_distance",
    "structural_similarity",
    "target_probability",
    "wilson_interval",
]

Classify = Callable[[torch.Tensor], torch.Tensor]


# ---- validity


def target_probability(
    probabilities: Any, target: Any, enforce: Any = True, *, multi_label: bool = False
) -> np.ndarray:
    """Probability of what was asked for.

    Args:
        probabilities: (N, K); rows sum to 1 unless multi-label.
        target: (N,) or one for all: the class to reach; multi-label: the label to change.
        enforce: (N,) or one for all; multi-label: True asks for the label, False for its absence. Else True.
        multi_label: columns are independent labels.

    Returns:
        (N,) in [0, 1]: p of the target, 1 - p of a label that shall go.

    Raises:
        ValueError: for wrong probabilities, a target outside [0, K), or removal of a class that is no label.
    """
    scores, classes, wanted = _request(probabilities, target, enforce, multi_label, "target_probability")
    chosen = scores[np.arange(len(scores)), classes]
    return np.where(wanted, chosen, 1 - chosen)


def reached_target(probabilities: Any, target: Any, enforce: Any = True, *, multi_label: bool = False) -> np.ndarray:
    """Whether a classifier says what was asked for.

    Args:
        probabilities: (N, K) of the counterfactuals, by the model or by an independent oracle.
        target: as in :func:`target_probability`.
        enforce: as in :func:`target_probability`.
        multi_label: as in :func:`target_probability`.

    Returns:
        (N,) bool: the target is the most probable class (of equal ones the first); multi-label: p >= 0.5 where the
        label shall be there, p < 0.5 where it shall go.

    Raises:
        ValueError: as :func:`target_probability`.
    """
    scores, classes, wanted = _request(probabilities, target, enforce, multi_label, "reached_target")
    if multi_label:
        return (scores[np.arange(len(scores)), classes] >= 0.5) == wanted
    return scores.argmax(1) == classes


def _request(
    probabilities: Any, target: Any, enforce: Any, multi_label: bool, caller: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities (N, K), target (N,) int and enforce (N,) bool."""
    values = as_array(probabilities)
    scores = check_probabilities(values, values, multi_label, caller)
    count, num_classes = scores.shape
    classes, wanted = as_array(target), as_array(enforce, bool)
    if classes.shape not in ((), (count,)) or wanted.shape not in ((), (count,)):
        raise ValueError(
            f"{caller}: target and enforce must be one value or ({count},), got {classes.shape} and {wanted.shape}."
        )
    wrong = (classes != np.round(classes)) | (classes < 0) | (classes >= num_classes)
    if wrong.any():
        raise ValueError(
            f"{caller}: targets must be whole numbers in [0, {num_classes}), got {classes[wrong].flat[0]}."
        )
    if not (multi_label or wanted.all()):
        raise ValueError(f"{caller}: enforce=False removes a label and goes with multi_label=True.")
    return scores, np.broadcast_to(classes.astype(int), count), np.broadcast_to(wanted, count)


def wilson_interval(successes: int, count: int, confidence: float = 0.95) -> Interval:
    """A share and its score interval (Wilson 1927), which stays honest at 0 and 100 %, where a bootstrap has no width.

    Args:
        successes: number of successes.
        count: number of independent trials.
        confidence: of the interval.

    Returns:
        the share; without a value for no trial.

    Raises:
        ValueError: unless 0 <= successes <= count and 0 < confidence < 1.
    """
    if not 0 <= successes <= count or not 0 < confidence < 1:
        raise ValueError(
            f"wilson_interval: 0 <= successes <= count and 0 < confidence < 1 expected, "
            f"got {successes}, {count} and {confidence}."
        )
    if not count:
        return Interval(None, reason="no image")
    return _score_interval(successes / count, count, confidence)


def grouped_wilson_interval(successes: Any, groups: Any, confidence: float = 0.95) -> Interval:
    """A share of images that come in groups, with Wilson's interval of the images that are worth as much alone.

    Their number is divided by the design effect, the variance of the share between groups in units of that of
    independent images, and is at most the number of groups: at 0 and 100 %, where no variance tells how alike the
    images of a group are, they count as one. Source: Korn and Graubard, Survey Methodology 24 (1998) 193, there with
    another interval and a factor for few groups, in place of which the bound stands here.

    Args:
        successes: (N,) 0 and 1, or bool.
        groups: (N,) keys such as patients.
        confidence: of the interval.

    Returns:
        the share; without a value for no image.

    Raises:
        ValueError: for other values or shapes, or unless 0 < confidence < 1.
    """
    hits = as_array(successes)
    if hits.ndim != 1 or not np.isin(hits, (0, 1)).all() or not 0 < confidence < 1:
        raise ValueError(
            f"grouped_wilson_interval: successes (N,) of 0 and 1 and 0 < confidence < 1 expected, got "
            f"shape {hits.shape} and {confidence}."
        )
    keys = group_keys(groups, len(hits), "grouped_wilson_interval")
    if keys is None:
        raise ValueError("grouped_wilson_interval: groups (N,) expected, got None.")
    if not len(hits):
        return Interval(None, reason="no image")
    share = float(hits.mean())
    names, units = np.unique(keys, return_inverse=True)
    between = np.square(np.bincount(units, hits - share)).sum()  # n^2 times the variance of the share
    effective = float(len(names))
    if between > 0:
        effective = min(effective, len(hits) ** 2 * share * (1 - share) / float(between))
    return _score_interval(share, effective, confidence)


def _score_interval(share: float, count: float, confidence: float) -> Interval:
    """Wilson's interval of a share of so many independent trials."""
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = np.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return Interval(share, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def mean_interval(
    values: np.ndarray, groups: np.ndarray | None, resamples: int, seed: int, confidence: float
) -> Interval:
    """Mean over images and its bootstrap, of enough images or groups.

    Args:
        values: (N,), N >= 1.
        groups: (N,) keys, such as patients; whole groups are drawn. None: every image for itself.
        resamples: number of resamples; 0: no interval.
        seed: of the resamples.
        confidence: of the interval.

    Returns:
        the mean; no interval, and the reason, where fewer than :data:`FEWEST_UNITS` images or groups could be drawn.
    """
    units = number_of_units(len(values), groups)
    if 0 < resamples and units < FEWEST_UNITS:
        kind = "images" if groups is None else "groups of images"
        reason = f"{units} {kind} are too few for an interval (at least {FEWEST_UNITS})"
        return Interval(float(values.mean()), reason=reason)
    return bootstrap_intervals(
        lambda weights: {"mean": weights @ values / weights.sum(1)},
        len(values),
        resamples,
        seed,
        groups=groups,
        confidence=confidence,
    )["mean"]


def number_of_units(count: int, groups: np.ndarray | None) -> int:
    """What a resample draws from: the number of groups, or without groups that of images."""
    return count if groups is None else len(np.unique(groups))


@dataclass(frozen=True)
class FlipFigures:
    """How often a decision flipped to what was asked for, over some images.

    Args:
        count: images whose decision could flip, over which the figures are taken.
        left_out: images that the classifier gave the target before any change: they cannot flip.
        rate: share of `count` that flipped.
        gain: mean of the target's probability after minus before.
    """

    count: int
    left_out: int
    rate: Interval
    gain: Interval

    def as_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return {
            "count": self.count,
            "left_out": self.left_out,
            "rate": self.rate.as_dict(),
            "gain": self.gain.as_dict(),
        }


@dataclass(frozen=True)
class FlipReport:
    """How often decisions flipped, over all images and for each direction apart.

    Args:
        overall: over all images.
        directions: for each thing asked for: by the name of the target class, or `"enforce NAME"` and `"remove NAME"`.
        settings: resamples, confidence, seed, and how the intervals came about.
    """

    overall: FlipFigures
    directions: Mapping[str, FlipFigures]
    settings: Mapping[str, Any]

    @property
    def lowest(self) -> str:
        """The direction with the lowest rate, the one that counts; directions without images do not take part."""
        rates = {name: figures.rate.value for name, figures in self.directions.items()}
        known = {name: rate for name, rate in rates.items() if rate is not None}
        if not known:
            raise ValueError("FlipReport: no direction has an image whose decision could flip.")
        return min(known, key=known.__getitem__)

    def as_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return {
            "overall": self.overall.as_dict(),
            "directions": {name: figures.as_dict() for name, figures in self.directions.items()},
            "settings": dict(self.settings),
        }


def flip_rate(
    before: Any,
    after: Any,
    target: Any,
    enforce: Any = True,
    *,
    multi_label: bool = False,
    class_names: Sequence[str] | None = None,
    groups: Any = None,
    bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> FlipReport:
    """How often counterfactuals flip a classifier to what was asked for, and by how much they move it.

    The classifier may be the model that was explained or an oracle that had no part in the search: only its
    probabilities are asked for. An image that it gives the target already is left out and counted. To measure over
    images that both classify rightly, pass only those.

    Args:
        before: (N, K) probabilities of the images; rows sum to 1 unless multi-label.
        after: (N, K) probabilities of the counterfactuals by the same classifier.
        target: as in :func:`target_probability`.
        enforce: as in :func:`target_probability`.
        multi_label: as in :func:`target_probability`.
        class_names: K distinct names; None: "0", "1", ...
        groups: (N,) keys such as patients, whose images resemble each other. Where several images share a key, rates
            have :func:`grouped_wilson_interval` and gains bootstraps that draw whole groups. None, and where no two
            images share one: :func:`wilson_interval` and bootstraps over images.
        bootstrap: number of resamples; 0: no bootstrap intervals.
        seed: of the resamples.
        confidence: of the intervals.

    Returns:
        rate and gain, over all images and for each direction that occurs. Gains have no interval where fewer than ten
        images or groups could be drawn.

    Raises:
        ValueError: for wrong probabilities, targets, names or groups.
    """
    p_before = target_probability(before, target, enforce, multi_label=multi_label)
    p_after = target_probability(after, target, enforce, multi_label=multi_label)
    scores, classes, wanted = _request(after, target, enforce, multi_label, "flip_rate")
    if np.shape(before) != scores.shape:
        raise ValueError(f"flip_rate: before and after must have one shape, got {np.shape(before)}, {scores.shape}.")
    already = reached_target(before, target, enforce, multi_label=multi_label)
    flipped = reached_target(after, target, enforce, multi_label=multi_label)
    names = direction_names(class_names, classes, wanted, scores.shape[1], multi_label)
    keys = group_keys(groups, len(scores), "flip_rate")

    def figures(asked: np.ndarray) -> FlipFigures:
        chosen = asked & ~already
        alone = keys is None or len(np.unique(keys[chosen])) == chosen.sum()  # every group has one image
        drawn = None if keys is None or alone else keys[chosen]
        return _flip_figures(
            flipped[chosen],
            (p_after - p_before)[chosen],
            int((asked & already).sum()),
            drawn,
            bootstrap,
            seed,
            confidence,
        )

    return FlipReport(
        figures(np.full(len(scores), True)),
        {str(name): figures(names == name) for name in dict.fromkeys(names.tolist())},
        {
            "resamples": bootstrap,
            "confidence": confidence,
            "seed": seed,
            "intervals": "Wilson (rate), bootstrap of images (gain)"
            + ("; by groups where one has several images" if groups is not None else ""),
        },
    )


def _flip_figures(
    flipped: np.ndarray,
    gain: np.ndarray,
    left_out: int,
    groups: np.ndarray | None,
    resamples: int,
    seed: int,
    confidence: float,
) -> FlipFigures:
    count = len(flipped)
    if not count:
        none = Interval(None, reason="no image whose decision could flip")
        return FlipFigures(0, left_out, none, none)
    rate = (
        wilson_interval(int(flipped.sum()), count, confidence)
        if groups is None
        else grouped_wilson_interval(flipped, groups, confidence)
    )
    return FlipFigures(count, left_out, rate, mean_interval(gain, groups, resamples, seed, confidence))


def direction_names(
    class_names: Sequence[str] | None, classes: np.ndarray, wanted: np.ndarray, num_classes: int, multi_label: bool
) -> np.ndarray:
    """(N,) the name of what each image is asked for: the class, or `"enforce NAME"` and `"remove NAME"` of labels."""
    names = [str(name) for name in (range(num_classes) if class_names is None else class_names)]
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise ValueError(f"flip_rate: {num_classes} distinct class names expected, got {names}.")
    if not multi_label:
        return np.array(names)[classes]
    return np.array([f"{'enforce' if w else 'remove'} {names[k]}" for k, w in zip(classes, wanted, strict=True)])


def group_keys(groups: Any, count: int, caller: str) -> np.ndarray | None:
    """Keys of groups such as patients, one for each image.

    Args:
        groups: (N,) keys of any type; None: every image for itself.
        count: N.
        caller: name for the error message.

    Returns:
        (N,) array, or None.

    Raises:
        ValueError: for another shape.
    """
    if groups is None:
        return None
    keys = np.asarray(groups)
    if keys.shape != (count,):
        raise ValueError(f"{caller}: groups must be ({count},), got {keys.shape}.")
    return keys


# ---- proximity


def l1_distance(images: Any, others: Any) -> np.ndarray:
    """Mean absolute difference of each image to its counterpart.

    Args:
        images: (N, C, *spatial).
        others: (N, C, *spatial).

    Returns:
        (N,) mean over channels and pixels, in [0, 2] for images in [-1, 1].

    Raises:
        ValueError: for shapes that differ, no spatial axis, or values that are not finite.
    """
    return np.abs(_change(images, others, "l1_distance")).reshape(len(images), -1).mean(1)


def l2_distance(images: Any, others: Any) -> np.ndarray:
    """Root mean squared difference of each image to its counterpart.

    Args:
        images: (N, C, *spatial).
        others: (N, C, *spatial).

    Returns:
        (N,) root of the mean over channels and pixels, in [0, 2] for images in [-1, 1].

    Raises:
        ValueError: for shapes that differ, no spatial axis, or values that are not finite.
    """
    return np.sqrt(np.square(_change(images, others, "l2_distance")).reshape(len(images), -1).mean(1))


def sparsity(images: Any, others: Any, tolerance: float = 0.05) -> np.ndarray:
    """Share of the pixels that changed, a pixel being changed where one of its channels is: lower is sparser.

    Args:
        images: (N, C, *spatial).
        others: (N, C, *spatial).
        tolerance: a channel has changed where |difference| > tolerance; 0.05 is 2.5 % of the range [-1, 1].

    Returns:
        (N,) in [0, 1].

    Raises:
        ValueError: for wrong images, or a tolerance below zero.
    """
    if not tolerance >= 0:
        raise ValueError(f"sparsity: the tolerance must be at least 0, got {tolerance}.")
    change = np.abs(_change(images, others, "sparsity")).max(1)
    return (change > tolerance).reshape(len(change), -1).mean(1)


def structural_similarity(images: Any, others: Any) -> np.ndarray:
    """Structural similarity (SSIM; Wang et al. 2004) by MONAI's `SSIMMetric`, Gaussian window of sigma 1.5.

    The measure is made for intensities from zero: its luminance term changes sign with the mean. So images go from
    [-1, 1] to [0, 1] first. The window has 11 pixels along an axis, on a shorter one the odd number that fits.

    Args:
        images: (N, C, *spatial) in [-1, 1], two or three spatial axes.
        others: (N, C, *spatial) in [-1, 1].

    Returns:
        (N,) mean over channels and windows inside the image, 1 for equal images.

    Raises:
        ValueError: for shapes that differ, another number of axes, or values that are not finite.
    """
    _change(images, others, "structural_similarity")
    x, y = ((torch.from_numpy(as_array(part, np.float32)) + 1) / 2 for part in (images, others))
    if x.ndim not in (4, 5):
        raise ValueError(f"structural_similarity: two or three spatial axes expected, got images {tuple(x.shape)}.")
    window = tuple(min(11, size - 1 + size % 2) for size in x.shape[2:])
    return as_array(SSIMMetric(x.ndim - 2, data_range=1.0, win_size=window)(y, x))[:, 0]


def _change(images: Any, others: Any, caller: str) -> np.ndarray:
    """(N, C, *spatial) others minus images."""
    x, y = as_array(images), as_array(others)
    if x.ndim < 3 or x.shape != y.shape or not len(x):
        raise ValueError(f"{caller}: two sets of images (N, C, *spatial) expected, got {x.shape} and {y.shape}.")
    change = y - x
    if not np.isfinite(change).all():
        raise ValueError(f"{caller}: images must be finite.")
    return change


def cout(
    images: Any,
    counterfactuals: Any,
    classify: Classify,
    target: Any,
    source: Any = None,
    enforce: Any = True,
    *,
    multi_label: bool = False,
    steps: int = 50,
    batch_size: int = 64,
) -> np.ndarray:
    r"""Counterfactual transition score (COUT; Khorram and Fuxin, CVPR 2022): does the largest change matter the most?

    Pixels of the counterfactual are put into the image in falling order of :math:`\sum_c |x'_c - x_c|` (equal ones in
    the order of the array), S + 1 images :math:`x^{(0)} = x` to :math:`x^{(S)} = x'`, with a share :math:`f_k` of the
    pixels put in. With p the probability of the target and q that of the source class,

    .. math:: \mathrm{COUT} = \int_0^1 p(x^{(f)}) \, df - \int_0^1 q(x^{(f)}) \, df \in [-1, 1]

    by the trapezoid rule over :math:`f_k`, the shares truly put in. The order needs no normalization of the change by
    its range, which divides by zero for equal images in the published code: they have the score p(x) - q(x), the limit
    of ever smaller changes, about -1.

    Args:
        images: (N, C, *spatial).
        counterfactuals: (N, C, *spatial).
        classify: maps images (B, C, *spatial) to probabilities (B, K); rows sum to 1 unless multi-label.
        target: as in :func:`target_probability`.
        source: (N,) or one for all: the class to leave; None: the most probable class of each image. Multi-label takes
            none, there it is the opposite of what is asked for.
        enforce: as in :func:`target_probability`.
        multi_label: as in :func:`target_probability`.
        steps: S, number of equal portions of pixels; no more than there are pixels.
        batch_size: images for each call of `classify`.

    Returns:
        (N,) in [-1, 1], higher is better.

    Raises:
        ValueError: for wrong images, probabilities, targets, numbers, or a source that is the target.
    """
    _change(images, counterfactuals, "cout")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"cout: steps and batch_size must be at least 1, got {steps} and {batch_size}.")
    x, y = (convert_to_tensor(part, track_meta=False) for part in (images, counterfactuals))
    change = (y - x).abs().flatten(2).sum(1)  # (N, P)
    count, pixels = change.shape
    rank = change.argsort(dim=1, descending=True, stable=True).argsort(dim=1).reshape(count, 1, *x.shape[2:])
    inserted = torch.linspace(0, pixels, min(steps, pixels) + 1, dtype=torch.float64).round().long()  # (S + 1,)

    probabilities = []
    with torch.no_grad():
        for pairs in torch.arange(count * len(inserted), device=x.device).split(batch_size):
            image, step = pairs // len(inserted), pairs % len(inserted)
            limit = inserted.to(x.device)[step].reshape(-1, *[1] * (x.ndim - 1))
            probabilities.append(classify(torch.where(rank[image] < limit, y[image], x[image])))
    scores = as_array(torch.cat(probabilities))
    if scores.ndim != 2 or len(scores) != count * len(inserted):
        raise ValueError(f"cout: classify must map images (B, ...) to probabilities (B, K), got {scores.shape} in all.")
    curve = _transition(scores, len(inserted), target, source, enforce, multi_label)  # (N, S + 1)
    shares = np.diff(inserted.numpy()) / pixels
    return (curve[:, 1:] + curve[:, :-1]) / 2 @ shares


def _transition(
    scores: np.ndarray, knots: int, target: Any, source: Any, enforce: Any, multi_label: bool
) -> np.ndarray:
    """(N, knots) probability of the target minus that of the source, from scores (N knots, K)."""
    start, goal, wanted = _request(scores[::knots], target, enforce, multi_label, "cout")
    arrived = target_probability(scores, goal.repeat(knots), wanted.repeat(knots), multi_label=multi_label)
    if multi_label:
        if source is not None:
            raise ValueError("cout: source goes with multi_label=False; a label's opposite is its absence.")
        return (2 * arrived - 1).reshape(-1, knots)
    left = start.argmax(1) if source is None else _request(start, source, True, False, "cout")[1]
    if (left == goal).any():
        raise ValueError(f"cout: image {np.flatnonzero(left == goal)[0]} has the target as its source class already.")
    return (arrived - target_probability(scores, left.repeat(knots))).reshape(-1, knots)


# ---- realism


def split_frechet_distance(counterfactual_features: Any, real_features: Any, seed: int = 0) -> float:
    """Frechet distance of counterfactuals to real images other than their own (sFID; Jeanneret et al., CVPR 2023).

    A counterfactual resembles the image it was made from, so the plain distance to those images rewards doing nothing.
    Here images are cut into two random halves of one size (an odd one is left out), the counterfactuals of each half
    are compared with the real images of the other, and the two distances are averaged. For the kernel distance, or
    against real images that were not changed, use :func:`~monai_jointdiff.metrics.generation.kernel_distance` and
    :func:`~monai_jointdiff.metrics.generation.frechet_distance` as they are.

    Args:
        counterfactual_features: (N, D), N >= 4.
        real_features: (N, D); row i belongs to the image from which counterfactual i was made.
        seed: of the halves.

    Returns:
        squared distance, lower is closer. It depends on N / 2: show real against real images of that number beside it.

    Raises:
        ValueError: for shapes that differ, fewer than four rows, or values that are not finite.
    """
    changed, real = as_array(counterfactual_features), as_array(real_features)
    if changed.ndim != 2 or changed.shape != real.shape or len(changed) < 4:
        raise ValueError(
            f"split_frechet_distance: features (N, D) of one shape with N >= 4 expected, "
            f"got {changed.shape} and {real.shape}."
        )
    half = len(real) // 2
    order = np.random.default_rng(seed).permutation(len(real))
    first, second = order[:half], order[half : 2 * half]
    return (frechet_distance(changed[first], real[second]) + frechet_distance(changed[second], real[first])) / 2


# ---- axioms: what an intervention must leave alone


def composition(
    images: Any, reconstruct: Callable[[Any], Any], cycles: Sequence[int] = (1, 10)
) -> dict[int, np.ndarray]:
    """How far an intervention that asks for nothing moves an image (composition; Monteiro et al., ICLR 2023).

    Args:
        images: (N, C, *spatial).
        reconstruct: maps images to their factual reconstruction, of the same shape.
        cycles: after how many repetitions to measure, each at least 1.

    Returns:
        for each number of cycles (N,) L1 distance to the images, as :func:`l1_distance`.

    Raises:
        ValueError: for no cycle or one below 1.
    """
    if not cycles or min(cycles) < 1:
        raise ValueError(f"composition: numbers of cycles of at least 1 expected, got {tuple(cycles)}.")
    current, distances = images, {}
    for cycle in range(1, max(cycles) + 1):
        current = reconstruct(current)
        if cycle in cycles:
            distances[cycle] = l1_distance(images, current)
    return distances


def reversibility(images: Any, there: Callable[[Any], Any], back: Callable[[Any], Any]) -> np.ndarray:
    """How far an image is from itself after a change and its opposite (reversibility; Monteiro et al., ICLR 2023).

    Args:
        images: (N, C, *spatial).
        there: maps images to counterfactuals of another class.
        back: maps counterfactuals to the class of the images.

    Returns:
        (N,) L1 distance of `back(there(images))` to the images, as :func:`l1_distance`.
    """
    return l1_distance(images, back(there(images)))


# ---- over a validation run


class _MeanMetric(CumulativeIterationMetric):
    """A figure of each image, and its mean over all images since the last reset."""

    def aggregate(self) -> float:  # type: ignore[override]
        """Mean over all images since the last reset."""
        values = self.get_buffer()
        return float(values.mean())


class _AnswerMetric(_MeanMetric):
    """A figure about what was asked for.

    Args:
        multi_label: columns are independent labels.
    """

    def __init__(self, multi_label: bool = False) -> None:
        super().__init__()
        self.multi_label = multi_label

    def _asked(self, wanted: torch.Tensor, num_classes: int) -> tuple[Any, Any]:
        """Target (N,) and whether it shall be there; of labels from rows with one entry that is not -1."""
        if not self.multi_label:
            return wanted, True
        name = type(self).__name__
        entries = check_labels(wanted, num_classes, name)
        if entries.ndim != 2 or ((entries >= 0).sum(1) != 1).any():
            raise ValueError(
                f"{name}: labels (N, {num_classes}) with one entry 0 or 1 in each row and -1 elsewhere expected, got "
                f"shape {entries.shape}."
            )
        return (entries >= 0).argmax(1), entries.max(1) == 1


class CounterfactualValidityMetric(_AnswerMetric):
    """How many counterfactuals a classifier gives what was asked for, over a whole run.

    For :class:`monai.handlers.IgniteMetricHandler`, with batches or decollated lists, on one process or many:
    predictions are the probabilities (N, K) of the counterfactuals, labels what was asked for: target classes (N,), or,
    multi-label, (N, K) with one entry 1 (enforce) or 0 (remove) in each row and -1 elsewhere. Which images could flip
    is for the caller to choose (see :func:`flip_rate`).

    Args:
        figure: `"rate"`, the share that reached the target; `"probability"`, the mean probability of the target; or
            `"gain"`, how much that rose: predictions are then (N, 2, K), of the images and of the counterfactuals.
        multi_label: columns are independent labels.

    Raises:
        ValueError: for another figure.
    """

    def __init__(self, figure: str = "rate", multi_label: bool = False) -> None:
        super().__init__(multi_label)
        figures = {"rate": reached_target, "probability": target_probability, "gain": target_probability}
        if figure not in figures:
            raise ValueError(f"{type(self).__name__}: figure must be one of {sorted(figures)}, got {figure!r}.")
        self.figure = figure
        self.evaluate = figures[figure]

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """(N,) reached or not, probability, or gain, of each image."""
        target, enforce = self._asked(y, y_pred.shape[-1])
        if self.figure != "gain":
            values = self.evaluate(y_pred, target, enforce, multi_label=self.multi_label).astype(np.float64)
            return torch.as_tensor(values, device=y_pred.device)
        before, after = _pairs(y_pred, 3, "probabilities (N, 2, K)", type(self).__name__)
        gain = [self.evaluate(p, target, enforce, multi_label=self.multi_label) for p in (before, after)]
        return torch.as_tensor(gain[1] - gain[0], device=y_pred.device)


class CounterfactualTransitionMetric(_AnswerMetric):
    """Counterfactual transition score :func:`cout`, mean over the images of a run that lacked what was asked for.

    For :class:`monai.handlers.IgniteMetricHandler`, with batches or decollated lists, on one process or many:
    predictions are pairs (N, 2, C, *spatial) of images and counterfactuals, labels what was asked for, as in
    :class:`CounterfactualValidityMetric`. Images that the classifier gives this already have no score and are left out.

    Args:
        classify: as in :func:`cout`.
        multi_label: columns are independent labels.
        steps: as in :func:`cout`.
        batch_size: as in :func:`cout`.
    """

    def __init__(self, classify: Classify, multi_label: bool = False, steps: int = 50, batch_size: int = 64) -> None:
        super().__init__(multi_label)
        self.classify = classify
        self.steps = steps
        self.batch_size = batch_size

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """(N,) score of each image; NaN where there is none."""
        images, counterfactuals = _pairs(y_pred, 4, "images (N, 2, C, *spatial)", type(self).__name__)
        target, enforce = (np.broadcast_to(as_array(part), len(images)) for part in self._asked(y, y.shape[-1]))
        with torch.no_grad():
            before = torch.cat([self.classify(batch) for batch in images.split(self.batch_size)])
        asked = ~reached_target(before, target, enforce, multi_label=self.multi_label)
        scores = np.full(len(images), np.nan)
        if asked.any():
            chosen = torch.as_tensor(asked, device=images.device)
            scores[asked] = cout(
                images[chosen],
                counterfactuals[chosen],
                self.classify,
                target[asked],
                enforce=enforce[asked],
                multi_label=self.multi_label,
                steps=self.steps,
                batch_size=self.batch_size,
            )
        return torch.as_tensor(scores, device=y_pred.device)

    def aggregate(self) -> float:  # type: ignore[override]
        """Mean over all images since the last reset that have a score; NaN where none has one."""
        scores = self.get_buffer()
        return float(scores.nanmean())


def _pairs(values: torch.Tensor, axes: int, expected: str, caller: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands side by side along the second axis."""
    if values.ndim < axes or values.shape[1] != 2:
        raise ValueError(f"{caller}: predictions must be pairs of {expected}, got shape {tuple(values.shape)}.")
    return values[:, 0], values[:, 1]


class ProximityMetric(_MeanMetric):
    """How close counterfactuals stay to their images, over a whole run.

    For :class:`monai.handlers.IgniteMetricHandler`, with batches or decollated lists, on one process or many:
    predictions are the counterfactuals (N, C, *spatial), labels the images.

    Args:
        figure: `"l1"`, `"l2"`, `"ssim"` or `"sparsity"`: :func:`l1_distance`, :func:`l2_distance`,
            :func:`structural_similarity`, :func:`sparsity` with its tolerance.

    Raises:
        ValueError: for another figure.
    """

    def __init__(self, figure: str = "l1") -> None:
        super().__init__()
        figures: dict[str, Callable[[Any, Any], np.ndarray]]
        figures = {"l1": l1_distance, "l2": l2_distance, "ssim": structural_similarity, "sparsity": sparsity}
        if figure not in figures:
            raise ValueError(f"{type(self).__name__}: figure must be one of {sorted(figures)}, got {figure!r}.")
        self.evaluate = figures[figure]

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """(N,) figure of each image."""
        return torch.as_tensor(self.evaluate(y, y_pred), device=y_pred.device)


class RealismMetric(CumulativeIterationMetric):
    """How far counterfactuals are, as a set, from real images, over a whole run.

    For :class:`monai.handlers.IgniteMetricHandler`, with batches or decollated lists, on one process or many:
    predictions are the counterfactuals, labels the real images, of :func:`split_frechet_distance` those they were made
    from, in the same order. All features are kept until the end of the run.

    Args:
        figure: `"frechet"`, `"kernel"` or `"split_frechet"`:
            :func:`~monai_jointdiff.metrics.generation.frechet_distance`, the value of
            :func:`~monai_jointdiff.metrics.generation.kernel_distance`, or :func:`split_frechet_distance`.
        embed: maps images (B, C, *spatial) to features (B, D); None: predictions and labels are features already.

    Raises:
        ValueError: for another figure.
    """

    def __init__(
        self, figure: str = "split_frechet", embed: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        super().__init__()
        figures: dict[str, Callable[[Any, Any], float]] = {
            "frechet": frechet_distance,
            "kernel": lambda a, b: kernel_distance(a, b).value,
            "split_frechet": split_frechet_distance,
        }
        if figure not in figures:
            raise ValueError(f"{type(self).__name__}: figure must be one of {sorted(figures)}, got {figure!r}.")
        self.evaluate = figures[figure]
        self.embed = embed

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:  # type: ignore[override]
        """Keep the features (N, D) of both."""
        if self.embed is None:
            return [y_pred, y]
        with torch.no_grad():
            return [self.embed(y_pred), self.embed(y)]

    def aggregate(self) -> float:  # type: ignore[override]
        """The distance between all that came since the last reset, squared, in units of the features."""
        made, real = self.get_buffer()
        return self.evaluate(made, real)


class CompositionMetric(_MeanMetric):
    """How far an intervention that asks for nothing moves images, over a whole run: :func:`composition`.

    For :class:`monai.handlers.IgniteMetricHandler`, with batches, on one process or many: predictions are the images
    (N, C, *spatial), labels are not looked at and may be None.

    Args:
        reconstruct: maps images to their factual reconstruction.
        cycles: after how many repetitions to measure, at least 1.

    Raises:
        ValueError: for fewer than one cycle.
    """

    def __init__(self, reconstruct: Callable[[Any], Any], cycles: int = 1) -> None:
        super().__init__()
        if cycles < 1:
            raise ValueError(f"{type(self).__name__}: cycles must be at least 1, got {cycles}.")
        self.reconstruct = reconstruct
        self.cycles = cycles

    def _compute_tensor(self, y_pred: torch.Tensor, y: Any = None, **kwargs: Any) -> torch.Tensor:
        """(N,) L1 distance of each image to what became of it."""
        moved = composition(y_pred, self.reconstruct, (self.cycles,))[self.cycles]
        return torch.as_tensor(moved, device=y_pred.device)


class ReversibilityMetric(_MeanMetric):
    """How far images are from themselves after a change and its opposite, over a whole run: :func:`reversibility`.

    For :class:`monai.handlers.IgniteMetricHandler`, with batches, on one process or many: predictions are the images
    (N, C, *spatial), labels are not looked at and may be None.

    Args:
        there: maps images to counterfactuals of another class.
        back: maps counterfactuals to the class of the images.
    """

    def __init__(self, there: Callable[[Any], Any], back: Callable[[Any], Any]) -> None:
        super().__init__()
        self.there = there
        self.back = back

    def _compute_tensor(self, y_pred: torch.Tensor, y: Any = None, **kwargs: Any) -> torch.Tensor:
        """(N,) L1 distance of each image to what came back."""
        return torch.as_tensor(reversibility(y_pred, self.there, self.back), device=y_pred.device)
