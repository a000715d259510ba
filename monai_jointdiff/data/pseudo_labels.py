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

"""Labels that are guessed from time to time during a training: what a labeller is given, what it returns, the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from monai_jointdiff.data.draws import DrawOrder

__all__ = ["LabelledFeatures", "PseudoLabelTable", "PseudoLabeller", "PseudoLabels", "UnlabelledFeatures"]


@dataclass(frozen=True)
class LabelledFeatures:
    """What is known of the anchors: the images with a label, and those whose pseudo-label counts as one.

    Args:
        features: (A, F) features of the head.
        labels: (A, K) probabilities of the classes, one-hot for images with a label; with several labels per image
            entries of their own, NaN where unknown.
        guessed: (A,) bool, whose label is a pseudo-label of an earlier round; None: nobody's.

    Raises:
        ValueError: for shapes that do not fit.
    """

    features: np.ndarray
    labels: np.ndarray
    guessed: np.ndarray | None = None

    def __post_init__(self) -> None:
        _check_rows(type(self).__name__, features=self.features, labels=self.labels)
        if self.guessed is not None and np.shape(self.guessed) != (len(self.features),):
            raise ValueError(
                f"{type(self).__name__}: guessed must be ({len(self.features)},), got {np.shape(self.guessed)}."
            )

    @property
    def num_labelled(self) -> int:
        """How many anchors have a label that is no guess."""
        return len(self.features) - (0 if self.guessed is None else int(np.sum(self.guessed)))


@dataclass(frozen=True)
class UnlabelledFeatures:
    """What the network says of images that have neither a label nor a pseudo-label.

    Args:
        features: (U, F) features of the head.
        probabilities: (U, K), of the classes or of findings of their own.

    Raises:
        ValueError: for shapes that do not fit.
    """

    features: np.ndarray
    probabilities: np.ndarray

    def __post_init__(self) -> None:
        _check_rows(type(self).__name__, features=self.features, probabilities=self.probabilities)


@dataclass(frozen=True)
class PseudoLabels:
    """What a labeller says of unlabelled images.

    Args:
        probabilities: (U, K) soft labels; rows of weight 0 are not looked at.
        weights: (U,) weights >= 0 in the loss; 0: no pseudo-label yet, the image is asked about again.
        anchors: (U,) bool, which images are anchors from now on; only such with a weight.

    Raises:
        ValueError: for shapes that do not fit, probabilities outside [0, 1], a negative weight, or an anchor without
            a pseudo-label.
    """

    probabilities: np.ndarray
    weights: np.ndarray
    anchors: np.ndarray

    def __post_init__(self) -> None:
        name, (weights, anchors) = type(self).__name__, (np.asarray(self.weights), np.asarray(self.anchors))
        if np.ndim(self.probabilities) != 2 or not weights.shape == anchors.shape == (len(self.probabilities),):
            raise ValueError(
                f"{name}: expected probabilities (U, K), weights (U,) and anchors (U,), got "
                f"{np.shape(self.probabilities)}, {weights.shape} and {anchors.shape}."
            )
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise ValueError(f"{name}: weights must be >= 0, got {weights.min()}.")
        if anchors.dtype != bool or bool((anchors & (weights == 0)).any()):
            raise ValueError(f"{name}: anchors must be bool, and true only where there is a pseudo-label.")
        given = np.asarray(self.probabilities)[weights > 0]
        if not ((given >= 0) & (given <= 1)).all():
            raise ValueError(f"{name}: probabilities must be in [0, 1] wherever the weight is not 0.")


class PseudoLabeller(Protocol):
    """What is asked of an algorithm that labels images: to write one, write such a function or class.

    It is called once a round, and should be a function of its arguments alone: a resumed run then goes on exactly.
    """

    def __call__(self, anchors: LabelledFeatures, unlabelled: UnlabelledFeatures) -> PseudoLabels:
        """Label some of the images, or none.

        Args:
            anchors: A images with labels, at least one.
            unlabelled: U images without, at least one.

        Returns:
            pseudo-labels of the U images.
        """
        ...


class PseudoLabelTable:
    """The pseudo-labels of a training's images so far; part of the state from which a run is resumed.

    A pseudo-label stays once it is given. The table is asked by draw: which image a draw shows is a function of the
    order, so that nothing but the number of the draw has to travel with an image.

    Args:
        labels: (N,) class indices, -1 for unlabelled, or (N, K) entries 1, 0, and -1 for unknown; an image with any
            known entry is labelled.
        num_classes: K.
        order: which image a draw shows.

    Attributes:
        probabilities: (N, K) float32.
        weights: (N,) float32, 0 where there is no pseudo-label.
        anchors: (N,) bool, images whose pseudo-label counts as a label in later rounds.

    Raises:
        ValueError: for labels of another shape, beyond the classes, or of another number than the order arranges, and
            where none is known.
    """

    def __init__(self, labels: Sequence[Any] | np.ndarray, num_classes: int, order: DrawOrder) -> None:
        name = type(self).__name__
        array: np.ndarray = np.asarray(labels)
        if array.ndim not in (1, 2) or array.shape[1:] not in ((), (num_classes,)):
            raise ValueError(f"{name}: labels must be (N,) or (N, K={num_classes}), got shape {array.shape}.")
        if len(array) != order.length:
            raise ValueError(f"{name}: the order arranges {order.length} images, there are {len(array)} labels.")
        if array.ndim == 1 and array.max() >= num_classes:
            raise ValueError(f"{name}: labels must be below num_classes={num_classes}, got {array.max()}.")
        self.order = order
        self.multi_label = array.ndim == 2
        self.labelled: np.ndarray = np.any(array.reshape(len(array), -1) >= 0, axis=1)  # (N,)
        if not self.labelled.any():
            raise ValueError(f"{name}: there is no labelled image to learn from.")
        self._known = np.where(array >= 0, array, np.nan) if self.multi_label else np.eye(num_classes)[array]
        self.probabilities = torch.zeros(len(array), num_classes)
        self.weights = torch.zeros(len(array))
        self.anchors = torch.zeros(len(array), dtype=torch.bool)

    def anchor_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices (A,) of the anchors, and their labels (A, K), NaN where unknown."""
        indices = np.flatnonzero(self.labelled | self.anchors.numpy())
        guessed = self.probabilities.double().numpy()[indices]
        return indices, np.where(self.labelled[indices, None], self._known[indices], guessed)

    def waiting(self) -> np.ndarray:
        """Indices (U,) of the images with neither a label nor a pseudo-label."""
        return np.flatnonzero(~self.labelled & (self.weights.numpy() == 0))

    def add(self, indices: np.ndarray, found: PseudoLabels) -> None:
        """Enter what a labeller found.

        Args:
            indices: (U,) of the images it was asked about.
            found: of these images.

        Raises:
            ValueError: for another number of images or classes.
        """
        expected = (len(indices), self.probabilities.shape[1])
        if found.probabilities.shape != expected:
            raise ValueError(
                f"{type(self).__name__}: expected pseudo-labels of shape {expected}, got {found.probabilities.shape}."
            )
        given = found.weights > 0
        rows = torch.as_tensor(indices[given])
        self.probabilities[rows] = torch.as_tensor(found.probabilities[given]).to(self.probabilities)
        self.weights[rows] = torch.as_tensor(found.weights[given]).to(self.weights)
        self.anchors[rows] = torch.as_tensor(found.anchors[given])

    def of_draws(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """The pseudo-labels of the images that some draws show.

        Args:
            draws: (B,) numbers of draws.

        Returns:
            probabilities (B, K), and weights (B,), 0 where there is no pseudo-label.
        """
        rows = torch.tensor([self.order(int(draw)) for draw in draws], dtype=torch.int64)
        return self.probabilities[rows], self.weights[rows]

    def state_dict(self) -> dict[str, Tensor]:
        """All pseudo-labels so far."""
        return {"probabilities": self.probabilities, "weights": self.weights, "anchors": self.anchors}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Go on with the pseudo-labels of another table.

        Args:
            state_dict: as of :meth:`state_dict`.

        Raises:
            ValueError: for those of other images.
        """
        for name, ours in self.state_dict().items():
            theirs = state_dict[name]
            if theirs.shape != ours.shape:
                raise ValueError(
                    f"{type(self).__name__}: {name} must have shape {tuple(ours.shape)}, got {tuple(theirs.shape)}."
                )
            ours.copy_(theirs)


def _check_rows(name: str, **arrays: np.ndarray) -> None:
    shapes = [np.shape(array) for array in arrays.values()]
    if any(len(shape) != 2 for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        listed = " and ".join(f"{key} {shape}" for key, shape in zip(arrays, shapes, strict=True))
        raise ValueError(f"{name}: expected one row for each image, got {listed}.")
