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
from unittest import mock

import numpy as np
import torch
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.visualize import (
    CounterfactualCase,
    counterfactual_panel,
    counterfactual_strip,
    difference_overlay,
    to_tile,
)
from monai_jointdiff.visualize import counterfactual as module
from monai_jointdiff.visualize.counterfactual import BRIGHTER, DARKER, FINDING, REGION
from tests.visualize.counterfactuals import known_result

_, has_matplotlib = optional_import("matplotlib")
_, has_pillow = optional_import("PIL")

SHARE = 0.9  # of the color at the limit


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def case(*args: Any, **kwargs: Any) -> CounterfactualCase:
    known = {
        key: kwargs.pop(key)
        for key in ("class_names", "multi_label", "name", "mask", "label", "limit")
        if key in kwargs
    }
    return CounterfactualCase.of(known_result(*args, **kwargs), 0, **known)


class TestDifferenceOverlay(unittest.TestCase):
    def test_unchanged_pixels_are_the_gray_image(self) -> None:
        image = images(5, 7)
        picture = difference_overlay(image, np.zeros((5, 7)), 0.5)
        for channel in range(3):
            np.testing.assert_allclose(picture[..., channel].astype(int), to_tile(image[None]), atol=1)

    @parameterized.expand([(0.5, 1.0, BRIGHTER), (0.25, 0.5, BRIGHTER), (-0.5, 1.0, DARKER), (-9.0, 1.0, DARKER)])
    def test_color_grows_with_the_change_up_to_the_limit(self, change: float, share: float, color: Any) -> None:
        picture = difference_overlay(np.zeros((2, 2)), np.full((2, 2), change), 0.5)
        expected = (1 - SHARE * share) * 127.5 + SHARE * share * np.array(color)
        np.testing.assert_allclose(picture, np.broadcast_to(expected, (2, 2, 3)), atol=1)

    def test_outlines_lie_on_the_border_of_the_masks(self) -> None:
        region, mask = np.zeros((2, 8, 8), dtype=bool)
        region[1:5, 2:7] = True
        mask[6:, :2] = True  # at the border of the image
        picture = difference_overlay(np.zeros((8, 8)), np.zeros((8, 8)), 1.0, region, mask)
        border = region.copy()
        border[2:4, 3:6] = False
        np.testing.assert_array_equal((picture == REGION).all(axis=-1), border)
        np.testing.assert_array_equal((picture == FINDING).all(axis=-1), mask)

    def test_outlines_are_finer_than_enlarged_pixels(self) -> None:
        region = np.zeros((8, 8), dtype=bool)
        region[2:6, 3:7] = True
        picture = difference_overlay(np.zeros((8, 8)), np.zeros((8, 8)), 1.0, region, magnification=4)
        colored = (picture == REGION).all(axis=-1)
        self.assertEqual(picture.shape, (32, 32, 3))
        self.assertTrue(colored[8:24, 12:14].all() and not colored[10:22, 14:26].any())
        self.assertFalse(colored[:8].any() or colored[24:].any())

    @parameterized.expand([("shape", (3, 4), 1.0, 1), ("limit", (4, 4), 0.0, 1), ("magnification", (4, 4), 1.0, 0)])
    def test_wrong_input(self, _: str, shape: tuple[int, int], limit: float, magnification: int) -> None:
        with self.assertRaisesRegex(ValueError, "difference_overlay: arrays .rows, columns. of one shape"):
            difference_overlay(np.zeros((4, 4)), np.zeros(shape), limit, magnification=magnification)


class TestCase(unittest.TestCase):
    def test_numbers(self) -> None:
        change = images(2, 1, 8, 8)
        result = known_result(
            images(2, 1, 8, 8), change, [[0.9, 0.1], [0.3, 0.7]], [[0.2, 0.8], [0.6, 0.4]], target=[1, 0]
        )
        found = CounterfactualCase.of(result, 1, ["no", "yes"], name="a.png", label="yes")
        self.assertAlmostEqual(found.l1_encoding, 0.01, places=6)
        self.assertAlmostEqual(found.l1_reconstruction, float(np.abs(change[1]).mean()), places=6)
        self.assertAlmostEqual(found.l1_input, float(np.abs(change[1] + 0.01).mean()), places=6)
        self.assertEqual((found.prediction, found.wanted, found.label, found.name), ("yes", "no", "yes", "a.png"))
        self.assertAlmostEqual(found.confidence, 0.7, places=6)
        np.testing.assert_allclose(found.answers, (0.3, 0.3, 0.6), rtol=1e-6)
        self.assertEqual((found.scale, found.network_calls, found.seconds), (11.0, 120.0, 3.0))

    @parameterized.expand([(True, "b: no", "b: yes", (0.3, 0.8)), (False, "b: no", "b: no", (0.7, 0.2))])
    def test_several_labels(self, enforce: bool, prediction: str, wanted: str, answers: tuple[float, float]) -> None:
        found = case(
            images(1, 1, 8, 8),
            0.1,
            [[0.9, 0.3]],
            [[0.9, 0.8]],
            target=1,
            enforce=enforce,
            class_names=["a", "b"],
            multi_label=True,
        )
        self.assertEqual((found.prediction, found.wanted), (prediction, wanted))
        self.assertAlmostEqual(found.confidence, 0.7, places=6)
        np.testing.assert_allclose((found.answers[0], found.answers[2]), answers, rtol=1e-6)

    @parameterized.expand(
        [
            ("none", {}, []),
            ("missed", {"reached": False}, ["was not reached"]),
            ("reconstruction", {"between": [[0.4, 0.6]]}, ["already change the prediction"]),
            ("encoding", {"encoding_error": 0.2}, ["more than the counterfactual does"]),
            ("already", {"already": True, "reached": False, "encoding_error": 0.2}, ["already gives this answer"]),
        ]
    )
    def test_cautions(self, _: str, options: dict[str, Any], expected: list[str]) -> None:
        found = case(images(1, 1, 8, 8), 0.1, **options).cautions
        self.assertEqual(len(found), len(expected))
        for text, part in zip(found, expected, strict=True):
            self.assertIn(part, text)

    @parameterized.expand(
        [
            ("as most probable", [0, 1], "no", "yes", []),
            ("image", [1, 1], "yes", "yes", ["calls the image yes, not no"]),
            ("counterfactual", [0, 0], "no", "no", ["calls the counterfactual no"]),
        ]
    )
    def test_what_the_rule_of_the_model_says(
        self, _: str, decided: list[int], image: str, counterfactual: str, cautions: list[str]
    ) -> None:
        result = known_result(images(1, 1, 8, 8), 0.1)
        found = CounterfactualCase.of(result, 0, ["no", "yes"], decide=lambda probabilities: np.array(decided))
        self.assertEqual((found.decision, found.decision_counterfactual), (image, counterfactual))
        self.assertEqual(len(found.cautions), len(cautions))
        for text, part in zip(found.cautions, cautions, strict=True):
            self.assertIn(part, text)

    def test_the_rule_is_asked_for_the_target_label(self) -> None:
        result = known_result(images(1, 1, 8, 8), 0.1, [[0.9, 0.3]], [[0.1, 0.8]], target=1)
        for decide, expected in (
            (lambda p: (p >= torch.tensor([0.5, 0.2])).long(), ("b: yes", "b: yes")),
            (lambda p: (p >= torch.tensor([0.5, 0.9])).long(), ("b: no", "b: no")),
        ):
            found = CounterfactualCase.of(result, 0, ["a", "b"], multi_label=True, decide=decide)
            self.assertEqual((found.decision, found.decision_counterfactual), expected)

    def test_outcome(self) -> None:
        for reached, already, expected in (
            (True, False, "reached"),
            (False, False, "missed"),
            (True, True, "already"),
            (False, True, "already"),
        ):
            found = case(images(1, 1, 8, 8), 0.1, reached=reached, already=already)
            self.assertEqual(found.outcome, expected)

    def test_targets_share_colors_and_slice(self) -> None:
        """Of one scale, that of the largest change, and one slice, that in which all together change most."""
        volume, one, two = images(1, 1, 5, 8, 6), np.zeros((5, 8, 6)), np.zeros((5, 8, 6))
        one[1, 2], one[3, 2] = 0.3, 0.2
        two[3, 4] = -0.6
        results = [known_result(volume, change, target=k) for k, change in ((1, one), (0, two))]
        cases = CounterfactualCase.of_targets(results, 0, ["a", "b"], name="v")
        self.assertEqual([shown.wanted for shown in cases], ["b", "a"])
        self.assertEqual({shown.tiles.slice_index for shown in cases}, {3})
        for shown in cases:
            self.assertAlmostEqual(shown.tiles.limit, 0.6, places=6)
        self.assertEqual(CounterfactualCase.of(results[0], 0).tiles.slice_index, 1)

    def test_scale_ends_at_the_largest_change_but_not_at_noise(self) -> None:
        change = np.zeros((8, 8))
        change[2, 3] = -0.4
        self.assertAlmostEqual(case(images(1, 1, 8, 8), change).tiles.limit, 0.4, places=6)
        self.assertEqual(case(images(1, 1, 8, 8), 1e-4).tiles.limit, 0.05)
        self.assertEqual(case(images(1, 1, 8, 8), change, limit=0.7).tiles.limit, 0.7)

    def test_volume_shows_the_slice_that_changes_most(self) -> None:
        volume, change = images(1, 1, 5, 8, 6), np.zeros((5, 8, 6))
        change[3, 2:4, 1:5] = 0.2
        change[1, 0, 0] = 0.5
        mask = np.zeros((1, 5, 8, 6), dtype=bool)
        mask[0, 3, 5, 2] = True
        tiles = case(volume, change, mask=mask).tiles
        self.assertEqual((tiles.slice_index, tiles.num_slices), (3, 5))
        factor = len(tiles.image) // 8
        np.testing.assert_array_equal(tiles.image[::factor, ::factor], to_tile(volume[0, :, 3]))
        self.assertTrue(tiles.has_finding)
        self.assertEqual(case(volume, 0.0).tiles.slice_index, 2)

    def test_channels_stand_one_below_the_other(self) -> None:
        image, change = images(1, 2, 8, 6), np.zeros((2, 8, 6))
        change[0, 1, 2], change[1, 5, 4] = 0.3, -0.3
        tiles = case(image, change).tiles
        factor = tiles.image.shape[1] // 6
        small = tiles.image[::factor, ::factor]
        np.testing.assert_array_equal(small, np.concatenate([to_tile(image[0, :1]), to_tile(image[0, 1:])]))
        overlay = tiles.overlay[::factor, ::factor].astype(int)
        np.testing.assert_array_equal(np.argwhere(overlay[..., 0] != overlay[..., 1]), [[1, 2], [8 + 5, 4]])
        self.assertGreater(overlay[1, 2, 0], overlay[1, 2, 2])
        self.assertLess(overlay[13, 4, 0], overlay[13, 4, 2])

    def test_colors_show_the_channel_that_changes_most(self) -> None:
        change = np.zeros((3, 8, 8))
        change[:, 2, 2] = (0.1, -0.4, 0.3)
        tiles = case(np.zeros((1, 3, 8, 8)), change, encoding_error=0.0).tiles
        factor = len(tiles.image) // 8
        self.assertEqual(tiles.image.shape, (8 * factor, 8 * factor, 3))
        expected = (1 - SHARE) * 127.5 + SHARE * np.array(DARKER)
        np.testing.assert_allclose(tiles.overlay[2 * factor, 2 * factor], expected, atol=1)

    def test_of_many_classes_the_target_and_the_most_probable_are_shown(self) -> None:
        before = [[0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05, 0.0]]
        found = case(images(1, 1, 8, 8), 0.1, before, before, target=7)
        self.assertEqual(found.shown_classes(), [0, 1, 2, 3, 4, 7])

    def test_wrong_input(self) -> None:
        result = known_result(images(2, 1, 8, 8), 0.1)
        with self.assertRaisesRegex(ValueError, r"index in \[0, 1\].*got index 2"):
            CounterfactualCase.of(result, 2)
        with self.assertRaisesRegex(ValueError, "2 class names expected, got index 0 and 3 names"):
            CounterfactualCase.of(result, 0, ["a", "b", "c"])


@unittest.skipUnless(has_matplotlib, "matplotlib is not installed")
class TestPanel(unittest.TestCase):
    def drawn(self, shown: CounterfactualCase, *args: Any) -> tuple[Any, np.ndarray]:
        """The figure before it became pixels, and the pixels."""
        figure, make = [], module._new_figure
        with mock.patch.object(module, "_new_figure", lambda *size: figure.append(make(*size)) or figure[0]):
            picture = counterfactual_panel(shown, *args)
        return figure[0], picture

    def test_shows_pictures_probabilities_and_scale(self) -> None:
        region = np.zeros((1, 1, 8, 8), dtype=bool)
        region[..., 2:6, 2:6] = True
        shown = case(
            images(1, 1, 8, 8),
            -0.3,
            between=[[0.7, 0.3]],
            region=region,
            mask=region[0],
            class_names=["normal", "pneumonia"],
            name="left/a.png",
            label="healthy",
        )
        figure, picture = self.drawn(shown)
        self.assertEqual((picture.dtype, picture.ndim, picture.shape[2]), (np.uint8, 3, 3))
        image, reconstruction, counterfactual, change, bars = figure.axes[:5]
        tiles = (shown.tiles.image, shown.tiles.reconstruction, shown.tiles.counterfactual, shown.tiles.overlay)
        for axes, tile in zip((image, reconstruction, counterfactual, change), tiles, strict=True):
            np.testing.assert_array_equal(axes.images[0].get_array(), tile)
        widths = [bar.get_width() for bar in bars.patches]
        np.testing.assert_allclose(widths, [0.9, 0.1, 0.7, 0.3, 0.2, 0.8], rtol=1e-6)
        self.assertEqual([label.get_text() for label in bars.get_yticklabels()], ["normal", "pneumonia"])
        self.assertEqual([text.get_text() for text in change.texts], ["change was allowed here", "true finding"])
        numbers = [label.get_text() for label in change.child_axes[0].get_yticklabels()]
        self.assertEqual(numbers, ["\u22120.30", "\u22120.15", "0", "+0.15", "+0.30"])
        heading = figure.get_suptitle()
        for part in ("left/a.png", "normal (true: healthy)", "pneumonia", "0.10", "0.80"):
            self.assertIn(part, heading)
        self.assertNotIn("not reached", heading)

    def test_says_that_it_was_not_reached_and_which_slice(self) -> None:
        figure, _ = self.drawn(case(images(1, 1, 4, 8, 8), 0.1, reached=False))
        self.assertIn("not reached", figure.get_suptitle())
        self.assertIn("(slice 1 of 4)", figure.get_suptitle())

    def test_a_column_for_each_target(self) -> None:
        p = [[0.7, 0.2, 0.1]]
        parts = ((1, 0.2, [[0.1, 0.8, 0.1]]), (2, -0.4, [[0.3, 0.5, 0.2]]))
        results = [
            known_result(images(1, 2, 8, 8), change, p, after, target=k, reached=k == 1) for k, change, after in parts
        ]
        shown = CounterfactualCase.of_targets(results, 0, ["no", "some", "much"], name="a.png", label="no")
        figure, picture = self.drawn(shown, ["FLAIR", "T1c"])
        self.assertEqual((picture.dtype, picture.shape[2]), (np.uint8, 3))
        titles = [axes.get_title() for axes in figure.axes]
        expected = ["image", "factual reconstruction", "to some\n0.20 \u2192 0.80", "change 0.200"]
        expected += ["to much\n0.10 \u2192 0.20, not reached", "change 0.400"]
        self.assertEqual(titles, expected)
        first = shown[0].tiles
        tiles = [first.image, first.reconstruction]
        for each in shown:
            tiles += [each.tiles.counterfactual, each.tiles.overlay]
        for axes, tile in zip(figure.axes, tiles, strict=True):
            np.testing.assert_array_equal(axes.images[0].get_array(), tile)
        self.assertIn("a.png\nno, probability 0.70 (true: no)", figure.get_suptitle())
        self.assertEqual([label.get_text() for label in figure.axes[0].get_yticklabels()], ["FLAIR", "T1c"])

    def test_no_case(self) -> None:
        with self.assertRaisesRegex(ValueError, "counterfactual_panel: at least one case expected"):
            counterfactual_panel([])

    def test_names_channels(self) -> None:
        figure, _ = self.drawn(case(images(1, 2, 8, 8), 0.1), ["FLAIR", "T1c"])
        self.assertEqual([label.get_text() for label in figure.axes[0].get_yticklabels()], ["FLAIR", "T1c"])

    @parameterized.expand([((1, 1, 8, 8),), ((1, 3, 8, 8),), ((1, 2, 24, 8),), ((1, 1, 3, 8, 20),)])
    def test_names_are_never_read_as_formulas(self, shape: tuple[int, ...]) -> None:
        name = "$\\frac{$_x.png"
        figure, picture = self.drawn(case(images(*shape), 0.2, name=name, class_names=["$a_$", "b$^$"]))
        self.assertIn(name, figure.get_suptitle())
        self.assertGreater(picture.std(), 0)


@unittest.skipUnless(has_pillow, "Pillow is not installed")
class TestStrip(unittest.TestCase):
    def test_one_row_for_each_case(self) -> None:
        result = known_result(images(3, 1, 64, 64), 0.2)
        cases = [CounterfactualCase.of(result, index) for index in range(3)]
        picture = counterfactual_strip(cases)
        side, gap = cases[0].tiles.image.shape[0], 4
        self.assertEqual(picture.shape[1], 4 * side + 5 * gap)
        step = (picture.shape[0] - gap) // 3
        for row, shown in enumerate(cases):
            tiles = (shown.tiles.image, shown.tiles.reconstruction, shown.tiles.counterfactual, shown.tiles.overlay)
            for column, tile in enumerate(tiles):
                top, left = gap + row * step, gap + column * (side + gap)
                found = picture[top : top + side, left : left + side]
                expected = tile if tile.ndim == 3 else np.repeat(tile[..., None], 3, axis=2)
                np.testing.assert_array_equal(found, expected)

    def test_captions_say_what_the_network_says(self) -> None:
        shown = case(images(1, 1, 64, 64), 0.2, between=[[0.4, 0.6]], class_names=["no", "yes"])
        with mock.patch.object(module, "_with_caption", side_effect=lambda tile, text: tile) as captions:
            counterfactual_strip([shown])
        texts = [call.args[1] for call in captions.call_args_list]
        self.assertEqual(texts, ["no 0.90", "yes 0.60", "yes 0.80", "to yes, \u00b10.20"])

    def test_no_case(self) -> None:
        with self.assertRaisesRegex(ValueError, "at least one case expected"):
            counterfactual_strip([])


if __name__ == "__main__":
    unittest.main()
