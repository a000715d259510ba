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
        expected = localization_report((x_cf - x_fr)[asked], masks[asked], 0.05, bootstrap=0)  # five masks are too few
        self.assertEqual(found.localization, {"dark -> bright": expected})
        self.assertEqual((expected.iou.value, expected.pointing.value), (1, 1))
        json.dumps(found.as_dict(), allow_nan=False)

    def test_images_of_one_name_are_drawn_together(self) -> None:
        x, x_fr, x_cf, masks = (part.repeat_interleave(8, 0) for part in run())
        alone = counterfactual_figures(x, x_fr, x_cf, 1, classify=by_mean, masks=masks)
        groups = [str(n // 4) for n in range(56)]
        grouped = counterfactual_figures(x, x_fr, x_cf, 1, classify=by_mean, masks=masks, groups=groups)
        one, two = (figures.to_reconstruction.l1 for figures in (alone, grouped))
        self.assertAlmostEqual(one.value, two.value)
        self.assertAlmostEqual((two.high - two.low) / (one.high - one.low), 2, delta=0.4)
        self.assertEqual(grouped.settings["drawn"], "groups")

    def test_fewer_than_ten_are_not_resampled(self) -> None:
        parts = [part[:6].repeat_interleave(4, 0) for part in run()]
        x, x_fr, x_cf, masks = parts
        for patients, known in ((3, False), (24, True)):
            groups = [f"patient {n % patients}" for n in range(24)]
            found = counterfactual_figures(x, x_fr, x_cf, 1, classify=by_mean, masks=masks, groups=groups)
            assert found.localization is not None
            (localized,) = found.localization.values()
            for interval in (found.to_input.l1, found.model.cout, found.composition, localized.auprc, localized.inside):
                self.assertIsNotNone(interval.value)
                self.assertEqual(interval.low is not None, known)
            self.assertEqual(found.settings["units"], patients)
        one = counterfactual_figures(x, x_fr, x_cf, 1, classify=by_mean, groups=["a"] * 24)
        self.assertIn("1 groups of images are too few", one.composition.reason)

    def test_change_is_located_in_each_direction_apart(self) -> None:
        """Of four images that show finding 1 two lose it, where the mask is, and two get finding 2 elsewhere."""

        def classify(images: torch.Tensor) -> torch.Tensor:
            left, right = (images.flatten(1)[:, column].clamp(0, 1) for column in (0, 11))
            return torch.softmax(20 * torch.stack([0.5 + 0 * left, left, 2 * right], 1), 1)

        masks = torch.zeros(4, 1, 12, 12)
        masks[..., :6] = 1
        x = masks.clone()
        x_cf = torch.stack([torch.zeros_like(x[0])] * 2 + [1 - masks[0]] * 2)
        x_cf[2:] += masks[2:]
        options = {"masks": masks, "class_names": ["normal", "opacity", "effusion"], "bootstrap": 0}
        found = counterfactual_figures(x, x, x_cf, [0, 0, 2, 2], classify=classify, **options).localization
        assert found is not None
        self.assertEqual(
            {name: report.count for name, report in found.items()}, {"opacity -> normal": 2, "opacity -> effusion": 2}
        )
        self.assertEqual([report.pointing.value for report in found.values()], [0.0, 1.0])
        self.assertEqual(found["opacity -> normal"].iou.value, 1)
        self.assertEqual(found["opacity -> effusion"].iou.value, 0)
        labels = counterfactual_figures(
            x, x, x_cf, [1, 1, 2, 2], [False, False, True, True], classify=classify, multi_label=True, **options
        )
        assert labels.localization is not None
        self.assertEqual(set(labels.localization), {"remove opacity", "enforce effusion"})
        self.assertIn("opacity -> normal", json.dumps({name: report.as_dict() for name, report in found.items()}))

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
