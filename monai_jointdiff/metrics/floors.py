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

"""What a linear model reaches, as a floor for classifiers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from monai.utils import optional_import

from monai_jointdiff.metrics.classification import macro_auc
from monai_jointdiff.metrics.inputs import as_array, check_labels

__all__ = ["FloorResult", "pca_logistic_floor"]

decomposition, _ = optional_import("sklearn.decomposition")
linear_model, _ = optional_import("sklearn.linear_model")
preprocessing, _ = optional_import("sklearn.preprocessing")
pipeline, _ = optional_import("sklearn.pipeline")


@dataclass(frozen=True)
class FloorResult:
    """What a linear model on principal components reaches.

    Args:
        auc: (macro one-against-rest) area under the ROC curve on the test part.
        balanced_accuracy: mean recall of the classes on the test part, largest probability decides.
        components: number of principal components used.
    """

    auc: float
    balanced_accuracy: float
    components: int


def pca_logistic_floor(
    train_x: Any, train_y: Any, test_x: Any, test_y: Any, components: int = 64, seed: int = 0
) -> FloorResult:
    """Floor for a classifier: logistic regression (balanced class weights) on standardized principal components.

    Args:
        train_x: (N, *) images, flattened.
        train_y: (N,) class indices, -1 unlabelled (left out).
        test_x: (M, *) images.
        test_y: (M,) class indices, -1 unlabelled (left out).
        components: number of principal components, cut to what the training part allows.
        seed: of the randomized decomposition.

    Returns:
        the figures on the test part.

    Raises:
        ValueError: for shapes that do not fit, labels that are not (N,), or fewer than two training classes.
        OptionalImportError: without scikit-learn.
    """
    train, train_labels = _labelled(train_x, train_y, "training")
    test, test_labels = _labelled(test_x, test_y, "test")
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"pca_logistic_floor: {train.shape[1]} training pixels but {test.shape[1]} test pixels.")
    classes = np.unique(train_labels)
    if len(classes) < 2 or not set(test_labels.tolist()) <= set(classes.tolist()):
        raise ValueError(
            f"pca_logistic_floor: at least two training classes that hold the test classes expected, got training "
            f"{classes.tolist()}, test {np.unique(test_labels).tolist()}."
        )
    used = min(components, *train.shape)
    model = pipeline.make_pipeline(
        decomposition.PCA(used, svd_solver="randomized", random_state=seed),
        preprocessing.StandardScaler(),
        linear_model.LogisticRegression(max_iter=2000, class_weight="balanced"),
    ).fit(train, train_labels)
    probabilities = model.predict_proba(test)
    truth = np.searchsorted(classes, test_labels)
    decided = probabilities.argmax(1)
    recalls = [(decided[truth == k] == k).mean() for k in np.unique(truth)]
    return FloorResult(macro_auc(probabilities, truth), float(np.mean(recalls)), used)


def _labelled(images: Any, labels: Any, part: str) -> tuple[np.ndarray, np.ndarray]:
    pixels = as_array(images, np.float32)
    shape = np.shape(labels)
    if shape != (len(pixels),):
        raise ValueError(
            f"pca_logistic_floor: {part} labels must be ({len(pixels)},) class indices, got shape {shape}."
        )
    truth = check_labels(labels, np.iinfo(np.int32).max, "pca_logistic_floor")
    return pixels.reshape(len(pixels), -1)[truth >= 0], truth[truth >= 0]
