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

"""Checks of probabilities and labels that all classification metrics share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["as_array", "check_labels", "check_probabilities", "is_multi_label"]


def as_array(values: Any, dtype: Any = np.float64) -> np.ndarray:
    """A tensor on any device, a list or an array, as a numpy array.

    Args:
        values: tensor (MetaTensor too), array or nested list.
        dtype: numpy type of the result.

    Returns:
        array of the same shape.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values, dtype=dtype)


def is_multi_label(labels: np.ndarray, multi_label: bool | None, caller: str) -> bool:
    """Whether labels are multi-label: what their shape says, and what the caller said must agree with it.

    Args:
        labels: (N,) class indices or (N, K) entries 0, 1, -1.
        multi_label: what the caller said; None leaves it to the shape.
        caller: name for the error message.

    Returns:
        True for (N, K) labels.

    Raises:
        ValueError: when labels have neither shape, or not the one that goes with `multi_label`.
    """
    if labels.ndim not in (1, 2):
        raise ValueError(f"{caller}: labels must be (N,) class indices or (N, K) entries 0, 1, -1, got {labels.shape}.")
    if multi_label is not None and multi_label != (labels.ndim == 2):
        expected = "(N, K) entries 0, 1, -1" if multi_label else "(N,) class indices"
        raise ValueError(f"{caller}: multi_label={multi_label} goes with labels {expected}, got shape {labels.shape}.")
    return labels.ndim == 2


def check_labels(labels: Any, num_classes: int, caller: str) -> np.ndarray:
    """Labels as integers, unknown ones as -1.

    Args:
        labels: (N,) class indices or (N, K) entries; -1 and NaN mean unknown.
        num_classes: K.
        caller: name for the error message.

    Returns:
        int64 array of the same shape, entries in [-1, num_classes) for (N,) and in {-1, 0, 1} for (N, K).

    Raises:
        ValueError: for an entry outside the range, or a wrong number of columns.
    """
    values = as_array(labels)
    values = np.where(np.isnan(values), -1, values)
    if values.ndim == 2 and values.shape[1] != num_classes:
        raise ValueError(f"{caller}: labels have {values.shape[1]} columns for {num_classes} classes.")
    highest = num_classes - 1 if values.ndim == 1 else 1
    wrong = (values != np.round(values)) | (values < -1) | (values > highest)
    if wrong.any():
        raise ValueError(
            f"{caller}: labels must be whole numbers from -1 (unknown) to {highest}, got {values[wrong].flat[0]:g}."
        )
    return values.astype(np.int64)


def check_probabilities(probabilities: Any, labels: np.ndarray, multi_label: bool, caller: str) -> np.ndarray:
    """Probabilities as a float64 matrix with one row for each label.

    Args:
        probabilities: (N, K); rows sum to 1 unless multi-label.
        labels: (N,) or (N, K), for the number of rows.
        multi_label: columns are independent.
        caller: name for the error message.

    Returns:
        (N, K) float64 in [0, 1].

    Raises:
        ValueError: for another shape, a value that is not in [0, 1], or rows that do not sum to 1.
    """
    values = as_array(probabilities)
    smallest = 1 if multi_label else 2
    if values.ndim != 2 or values.shape[1] < smallest:
        raise ValueError(f"{caller}: probabilities must be (N, K) with K >= {smallest}, got shape {values.shape}.")
    if len(values) != len(labels):
        raise ValueError(f"{caller}: {len(values)} rows of probabilities for {len(labels)} labels.")
    if not len(values):
        raise ValueError(f"{caller}: no images.")
    if not ((values > -1e-4) & (values < 1 + 1e-4)).all():  # NaN fails too
        raise ValueError(f"{caller}: probabilities must lie in [0, 1] and be finite; were logits given?")
    if not multi_label and np.abs(values.sum(1) - 1).max() > 1e-2:
        raise ValueError(f"{caller}: rows of probabilities must sum to 1; pass multi-label labels (N, K) otherwise.")
    return values.clip(0, 1)
