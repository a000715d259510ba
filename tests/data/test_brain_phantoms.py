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

"""Brain phantoms: what is known about them is exactly true."""

from __future__ import annotations

import unittest
import unittest.mock
from typing import Any

import numpy as np
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.data import BRAIN_CLASSES, BrainPhantoms, ChestPhantoms, Phantoms, brain_phantoms, make_phantoms
from monai_jointdiff.data.brain_anatomy import Layer, paint
from monai_jointdiff.metrics import macro_auc, pca_logistic_floor

SHAPES = [(2, (16, 16)), (2, (24, 32)), (3, (8, 16, 16)), (3, (12, 20, 16))]
_, has_sklearn = optional_import("sklearn")


def tumours(source: BrainPhantoms, count: int) -> list[int]:
    return [index for index in range(10 * count) if source.label(index) == 1][:count]


class TestPhantom(unittest.TestCase):
    @parameterized.expand(SHAPES)
    def test_types_shapes_and_ranges(self, spatial_dims: int, size: tuple[int, ...]) -> None:
        source = BrainPhantoms(spatial_dims, size)
        for index in range(6):
            phantom = source(index)
            self.assertEqual((phantom.image.shape, phantom.image.dtype), ((2, *size), np.uint8))
            self.assertEqual((phantom.mask.shape, phantom.mask.dtype), ((1, *size), np.bool_))
            self.assertEqual(phantom.label, source.label(index))
            for channel in phantom.image:
                self.assertGreater(np.ptp(channel.astype(int)), 48)
            signal = source.signal(index)
            self.assertEqual(signal.shape, (2, *size))
            self.assertTrue(signal.min() >= -1e-6 and signal.max() <= 1 + 1e-6)

    @parameterized.expand([(2,), (3,)])
    def test_function_of_seed_and_index(self, spatial_dims: int) -> None:
        forward = [BrainPhantoms(spatial_dims, 16, 5)(index) for index in range(4)]
        source = BrainPhantoms(spatial_dims, 16, 5)
        for index in (2, 0, 3, 1, 2):
            again = source(index)
            np.testing.assert_array_equal(again.image, forward[index].image)
            np.testing.assert_array_equal(again.mask, forward[index].mask)
            self.assertEqual(again.label, forward[index].label)
        other = BrainPhantoms(spatial_dims, 16, 6)
        for one, two in ((0, forward[1]), (0, other(0)), (1, other(0))):
            self.assertFalse(np.array_equal(two.image, forward[one].image))

    def test_classes_are_equally_frequent_and_the_same_in_2d_and_3d(self) -> None:
        flat, solid = BrainPhantoms(2, 8, 1), BrainPhantoms(3, 8, 1)
        labels = [flat.label(index) for index in range(2000)]
        self.assertAlmostEqual(np.mean(labels), 0.5, delta=5 * 0.5 / np.sqrt(2000))
        self.assertEqual(labels[:50], [solid.label(index) for index in range(50)])
        self.assertEqual(BRAIN_CLASSES, ("no_tumour", "tumour"))

    @parameterized.expand(
        [
            ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
            ({"image_size": 7}, "image_size must be 2 numbers of at least 8, got 7"),
            ({"spatial_dims": 3, "image_size": (8, 8)}, "image_size must be 3 numbers"),
            ({"seed": -1}, "seed must be at least 0, got -1"),
        ]
    )
    def test_wrong_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"BrainPhantoms: {message}"):
            BrainPhantoms(**arguments)

    @parameterized.expand([(-1,), (2,)])
    def test_wrong_label(self, label: int) -> None:
        source = BrainPhantoms(2, 16)
        for draw in (source, source.signal):
            with self.assertRaisesRegex(ValueError, rf"BrainPhantoms: label must be in \[0, 2\), got {label}"):
                draw(0, label)


class TestKinds(unittest.TestCase):
    @parameterized.expand([("chest", ChestPhantoms, 1, 3), ("brain", BrainPhantoms, 2, 2)])
    def test_by_name(self, kind: str, cls: type[Phantoms], channels: int, classes: int) -> None:
        phantoms = make_phantoms(kind, 3, (8, 12, 16), 4)
        self.assertIs(type(phantoms), cls)
        self.assertEqual((phantoms.in_channels, len(phantoms.class_names)), (channels, classes))
        self.assertEqual(phantoms(2).image.shape, (channels, 8, 12, 16))
        np.testing.assert_array_equal(phantoms(2).image, cls(3, (8, 12, 16), 4)(2).image)

    def test_unknown_name(self) -> None:
        with self.assertRaisesRegex(ValueError, "phantoms must be one of brain, chest, skin, got 'knee'"):
            make_phantoms("knee", 2, 16)


class TestScene(unittest.TestCase):
    def test_layers_cover_each_other(self) -> None:
        half, whole = np.full((1, 1, 2), 0.5, np.float32), np.ones((1, 1, 2), np.float32)
        canvas = np.zeros((2, 1, 1, 2), np.float32)
        painted = paint([Layer(whole, (0.4, 0.8)), Layer(half, (0.0, 1.0))], canvas)
        np.testing.assert_allclose(painted[:, 0, 0, 0], [0.2, 0.9], atol=1e-6)
        np.testing.assert_array_equal(canvas, 0)

    @parameterized.expand([(16, (16, 20)), (41, (24, 24))])
    def test_picture_is_the_slice_of_the_volume_at_its_level(self, depth: int, size: tuple[int, int]) -> None:
        """Where a plane of the volume has the height of the picture, both are the same."""
        flat = BrainPhantoms(2, size, 2)
        heights = (2 * np.arange(depth) + 1) / depth - 1
        for index in range(6):
            solid, level = BrainPhantoms(3, (depth, *size), 2), flat.level(index)
            plane = int(np.abs(heights - level).argmin())
            lifted = (heights + level - heights[plane]).astype(np.float32)
            with unittest.mock.patch.object(brain_phantoms, "pixel_centers", return_value=lifted):
                for label in (0, 1):
                    volume = solid.signal(index, label)
                    np.testing.assert_allclose(volume[:, plane], flat.signal(index, label), atol=2e-4)

    def test_contrast_of_tissues(self) -> None:
        """In the mean: the fluid of ventricles is dark, white matter is darker than gray in FLAIR, brighter in T1c."""
        source = BrainPhantoms(2, 32)
        mean = np.mean([source.signal(index, 0) for index in range(200)], axis=0)
        flair, t1c = mean
        ventricles, white = (slice(13, 15), slice(17, 18)), (slice(13, 15), slice(20, 22))
        self.assertLess(flair[ventricles].mean(), 0.8 * flair[white].mean())
        self.assertLess(t1c[ventricles].mean(), 0.85 * t1c[white].mean())
        self.assertGreater((t1c - flair)[white].mean(), 0.04)
        self.assertLess(mean[:, 0, 0].max(), 0.02)


class TestTumours(unittest.TestCase):
    @parameterized.expand(SHAPES)
    def test_mask_is_empty_without_and_never_with_a_tumour(self, spatial_dims: int, size: tuple[int, ...]) -> None:
        source = BrainPhantoms(spatial_dims, size)
        for index in range(60):
            phantom = source(index)
            self.assertEqual(bool(phantom.mask.any()), phantom.label == 1)
            self.assertLess(phantom.mask.mean(), 0.3)

    @parameterized.expand(SHAPES)
    def test_healthy_twin_is_the_same_outside_of_the_mask(self, spatial_dims: int, size: tuple[int, ...]) -> None:
        source = BrainPhantoms(spatial_dims, size, 3)
        for index in range(20):
            ill, twin = source(index, 1), source(index, 0)
            self.assertEqual((ill.label, twin.label, twin.mask.any()), (1, 0, False))
            outside = ~ill.mask[0]
            np.testing.assert_array_equal(ill.image[:, outside], twin.image[:, outside])
            self.assertTrue((ill.image[:, ~outside] != twin.image[:, ~outside]).any())

    @parameterized.expand([(2, 32), (3, 24)])
    def test_mask_is_where_the_signal_changes(self, spatial_dims: int, size: int) -> None:
        source = BrainPhantoms(spatial_dims, size, 4)
        for index in range(20):
            changed = np.abs(source.signal(index, 1) - source.signal(index, 0)).max(axis=0)
            mask = source(index, 1).mask[0]
            np.testing.assert_array_equal(changed[~mask], 0.0)
            self.assertGreater((changed[mask] > 0).mean(), 0.95)

    def test_oedema_is_bright_in_flair_and_a_rim_in_t1c_around_a_dark_middle(self) -> None:
        source = BrainPhantoms(2, 64)
        brighter, rims, middles = [], [], []
        for index in tumours(source, 40):
            before, after = source.signal(index, 0), source.signal(index, 1)
            mask = source(index, 1).mask[0]
            added = after - before
            brighter.append(added[0][mask].mean())
            rims.append(added[1][mask].max())
            middles.append(added[1][mask].min())
        self.assertGreater(np.mean(brighter), 0.2)
        self.assertGreater(min(rims), 0.1)
        self.assertGreater(np.mean(rims), 0.3)
        self.assertLess(np.mean(middles), -0.15)

    def test_lies_in_brain_tissue(self) -> None:
        """Never in the skin, the skull or the air: these stay as they were."""
        source = BrainPhantoms(3, (24, 32, 32))
        for index in tumours(source, 10):
            _, _, healthy, grown = source._scene(source._generator(index), None)
            tissue = healthy[3].cover
            for layer in grown:
                np.testing.assert_array_equal(layer.cover[tissue == 0], 0)

    def test_every_slice_through_the_level_shows_it(self) -> None:
        source = BrainPhantoms(2, 32, 9)
        sizes = [int(source(index).mask.sum()) for index in tumours(source, 200)]
        self.assertGreater(min(sizes), 8)


class TestDifficulty(unittest.TestCase):
    @unittest.skipUnless(has_sklearn, "needs scikit-learn")
    def test_a_linear_model_and_brightness_do_not_solve_it(self) -> None:
        source = BrainPhantoms(2, 32)
        phantoms = [source(index) for index in range(1300)]
        images = np.stack([phantom.image for phantom in phantoms]).astype(np.float32) / 255
        labels = np.array([phantom.label for phantom in phantoms])
        floor = pca_logistic_floor(images[:1000], labels[:1000], images[1000:], labels[1000:])
        self.assertLess(floor.auc, 0.9)
        self.assertGreater(floor.auc, 0.6)
        for score in (images[:, 0].mean(axis=(1, 2)), images[:, 0].max(axis=(1, 2)), images[:, 1].max(axis=(1, 2))):
            self.assertLess(macro_auc(np.stack([1 - score, score], axis=1), labels), 0.9)


if __name__ == "__main__":
    unittest.main()
