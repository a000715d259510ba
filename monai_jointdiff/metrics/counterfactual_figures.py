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

"""All figures of a run of counterfactuals: whether they convince, what they cost, and where they change the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from monai_jointdiff.metrics.bootstrap import FEWEST_UNITS, Interval
from monai_jointdiff.metrics.counterfactual import (
    Classify,
    FlipReport,
    composition,
    cout,
    direction_names,
    flip_rate,
    group_keys,
    l1_distance,
    l2_distance,
    mean_interval,
    number_of_units,
    reached_target,
    sparsity,
    structural_similarity,
)
from monai_jointdiff.metrics.inputs import as_array
from monai_jointdiff.metrics.localization import LocalizationReport, localization_report

__all__ = ["CounterfactualFigures", "Judgement", "ProximityFigures", "counterfactual_figures"]

CHANGED = 0.05  # of [-1, 1]: a pixel that differs by more has changed
_NOTHING_ASKED = "every image had the wanted answer before"


@dataclass(frozen=True)
class Judgement:
    """What one classifier says of counterfactuals.

    Args:
        flips: how many flipped to what was asked for, and by how much its probability rose, in each direction.
        cout: mean of the counterfactual transition score, over the images whose decision could flip.
    """

    flips: FlipReport
    cout: Interval


@dataclass(frozen=True)
class ProximityFigures:
    """How far counterfactuals are from other images, each figure a mean over images.

    Args:
        l1: mean absolute difference, of images in [-1, 1].
        l2: root mean squared difference.
        ssim: structural similarity, 1 for equal images.
        sparsity: share of the pixels that changed by more than :data:`CHANGED`.
    """

    l1: Interval
    l2: Interval
    ssim: Interval
    sparsity: Interval


@dataclass(frozen=True)
class CounterfactualFigures:
    """What there is to say of a run of counterfactuals.

    All figures but those of an oracle are over the counterfactuals whose image did not have the wanted answer before.

    Args:
        count: counterfactuals.
        already: those whose image had the wanted answer before, by the model that was explained.
        model: by the model that was explained, which took part in the search: no proof of anything.
        oracle: by an independent classifier; None: there was none.
        to_input: counterfactuals against images.
        to_reconstruction: counterfactuals against factual reconstructions: the change itself.
        composition: L1 of factual reconstruction against image: what encoding and decoding do alone.
        localization: of the change against the masks of the findings, with the threshold :data:`CHANGED`, for each
            direction with a mask: by what the model said before and what was asked for, `"opacity -> normal"`, or
            `"enforce NAME"` and `"remove NAME"`. A mask shows what is there before, so that only a change that takes
            it away can be expected inside. None where no mask is known.
        settings: resamples, confidence, seed, what was drawn (`"images"` or `"groups"`), and from how many (`units`).
    """

    count: int
    already: int
    model: Judgement
    oracle: Judgement | None
    to_input: ProximityFigures
    to_reconstruction: ProximityFigures
    composition: Interval
    localization: Mapping[str, LocalizationReport] | None
    settings: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """A dictionary for JSON: no NaN; what is not defined is None, with a reason where there could be a figure."""
        content: dict[str, Any] = _plain(self)
        return content


def _plain(part: Any) -> Any:
    if hasattr(part, "as_dict") and not isinstance(part, CounterfactualFigures):
        return part.as_dict()
    if is_dataclass(part):
        return {field.name: _plain(getattr(part, field.name)) for field in fields(part)}
    return {name: _plain(inner) for name, inner in part.items()} if isinstance(part, Mapping) else part


def counterfactual_figures(
    images: Any,
    reconstructions: Any,
    counterfactuals: Any,
    target: Any,
    enforce: Any = True,
    *,
    classify: Classify,
    oracle: Classify | None = None,
    masks: Any = None,
    multi_label: bool = False,
    class_names: Sequence[str] | None = None,
    groups: Any = None,
    batch_size: int = 64,
    bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> CounterfactualFigures:
    """Measure counterfactuals.

    Args:
        images: (N, C, *spatial) in [-1, 1], two or three spatial axes.
        reconstructions: factual reconstructions, as the images.
        counterfactuals: as the images.
        target: (N,) or one for all, as in :func:`~monai_jointdiff.metrics.target_probability`.
        enforce: (N,) or one for all, as there.
        classify: the model that was explained: maps images (B, C, *spatial) to probabilities (B, K).
        oracle: an independent classifier, in the same way; None: there is none.
        masks: (N, 1, *spatial), 0 and 1, where the finding is; None: not known.
        multi_label: the classes are independent labels.
        class_names: K distinct names; None: "0", "1", ...
        groups: (N,) keys, such as patients, or the names of images with several counterfactuals each: intervals draw
            whole groups, and rates have :func:`~monai_jointdiff.metrics.grouped_wilson_interval`.
        batch_size: images for each call of the classifiers.
        bootstrap: number of resamples; 0: no bootstrap intervals. There is none either of a figure of fewer than ten
            images or groups.
        seed: of the resamples.
        confidence: of the intervals.

    Returns:
        the figures.

    Raises:
        ValueError: for input of wrong shapes or values, see the functions of each figure.
    """
    x, x_fr, x_cf = (
        torch.from_numpy(as_array(part, np.float32)) for part in (images, reconstructions, counterfactuals)
    )
    count = len(x)
    run = _Run(
        images=x,
        counterfactuals=x_cf,
        target=np.broadcast_to(as_array(target, np.int64), count),
        enforce=np.broadcast_to(as_array(enforce, bool), count),
        multi_label=multi_label,
        class_names=class_names,
        groups=group_keys(groups, count, "counterfactual_figures"),
        batch_size=batch_size,
        resampling={"bootstrap": bootstrap, "seed": seed, "confidence": confidence},
    )
    before = run.probabilities(classify, x)
    asked = ~run.already(before)
    return CounterfactualFigures(
        count=count,
        already=int((~asked).sum()),
        model=run.judged_by(classify),
        oracle=None if oracle is None else run.judged_by(oracle),
        to_input=run.proximity_to(x, asked),
        to_reconstruction=run.proximity_to(x_fr, asked),
        composition=run.mean(lambda: composition(x[asked], lambda _: x_fr[asked], (1,))[1], asked),
        localization=None if masks is None else run.localization(x_cf - x_fr, as_array(masks), asked, before),
        settings={
            **run.resampling,
            "drawn": "images" if groups is None else "groups",
            "units": number_of_units(count, run.groups),
        },
    )


@dataclass(frozen=True)
class _Run:
    """The counterfactuals of a run and how their figures are resampled; see :func:`counterfactual_figures`."""

    images: torch.Tensor
    counterfactuals: torch.Tensor
    target: np.ndarray
    enforce: np.ndarray
    multi_label: bool
    class_names: Sequence[str] | None
    groups: np.ndarray | None
    batch_size: int
    resampling: dict[str, Any]

    def probabilities(self, judge: Classify, images: torch.Tensor) -> np.ndarray:
        """(N, K)."""
        return np.concatenate([as_array(judge(batch)) for batch in images.split(self.batch_size)])

    def already(self, before: np.ndarray) -> np.ndarray:
        """(N,) whether a judge gave the wanted answer to the image itself, from its probabilities (N, K)."""
        return reached_target(before, self.target, self.enforce, multi_label=self.multi_label)

    def judged_by(self, judge: Classify) -> Judgement:
        """Flips and transition scores."""
        before = self.probabilities(judge, self.images)
        flips = flip_rate(
            before,
            self.probabilities(judge, self.counterfactuals),
            self.target,
            self.enforce,
            multi_label=self.multi_label,
            class_names=self.class_names,
            groups=self.groups,
            **self.resampling,
        )
        could = ~self.already(before)

        def scores() -> np.ndarray:
            return cout(
                self.images[could],
                self.counterfactuals[could],
                judge,
                self.target[could],
                enforce=self.enforce[could],
                multi_label=self.multi_label,
                batch_size=self.batch_size,
            )

        return Judgement(flips, self.mean(scores, could))

    def proximity_to(self, others: torch.Tensor, asked: np.ndarray) -> ProximityFigures:
        """Of the counterfactuals to other images."""
        measures: tuple[Callable[[Any, Any], np.ndarray], ...]
        measures = (l1_distance, l2_distance, structural_similarity, partial(sparsity, tolerance=CHANGED))
        pair = others[asked], self.counterfactuals[asked]
        return ProximityFigures(*[self.mean(partial(measure, *pair), asked) for measure in measures])

    def directions(self, before: np.ndarray) -> np.ndarray:
        """(N,) what a judge said before and what was asked for; of a label the one follows from the other."""
        num_classes = before.shape[1]
        wanted = direction_names(self.class_names, self.target, self.enforce, num_classes, self.multi_label)
        if self.multi_label:
            return wanted
        said = direction_names(self.class_names, before.argmax(1), self.enforce, num_classes, False)
        return np.array([f"{one} -> {other}" for one, other in zip(said, wanted, strict=True)])

    def localization(
        self, change: torch.Tensor, masks: np.ndarray, asked: np.ndarray, before: np.ndarray
    ) -> dict[str, LocalizationReport] | None:
        """Of the change (N, C, *spatial) against the masks, in each direction; None where all of them are empty."""
        shown = asked & masks.reshape(len(masks), -1).any(1)
        names, reports = self.directions(before), {}
        for name in np.unique(names[shown]):
            here = names == name
            drawn = None if self.groups is None else self.groups[shown & here]
            enough = number_of_units(int((shown & here).sum()), drawn) >= FEWEST_UNITS
            resampling = self.resampling if enough else {**self.resampling, "bootstrap": 0}
            groups = None if self.groups is None else self.groups[asked & here]
            reports[str(name)] = localization_report(
                change[asked & here], masks[asked & here], CHANGED, groups=groups, **resampling
            )
        return reports or None

    def mean(self, measure: Callable[[], np.ndarray], chosen: np.ndarray) -> Interval:
        """Mean of a figure of the chosen images, (M,); not measured where none is chosen."""
        if not chosen.any():
            return Interval(None, reason=_NOTHING_ASKED)
        groups = None if self.groups is None else self.groups[chosen]
        settings = self.resampling
        return mean_interval(measure(), groups, settings["bootstrap"], settings["seed"], settings["confidence"])
