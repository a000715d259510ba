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

"""What happens when a training is over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer
from torch import nn

from monai_jointdiff.data import ImageSource
from monai_jointdiff.engines.bundle import load_weights
from monai_jointdiff.engines.description import ModelDescription
from monai_jointdiff.engines.generation import SamplingInferer, compare_generation, draw_samples, write_generation
from monai_jointdiff.engines.reporting import ClassificationReporter, choose_decision
from monai_jointdiff.handlers.atomic import atomic_write_text
from monai_jointdiff.handlers.best_model import BestModel
from monai_jointdiff.handlers.predictions import PredictionCollector, Predictions
from monai_jointdiff.metrics import RandomConvFeatures, pca_logistic_floor
from monai_jointdiff.visualize import format_table

__all__ = ["TrainingReport", "predict"]


def predict(
    network: nn.Module, inferer: Inferer, dataset: Dataset, device: torch.device, batch_size: int = 128
) -> Predictions:
    """Classify a data set with a stock evaluator.

    Args:
        network: the network.
        inferer: called as `inferer(images, network)`, gives logits.
        dataset: items with `image`, `label` and `name`.
        device: where to run.
        batch_size: images per batch.

    Returns:
        logits, labels and names in the order of the data set.
    """
    collector = PredictionCollector()
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=0)
    SupervisedEvaluator(
        device=device,
        val_data_loader=loader,
        network=network,
        inferer=inferer,
        val_handlers=[collector],
        decollate=False,
    ).run()
    assert collector.predictions is not None
    return collector.predictions


def writes_report(weights: Path, best: BestModel | None, evaluator: SupervisedEvaluator | None) -> bool:
    """At the end of a training: see that validation has chosen a model, and whether this process reports on it.

    Args:
        weights: file of the chosen model.
        best: chooses it; None: not by this run.
        evaluator: validates where that never happened, as in a training shorter than the interval of validations.

    Returns:
        True in the first process.

    Raises:
        ValueError: when there is no such file, because no validation gave a number.
    """
    if best is not None and best.value is None and evaluator is not None:
        evaluator.run()  # in all processes: its metrics are gathered
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return False
    if not weights.is_file() or (best is not None and best.value is None):
        raise ValueError(
            f"writes_report: this run left no {weights.name} in {weights.parent}: no validation gave a number."
        )
    return True


class TrainingReport:
    """What happens when the training is over: choose, calibrate, test, generate, say it in one table.

    The best weights (by validation) are loaded into the EMA network; temperature and threshold are fixed on the
    validation part and written to `model.json`; the test part is evaluated once; samples are compared with test
    images. Runs on the first process only. A run that ended before its first validation (by its time limit) is
    validated here, so that it leaves a model, too.

    Args:
        source: the data.
        network: the EMA network, changed in place.
        inferer: classifies.
        sampling: generates.
        description: of the network as trained, without a decision rule yet.
        ckpt_dir: holds `model.pt`; `model.json` is written beside it.
        output_dir: receives numbers and pictures.
        device: where to run.
        num_samples: images to generate for the comparison; 0 leaves generation out.
        classify: False leaves classification out, for a network trained for denoising alone.
        batch_size: images per batch.
        seed: seed of noise, bootstrap and Gaussian draws.
        floor: also fit the PCA + logistic regression floor (needs scikit-learn).
        best: the handler that wrote `model.pt`; None takes the file as it is.
        evaluator: the validation with `best` among its handlers.
        progress: show a progress bar while it generates.
    """

    def __init__(
        self,
        source: ImageSource,
        network: nn.Module,
        inferer: Inferer,
        sampling: SamplingInferer,
        description: ModelDescription,
        ckpt_dir: str | Path,
        output_dir: str | Path,
        device: torch.device,
        num_samples: int = 500,
        classify: bool = True,
        batch_size: int = 128,
        seed: int = 0,
        floor: bool = True,
        best: BestModel | None = None,
        evaluator: SupervisedEvaluator | None = None,
        progress: bool = True,
    ) -> None:
        self.source = source
        self.network = network
        self.inferer = inferer
        self.sampling = sampling
        self.description = description
        self.ckpt_dir = Path(ckpt_dir)
        self.output_dir = Path(output_dir)
        self.device = device
        self.num_samples = num_samples
        self.classify = classify
        self.batch_size = batch_size
        self.seed = seed
        self.floor = floor
        self.best = best
        self.evaluator = evaluator
        self.progress = progress

    def run(self) -> dict[str, Any] | None:
        """Write model.json, all numbers and pictures.

        Returns:
            the final table as a dictionary (also `summary.json`), None on all but the first process.

        Raises:
            ValueError: when there is no `model.pt`, because no validation gave a number.
        """
        if not writes_report(self.ckpt_dir / "model.pt", self.best, self.evaluator):
            return None
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.network.load_state_dict(load_weights(self.ckpt_dir / "model.pt"))
        summary: dict[str, Any] = {"data": self.source.name}
        self.description.save(self.ckpt_dir / "model.json")
        if self.classify:
            summary.update(self._classification())
        if self.num_samples:
            summary.update(self._generation())
        atomic_write_text(self.output_dir / "summary.json", json.dumps(summary, indent=4) + "\n")
        table = format_table([{"figure": key, "value": value} for key, value in summary.items()])
        print(f"\nfinal table\n{table}\nnumbers and pictures: {self.output_dir}\nmodel: {self.ckpt_dir}", flush=True)
        return summary

    def dataset(self, part: str) -> Dataset:
        """One part of the data, read and brought to [-1, 1], without random transforms."""
        return Dataset(self.source.part(part), self.source.preprocessing())

    def _classification(self) -> dict[str, Any]:
        multi_label = self.source.multi_label
        validation = predict(self.network, self.inferer, self.dataset("val"), self.device, self.batch_size)
        decision = choose_decision(validation, multi_label, f"validation part of {self.source.name}")
        self.description = self.description.with_decision(decision)
        self.description.save(self.ckpt_dir / "model.json")
        test = predict(self.network, self.inferer, self.dataset("test"), self.device, self.batch_size)
        if not (test.labels >= 0).any():
            print("the test part has no labels: nothing to evaluate the classification against", flush=True)
            return {}
        reporter = ClassificationReporter(self.description, self.output_dir, "test", seed=self.seed)
        reporter(test)
        assert reporter.report is not None
        rows = reporter.report.as_dict()
        names = ("auc", "accuracy", "balanced_accuracy", "f1", "ece")
        figures = {f"test {name}": rows[name]["value"] for name in names}
        return {**figures, **self._floor()}

    def _floor(self) -> dict[str, Any]:
        if not self.floor or self.source.multi_label:
            return {}
        (train, train_labels), (test, test_labels) = self._labelled("train"), self._labelled("test")
        try:
            result = pca_logistic_floor(train, train_labels, test, test_labels)
        except (ValueError, ImportError) as error:  # too few classes, no scikit-learn: no reason to lose the rest
            print(f"no floor of PCA + logistic regression: {error}", flush=True)
            return {}
        return {"test auc of PCA + logistic regression (floor)": result.auc}

    def _images(self, part: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """All images and labels of a part, or `limit` of them, chosen by the seed (files may be sorted by class)."""
        dataset = self.dataset(part)
        chosen = np.random.RandomState(self.seed).permutation(len(dataset))[:limit].tolist()
        read = {index: dataset[index] for index in sorted(chosen)}  # in order: a volume is read once for all its slices
        items = [read[index] for index in chosen]
        images, labels = ([np.asarray(item[key]) for item in items] for key in ("image", "label"))
        return np.stack(images), np.stack(labels)

    def _labelled(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = self._images(part)
        return images[labels >= 0], labels[labels >= 0]

    def _generation(self) -> dict[str, Any]:
        train, _ = self._images("train")
        test, _ = self._images("test", self.num_samples)
        count = min(self.num_samples, len(test), len(train))
        if count < 2:
            print(f"no distances of generated images: {count} images to compare, at least 2 are needed", flush=True)
            return {}
        shape = self.description.noise_shape
        samples = draw_samples(
            self.network, self.sampling, shape, count, self.batch_size, self.seed, self.device, self.progress
        )
        features = RandomConvFeatures(self.source.spatial_dims, self.source.in_channels)
        rows = compare_generation(samples, train, test, features, self.seed)
        write_generation(rows, samples, test, type(features).__name__, self.output_dir)
        return {f"Frechet distance to test images: {row.images}": row.frechet for row in rows}
