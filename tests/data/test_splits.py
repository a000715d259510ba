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


"""Parts: no patient in two of them, every label in all of them, the same for the same seed."""

from __future__ import annotations

import unittest
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from parameterized import parameterized

from monai_jointdiff.data import canonical_part, complete_parts

SHARES = {"train": 0.65, "val": 0.15, "test": 0.2}


def parts_of_patients(parts: Sequence[str], groups: Sequence[Any]) -> dict[Any, set[str]]:
    found = defaultdict(set)
    for part, group in zip(parts, groups, strict=True):
        found[group].add(part)
    return found


class TestCanonicalPart(unittest.TestCase):
    @parameterized.expand(
        [
            ("train", ["train", "training", "Train", " TRAINING "]),
            ("val", ["val", "valid", "validation", "dev", "Validation"]),
            ("test", ["test", "testing", "TEST"]),
        ]
    )
    def test_names_in_use(self, part: str, names: list[str]) -> None:
        self.assertEqual({canonical_part(name) for name in names}, {part})

    @parameterized.expand([("tset",), ("",), ("holdout",), ("0",)])
    def test_other_names_are_refused(self, name: str) -> None:
        with self.assertRaisesRegex(ValueError, f"'{name}' is no part of a data set; right are train, training"):
            canonical_part(name)


class TestCompleteParts(unittest.TestCase):
    @parameterized.expand([(0,), (1,), (7,)])
    def test_each_part_gets_its_share_of_every_label(self, seed: int) -> None:
        labels = [0] * 200 + [1] * 61 + [2] * 20 + [-1] * 40
        parts = complete_parts([None] * len(labels), labels, seed=seed)
        counts = Counter(zip(labels, parts, strict=True))
        for label, total in Counter(labels).items():
            for part, share in SHARES.items():
                self.assertLessEqual(abs(counts[label, part] - share * total), 1.0, (label, part))

    def test_labels_of_several_classes(self) -> None:
        labels = [(0.0, 1.0), (1.0, 1.0)] * 50
        counts = Counter(zip(labels, complete_parts([None] * 100, labels), strict=True))
        for label in set(labels):
            for part, share in SHARES.items():
                self.assertLessEqual(abs(counts[label, part] - share * 50), 1.0)

    @parameterized.expand([(200, 10, 0.3), (200, 10, 0.05), (2000, 14, 0.1), (20, 5, 0.25)])
    def test_each_label_of_several_is_divided_as_all_images_are(self, count: int, labels: int, share: float) -> None:
        entries = (np.random.default_rng(count).random((count, labels)) < share).astype(int)
        parts = np.array(complete_parts([None] * count, [tuple(row) for row in entries.tolist()]))
        for part, part_share in SHARES.items():
            chosen = parts == part
            self.assertLessEqual(abs(chosen.sum() - part_share * count), 1.0, part)
            self.assertLessEqual(np.abs(entries[chosen].sum(0) - part_share * entries.sum(0)).max(), 5.0, part)

    def test_patients_with_several_labels(self) -> None:
        generator = np.random.default_rng(0)
        entries, groups = (generator.random((600, 8)) < 0.2).astype(int), generator.integers(0, 200, 600).tolist()
        parts = complete_parts([None] * 600, [tuple(row) for row in entries.tolist()], groups)
        self.assertEqual({len(found) for found in parts_of_patients(parts, groups).values()}, {1})
        for part, share in SHARES.items():
            chosen = np.array(parts) == part
            self.assertLessEqual(abs(chosen.sum() - share * 600), max(Counter(groups).values()))
            self.assertLessEqual(np.abs(entries[chosen].sum(0) - share * entries.sum(0)).max(), 8.0)

    @parameterized.expand([(20, 4), (10, 3), (2, 4), (7, 2), (30, 1)])
    def test_small_classes_share_the_parts(self, classes: int, images: int) -> None:
        count = classes * images
        labels = [n % classes for n in range(count)]
        for seed in range(3):
            parts = complete_parts([None] * count, labels, seed=seed)
            for part, share in SHARES.items():
                self.assertLessEqual(abs(parts.count(part) - share * count), 1.0, part)
            within = Counter(zip(labels, parts, strict=True))
            for label in range(classes):
                for part, share in SHARES.items():
                    self.assertLess(abs(within[label, part] - share * images), 1.0 + 1e-9, (label, part))

    def test_unlabelled_images_are_divided_too(self) -> None:
        labels = [(-1.0, -1.0)] * 60 + [(1.0, 0.0)] * 20 + [(0.0, 1.0)] * 20
        counts = Counter(zip(labels, complete_parts([None] * 100, labels), strict=True))
        for label, total in Counter(labels).items():
            for part, share in SHARES.items():
                self.assertLessEqual(abs(counts[label, part] - share * total), 1.0, (label, part))

    @parameterized.expand([(0,), (1,), (2,), (3,)])
    def test_patients_stay_together_and_shares_stay_near(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        groups = [f"p{n}" for n in generator.integers(0, 80, 600)]
        labels = generator.integers(0, 2, 600).tolist()
        parts = complete_parts([None] * 600, labels, groups, seed)
        self.assertEqual({len(found) for found in parts_of_patients(parts, groups).values()}, {1})
        largest = max(Counter(groups).values())
        counts = Counter(zip(labels, parts, strict=True))
        for label, total in Counter(labels).items():
            for part, share in SHARES.items():
                self.assertLessEqual(abs(counts[label, part] - share * total), largest)

    def test_patients_of_one_class_each_are_stratified(self) -> None:
        groups = [n // 5 for n in range(500)]
        labels = [int(group >= 60) for group in groups]
        counts = Counter(zip(labels, complete_parts([None] * 500, labels, groups), strict=True))
        for label, total in Counter(labels).items():
            for part, share in SHARES.items():
                self.assertLessEqual(abs(counts[label, part] - share * total), 5)

    @parameterized.expand([(seed,) for seed in range(5)])
    def test_a_large_patient_is_made_up_for_by_small_ones(self, seed: int) -> None:
        groups = ["large"] * 60 + list(range(40))
        parts = complete_parts([None] * 100, [0] * 100, groups, seed)
        self.assertEqual(parts[:60], ["train"] * 60)
        counts = Counter(parts)
        self.assertEqual([counts[part] for part in SHARES], [65, 15, 20])

    def test_images_without_a_known_patient_are_on_their_own(self) -> None:
        """They must not travel as one huge patient."""
        groups = ["a"] * 4 + [None] * 96
        parts = complete_parts([None] * 100, [0] * 100, groups)
        self.assertEqual(len(set(parts[:4])), 1)
        counts = Counter(parts)
        self.assertEqual([counts[part] for part in SHARES], [65, 15, 20])

    def test_seed_decides(self) -> None:
        labels = [n % 3 for n in range(100)]
        one, two, other = (complete_parts([None] * 100, labels, seed=seed) for seed in (5, 5, 6))
        self.assertEqual(one, two)
        self.assertNotEqual(one, other)

    def test_chosen_images_are_not_the_first_ones(self) -> None:
        tests = np.flatnonzero(np.array(complete_parts([None] * 1000, [0] * 1000)) == "test")
        self.assertAlmostEqual(tests.mean(), 499.5, delta=5 * 1000 / np.sqrt(12 * 200))

    def test_given_parts_stay(self) -> None:
        given = ["train"] * 60 + ["val"] * 10 + ["test"] * 30
        self.assertEqual(complete_parts(given, [0] * 100), given)

    @parameterized.expand([("val", 15), ("test", 20)])
    def test_only_the_missing_part_is_taken_from_training(self, missing: str, expected: int) -> None:
        other = {"val": "test", "test": "val"}[missing]
        given = ["train"] * 100 + [other] * 40
        parts = complete_parts(given, [0] * 140)
        self.assertEqual(parts[100:], given[100:])
        self.assertEqual(Counter(parts[:100]), {"train": 100 - expected, missing: expected})

    def test_images_without_a_part_train(self) -> None:
        given = ["train", None, "val", "test", None]
        self.assertEqual(complete_parts(given, [0] * 5), ["train", "train", "val", "test", "train"])

    def test_images_without_a_part_follow_their_patient(self) -> None:
        given = ["test", None, "val", None, "train", None, None]
        groups = ["a", "a", "b", "b", "c", "c", "d"]
        expected = ["test", "test", "val", "val", "train", "train", "train"]
        self.assertEqual(complete_parts(given, [0] * 7, groups), expected)

    def test_nothing_to_train_on_is_left_as_it_is(self) -> None:
        self.assertEqual(complete_parts(["test"] * 10, [0] * 10), ["test"] * 10)

    def test_no_part_is_demanded_with_share_zero(self) -> None:
        parts = complete_parts([None] * 20, [0] * 20, val_fraction=0.0, test_fraction=0.5)
        self.assertEqual(Counter(parts), {"train": 10, "test": 10})

    def test_patient_in_two_given_parts_is_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "patient 'b' has images in the train and in the test part"):
            complete_parts(["train", "train", "test"], [0, 0, 0], ["a", "b", "b"])

    @parameterized.expand([(0.5, 0.5), (-0.1, 0.2), (0.2, -0.1), (0.0, 1.0)])
    def test_wrong_fractions(self, val: float, test: float) -> None:
        with self.assertRaisesRegex(ValueError, f"together below 1, got {val} and {test}"):
            complete_parts([None] * 4, [0] * 4, val_fraction=val, test_fraction=test)


if __name__ == "__main__":
    unittest.main()
