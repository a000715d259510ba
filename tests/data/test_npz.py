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


"""Data sets in one `.npz`."""

from __future__ import annotations

import unittest
from pathlib import Path
from typing import Any

import numpy as np
from parameterized import parameterized

from monai_jointdiff.data import SliceRule
from monai_jointdiff.data.npz import read_npz
from tests.bundles.runs import temporary_folder


def pixels(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, shape).astype(dtype)


class TestReadNpz(unittest.TestCase):
    def setUp(self) -> None:
        self.path = temporary_folder(self) / "data.npz"

    def save(self, **arrays: Any) -> Path:
        np.savez(self.path, **arrays)
        return self.path

    @parameterized.expand(
        [
            ("gray", 2, (4, 6, 8), 1, [6, 8]),
            ("colors", 2, (4, 6, 8, 3), 3, [6, 8]),
            ("one_channel", 2, (4, 6, 8, 1), 1, [6, 8]),
            ("volumes", 3, (4, 5, 6, 8), 1, [5, 6, 8]),
            ("volumes_with_channels", 3, (4, 5, 6, 8, 2), 2, [5, 6, 8]),
        ]
    )
    def test_axes(self, _: str, spatial_dims: int, shape: tuple[int, ...], channels: int, size: list[int]) -> None:
        images = pixels(*shape)
        found = read_npz(self.save(train_images=images), spatial_dims)
        self.assertEqual((found.in_channels, list(found.image_size)), (channels, size))
        for record, image in zip(found.records, images, strict=True):
            array = np.asarray(record.image)
            self.assertEqual(array.shape, (channels, *size))
            self.assertEqual(array.dtype, np.uint8)
            expected = np.moveaxis(image, -1, 0) if image.ndim > spatial_dims else image[None]
            np.testing.assert_array_equal(array, expected)

    @parameterized.expand([("column", (3, 1)), ("flat", (3,))])
    def test_parts_labels_and_names(self, _: str, shape: tuple[int, ...]) -> None:
        labels = np.array([1, -1, 0]).reshape(shape)
        found = read_npz(self.save(train_images=pixels(3, 4, 4), train_labels=labels, test_images=pixels(1, 4, 4)))
        self.assertEqual([r.label for r in found.records], [1, -1, 0, None])
        self.assertEqual([r.part for r in found.records], ["train"] * 3 + ["test"])
        self.assertEqual([r.name for r in found.records][2:], ["train/000002", "test/000000"])
        self.assertIsNone(found.class_names)

    def test_several_labels_class_names_and_patients(self) -> None:
        labels = np.array([[1, 0], [0, -1]])
        arrays = {"train_images": pixels(2, 4, 4), "train_labels": labels, "train_patients": np.array([7, 9])}
        found = read_npz(self.save(**arrays, class_names=np.array(["a", "b"])))
        self.assertEqual([r.label for r in found.records], [[1, 0], [0, -1]])
        self.assertEqual([r.patient for r in found.records], ["7", "9"])
        self.assertEqual(found.class_names, ["a", "b"])

    def test_lesions_belong_together_where_no_patients_are_known(self) -> None:
        arrays = {"train_images": pixels(3, 4, 4), "train_lesions": np.array(["L7", "", "L7"])}
        self.assertEqual([r.patient for r in read_npz(self.save(**arrays)).records], ["L7", None, "L7"])
        patients = np.array(["p", "p", "q"])
        self.assertEqual(
            [r.patient for r in read_npz(self.save(**arrays, train_patients=patients)).records], ["p", "p", "q"]
        )

    @parameterized.expand([(0.0, 1.0), (-1.0, 1.0)])
    def test_floating_values_keep_the_range_of_the_training_part(self, low: float, high: float) -> None:
        images = np.linspace(low, high, 64, dtype=np.float32).reshape(1, 8, 8)
        found = read_npz(self.save(train_images=images, test_images=images / 2))
        self.assertEqual(found.intensity.float_range, (low, high))
        np.testing.assert_allclose(found.intensity(images).ravel(), np.linspace(-1, 1, 64), atol=1e-6)

    @parameterized.expand(
        [
            ({"labels": pixels(2)}, 2, "has no train_images, val_images, test_images or images; it has labels"),
            ({"train_images": pixels(2, 4)}, 2, r"train_images .* must be \(N, rows, columns\).*got shape \(2, 4\)"),
            ({"train_images": pixels(2, 4, 4)}, 3, r"must be \(N, depth, rows, columns\)"),
            ({"train_images": pixels(0, 4, 4)}, 2, r"got shape \(0, 4, 4\)"),
            ({"train_images": pixels(2, 4, 4), "test_images": pixels(2, 4, 5)}, 2, "images of different shapes"),
            ({"train_images": pixels(2, 4, 4), "train_labels": np.zeros(3)}, 2, "but there are 2 images"),
            ({"train_images": pixels(2, 4, 4), "train_labels": np.zeros((2, 2, 2))}, 2, "has shape"),
            ({"train_images": pixels(2, 4, 4), "train_patients": np.zeros(3)}, 2, "train_patients .* has shape"),
            ({"train_images": pixels(2, 4, 4), "train_lesions": np.zeros(3)}, 2, "train_lesions .* has shape"),
            ({"train_images": pixels(2, 4, 4), "train_masks": pixels(2, 4, 5)}, 2, r"train_masks .* \(2, 4, 4\)"),
            ({"train_images": pixels(2, 4, 4, 4, 2)}, 2, r"must be \(N, rows, columns\).*got shape \(2, 4, 4, 4, 2\)"),
            ({"other_images": pixels(2, 4, 4)}, 2, "'other' is no part of a data set"),
        ]
    )
    def test_wrong_content(self, arrays: dict[str, np.ndarray], spatial_dims: int, message: str) -> None:
        with self.assertRaisesRegex(ValueError, message):
            read_npz(self.save(**arrays), spatial_dims)

    def test_images_without_a_part_with_channels_second(self) -> None:
        """As `channels` says; where both axes have that many entries, the last counts."""
        images = pixels(3, 2, 5, 6, 7)
        names = {"channels": np.array(["FLAIR", "T1c"]), "patients": np.array(["x", "y", "x"])}
        found = read_npz(self.save(images=images, **names), 3)
        self.assertEqual((found.in_channels, list(found.image_size)), (2, [5, 6, 7]))
        self.assertEqual(found.channel_names, ["FLAIR", "T1c"])
        self.assertIsNone(read_npz(self.save(images=images), 3).channel_names)
        for record, image in zip(found.records, images, strict=True):
            np.testing.assert_array_equal(record.image, image)
        self.assertEqual([(r.name, r.part, r.patient) for r in found.records][1], ("images/000001", None, "y"))
        self.assertEqual(read_npz(self.save(images=pixels(3, 2, 5, 2), **names)).image_size, (2, 5))

    def test_masks(self) -> None:
        masks = pixels(3, 4, 5)
        found = read_npz(self.save(train_images=pixels(3, 4, 5, 2), train_masks=masks))
        for record, mask in zip(found.records, masks, strict=True):
            np.testing.assert_array_equal(record.mask, mask[None])

    @parameterized.expand([(0,), (1,), (2,)])
    def test_slices_with_the_class_of_their_mask(self, axis: int) -> None:
        images, masks = np.full((2, 6, 6, 6, 2), 200, np.uint8), np.zeros((2, 6, 6, 6), np.uint8)
        np.moveaxis(images[1], axis, 0)[:2] = 0  # dark
        images[..., 0] //= 2
        np.moveaxis(masks[0], axis, 0)[2, :3, :2] = 4
        np.moveaxis(masks[0], axis, 0)[3, 0, :2] = 4  # too few
        rule = SliceRule(axis, min_mask_pixels=6, classes=("well", "ill"))
        found = read_npz(self.save(images=images, masks=masks), slices=rule)
        names = {record.name: record.label for record in found.records}
        first = {f"images/000000#slice_{n:03d}": int(n == 2) for n in (0, 1, 2, 4, 5)}
        second = {f"images/000001#slice_{n:03d}": 0 for n in (2, 3, 4, 5)}
        self.assertEqual(names, {**first, **second})
        self.assertEqual((found.class_names, found.in_channels, found.image_size), (["well", "ill"], 2, (6, 6)))
        self.assertEqual({record.patient for record in found.records}, {"images/000000", "images/000001"})
        ill = found.records[2]
        assert isinstance(ill.image, np.ndarray) and isinstance(ill.mask, np.ndarray)
        np.testing.assert_array_equal(ill.image[:, 0, 0], [100, 200])
        np.testing.assert_array_equal(ill.mask, np.take(masks[0], 2, axis=axis)[None])

    def test_slices_without_masks_have_the_label_of_their_volume(self) -> None:
        images = pixels(2, 5, 6, 6, 1)
        found = read_npz(self.save(train_images=images, train_labels=np.array([1, 0])), slices=SliceRule())
        self.assertEqual([record.label for record in found.records], [1] * 5 + [0] * 5)
        self.assertEqual({record.part for record in found.records}, {"train"})
        self.assertIsNone(found.class_names)

    def test_rule_of_slices_leaves_2d_images_and_3d_data_alone(self) -> None:
        flat = read_npz(self.save(train_images=pixels(3, 6, 5, 2)), slices=SliceRule())
        self.assertEqual((len(flat.records), flat.image_size), (3, (6, 5)))
        solid = read_npz(self.save(train_images=pixels(3, 6, 5, 4, 2)), 3, SliceRule())
        self.assertEqual((len(solid.records), solid.image_size), (3, (6, 5, 4)))

    def test_volumes_without_anything_are_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "have no slices with anything in them"):
            read_npz(self.save(images=np.zeros((2, 4, 4, 4, 1), np.uint8)), slices=SliceRule())

    @parameterized.expand([(float("nan"),), (float("inf"),)])
    def test_pixels_that_are_no_numbers(self, value: float) -> None:
        images = np.zeros((3, 4, 4), np.float32)
        images[1, 2, 3] = value
        with self.assertRaisesRegex(ValueError, "image 1 of train_images in .*data.npz' holds NaN"):
            read_npz(self.save(train_images=images))

    def test_broken_files(self) -> None:
        self.save(train_images=pixels(20, 8, 8))
        whole = self.path.read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"no archive"):
            self.path.write_bytes(content)
            with self.assertRaisesRegex(ValueError, "cannot read .*data.npz"):
                read_npz(self.path)
        with self.assertRaisesRegex(ValueError, "cannot read .*none.npz"):
            read_npz(self.path.with_name("none.npz"))

    def test_pickled_content_is_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "cannot read"):
            read_npz(self.save(train_images=np.array([{"a": 1}], dtype=object)))


if __name__ == "__main__":
    unittest.main()
