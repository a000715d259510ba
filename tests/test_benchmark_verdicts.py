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

"""Targets of the benchmarks: met or missed, in words."""

from __future__ import annotations

import unittest

from parameterized import parameterized

from benchmarks import joint_vs_single, main_job, speed
from benchmarks.common import Cell, CellStore
from tests.bundles.runs import temporary_folder


class TestMainJob(unittest.TestCase):
    @parameterized.expand(
        [
            ((5.9, 0.95, 0.84, 0.05), ("met (5.9 on 2 thread(s))", "met (0.950, 0.840)", "met (0.0500, 0.0977)")),
            ((6.1, 0.94, 0.84, 0.10), ("MISSED (6.1 on", "MISSED (0.940, 0.840)", "MISSED (0.1000, 0.0977)")),
            ((6.0, 0.99, 0.85, 0.05), ("met (6.0 on", "MISSED (0.990, 0.850)", "met (0.0500, 0.0977)")),
        ]
    )
    def test_each_target(self, figures: tuple[float, ...], words: tuple[str, ...]) -> None:
        names = (
            "minutes",
            "test auc",
            "test auc of PCA + logistic regression (floor)",
            "Frechet distance to test images: samples of the model",
        )
        gaussian = {"Frechet distance to test images: draws from a Gaussian fitted to the training pixels": 0.0977}
        text = main_job.verdicts({**dict(zip(names, figures, strict=True)), **gaussian}, threads=2)
        for word in words:
            self.assertIn(word, text)


class TestSpeed(unittest.TestCase):
    @parameterized.expand([(2.0, "the first of these: met."), (1.66, "the first of these: MISSED (1.66 x).")])
    def test_target(self, ratio: float, words: str) -> None:
        seconds = {variant.label: [ratio] * 3 for variant in speed.VARIANTS} | {speed.OURS.label: [1.0] * 3}
        self.assertTrue(any(note.endswith(words) for note in speed.ratio_notes(seconds)))


class TestJointAgainstSingle(unittest.TestCase):
    def store(self, auc: float, minutes: float, weights: tuple[float, ...]) -> CellStore:
        store = CellStore("joint_vs_single", {}, temporary_folder(self))
        for seed, weight in enumerate(weights):
            values = {
                "joint": {"auc": auc, "accuracy": 0.9, "minutes": minutes},
                "classifier": {"classification_weight": weight},
            }
            for method, found in values.items():
                store.run_missing([Cell(joint_vs_single.DATA, method, seed)], lambda _, found=found: found)
        return store

    @parameterized.expand([(0.98, 20.0, "met", "met"), (0.979, 20.1, "MISSED", "MISSED")])
    def test_targets(self, auc: float, minutes: float, of_auc: str, of_minutes: str) -> None:
        quality, budget = joint_vs_single.targets(self.store(auc, minutes, (0.005, 0.005)), (0, 1))
        self.assertIn(f"AUC at least 0.98: {of_auc} ({auc:.3f}). Accuracy at least 0.89: met (0.900).", quality)
        self.assertIn(f"20 minutes on 2 cores: {of_minutes} ({minutes:.1f}, {minutes:.1f} minutes", budget)

    def test_controls_of_unequal_weight_are_named(self) -> None:
        (note,) = joint_vs_single.control_notes(self.store(0.98, 20, (0.05, 0.005)), (0, 1))
        self.assertTrue(note.endswith("0.05 (seed 0), 0.005 (seed 1)."))
        self.assertEqual(joint_vs_single.control_notes(self.store(0.98, 20, (0.005, 0.005)), (0, 1)), [])


if __name__ == "__main__":
    unittest.main()
