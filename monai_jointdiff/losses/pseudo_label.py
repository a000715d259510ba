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

"""Labels that were guessed in rounds, for a weakly disturbed view."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .semi_supervised import UnlabelledSums

__all__ = ["PseudoLabelLoss"]


class PseudoLabelLoss:
    r"""The term of training in rounds: an unlabelled image with a pseudo-label q learns it, others do nothing.

    Liu et al., "ACPL: Anti-curriculum Pseudo-labelling for Semi-supervised Medical Image Classification", arXiv
    2111.12918, train on soft pseudo-labels as on labels. With the weights w of the labeller, 0 without a pseudo-label:

    .. math::
        L_u = \frac{1}{U} \sum_u w_u\, \mathrm{CE}(f(\mathrm{weak\ view}_u), q_u)

    With several labels it is the binary cross-entropy, and the mean is over the U K entries. The mean is over all
    unlabelled images: a pseudo-label counts the same in the first round, where there are few, and in the last. Before
    it the term is 0. Reported is `pseudo_label_rate`, the share of images with a pseudo-label.

    Args:
        multi_label: K independent findings.
        weak_view: key of the weak view in the batch.
    """

    def __init__(self, multi_label: bool = False, weak_view: str = "image_cls") -> None:
        self.multi_label = multi_label
        self.views = (weak_view,)

    def __call__(
        self, logits: Sequence[Tensor], pseudo_label: Tensor | None = None, pseudo_weight: Tensor | None = None
    ) -> UnlabelledSums:
        """Compare the view with the pseudo-labels.

        Args:
            logits: of the weak view, (U, K).
            pseudo_label: (U, K) probabilities.
            pseudo_weight: (U,) weights >= 0, 0 where there is no pseudo-label.

        Returns:
            sums over the images, with several labels over the entries.

        Raises:
            ValueError: without pseudo-labels, or for those of other images.
        """
        (weak,) = logits
        if pseudo_label is None or pseudo_weight is None:
            raise ValueError(
                "PseudoLabelLoss: the targets hold no pseudo-labels; give SemiSupervisedPrepareBatch a table of them."
            )
        if pseudo_label.shape != weak.shape or pseudo_weight.shape != weak.shape[:1]:
            raise ValueError(
                f"PseudoLabelLoss: pseudo-labels of logits {tuple(weak.shape)} must have this shape and a weight each, "
                f"got {tuple(pseudo_label.shape)} and {tuple(pseudo_weight.shape)}."
            )
        q, w = pseudo_label.to(weak), pseudo_weight.to(weak)
        if self.multi_label:
            losses = F.binary_cross_entropy_with_logits(weak, q, reduction="none")  # (U, K)
            w = w[:, None].expand_as(weak)
        else:
            losses = F.cross_entropy(weak, q, reduction="none")  # (U,)
        count = weak.new_tensor(w.numel())
        return UnlabelledSums((w * losses).sum(), count, {"pseudo_label_rate": (w > 0).to(weak).sum()})
