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

import tempfile
import unittest
from pathlib import Path

import numpy as np
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.metrics import macro_auc, reliability_bins
from monai_jointdiff.visualize import confusion_matrix_figure, reliability_figure, roc_curve_figure, save_figure

_, has_matplotlib = optional_import("matplotlib")
_, has_pillow = optional_import("PIL")
sklearn_metrics, has_sklearn = optional_import("sklearn.metrics")


def predictions(num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, 200)
    weights = np.exp(rng.normal(size=(200, num_classes)) + np.eye(num_classes)[labels])
    labels[:9] = -1
    return weights / weights.sum(1, keepdims=True), labels


def trapezoid(height: np.ndarray, x: np.ndarray) -> float:
    return float((np.diff(x) * (height[1:] + height[:-1]) / 2).sum())


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@unittest.skipUnless(has_matplotlib, "matplotlib is not installed")
class TestRocCurveFigure(unittest.TestCase):
    @unittest.skipUnless(has_sklearn, "scikit-learn is the oracle")
    def test_binary_curve_encloses_the_area_it_names(self):
        p, y = predictions(2)
        axes = roc_curve_figure(p, y, ["normal", "pneumonia"]).axes[0]
        x, height = axes.lines[0].get_data()
        area = sklearn_metrics.roc_auc_score(y[y >= 0], p[y >= 0, 1])
        self.assertAlmostEqual(trapezoid(height, x), area, places=12)
        self.assertEqual(texts(axes), [f"pneumonia: AUC {area:.3f}"])

    def test_multi_class_has_a_curve_for_each_class(self):
        p, y = predictions(4)
        axes = roc_curve_figure(p, y, list("abcd")).axes[0]
        areas = [trapezoid(line.get_ydata(), line.get_xdata()) for line in axes.lines[:4]]
        self.assertAlmostEqual(np.mean(areas), macro_auc(p, y), places=12)
        self.assertEqual([text[0] for text in texts(axes)], list("abcd"))
        self.assertIn(f"{np.mean(areas):.3f}", axes.get_title())

    def test_multi_label_without_curves_for_empty_labels(self):
        p = np.random.default_rng(0).random((6, 3))
        labels = np.array([[0, 1, 0], [1, 1, 0], [0, -1, 0], [1, 0, 0], [-1, 0, 0], [0, 0, 0]])
        axes = roc_curve_figure(p, labels, list("abc")).axes[0]
        self.assertEqual([text[0] for text in texts(axes)], ["a", "b"])

    def test_wrong_input(self):
        p, y = predictions(2)
        with self.assertRaisesRegex(ValueError, "with and without"):
            roc_curve_figure(p, np.ones(200))
        with self.assertRaisesRegex(ValueError, "2 class names"):
            roc_curve_figure(p, y, ["a"])
        with self.assertRaisesRegex(ValueError, "roc_curve_figure: .*logits"):
            roc_curve_figure(5 * p, y)


@unittest.skipUnless(has_matplotlib, "matplotlib is not installed")
class TestReliabilityFigure(unittest.TestCase):
    @parameterized.expand([(2,), (4,)])
    def test_bars_are_the_bins(self, num_classes):
        p, y = predictions(num_classes)
        figure = reliability_figure(p, y, num_bins=10)
        bins = reliability_bins(p, y, 10)
        filled = bins.counts > 0
        upper, lower = figure.axes
        np.testing.assert_allclose([bar.get_height() for bar in upper.patches], bins.frequency[filled])
        np.testing.assert_allclose([bar.get_height() for bar in lower.patches], bins.counts)
        self.assertEqual([text.get_text() for text in lower.texts], [str(n) for n in bins.counts[filled]])
        self.assertIn(f"{bins.expected_error:.3f}", upper.get_title())
        marks = [segment[0][1] for segment in upper.collections[0].get_segments()]
        np.testing.assert_allclose(marks, bins.confidence[filled])


@unittest.skipUnless(has_matplotlib, "matplotlib is not installed")
class TestConfusionMatrixFigure(unittest.TestCase):
    @unittest.skipUnless(has_sklearn, "scikit-learn is the oracle")
    @parameterized.expand([(2,), (5,)])
    def test_numbers(self, num_classes):
        p, y = predictions(num_classes)
        figure = confusion_matrix_figure(p.argmax(1), y, [f"class {k}" for k in range(num_classes)])
        expected = sklearn_metrics.confusion_matrix(y[y >= 0], p[y >= 0].argmax(1))
        shown = [int(text.get_text().split("\n")[0]) for text in figure.axes[0].texts]
        np.testing.assert_array_equal(np.reshape(shown, expected.shape), expected)
        np.testing.assert_allclose(figure.axes[0].images[0].get_array(), expected / expected.sum(1, keepdims=True))

    def test_a_class_without_images_is_a_row_of_zeros(self):
        figure = confusion_matrix_figure([0, 1], [0, 0], ["a", "b"])
        self.assertEqual([text.get_text() for text in figure.axes[0].texts][2:], ["0\n0 %", "0\n0 %"])

    @parameterized.expand(
        [
            ("shape", [0, 1], [0], None, "with a labelled image"),
            ("unlabelled", [0, 1], [-1, -1], None, "with a labelled image"),
            ("range", [0, 3], [0, 1], ["a", "b"], "got 3"),
            ("negative", [0, -1], [0, 1], ["a", "b"], "from 0 on"),
        ]
    )
    def test_wrong_input(self, _, predicted, labels, names, message):
        with self.assertRaisesRegex(ValueError, message):
            confusion_matrix_figure(predicted, labels, names)


@unittest.skipUnless(has_matplotlib and has_pillow, "matplotlib or Pillow is not installed")
class TestSaveFigure(unittest.TestCase):
    def test_writes_a_picture_of_the_right_size(self):
        from PIL import Image

        p, y = predictions(2)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "new" / "roc.png"
            save_figure(roc_curve_figure(p, y), path, dpi=50)
            self.assertEqual(Image.open(path).size, (250, 250))
            save_figure(reliability_figure(p, y), path.with_suffix(".pdf"))
            self.assertTrue(path.with_suffix(".pdf").read_bytes().startswith(b"%PDF"))

    def test_leaves_pyplot_alone(self):
        pyplot, _ = optional_import("matplotlib.pyplot")
        before = pyplot.get_fignums()
        confusion_matrix_figure([0, 1], [0, 1])
        self.assertEqual(pyplot.get_fignums(), before)


if __name__ == "__main__":
    unittest.main()
