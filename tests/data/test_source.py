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


"""One option decides where images come from; all sources give the same kind of items."""

from __future__ import annotations

import json
import os
import unittest
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor
from parameterized import parameterized

from monai_jointdiff.data import BrainPhantoms, ChestPhantoms, ImagePreprocessing, IntensityRule, open_source
from monai_jointdiff.data import source as source_module
from monai_jointdiff.visualize import save_png
from tests.bundles.runs import temporary_folder, working_directory

COUNTS = (20, 8, 6)
DATA = os.environ.get("JOINTDIFF_DATA")


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def save_npz(folder: Path, **more: Any) -> Path:
    path = folder / "data.npz"
    arrays = {f"{part}_images": pixels(n, 10, 6, 8) for n, part in enumerate(("train", "val", "test"))}
    labels = {f"{part}_labels": np.arange(10)[:, None] % 2 for part in ("train", "val", "test")}
    np.savez(path, **{**arrays, **labels, **more})
    return path


def save_folder(folder: Path, count: int = 20, patients: int | None = None) -> Path:
    with open(folder / "labels.csv", "w", encoding="utf-8") as stream:
        stream.write("file,label,patient\n")
        for n in range(count):
            save_png(pixels(n, 6, 8), folder / f"{n:03d}.png")
            stream.write(f"{n:03d}.png,{'ab'[n % 2]},{n % patients if patients else ''}\n")
    return folder


class TestPhantoms(unittest.TestCase):
    @parameterized.expand([(2, (1, 16, 16)), (3, (1, 16, 16, 16))])
    def test_items_are_the_numbered_phantoms(self, spatial_dims: int, shape: tuple[int, ...]) -> None:
        source = open_source(spatial_dims=spatial_dims, image_size=16, seed=3, phantom_counts=COUNTS)
        phantoms = ChestPhantoms(spatial_dims, 16, 3)
        prepare = source.preprocessing()
        for part, first in (("train", 0), ("val", 20), ("test", 28)):
            items = source.part(part)
            self.assertEqual([item["image"] for item in items], list(range(first, first + len(items))))
            prepared, phantom = prepare(items[0]), phantoms(first)
            self.assertEqual(prepared["image"].shape, shape)
            expected = phantom.image.astype(np.float32) / 127.5 - 1
            np.testing.assert_allclose(prepared["image"].numpy(), expected, atol=1e-6)
            np.testing.assert_array_equal(prepared["mask"].numpy(), phantom.mask)
            self.assertEqual(int(prepared["label"]), phantom.label)

    def test_defaults(self) -> None:
        source = open_source()
        self.assertEqual([len(source.part(part)) for part in ("train", "val", "test")], [6000, 300, 600])
        self.assertEqual((source.image_size, source.in_channels, source.num_classes), ((32, 32), 1, 3))
        source.preflight()

    @parameterized.expand([(2,), (3,)])
    def test_brain(self, spatial_dims: int) -> None:
        rule = {"percentiles": (0.5, 99.95)}
        options: dict[str, Any] = {"spatial_dims": spatial_dims, "image_size": 16, "phantom_counts": COUNTS}
        source = open_source(phantoms="brain", intensity=rule, **options)
        self.assertEqual((source.class_names, source.in_channels), (["no_tumour", "tumour"], 2))
        self.assertEqual(source.description()["channel_names"], ["FLAIR", "T1c"])
        self.assertIsNone(open_source(**options).channel_names)
        item, phantom = source.part("val")[0], BrainPhantoms(spatial_dims, 16)(20)
        prepared = source.preprocessing()(item)
        np.testing.assert_allclose(prepared["image"], phantom.image.astype(np.float32) / 127.5 - 1, atol=1e-6)
        np.testing.assert_array_equal(prepared["mask"], phantom.mask)
        self.assertEqual((item["label"], item["name"]), (phantom.label, "phantom/000020"))
        again = open_source(**{**options, **source.description()["opened_with"]}, intensity=rule)
        self.assertEqual(again.description(), source.description())
        self.assertEqual(source.description()["intensity"]["percentiles"], [0.5, 99.95])

    def test_unknown_phantoms_are_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "phantoms must be one of brain, chest, skin, got 'knee'"):
            open_source(phantoms="knee")

    def test_other_classes_are_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "phantoms have the classes normal, opacity, effusion, got a"):
            open_source(class_names=["a"])


class TestFiles(unittest.TestCase):
    def test_npz_and_picture_of_the_same_pixels_are_the_same(self) -> None:
        folder = temporary_folder(self)
        images = pixels(0, 10, 6, 8)
        (folder / "pictures" / "test").mkdir(parents=True)
        for n, image in enumerate(images):
            save_png(image, folder / "pictures" / "test" / f"{n}.png")
        np.savez(folder / "data.npz", test_images=images)
        one = open_source(folder / "data.npz", image_size=16)
        two = open_source(folder / "pictures", image_size=16)
        for first, second in zip(one.part("test"), two.part("test"), strict=True):
            a, b = one.preprocessing()(first), two.preprocessing()(second)
            torch.testing.assert_close(a["image"], b["image"], rtol=0, atol=0)
            self.assertEqual(a["image"].shape, (1, 16, 16))
            self.assertEqual((int(a["label"]), int(b["label"])), (-1, -1))

    def test_size_and_channels_come_from_the_npz(self) -> None:
        source = open_source(save_npz(temporary_folder(self)))
        self.assertEqual((source.image_size, source.in_channels, source.class_names), ((6, 8), 1, ["0", "1"]))
        self.assertEqual(source.name, "data.npz")

    def test_missing_parts_are_drawn_by_the_seed_and_stratified(self) -> None:
        folder = save_folder(temporary_folder(self), 40)
        sources = [open_source(folder, seed=seed) for seed in (0, 0, 1)]
        names = [{part: [i["name"] for i in s.part(part)] for part in ("train", "val", "test")} for s in sources]
        self.assertEqual(names[0], names[1])
        self.assertNotEqual(names[0], names[2])
        everything = [name for part in names[0].values() for name in part]
        self.assertEqual(sorted(everything), [f"{n:03d}.png" for n in range(40)])
        for part, share in (("train", 0.65), ("val", 0.15), ("test", 0.2)):
            counts = Counter(item["label"] for item in sources[0].part(part))
            for label in (0, 1):
                self.assertAlmostEqual(counts[label], 20 * share, delta=1.01)

    def test_no_patient_is_in_two_parts(self) -> None:
        folder = save_folder(temporary_folder(self), 40, patients=10)
        source = open_source(folder)
        parts = [{int(i["name"][:3]) % 10 for i in source.part(part)} for part in ("train", "val", "test")]
        self.assertEqual(sum(map(len, parts)), 10)

    def test_all_parts_together_in_the_order_of_the_names(self) -> None:
        folder = temporary_folder(self)
        stored = open_source(save_npz(folder))
        self.assertEqual(stored.given_parts, {"train", "val", "test"})
        names = [f"{part}/{n:06d}" for part in ("test", "train", "val") for n in range(10)]
        self.assertEqual([item["name"] for item in stored.part("all")], names)
        np.savez(folder / "new.npz", images=pixels(0, 50, 6, 8))
        drawn = open_source(folder / "new.npz")
        self.assertEqual(drawn.given_parts, set())
        self.assertEqual([item["name"] for item in drawn.part("all")], [f"images/{n:06d}" for n in range(50)])
        self.assertEqual(open_source(phantom_counts=COUNTS).given_parts, {"train", "val", "test"})

    def test_patient_goes_along(self) -> None:
        folder = save_folder(temporary_folder(self), 6, patients=3)
        source = open_source(folder)
        prepare = source.preprocessing()
        found = {item["name"]: prepare(item)["patient"] for item in source.part("all")}
        self.assertEqual(found, {f"{n:03d}.png": str(n % 3) for n in range(6)})
        (item, *_) = (unknown := open_source(save_npz(folder))).part("val")
        self.assertEqual(unknown.preprocessing()(item)["patient"], "")

    def test_folder_called_by_a_number(self) -> None:
        folder = temporary_folder(self)
        (folder / "2024").mkdir()
        save_folder(folder / "2024")
        with working_directory(folder):
            self.assertEqual(open_source(2024).name, "2024")
        with working_directory(folder / "2024"):
            self.assertEqual(open_source(".").name, "2024")

    def test_medmnist_by_name(self) -> None:
        path = save_npz(temporary_folder(self))
        with mock.patch.object(source_module, "download_medmnist", return_value=path) as download:
            source = open_source("medmnist:pneumoniamnist", image_size=64)
        download.assert_called_once_with("pneumoniamnist", 64, spatial_dims=2)
        self.assertEqual((source.name, source.image_size), ("medmnist:pneumoniamnist", (64, 64)))

    @parameterized.expand(
        [
            ("image_column", "photo"),
            ("label_column", "dx"),
            ("label_column", ["p", "q"]),
            ("split_column", "fold"),
            ("patient_column", "pid"),
            ("mask_column", "seg"),
        ]
    )
    def test_columns_are_refused_where_there_are_none(self, option: str, value: str | list[str]) -> None:
        folder = temporary_folder(self)
        for name in ("a", "b"):
            (folder / "classes" / name).mkdir(parents=True)
            save_png(pixels(0, 6, 8), folder / "classes" / name / "0.png")
        path = save_npz(folder)
        options: dict[str, Any] = {option: value}
        named = f"--{option} {value if isinstance(value, str) else 'p,q'} cannot be used: "
        for place, what in ((folder / "classes", "classes has no CSV"), (path, "data.npz has arrays"), (None, "phant")):
            with self.assertRaisesRegex(ValueError, f"open_source: {named}{what}.*Leave the option out, or add a CSV"):
                open_source(place, **options)
            open_source(place, **options, usual_columns=options)
            joined = {option: value if isinstance(value, str) else "p, q"}
            open_source(place, **options, usual_columns=joined)
            with self.assertRaisesRegex(ValueError, named):
                open_source(place, **options, usual_columns={option: "other"})
        with mock.patch.object(source_module, "download_medmnist", return_value=path):
            with self.assertRaisesRegex(ValueError, named):
                open_source("medmnist:pneumoniamnist", **options)

    @parameterized.expand([("image_column", 3), ("label_column", 3), ("label_column", None)])
    def test_columns_of_another_kind_are_refused(self, option: str, value: Any) -> None:
        with self.assertRaisesRegex(TypeError, f"{option} must be a list of names, or names joined by commas, got"):
            open_source(save_folder(temporary_folder(self)), **{option: value})

    def test_all_refused_columns_are_named_and_usual_ones_do_not_hide_others(self) -> None:
        options: dict[str, Any] = {"patient_column": "pid", "split_column": "fold", "label_column": "label"}
        with self.assertRaisesRegex(ValueError, "open_source: --split_column fold, --patient_column pid cannot"):
            open_source(**options)
        with self.assertRaisesRegex(ValueError, "open_source: --split_column fold cannot"):
            open_source(**options, usual_columns={"patient_column": "pid"})

    def test_columns_of_a_table_are_used_whatever_is_usual(self) -> None:
        folder = save_folder(temporary_folder(self), 6, patients=3)
        source = open_source(folder, patient_column="patient", usual_columns={"patient_column": "pid"})
        self.assertEqual(source.part("all")[4]["patient"], "1")
        with self.assertRaisesRegex(ValueError, "no column 'pid'"):
            open_source(folder, patient_column="pid", usual_columns={"patient_column": "pid"})

    def test_division_of_each_label_of_several(self) -> None:
        folder = temporary_folder(self)
        np.savez(folder / "x.npz", images=pixels(0, 20, 6, 8), labels=np.eye(5, dtype=int)[np.arange(20) % 5])
        source = open_source(folder / "x.npz")
        self.assertEqual([len(source.part(part)) for part in ("train", "val", "test")], [13, 3, 4])

    def test_parts_that_are_drawn_are_told_from_given_ones(self) -> None:
        folder = temporary_folder(self)
        np.savez(folder / "x.npz", train_images=pixels(0, 40, 6, 8))
        self.assertEqual(open_source(folder / "x.npz").given_parts, set())  # training images went to other parts
        np.savez(folder / "x.npz", train_images=pixels(0, 40, 6, 8), test_images=pixels(1, 5, 6, 8))
        self.assertEqual(open_source(folder / "x.npz").given_parts, {"test"})

    @parameterized.expand([("c,b, a",), (("c", "b", "a"),), (["c", "b", "a"],)])
    def test_class_names_as_text(self, names: Any) -> None:
        source = open_source(save_folder(temporary_folder(self)), class_names=names)
        self.assertEqual(source.class_names, ["c", "b", "a"])
        text = open_source(class_names="normal,opacity,effusion", phantom_counts=COUNTS)
        self.assertEqual(text.class_names, ["normal", "opacity", "effusion"])

    @parameterized.expand([(2,), ({"a": 1},), (1.5,)])
    def test_class_names_of_another_kind_are_refused(self, names: Any) -> None:
        with self.assertRaisesRegex(TypeError, "class_names must be a list of names, or names joined by commas, got"):
            open_source(save_folder(temporary_folder(self)), class_names=names)

    def test_boolean_images(self) -> None:
        images = pixels(0, 10, 6, 8) > 127
        source = open_source(save_npz(temporary_folder(self), train_images=images))
        source.preflight()
        prepared = source.preprocessing()(source.part("train")[3])["image"]
        np.testing.assert_array_equal(prepared[0].numpy(), np.where(images[3], 1.0, -1.0))

    def test_class_names_give_the_order_and_may_name_absent_classes(self) -> None:
        folder = save_folder(temporary_folder(self))
        source = open_source(folder, class_names=["c", "b", "a"])
        labels = {item["name"]: item["label"] for part in ("train", "val", "test") for item in source.part(part)}
        self.assertEqual((labels["000.png"], labels["001.png"], source.num_classes), (2, 1, 3))

    def test_several_labels_may_be_demanded(self) -> None:
        folder = save_folder(temporary_folder(self))
        source = open_source(folder, multi_label=True)
        self.assertTrue(source.multi_label)
        self.assertIn(source.part("train")[0]["label"], ([1.0, 0.0], [0.0, 1.0]))
        self.assertEqual(source.preprocessing()(source.part("train")[0])["label"].dtype, torch.float32)

    def test_masks_reach_the_items_if_all_images_have_one(self) -> None:
        folder = temporary_folder(self)
        masks = {f"{part}_masks": pixels(n, 10, 6, 8) > 200 for n, part in enumerate(("train", "val", "test"))}
        source = open_source(save_npz(folder, **masks), image_size=(6, 8))
        prepared = source.preprocessing()(source.part("val")[3])
        np.testing.assert_array_equal(prepared["mask"][0], masks["val_masks"][3])
        del masks["val_masks"]
        self.assertNotIn("mask", open_source(save_npz(folder, **masks)).part("train")[0])

    def test_given_arguments_of_the_intensity_rule_leave_the_others_to_the_data(self) -> None:
        images = np.linspace(0, 1, 480, dtype=np.float32).reshape(10, 6, 8)
        rule = open_source(save_npz(temporary_folder(self), train_images=images), intensity={"percentiles": (1, 90)})
        self.assertEqual(rule.prepare.intensity, IntensityRule(percentiles=(1, 90), float_range=(0, 1)))
        self.assertEqual(
            open_source(save_npz(temporary_folder(self)), intensity=IntensityRule()).prepare.intensity, IntensityRule()
        )

    def test_wrong_places(self) -> None:
        folder = temporary_folder(self)
        (folder / "notes.txt").write_text("text", encoding="utf-8")
        with self.assertRaisesRegex(ValueError, "there is no .*none; --dataset_dir takes"):
            open_source(folder / "none")
        with self.assertRaisesRegex(ValueError, "notes.txt is neither a folder nor an .npz file"):
            open_source(folder / "notes.txt")
        with self.assertRaisesRegex(ValueError, "is out of range; right are 0 to 1"):
            open_source(save_npz(folder, val_labels=np.full((10, 1), 2)), class_names=["a", "b"])
        with self.assertRaisesRegex(ValueError, "image_size must be one positive whole number or 2"):
            open_source(image_size=(8, 8, 8))
        with self.assertRaisesRegex(ValueError, "spatial_dims must be 2 or 3"):
            open_source(spatial_dims=4)

    @parameterized.expand(
        [
            ({"spatial_dims": 4}, "--spatial_dims must be 2 or 3, got 4"),
            ({"image_size": 32.5}, "--image_size must be one positive whole number or 2 of them, got 32.5"),
        ]
    )
    def test_wrong_sizes_are_refused_before_data_are_read(self, options: dict[str, Any], message: str) -> None:
        with self.assertRaisesRegex(ValueError, message):
            open_source(temporary_folder(self) / "none", **options)


class TestSource(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)

    def test_fingerprint_is_of_names_and_parts(self) -> None:
        source = open_source(phantom_counts=COUNTS)
        self.assertRegex(source.fingerprint(), r"^sha256:[0-9a-f]{64}$")
        items = dict(source.items)
        same = [
            open_source(phantom_counts=COUNTS, image_size=16),
            replace(source, items={**items, "train": [{**item, "label": -1} for item in items["train"]]}),
        ]
        others = [
            open_source(phantom_counts=(20, 9, 5)),  # the same images, one of them in another part
            replace(source, items={**items, "train": items["train"][::-1]}),
            replace(source, items={**items, "test": items["test"][1:]}),
            replace(source, items={**items, "val": [{**item, "name": "x"} for item in items["val"]]}),
        ]
        self.assertEqual({one.fingerprint() for one in same}, {source.fingerprint()})
        self.assertEqual(len({one.fingerprint() for one in [source, *others]}), 5)

    def test_description_is_all_that_inference_needs(self) -> None:
        images = np.linspace(-1, 1, 480, dtype=np.float32).reshape(10, 6, 8)
        source = open_source(save_npz(self.folder, train_images=images), image_size=(12, 8))
        content = json.loads(json.dumps(source.description()))
        self.assertEqual(content, source.description())
        image = source.part("val")[0]["image"].astype(np.float32) / 255
        again = ImagePreprocessing.from_description(content)
        torch.testing.assert_close(again(image), source.prepare(image), rtol=0, atol=0)
        self.assertNotIn(str(self.folder), json.dumps(content))

    def test_summary_counts_every_image(self) -> None:
        labels = np.array([0, 0, 0, 1, 1, -1, 0, 0, 0, -1])
        names = np.array(["well", "ill"])
        text = open_source(save_npz(self.folder, train_labels=labels, class_names=names)).summary()
        self.assertIn("data: data.npz, 6 x 8, 1 channel, ", text)
        self.assertIn("train: 10 images (well 6, ill 2, unlabelled 2)", text)
        self.assertIn("val: 10 images (well 5, ill 5)", text)
        self.assertNotIn(str(self.folder), text)

    def test_summary_of_several_labels(self) -> None:
        labels = np.array([[1, 1], [0, 1], [-1, -1], [0, 0], *[[1, 0]] * 6])
        halves = {f"{part}_labels": np.tile([[1, 0]], (10, 1)) for part in ("val", "test")}
        text = open_source(save_npz(self.folder, train_labels=labels, **halves)).summary()
        self.assertIn("train: 10 images (0 7, 1 2, unlabelled 1)", text)

    def test_parts(self) -> None:
        np.savez(self.folder / "data.npz", test_images=pixels(0, 3, 4, 4))
        source = open_source(self.folder / "data.npz")
        self.assertEqual(len(source.part("test")), 3)
        with self.assertRaisesRegex(
            ValueError, "train part of data.npz has no images .train 0, val 0, test 3.. Give it some, by the split"
        ):
            source.part("train")
        with self.assertRaisesRegex(ValueError, "'valid' is no part"):
            source.part("valid")

    def test_preflight_names_all_bad_files(self) -> None:
        save_folder(self.folder, 12)
        open_source(self.folder).preflight()
        (self.folder / "003.png").write_bytes(b"")
        whole = (self.folder / "007.png").read_bytes()
        (self.folder / "007.png").write_bytes(whole[: len(whole) // 2])
        save_png(pixels(0, 6, 8, 3), self.folder / "009.png")
        with self.assertRaises(ValueError) as caught:
            open_source(self.folder, in_channels=1).preflight()
        text = str(caught.exception)
        self.assertIn("3 images of", text)
        for name in ("003.png", "007.png", "009.png"):
            self.assertIn(f"\n  {name}: ", text)

    def test_wrong_number_of_channels_is_found_before_training(self) -> None:
        with self.assertRaisesRegex(ValueError, r"30 images of data.npz .*\n  train/000000: .*needs \(3, "):
            open_source(save_npz(self.folder), in_channels=3).preflight()

    @parameterized.expand([(False,), (True,)])
    def test_label_list_hides_all_other_training_labels(self, multi_label: bool) -> None:
        path = self.folder / "list.txt"
        path.write_text("\ntrain/000001\n train/000004 \n", encoding="utf-8")
        several = {f"{part}_labels": np.tile([[1, 0]], (10, 1)) for part in ("train", "val", "test")}
        source = open_source(save_npz(self.folder, **(several if multi_label else {})), label_list=path)
        missing = [-1.0, -1.0] if multi_label else -1
        known = [item["name"] for item in source.part("train") if item["label"] != missing]
        self.assertEqual(known, ["train/000001", "train/000004"])
        self.assertTrue(all(item["label"] != missing for item in source.part("test")))

    @parameterized.expand(
        [("val/000001\n", "names 'val/000001', which is no training image"), ("\n", "is empty"), (None, "cannot read")]
    )
    def test_wrong_label_lists(self, text: str | None, message: str) -> None:
        path = self.folder / "list.txt"
        if text is not None:
            path.write_text(text, encoding="utf-8")
        with self.assertRaisesRegex(ValueError, message):
            open_source(save_npz(self.folder), label_list=path)


class TestSlices(unittest.TestCase):
    """Eight scans of two files, of which every second has something in its mask."""

    def setUp(self) -> None:
        self.folder = temporary_folder(self)
        for n in range(8):
            (self.folder / f"p{n}").mkdir()
            mask = np.zeros((6, 5, 4), np.uint8)
            mask[1:5, 1:4, 1] = n % 2
            generator = np.random.default_rng(n)
            arrays = {
                "flair": generator.normal(5, 1, mask.shape),
                "t1c": generator.normal(5, 1, mask.shape),
                "seg": mask,
            }
            for name, array in arrays.items():
                image = nibabel.Nifti1Image(array.astype(np.float32), np.diag([-1.0, -1.0, 2.0, 1.0]))
                nibabel.save(image, self.folder / f"p{n}" / f"case_{name}.nii.gz")
        self.options: dict[str, Any] = {"image_column": "flair,t1c", "mask_column": "seg", "min_foreground": 0.0}

    def test_parts_classes_and_items(self) -> None:
        source = open_source(self.folder, slice_axis=0, mask_classes=("well", "ill"), image_size=(5, 6), **self.options)
        source.preflight()
        items = {part: source.part(part) for part in ("train", "val", "test")}
        scans = {part: {item["name"].split("/")[0] for item in items[part]} for part in items}
        self.assertEqual(sum(map(len, scans.values())), 8)  # no scan in two parts
        self.assertEqual(sum(item["label"] == 1 for part in items.values() for item in part), 4)
        self.assertEqual((source.class_names, source.in_channels), (["well", "ill"], 2))
        self.assertEqual(len(source.description()["channel_names"]), 2)
        for item in items["train"][:6]:
            prepared = source.preprocessing()(item)
            self.assertIsInstance(prepared["image"], MetaTensor)
            self.assertEqual(int(prepared["mask"].sum()), 12 * int(prepared["label"]))
            number = int(item["name"][-3:])
            torch.testing.assert_close(prepared["image"].affine[:3, 3], torch.tensor([0.0, 0.0, 2.0 * number]).double())
        self.assertEqual(open_source(self.folder, **source.description()["opened_with"]).items, source.items)

    def test_whole_volumes_do_not_mind_the_axis(self) -> None:
        source = open_source(self.folder, spatial_dims=3, slice_axis=0, image_size=(4, 5, 6), **self.options)
        self.assertEqual(sum(len(source.items[part]) for part in ("train", "val", "test")), 8)
        prepared = source.preprocessing()(source.part("train")[0])
        self.assertEqual((prepared["image"].shape, prepared["mask"].shape), ((2, 4, 5, 6), (1, 4, 5, 6)))

    def test_volumes_are_refused_without_an_axis(self) -> None:
        with self.assertRaisesRegex(ValueError, "spatial_dims is 2; slices are cut from volumes where slice_axis says"):
            open_source(self.folder, **self.options).preflight()

    def test_preflight_does_not_correct_and_finds_masks_that_do_not_fit(self) -> None:
        correction = mock.Mock(as_dict=lambda: {"a": 1})
        source = open_source(self.folder, slice_axis=0, correction=correction, **self.options)
        self.assertEqual(source.description()["bias_correction"], {"a": 1})
        source.preflight()
        correction.assert_not_called()
        away = nibabel.Nifti1Image(np.ones((6, 5, 4), np.float32), np.diag([-1.0, -1.0, 2.0, 1.0]) + 9 * np.eye(4, k=3))
        nibabel.save(away, self.folder / "p0" / "case_seg.nii.gz")
        with self.assertRaisesRegex(
            ValueError, "(?s)4 images of .*case_seg.nii.gz#slice_000': its header places it up to 9"
        ):
            source.preflight()


@unittest.skipUnless(DATA, "JOINTDIFF_DATA does not say where the real data are")
class TestRealData(unittest.TestCase):
    def test_pneumoniamnist(self) -> None:
        source = open_source(Path(str(DATA)) / "pneumoniamnist_28.npz")
        counts = [len(source.part(part)) for part in ("train", "val", "test")]
        self.assertEqual(counts, [4708, 524, 624])
        self.assertEqual((source.class_names, source.image_size), (["normal", "pneumonia"], (28, 28)))
        image = source.preprocessing()(source.part("test")[0])["image"]
        self.assertTrue(-1 <= float(image.min()) < float(image.max()) <= 1)

    def test_jpegs_with_a_table(self) -> None:
        source = open_source(Path(str(DATA)) / "originals" / "kermany_cxr_224", image_size=32)
        source.preflight()
        self.assertEqual((source.class_names, source.in_channels), (["NORMAL", "PNEUMONIA"], 1))
        self.assertEqual(sum(len(source.part(part)) for part in ("train", "val", "test")), 30)

    def test_slices_of_brains(self) -> None:
        source = open_source(Path(str(DATA)) / "brats2013_slices_64.npz")
        self.assertEqual([len(source.part(part)) for part in ("train", "val", "test")], [371, 94, 78])
        self.assertEqual((source.class_names, source.in_channels), (["no_tumour", "tumour"], 2))
        for item in source.part("test")[::7]:
            prepared = source.preprocessing()(item)
            self.assertEqual(bool(prepared["mask"].any()), int(prepared["label"]) == 1)

    def test_volumes_of_brains(self) -> None:
        path, classes = Path(str(DATA)) / "brats2013_vol_64.npz", ("no_tumour", "tumour")
        whole = open_source(path, spatial_dims=3)
        self.assertEqual((whole.in_channels, whole.image_size), (2, (64, 64, 64)))
        self.assertEqual([len(whole.part(part)) for part in ("train", "val", "test")], [4, 1, 1])
        cut = open_source(path, slice_axis=2, slice_every=3, mask_classes=classes)
        scans = [{item["name"].split("#")[0] for item in cut.part(part)} for part in ("train", "val", "test")]
        self.assertEqual(([len(part) for part in scans], len(set.union(*scans))), ([4, 1, 1], 6))
        for part in ("train", "val", "test"):
            for item in cut.part(part):
                self.assertEqual(bool((item["mask"] > 0).sum() >= 10), item["label"] == 1)

    def test_scan_in_several_files(self) -> None:
        folder = Path(str(DATA)) / "originals" / "brats2013_pat0006"
        source = open_source(folder, image_column="flair,t1c", mask_column="OTMultiClass", slice_axis=0, slice_every=10)
        mask = np.asarray(nibabel.load(folder / "OTMultiClass.nii.gz").dataobj) > 0
        prepare = source.preprocessing()
        for item in source.part("train")[::3]:
            number = int(item["name"][-3:])
            self.assertEqual(item["label"], int(mask[:, :, number].any()))
            prepared = prepare(item)
            rows, columns = np.nonzero(mask[:, :, number].T)
            if len(rows) > 100:  # the middle of the tumour is where the affine says, in millimetres
                found = torch.nonzero(prepared["mask"][0]).double().mean(dim=0)
                place = prepared["image"].affine @ torch.cat([found, torch.tensor([0.0, 1.0])])
                expected = (-columns.mean(), 239 - rows.mean(), number)
                np.testing.assert_allclose(place[:3], expected, atol=0.5)

    def test_volumes(self) -> None:
        source = open_source(Path(str(DATA)) / "lidc_nodule3d_32.npz", spatial_dims=3)
        self.assertEqual(source.image_size, (32, 32, 32))
        self.assertEqual(source.preprocessing()(source.part("val")[0])["image"].shape, (1, 32, 32, 32))


if __name__ == "__main__":
    unittest.main()
