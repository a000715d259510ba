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

"""Predictions become a decision rule, a table, files and pictures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from monai_jointdiff.data.labels import NO_FINDING
from monai_jointdiff.engines.description import Decision, ModelDescription
from monai_jointdiff.handlers.atomic import atomic_write_text
from monai_jointdiff.handlers.predictions import Predictions
from monai_jointdiff.metrics import (
    ClassificationReport,
    SelectiveReport,
    choose_threshold,
    classification_report,
    fit_temperature,
    macro_auc,
    predictive_entropy,
    selective_report,
)
from monai_jointdiff.metrics.bootstrap import FEWEST_UNITS
from monai_jointdiff.visualize import (
    confusion_matrix_figure,
    reliability_figure,
    risk_coverage_figure,
    roc_curve_figure,
    save_figure,
)

__all__ = ["ClassificationReporter", "choose_decision", "notes_on_patients", "resampling", "write_predictions_csv"]


def choose_decision(predictions: Predictions, multi_label: bool, chosen_on: str) -> Decision:
    """Fix temperature and threshold on validation predictions.

    The temperature minimizes the negative log-likelihood (Guo et al., ICML 2017). The threshold of a binary problem
    (and of each label of a multi-label one) maximizes balanced accuracy; of equally good thresholds the middle in
    logit space is taken, which leaves the largest margin on either side.

    Args:
        predictions: logits and labels of the validation part; unlabelled images are left out.
        multi_label: independent labels.
        chosen_on: in words, which data these are.

    Returns:
        the decision rule; uncalibrated when fewer than two classes are labelled.
    """
    labelled = predictions.labelled(multi_label)
    if len(np.unique(labelled.labels[labelled.labels >= 0])) < 2:
        return Decision(chosen_on="nothing: the validation part has fewer than two labelled classes")
    temperature = fit_temperature(labelled.logits, labelled.labels, multi_label=multi_label)
    decision = Decision(temperature, None, f"{chosen_on} ({len(labelled.labels)} images)")
    probabilities = decision.probabilities(labelled.logits, multi_label)
    if multi_label:
        columns = range(probabilities.shape[1])
        thresholds = [_threshold_of_label(probabilities[:, k], labelled.labels[:, k]) for k in columns]
    elif probabilities.shape[1] == 2:
        thresholds = [choose_threshold(probabilities[:, 1], labelled.labels, criterion="balanced_accuracy")]
    else:
        return decision
    return Decision(temperature, thresholds, decision.chosen_on)


def _threshold_of_label(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Threshold of one label, over the images where it is known; 0.5 where only one of its values occurs."""
    known = labels >= 0
    if len(np.unique(labels[known])) < 2:
        return 0.5
    return choose_threshold(probabilities[known], labels[known], criterion="balanced_accuracy")


def write_predictions_csv(predictions: Predictions, description: ModelDescription, path: str | Path) -> None:
    """One row an image: its relative name, the calibrated probability of each class, the decision.

    Args:
        predictions: names, logits and labels (the label column is written only where some label is known).
        description: class names and decision rule.
        path: CSV file, replaced at once.
    """
    decision, multi_label = description.decision, description.multi_label
    probabilities = decision.probabilities(predictions.logits, multi_label)
    classes = decision.classes(probabilities, multi_label)
    names = description.class_names
    with_labels = bool((predictions.labels >= 0).any())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *[f"probability_{name}" for name in names], "prediction", *["label"] * with_labels])
    for row, name in enumerate(predictions.names):
        cells = [name, *[f"{value:.6f}" for value in probabilities[row]], in_words(classes[row], names)]
        if with_labels:
            cells.append(in_words(predictions.labels[row], names))
        writer.writerow(cells)
    atomic_write_text(path, text.getvalue())


def in_words(value: Any, names: Sequence[str]) -> str:
    """A class index (or a multi-hot row) as class names, as `encode_labels` reads them; empty where unknown."""
    if np.ndim(value) == 0:
        return names[int(value)] if value >= 0 else ""
    found = "|".join(name for name, hot in zip(names, value, strict=True) if hot == 1)
    return NO_FINDING if (np.asarray(value) == 0).all() else found


def resampling(groups: Sequence[str] | None, bootstrap: int, seed: int) -> dict[str, Any]:
    """How intervals are made: of resampled images, or of resampled patients where several images are of one.

    Args:
        groups: keys of images that belong together, None: no two images do.
        bootstrap: number of resamples.
        seed: of the resamples.

    Returns:
        `bootstrap`, `seed` and `groups` for the reports of `monai_jointdiff.metrics`; no resamples of fewer than ten
        patients, whose percentiles would promise too much.
    """
    too_few = groups is not None and len(set(groups)) < FEWEST_UNITS
    return {"bootstrap": 0 if too_few else bootstrap, "seed": seed, "groups": groups}


def notes_on_patients(groups: Sequence[str] | None) -> list[str]:
    """How images of one patient were taken into account."""
    if groups is None:
        return []
    count = len(set(groups))
    if count < FEWEST_UNITS:
        return [f"{count} patients are too few for intervals (at least {FEWEST_UNITS})"]
    return [f"intervals are those of {count} resampled patients, whose images belong together"]


class ClassificationReporter:
    """Consumer of predictions that writes numbers, table and pictures of a classification.

    Writes `metrics.json`, `predictions.csv`, `roc.png` (where some class has images with and without it),
    `reliability.png`, `confusion.png`, and `risk_coverage.png`: how right the decisions are when those with the largest
    predictive entropy are withheld. Where several images are of one patient, the intervals are those of resampled
    patients; of fewer than ten there are none.

    Args:
        description: class names and decision rule (or a callable that returns them when the predictions are there).
        output_dir: folder for the files.
        part: name of the part of the data, for titles; `all`: all parts.
        bootstrap: number of bootstrap resamples for the 95 % intervals.
        seed: seed of the bootstrap.
    """

    def __init__(
        self,
        description: ModelDescription | Callable[[], ModelDescription],
        output_dir: str | Path,
        part: str = "test",
        bootstrap: int = 1000,
        seed: int = 0,
    ) -> None:
        self.description = description
        self.output_dir = Path(output_dir)
        self.part = part
        self.bootstrap = bootstrap
        self.seed = seed
        self.report: ClassificationReport | None = None
        self.selective: SelectiveReport | None = None

    def __call__(self, predictions: Predictions) -> None:
        """Evaluate and write.

        Args:
            predictions: of the part; unlabelled images are in `predictions.csv` only.

        Raises:
            ValueError: when no image has a label.
        """
        description = self.description() if callable(self.description) else self.description
        write_predictions_csv(predictions, description, self.output_dir / "predictions.csv")
        labelled = predictions.labelled(description.multi_label)
        if not len(labelled.labels):
            raise ValueError(
                f"{type(self).__name__}: no image of {self._part_in_words()} has a label to evaluate against."
            )
        options = resampling(labelled.groups, self.bootstrap, self.seed)
        probabilities = description.decision.probabilities(labelled.logits, description.multi_label)
        report = classification_report(
            probabilities,
            labelled.labels,
            thresholds=description.decision.thresholds,
            class_names=description.class_names,
            multi_label=description.multi_label,
            **options,
        )
        self.report = replace(report, notes=(*report.notes, *notes_on_patients(labelled.groups)))
        self.selective = selective_report(
            probabilities,
            predictive_entropy(probabilities, description.multi_label),
            labelled.labels,
            decided=description.decision.classes(probabilities, description.multi_label),
            multi_label=description.multi_label,
            **options,
        )
        self._write_numbers(description)
        self._draw(description, probabilities, labelled.labels)

    def _write_numbers(self, description: ModelDescription) -> None:
        report, selective = self.report, self.selective
        assert report is not None and selective is not None
        content = {
            "part": self.part,
            "decision": vars(description.decision),
            "metrics": report.as_dict(),
            "selective": selective.as_dict(),
        }
        atomic_write_text(self.output_dir / "metrics.json", json.dumps(content, indent=4) + "\n")
        withheld = "where the most uncertain images are withheld"
        print(f"\n{self._part_in_words()}\n{report.table()}\n\n{withheld}\n{selective.table()}", flush=True)

    def _part_in_words(self) -> str:
        return "all parts" if self.part == "all" else f"the {self.part} part"

    def _draw(self, description: ModelDescription, probabilities: np.ndarray, labels: np.ndarray) -> None:
        names = description.class_names
        if math.isfinite(macro_auc(probabilities, labels)):  # a small part may hold one class only
            save_figure(roc_curve_figure(probabilities, labels, names), self.output_dir / "roc.png")
        save_figure(reliability_figure(probabilities, labels), self.output_dir / "reliability.png")
        if self.selective is not None:
            figure = risk_coverage_figure({"head": self.selective.curve})
            save_figure(figure, self.output_dir / "risk_coverage.png")
        if not description.multi_label:
            decided = description.decision.classes(probabilities)
            save_figure(confusion_matrix_figure(decided, labels, names), self.output_dir / "confusion.png")
