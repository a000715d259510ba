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

import unittest

import numpy as np
import torch
import torch.nn.functional as F
from monai.metrics import CalibrationErrorMetric
from parameterized import parameterized

from monai_jointdiff.metrics import choose_threshold, expected_calibration_error, fit_temperature, reliability_bins


def sampled(count: int, num_classes: int, sharpness: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits `sharpness` times too large, and labels drawn from the softmax of the right ones."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, num_classes)) * 1.5
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    return logits * sharpness, labels


class TestFitTemperature(unittest.TestCase):
    @parameterized.expand([(2, 3.0), (5, 0.4), (3, 1.0)])
    def test_recovers_the_temperature_that_made_the_labels(self, num_classes, sharpness):
        logits, labels = sampled(20000, num_classes, sharpness)
        self.assertAlmostEqual(fit_temperature(logits, labels) / sharpness, 1, delta=0.05)

    def test_gradient_vanishes(self):
        logits, labels = sampled(300, 4, 2.0)
        point = torch.tensor(fit_temperature(logits, labels), dtype=torch.float64, requires_grad=True)
        F.cross_entropy(torch.from_numpy(logits) / point, torch.from_numpy(labels)).backward()
        self.assertLess(abs(point.grad.item()), 1e-6)

    def test_scales_with_the_logits(self):
        logits, labels = sampled(300, 3, 1.5)
        for scale in (1e-4, 4, 1e4):  # the last as of sums of squared errors
            expected = scale * fit_temperature(logits, labels)
            self.assertAlmostEqual(fit_temperature(scale * logits, labels) / expected, 1, places=7)

    def test_unlabelled_images_are_left_out(self):
        logits, labels = sampled(300, 3, 1.5)
        known = labels.copy()
        known[::3] = -1
        self.assertAlmostEqual(
            fit_temperature(logits, known), fit_temperature(logits[known >= 0], labels[known >= 0]), places=8
        )

    def test_multi_label_equals_binary_of_the_known_entries(self):
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(400, 3)) * 3
        labels = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits / 2))).astype(float)
        labels[rng.random(labels.shape) < 0.3] = np.nan
        known = ~np.isnan(labels)
        pairs = np.stack([np.zeros(known.sum()), logits[known]], axis=1)  # softmax of (0, z) is sigmoid(z)
        self.assertAlmostEqual(
            fit_temperature(logits, labels, multi_label=True),
            fit_temperature(pairs, labels[known].astype(int)),
            places=6,
        )

    @parameterized.expand([("separable", [[0.0, 1.0], [1.0, 0.0]], 0.05), ("wrong", [[1.0, 0.0], [0.0, 1.0]], 20)])
    def test_no_optimum_gives_the_end_of_the_range(self, _, logits, expected):
        for scale in (1, 500):
            with self.assertWarnsRegex(UserWarning, "beyond"):
                self.assertEqual(fit_temperature(scale * np.array(logits), [1, 0]), scale * expected)

    def test_logits_that_do_not_differ(self):
        self.assertEqual(fit_temperature(np.full((3, 2), 7.0), [0, 1, 1]), 1.0)

    def test_classes_that_were_ruled_out(self):
        """Beside a class at minus infinity the others are as if there were no such class."""
        logits, labels = sampled(400, 3, 2.0)
        two = logits.copy()
        two[:, 2] = -np.inf
        keep = labels < 2
        self.assertAlmostEqual(fit_temperature(two, labels), fit_temperature(logits[keep, :2], labels[keep]), places=8)
        with self.assertRaisesRegex(ValueError, "class of every labelled image has been ruled out"):
            fit_temperature([[0.0, -np.inf]], [1])

    @parameterized.expand(
        [
            ("shape", [1.0, 2.0], [0, 1], "N, K"),
            ("nan", [[np.nan, 1.0]], [0], "finite"),
            ("infinite", [[np.inf, 1.0]], [0], "with NaN or infinity"),
            ("none", [[0.0, 1.0]], [-1], "0 known labels"),
            ("rows", [[0.0, 1.0]], [0, 1], "1 rows of logits"),
            ("range", [[0.0, 1.0]], [2], "got 2"),
        ]
    )
    def test_wrong_input(self, _, logits, labels, message):
        with self.assertRaisesRegex(ValueError, message):
            fit_temperature(logits, labels)


def quality(p: np.ndarray, y: np.ndarray, threshold: float, criterion: str) -> float:
    decided = p >= threshold
    sensitivity, specificity = decided[y == 1].mean(), (~decided[y == 0]).mean()
    return {
        "accuracy": (decided == y).mean(),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "youden": sensitivity + specificity - 1,
    }[criterion]


class TestChooseThreshold(unittest.TestCase):
    @parameterized.expand([(c, s) for c in ("balanced_accuracy", "accuracy", "youden") for s in range(4)])
    def test_no_threshold_on_a_fine_grid_is_better(self, criterion, seed):
        rng = np.random.default_rng(seed)
        y = (rng.random(60) < 0.7).astype(int)
        p = np.round(1 / (1 + np.exp(-rng.normal(size=60) - 1.5 * (2 * y - 1))), 2)
        chosen = choose_threshold(p, y, criterion)
        best = max(quality(p, y, threshold, criterion) for threshold in np.arange(0.0005, 1, 0.001))
        self.assertAlmostEqual(quality(p, y, chosen, criterion), best, places=12)

    def test_middle_of_the_plateau_in_logit_space(self):
        p, y = np.array([0.001, 0.1, 0.9999, 0.9]), np.array([0, 0, 1, 1])
        self.assertAlmostEqual(choose_threshold(p, y), 0.5, places=12)
        sigmoid = 1 / (1 + np.exp(-np.array([-7.0, -6.0, -2.0, 3.0])))
        self.assertAlmostEqual(choose_threshold(sigmoid, y), 1 / (1 + np.exp(4.0)), places=12)
        self.assertAlmostEqual(choose_threshold(np.stack([1 - p, p], 1), y), 0.5, places=12)

    def test_a_plateau_may_span_scores_that_cancel(self):
        # between 0.2 and 0.4, and between 0.4 and 0.8, accuracy is the same: one positive for one negative
        p = np.array([0.1, 0.2, 0.4, 0.4, 0.8, 0.9])
        y = np.array([0, 0, 0, 1, 1, 1])
        middle = choose_threshold(p, y, "accuracy")
        logits = np.log([0.2 / 0.8, 0.8 / 0.2])
        self.assertAlmostEqual(middle, 1 / (1 + np.exp(-logits.mean())), places=12)

    def test_the_widest_of_equally_good_plateaus(self):
        p = np.array([0.10, 0.30, 0.45, 0.55, 0.60])
        y = np.array([0, 1, 0, 1, 1])  # thresholds in (.10, .30] and in (.45, .55] make one error each
        chosen = choose_threshold(p, y, "accuracy")
        self.assertTrue(0.10 < chosen < 0.30)

    @parameterized.expand(
        [
            ("certain", [0.0, 0.0, 1.0, 1.0]),
            ("tiny", [0.0, 1e-12, 1e-9, 1e-8]),
            ("huge", [0.5, 1 - 1e-9, 1 - 1e-10, 1.0]),
        ]
    )
    def test_separates_at_the_ends_of_the_range(self, _, p):
        chosen = choose_threshold(p, [0, 0, 1, 1])
        self.assertTrue(p[1] < chosen <= p[2])

    def test_unlabelled_images_are_left_out(self):
        p, y = [0.1, 0.3, 0.9, 0.31, 0.05], [0, 0, 1, -1, -1]
        self.assertEqual(choose_threshold(p, y), choose_threshold(p[:3], y[:3]))

    @parameterized.expand(
        [
            ("criterion", [0.1, 0.9], [0, 1], "f1", "criterion"),
            ("single", [0.1, 0.9], [1, 1], "accuracy", "both classes"),
            ("logits", [-1.0, 0.9], [0, 1], "accuracy", "were logits given"),
            ("shape", [[0.1, 0.2, 0.7]], [1], "accuracy", "N, 2"),
            ("labels", [0.1, 0.9], [0, 2], "accuracy", "got 2"),
        ]
    )
    def test_wrong_input(self, _, p, y, criterion, message):
        with self.assertRaisesRegex(ValueError, message):
            choose_threshold(p, y, criterion)


class TestReliability(unittest.TestCase):
    @parameterized.expand([(5,), (15,), (20,)])
    def test_equals_monai(self, num_bins):
        rng = np.random.default_rng(0)
        p = rng.random((500, 3))
        y = (rng.random(p.shape) < p**1.5).astype(int)
        for reduction, name in (("expected", "expected_error"), ("maximum", "maximum_error")):
            metric = CalibrationErrorMetric(num_bins=num_bins, calibration_reduction=reduction)
            metric(torch.from_numpy(p.reshape(1, 1, -1)), torch.from_numpy(y.reshape(1, 1, -1)))
            bins = reliability_bins(p, y, num_bins)
            self.assertAlmostEqual(getattr(bins, name), metric.aggregate().item(), places=5)

    def test_hand_made_bins(self):
        p = np.array([0.8] * 5 + [0.1] * 5 + [1.0])
        y = np.array([1, 1, 1, 0, 0] + [0, 0, 0, 0, 1] + [1])
        bins = reliability_bins(np.stack([1 - p, p], 1), y, num_bins=10)
        np.testing.assert_array_equal(bins.counts, [0, 5, 0, 0, 0, 0, 0, 0, 5, 1])
        np.testing.assert_allclose(bins.frequency[[1, 8, 9]], [0.2, 0.6, 1])
        self.assertTrue(np.isnan(bins.confidence[0]))
        self.assertAlmostEqual(bins.expected_error, (5 * 0.1 + 5 * 0.2) / 11, places=12)
        self.assertAlmostEqual(bins.maximum_error, 0.2, places=12)

    def test_multi_class_takes_the_largest_probability(self):
        p = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]])
        self.assertAlmostEqual(expected_calibration_error(p, [0, 1, 0, -1]), abs(2 / 3 - 0.7), places=12)

    def test_calibrated_predictions_have_a_small_error(self):
        logits, labels = sampled(50000, 4, 1.0)
        p = torch.from_numpy(logits).softmax(1)
        self.assertLess(expected_calibration_error(p, labels), 0.01)
        self.assertGreater(expected_calibration_error((2 * torch.from_numpy(logits)).softmax(1), labels), 0.08)

    def test_wrong_input(self):
        with self.assertRaisesRegex(ValueError, "num_bins"):
            reliability_bins([[0.5, 0.5]], [1], num_bins=0)
        with self.assertRaisesRegex(ValueError, "no known label"):
            reliability_bins([[0.5, 0.5]], [-1])


if __name__ == "__main__":
    unittest.main()
