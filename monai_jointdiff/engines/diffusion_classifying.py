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

"""A program that classifies by the denoiser: its model and images, when it abstains, and what it writes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from torch import nn

from monai_jointdiff.data import find_images
from monai_jointdiff.engines.bundle import json_word
from monai_jointdiff.engines.description import Decision, ModelDescription
from monai_jointdiff.engines.explaining import NamedImagesPrepareBatch, spread
from monai_jointdiff.engines.reporting import in_words, notes_on_patients, resampling
from monai_jointdiff.engines.serving import images_to_classify, part_in_words, source_of_model
from monai_jointdiff.handlers.atomic import atomic_write_text
from monai_jointdiff.handlers.diffusion_classification import DiffusionPredictionCollector, DiffusionPredictions
from monai_jointdiff.inferers import (
    DenoisingProfile,
    DiffusionClassifierInferer,
    DiffusionClassifierResult,
    Typicality,
    aggregate,
)
from monai_jointdiff.metrics import (
    Interval,
    SelectiveReport,
    abstention_threshold,
    bootstrap_intervals,
    classification_report,
    fit_temperature,
    selective_report,
)
from monai_jointdiff.visualize import accuracy_against_calls_figure, format_table, risk_coverage_figure, save_figure

__all__ = [
    "AbstentionRule",
    "DiffusionClassificationReporter",
    "DiffusionClassifierPrepareBatch",
    "DrawCalibration",
    "ImagesToDecide",
    "UnusualRule",
    "answers_of_first_draws",
    "classify_by_diffusion",
    "conditional_description",
    "doubt",
    "images_to_decide",
    "write_diffusion_csv",
]

_CLASSIFIER = "diffusion classifier"
_FIRST_DRAWS = (1, 3, 5, 11, 25, 51, 101, 251, 501)  # of Favero et al.'s ablation
_SAME = 5e-7  # relative: shares of votes that differ by rounding are equal, as in metrics.selective
_FEWEST = 20  # reference images on which a temperature or a 95 % quantile is worth something
_OVERLAY = "train.json and train_conditional.json of this bundle, together"


def conditional_description(ckpt_dir: str | Path, untrained: str | Path) -> ModelDescription:
    """`model.json` of a class-conditional model; where there is none yet, that of an untrained one.

    Args:
        ckpt_dir: folder of `model.pt` and `model.json`.
        untrained: description of the bundle's untrained network, whose prediction is made class-conditional here.

    Returns:
        the description.

    Raises:
        ValueError: when the model is not class-conditional, or neither file can be read.
    """
    path = Path(ckpt_dir) / "model.json"
    description = ModelDescription.load(path, untrained)
    if not path.is_file():
        return replace(description, network={**description.network, "class_conditional": True})
    if not description.class_conditional:
        raise ValueError(
            f"conditional_description: the network in {ckpt_dir} is not class-conditional: its prediction of the noise "
            f"does not depend on the class, so that it cannot classify by it. Train one with {_OVERLAY}."
        )
    return description


@dataclass(frozen=True)
class ImagesToDecide:
    """Images to classify, and those on which thresholds and temperature are chosen.

    Args:
        items: `image`, `label` (-1 where unknown) and `name` of each.
        reference: items as well; none where the images themselves are the reference.
        reference_name: what the reference is, in words.
        extent: which images are classified, in words; empty: all that were given.
    """

    items: list[dict[Hashable, Any]]
    reference: list[dict[Hashable, Any]]
    reference_name: str
    extent: str = ""

    def __str__(self) -> str:
        count = f" ({len(self.reference)} images)" if self.reference else ""
        extent = f"{self.extent}\n" if self.extent else ""
        return f"{extent}abstention is chosen on {self.reference_name}{count}"


def images_to_decide(
    dataset_dir: str | int | None,
    description: ModelDescription,
    part: str = "test",
    reference_dir: str | int | None = None,
    limit: int | str | None = None,
    reference_limit: int | str | None = 200,
    **options: Any,
) -> ImagesToDecide:
    """Choose what is classified and on what the threshold of abstention rests.

    Data with labels (phantoms, an `.npz`, MedMNIST, a folder with a CSV, with masks, or with sub-folders that are
    classes of the model) are divided as in training: one part is classified, the validation part is the reference. Of
    any other folder, and of a file, all images are classified, and they are their own reference.

    Args:
        dataset_dir: as for :func:`~monai_jointdiff.engines.images_to_classify`.
        description: of the model.
        part: `train`, `val` or `test`, of data with labels; `all`: all of them, which are then their own reference.
        reference_dir: other images as the reference, labelled or not; None (`null`): those above.
        limit: number of images at most, evenly spread over all; None (`null`): all.
        reference_limit: the same for the reference.
        options: columns and slices as for :func:`~monai_jointdiff.engines.images_to_classify`; None takes the
            training's.

    Returns:
        both lists.

    Raises:
        ValueError: when there are no images, they do not fit the model, a limit is below 1, or the part is drawn
            otherwise than for the training.
    """
    reference: list[dict[Hashable, Any]] = []
    reference_name, extent = "the images themselves", ""
    options = {key: json_word(value) for key, value in options.items()}
    mask_column = options.get("mask_column") or description.data.get("opened_with", {}).get("mask_column")
    if _has_labels(dataset_dir, description.class_names, with_masks=mask_column is not None):
        source = source_of_model(description, dataset_dir, **options)
        items, extent = source.part(part), part_in_words(source, part, description)
        if part not in ("val", "all") and source.items["val"]:
            reference, reference_name = source.part("val"), f"the validation part of {source.name}"
    else:
        items = images_to_classify(dataset_dir, description, **options)
    if json_word(reference_dir) is not None:
        reference = images_to_classify(reference_dir, description, **options)
        reference_name = Path(str(reference_dir)).name
    items, reference = spread(items, limit), spread(reference, reference_limit, "--reference_limit")
    return ImagesToDecide(items, reference, reference_name, extent)


def _has_labels(dataset_dir: str | int | None, class_names: Sequence[str], with_masks: bool) -> bool:
    """Whether data are opened as in training; a folder without labels and a single image are not."""
    path = None if dataset_dir is None else Path(str(dataset_dir))
    if path is None or path.suffix == ".npz" or not path.exists():
        return True
    if not path.is_dir():
        return False
    folders = {part.casefold() for file in find_images(path) for part in file.relative_to(path).parts[:-1]}
    return with_masks or any(path.glob("*.csv")) or bool(folders & {name.casefold() for name in class_names})


class DiffusionClassifierPrepareBatch(NamedImagesPrepareBatch):
    """Turns a batch into the arguments of a :class:`~monai_jointdiff.inferers.DiffusionClassifierInferer`.

    The noise of an image is a function of (seed, its name), whatever the batch it is in.

    Args:
        seed: of the noise.
        maps: make maps of evidence.
        progress: show a progress bar over the evaluations of each batch.
    """

    def __init__(self, seed: int = 0, maps: bool | str = False, progress: bool | str = False) -> None:
        super().__init__(seed, "diffusion", progress, maps=json_word(maps) is True)


def classify_by_diffusion(
    network: nn.Module,
    inferer: DiffusionClassifierInferer,
    dataset: Dataset,
    device: torch.device,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool | str = False,
    profile: DenoisingProfile | None = None,
) -> DiffusionPredictions:
    """Classify a data set with a stock evaluator.

    Args:
        network: a class-conditional network.
        inferer: the classifier.
        dataset: items with `image`, `label` and `name`.
        device: where to run.
        seed: of the noise, with the names.
        batch_size: images at once.
        progress: show a progress bar for each batch.
        profile: taken of each image as well; None: no profiles.

    Returns:
        names, labels and results in the order of the data set.
    """
    collector = DiffusionPredictionCollector(profile=profile)
    SupervisedEvaluator(
        device=device,
        val_data_loader=DataLoader(dataset, batch_size=batch_size, num_workers=0),
        network=network,
        prepare_batch=DiffusionClassifierPrepareBatch(seed, progress=progress),
        inferer=inferer,
        val_handlers=[collector],
        decollate=False,
    ).run()
    assert collector.predictions is not None
    return collector.predictions


def doubt(result: DiffusionClassifierResult, rule: str) -> np.ndarray:
    """By what answers are withheld: the larger, the less certain the answer.

    With the rule `majority` it is 1 minus the probability of the answer: the share 1 - p of the votes against it; where
    the head answered alone, or is a prior, what its probability or both together leave to other answers. For two
    answers a share orders images as the variance p (1 - p) of a vote does; for more it does not take 30 % of the votes
    for as certain as 70 %. With the rule `mean` it is the entropy of the probabilities.

    Args:
        result: of the images.
        rule: `majority` or `mean`.

    Returns:
        (N,), multi-label (N, K), float64.
    """
    return np.asarray(1 - result.confidence if rule == "majority" else result.entropy, dtype=np.float64) + 0.0  # no -0


@dataclass(frozen=True)
class AbstentionRule:
    """Which answers are withheld.

    Args:
        coverage: share of the reference images to be answered.
        threshold: of :func:`doubt`, above which no answer is given.
        rule: `majority` or `mean`.
        chosen_on: in words, the reference images.
    """

    coverage: float
    threshold: float
    rule: str
    chosen_on: str

    @classmethod
    def choose(cls, result: DiffusionClassifierResult, rule: str, coverage: float, chosen_on: str) -> AbstentionRule:
        """The smallest threshold with which at least the wanted share of the reference images is answered.

        Args:
            result: of the reference images.
            rule: `majority` or `mean`.
            coverage: share to be answered, in (0, 1].
            chosen_on: in words, the reference images.

        Returns:
            the rule.

        Raises:
            ValueError: for a coverage out of range.
        """
        return cls(coverage, abstention_threshold(doubt(result, rule).ravel(), coverage), rule, chosen_on)

    def abstains(self, result: DiffusionClassifierResult) -> np.ndarray:
        """Whether the answer is withheld: (N,) bool, multi-label (N, K)."""
        values = doubt(result, self.rule)
        return (values > self.threshold) & ~np.isclose(values, self.threshold, rtol=_SAME, atol=0)

    def __str__(self) -> str:
        limit = (
            f"more than {self.threshold:.1%} of the votes (with the head: of the probability) are against the answer"
        )
        if self.rule != "majority":
            limit = f"the entropy is above {self.threshold:.3g}"
        return f"abstains where {limit}; with this at least {self.coverage:.0%} of {self.chosen_on} is answered"


@dataclass(frozen=True)
class DrawCalibration:
    """The temperature that makes calibrated probabilities of votes or errors.

    Args:
        temperature: of :meth:`~monai_jointdiff.inferers.DiffusionClassifierResult.calibrated`.
        chosen_on: in words, the reference images.
    """

    temperature: float
    chosen_on: str

    @classmethod
    def fit(cls, result: DiffusionClassifierResult, labels: np.ndarray, chosen_on: str) -> DrawCalibration | None:
        """The temperature under which the known labels of reference images are most likely.

        Args:
            result: of the reference images.
            labels: (N,), multi-label (N, K); -1 where unknown.
            chosen_on: in words, the reference images.

        Returns:
            the calibration; None where fewer than 20 labels tell anything: known ones of images with draws whose label
            the head did not rule out.
        """
        logits = np.asarray(result.logits, dtype=np.float64).reshape(-1, result.logits.shape[-1])
        truth = labels.ravel().astype(np.int64)
        possible = np.isfinite(logits)
        tells = (truth >= 0) & (possible.sum(axis=1) > 1) & possible[np.arange(len(truth)), truth]
        if tells.sum() < _FEWEST:
            return None
        return cls(fit_temperature(logits[tells], truth[tells]), chosen_on)

    def __str__(self) -> str:
        return f"calibrated with temperature {self.temperature:.3g}, fitted on {self.chosen_on}"


@dataclass(frozen=True)
class UnusualRule:
    """Which images are unusual for the network, measured by its errors on images it knows.

    Args:
        typicality: fitted on the reference images.
        threshold: of the score, above which an image is unusual.
        share: of images of the reference's kind that are not above it.
        chosen_on: in words, the reference images.
    """

    typicality: Typicality
    threshold: float
    share: float
    chosen_on: str

    @classmethod
    def fit(cls, profiles: torch.Tensor, chosen_on: str, share: float = 0.95) -> UnusualRule | None:
        """Fit the distance on all reference images, and the threshold on each fifth as judged by the others.

        Args:
            profiles: (M, D) of the reference images.
            chosen_on: in words, these.
            share: of them that is to pass for usual, in (0, 1).

        Returns:
            the rule; None for fewer than 20 images.
        """
        if len(profiles) < _FEWEST:
            return None
        return cls(Typicality.fit(profiles), Typicality.held_out_threshold(profiles, share), share, chosen_on)

    def scores(self, profiles: torch.Tensor) -> np.ndarray:
        """How unusual each image is, (N,)."""
        return np.asarray(self.typicality.score(profiles))

    def __str__(self) -> str:
        return f"unusual above a score of {self.threshold:.3g}, which {self.share:.0%} of {self.chosen_on} stay below"


def answers_of_first_draws(result: DiffusionClassifierResult, count: int, rule: str) -> torch.Tensor:
    """The answers, had no more draws been made than so many.

    An image that was done with fewer keeps its answer, and so does one that the head answered alone.

    Args:
        result: of the images, without the head as prior.
        count: number of draws, at least 1.
        rule: `majority` or `mean`.

    Returns:
        as `result.prediction`.
    """
    errors = result.draw_errors[..., :count]
    return torch.where(result.num_draws > 0, aggregate(errors, rule).argmax(dim=-1), result.prediction)


def write_diffusion_csv(
    predictions: DiffusionPredictions,
    abstained: np.ndarray,
    class_names: Sequence[str],
    path: str | Path,
    *,
    decision: Decision | None = None,
    calibration: DrawCalibration | None = None,
    unusual: UnusualRule | None = None,
) -> None:
    """One row an image: its relative name, the answer, how certain it is and what it cost.

    Share and variance of the votes are empty where the head answered alone.

    Args:
        predictions: names, labels (the label column is written only where some label is known) and results.
        abstained: (N,), multi-label (N, K): whether the answer is withheld.
        class_names: names in the order of the classes.
        path: CSV file, replaced at once.
        decision: how the head's probabilities become its own answer, where it was asked; None: the most probable.
        calibration: for calibrated probabilities; None: none are written.
        unusual: how unusual the images are; None, or predictions without profiles: nothing is written of it.
    """
    result, names = predictions.result, list(class_names)
    columns: dict[str, Sequence[str]] = {"image": predictions.names}
    columns["prediction"] = [in_words(row, names) for row in np.asarray(result.prediction)]
    columns |= _columns("probability", np.asarray(result.probabilities), "{:.6f}", names)
    if calibration is not None:
        calibrated = result.calibrated(calibration.temperature)
        columns |= _columns("calibrated", np.asarray(calibrated), "{:.6f}", names)
    columns |= _columns("votes", np.asarray(result.votes), "{:.0f}", names)
    columns |= _columns("vote_share", np.asarray(result.vote_share), "{:.6f}", names)
    columns |= _columns("uncertainty", np.asarray(result.uncertainty), "{:.6f}", names)
    columns |= _columns("entropy", np.asarray(result.entropy) + 0.0, "{:.6g}", names)
    columns |= _columns("draws", np.asarray(result.num_draws), "{}", names)
    columns |= _columns("network_calls", np.asarray(result.network_calls), "{:.0f}", names)
    columns |= _columns("decided", np.asarray(result.decided), "{}", names)
    columns |= _columns("abstain", abstained, "{}", names)
    if unusual is not None and predictions.profiles is not None:
        scores = unusual.scores(predictions.profiles)
        columns |= _columns("unusual_score", scores, "{:.6g}", names)
        columns |= _columns("unusual", scores > unusual.threshold, "{}", names)
    if result.head_probabilities is not None:
        head = np.asarray(result.head_probabilities)
        answers = (decision or Decision()).classes(head, result.multi_label)
        columns["head_prediction"] = [in_words(row, names) for row in answers]
        columns |= _columns("head", head, "{:.6f}", names)
    if (predictions.labels >= 0).any():
        columns["label"] = [in_words(row, names) for row in predictions.labels]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    atomic_write_text(path, text.getvalue())


def _columns(name: str, values: np.ndarray, form: str, class_names: Sequence[str]) -> dict[str, list[str]]:
    """One column of N numbers, or one for each class of (N, K); NaN leaves its cell empty."""
    if values.ndim == 1:
        return {name: ["" if np.isnan(value) else form.format(value) for value in values]}
    parts = zip(class_names, values.T, strict=True)
    return {key: cells for kind, column in parts for key, cells in _columns(f"{name}_{kind}", column, form, ()).items()}


@dataclass(frozen=True)
class _Questions:
    """Each image, or of a model of several labels each label of each image, as one question with its answer.

    Args:
        probabilities: (M, K) of the answers; of a label of its absence and its presence.
        labels: (M,), -1 where unknown.
        groups: (M,) key of the image, or of its patient where several images are of one.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    @classmethod
    def of(cls, probabilities: Any, labels: np.ndarray, patients: Sequence[str] | None) -> _Questions:
        values = np.asarray(probabilities, dtype=np.float64)
        groups = np.arange(len(labels)) if patients is None else np.asarray(patients)
        if labels.ndim == 1:
            return cls(values, labels.astype(np.int64), groups)
        present = values.ravel()
        groups = np.repeat(groups, labels.shape[1])
        return cls(np.stack([1 - present, present], axis=1), labels.ravel().astype(np.int64), groups)

    @property
    def known(self) -> np.ndarray:
        return self.labels >= 0

    def report(self, uncertainty: np.ndarray, answers: np.ndarray, bootstrap: int, seed: int) -> SelectiveReport:
        return selective_report(
            self.probabilities,
            uncertainty.ravel(),
            self.labels,
            decided=answers.ravel(),
            bootstrap=bootstrap,
            seed=seed,
            groups=self.groups,
        )

    def accuracies(self, answers: Mapping[str, np.ndarray], bootstrap: int, seed: int) -> dict[str, Interval]:
        """Accuracy of several answers to the questions with a known label, all on the same resamples of images."""
        right = {name: (given.ravel() == self.labels)[self.known] for name, given in answers.items()}

        def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
            return {name: weights @ values / weights.sum(axis=1) for name, values in right.items()}

        count = int(self.known.sum())
        return bootstrap_intervals(statistics, count, bootstrap, seed, groups=self.groups[self.known])


class DiffusionClassificationReporter:
    """Consumer of the results of a diffusion classifier that writes table, numbers and pictures.

    Writes `diffusion_predictions.csv` and `summary.json`; where labels are known also `risk_coverage.png` and, unless
    the head was a prior, `accuracy_against_calls.png`: the accuracy of the first draws against what they cost.
    :meth:`fit` learns from reference images when to abstain, which temperature calibrates, and what is unusual.

    Args:
        description: of the model.
        inferer: the classifier.
        output_dir: folder for the files.
        coverage: share of the reference images that is to be answered, in (0, 1].
        bootstrap: number of bootstrap resamples for the 95 % intervals.
        seed: of the noise of the reference images and of the bootstrap.
        profile: of the reference images, by which others are called unusual; the images to classify need theirs from
            the same one, see :class:`~monai_jointdiff.handlers.DiffusionPredictionCollector`. None: nothing is.
    """

    def __init__(
        self,
        description: ModelDescription,
        inferer: DiffusionClassifierInferer,
        output_dir: str | Path,
        coverage: float = 0.8,
        bootstrap: int = 1000,
        seed: int = 0,
        profile: DenoisingProfile | None = None,
    ) -> None:
        if not 0 < coverage <= 1:
            raise ValueError(f"{type(self).__name__}: coverage must lie in (0, 1], got {coverage}.")
        self.description = description
        self.inferer = inferer
        self.output_dir = Path(output_dir)
        self.coverage = coverage
        self.bootstrap = bootstrap
        self.seed = seed
        self.profile = profile
        self.abstention: AbstentionRule | None = None
        self.calibration: DrawCalibration | None = None
        self.unusual: UnusualRule | None = None
        self.summary: dict[str, Any] = {}

    def fit(
        self,
        network: nn.Module,
        images: ImagesToDecide,
        preprocessing: Any,
        device: torch.device,
        batch_size: int = 64,
        progress: bool | str = False,
    ) -> None:
        """Classify the reference images, if they are others than the images, and choose on them what is to be chosen.

        The threshold of abstention; where at least 20 of their labels are known, the temperature of the draws; where
        there is a profile and at least 20 images, what is unusual.

        Args:
            network: a class-conditional network.
            images: with the reference.
            preprocessing: from an item to what the network is given.
            device: where to run.
            batch_size: images at once.
            progress: show a progress bar for each batch.
        """
        if not images.reference:
            return
        dataset = Dataset(images.reference, preprocessing)
        found = classify_by_diffusion(
            network, self.inferer, dataset, device, self.seed, batch_size, progress, self.profile
        )
        chosen_on = f"{images.reference_name} ({len(images.reference)} images)"
        self.abstention = AbstentionRule.choose(found.result, self.inferer.rule, self.coverage, chosen_on)
        self.calibration = DrawCalibration.fit(found.result, found.labels, chosen_on)
        self.unusual = None if found.profiles is None else UnusualRule.fit(found.profiles, chosen_on)
        if self.calibration is None:
            print(
                f"not calibrated: fewer than {_FEWEST} labels of {chosen_on} tell how right the draws are", flush=True
            )
        if self.unusual is None and self.profile is not None:
            print(f"no image is called unusual: fewer than {_FEWEST} images are {chosen_on}", flush=True)

    def __call__(self, predictions: DiffusionPredictions) -> None:
        """Write everything.

        Args:
            predictions: of the images.
        """
        result, rule = predictions.result, self.inferer.rule
        abstention = self.abstention or AbstentionRule.choose(result, rule, self.coverage, "the images themselves")
        abstained = abstention.abstains(result)
        names = self.description.class_names
        write_diffusion_csv(
            predictions,
            abstained,
            names,
            self.output_dir / "diffusion_predictions.csv",
            decision=self.description.decision,
            calibration=self.calibration,
            unusual=self.unusual,
        )
        self.summary = {
            "images": len(predictions.names),
            "settings": _settings(self.inferer),
            **_costs(result),
            "abstention": {**asdict(abstention), "abstained": float(abstained.mean())},
        }
        if self.calibration is not None:
            self.summary["calibrated"] = asdict(self.calibration)
        if self.unusual is not None and predictions.profiles is not None:
            self.summary["unusual"] = _unusual(self.unusual, predictions.profiles)
        if (predictions.labels >= 0).any():
            self._evaluate(predictions, abstained)
        atomic_write_text(self.output_dir / "summary.json", json.dumps(self.summary, indent=4) + "\n")
        rules = [str(rule) for rule in (abstention, self.calibration, self.unusual) if rule is not None]
        print("", *rules, self._table(), sep="\n", flush=True)

    def _evaluate(self, predictions: DiffusionPredictions, abstained: np.ndarray) -> None:
        """Figures and pictures of images with labels."""
        result, labels, patients = predictions.result, predictions.labels, predictions.groups
        options = resampling(patients, self.bootstrap, self.seed)
        questions = _Questions.of(result.probabilities, labels, patients)
        answers = np.asarray(result.prediction)
        selective = questions.report(doubt(result, self.inferer.rule), answers, options["bootstrap"], self.seed)
        curves = {_CLASSIFIER: selective.curve}
        answered = questions.known & ~abstained.ravel()
        right = answers.ravel() == questions.labels
        self.summary["labelled"] = int(questions.known.sum())
        self.summary["accuracy_of_answered"] = float(right[answered].mean()) if answered.any() else None
        self.summary["selective"] = selective.as_dict()
        self.summary |= self._figures(np.asarray(result.probabilities), labels, options)
        if notes := notes_on_patients(patients):
            self.summary["notes"] = notes
        if self.calibration is not None:
            calibrated = np.asarray(result.calibrated(self.calibration.temperature))
            self.summary["calibrated"] |= self._figures(calibrated, labels, options)
        points = self._accuracy_by_calls(result, questions, options["bootstrap"])
        if result.head_probabilities is not None:
            head = _Questions.of(result.head_probabilities, labels, patients)
            probabilities = np.asarray(result.head_probabilities)
            said = self.description.decision.classes(probabilities, result.multi_label).ravel()
            doubts = 1 - head.probabilities[np.arange(len(said)), said]
            report = head.report(doubts, said, options["bootstrap"], self.seed)
            curves["head"] = report.curve
            figures = self._figures(probabilities, labels, options)
            self.summary["head"] = {"selective": report.as_dict(), **figures}
            points["head"] = {1.0: report.accuracy[0]}
        save_figure(risk_coverage_figure(curves), self.output_dir / "risk_coverage.png")
        if self.inferer.head != "prior":
            save_figure(accuracy_against_calls_figure(points), self.output_dir / "accuracy_against_calls.png")

    def _figures(self, probabilities: np.ndarray, labels: np.ndarray, options: Mapping[str, Any]) -> dict[str, Any]:
        """What depends on the probabilities themselves."""
        report = classification_report(
            probabilities,
            labels,
            class_names=self.description.class_names,
            multi_label=self.description.multi_label,
            **options,
        )
        return {name: getattr(report, name).as_dict() for name in ("auc", "ece", "brier")}

    def _accuracy_by_calls(
        self, result: DiffusionClassifierResult, questions: _Questions, bootstrap: int
    ) -> dict[str, dict[float, Interval]]:
        """Accuracy of the first draws by the mean number of network calls that they need."""
        counts = [count for count in _FIRST_DRAWS if count < self.inferer.num_draws] + [self.inferer.num_draws]
        rule = self.inferer.rule
        answers = {str(count): np.asarray(answers_of_first_draws(result, count, rule)) for count in counts}
        accuracies = questions.accuracies(answers, bootstrap, self.seed)
        asked = float(result.head_probabilities is not None)
        evaluated = (~result.draw_errors.isnan()).flatten(1, -2).sum(dim=1).cumsum(dim=1).double().mean(dim=0) + asked
        points = {float(evaluated[count - 1]): accuracies[str(count)] for count in counts}
        self.summary["accuracy_of_first_draws"] = [
            {"draws": count, "network_calls": float(evaluated[count - 1]), **accuracies[str(count)].as_dict()}
            for count in counts
        ]
        return {_CLASSIFIER: {calls: interval for calls, interval in points.items() if calls > 0}}

    def _table(self) -> str:
        rows = {"images": self.summary["images"], "network calls per image": self.summary["network_calls"]["mean"]}
        rows["seconds per image"] = self.summary["seconds_per_image"]
        rows["share withheld"] = self.summary["abstention"]["abstained"]
        if "unusual" in self.summary:
            rows["share unusual"] = self.summary["unusual"]["flagged"]
        if "selective" in self.summary:
            rows["accuracy"] = self.summary["selective"]["accuracy_at_coverage"][0]["value"]
            rows["accuracy of what is answered"] = self.summary["accuracy_of_answered"]
            rows |= {name: self.summary[name]["value"] for name in ("auc", "ece", "brier")}
            if "calibrated" in self.summary:
                rows |= {f"{name}, calibrated": self.summary["calibrated"][name]["value"] for name in ("ece", "brier")}
            rows["aurc"] = self.summary["selective"]["aurc"]["value"]
        return format_table([{"figure": name, "value": value} for name, value in rows.items()])


def _settings(inferer: DiffusionClassifierInferer) -> dict[str, Any]:
    names = ("num_draws", "draws", "rule", "timesteps", "error_rate", "min_draws", "stages", "head", "trust")
    return {name: getattr(inferer, name) for name in (*names, "temperature", "head_temperature")}


def _unusual(rule: UnusualRule, profiles: torch.Tensor) -> dict[str, Any]:
    return {
        "draws": profiles.shape[1],
        "share": rule.share,
        "threshold": rule.threshold,
        "chosen_on": rule.chosen_on,
        "flagged": float((rule.scores(profiles) > rule.threshold).mean()),
    }


def _costs(result: DiffusionClassifierResult) -> dict[str, Any]:
    calls = result.network_calls.double()
    return {
        "network_calls": {"mean": float(calls.mean()), "smallest": float(calls.min()), "largest": float(calls.max())},
        "decided_early": float(result.decided.double().mean()),
        "seconds": result.seconds,
        "seconds_per_image": result.seconds / len(calls),
    }
