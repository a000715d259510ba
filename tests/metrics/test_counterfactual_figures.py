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


"""All figures of a run of counterfactuals are those of the functions that measure each of them."""

from __future__ import annotations

import json
import unittest

import torch
from parameterized import parameterized

from monai_jointdiff.metrics import (
    counterfactual_figures,
    cout,
    flip_rate,
    l1_distance,
    l2_distance,
    localization_report,
    sparsity,
    structural_similarity,
)


def by_mean(images: torch.Tensor) -> torch.Tensor:
    """A model: class 1 where the mean is above 0."""
    p = torch.sigmoid(20 * images.flatten(1).mean(1))
    return torch.stack([1 - p, p], 1)


def by_corner(images: torch.Tensor) -> torch.Tensor:
    """An oracle: class 1 where the first pixel is above 0."""
    p = torch.sigmoid(20 * images.flatten(1)[:, 0])
    return torch.stack([1 - p, p], 1)


def run(shape: tuple[int, ...] = (1, 12, 12)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dark images, five of which get a bright block, and one that is bright already; the blocks as masks."""
    images = 0.02 * torch.randn(7, *shape, generator=torch.Generator().manual_seed(0)) - 0.05
    images[6] += 0.3
    masks = torch.zeros(7, 1, *shape[1:])
    masks[:5, ..., :6] = 1
    reconstructions = images + 0.01
    counterfactuals = reconstructions + 0.3 * masks
    return images, reconstructions, counterfactuals, masks


class TestCounterfactualFigures(unittest.TestCase):
    @parameterized.expand([((1, 12, 12),), ((2, 6, 12, 12),)])
    def test_are_those_of_their_functions(self, shape: tuple[int, ...]) -> None:
        x, x_fr, x_cf, masks = run(shape)
        names = ["dark", "bright"]
        options = {"masks": masks, "class_names": names, "bootstrap": 50}
        found = counterfactual_figures(x, x_fr, x_cf, 1, classify=by_mean, oracle=by_corner, batch_size=3, **options)
        self.assertEqual((found.count, found.already), (7, 1))
        asked = slice(0, 6)  # the last image was bright before
        for figures, judge in ((found.model, by_mean), (found.oracle, by_corner)):
            assert figures is not None
            expected = flip_rate(judge(x), judge(x_cf), 1, class_names=names, bootstrap=50)
            self.assertEqual(figures.flips.as_dict(), expected.as_dict())
            could = judge(x)[:, 1] < 0.5
            self.assertAlmostEqual(figures.cout.value, cout(x[could], x_cf[could], judge, 1).mean(), places=6)
        self.assertEqual(found.model.flips.overall.rate.value, 5 / 6)
        for others, figures in ((x, found.to_input), (x_fr, found.to_reconstruction)):
            pair = others[asked], x_cf[asked]
            for name, function in {
                "l1": l1_distance,
                "l2": l2_distance,
                "ssim": structural_similarity,
                "sparsity": sparsity,
            }.items():
                self.assertAlmostEqual(getattr(figures, name).value, function(*pair).mean(), places=6)
        self.assertAlmostEqual(found.to_reconstruction.sparsity.value, 5 / 6 * 0.5, places=6)
        self.assertAlmostEqual(found.composition.value, 0.01, places=6)
        expected = localization_report((x_cf - x_fr)[asked], masks[asked], 0.05, bootstrap=50)
        self.assertEqual(found.localization, expected)
        self.assertEqual((expected.iou.value, expected.pointing.value), (1, 1))
        json.dumps(found.as_dict(), allow_nan=False)

    def test_images_of_one_name_are_drawn_together(self) -> None:
        parts = [part.repeat_interleave(4, 0) for part in run()]
        x, x_fr, x_cf, masks = parts
        alone = counterfactual_figures(x, x_fr, x_cf, 1, classify=by_mean, masks=masks)
        groups = [str(n // 4) for n in range(28)]
        grouped = counterfactual_figures(x, x_fr, x_cf, 1, classify=by_mean, masks=masks, groups=groups)
        one, two = (figures.to_reconstruction.l1 for figures in (alone, grouped))
        self.assertAlmostEqual(one.value, two.value)
        self.assertAlmostEqual((two.high - two.low) / (one.high - one.low), 2, delta=0.4)
        self.assertEqual(grouped.settings["drawn"], "groups")

    def test_labels_that_shall_go(self) -> None:
        x, x_fr, x_cf, _ = run()
        options = {"multi_label": True, "class_names": ["dark", "bright"], "bootstrap": 0}
        found = counterfactual_figures(x_cf, x_fr, x, 1, False, classify=by_mean, **options)
        self.assertEqual(found.already, 1)  # the image without a mask stayed dark
        self.assertEqual(list(found.model.flips.directions), ["remove bright"])
        self.assertEqual(found.model.flips.overall.rate.value, 5 / 6)

    def test_nothing_was_asked(self) -> None:
        x, x_fr, x_cf, masks = run()
        found = counterfactual_figures(x, x_fr, x_cf, 0, classify=by_mean, masks=masks)
        self.assertEqual(found.already, 6)
        found = counterfactual_figures(x[:6], x_fr[:6], x_cf[:6], 0, classify=by_mean, masks=masks[:6])
        self.assertEqual(found.already, 6)
        self.assertIsNone(found.to_input.l1.value)
        self.assertIn("had the wanted answer", found.model.cout.reason)
        self.assertIsNone(found.localization)
        self.assertIsNone(found.oracle)
        json.dumps(found.as_dict(), allow_nan=False)

    def test_empty_masks_locate_nothing(self) -> None:
        x, x_fr, x_cf, masks = run()
        self.assertIsNone(counterfactual_figures(x, x_fr, x_cf, 1, classify=by_mean, masks=0 * masks).localization)

    def test_wrong_input(self) -> None:
        x, x_fr, x_cf, _ = run()
        with self.assertRaisesRegex(ValueError, r"counterfactual_figures: groups must be \(7,\), got \(2,\)"):
            counterfactual_figures(x, x_fr, x_cf, 1, classify=by_mean, groups=["a", "b"])
        with self.assertRaisesRegex(ValueError, "cout: two sets of images"):
            counterfactual_figures(x, x_fr, x_cf[..., 1:], 1, classify=by_mean)


if __name__ == "__main__":
    unittest.main()
