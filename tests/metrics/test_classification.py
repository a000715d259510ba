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

import json
import time
import unittest

import numpy as np
import torch
from monai.metrics import ConfusionMatrixMetric, ROCAUCMetric
from monai.networks.utils import one_hot
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.metrics import area_under_roc, classification_report, macro_auc, roc_curve
from monai_jointdiff.metrics.bootstrap import resample_weights

sklearn_metrics, has_sklearn = optional_import("sklearn.metrics")

OVERALL = ["auc", "accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity", "ece", "brier"]


def predictions(count: int, num_classes: int, seed: int = 0, decimals: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities with ties and labels of all classes."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(num_classes), rng.integers(0, num_classes, count - num_classes)])
    logits = np.round(rng.normal(size=(count, num_classes)) + 1.2 * np.eye(num_classes)[labels], decimals - 1)
    weights = np.exp(logits)
    return weights / weights.sum(1, keepdims=True), labels


def multi_label_predictions(count: int, num_labels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, num_labels)) < 0.4).astype(np.int64)
    probabilities = np.clip(0.3 * labels + 0.6 * rng.random(labels.shape), 0, 1).round(2)
    labels[rng.random(labels.shape) < 0.25] = -1
    return probabilities, labels


@unittest.skipUnless(has_sklearn, "scikit-learn is the oracle")
class TestAgainstScikitLearn(unittest.TestCase):
    @parameterized.expand([(0.5,), (0.3,), (0.77,)])
    def test_binary(self, threshold):
        p, y = predictions(300, 2)
        report = classification_report(p, y, thresholds=threshold, bootstrap=0)
        decided = (p[:, 1] >= threshold).astype(int)
        expected = {
            "auc": sklearn_metrics.roc_auc_score(y, p[:, 1]),
            "accuracy": sklearn_metrics.accuracy_score(y, decided),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(y, decided),
            "f1": sklearn_metrics.f1_score(y, decided),
            "sensitivity": sklearn_metrics.recall_score(y, decided),
            "specificity": sklearn_metrics.recall_score(y, decided, pos_label=0),
            "brier": sklearn_metrics.brier_score_loss(y, p[:, 1]),
        }
        for name, value in expected.items():
            self.assertAlmostEqual(getattr(report, name).value, value, places=12, msg=name)
        self.assertAlmostEqual(
            report.per_class["1"]["precision"].value, sklearn_metrics.precision_score(y, decided), places=12
        )
        np.testing.assert_array_equal(report.confusion_matrix, sklearn_metrics.confusion_matrix(y, decided))

    @parameterized.expand([(3,), (7,)])
    def test_multi_class(self, num_classes):
        p, y = predictions(400, num_classes)
        report = classification_report(torch.from_numpy(p), torch.from_numpy(y), bootstrap=0)
        decided = p.argmax(1)
        hot = np.eye(num_classes)[y]
        expected = {
            "auc": sklearn_metrics.roc_auc_score(y, p, multi_class="ovr", average="macro"),
            "accuracy": sklearn_metrics.accuracy_score(y, decided),
            "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(y, decided),
            "f1": sklearn_metrics.f1_score(y, decided, average="macro"),
            "sensitivity": sklearn_metrics.recall_score(y, decided, average="macro"),
            "brier": ((p - hot) ** 2).sum(1).mean(),
        }
        for name, value in expected.items():
            self.assertAlmostEqual(getattr(report, name).value, value, places=12, msg=name)
        precision = sklearn_metrics.precision_score(y, decided, average=None)
        for k in range(num_classes):
            self.assertAlmostEqual(report.per_class[str(k)]["precision"].value, precision[k], places=12)
        np.testing.assert_array_equal(report.confusion_matrix, sklearn_metrics.confusion_matrix(y, decided))
        self.assertEqual(report.support, tuple(hot.sum(0).astype(int)))

    def test_multi_label_uses_known_entries_only(self):
        p, y = multi_label_predictions(300, 3)
        thresholds = [0.3, 0.5, 0.6]
        with_nan = np.where(y < 0, np.nan, y)
        report = classification_report(p, with_nan, thresholds, ["a", "b", "c"], bootstrap=0)
        per_label: dict[str, list[float]] = {name: [] for name in ("auc", "accuracy", "balanced_accuracy", "f1")}
        for k, name in enumerate("abc"):
            truth, scores = y[y[:, k] >= 0, k], p[y[:, k] >= 0, k]
            decided = (scores >= thresholds[k]).astype(int)
            per_label["auc"].append(sklearn_metrics.roc_auc_score(truth, scores))
            per_label["accuracy"].append(sklearn_metrics.accuracy_score(truth, decided))
            per_label["balanced_accuracy"].append(sklearn_metrics.balanced_accuracy_score(truth, decided))
            per_label["f1"].append(sklearn_metrics.f1_score(truth, decided))
            recall = sklearn_metrics.recall_score(truth, decided)
            self.assertAlmostEqual(report.per_class[name]["sensitivity"].value, recall, places=12)
        for name, values in per_label.items():
            self.assertAlmostEqual(getattr(report, name).value, np.mean(values), places=12, msg=name)
        known = y >= 0
        brier = sklearn_metrics.brier_score_loss(y[known], p[known])
        self.assertAlmostEqual(report.brier.value, brier, places=12)
        self.assertEqual(report.confusion_matrix, ())

    def test_roc_curve(self):
        p, y = predictions(200, 2)
        expected = sklearn_metrics.roc_curve(y, p[:, 1], drop_intermediate=False)
        for mine, theirs in zip(roc_curve(p[:, 1], y), expected, strict=True):
            np.testing.assert_allclose(mine, theirs)

    def test_area_with_many_ties(self):
        rng = np.random.default_rng(0)
        scores, y = rng.integers(-2, 3, 100).astype(float), rng.integers(0, 2, 100)
        self.assertAlmostEqual(area_under_roc(scores, y), sklearn_metrics.roc_auc_score(y, scores), places=12)


class TestAgainstMonai(unittest.TestCase):
    def test_macro_auc_and_specificity(self):
        p, y = predictions(150, 4)
        hot = one_hot(torch.from_numpy(y)[:, None], num_classes=4)
        area = ROCAUCMetric()
        area(torch.from_numpy(p), hot)
        self.assertAlmostEqual(macro_auc(p, y), area.aggregate(), places=10)
        decided = one_hot(torch.from_numpy(p.argmax(1))[:, None], num_classes=4)
        matrix = ConfusionMatrixMetric(metric_name="specificity", reduction="sum_batch")
        matrix(decided, hot)
        report = classification_report(p, y, bootstrap=0)
        self.assertAlmostEqual(report.specificity.value, matrix.aggregate()[0].mean().item(), places=5)


class TestIntervals(unittest.TestCase):
    @parameterized.expand([("binary", 2, {}), ("multi-class", 3, {}), ("stratified", 3, {"stratified": True})])
    def test_intervals_equal_those_of_reports_on_repeated_images(self, _, num_classes, options):
        p, y = predictions(80, num_classes)
        report = classification_report(p, y, bootstrap=40, seed=5, **options)
        (drawn,) = resample_weights(80, 40, 5, strata=y if options else None)
        repeated = [np.repeat(np.arange(80), row.astype(int)) for row in drawn]
        again = [classification_report(p[rows], y[rows], bootstrap=0) for rows in repeated]
        for name in OVERALL:
            values = np.array([getattr(one, name).value for one in again])
            interval = getattr(report, name)
            low, high = np.quantile(values, [0.025, 0.975])
            if name == "ece":
                shift = values.mean() - interval.value
                low, high = max(0, low - shift), max(0, high - shift)
            self.assertAlmostEqual(interval.low, low, places=10, msg=name)
            self.assertAlmostEqual(interval.high, high, places=10, msg=name)

    def test_multi_label_intervals(self):
        p, y = multi_label_predictions(80, 3)
        report = classification_report(p, y, bootstrap=30, seed=1)
        (drawn,) = resample_weights(80, 30, 1)
        repeated = [np.repeat(np.arange(80), row.astype(int)) for row in drawn]
        values = [classification_report(p[rows], y[rows], bootstrap=0).f1.value for rows in repeated]
        np.testing.assert_allclose([report.f1.low, report.f1.high], np.quantile(values, [0.025, 0.975]))

    def test_groups_of_copies_give_the_interval_of_the_originals(self):
        p, y = predictions(60, 2)
        plain = classification_report(p, y, bootstrap=50)
        copies = classification_report(
            np.repeat(p, 3, axis=0), np.repeat(y, 3), bootstrap=50, groups=np.repeat(np.arange(60), 3)
        )
        self.assertAlmostEqual(plain.auc.low, copies.auc.low, places=12)
        self.assertAlmostEqual(plain.brier.high, copies.brier.high, places=12)

    def test_thousand_resamples_of_624_images_are_fast(self):
        p, y = predictions(624, 2)
        start = time.perf_counter()
        classification_report(p, y, bootstrap=1000)
        self.assertLess(time.perf_counter() - start, 3)


class TestReport(unittest.TestCase):
    def test_unlabelled_images_change_nothing(self):
        p, y = predictions(90, 3)
        more, unlabelled = np.concatenate([p, p[:10]]), np.concatenate([y, np.full(10, -1)])
        plain, report = (classification_report(*pair, bootstrap=20) for pair in ((p, y), (more, unlabelled)))
        self.assertEqual(plain.overall, report.overall)
        self.assertEqual((report.count, report.ignored), (90, 10))
        self.assertIn("10 without a label", report.table())

    def test_json_has_no_nan_where_a_class_is_missing(self):
        p, y = predictions(60, 3)
        report = classification_report(p[y != 2], y[y != 2], class_names=["a", "b", "c"], bootstrap=20)
        content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
        self.assertIsNone(content["per_class"]["c"]["auc"]["value"])
        self.assertEqual(content["per_class"]["c"]["auc"]["reason"], "needs images with and without the class")
        self.assertIn("'c'", content["notes"][0])
        areas = [content["per_class"][name]["auc"]["value"] for name in "ab"]
        self.assertAlmostEqual(content["auc"]["value"], np.mean(areas), places=12)

    def test_one_class_only(self):
        p, y = predictions(40, 2)
        report = classification_report(p[y == 1], y[y == 1], bootstrap=20)
        self.assertIsNone(report.auc.value)
        self.assertIsNone(report.specificity.value)
        self.assertIsNotNone(report.accuracy.value)
        json.dumps(report.as_dict(), allow_nan=False)
        self.assertIn("- (", report.table())

    def test_perfect_predictions(self):
        y = np.array([0, 1, 1, 0, 1, 0])
        report = classification_report(np.eye(2)[y], y, bootstrap=50, stratified=True)
        for name, interval in report.overall.items():
            best = 0 if name in ("ece", "brier") else 1
            self.assertEqual((interval.value, interval.low, interval.high), (best, best, best), msg=name)

    def test_table_shows_every_figure_and_count(self):
        p, y = predictions(120, 3)
        report = classification_report(p, y, class_names=["one", "two", "three"], bootstrap=20)
        text = report.table()
        for interval in report.overall.values():
            self.assertIn(str(interval), text)
        for name, row in zip(report.class_names, report.confusion_matrix, strict=True):
            self.assertRegex(text, rf"{name} +" + " +".join(map(str, row)))

    @parameterized.expand(
        [
            ("logits", [[2.0, -1.0]], [0], {}, "were logits given"),
            ("nan", [[np.nan, 0.5]], [0], {}, "finite"),
            ("sum", [[0.9, 0.9]], [0], {}, "sum to 1"),
            ("one_column", [[0.9]], [0], {}, r"K >= 2"),
            ("rows", [[0.5, 0.5]], [0, 1], {}, "1 rows of probabilities for 2 labels"),
            ("label_range", [[0.5, 0.5]], [2], {}, "from -1 .unknown. to 1, got 2"),
            ("fraction", [[0.5, 0.5]], [0.5], {}, "whole numbers"),
            ("entry", [[0.5, 0.5]], [[0, 2]], {}, "to 1, got 2"),
            ("columns", [[0.5, 0.5]], [[0, 1, 1]], {}, "3 columns for 2 classes"),
            ("said_multi_label", [[0.5, 0.5]], [0], {"multi_label": True}, "goes with labels"),
            ("none_known", [[0.5, 0.5]], [-1], {}, "none of the 1 images"),
            ("empty", np.zeros((0, 2)), np.zeros(0), {}, "no images"),
            ("thresholds", [[0.5, 0.5]], [1], {"thresholds": [0.5, 0.5]}, "takes 1 in"),
            ("threshold_range", [[0.5, 0.5]], [1], {"thresholds": 1.5}, "takes 1 in"),
            ("multi_class", [[0.5, 0.3, 0.2]], [1], {"thresholds": 0.5}, "largest probability"),
            ("names", [[0.5, 0.5]], [1], {"class_names": ["a"]}, "2 distinct class names"),
            ("same_names", [[0.5, 0.5]], [1], {"class_names": ["a", "a"]}, "2 distinct class names"),
            ("groups", [[0.5, 0.5]], [1], {"groups": [1, 2]}, "groups must be"),
            ("strata", [[0.5, 0.5]], [[1, 0]], {"stratified": True}, "stratified goes"),
            ("bins", [[0.5, 0.5]], [1], {"num_bins": 0}, "num_bins"),
        ]
    )
    def test_wrong_input(self, _, probabilities, labels, options, message):
        with self.assertRaisesRegex(ValueError, message):
            classification_report(np.asarray(probabilities), np.asarray(labels), **options)

    def test_areas_of_missing_classes(self):
        self.assertTrue(np.isnan(area_under_roc([0.1, 0.2], [1, 1])))
        self.assertTrue(np.isnan(area_under_roc([], [])))
        self.assertTrue(np.isnan(macro_auc([[0.1, 0.9]], [-1])))
        self.assertEqual(macro_auc([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]], [[0, -1], [1, 1], [0, 0]]), 0.5)
        with self.assertRaisesRegex(ValueError, "both classes"):
            roc_curve([0.1, 0.2], [1, 1])
        with self.assertRaisesRegex(ValueError, "finite scores"):
            area_under_roc([0.1, np.nan], [1, 0])


if __name__ == "__main__":
    unittest.main()
