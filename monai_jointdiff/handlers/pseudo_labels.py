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

"""Pseudo-labels from time to time: the average of the network and a labeller look at the unlabelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from torch import Tensor, nn

from monai_jointdiff.data import (
    DrawDataset,
    LabelledFeatures,
    PseudoLabeller,
    PseudoLabels,
    PseudoLabelTable,
    UnlabelledFeatures,
)
from monai_jointdiff.inferers import JointDiffusionInferer
from monai_jointdiff.networks import HeadFeatures

from .utils import is_writing_process

__all__ = ["PseudoLabelRound", "PseudoLabelRounds"]


@dataclass(frozen=True)
class PseudoLabelRound:
    """What a round came to; none of it knows the labels that are hidden.

    Args:
        epoch: after which it was.
        new: images that got a pseudo-label.
        total: images with a pseudo-label.
        waiting: images with neither a label nor a pseudo-label.
        anchors: images whose label or pseudo-label later rounds build on.
        agreement: share of the new pseudo-labels (entries, with several labels) that decide as the network alone
            does; 1 says that the neighbours changed nothing. None without a new one.
        class_means: (K,) mean of the new pseudo-labels: whether a class is left out. Empty without a new one.
    """

    epoch: int
    new: int
    total: int
    waiting: int
    anchors: int
    agreement: float | None
    class_means: tuple[float, ...]

    def __str__(self) -> str:
        text = (
            f"epoch {self.epoch}: {self.new} new pseudo-labels, {self.total} in all, {self.waiting} images without, "
            f"{self.anchors} anchors"
        )
        if self.agreement is None:
            return text
        means = ", ".join(f"{mean:.2f}" for mean in self.class_means)
        return f"{text}; {self.agreement:.0%} of the new ones decide as the network does, class means {means}"


class PseudoLabelRounds:
    """Handler of a trainer: after every so many epochs a labeller is asked for labels of unlabelled images.

    The average of the network sees the undisturbed images of the anchors, and of those with neither a label nor a
    pseudo-label, in evaluation mode: features of the last hidden layer of the head, and probabilities. What the
    labeller says of them enters the table, from which :class:`~monai_jointdiff.engines.SemiSupervisedPrepareBatch`
    gives each batch its pseudo-labels. After the last epoch there is no round.

    A round ends before the checkpoint of its epoch is written: with the table among the checkpoint's `further` parts a
    resumed run goes on exactly. In several processes each computes the round, and the table of the first one counts.

    Args:
        labeller: the algorithm, such as :class:`~monai_jointdiff.data.AntiCurriculumPseudoLabeller`.
        table: pseudo-labels of the images, changed in place.
        dataset: the training images.
        network: the average of the network (`ema_model`).
        inferer: asks it, also where it works on latents.
        start: epochs before the first round, >= 1: an untrained network knows nothing.
        every: epochs between rounds, >= 1.
        batch_size: images per batch.
        summary_writer: a TensorBoard `SummaryWriter`; None: the log only.

    Attributes:
        last: what the last round came to, None before the first.

    Raises:
        ValueError: for a number out of range; at the start of a training without a round.
    """

    def __init__(
        self,
        labeller: PseudoLabeller,
        table: PseudoLabelTable,
        dataset: DrawDataset,
        network: nn.Module,
        inferer: JointDiffusionInferer,
        start: int = 1,
        every: int = 1,
        batch_size: int = 128,
        summary_writer: Any = None,
    ) -> None:
        for name, value in (("start", start), ("every", every), ("batch_size", batch_size)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be a whole number >= 1, got {value!r}.")
        self.labeller = labeller
        self.table = table
        self.dataset = dataset
        self.network = network
        self.inferer = inferer
        self.start = start
        self.every = every
        self.batch_size = batch_size
        self.summary_writer = summary_writer
        self.last: PseudoLabelRound | None = None

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.STARTED, self._check)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def is_round(self, epoch: int) -> bool:
        """Whether there is a round after an epoch, counted from 1."""
        return epoch >= self.start and (epoch - self.start) % self.every == 0

    def __call__(self, engine: Engine) -> None:
        """Make the round of the finished epoch, if there is one and an image waits for a pseudo-label."""
        epoch, waiting = engine.state.epoch, self.table.waiting()
        if not self.is_round(epoch) or epoch == engine.state.max_epochs or not len(waiting):
            return
        indices, labels = self.table.anchor_labels()
        seen = self._look(waiting)
        probabilities = seen.logits.sigmoid() if self.table.multi_label else seen.logits.softmax(dim=1)
        unlabelled = UnlabelledFeatures(seen.features.numpy(), probabilities.numpy())
        anchors = LabelledFeatures(self._look(indices).features.numpy(), labels, ~self.table.labelled[indices])
        found = self.labeller(anchors, unlabelled)
        self.table.add(waiting, found)
        self._share()
        self.last = self._summary(epoch, found, unlabelled.probabilities)
        if is_writing_process():
            engine.logger.info(f"{type(self).__name__}: {self.last}")
        if self.summary_writer is not None:
            for name in ("new", "total", "anchors", "agreement"):
                value = getattr(self.last, name)
                if value is not None:
                    self.summary_writer.add_scalar(f"pseudo_labels/{name}", value, epoch)

    def _check(self, engine: Engine) -> None:
        epochs = engine.state.max_epochs
        if epochs is not None and self.start >= epochs:
            raise ValueError(
                f"{type(self).__name__}: start is {self.start}, and the training ends after epoch {epochs}: there "
                "would be no round that a step learns from. Start earlier, or train for more epochs."
            )

    def _look(self, indices: Sequence[int] | np.ndarray) -> HeadFeatures:
        """Features (N, F) and logits (N, K) of undisturbed images, float64 on the CPU."""
        device = next(self.network.parameters()).device
        parts: list[tuple[Tensor, Tensor]] = []
        for first in range(0, len(indices), self.batch_size):
            chosen = indices[first : first + self.batch_size]
            images = torch.stack([torch.as_tensor(self.dataset.undisturbed(int(n))["image"]) for n in chosen])
            parts.append(self.inferer.features(images.to(device), self.network))
        features, logits = (torch.cat(tensors).cpu().double() for tensors in zip(*parts, strict=True))
        return HeadFeatures(features, logits)

    def _share(self) -> None:
        """Give all processes the table of the first: on an accelerator two may differ in the last bits of a feature."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        device = next(self.network.parameters()).device if dist.get_backend() == "nccl" else torch.device("cpu")
        for tensor in self.table.state_dict().values():
            message = tensor.to(device, torch.float32)
            dist.broadcast(message, src=0)
            tensor.copy_(message)

    def _summary(self, epoch: int, found: PseudoLabels, probabilities: np.ndarray) -> PseudoLabelRound:
        given = found.weights > 0
        new, network = found.probabilities[given], probabilities[given]
        if self.table.multi_label:
            agreeing = (new >= 0.5) == (network >= 0.5)
        else:
            agreeing = new.argmax(axis=1) == network.argmax(axis=1)
        return PseudoLabelRound(
            epoch,
            new=len(new),
            total=int((self.table.weights > 0).sum()),
            waiting=len(self.table.waiting()),
            anchors=len(self.table.anchor_labels()[0]),
            agreement=float(agreeing.mean()) if len(new) else None,
            class_means=tuple(float(mean) for mean in new.mean(axis=0)) if len(new) else (),
        )
