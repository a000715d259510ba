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

"""Collect what a classifier says of a whole data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

__all__ = ["PredictionCollector", "Predictions", "patient_groups"]


def patient_groups(patients: Sequence[str] | None) -> list[str] | None:
    """Keys of images that belong together.

    Args:
        patients: patient of each image, empty where it is not known; None: none is.

    Returns:
        of each image its patient, or where it is not known the image itself. None: no two images belong together.
    """
    known = [patient for patient in patients or [] if patient]
    if len(set(known)) == len(known):
        return None
    return [f"patient {patient}" if patient else f"image {n}" for n, patient in enumerate(patients or [])]


@dataclass(frozen=True)
class Predictions:
    """What a classifier said of a list of images.

    Args:
        names: names of the N images, relative to the folder the user gave.
        logits: (N, K) float64.
        labels: (N,) int64, -1 where unknown; multi-label: (N, K), -1 where an entry is unknown.
        patients: patient of each image, empty where it is not known. None: none is.
    """

    names: list[str]
    logits: np.ndarray
    labels: np.ndarray
    patients: list[str] | None = None

    @property
    def groups(self) -> list[str] | None:
        """Keys of images that belong together, see :func:`patient_groups`."""
        return patient_groups(self.patients)

    def labelled(self, multi_label: bool = False) -> Predictions:
        """Only the images with a label (multi-label: with at least one known entry)."""
        known: Any = self.labels >= 0
        known = known.any(axis=1) if multi_label else known
        patients = None if self.patients is None else list(compress(self.patients, known))
        return Predictions(list(compress(self.names, known)), self.logits[known], self.labels[known], patients)


class PredictionCollector:
    """Handler of an evaluator: collects logits, labels, names and patients of an epoch for its consumers.

    The network's output is the logits, or a result with an attribute `logits`.

    Args:
        consumers: called in turn with the :class:`Predictions` when the epoch is complete.
    """

    def __init__(self, consumers: Sequence[Callable[[Predictions], Any]] = ()) -> None:
        self.consumers = list(consumers)
        self.predictions: Predictions | None = None
        self._names: list[str] = []
        self._logits: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []
        self._patients: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator that does not decollate (`decollate: false`)."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _reset(self, engine: Engine) -> None:
        self._names, self._logits, self._labels, self._patients = [], [], [], []

    def _collect(self, engine: Engine) -> None:
        output: Any = engine.state.output
        batch: Any = engine.state.batch
        pred = output["pred"]
        logits = getattr(pred, "logits", pred).detach().double().cpu()
        self._logits.append(torch.as_tensor(logits))
        self._names.extend(batch["name"])
        self._patients.extend(batch.get("patient", [""] * len(logits)))
        label = batch.get("label")
        self._labels.append(torch.full((len(logits),), -1) if label is None else torch.as_tensor(label).cpu())

    def _finish(self, engine: Engine) -> None:
        logits = torch.cat(self._logits).numpy()
        patients = self._patients if any(self._patients) else None
        self.predictions = Predictions(self._names, logits, torch.cat(self._labels).numpy(), patients)
        for consumer in self.consumers:
            consumer(self.predictions)
