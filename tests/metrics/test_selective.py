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

import itertools
import json
import unittest
import warnings

import numpy as np
import torch
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.metrics import (
    BrierScoreMetric,
    abstention_threshold,
    accuracy_at_coverage,
    area_under_risk_coverage,
    brier_score,
    classification_report,
    excess_area_under_risk_coverage,
    predictive_entropy,
    risk_coverage_curve,
    selective_report,
)
from tests.metrics.test_cumulative import in_batches, run

sklearn_metrics, has_sklearn = optional_import("sklearn.metrics")


def votes(count: int, seed: int = 0, shares: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Uncertainties with many ties, and decisions that are wrong more often where it is high."""
    rng = np.random.default_rng(seed)
    uncertainty = rng.integers(0, shares, count) / shares
    return uncertainty, rng.random(count) > 0.6 * uncertainty


def all_orders(uncertainty: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Risk on the first 1, ..., N images, for every order in which uncertainty does not decrease; (orders, N)."""
    orders = (list(order) for order in itertools.permutations(range(len(loss))))
    risks = [
        np.cumsum(loss[order]) / np.arange(1, len(loss) + 1)
        for order in orders
        if (np.diff(uncertainty[order]) >= 0).all()
    ]
    return np.array(risks)


def predictions(count: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, count)
    weights = np.exp(rng.normal(size=(count, num_classes)) + 1.2 * np.eye(num_classes)[labels])
    return weights / weights.sum(1, keepdims=True), labels


class TestRiskCoverage(unittest.TestCase):
    def test_curve_by_hand(self):
        # uncertainty 0: right, right; 1: wrong, right, wrong; 3: wrong
        curve = risk_coverage_curve(torch.tensor([1, 0, 3, 1, 0, 1.0]), torch.tensor([0, 1, 0, 1, 1, 0]).bool())
        np.testing.assert_allclose(curve.coverage, [2 / 6, 5 / 6, 1])
        np.testing.assert_allclose(curve.risk, [0, 2 / 5, 3 / 6])
        np.testing.assert_array_equal(curve.thresholds, [0, 1, 3])
        self.assertEqual(curve.count, 6)
        # of four images, two are from the middle group, whose error rate is 2/3
        np.testing.assert_allclose(curve.risk_at([1 / 6, 4 / 6, 1]), [0, (2 * 2 / 3) / 4, 3 / 6])

    @parameterized.expand([(0, 3), (1, 2), (2, 4), (3, 1)])
    def test_ties_are_the_mean_over_all_their_orders(self, seed, shares):
        uncertainty, correct = votes(7, seed, shares)
        for right in (correct.astype(float), np.random.default_rng(seed).random(7)):  # also shares of right decisions
            risks = all_orders(uncertainty, 1 - right)
            for m in range(1, 8):
                self.assertAlmostEqual(accuracy_at_coverage(uncertainty, right, m / 7), 1 - risks[:, m - 1].mean())
            area = area_under_risk_coverage(uncertainty, right)
            self.assertAlmostEqual(area, risks.mean(), places=12)
            lowest = (np.sort(1 - right).cumsum() / np.arange(1, 8)).mean()
            self.assertAlmostEqual(excess_area_under_risk_coverage(uncertainty, right), area - lowest, places=12)

    def test_no_order_of_the_input_counts(self):
        uncertainty, correct = votes(200)
        order = np.argsort(correct, kind="stable")  # all wrong ones first
        for function in (area_under_risk_coverage, lambda u, c: accuracy_at_coverage(u, c, 0.33)):
            figures = [function(uncertainty[i], correct[i]) for i in (order, order[::-1], np.arange(200))]
            np.testing.assert_allclose(figures, figures[0], atol=1e-13)

    @parameterized.expand([(np.float32,), (np.float64,)])
    def test_rounding_does_not_break_ties(self, dtype):
        share = (np.arange(1, 11) / 11).astype(dtype)
        uncertainty = np.concatenate([share * (1 - share), (1 - share) * share, share[::-1] * (1 - share[::-1])])
        curve = risk_coverage_curve(uncertainty, np.ones(30))
        np.testing.assert_allclose(curve.coverage, np.arange(1, 6) / 5)
        # what differs by more than rounding is not tied, however small it is
        self.assertEqual(len(risk_coverage_curve([0, 1e-12, 2e-12, 1, 1 + 1e-5], np.ones(5)).coverage), 5)

    def test_best_worst_and_no_information(self):
        correct = np.repeat([1, 0], [60, 40])
        best, worst = np.arange(100), -np.arange(100)
        self.assertAlmostEqual(excess_area_under_risk_coverage(best, correct), 0, places=14)
        # r + (1 - r) log(1 - r) is its limit for many images (Geifman et al. 2019)
        self.assertAlmostEqual(area_under_risk_coverage(best, correct), 0.4 + 0.6 * np.log(0.6), delta=0.01)
        self.assertAlmostEqual(area_under_risk_coverage(np.zeros(100), correct), 0.4, places=12)
        self.assertGreater(area_under_risk_coverage(worst, correct), 0.4)
        self.assertEqual(accuracy_at_coverage(best, correct, 0.6), 1)
        self.assertEqual(accuracy_at_coverage(worst, correct, 0.4), 0)
        self.assertEqual(accuracy_at_coverage(best, np.ones(100), 0.001), 1)

    def test_only_the_order_of_uncertainty_counts(self):
        rng = np.random.default_rng(0)
        uncertainty, correct = rng.normal(size=50), rng.random(50) < 0.7
        self.assertAlmostEqual(
            area_under_risk_coverage(uncertainty, correct), area_under_risk_coverage(np.exp(uncertainty), correct)
        )

    @parameterized.expand(
        [
            ("empty", [], [], "risk_coverage_curve: finite uncertainty"),
            ("nan", [0, np.nan], [1, 1], "finite uncertainty"),
            ("shape", [[0, 1]], [[1, 1]], r"finite uncertainty \(N,\) .* got shape \(1, 2\)"),
            ("length", [0, 1], [1], r"correct must be \(2,\) .* got \(1,\)"),
            ("range", [0, 1], [1, 2], r"share in \[0, 1\]"),
            ("unknown", [0, 1], [1, np.nan], r"share in \[0, 1\]"),
        ]
    )
    def test_wrong_input(self, _, uncertainty, correct, message):
        with self.assertRaisesRegex(ValueError, message):
            risk_coverage_curve(uncertainty, correct)

    def test_errors_name_the_function(self):
        functions = {
            "area_under_risk_coverage": area_under_risk_coverage,
            "excess_area_under_risk_coverage": excess_area_under_risk_coverage,
        }
        for name, function in functions.items():
            with self.assertRaisesRegex(ValueError, f"^{name}: correct"):
                function([0, 1], [1])
        for coverage in (0, 1.01, np.nan):
            with self.assertRaisesRegex(ValueError, r"accuracy_at_coverage: coverage must lie in \(0, 1\]"):
                accuracy_at_coverage([0, 1], [1, 1], coverage)
            with self.assertRaisesRegex(ValueError, "RiskCoverageCurve.risk_at: coverage"):
                risk_coverage_curve([0, 1], [1, 1]).risk_at(coverage)


class TestAbstentionThreshold(unittest.TestCase):
    @parameterized.expand([(0.05,), (0.3,), (0.1 + 0.2,), (0.5,), (0.7,), (0.9,), (1.0,)])
    def test_smallest_that_covers(self, coverage):
        for values in (np.random.default_rng(0).normal(size=40), votes(40)[0]):
            threshold = abstention_threshold(torch.from_numpy(values), coverage)
            wanted = round(coverage * 40, 6)
            self.assertGreaterEqual((values <= threshold).sum(), wanted)
            self.assertIn(threshold, values)
            smaller = values[values < threshold]
            self.assertLess(len(smaller), wanted)  # the next threshold below covers too little

    def test_by_hand(self):
        self.assertEqual(abstention_threshold([3, 1, 1, 2], 0.5), 1)
        self.assertEqual(abstention_threshold([3, 1, 1, 2], 0.51), 2)
        self.assertEqual(abstention_threshold([3, 1, 1, 2], 0.1), 1)

    def test_covers_all_that_rounding_sets_apart(self):
        share = np.float32([0.3, 0.7])
        values = np.append(share * (1 - share), 1)
        self.assertEqual((values <= abstention_threshold(values, 0.5)).tolist(), [True, True, False])

    def test_wrong_input(self):
        with self.assertRaisesRegex(ValueError, "abstention_threshold: finite uncertainty"):
            abstention_threshold([], 0.5)
        with self.assertRaisesRegex(ValueError, r"abstention_threshold: coverage must lie in \(0, 1\], got 0"):
            abstention_threshold([1], 0)


class TestSelectiveReport(unittest.TestCase):
    @parameterized.expand([(2,), (4,)])
    def test_figures_are_those_of_the_single_functions(self, num_classes):
        p, y = predictions(150, num_classes)
        uncertainty = np.round(predictive_entropy(p), 1)  # with ties
        known = np.arange(150) % 7 > 0
        report = selective_report(p, uncertainty, np.where(known, y, -1), (1, 0.73, 0.4), bootstrap=0)
        correct = (p.argmax(1) == y)[known]
        for coverage, interval in zip((1, 0.73, 0.4), report.accuracy, strict=True):
            self.assertAlmostEqual(interval.value, accuracy_at_coverage(uncertainty[known], correct, coverage))
        self.assertAlmostEqual(report.aurc.value, area_under_risk_coverage(uncertainty[known], correct))
        self.assertAlmostEqual(report.e_aurc.value, excess_area_under_risk_coverage(uncertainty[known], correct))
        self.assertAlmostEqual(report.curve.area, report.aurc.value)
        self.assertEqual((report.count, report.ignored), (known.sum(), 150 - known.sum()))

    @parameterized.expand([(2,), (3,)])
    def test_full_coverage_is_the_accuracy_of_the_classification_report(self, num_classes):
        p, y = predictions(60, num_classes)
        p[:5] = 1 / num_classes  # undecided votes
        report = selective_report(torch.from_numpy(p), torch.rand(60), torch.from_numpy(y), bootstrap=0)
        self.assertAlmostEqual(
            report.accuracy[0].value, classification_report(p, y, bootstrap=0).accuracy.value, places=12
        )

    def test_given_decisions(self):
        p, y = predictions(80, 2)
        decided = (p[:, 1] >= 0.2).astype(int)
        report = selective_report(p, p.min(1), y, (0.9,), decided=decided, bootstrap=0)
        self.assertAlmostEqual(report.accuracy[0].value, (decided == y)[np.argsort(p.min(1))[:72]].mean())
        self.assertNotEqual(report.accuracy, selective_report(p, p.min(1), y, (0.9,), bootstrap=0).accuracy)

    def test_multi_label_counts_the_share_of_known_entries(self):
        p = np.array([[0.9, 0.2, 0.6], [0.1, 0.5, 0.4], [0.7, 0.7, 0.7], [0.3, 0.3, 0.3]])
        labels = np.array([[1, 0, 0], [0, 1, np.nan], [-1, 1, 0], [-1, -1, -1]])
        report = selective_report(p, [0, 1, 2, 3], labels, (1 / 3, 2 / 3, 1), bootstrap=0)
        np.testing.assert_allclose([part.value for part in report.accuracy], [2 / 3, 5 / 6, (2 / 3 + 1 + 1 / 2) / 3])
        self.assertEqual((report.count, report.ignored), (3, 1))
        other = selective_report(p, [0, 1, 2, 3], labels, (1,), decided=np.zeros((4, 3)), bootstrap=0)
        self.assertAlmostEqual(other.accuracy[0].value, (2 / 3 + 1 / 2 + 1 / 2) / 3)

    def test_intervals_are_those_of_images_drawn_one_by_one(self):
        p, y = predictions(120, 2)
        uncertainty = np.round(p.min(1), 1)
        report = selective_report(p, uncertainty, y, (0.6,), bootstrap=2000, seed=1)
        correct = (p.argmax(1) == y).astype(float)
        rng = np.random.default_rng(5)
        figures = []
        for drawn in rng.integers(0, 120, (400, 120)):
            curve = risk_coverage_curve(uncertainty[drawn], correct[drawn])
            best = risk_coverage_curve(-correct[drawn], correct[drawn])
            figures.append((1 - curve.risk_at(0.6), curve.area, curve.area - best.area))
        expected = np.quantile(figures, [0.025, 0.975], axis=0).T
        for interval, ends in zip((report.accuracy[0], report.aurc, report.e_aurc), expected, strict=True):
            np.testing.assert_allclose([interval.low, interval.high], ends, atol=0.15 * np.diff(ends)[0])

    def test_groups_that_repeat_an_image_widen_the_interval(self):
        p, y = predictions(60, 3)
        four = [np.repeat(part, 4, axis=0) for part in (p, p.min(1), y)]
        alone, grouped = (
            selective_report(*four, groups=keys, bootstrap=400) for keys in (None, np.repeat(np.arange(60), 4))
        )
        # four copies of an image say no more than one: the interval is that of 60 images
        once = selective_report(p, p.min(1), y, bootstrap=400).aurc
        width = grouped.aurc.high - grouped.aurc.low
        self.assertAlmostEqual(width / (once.high - once.low), 1, delta=0.2)
        self.assertLess(alone.aurc.high - alone.aurc.low, 0.65 * width)
        self.assertEqual((alone.bootstrap["drawn"], grouped.bootstrap["drawn"]), ("images", "groups"))

    def test_as_dict_and_table(self):
        p, y = predictions(50, 2)
        y[0] = -1
        report = selective_report(p, p.min(1), y, (1, 0.5), bootstrap=20)
        content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
        self.assertEqual(content["accuracy_at_coverage"][1], {"coverage": 0.5, **report.accuracy[1].as_dict()})
        self.assertEqual(content["aurc"]["value"], report.aurc.value)
        self.assertEqual((content["count"], content["ignored"], content["distinct_uncertainties"]), (49, 1, 49))
        lines = report.table().splitlines()
        self.assertEqual(lines[0], "49 images, 1 without a label left out; 49 distinct uncertainties")
        self.assertEqual(lines[2].split("  ")[0], "accuracy on 50 %")
        self.assertIn(str(report.accuracy[1]), lines[2])
        self.assertRegex(lines[4], rf"^E-AURC +{report.e_aurc.value:.4f} \({report.e_aurc.low:.4f} to ")
        self.assertNotIn("(", selective_report(p, p.min(1), y, bootstrap=0).table())

    @parameterized.expand(
        [
            ("coverage", {"coverages": (1, 0)}, r"coverage must lie in \(0, 1\]"),
            ("no_coverage", {"coverages": ()}, r"coverage must lie in \(0, 1\]"),
            ("uncertainty", {"uncertainty": [0.0]}, "1 uncertainties for 4 labels"),
            ("not_finite", {"uncertainty": [0, 1, 2, np.inf]}, "finite uncertainty"),
            ("logits", {"probabilities": np.full((4, 2), 3.0)}, "logits"),
            ("unlabelled", {"labels": [-1] * 4}, "none of the 4 images"),
            ("decided_shape", {"decided": [0, 1]}, r"decided must be \(4,\)"),
            ("decided_unknown", {"decided": [0, 1, -1, 0]}, "decided must be from 0 on"),
            ("groups", {"groups": [1]}, r"groups must be \(4,\)"),
            ("multi_label", {"multi_label": True}, "multi_label=True"),
        ]
    )
    def test_wrong_input(self, _, change, message):
        good = {"probabilities": np.full((4, 2), 0.5), "uncertainty": np.arange(4), "labels": [0, 1, 0, 1]}
        with self.assertRaisesRegex(ValueError, f"selective_report: .*{message}"):
            selective_report(**{**good, **change})


class TestBrierScore(unittest.TestCase):
    @unittest.skipUnless(has_sklearn, "scikit-learn is the oracle")
    def test_binary_is_the_score_of_scikit_learn(self):
        p, y = predictions(100, 2)
        known = np.where(np.arange(100) % 3 > 0, y, -1)
        expected = sklearn_metrics.brier_score_loss(y[known >= 0], p[known >= 0, 1])
        self.assertAlmostEqual(brier_score(p, torch.from_numpy(known)), expected, places=12)
        self.assertAlmostEqual(classification_report(p, known, bootstrap=0).brier.value, expected, places=12)

    def test_by_hand(self):
        p = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        self.assertAlmostEqual(brier_score(p[:1], [0]), 0.25 + 0.09 + 0.04, places=6)
        self.assertAlmostEqual(brier_score(p, [-1, 1, 2]), (0 + 2) / 2)  # the best and the worst there is
        labels = np.array([[1, 0, np.nan], [-1, 0, -1], [-1, -1, -1]])
        self.assertAlmostEqual(brier_score(p, labels), (0.25 + 0.09 + 1) / 3, places=6)

    @parameterized.expand([(2,), (5,)])
    def test_equals_the_classification_report(self, num_classes):
        p, y = predictions(70, num_classes)
        self.assertAlmostEqual(brier_score(p, y), classification_report(p, y, bootstrap=0).brier.value, places=12)

    def test_wrong_input(self):
        with self.assertRaisesRegex(ValueError, "brier_score: none of the 2 images"):
            brier_score([[0.5, 0.5]] * 2, [-1, -1])
        with self.assertRaisesRegex(ValueError, "brier_score: rows of probabilities must sum to 1"):
            brier_score([[0.5, 0.9]], [0])
        with self.assertRaisesRegex(ValueError, "brier_score: multi_label=False"):
            brier_score([[0.5, 0.9]], [[0, 1]], multi_label=False)


class TestBrierScoreMetric(unittest.TestCase):
    @parameterized.expand([(True, False), (False, False), (False, True)])
    def test_through_an_engine(self, decollate, multi_label):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(30, 3, generator=generator)
        labels = torch.randint(-1, 2, (30, 3) if multi_label else (30,), generator=generator)
        value = run(BrierScoreMetric(multi_label), in_batches(logits, labels), decollate)
        scores = logits.double().sigmoid() if multi_label else logits.double().softmax(1)
        self.assertAlmostEqual(value, brier_score(scores, labels), places=12)

    def test_without_labels(self):
        metric = BrierScoreMetric()
        metric(torch.zeros(2, 3), torch.full((2,), -1))
        self.assertTrue(np.isnan(metric.aggregate()))


class TestPredictiveEntropy(unittest.TestCase):
    def test_known_distributions(self):
        p = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
        np.testing.assert_allclose(predictive_entropy(p), [np.log(4), 0, np.log(2)], atol=1e-7)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # 0 log 0 is 0
            labels = predictive_entropy([[0.5, 0.5, 0.5], [0, 1, 0.5]], multi_label=True)
        np.testing.assert_allclose(labels, [np.log(2), np.log(2) / 3])

    def test_equals_torch(self):
        p, _ = predictions(20, 5)
        entropy = torch.distributions.Categorical(probs=torch.from_numpy(p)).entropy()
        np.testing.assert_allclose(predictive_entropy(p), entropy)
        binary = torch.distributions.Bernoulli(probs=torch.from_numpy(p)).entropy().mean(1)
        np.testing.assert_allclose(predictive_entropy(p, multi_label=True), binary)

    def test_wrong_input(self):
        with self.assertRaisesRegex(ValueError, "predictive_entropy: .*logits"):
            predictive_entropy([[3.0, -2.0]])
        with self.assertRaisesRegex(ValueError, "predictive_entropy: rows"):
            predictive_entropy([[0.9, 0.9]])


if __name__ == "__main__":
    unittest.main()
