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

"""Training with few labels: which views the head sees, whose answers teach, and with which settings papers did it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from monai.transforms import Compose
from torch import Tensor, nn

from monai_jointdiff.data import PseudoLabelTable, write_label_list
from monai_jointdiff.inferers import JointDiffusionInferer
from monai_jointdiff.losses import FixMatchLoss, PiModelLoss, PseudoLabelLoss, UnlabelledTerm
from monai_jointdiff.schedulers import GridScheduler
from monai_jointdiff.transforms import ClassificationAugmentation, StrongAugmentation

from .prepare_batch import JointPrepareBatch, PreparedBatch
from .serving import start_model

__all__ = [
    "PRESETS",
    "SemiSupervisedPrepareBatch",
    "SemiSupervisedSettings",
    "check_task",
    "make_unlabelled_term",
    "parameter_groups",
    "semi_supervised_settings",
    "start_labelled_model",
    "task_of",
    "view_transforms",
]

WITH_DENOISING = ("fixmatch", "pi_model", "joint", "acpl")
WITHOUT_DENOISING = ("fixmatch_alone", "supervised")
ALGORITHMS = (*WITH_DENOISING, *WITHOUT_DENOISING)
NOISY = ("all", "unlabelled")


class SemiSupervisedPrepareBatch(JointPrepareBatch):
    """Turns a batch of labelled and unlabelled images into the arguments of a training step with an unlabelled term.

    The head sees, one after the other, the weak views of the labelled images and, of the unlabelled ones, every view
    that the term compares. The targets say which is which: `label` is -1 in all rows of unlabelled images, `view` the
    number of the view, -1 for labelled images. With a teacher the first view goes to the teacher instead, in evaluation
    mode and without gradients, and its answers are the targets' `teacher_logits`; that saves the gradient of this view
    and a part of the pass. With pseudo-labels the targets have `pseudo_label` (U, K) and `pseudo_weight` (U,) of the
    unlabelled images, looked up by draw. Fill the batches with :class:`~monai_jointdiff.data.TwoStreamOrder`.

    The head `standardized` standardizes its features over all these rows together: batch normalization in all but name.
    Strongly disturbed views are then part of the statistics with which every other row is standardized, of those that
    give the pseudo-labels, and, as running averages, of those used on undisturbed images in evaluation. Their features
    lie elsewhere: in an untrained network and of 128 chest x-rays the maxima are off by two standard deviations of the
    weak views, the means by 0.8; standardized by the mixture, undisturbed images have a deviation of 0.65. FixMatch was
    published with batch normalization over all rows, too, and one does not separate them here: with statistics of its
    own for each kind of row, views would agree because they are standardized so. But a teacher gives pseudo-labels that
    do not depend on the other rows of the batch, and the heads `mediffusion`, `jointdiffusion` and `linear` have no
    statistics of a batch at all.

    Args:
        scheduler: noise process.
        seed: of the run.
        views: keys of the views of unlabelled images (:class:`~monai_jointdiff.losses.UnlabelledTerm`); none for the
            algorithm "joint" and for training on labels alone.
        teacher: a network whose answers to the first view are the targets, for example the `ema_model` of
            :class:`~monai_jointdiff.handlers.ExponentialMovingAverage`; None: the network in training teaches itself.
        inferer: asks the teacher about images, also where the network works on latents; None: without mixed precision.
        noisy: which images are denoised: `all`, or `unlabelled` as in Mediffusion. Where 50 of 5,000 images are
            labelled and fill a quarter of each batch, `all` denoises each of them thirty times as often as another.
        pseudo_labels: those given so far (:class:`~monai_jointdiff.handlers.PseudoLabelRounds` fills the table); None:
            the term needs none.
        options: further ones of :class:`JointPrepareBatch`, such as `weighting`; `task="classify"` trains without
            denoising, on the same views, in one process: the decoder then has no gradient, and
            DistributedDataParallel wants one of every weight.

    Raises:
        ValueError: for an unknown choice of `noisy`, a teacher or pseudo-labels without a view, both of them,
            `unlabelled` with a class-conditional network (which would never be told a class), the task `denoise`, or
            `classify` in several processes; when called, for a batch without the images that are needed.
    """

    def __init__(
        self,
        scheduler: GridScheduler,
        seed: int,
        views: Sequence[str] = (),
        teacher: nn.Module | None = None,
        inferer: JointDiffusionInferer | None = None,
        noisy: str = "all",
        pseudo_labels: PseudoLabelTable | None = None,
        **options: Any,
    ) -> None:
        super().__init__(scheduler, seed, **options)
        name = type(self).__name__
        if noisy not in NOISY:
            raise ValueError(f"{name}: noisy must be one of {NOISY}, got {noisy!r}.")
        if noisy == "unlabelled" and self.class_conditional:
            raise ValueError(f"{name}: a class-conditional network learns from labelled images; noisy must be 'all'.")
        if self.task == "denoise":
            raise ValueError(f"{name}: without a head labels are of no use; use JointPrepareBatch for 'denoise'.")
        if self.task == "classify" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"{name}: without denoising (algorithms {', '.join(WITHOUT_DENOISING)}) the decoder has no gradient, "
                f"and DistributedDataParallel wants one of every weight; got {dist.get_world_size()} processes, train "
                "in one."
            )
        if teacher is not None and not views:
            raise ValueError(f"{name}: a teacher needs a view to answer to, views is empty.")
        if pseudo_labels is not None and (teacher is not None or not views):
            raise ValueError(
                f"{name}: pseudo-labels need a view that learns them, and no teacher beside them; got the views "
                f"{tuple(views)} and {'no' if teacher is None else 'a'} teacher."
            )
        self.views = tuple(views)
        self.teacher = teacher
        space = self.space
        default = JointDiffusionInferer(scheduler, autoencoder=space.autoencoder, scale_factor=space.scale_factor)
        self.inferer = default if inferer is None else inferer
        self.noisy = noisy
        self.pseudo_labels = pseudo_labels

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> PreparedBatch:
        """Prepare one batch.

        Args:
            batchdata: as of :class:`JointPrepareBatch`, and the views (N, C, *spatial) of all images.
            device: of the results.
            non_blocking: as for `Tensor.to`.
            kwargs: further arguments of `Tensor.to` for the images, for example `dtype`.

        Returns:
            arguments of the inferer and of the loss.

        Raises:
            ValueError: if the batch lacks a key or images, or labels do not fit a class-conditional network.
        """
        label = self._tensor(batchdata, "label")
        known = label >= 0
        labelled = known if known.ndim == 1 else known.any(dim=1)  # (N,)
        unlabelled = ~labelled

        def move(key: str, rows: Tensor) -> Tensor:
            return self._tensor(batchdata, key)[rows].to(device=device, non_blocking=non_blocking, **kwargs)

        rows = [move(self.clean_key, labelled)]
        taught: dict[str, Tensor] = {}
        first = 0 if self.teacher is None else 1
        if self.teacher is not None:
            with torch.no_grad():
                taught["teacher_logits"] = self.inferer.classify(move(self.views[0], unlabelled), self.teacher)
        if self.pseudo_labels is not None:
            found = self.pseudo_labels.of_draws(self._tensor(batchdata, "draw")[unlabelled])
            for key, tensor in zip(("pseudo_label", "pseudo_weight"), found, strict=True):
                taught[key] = tensor.to(device=device, non_blocking=non_blocking)
        rows += [move(view, unlabelled) for view in self.views[first:]]
        clean = torch.cat(rows)
        if not len(clean):
            raise ValueError(
                f"{type(self).__name__}: the head has nothing to see in a batch of {len(labelled)} images without a "
                "label; TwoStreamOrder gives every batch labelled and unlabelled images."
            )
        clean = self._encode(clean)
        view = torch.tensor([-1] * len(rows[0]) + [n for n, one in enumerate(rows[1:], first) for _ in one])
        hidden = -torch.ones(len(clean) - len(rows[0]), *label.shape[1:]).to(label)
        targets = {
            "label": torch.cat([label[labelled], hidden]).to(device=device, non_blocking=non_blocking),
            "view": view.to(device=device, non_blocking=non_blocking),
            **taught,
        }
        if self.task == "classify":
            return PreparedBatch(clean, targets, (), {})
        prepared = self._noisy_part(self._denoised(batchdata, unlabelled), device, non_blocking, **kwargs)
        keywords = {**prepared.kwargs, "clean": clean}
        return PreparedBatch(prepared.inputs, {**prepared.targets, **targets}, (), keywords)

    def _denoised(self, batchdata: Mapping[str, Any], unlabelled: Tensor) -> dict[str, Any]:
        """The rows of the images that are denoised."""
        if self.noisy == "unlabelled" and not bool(unlabelled.any()):
            raise ValueError(f"{type(self).__name__}: only unlabelled images are denoised, and the batch has none.")
        rows = unlabelled if self.noisy == "unlabelled" else torch.ones_like(unlabelled)
        return {key: self._tensor(batchdata, key)[rows] for key in ("image", "label", "draw")}


def task_of(algorithm: str) -> str:
    """Whether an algorithm denoises: the `task` of :class:`SemiSupervisedPrepareBatch`.

    Args:
        algorithm: `fixmatch`, `pi_model`, `joint` and `acpl` denoise; `fixmatch_alone` and `supervised` do not.

    Returns:
        `joint` or `classify`.

    Raises:
        ValueError: for an unknown algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"task_of: algorithm must be one of {ALGORITHMS}, got {algorithm!r}.")
    return "joint" if algorithm in WITH_DENOISING else "classify"


def check_task(task: str, algorithm: str) -> None:
    """Refuse a task that contradicts the algorithm: a control would denoise, and still be called a control.

    Args:
        task: of the training.
        algorithm: as of :func:`task_of`.

    Raises:
        ValueError: when the algorithm has another task.
    """
    if task != task_of(algorithm):
        raise ValueError(
            f"check_task: --algorithm {algorithm} has the task {task_of(algorithm)!r}, got --task {task}; with few "
            "labels the algorithm says what is trained."
        )


def make_unlabelled_term(algorithm: str, multi_label: bool = False, threshold: float = 0.95) -> UnlabelledTerm | None:
    """The term of an algorithm by name.

    Args:
        algorithm: `fixmatch`, `fixmatch_alone`, `pi_model` or `acpl`; `joint`: the denoising alone makes use of
            unlabelled images; `supervised`: nothing does.
        multi_label: an image may have several labels.
        threshold: of FixMatch.

    Returns:
        the term; None for `joint` and `supervised`.

    Raises:
        ValueError: for an unknown algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"make_unlabelled_term: algorithm must be one of {ALGORITHMS}, got {algorithm!r}.")
    if algorithm in ("joint", "supervised"):
        return None
    if algorithm == "acpl":
        return PseudoLabelLoss(multi_label)
    return PiModelLoss(multi_label) if algorithm == "pi_model" else FixMatchLoss(threshold, multi_label)


def start_labelled_model(labelled: Sequence[str], output_dir: str | Path, **model: Any) -> None:
    """Make room for the first weights of a training with few labels, and say of which labels they are.

    Not before there are weights: a run that is refused or fails leaves the list of the model that stays.

    Args:
        labelled: names of the training images that keep their label.
        output_dir: folder of `labelled.txt`.
        model: arguments of :func:`~monai_jointdiff.engines.start_model`.
    """
    start_model(**model)
    write_label_list(Path(output_dir) / "labelled.txt", labelled)


def view_transforms(
    weak: ClassificationAugmentation, views: Sequence[str] = (), num_operations: int = 2, magnitude: float = 10.0
) -> Compose:
    """The random transforms that make the weak view for the labelled images, and the views of a term.

    The strong view is made of the weak one (Sohn et al., "FixMatch", arXiv 2001.07685, section 2.3).

    Args:
        weak: makes `image_cls`, the weak view.
        views: keys of the views of a term; those other than `image_cls` and `image_strong` are further weak views.
        num_operations: of :class:`~monai_jointdiff.transforms.StrongAugmentation`.
        magnitude: of :class:`~monai_jointdiff.transforms.StrongAugmentation`.

    Returns:
        transforms of an item with `image`.
    """
    dims = weak.spatial_dims
    further = [
        StrongAugmentation(dims, num_operations, magnitude, key=weak.new_key, new_key=view)
        if view == "image_strong"
        else ClassificationAugmentation(dims, weak.strength, weak.flip, new_key=view)
        for view in views
        if view != weak.new_key
    ]
    return Compose([weak, *further])


@dataclass(frozen=True)
class SemiSupervisedSettings:
    """Settings of a semi-supervised training.

    Args:
        algorithm: `fixmatch`, `pi_model`, `joint`, `acpl`, `fixmatch_alone` or `supervised`.
        learning_rate: of the network.
        head_learning_rate: of the head.
        classification_weight: alpha.
        every: the classification is trained in every so many iterations.
        start: iterations before the first of them.
        unlabelled_per_labelled: mu.
        head: variant of the head.
        head_dropout: dropout probability of the head; None for that of the variant.
        batch_size: images per iteration, of both kinds.
    """

    algorithm: str
    learning_rate: float
    head_learning_rate: float
    classification_weight: float
    every: int
    start: int
    unlabelled_per_labelled: int
    head: str
    head_dropout: float | None
    batch_size: int


PRESETS: Mapping[str, SemiSupervisedSettings] = {
    "default": SemiSupervisedSettings("fixmatch", 1e-3, 1e-3, 0.005, 1, 0, 3, "standardized", None, 32),
    "mediffusion_nih": SemiSupervisedSettings("joint", 5e-5, 1e-5, 5e-5, 4, 5000, 2, "mediffusion", 0.3, 96),
    "mediffusion_isic": SemiSupervisedSettings("fixmatch", 5e-5, 5e-5, 0.001, 1, 0, 7, "mediffusion", 0.3, 32),
}
"""Settings by name: ours, and those of the code published with Kaleta et al., "Mediffusion", arXiv 2411.09434.

The published runs train a network of 258 million weights on the latents of an autoencoder: a setting carries over as
it is, not its success. `mediffusion_nih` is their best run on chest x-rays; its name says a batch of 128, their
configuration 64 unlabelled and 32 labelled images, which is what stands here. `mediffusion_isic` is the one on skin
lesions, 4 labelled and 28 unlabelled images, whose gradients the authors add up over 4 iterations."""


def semi_supervised_settings(preset: str = "default") -> SemiSupervisedSettings:
    """Settings by name.

    Args:
        preset: a key of :data:`PRESETS`.

    Returns:
        the settings.

    Raises:
        ValueError: for an unknown name.
    """
    if preset not in PRESETS:
        raise ValueError(f"semi_supervised_settings: preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    return PRESETS[preset]


def parameter_groups(network: nn.Module, head_factor: float = 1.0) -> list[dict[str, Any]]:
    """Parameters for an optimizer, the head's apart, for a learning rate of its own.

    The factor travels with its group (as `lr_factor`): :class:`~monai_jointdiff.handlers.GroupLearningRateSchedule`
    multiplies the common rate with it.

    Args:
        network: a :class:`~monai_jointdiff.networks.JointDiffusionUNet`.
        head_factor: learning rate of the head over that of the rest, > 0.

    Returns:
        two groups, without the parameters that do not learn; a group without parameters is left out.

    Raises:
        ValueError: for a factor that is not positive.
    """
    if not head_factor > 0:
        raise ValueError(f"parameter_groups: head_factor must be > 0, got {head_factor}.")
    learning = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    head = [parameter for name, parameter in learning if name.startswith("classifier.")]
    rest = [parameter for name, parameter in learning if not name.startswith("classifier.")]
    groups = [{"params": rest, "lr_factor": 1.0}, {"params": head, "lr_factor": float(head_factor)}]
    return [group for group in groups if group["params"]]
