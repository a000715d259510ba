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

"""Batches that always hold labelled and unlabelled images, in a fixed ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from monai_jointdiff.data.draws import BalancedOrder, DrawOrder, ShuffledOrder, draw_seed

__all__ = ["TwoStreamOrder"]


class TwoStreamOrder(DrawOrder):
    """One labelled image, then mu unlabelled ones, and so on: a draw order for semi-supervised training.

    The draws are cut into blocks of 1 + mu; the first of a block shows the next image of the labelled stream, the
    others the next ones of the unlabelled stream. Batches of a multiple of 1 + mu images, on every process, so hold the
    two kinds in the ratio 1 : mu. Each stream passes through its own epochs: every image of a stream is shown once, in
    a new order, before any is shown again. What a draw shows is a function of (seed, draw), as of every order.

    Args:
        labels: (N,) class indices, -1 for unlabelled, or (N, K) entries 1, 0, and -1 for unknown; an image with any
            known entry is labelled.
        seed: seed of the run.
        unlabelled_per_labelled: mu >= 1.
        balance: `sampler` shows the classes of the labelled stream equally often (:class:`BalancedOrder`); anything
            else passes through all its images in turn.
        batch_size: images per process and iteration, checked to be a multiple of 1 + mu; None: not checked.

    Raises:
        ValueError: for another ratio or batch size, labels of another shape, or one of the two kinds without an image.

    Example:
        >>> order = TwoStreamOrder([0, -1, 1, -1, -1, -1], seed=0, unlabelled_per_labelled=2)
        >>> sorted(order(draw) for draw in (0, 3)), sorted(order(draw) for draw in (1, 2, 4, 5))
        ([0, 2], [1, 3, 4, 5])
    """

    def __init__(
        self,
        labels: Sequence[Any] | np.ndarray,
        seed: int,
        unlabelled_per_labelled: int = 7,
        balance: str = "none",
        batch_size: int | None = None,
    ) -> None:
        name, array = type(self).__name__, np.asarray(labels)
        if array.ndim not in (1, 2):
            raise ValueError(f"{name}: labels must be (N,) or (N, K), got shape {array.shape}.")
        if isinstance(unlabelled_per_labelled, bool) or unlabelled_per_labelled != int(unlabelled_per_labelled):
            raise ValueError(f"{name}: unlabelled_per_labelled must be a whole number, got {unlabelled_per_labelled}.")
        if unlabelled_per_labelled < 1:
            raise ValueError(f"{name}: unlabelled_per_labelled must be at least 1, got {unlabelled_per_labelled}.")
        if balance == "sampler" and array.ndim == 2:
            raise ValueError(f"{name}: balance 'sampler' needs one class per image; multi-label data have several.")
        self.block = 1 + int(unlabelled_per_labelled)
        if batch_size is not None and batch_size % self.block:
            raise ValueError(
                f"{name}: the batch size must be a multiple of {self.block}, one labelled and {self.block - 1} "
                f"unlabelled images, got {batch_size}."
            )
        super().__init__(len(array), seed)
        is_labelled = array >= 0 if array.ndim == 1 else (array >= 0).any(axis=1)
        self.labelled, self.unlabelled = np.flatnonzero(is_labelled), np.flatnonzero(~is_labelled)
        if not len(self.labelled) or not len(self.unlabelled):
            raise ValueError(
                f"{name}: needs labelled and unlabelled images, got {len(self.labelled)} and {len(self.unlabelled)}. "
                + (
                    "Take fewer labels (--num_labels), or train with all of them, by train.json alone."
                    if len(self.labelled)
                    else "Give some training images a label."
                )
            )
        labelled_seed, unlabelled_seed = (draw_seed(seed, 0, kind) for kind in ("labelled", "unlabelled"))
        self._labelled_order: DrawOrder = (
            BalancedOrder(array[self.labelled], labelled_seed)
            if balance == "sampler"
            else ShuffledOrder(len(self.labelled), labelled_seed)
        )
        self._unlabelled_order = ShuffledOrder(len(self.unlabelled), unlabelled_seed)

    def __call__(self, draw: int) -> int:
        """Index of the image that draw number `draw` shows."""
        block, position = divmod(draw, self.block)
        if position == 0:
            return int(self.labelled[self._labelled_order(block)])
        return int(self.unlabelled[self._unlabelled_order(block * (self.block - 1) + position - 1)])

    def arrange(self, epoch: int) -> np.ndarray:
        """The indices (length,) that `length` consecutive draws show; an image may be among them often, or not."""
        return np.array([self(draw) for draw in range(epoch * self.length, (epoch + 1) * self.length)])
