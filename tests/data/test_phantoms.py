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


"""Phantoms: what is known about them is exactly true."""

from __future__ import annotations

import unittest
from typing import Any
from unittest import mock

import numpy as np
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.data import CHEST_CLASSES, ChestPhantoms
from monai_jointdiff.data import phantoms as phantoms_module
from monai_jointdiff.data.anatomy import Lung, Slab
from monai_jointdiff.metrics import pca_logistic_floor

SHAPES = [(2, (16, 16)), (2, (24, 32)), (3, (8, 16, 16)), (3, (12, 20, 16))]
_, has_sklearn = optional_import("sklearn")


def labelled(source: ChestPhantoms, label: int, count: int) -> list[int]:
    """The first numbers of phantoms with this label."""
    return [index for index in range(20 * count) if source.label(index) == label][:count]


class TestPhantom(unittest.TestCase):
    @parameterized.expand(SHAPES)
    def test_types_shapes_and_ranges(self, spatial_dims: int, size: tuple[int, ...]) -> None:
        source = ChestPhantoms(spatial_dims, size)
        for index in range(6):
            phantom = source(index)
            self.assertEqual((phantom.image.shape, phantom.image.dtype), ((1, *size), np.uint8))
            self.assertEqual((phantom.mask.shape, phantom.mask.dtype), ((1, *size), np.bool_))
            self.assertEqual(phantom.label, source.label(index))
            self.assertGreater(np.ptp(phantom.image.astype(int)), 64)
            self.assertEqual(source.density(index).shape, size)

    def test_one_number_is_the_size_of_all_axes(self) -> None:
        self.assertEqual(ChestPhantoms(2, 24)(0).image.shape, (1, 24, 24))
        self.assertEqual(ChestPhantoms(3, 8)(0).image.shape, (1, 8, 8, 8))

    @parameterized.expand([(2,), (3,)])
    def test_function_of_seed_and_index(self, spatial_dims: int) -> None:
        forward = [ChestPhantoms(spatial_dims, 16, 5)(index) for index in range(4)]
        source = ChestPhantoms(spatial_dims, 16, 5)
        for index in (2, 0, 3, 1, 2):
            np.random.rand(2)  # noqa: NPY002 (the global state has no say)
            again = source(index)
            np.testing.assert_array_equal(again.image, forward[index].image)
            np.testing.assert_array_equal(again.mask, forward[index].mask)
            self.assertEqual(again.label, forward[index].label)
        next_seed = ChestPhantoms(spatial_dims, 16, 6)
        for one, other in ((0, forward[1]), (0, next_seed(0)), (1, next_seed(0))):
            self.assertFalse(np.array_equal(other.image, forward[one].image))

    def test_classes_are_equally_frequent(self) -> None:
        source = ChestPhantoms(2, 8)
        counts = np.bincount([source.label(index) for index in range(3000)], minlength=3)
        np.testing.assert_allclose(counts / 3000, 1 / 3, atol=5 * np.sqrt(2 / 9 / 3000))
        self.assertEqual(CHEST_CLASSES, ("normal", "opacity", "effusion"))

    def test_label_is_the_same_in_2d_and_3d(self) -> None:
        flat, solid = ChestPhantoms(2, 8, 1), ChestPhantoms(3, 8, 1)
        self.assertEqual([flat.label(n) for n in range(50)], [solid.label(n) for n in range(50)])

    @parameterized.expand(
        [
            ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
            ({"spatial_dims": 4}, "spatial_dims must be 2 or 3, got 4"),
            ({"image_size": 7}, "image_size must be 2 numbers of at least 8, got 7"),
            ({"image_size": (32, 32, 32)}, "image_size must be 2 numbers"),
            ({"spatial_dims": 3, "image_size": (8, 8)}, "image_size must be 3 numbers"),
            ({"seed": -1}, "seed must be at least 0, got -1"),
        ]
    )
    def test_wrong_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"ChestPhantoms: {message}"):
            ChestPhantoms(**arguments)

    @parameterized.expand([(-1,), (3,)])
    def test_wrong_label(self, label: int) -> None:
        source = ChestPhantoms(2, 16)
        for draw in (source, source.density):
            with self.assertRaisesRegex(ValueError, rf"ChestPhantoms: label must be in \[0, 3\), got {label}"):
                draw(0, label)

    def test_negative_number_is_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "negative"):
            ChestPhantoms(2, 16)(-1)


class TestProjection(unittest.TestCase):
    @parameterized.expand([(8, (16, 16)), (33, (24, 20))])
    def test_picture_is_the_mean_of_the_volume_along_the_depth(self, depth: int, size: tuple[int, int]) -> None:
        flat, solid = ChestPhantoms(2, size, 2), ChestPhantoms(3, (depth, *size), 2)
        for index in range(12):
            for label in (None, 1, 2):
                np.testing.assert_allclose(
                    solid.density(index, label).mean(axis=0), flat.density(index, label), atol=2e-5
                )

    def test_thick_slices_are_means_of_thin_ones(self) -> None:
        thin, thick = ChestPhantoms(3, (32, 16, 16)), ChestPhantoms(3, (8, 16, 16))
        for index in range(6):
            pooled = thin.density(index).reshape(8, 4, 16, 16).mean(axis=1)
            np.testing.assert_allclose(pooled, thick.density(index), atol=5e-5)

    def test_anatomy_lies_where_it_should(self) -> None:
        """Means over many normal chests: dark lungs at both sides, heart on the right of the picture, spine behind."""
        flat = np.mean([ChestPhantoms(2, 32).density(n, 0) for n in range(60)], axis=0)
        self.assertLess(flat[12, 9], 0.75 * flat[12, 15])
        self.assertLess(flat[12, 22], 0.75 * flat[12, 16])
        self.assertGreater(flat[20, 20], flat[20, 11])
        self.assertLess(flat[:4, :3].mean(), 0.1)
        solid = np.mean([ChestPhantoms(3, (16, 32, 32)).density(n, 0) for n in range(60)], axis=0)
        front, back = solid[3:6, 8:24, 15:17].mean(), solid[10:13, 8:24, 15:17].mean()
        self.assertGreater(back, front)


class TestFindings(unittest.TestCase):
    @parameterized.expand(SHAPES)
    def test_mask_is_empty_for_normal_and_only_there(self, spatial_dims: int, size: tuple[int, ...]) -> None:
        source = ChestPhantoms(spatial_dims, size)
        for index in range(60):
            phantom = source(index)
            self.assertEqual(bool(phantom.mask.any()), phantom.label != 0)
            self.assertLess(phantom.mask.mean(), 0.25)

    @parameterized.expand(SHAPES)
    def test_healthy_twin_is_the_same_outside_of_the_mask(self, spatial_dims: int, size: tuple[int, ...]) -> None:
        source = ChestPhantoms(spatial_dims, size, 3)
        for index in range(20):
            twin = source(index, 0)
            self.assertFalse(twin.mask.any())
            self.assertEqual(twin.label, 0)
            for label in (1, 2):
                ill = source(index, label)
                self.assertEqual(ill.label, label)
                np.testing.assert_array_equal(ill.image[~ill.mask], twin.image[~ill.mask])
                self.assertTrue((ill.image[ill.mask] != twin.image[ill.mask]).any())

    @parameterized.expand(SHAPES)
    def test_mask_is_where_the_density_grows(self, spatial_dims: int, size: tuple[int, ...]) -> None:
        source = ChestPhantoms(spatial_dims, size, 4)
        for index in range(20):
            for label in (1, 2):
                added = source.density(index, label).astype(float) - source.density(index, 0)
                mask = source(index, label).mask[0]
                self.assertGreater(added[mask].mean(), 0.0)
                np.testing.assert_allclose(added[~mask], 0.0, atol=1e-6)
                self.assertGreaterEqual(added.min(), -1e-6)

    def test_own_label_draws_what_the_label_demands(self) -> None:
        source = ChestPhantoms(2, 16)
        for index in range(9):
            np.testing.assert_array_equal(source(index).image, source(index, source.label(index)).image)

    @parameterized.expand([(1,), (2,)])
    def test_finding_lies_in_one_lung(self, label: int) -> None:
        source = ChestPhantoms(2, 32, 7)
        seen: list[list[Lung]] = []
        original = phantoms_module.anatomy

        def recording(*arguments: Any) -> tuple[list[Slab], list[Lung]]:
            slabs, lungs = original(*arguments)
            seen.append(lungs)
            return slabs, lungs

        sides = set()
        with mock.patch.object(phantoms_module, "anatomy", recording):
            for index in range(40):
                mask = source(index, label).mask[0]
                inside = [not mask[(lung.half <= 0) | (lung.air <= 0)].any() for lung in seen.pop()]
                self.assertTrue(any(inside), index)
                sides.add(tuple(inside))
        self.assertLessEqual({(True, False), (False, True)}, sides)

    def test_mask_of_the_volume_casts_the_mask_of_the_picture(self) -> None:
        flat, solid = ChestPhantoms(2, 24, 1), ChestPhantoms(3, (16, 24, 24), 1)
        for index in range(20):
            for label in (1, 2):
                shadow, mask = solid(index, label).mask[0].any(axis=0), flat(index, label).mask[0]
                self.assertTrue((mask | ~shadow).all())
                added = flat.density(index, label) - flat.density(index, 0)
                self.assertLess(added[mask & ~shadow].max(initial=0.0), 1e-4)

    @parameterized.expand([(2, 32, 0, (4709, 5619)), (2, 32, 1, (1453, 4014)), (3, 16, 0, (1716, 2511)), (2, 8, 3, ())])
    def test_no_effusion_is_lost_under_a_short_lung(
        self, spatial_dims: int, size: int, seed: int, numbers: tuple[int, ...]
    ) -> None:
        """In these the level lay below the lung, so that nothing was to be seen of the finding."""
        source = ChestPhantoms(spatial_dims, size, seed)
        for index in (*numbers, *range(200)):
            self.assertTrue(source(index, 2).mask.any(), index)
            self.assertGreater((source.density(index, 2) - source.density(index, 0)).max(), 0.02)

    def test_effusions_lie_at_the_bottom_and_rise_to_the_wall(self) -> None:
        source = ChestPhantoms(2, 32)
        rows = np.arange(32)[:, None]
        low = [np.average(np.broadcast_to(rows, (32, 32)), weights=source(n, 2).mask[0]) for n in range(40)]
        high = [np.average(np.broadcast_to(rows, (32, 32)), weights=source(n, 1).mask[0]) for n in range(40)]
        self.assertGreater(np.mean(low), np.mean(high) + 3)
        outer, inner = [], []
        for index in range(40):
            mask = source(index, 2).mask[0]
            columns = np.flatnonzero(mask.sum(axis=0) >= 2)
            if len(columns) < 4:
                continue
            tops = mask[:, columns].argmax(axis=0)
            if columns.mean() < 15.5:
                tops = tops[::-1]
            half = len(tops) // 2
            inner.append(tops[:half].mean())
            outer.append(tops[-half:].mean())
        self.assertLess(np.mean(outer), np.mean(inner))


class TestDifficulty(unittest.TestCase):
    @unittest.skipUnless(has_sklearn, "needs scikit-learn")
    def test_a_linear_model_does_not_solve_it(self) -> None:
        source = ChestPhantoms(2, 32)
        images = np.stack([source(index).image for index in range(1300)]).astype(np.float32) / 255
        labels = np.array([source.label(index) for index in range(1300)])
        floor = pca_logistic_floor(images[:1000], labels[:1000], images[1000:], labels[1000:])
        self.assertLess(floor.auc, 0.85)
        self.assertGreater(floor.auc, 0.55)

    def test_mean_brightness_does_not_tell_the_classes(self) -> None:
        source = ChestPhantoms(2, 32)
        means = [[source(n).image.mean() for n in labelled(source, label, 120)] for label in range(3)]
        for ill in means[1:]:
            auc = np.mean(np.array(ill)[:, None] > np.array(means[0])[None])
            self.assertLess(abs(auc - 0.5), 0.2)


if __name__ == "__main__":
    unittest.main()
