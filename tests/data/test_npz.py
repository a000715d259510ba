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

    @parameterized.expand([(0.0, 1.0), (-1.0, 1.0)])
    def test_floating_values_keep_the_range_of_the_training_part(self, low: float, high: float) -> None:
        images = np.linspace(low, high, 64, dtype=np.float32).reshape(1, 8, 8)
        found = read_npz(self.save(train_images=images, test_images=images / 2))
        self.assertEqual(found.intensity.float_range, (low, high))
        np.testing.assert_allclose(found.intensity(images).ravel(), np.linspace(-1, 1, 64), atol=1e-6)

    @parameterized.expand(
        [
            ({"images": pixels(2, 4, 4)}, 2, "has no train_images, val_images or test_images; it has images"),
            ({"train_images": pixels(2, 4)}, 2, r"train_images .* must be \(N, rows, columns\).*got shape \(2, 4\)"),
            ({"train_images": pixels(2, 4, 4)}, 3, r"must be \(N, depth, rows, columns\)"),
            ({"train_images": pixels(0, 4, 4)}, 2, r"got shape \(0, 4, 4\)"),
            ({"train_images": pixels(2, 4, 4), "test_images": pixels(2, 4, 5)}, 2, "images of different shapes"),
            ({"train_images": pixels(2, 4, 4), "train_labels": np.zeros(3)}, 2, "but there are 2 images"),
            ({"train_images": pixels(2, 4, 4), "train_labels": np.zeros((2, 2, 2))}, 2, "has shape"),
            ({"train_images": pixels(2, 4, 4), "train_patients": np.zeros(3)}, 2, "train_patients .* has shape"),
            ({"other_images": pixels(2, 4, 4)}, 2, "'other' is no part of a data set"),
        ]
    )
    def test_wrong_content(self, arrays: dict[str, np.ndarray], spatial_dims: int, message: str) -> None:
        with self.assertRaisesRegex(ValueError, message):
            read_npz(self.save(**arrays), spatial_dims)

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
