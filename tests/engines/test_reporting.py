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


"""From predictions to decision, files and pictures."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import unittest
from dataclasses import replace
from pathlib import Path

import numpy as np
from parameterized import parameterized

from monai_jointdiff.data import encode_labels, read_image
from monai_jointdiff.engines import (
    ClassificationReporter,
    Decision,
    ModelDescription,
    choose_decision,
    write_predictions_csv,
)
from monai_jointdiff.handlers import Predictions
from monai_jointdiff.metrics import choose_threshold, classification_report, fit_temperature
from tests.bundles.runs import temporary_folder

BINARY = ModelDescription({}, {}, {"class_names": ["no", "yes"], "multi_label": False}, Decision(2.0, [0.3], "x"))
THREE = ModelDescription({}, {}, {"class_names": ["a", "b", "c"], "multi_label": False})
SEVERAL = ModelDescription({}, {}, {"class_names": ["a", "b"], "multi_label": True}, Decision(1.0, [0.5, 0.2], "x"))


def predictions(classes: int, count: int = 60, unlabelled: int = 7, seed: int = 0) -> Predictions:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    logits = generator.normal(size=(count, classes)) * 2 + 1.5 * np.eye(classes)[labels]
    labels[generator.permutation(count)[:unlabelled]] = -1
    return Predictions([f"p/{n}.png" for n in range(count)], logits, labels)


def several(count: int = 60, seed: int = 0) -> Predictions:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, (count, 2))
    logits = generator.normal(size=(count, 2)) + 2 * labels - 1
    labels[generator.random(labels.shape) < 0.2] = -1
    return Predictions([f"{n}" for n in range(count)], logits, labels)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


class TestDecision(unittest.TestCase):
    def test_binary(self) -> None:
        given = predictions(2)
        decision = choose_decision(given, False, "these")
        known = given.labels >= 0
        self.assertEqual(decision.temperature, fit_temperature(given.logits[known], given.labels[known]))
        probabilities = decision.probabilities(given.logits[known])
        self.assertEqual(decision.thresholds, [choose_threshold(probabilities[:, 1], given.labels[known])])
        self.assertEqual(decision.chosen_on, "these (53 images)")

    def test_unlabelled_images_change_nothing(self) -> None:
        given = predictions(2)
        self.assertEqual(choose_decision(given, False, "x"), choose_decision(given.labelled(), False, "x"))

    def test_three_classes_have_no_threshold(self) -> None:
        self.assertIsNone(choose_decision(predictions(3), False, "these").thresholds)

    def test_several_labels(self) -> None:
        given = several()
        decision = choose_decision(given, True, "these")
        assert decision.thresholds is not None
        probabilities = decision.probabilities(given.logits, True)
        for k in range(2):
            known = given.labels[:, k] >= 0
            expected = choose_threshold(probabilities[known, k], given.labels[known, k])
            self.assertEqual(decision.thresholds[k], expected)

    def test_label_that_is_always_the_same_keeps_one_half(self) -> None:
        given = several()
        given.labels[:, 1] = np.minimum(given.labels[:, 1], 0)
        decision = choose_decision(given, True, "these")
        assert decision.thresholds is not None
        self.assertEqual(decision.thresholds[1], 0.5)

    @parameterized.expand([(-1,), (0,), (1,)])
    def test_fewer_than_two_classes_leave_the_network_as_it_is(self, label: int) -> None:
        given = predictions(2)
        given.labels[:] = label
        decision = choose_decision(given, False, "these")
        self.assertEqual((decision.temperature, decision.thresholds), (1.0, None))
        self.assertIn("fewer than two labelled classes", decision.chosen_on)


class TestPredictionsCsv(unittest.TestCase):
    def test_holds_calibrated_probabilities_and_decisions(self) -> None:
        path = temporary_folder(self) / "predictions.csv"
        given = predictions(2)
        write_predictions_csv(given, BINARY, path)
        found = rows(path)
        self.assertEqual([row["image"] for row in found], given.names)
        expected = 1 / (1 + np.exp((given.logits[:, 0] - given.logits[:, 1]) / 2.0))
        probability = np.array([float(row["probability_yes"]) for row in found])
        np.testing.assert_allclose(probability, expected, atol=1e-6)
        self.assertEqual([row["prediction"] == "yes" for row in found], (expected >= 0.3).tolist())
        self.assertEqual([row["label"] for row in found], [["no", "yes", ""][label] for label in given.labels])

    def test_without_any_label_has_no_such_column(self) -> None:
        path = temporary_folder(self) / "predictions.csv"
        given = predictions(3)
        write_predictions_csv(replace(given, labels=np.full(60, -1)), THREE, path)
        header = ["image", "probability_a", "probability_b", "probability_c", "prediction"]
        self.assertEqual(list(rows(path)[0]), header)

    def test_several_labels_are_joined(self) -> None:
        path = temporary_folder(self) / "predictions.csv"
        given = Predictions(["x,1", "y"], np.array([[3.0, 3.0], [-3.0, -3.0]]), np.array([[1, 1], [-1, 0]]))
        write_predictions_csv(given, SEVERAL, path)
        found = rows(path)
        self.assertEqual([row["image"] for row in found], ["x,1", "y"])
        self.assertEqual([row["prediction"] for row in found], ["a|b", "no finding"])
        self.assertEqual([row["label"] for row in found], ["a|b", ""])

    def test_no_finding_and_unknown_are_read_back_as_they_are(self) -> None:
        path = temporary_folder(self) / "predictions.csv"
        labels = [[0.0, 0.0], [-1.0, -1.0], [0.0, 1.0], [1.0, 1.0]]
        given = Predictions(["p", "q", "r", "s"], np.array([[-9.0, -9.0]] * 4), np.array(labels))
        write_predictions_csv(given, SEVERAL, path)
        found = rows(path)
        for names in (None, ["a", "b"]):
            read = encode_labels([row["label"] for row in found], names, given.names)
            self.assertEqual((read.labels, read.class_names), (labels, ["a", "b"]))
        decided = encode_labels([row["prediction"] for row in found], ["a", "b"], given.names, multi_label=True)
        self.assertEqual(decided.labels, [[0.0, 0.0]] * 4)


class TestReporter(unittest.TestCase):
    def report(self, description: ModelDescription, given: Predictions, bootstrap: int = 20) -> tuple[Path, str]:
        folder = temporary_folder(self)
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            ClassificationReporter(description, folder, "test", bootstrap=bootstrap, seed=3)(given)
        return folder, text.getvalue()

    @parameterized.expand([("binary", BINARY, 2), ("three", THREE, 3)])
    def test_writes_the_report_of_labelled_images(self, _: str, description: ModelDescription, classes: int) -> None:
        given = predictions(classes)
        folder, text = self.report(description, given)
        names = {"metrics.json", "predictions.csv", "roc.png", "reliability.png", "risk_coverage.png", "confusion.png"}
        self.assertEqual({path.name for path in folder.iterdir()}, names)
        content = json.loads((folder / "metrics.json").read_text())
        known = given.labels >= 0
        expected = classification_report(
            description.decision.probabilities(given.logits[known]),
            given.labels[known],
            thresholds=description.decision.thresholds,
            class_names=description.class_names,
            bootstrap=20,
            seed=3,
        )
        self.assertEqual(content["metrics"], json.loads(json.dumps(expected.as_dict())))
        self.assertEqual(content["decision"], vars(description.decision))
        self.assertEqual(content["part"], "test")
        self.assertIn(expected.table(), text)
        p = description.decision.probabilities(given.logits[known])
        right = description.decision.classes(p) == given.labels[known]
        entropy = -(p * np.log(p)).sum(axis=1)
        half = right[np.argsort(entropy)[: len(right) // 2]].mean()  # no two entropies are the same
        found = {row["coverage"]: row["value"] for row in content["selective"]["accuracy_at_coverage"]}
        self.assertAlmostEqual(found[1.0], right.mean())
        if len(right) % 2 == 0:
            self.assertAlmostEqual(found[0.5], half)
        self.assertEqual(len(rows(folder / "predictions.csv")), 60)
        for path in folder.glob("*.png"):
            self.assertGreater(read_image(path).std(), 0)

    def test_intervals_are_those_of_whole_patients(self) -> None:
        given = predictions(2, count=36, unlabelled=0)
        patients = [f"p{n}" for n in range(36)]
        tripled = Predictions(given.names * 3, np.tile(given.logits, (3, 1)), np.tile(given.labels, 3), patients * 3)
        folder, text = self.report(BINARY, tripled, bootstrap=1000)
        single, plain = self.report(BINARY, given, bootstrap=1000)
        found, expected = (json.loads((f / "metrics.json").read_text()) for f in (folder, single))
        self.assertEqual(found["metrics"]["bootstrap"]["drawn"], "groups")
        self.assertEqual(found["selective"]["bootstrap"]["drawn"], "groups")
        for figure in ("auc", "accuracy", "brier"):  # an image three times tells no more than once
            widths = [c["metrics"][figure]["high"] - c["metrics"][figure]["low"] for c in (found, expected)]
            self.assertAlmostEqual(widths[0] / widths[1], 1, delta=0.2)  # 0.58 were they independent
            self.assertAlmostEqual(found["metrics"][figure]["value"], expected["metrics"][figure]["value"])
        self.assertIn("note: intervals are those of 36 resampled patients", text)
        self.assertNotIn("patients", plain)

    def test_few_patients_have_no_intervals(self) -> None:
        given = predictions(2, count=36, unlabelled=0)
        for count, has_interval in ((9, False), (10, True)):
            folder, text = self.report(BINARY, replace(given, patients=[f"p{n % count}" for n in range(36)]))
            found = json.loads((folder / "metrics.json").read_text())
            figures = [found["metrics"]["auc"], found["selective"]["aurc"]]
            self.assertEqual([figure["low"] is not None for figure in figures], [has_interval] * 2)
            self.assertEqual("note: 9 patients are too few for intervals (at least 10)" in text, not has_interval)

    def test_all_parts_are_called_so(self) -> None:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            ClassificationReporter(BINARY, temporary_folder(self), "all", bootstrap=0)(predictions(2))
        self.assertIn("\nall parts\n", text.getvalue())

    def test_several_labels_have_no_confusion_matrix(self) -> None:
        folder, _ = self.report(SEVERAL, several())
        names = {"metrics.json", "predictions.csv", "roc.png", "reliability.png", "risk_coverage.png"}
        self.assertEqual({path.name for path in folder.iterdir()}, names)

    def test_a_part_with_one_class_has_no_roc_curve(self) -> None:
        given = predictions(2)
        folder, _ = self.report(BINARY, replace(given, labels=np.ones_like(given.labels)))
        names = {"metrics.json", "predictions.csv", "reliability.png", "risk_coverage.png", "confusion.png"}
        self.assertEqual({path.name for path in folder.iterdir()}, names)

    def test_description_may_come_later(self) -> None:
        folder = temporary_folder(self)
        with contextlib.redirect_stdout(io.StringIO()):
            ClassificationReporter(lambda: BINARY, folder, bootstrap=0)(predictions(2))
        self.assertTrue((folder / "metrics.json").is_file())

    def test_without_labels_is_refused_but_predictions_are_written(self) -> None:
        folder = temporary_folder(self)
        given = replace(predictions(2), labels=np.full(60, -1))
        with self.assertRaisesRegex(ValueError, "no image of the val part has a label"):
            ClassificationReporter(BINARY, folder, "val")(given)
        self.assertEqual(len(rows(folder / "predictions.csv")), 60)


if __name__ == "__main__":
    unittest.main()
