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

from __future__ import annotations

import os
import unittest
from pathlib import Path

import numpy as np
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.metrics import area_under_roc, pca_logistic_floor

_, has_sklearn = optional_import("sklearn")
DATA = os.environ.get("JOINTDIFF_DATA")


@unittest.skipUnless(has_sklearn, "scikit-learn is not installed")
class TestPCALogisticFloor(unittest.TestCase):
    @parameterized.expand([("2d", (1, 3, 4)), ("3d", (1, 2, 3, 3))])
    def test_two_gaussians_reach_the_best_linear_rule(self, _, shape):
        # classes N(-d/2, I) and N(d/2, I): the best rule is the sign of d . x
        rng = np.random.default_rng(0)
        direction = rng.normal(size=shape)
        direction *= 2 / np.linalg.norm(direction)
        labels = rng.integers(0, 2, 6000)
        images = rng.normal(size=(6000, *shape)) + (labels - 0.5).reshape(-1, *[1] * len(shape)) * direction
        result = pca_logistic_floor(images[:3000], labels[:3000], images[3000:], labels[3000:])
        scores, truth = (images[3000:] * direction).reshape(3000, -1).sum(1), labels[3000:]
        self.assertEqual(result.components, np.prod(shape))
        self.assertAlmostEqual(result.auc, area_under_roc(scores, truth), delta=0.005)
        recalls = [(scores[truth == 1] > 0).mean(), (scores[truth == 0] < 0).mean()]
        self.assertAlmostEqual(result.balanced_accuracy, np.mean(recalls), delta=0.01)

    def test_three_classes_with_gaps_in_their_numbers_and_unlabelled_images(self):
        rng = np.random.default_rng(0)
        labels = rng.choice([-1, 0, 2, 5], size=300)
        images = 10 * labels[:, None, None, None] + rng.normal(size=(300, 1, 2, 2))
        images[labels < 0] = np.nan_to_num(np.inf, posinf=1e6)  # would ruin the components
        result = pca_logistic_floor(images[:200], labels[:200], images[200:], labels[200:])
        self.assertEqual((result.auc, result.balanced_accuracy), (1, 1))

    @unittest.skipUnless(DATA, "JOINTDIFF_DATA is not set")
    def test_published_floor_of_pneumoniamnist(self):
        with np.load(Path(DATA) / "pneumoniamnist_28.npz") as file:
            parts = [file[f"{part}_{kind}"] for part in ("train", "test") for kind in ("images", "labels")]
        result = pca_logistic_floor(parts[0], parts[1][:, 0], parts[2], parts[3][:, 0])
        self.assertAlmostEqual(result.auc, 0.924, delta=0.004)
        self.assertAlmostEqual(result.balanced_accuracy, 0.839, delta=0.008)

    @parameterized.expand(
        [
            ("rows", np.zeros((3, 4)), [0, 1], np.zeros((2, 4)), [0, 1], "training labels"),
            ("columns", np.zeros((2, 4)), [0, 1], np.zeros((2, 5)), [0, 1], "4 training pixels but 5"),
            ("single", np.zeros((2, 4)), [1, 1], np.zeros((2, 4)), [1, 1], "two training classes"),
            ("unseen", np.zeros((2, 4)), [0, 1], np.zeros((2, 4)), [0, 2], "hold the test classes"),
            ("multi_label", np.zeros((2, 4)), [[0, 1], [1, 0]], np.zeros((2, 4)), [0, 1], "training labels"),
        ]
    )
    def test_wrong_input(self, _, train, train_labels, test, test_labels, message):
        with self.assertRaisesRegex(ValueError, message):
            pca_logistic_floor(train, train_labels, test, test_labels)


if __name__ == "__main__":
    unittest.main()
