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

"""Metrics that MONAI engines accumulate over a validation run."""

from __future__ import annotations

from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric

from monai_jointdiff.metrics.classification import macro_auc

__all__ = ["DenoisingErrorMetric", "MacroAUCMetric"]


class MacroAUCMetric(CumulativeIterationMetric):
    """Macro area under the ROC curve over a whole validation run; unlabelled images are left out.

    For :class:`monai.handlers.IgniteMetricHandler`, with batches or decollated lists, on one process or many.

    Args:
        multi_label: labels are (N, K) entries 0, 1, -1, and logits go through a sigmoid instead of a softmax.
        from_logits: False when the predictions are probabilities already.
    """

    def __init__(self, multi_label: bool = False, from_logits: bool = True) -> None:
        super().__init__()
        self.multi_label = multi_label
        self.from_logits = from_logits

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:  # type: ignore[override]
        """Keep probabilities (N, K) and labels, (N,) or (N, K)."""
        expected = y_pred.shape if self.multi_label else y_pred.shape[:1]
        if y_pred.ndim != 2 or y.shape != expected:
            raise ValueError(
                f"{type(self).__name__}: predictions (N, K) and labels {'(N, K)' if self.multi_label else '(N,)'} "
                f"expected, got {tuple(y_pred.shape)} and {tuple(y.shape)}."
            )
        scores = y_pred.double()
        if self.from_logits:
            scores = scores.sigmoid() if self.multi_label else scores.softmax(1)
        return [scores, y]

    def aggregate(self) -> float:  # type: ignore[override]
        """The area over all images since the last reset.

        Returns:
            value in [0, 1]; NaN when no class has images with and without it.
        """
        scores, labels = self.get_buffer()
        return macro_auc(scores, labels)


class DenoisingErrorMetric(CumulativeIterationMetric):
    """Mean squared error of the network's prediction against its target, every image counting once.

    For :class:`monai.handlers.IgniteMetricHandler`: the mean does not depend on how images are cut into batches.
    """

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """(N,) squared error of each image, mean over channels and pixels."""
        if y_pred.shape != y.shape or y_pred.ndim < 2:
            raise ValueError(
                f"{type(self).__name__}: prediction and target of one shape (N, C, *spatial) expected, "
                f"got {tuple(y_pred.shape)} and {tuple(y.shape)}."
            )
        return (y_pred.double() - y.double()).square().flatten(1).mean(1)

    def aggregate(self) -> float:  # type: ignore[override]
        """Mean over all images since the last reset."""
        errors = self.get_buffer()
        return float(errors.mean())
