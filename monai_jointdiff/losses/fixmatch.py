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

"""Pseudo-labels from a weakly disturbed view for a strongly disturbed one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .semi_supervised import UnlabelledSums

__all__ = ["FixMatchLoss"]


class FixMatchLoss:
    r"""The term of FixMatch: what the network is sure of in the weak view, it should say of the strong view.

    Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", arXiv 2001.07685,
    equation 4, with p = softmax(f(weak view)):

    .. math::
        L_u = \frac{1}{U} \sum_u 1[\max_k p_{uk} \ge \tau]\; \mathrm{CE}(f(\mathrm{strong\ view}_u), \arg\max_k p_{uk})

    With several labels every finding k is a decision of its own: p = sigmoid(f(weak view)), the network is sure if
    max(p, 1 - p) >= tau, the loss is the binary cross-entropy with 1[p >= 1/2], and the mean is over the U K entries.
    The mean is over all images, not over those it is sure of. No gradient flows into the weak view. Reported is
    `pseudo_label_rate`, the share of images (entries) it is sure of.

    Args:
        threshold: tau, in [0, 1].
        multi_label: K independent findings.
        weak_view: key of the weak view in the batch.
        strong_view: key of the strong view.

    Raises:
        ValueError: for a threshold out of range.
    """

    def __init__(
        self,
        threshold: float = 0.95,
        multi_label: bool = False,
        weak_view: str = "image_cls",
        strong_view: str = "image_strong",
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"FixMatchLoss: threshold must be in [0, 1], got {threshold}.")
        self.threshold = threshold
        self.multi_label = multi_label
        self.views = (weak_view, strong_view)

    def __call__(self, logits: Sequence[Tensor]) -> UnlabelledSums:
        """Compare the views.

        Args:
            logits: of the weak and of the strong view, each (U, K).

        Returns:
            sums over the images, with several labels over the entries.
        """
        weak, strong = logits
        weak = weak.detach()
        if self.multi_label:
            p = weak.sigmoid()  # (U, K)
            sure = torch.maximum(p, 1 - p) >= self.threshold
            losses = F.binary_cross_entropy_with_logits(strong, (p >= 0.5).to(strong), reduction="none")
        else:
            confidence, pseudo_label = weak.softmax(dim=1).max(dim=1)  # (U,)
            sure = confidence >= self.threshold
            losses = F.cross_entropy(strong, pseudo_label, reduction="none")
        count = strong.new_tensor(sure.numel())
        return UnlabelledSums((losses * sure).sum(), count, {"pseudo_label_rate": sure.to(strong).sum()})
