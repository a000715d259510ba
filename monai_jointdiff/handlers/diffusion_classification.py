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

"""Collect what a diffusion classifier says of a whole data set, and draw its maps of evidence."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import CommonKeys

from monai_jointdiff.handlers.predictions import patient_groups
from monai_jointdiff.inferers import DenoisingProfile, DiffusionClassifierResult
from monai_jointdiff.visualize import evidence_panel, save_png

__all__ = ["DiffusionPredictionCollector", "DiffusionPredictions", "EvidenceWriter", "join_results"]

_LONGEST_NAME = 80  # characters of an image's name in the name of its picture


def join_results(results: Sequence[DiffusionClassifierResult]) -> DiffusionClassifierResult:
    """The results of consecutive batches as one, without their maps of evidence, which need much memory.

    Args:
        results: at least one, of one inferer.

    Returns:
        the result for all images; `seconds` is their sum.
    """
    joined: dict[str, Any] = {}
    for part in fields(DiffusionClassifierResult):
        values = [getattr(result, part.name) for result in results]
        joined[part.name] = torch.cat(values) if isinstance(values[0], torch.Tensor) else None
    joined.update(seconds=sum(result.seconds for result in results), evidence=None, timesteps=results[0].timesteps)
    return DiffusionClassifierResult(**joined)


@dataclass(frozen=True)
class DiffusionPredictions:
    """What a diffusion classifier said of a list of images.

    Args:
        names: names of the N images, relative to the folder the user gave.
        labels: (N,) int64, -1 where unknown; multi-label: (N, K), -1 where an entry is unknown.
        result: for all images, without maps of evidence.
        profiles: (N, D) denoising profiles of the images; None where they were not asked for.
        patients: patient of each image, empty where it is not known. None: none is.
    """

    names: list[str]
    labels: np.ndarray
    result: DiffusionClassifierResult
    profiles: torch.Tensor | None = None
    patients: list[str] | None = None

    @property
    def groups(self) -> list[str] | None:
        """Keys of images that belong together, see :func:`~monai_jointdiff.handlers.patient_groups`."""
        return patient_groups(self.patients)


class DiffusionPredictionCollector:
    """Handler of an evaluator: collects the results of an epoch, then hands them to its consumers.

    The evaluator must not decollate; its output's `pred` is a
    :class:`~monai_jointdiff.inferers.DiffusionClassifierResult`, its batch has `name`, and `label` where it is known.

    Args:
        consumers: called in turn with the :class:`DiffusionPredictions` when the epoch is complete.
        profile: taken of each image as well, with the evaluator's network; None: no profiles.
    """

    def __init__(
        self,
        consumers: Sequence[Callable[[DiffusionPredictions], Any]] = (),
        profile: DenoisingProfile | None = None,
    ) -> None:
        self.consumers = list(consumers)
        self.profile = profile
        self.predictions: DiffusionPredictions | None = None
        self._names: list[str] = []
        self._labels: list[torch.Tensor] = []
        self._results: list[DiffusionClassifierResult] = []
        self._profiles: list[torch.Tensor] = []
        self._patients: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator that does not decollate (`decollate: false`)."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _reset(self, engine: Engine) -> None:
        self._names, self._labels, self._results, self._profiles, self._patients = [], [], [], [], []

    def _collect(self, engine: Engine) -> None:
        output: Any = engine.state.output
        batch: Any = engine.state.batch
        result: DiffusionClassifierResult = output["pred"]
        self._results.append(join_results([result]))
        self._names.extend(batch["name"])
        self._patients.extend(batch.get("patient", [""] * len(batch["name"])))
        label = batch.get("label")
        unknown = torch.full(result.prediction.shape, -1)
        self._labels.append(unknown if label is None else torch.as_tensor(label).cpu())
        if self.profile is not None:
            network: Any = engine.network  # type: ignore[attr-defined]
            self._profiles.append(self.profile(output[CommonKeys.IMAGE], network))

    def _finish(self, engine: Engine) -> None:
        labels = torch.cat(self._labels).numpy()
        profiles = torch.cat(self._profiles) if self._profiles else None
        patients = self._patients if any(self._patients) else None
        self.predictions = DiffusionPredictions(self._names, labels, join_results(self._results), profiles, patients)
        for consumer in self.consumers:
            consumer(self.predictions)


class EvidenceWriter:
    """Handler of an evaluator: draws of the first images where the answer explains the image better than its runner-up.

    Files are `<number>_<name>.png` (:func:`~monai_jointdiff.visualize.evidence_panel`), numbered from 0 in the order of
    the images; those of an earlier run are removed. Of a model of several labels there is a map for each label.

    The evaluator must not decollate; its output's `pred` is a
    :class:`~monai_jointdiff.inferers.DiffusionClassifierResult` with maps of evidence (results without are left
    out), its batch has `image`, `name`, and `mask` where the true finding is known.

    Args:
        output_dir: folder for the files.
        class_names: names in the order of the classes.
        limit: number of images to draw, at least 1.

    Raises:
        ValueError: for a limit below 1.
    """

    def __init__(self, output_dir: str | Path, class_names: Sequence[str], limit: int = 16) -> None:
        if limit < 1:
            raise ValueError(f"EvidenceWriter: at least 1 image to draw expected, got {limit}.")
        self.output_dir = Path(output_dir)
        self.class_names = list(class_names)
        self.limit = limit
        self._count = 0

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator that does not decollate (`decollate: false`)."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def _reset(self, engine: Engine) -> None:
        self._count = 0
        for stale in self.output_dir.glob("[0-9][0-9][0-9][0-9]_*.png"):
            stale.unlink()

    def _write(self, engine: Engine) -> None:
        output: Any = engine.state.output
        batch: Any = engine.state.batch
        result: DiffusionClassifierResult = output["pred"]
        if result.evidence is None:
            return
        masks = batch.get("mask")
        for index, name in enumerate(batch["name"][: self.limit - self._count]):
            mask = None if masks is None else masks[index]
            captions = [name, *self._answers(result, index)]
            picture = evidence_panel(batch["image"][index], result.evidence[index], captions, mask)
            save_png(picture, self.output_dir / f"{self._count:04d}_{_plain(name)}.png")
            self._count += 1

    def _answers(self, result: DiffusionClassifierResult, index: int) -> list[str]:
        """What the maps of an image are about: its answer and the runner-up; or each label's answer."""
        if result.multi_label:
            states = ("absent", "present")
            answers = result.prediction[index].tolist()
            return [f"{name}: {states[answer]}" for name, answer in zip(self.class_names, answers, strict=True)]
        answer = int(result.prediction[index])
        if int(result.num_draws[index]) == 0:
            return [f"{self.class_names[answer]}: the head alone"]
        others = result.errors[index].clone()
        others[answer] = torch.inf
        return [f"{self.class_names[answer]} rather than {self.class_names[int(others.argmin())]}"]


def _plain(name: str) -> str:
    """The name of an image as part of a file's name."""
    return re.sub(r"[^\w-]+", "_", name)[-_LONGEST_NAME:].strip("_") or "image"
