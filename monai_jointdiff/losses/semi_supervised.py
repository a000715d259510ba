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

"""The joint objective with a term for images without a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .joint_diffusion import JointDiffusionLoss

__all__ = ["SemiSupervisedLoss", "UnlabelledSums", "UnlabelledTerm"]


PSEUDO = ("pseudo_label", "pseudo_weight")


@dataclass(frozen=True)
class UnlabelledSums:
    """What a term for unlabelled images sums over the images of one process; the loss divides, over all processes.

    Args:
        loss: scalar, sum of the losses; it depends on all logits that are to get a gradient, even without an image.
        count: scalar, number of what was summed over.
        reported: further sums by name, without gradients, whose means are logged.
    """

    loss: Tensor
    count: Tensor
    reported: dict[str, Tensor]


class UnlabelledTerm(Protocol):
    """What is asked of an algorithm for images without a label: to write one, write such a class.

    Args:
        views: keys, in the batch, of the views of an unlabelled image that the term compares. With a teacher the logits
            of the first of them are the teacher's, without gradients.
    """

    @property
    def views(self) -> tuple[str, ...]:
        """Keys of the views, in the order of the logits."""
        ...

    def __call__(self, logits: Sequence[Tensor]) -> UnlabelledSums:
        """Compare the views.

        A term that learns from pseudo-labels (:class:`PseudoLabelLoss`) takes them as keywords, too: `pseudo_label`
        (U, K) and `pseudo_weight` (U,), which it is given where the targets hold them.

        Args:
            logits: for each view (U, K), of the same U images; U may be 0.

        Returns:
            sums over the images.
        """
        ...


class SemiSupervisedLoss(JointDiffusionLoss):
    r"""Objective of a network that predicts noise, classifies, and learns to classify from unlabelled images, too.

    Kaleta et al., "Mediffusion", arXiv 2411.09434, with alpha for their lambda:

    .. math::
        L = L_{diffusion} + \alpha\,(L_{supervised} + \lambda_u L_{unlabelled})

    The first two terms are those of :class:`JointDiffusionLoss`. The third is a mean over what a term sums on **all**
    processes; a process without an unlabelled image contributes gradients of zero.

    Args:
        term: the algorithm for unlabelled images, such as :class:`FixMatchLoss`; None: there is no third term, and the
            unlabelled images serve the denoising only ("joint").
        unlabelled_weight: lambda_u >= 0; :class:`~monai_jointdiff.handlers.UnlabelledWeightSchedule` changes it.
        options: those of :class:`JointDiffusionLoss`.

    Attributes:
        terms: also `unlabelled` (without weights, as `classification`) and what the term reports.

    Raises:
        ValueError: for a negative or undefined weight; when called, for targets that do not fit.

    Example:
        >>> from monai_jointdiff.losses import FixMatchLoss
        >>> loss = SemiSupervisedLoss(FixMatchLoss(threshold=0.9), classification_weight=1.0)
        >>> logits = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 0.0]])  # labelled; weak and strong view of another
        >>> targets = {"label": torch.tensor([1, -1, -1]), "view": torch.tensor([-1, 0, 1])}
        >>> round(float(loss(logits, targets)), 4)  # log 2 + log 2
        1.3863
    """

    def __init__(self, term: UnlabelledTerm | None = None, unlabelled_weight: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        if not unlabelled_weight >= 0:
            raise ValueError(f"SemiSupervisedLoss: unlabelled_weight must be >= 0, got {unlabelled_weight}.")
        self.term = term
        self.unlabelled_weight = unlabelled_weight

    def forward(self, output: Any, targets: Mapping[str, Tensor]) -> Tensor:
        """Evaluate the objective and keep its terms.

        Args:
            output: as of :class:`JointDiffusionLoss`.
            targets: as of :class:`JointDiffusionLoss`, the label -1 in rows of unlabelled images; and `view`: (M,)
                int64, of each row of the logits the number of the view among the term's, -1 for labelled images; and,
                with a teacher, `teacher_logits`: (U, K), of the first view; with pseudo-labels, `pseudo_label` (U, K)
                and `pseudo_weight` (U,). Without `view`, as in validation, it is the objective of
                :class:`JointDiffusionLoss`.

        Returns:
            scalar, with a gradient for every parameter the output depends on.

        Raises:
            ValueError: for targets that do not fit the output or the term.
        """
        total = super().forward(output, targets)
        logits = output if isinstance(output, Tensor) else output[0]
        if self.term is None or "view" not in targets or logits is None:
            return total
        pseudo: dict[str, Any] = {name: targets[name] for name in PSEUDO if name in targets}
        sums = self.term(self._views(logits, targets), **pseudo)
        count, processes = sums.count.detach().clone().to(logits), 1
        if logits.requires_grad and dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            processes = dist.get_world_size()
        share = processes / torch.where(count > 0, count, torch.ones_like(count))
        unlabelled = share * sums.loss
        total = total + self.classification_weight * self.unlabelled_weight * unlabelled
        reported = {name: share * value for name, value in sums.reported.items()}
        new = {"unlabelled": unlabelled, **reported, "total": total}
        self.terms = {**self.terms, **{name: value.detach() for name, value in new.items()}}
        return total

    def _views(self, logits: Tensor, targets: Mapping[str, Tensor]) -> list[Tensor]:
        """The logits (U, K) of each view, with the gradients they have."""
        assert self.term is not None
        view, taught = targets["view"], targets.get("teacher_logits")
        if view.shape != logits.shape[:1]:
            raise ValueError(
                f"SemiSupervisedLoss: logits must be (M, K) and view (M,), got {tuple(logits.shape)} and "
                f"{tuple(view.shape)}."
            )
        number = len(self.term.views)
        found = (
            [logits[view == n] for n in range(number)]
            if taught is None
            else [taught.detach(), *(logits[view == n] for n in range(1, number))]
        )
        sizes = [len(one) for one in found]
        if len(set(sizes)) > 1 or sum(sizes) != int((view >= 0).sum()) + (0 if taught is None else len(taught)):
            raise ValueError(
                f"SemiSupervisedLoss: {type(self.term).__name__} compares the views {', '.join(self.term.views)}, "
                f"which must be there of the same images; the targets hold {', '.join(map(str, sizes))} of them, and "
                f"{int((view >= 0).sum())} rows of views."
            )
        return found
