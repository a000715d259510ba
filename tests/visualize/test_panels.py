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

import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.visualize import denoising_strip, image_grid, save_png, to_tile

pil_image, has_pillow = optional_import("PIL.Image")
GAP = 4


class TestToTile(unittest.TestCase):
    def test_range_is_black_to_white_and_cut(self):
        tile = to_tile(torch.tensor([[[-1.0, 0.0, 1.0, 7.0, -7.0]]]))
        np.testing.assert_array_equal(tile, [[0, 128, 255, 255, 0]])

    def test_a_volume_shows_its_central_slice(self):
        volume = np.linspace(-1, 1, 5)[None, :, None, None] * np.ones((1, 5, 2, 3))
        np.testing.assert_array_equal(to_tile(volume), np.full((2, 3), 128))

    def test_channels(self):
        image = np.stack([np.full((2, 3), value) for value in (-1.0, 0.0, 1.0)])
        np.testing.assert_array_equal(to_tile(image)[0, 0], [0, 128, 255])
        np.testing.assert_array_equal(to_tile(image[[0, 2]]), [[0, 0, 0, 255, 255, 255]] * 2)

    @parameterized.expand([("axes", np.zeros((4, 4))), ("nan", np.full((1, 4, 4), np.nan))])
    def test_wrong_input(self, _, image):
        with self.assertRaisesRegex(ValueError, "to_tile"):
            to_tile(image)


class TestImageGrid(unittest.TestCase):
    @parameterized.expand([("2d", (3, 5)), ("3d", (1, 3, 5))])
    def test_every_image_stands_at_its_place(self, _, size):
        generator = torch.Generator().manual_seed(0)
        images = 2 * torch.rand(5, 1, *size, generator=generator) - 1
        grid = image_grid(MetaTensor(images), columns=3, magnification=2)
        self.assertEqual(grid.shape, (2 * 6 + 3 * GAP, 3 * 10 + 4 * GAP))
        covered = np.zeros(grid.shape, bool)
        for number, image in enumerate(images):
            top, left = GAP + number // 3 * (6 + GAP), GAP + number % 3 * (10 + GAP)
            np.testing.assert_array_equal(grid[top : top + 6 : 2, left : left + 10 : 2], to_tile(image))
            np.testing.assert_array_equal(grid[top + 1 : top + 6 : 2, left + 1 : left + 10 : 2], to_tile(image))
            covered[top : top + 6, left : left + 10] = True
        self.assertTrue((grid[~covered] == 255).all())

    def test_small_images_are_enlarged_by_a_whole_factor(self):
        self.assertEqual(image_grid(np.zeros((1, 1, 28, 28))).shape, (4 * 28 + 2 * GAP, 4 * 28 + 2 * GAP))
        self.assertEqual(image_grid(np.zeros((1, 1, 224, 224))).shape, (224 + 2 * GAP, 224 + 2 * GAP))
        self.assertEqual(image_grid(np.zeros((4, 3, 60, 60))).shape, (2 * 120 + 3 * GAP, 2 * 120 + 3 * GAP, 3))

    @unittest.skipUnless(has_pillow, "Pillow is not installed")
    def test_captions_stand_below_and_leave_the_images_alone(self):
        images = np.random.default_rng(0).uniform(-1, 1, size=(2, 1, 112, 112))
        plain, with_text = image_grid(images, 2), image_grid(images, 2, ["a", "a very long caption that is cut"])
        self.assertEqual(plain.shape[1], with_text.shape[1])
        np.testing.assert_array_equal(with_text[: GAP + 112], plain[: GAP + 112])
        below = with_text[GAP + 112 :]
        for left in (GAP, GAP + 112 + GAP):
            self.assertTrue((below[:, left : left + 112] < 128).any())

    @parameterized.expand([("columns", 3, 0, None), ("none", 0, None, None), ("captions", 3, None, ["a"])])
    def test_wrong_input(self, _, count, columns, captions):
        with self.assertRaisesRegex(ValueError, "image_grid"):
            image_grid(np.zeros((count, 1, 8, 8)), columns, captions)


class TestDenoisingStrip(unittest.TestCase):
    def setUp(self):
        # step s of sample n is constant: its gray value tells both
        self.steps = [
            np.full((3, 1, 112, 112), -1 + 0.1 * s) + 0.02 * np.arange(3)[:, None, None, None] for s in range(11)
        ]

    def gray_values(self, strip: np.ndarray) -> np.ndarray:
        return strip[GAP + 50 :: 112 + GAP, GAP + 50 :: 112 + GAP]

    def test_samples_are_rows_and_time_runs_to_the_right(self):
        strip = denoising_strip(self.steps, rows=2, columns=3)
        expected = [[to_tile(self.steps[s][n])[0, 0] for s in (0, 5, 10)] for n in range(2)]
        np.testing.assert_array_equal(self.gray_values(strip), expected)

    def test_no_more_than_there_is(self):
        strip = denoising_strip(self.steps[:2], rows=9, columns=8)
        self.assertEqual(self.gray_values(strip).shape, (3, 2))

    @unittest.skipUnless(has_pillow, "Pillow is not installed")
    def test_captions_of_the_steps_shown(self):
        strip = denoising_strip(self.steps, rows=2, columns=3, captions=[f"t={s}" for s in range(11)])
        plain = denoising_strip(self.steps, rows=2, columns=3)
        np.testing.assert_array_equal(strip[: 2 * (112 + GAP)], plain[: 2 * (112 + GAP)])
        self.assertTrue((strip[2 * (112 + GAP) :] < 128).any())

    @parameterized.expand([("steps", 1, {}), ("rows", 3, {"rows": 0}), ("captions", 3, {"captions": ["a"]})])
    def test_wrong_input(self, _, count, options):
        with self.assertRaisesRegex(ValueError, "denoising_strip"):
            denoising_strip(self.steps[:count], **options)


@unittest.skipUnless(has_pillow, "Pillow is not installed")
class TestSavePng(unittest.TestCase):
    @parameterized.expand([((5, 7),), ((5, 7, 3),)])
    def test_round_trip(self, shape):
        array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "new" / "picture.png"
            save_png(array, path)
            np.testing.assert_array_equal(np.asarray(pil_image.open(path)), array)

    @parameterized.expand(
        [
            ("dtype", np.zeros((4, 4)), "a.png"),
            ("channels", np.zeros((4, 4, 2), np.uint8), "a.png"),
            ("ending", np.zeros((4, 4), np.uint8), "a.jpg"),
        ]
    )
    def test_wrong_input(self, _, array, name):
        with tempfile.TemporaryDirectory() as folder, self.assertRaisesRegex(ValueError, "save_png"):
            save_png(array, Path(folder) / name)


if __name__ == "__main__":
    unittest.main()
