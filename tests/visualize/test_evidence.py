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

import unittest
from typing import Any

import numpy as np
import torch
from parameterized import parameterized

from monai_jointdiff.visualize import evidence_panel

TILE = 256
CAPTION = 20


def map_of(picture: np.ndarray, number: int) -> np.ndarray:
    """The pixels of a tile, with their gaps of 4 left out."""
    left = 4 + number * (TILE + 4)
    return picture[4 : 4 + TILE, left : left + TILE].astype(int)


class TestEvidencePanel(unittest.TestCase):
    def setUp(self) -> None:
        self.evidence = np.zeros((1, 8, 8))
        self.evidence[0, 2, 1], self.evidence[0, 5, 6] = 0.4, -0.4

    def test_colors_tell_for_whom_a_pixel_speaks(self) -> None:
        picture = evidence_panel(torch.zeros(1, 8, 8), torch.from_numpy(self.evidence), ["a", "b"])
        self.assertEqual(picture.dtype, np.uint8)
        self.assertEqual(picture.shape[1], 2 * TILE + 3 * 4)
        shown = map_of(picture, 1)
        red_more_than_blue = shown[..., 0] - shown[..., 2]
        step = TILE // 8
        self.assertTrue((red_more_than_blue[2 * step : 3 * step, step : 2 * step] > 100).all())
        self.assertTrue((red_more_than_blue[5 * step : 6 * step, 6 * step : 7 * step] < -100).all())
        self.assertEqual(int((red_more_than_blue != 0).sum()), 2 * step * step)
        self.assertTrue((map_of(picture, 0) == 128).all())  # the image itself stays gray

    def test_scale_is_of_the_map(self) -> None:
        one, other = (evidence_panel(np.zeros((1, 8, 8)), k * self.evidence, ["", ""]) for k in (1, 1e-4))
        self.assertTrue((map_of(one, 1) == map_of(other, 1)).all())
        self.assertTrue((map_of(evidence_panel(np.zeros((1, 8, 8)), 0 * self.evidence, ["", ""]), 1) == 128).all())

    def test_a_map_for_each_label_and_the_outline_of_the_finding(self) -> None:
        mask = np.zeros((1, 8, 8), dtype=bool)
        mask[0, 3:6, 3:6] = True
        both = np.concatenate([self.evidence, -self.evidence])
        picture = evidence_panel(np.zeros((1, 8, 8)), both, ["", "", ""], mask)
        self.assertEqual(picture.shape[1], 3 * TILE + 4 * 4)
        one, two = map_of(picture, 1), map_of(picture, 2)
        self.assertTrue((np.sign(one - one[..., ::-1])[2 * 32, 32] == np.sign(two[..., ::-1] - two)[2 * 32, 32]).all())
        orange = (one == (230, 159, 0)).all(axis=-1)
        self.assertTrue(orange[3 * 32, 3 * 32 : 6 * 32].all())
        self.assertFalse(orange[: 3 * 32].any())

    def test_volume_shows_the_slice_with_most_evidence(self) -> None:
        volume, evidence = np.zeros((1, 5, 8, 8)), np.zeros((1, 5, 8, 8))
        evidence[:, 3] = self.evidence
        flat = evidence_panel(volume[:, 3], evidence[:, 3], ["x", "y"])
        shown = evidence_panel(volume, evidence, ["x", "y"])
        self.assertTrue((map_of(flat, 1) == map_of(shown, 1)).all())
        self.assertFalse((flat[TILE + 4 :] == shown[TILE + 4 :]).all())  # its caption names the slice

    @parameterized.expand([(1, TILE), (2, 2 * TILE), (3, TILE)])
    def test_channels(self, channels: int, height: int) -> None:
        picture = evidence_panel(np.zeros((channels, 8, 8)), self.evidence, ["", ""])
        self.assertEqual(picture.shape, (height + 8 + CAPTION, 2 * TILE + 12, 3))

    @parameterized.expand([((1, 8, 8), (1, 8, 7), 2), ((1, 8, 8), (1, 8, 8), 3), ((8, 8), (1, 8), 2)])
    def test_wrong_input(self, image: Any, evidence: Any, captions: int) -> None:
        with self.assertRaisesRegex(ValueError, "evidence_panel: an image .* captions expected, got"):
            evidence_panel(np.zeros(image), np.zeros(evidence), [""] * captions)


if __name__ == "__main__":
    unittest.main()
