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

"""Two random views of an image should get the same probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .semi_supervised import UnlabelledSums

__all__ = ["PiModelLoss"]


class PiModelLoss:
    r"""The consistency term of the Pi-model; with a teacher that averages the weights, that of Mean Teacher.

    Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", arXiv 1610.02242, section 2.1 (there over all
    images, here over the unlabelled ones), with the probabilities z and z' of two random views:

    .. math::
        L_u = \frac{1}{U K} \sum_u \|z_u - z'_u\|^2

    Its weight has to grow slowly (:class:`~monai_jointdiff.handlers.UnlabelledWeightSchedule`), else the network keeps
    to one answer for all images. The largest weight of the authors, 100 M / N for M labels among N images, stands
    beside a cross-entropy summed over the labelled images of a batch of all: beside a mean over the labelled images, as
    here, it is an `unlabelled_weight` of 100.

    Gradients flow into both views. With a teacher (Tarvainen and Valpola, "Mean teachers are better role models",
    arXiv 1703.01780) the first view is the teacher's and has none.

    Args:
        multi_label: probabilities are those of K independent findings.
        first_view: key of the first view in the batch.
        second_view: key of the second view.
    """

    def __init__(
        self, multi_label: bool = False, first_view: str = "image_cls", second_view: str = "image_second"
    ) -> None:
        self.multi_label = multi_label
        self.views = (first_view, second_view)

    def __call__(self, logits: Sequence[Tensor]) -> UnlabelledSums:
        """Compare the views.

        Args:
            logits: of the two views, each (U, K).

        Returns:
            sums over images and classes.
        """
        first, second = (view.sigmoid() if self.multi_label else view.softmax(dim=1) for view in logits)
        squared = (first - second).square()  # (U, K)
        return UnlabelledSums(squared.sum(), torch.as_tensor(squared.numel()), {})
