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

"""The joint objective of noise prediction and classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.loss import _Loss

__all__ = ["JointDiffusionLoss"]


class JointDiffusionLoss(_Loss):
    r"""Objective of a network that predicts noise and classifies.

    Deja et al., "Learning Data Representations with Joint Diffusion Models", arXiv 2301.13622; Kaleta et al.,
    "Mediffusion", arXiv 2411.09434:

    .. math::
        L = \frac{1}{N}\sum_n w(t_n)\,\overline{(\hat{y}_n - y_n)^2}
            + \alpha\,\frac{1}{|\mathcal{L}|}\sum_{n\in\mathcal{L}} \mathrm{CE}(\mathrm{logits}_n, c_n)

    The first sum runs over all images (the bar is the mean over channels and pixels), the second over the labelled
    ones, :math:`\mathcal{L}`, of **all** processes: a process whose batch holds no label still contributes, with
    gradients of zero, so that the parameters of the head always have one.

    Args:
        classification_weight: alpha >= 0. An attribute that may be changed between steps
            (:class:`~monai_jointdiff.handlers.WeightSchedule`). The gradient of the cross-entropy on the encoder is
            about a hundred times that of the diffusion term: a large alpha raises the denoising error.
        multi_label: True: K independent findings, binary cross-entropy averaged over the known entries.
        class_weights: K positive numbers. Multi-class: weight of each class in the sum, which is divided by the number
            of labelled images, not by their weights as in `torch.nn.functional.cross_entropy`: batch by batch that
            would favor frequent classes. Multi-label: weight of the positive entries of each finding
            (`pos_weight` of `binary_cross_entropy_with_logits`).
        label_smoothing: in [0, 1): multi-class as in torch; multi-label: y becomes y (1 - s) + s / 2.

    Attributes:
        terms: the terms of the last call by name, detached scalars: `diffusion` and `classification` (both without
            alpha; the classification term is this process's share, whose mean over processes is the global mean) and
            `total`. A term that the output lacks is not in it.

    Example:
        >>> loss = JointDiffusionLoss(classification_weight=0.1)
        >>> output = (torch.zeros(2, 3), torch.zeros(2, 1, 8, 8))
        >>> targets = {"label": torch.tensor([2, -1]), "target": torch.ones(2, 1, 8, 8), "weight": torch.ones(2)}
        >>> round(float(loss(output, targets)), 4)  # 1 + 0.1 * log(3)
        1.1099
    """

    class_weights: Tensor | None

    def __init__(
        self,
        classification_weight: float = 0.005,
        multi_label: bool = False,
        class_weights: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if not classification_weight >= 0:
            raise ValueError(f"JointDiffusionLoss: classification_weight must be >= 0, got {classification_weight}.")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"JointDiffusionLoss: label_smoothing must be in [0, 1), got {label_smoothing}.")
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        if weights is not None and not (weights.ndim == 1 and bool((weights > 0).all())):
            raise ValueError(f"JointDiffusionLoss: class_weights must be K positive numbers, got {class_weights}.")
        self.classification_weight = classification_weight
        self.multi_label = multi_label
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", weights, persistent=False)
        self.terms: dict[str, Tensor] = {}

    def forward(self, output: Any, targets: Mapping[str, Tensor]) -> Tensor:
        """Evaluate the objective and keep its terms.

        Args:
            output: `(logits, prediction)`, e.g. a :class:`~monai_jointdiff.networks.JointOutput`; one of the two may
                be None. logits: (M, K). prediction: (N, C, *spatial). For a single task also a bare tensor, which is
                the prediction if the targets hold `target` and the logits if they hold `label`, but not both.
            targets: `label`: (M,) int64, -1 for unlabelled, or multi-label (M, K), -1 for unknown entries;
                `target`: (N, C, *spatial), what the network should predict; `weight`: (N,), w(t).

        Returns:
            scalar, with a gradient for every parameter the output depends on.

        Raises:
            ValueError: for shapes that do not fit, a label out of range or a missing target.
            TypeError: for an output that is neither a pair nor a tensor.
        """
        logits, prediction = _halves(output, targets)
        terms: dict[str, Tensor] = {}
        if prediction is not None:
            terms["diffusion"] = self.diffusion(prediction, _required(targets, "target"), _required(targets, "weight"))
        if logits is not None:
            terms["classification"] = self.classification(logits, _required(targets, "label"))
        total = sum(self._factor(name) * term for name, term in terms.items())
        if not isinstance(total, Tensor):
            raise ValueError("JointDiffusionLoss: the output has neither logits nor a prediction.")
        self.terms = {name: term.detach() for name, term in {**terms, "total": total}.items()}
        return total

    def _factor(self, name: str) -> float:
        return self.classification_weight if name == "classification" else 1.0

    def diffusion(self, prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Weighted mean squared error, a scalar.

        Args:
            prediction: (N, C, *spatial), by the network.
            target: (N, C, *spatial), what it should have been.
            weight: (N,), w(t).

        Returns:
            scalar.
        """
        if prediction.shape != target.shape or weight.shape != prediction.shape[:1]:
            raise ValueError(
                "JointDiffusionLoss: prediction and target must have one shape (N, C, *spatial) and weight (N,), got "
                f"{tuple(prediction.shape)}, {tuple(target.shape)} and {tuple(weight.shape)}."
            )
        squared_error = (prediction - target).square().flatten(1).mean(dim=1)  # (N,)
        return (weight.to(squared_error) * squared_error).mean()

    def classification(self, logits: Tensor, label: Tensor) -> Tensor:
        """Mean cross-entropy over what is labelled on all processes, times the number of processes; a scalar.

        The factor is there because DistributedDataParallel averages the gradients of the processes. Without gradients
        (validation) each process averages over its own images: processes may then have different numbers of batches.

        Args:
            logits: (M, K).
            label: (M,) int64, or multi-label (M, K).

        Returns:
            scalar; 0 with gradients of 0 where no process has a label.
        """
        self._check_label(logits, label)
        entries = self._multi_label_entries if self.multi_label else self._multi_class_entries
        loss_sum, count = entries(logits, label)
        processes = 1
        if logits.requires_grad and dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            processes = dist.get_world_size()
        return processes * loss_sum / torch.where(count > 0, count, torch.ones_like(count))

    def _multi_class_entries(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the labelled samples' weighted losses and their number.

        Not the sum of their weights, which would give a batch of one class the full weight, however small the class's.
        """
        weights = logits.new_ones(logits.shape[1]) if self.class_weights is None else self.class_weights.to(logits)
        smoothing = self.label_smoothing
        loss_sum = F.cross_entropy(
            logits, label.long(), weights, ignore_index=-1, reduction="sum", label_smoothing=smoothing
        )  # 0 with gradients of 0 if all are -1
        return loss_sum, (label >= 0).sum().to(logits)

    def _multi_label_entries(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the known entries' losses and their number."""
        pos_weight = None if self.class_weights is None else self.class_weights.to(logits)
        known = (label >= 0).to(logits)  # (M, K)
        smooth = label.to(logits).clamp(min=0) * (1 - self.label_smoothing) + self.label_smoothing / 2
        loss_sum = F.binary_cross_entropy_with_logits(logits, smooth, known, pos_weight=pos_weight, reduction="sum")
        return loss_sum, known.sum()

    def _check_label(self, logits: Tensor, label: Tensor) -> None:
        expected = logits.shape if self.multi_label else logits.shape[:1]
        num_classes = logits.shape[-1]
        if logits.ndim != 2 or label.shape != expected:
            raise ValueError(
                f"JointDiffusionLoss: logits must be (M, K) and label {'(M, K)' if self.multi_label else '(M,)'}, got "
                f"{tuple(logits.shape)} and {tuple(label.shape)}."
            )
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise ValueError(
                f"JointDiffusionLoss: {len(self.class_weights)} class_weights were given for {num_classes} classes."
            )
        if self.multi_label:
            valid = (label == -1) | ((label >= 0) & (label <= 1))
            right = "-1 (unknown) or in [0, 1]"
        else:
            if label.is_floating_point():
                raise ValueError(f"JointDiffusionLoss: labels of classes must be int64, got {label.dtype}.")
            valid = (label >= -1) & (label < num_classes)
            right = f"-1 (unlabelled) or a class from 0 to {num_classes - 1}"
        if not bool(valid.all()):
            wrong = label[~valid][0].item()
            raise ValueError(f"JointDiffusionLoss: label {wrong} is out of range, it must be {right}.")


def _halves(output: Any, targets: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Logits and prediction of an output, None for the one it lacks."""
    if isinstance(output, Tensor):
        if ("target" in targets) == ("label" in targets):
            raise ValueError(
                "JointDiffusionLoss: with a bare tensor as output the targets must hold either 'target' or 'label', "
                f"got {sorted(targets)}."
            )
        return (None, output) if "target" in targets else (output, None)
    if not isinstance(output, Sequence) or len(output) != 2:
        raise TypeError(f"JointDiffusionLoss: output must be (logits, prediction), got {type(output).__name__}.")
    return output[0], output[1]


def _required(targets: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in targets:
        raise ValueError(f"JointDiffusionLoss: the targets lack '{key}', they hold {sorted(targets)}.")
    return targets[key]
