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

"""Which training images keep their label, and the list that says so."""

from __future__ import annotations

import tempfile
import unittest
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from monai.data import DataLoader, Dataset
from parameterized import parameterized
from PIL import Image

from monai_jointdiff.data import (
    choose_labelled,
    labelled_names,
    labels_fingerprint,
    open_source,
    open_with_few_labels,
    write_label_list,
)

PHANTOMS = {"image_size": 16, "phantom_counts": (60, 6, 6)}


def labels_of(counts: dict[int, int], seed: int = 0) -> np.ndarray:
    """So many images of each class, in random order."""
    return np.random.default_rng(seed).permutation(np.repeat(list(counts), list(counts.values())))


def findings(count: int = 400) -> np.ndarray:
    """Four findings of very different frequency, some images without any, some entries unknown, some images wholly."""
    generator = np.random.default_rng(1)
    array = (generator.random((count, 4)) < [0.5, 0.2, 0.1, 0.03]).astype(float)
    array[generator.random((count, 4)) < 0.05] = -1
    array[:20] = -1
    return array


class TestOneClassPerImage(unittest.TestCase):
    @parameterized.expand([(10,), (33,), (100,), (500,)])
    def test_shares_are_proportional_up_to_rounding(self, count: int) -> None:
        numbers = {0: 600, 1: 300, 2: 100, -1: 200}
        labels = labels_of(numbers)
        found = Counter(labels[choose_labelled(labels, count)].tolist())
        self.assertEqual(sum(found.values()), count)
        self.assertEqual(set(found), {0, 1, 2})
        for label, number in found.items():
            self.assertLessEqual(abs(number - count * numbers[label] / 1000), 1.0)

    def test_a_rare_class_is_there_and_a_count_of_the_classes_gives_one_each(self) -> None:
        labels = labels_of({0: 1000, 1: 1, 2: 30})
        for count in (3, 4, 20):
            found = Counter(labels[choose_labelled(labels, count)].tolist())
            self.assertEqual((found[1], sum(found.values())), (1, count))
            self.assertGreaterEqual(found[2], 1)
        self.assertEqual(sorted(labels[choose_labelled(labels, 3)]), [0, 1, 2])

    def test_lists_of_one_seed_are_nested_and_end_with_all(self) -> None:
        labels = labels_of({0: 30, 1: 12, 2: 5, -1: 10})
        smaller: set[int] = set()
        for count in range(3, 48):
            larger = set(choose_labelled(labels, count, seed=3).tolist())
            self.assertEqual(len(larger), count)
            self.assertLess(smaller, larger)
            smaller = larger
        self.assertEqual(smaller, set(np.flatnonzero(labels >= 0).tolist()))

    def test_is_a_function_of_the_seed_and_uniform_within_a_class(self) -> None:
        labels = labels_of({0: 20, 1: 20})
        self.assertEqual(choose_labelled(labels, 6, seed=5).tolist(), choose_labelled(labels, 6, seed=5).tolist())
        often = sum(np.isin(np.arange(40), choose_labelled(labels, 10, seed=seed)) for seed in range(200))
        expected, deviation = 200 / 4, (200 * 0.25 * 0.75) ** 0.5
        self.assertLess(abs(often - expected).max(), 4.5 * deviation)

    def test_fraction_is_of_the_images_with_a_label(self) -> None:
        labels = labels_of({0: 60, 1: 40, -1: 900})
        self.assertEqual(len(choose_labelled(labels, fraction=0.1)), 10)
        np.testing.assert_array_equal(choose_labelled(labels, fraction=0.1), choose_labelled(labels, 10))


class TestSeveralLabels(unittest.TestCase):
    def test_findings_are_proportional_and_every_one_is_there(self) -> None:
        labels = findings()
        known = labels[(labels >= 0).any(axis=1)]
        chosen = labels[choose_labelled(labels, 80)]
        self.assertEqual(len(chosen), 80)
        self.assertTrue(bool((chosen >= 0).any(axis=1).all()))
        for k in range(4):
            self.assertLess(abs((chosen[:, k] == 1).mean() - (known[:, k] == 1).mean()), 0.06)
        nothing = [(array != 1).all(axis=1).mean() for array in (chosen, known)]
        self.assertLess(abs(nothing[0] - nothing[1]), 0.06)
        few = labels[choose_labelled(labels, 5)]
        self.assertTrue(bool((few == 1).any(axis=0).all()))

    def test_one_finding_per_image_is_chosen_as_classes_are(self) -> None:
        classes = labels_of({0: 50, 1: 20, 2: 10})
        one_hot = np.eye(3)[classes]
        np.testing.assert_array_equal(choose_labelled(one_hot, 17, seed=2), choose_labelled(classes, 17, seed=2))


class TestGroups(unittest.TestCase):
    def setUp(self) -> None:
        generator = np.random.default_rng(0)
        self.groups: list[str | None] = [f"p{n}" for n in np.repeat(np.arange(120), generator.integers(1, 7, 120))]
        severity = {group: generator.choice(3, p=[0.6, 0.3, 0.1]) for group in sorted(set(map(str, self.groups)))}
        self.labels = np.array([severity[str(group)] for group in self.groups])
        self.labels[::11] = -1

    @parameterized.expand([(20,), (60,), (200,)])
    def test_whole_groups_near_the_count_and_the_shares(self, count: int) -> None:
        chosen = choose_labelled(self.labels, count, groups=self.groups, seed=1)
        kept = {self.groups[n] for n in chosen}
        expected = [n for n, group in enumerate(self.groups) if group in kept and self.labels[n] >= 0]
        self.assertEqual(chosen.tolist(), expected)
        self.assertLessEqual(abs(len(chosen) - count), 3)  # half of the largest group
        shares = [np.bincount(self.labels[n][self.labels[n] >= 0], minlength=3) for n in (chosen, self.labels >= 0)]
        difference = abs(shares[0] / shares[0].sum() - shares[1] / shares[1].sum())
        self.assertLess(difference.max(), 6 / count)  # the largest group

    def test_without_groups_an_image_is_its_own(self) -> None:
        alone = choose_labelled(self.labels, 40, groups=[None] * len(self.labels))
        np.testing.assert_array_equal(alone, choose_labelled(self.labels, 40))

    def test_every_class_comes_before_the_count(self) -> None:
        labels, groups = [0] * 10 + [1] * 10, ["a"] * 10 + ["b"] * 10
        self.assertEqual(len(choose_labelled(labels, 4, groups=groups)), 20)


class TestWrongInput(unittest.TestCase):
    @parameterized.expand(
        [
            ({}, "give either count or fraction, got None and None"),
            ({"count": 2, "fraction": 0.5}, "give either count or fraction, got 2 and 0.5"),
            ({"fraction": 0.0}, r"fraction must be in \(0, 1\], got 0.0"),
            ({"fraction": 1.5}, r"fraction must be in \(0, 1\], got 1.5"),
            ({"count": 0}, "0 labels are to be kept of 5 images with a label"),
            ({"count": 6}, "6 labels are to be kept of 5 images with a label"),
            ({"count": 2}, "2 labels are too few for one of each of the 3 classes; it takes 3"),
            ({"count": 3, "groups": ["a"]}, "there are 1 groups for 6 images"),
        ]
    )
    def test_choice(self, options: dict, message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"choose_labelled: {message}"):
            choose_labelled([0, 0, 1, 1, 2, -1], **options)

    def test_labels_of_another_shape(self) -> None:
        with self.assertRaisesRegex(ValueError, r"labels must be \(N,\) or \(N, K\), got shape \(0,\)"):
            choose_labelled([], count=1)

    @parameterized.expand(
        [
            ([], "there are none"),
            (["a", "a"], "one is there twice"),
            (["a\nb"], "'a.nb' does not fit on a line"),
            ([" a"], "' a' does not fit on a line"),
            (["a", ""], "'' does not fit on a line"),
        ]
    )
    def test_names(self, names: list[str], message: str) -> None:
        with tempfile.TemporaryDirectory() as folder, self.assertRaisesRegex(ValueError, message):
            write_label_list(Path(folder) / "list.txt", names)


class TestSource(unittest.TestCase):
    def test_few_labels_and_back_from_the_written_list(self) -> None:
        whole = open_source(**PHANTOMS)
        source = open_with_few_labels(num_labels=12, label_seed=3, **PHANTOMS)
        kept = labelled_names(source.part("train"))
        self.assertEqual(kept, [item["name"] for item in source.part("train") if item["label"] != -1])
        self.assertEqual(len(kept), 12)
        labels = {item["name"]: item["label"] for item in whole.part("train")}
        for item in source.part("train"):
            self.assertIn(item["label"], (-1, labels[item["name"]]))
        for part in ("val", "test"):
            self.assertEqual(source.part(part), whole.part(part))
        with tempfile.TemporaryDirectory() as folder:
            file = write_label_list(Path(folder) / "new" / "labelled.txt", kept)
            again = open_source(**PHANTOMS, label_list=file)
            self.assertEqual(again.part("train"), source.part("train"))
            fewer = open_with_few_labels(num_labels=5, label_list=file, **PHANTOMS)
        still = {item["name"] for item in fewer.part("train") if item["label"] != -1}
        self.assertLess(still, set(kept))
        self.assertEqual(len(still), 5)

    def test_all_labels(self) -> None:
        self.assertEqual(open_with_few_labels(**PHANTOMS).part("train"), open_source(**PHANTOMS).part("train"))

    def test_several_labels(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            arrays = {f"{part}_images": np.zeros((n, 8, 8), np.uint8) for part, n in (("train", 30), ("val", 4))}
            vectors = np.random.default_rng(0).integers(0, 2, (30, 3))
            path = Path(folder) / "data.npz"
            empty = {"test_images": arrays["val_images"], "test_labels": vectors[:4], "val_labels": vectors[:4]}
            np.savez(path, **arrays, train_labels=vectors, **empty)
            train = open_with_few_labels(path, num_labels=6).part("train")
        kept = [n for n, item in enumerate(train) if item["label"] != [-1.0] * 3]
        self.assertEqual(kept, choose_labelled(vectors, 6).tolist())
        self.assertEqual(labelled_names(train), [train[n]["name"] for n in kept])
        self.assertEqual([train[n]["label"] for n in kept], vectors[kept].tolist())

    def test_fingerprint_is_that_of_the_labelled_images(self) -> None:
        items = [{"name": "a", "label": 0}, {"name": "b", "label": -1}, {"name": "c", "label": np.int64(2)}]
        same = [items[0], {"name": "of no matter", "label": -1}, {**items[2], "label": 2}]
        self.assertEqual(labels_fingerprint(items), labels_fingerprint(same))
        self.assertRegex(labels_fingerprint(items), r"^sha256:[0-9a-f]{64}$")
        others = [
            [items[0], {**items[1], "label": 1}, items[2]],  # one more
            [items[0], items[1], {**items[2], "label": 1}],  # another label
            [items[0], items[1], {**items[2], "name": "d"}],  # another image
            items[::-1],  # another order
        ]
        self.assertEqual(len({labels_fingerprint(one) for one in [items, *others]}), 5)
        vectors = [{"name": "a", "label": [1.0, -1.0]}, {"name": "b", "label": [-1.0, -1.0]}]
        self.assertEqual(labels_fingerprint(vectors), labels_fingerprint(vectors[:1]))

    def test_all_images_of_a_lesion_in_an_npz_have_their_label_or_none(self) -> None:
        lesions = np.array([f"HAM_{n // 3:03d}" for n in range(60)])
        labels = np.repeat(np.arange(20) % 4 == 0, 3).astype(int)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.npz"
            images = {f"{part}_images": np.zeros((n, 8, 8), np.uint8) for part, n in (("train", 60), ("val", 2))}
            rest = {"test_images": images["val_images"], "val_labels": [0, 1], "test_labels": [0, 1]}
            np.savez(path, **images, **rest, train_labels=labels, train_lesions=lesions)
            train = open_with_few_labels(path, num_labels=12).part("train")
        kept = {item["patient"] for item in train if item["label"] >= 0}
        self.assertEqual(len(kept), 4)
        for item in train:
            self.assertEqual(item["label"] >= 0, item["patient"] in kept)

    def test_all_images_of_a_patient_have_their_label_or_none(self) -> None:
        """A folder with a table of files, labels and patients; patients of 1 to 4 images, some images without one."""
        sizes = [1 + n % 4 for n in range(24)]
        patients = [f"P{n:02d}" for n, size in enumerate(sizes) for _ in range(size)] + [""] * 10
        labels = ["ab"[n % 5 == 0] for n in range(len(patients))]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rows = [f"{n:02d}.png,{labels[n]},{patient},train" for n, patient in enumerate(patients)]
            rows += [f"{part}.png,a,{part},{part}" for part in ("val", "test")]
            (folder / "labels.csv").write_text("\n".join(["file,label,patient,split", *rows]), encoding="utf-8")
            for row in rows:
                Image.new("L", (8, 8)).save(folder / row.split(",")[0])
            source = open_with_few_labels(folder, num_labels=20, class_names=["a", "b"], label_seed=1)
            other = open_with_few_labels(folder, num_labels=20, class_names=["a", "b"], label_seed=2)
            batch = DataLoader(Dataset(source.part("train"), source.preprocessing()), batch_size=len(patients))
            self.assertEqual(next(iter(batch))["image"].shape, (len(patients), 1, 64, 64))
        train = {item["name"]: item for item in source.part("train")}
        labelled: defaultdict[str, set[bool]] = defaultdict(set)
        for n, patient in enumerate(patients):
            item = train[f"{n:02d}.png"]
            self.assertEqual(item.get("patient", ""), patient)
            if patient:
                labelled[patient].add(item["label"] >= 0)
        self.assertEqual({len(states) for states in labelled.values()}, {1})
        self.assertTrue(any(states == {True} for states in labelled.values()))
        found = labelled_names(source.part("train"))
        self.assertLessEqual(abs(len(found) - 20), 2)  # half of the largest patient
        self.assertNotEqual(found, labelled_names(other.part("train")))


class TestValidation(unittest.TestCase):
    PHANTOMS = {"image_size": 16, "phantom_counts": (60, 90, 6)}

    @parameterized.expand([("number", 12, 12), ("labelled", "labelled", 15), ("more_than_there_are", 100, 90)])
    def test_at_most_so_many_with_the_shares_of_the_classes(self, _: str, validation_count: int | str, n: int) -> None:
        whole = open_source(**self.PHANTOMS)
        source = open_with_few_labels(num_labels=15, label_seed=3, validation_count=validation_count, **self.PHANTOMS)
        val = source.part("val")
        self.assertEqual(len(val), n)
        self.assertEqual([item for item in whole.part("val") if item in val], val)
        counts, all_counts = (Counter(item["label"] for item in part) for part in (val, whole.part("val")))
        for label, count in all_counts.items():
            self.assertLessEqual(abs(counts[label] - n * count / 90), 1.0)
        self.assertEqual(source.part("test"), whole.part("test"))
        again = open_with_few_labels(num_labels=15, label_seed=4, validation_count=validation_count, **self.PHANTOMS)
        self.assertEqual(again.part("val") == val, n == 90)

    def test_a_few_more_where_the_count_has_no_room_for_every_class(self) -> None:
        """Training images show four of eight findings each, validation images one."""
        half = np.repeat([[1, 0], [0, 1]], 4, axis=1)
        arrays = {
            "train_labels": np.tile(half, (20, 1)),
            "val_labels": np.tile(np.eye(8, dtype=int), (5, 1)),
            "test_labels": half,
        }
        images = {name.replace("labels", "images"): np.zeros((len(a), 8, 8), np.uint8) for name, a in arrays.items()}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.npz"
            np.savez(path, **arrays, **images)
            for count, expected in ((4, 8), (8, 8), (11, 11)):
                source = open_with_few_labels(path, num_labels=count, validation_count="labelled")
                self.assertEqual(len(labelled_names(source.part("train"))), count)
                found = np.array([item["label"] for item in source.part("val")])
                self.assertEqual((len(found), found.any(axis=0).tolist()), (expected, [True] * 8))

    def test_lists_with_room_are_those_of_the_choice(self) -> None:
        val = open_source(**self.PHANTOMS).part("val")
        labels = [item["label"] for item in val]
        for seed in range(3):
            for count in (len(set(labels)), 10, 31):
                source = open_with_few_labels(label_seed=seed, validation_count=count, **self.PHANTOMS)
                expected = [val[n] for n in choose_labelled(labels, count, seed=seed)]
                self.assertEqual(source.part("val"), expected)

    @parameterized.expand([(0,), (2.5,), (True,), ("all",)])
    def test_wrong_number(self, count: object) -> None:
        message = "open_with_few_labels: validation_count must be a number >= 1, 'labelled' or None, got"
        with self.assertRaisesRegex(ValueError, message):
            open_with_few_labels(validation_count=count, **self.PHANTOMS)  # type: ignore[arg-type]


if __name__ == "__main__":
    unittest.main()
