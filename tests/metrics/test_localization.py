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

import json
import time
import unittest

import numpy as np
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.handlers import IgniteMetricHandler
from monai.metrics import compute_dice, compute_iou
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.metrics import (
    BestThresholdMetric,
    LocalizationMetric,
    PreservationMetric,
    best_threshold,
    change_map,
    localization_auprc,
    localization_dice,
    localization_iou,
    localization_report,
    pointing_game,
    pooled_localization_auprc,
    preservation,
)
from monai_jointdiff.metrics.bootstrap import resample_weights

sklearn_metrics, has_sklearn = optional_import("sklearn.metrics")

SHAPES = [("2d", (9, 11)), ("3d", (4, 6, 5))]
FUNCTIONS = {
    "auprc": localization_auprc,
    "iou": lambda maps, masks: localization_iou(maps, masks, 0.6),
    "dice": lambda maps, masks: localization_dice(maps, masks, 0.6),
    "pointing": pointing_game,
    "inside": lambda maps, masks: preservation(maps, masks).inside,
    "outside": lambda maps, masks: preservation(maps, masks).outside,
}


def random_pair(count: int, size: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps with one channel that know a little of the masks; values occur more than once."""
    generator = torch.Generator().manual_seed(seed)
    masks = (torch.rand(count, 1, *size, generator=generator) > 0.8).float()
    maps = (torch.rand(count, 1, *size, generator=generator) * 50).round() / 50 + 0.2 * masks
    return maps, masks


def squares() -> tuple[torch.Tensor, torch.Tensor]:
    """A mask of 4 x 4 pixels and a map that is 1 on 4 x 4 pixels shifted by one row and one column: 9 in common."""
    maps, masks = torch.zeros(1, 1, 10, 10), torch.zeros(1, 1, 10, 10)
    masks[..., 2:6, 2:6] = 1
    maps[..., 3:7, 3:7] = 1
    return maps, masks


def cubes() -> tuple[torch.Tensor, torch.Tensor]:
    """The same in 3D: 27 of 64 voxels in common."""
    maps, masks = torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8)
    masks[..., 2:6, 2:6, 2:6] = 1
    maps[..., 3:7, 3:7, 3:7] = 1
    return maps, masks


class TestMaps(unittest.TestCase):
    def test_change_is_the_mean_absolute_value_over_channels(self):
        difference = torch.tensor([1.0, -3.0]).reshape(1, 2, 1, 1).expand(1, 2, 4, 5)
        np.testing.assert_array_equal(change_map(difference), np.full((1, 4, 5), 2.0))
        np.testing.assert_array_equal(change_map(MetaTensor(-difference)), np.full((1, 4, 5), 2.0))

    @parameterized.expand(SHAPES)
    def test_sign_and_channels_and_forms_of_masks(self, _, size):
        maps, masks = random_pair(3, size)
        signs = torch.where(maps > 0.5, -1, 1)
        for name, function in FUNCTIONS.items():
            values = function(maps, masks)
            for same in (signs * maps, torch.cat([maps, -maps], dim=1), maps.double().numpy()):
                np.testing.assert_allclose(function(same, masks), values, rtol=1e-6, err_msg=name)
            for same in (masks[:, 0], masks.bool(), masks.numpy().astype(np.uint8)):
                np.testing.assert_array_equal(function(maps, same), values, err_msg=name)

    @parameterized.expand(FUNCTIONS)
    def test_every_image_and_every_pixel_for_itself(self, name):
        maps, masks = random_pair(6, (9, 11))
        function, order = FUNCTIONS[name], [3, 1, 5, 0, 4, 2]
        values = function(maps, masks)
        self.assertEqual((values.shape, values.dtype), ((6,), np.float64))
        np.testing.assert_allclose(function(maps[order], masks[order]), values[order], rtol=1e-12)
        pixels = torch.randperm(99, generator=torch.Generator().manual_seed(0))
        shuffled = [part.flatten(2)[:, :, pixels].reshape(6, 1, 11, 9) for part in (maps, masks)]
        np.testing.assert_allclose(function(*shuffled), values, rtol=1e-12)

    @parameterized.expand(FUNCTIONS)
    def test_an_empty_mask_has_no_figure(self, name):
        maps, masks = random_pair(3, (9, 11))
        whole = FUNCTIONS[name](maps, masks)
        masks[1] = 0
        values = FUNCTIONS[name](maps, masks)
        np.testing.assert_array_equal(values[[0, 2]], whole[[0, 2]])
        self.assertEqual(np.isnan(values[1]), name != "outside")

    @parameterized.expand(
        [
            ("size", torch.zeros(2, 1, 4, 5), torch.zeros(2, 1, 5, 4), r"masks \(N, 1, \*spatial\)"),
            ("channels", torch.zeros(2, 2, 4, 5), torch.zeros(2, 2, 4, 5), r"masks \(N, 1, \*spatial\)"),
            ("number", torch.zeros(2, 1, 4, 5), torch.zeros(1, 1, 4, 5), r"masks \(N, 1, \*spatial\)"),
            ("values", torch.zeros(2, 1, 4, 5), torch.full((2, 4, 5), 255), "must hold 0 and 1"),
            ("nan", torch.full((2, 1, 4, 5), float("nan")), torch.ones(2, 4, 5), "finite maps"),
            ("axes", torch.zeros(2, 4), torch.zeros(2, 4), r"finite maps \(N, C, \*spatial\)"),
        ]
    )
    def test_wrong_input(self, _, maps, masks, message):
        functions = [*FUNCTIONS.values(), pooled_localization_auprc, best_threshold]
        functions.append(lambda maps, masks: localization_report(maps, masks, 0.5))
        for function in functions:
            with self.assertRaisesRegex(ValueError, message):
                function(maps, masks)


class TestAUPRC(unittest.TestCase):
    @unittest.skipUnless(has_sklearn, "scikit-learn is not installed")
    @parameterized.expand(SHAPES)
    def test_equals_scikit_learn(self, _, size):
        maps, masks = random_pair(8, size)
        expected = [
            sklearn_metrics.average_precision_score(mask.flatten().numpy(), change.flatten().double().numpy())
            for mask, change in zip(masks, maps, strict=True)
        ]
        np.testing.assert_allclose(localization_auprc(maps, masks), expected, rtol=1e-12)
        pooled = sklearn_metrics.average_precision_score(masks.flatten().numpy(), maps.flatten().double().numpy())
        self.assertAlmostEqual(pooled_localization_auprc(maps, masks), pooled, places=12)
        self.assertNotAlmostEqual(pooled, np.mean(expected), places=3)

    def test_by_hand(self):
        # from the highest: hit, miss, hit and miss at once: 1/2 * 1 + 1/2 * 2/4
        maps, masks = torch.tensor([[[[0.9, 0.7, 0.5, 0.5]]]]), torch.tensor([[[1, 0, 1, 0]]])
        np.testing.assert_allclose(localization_auprc(maps, masks), [0.75])

    def test_knowing_everything_and_nothing(self):
        masks = torch.zeros(2, 1, 5, 10)
        masks[0, :, 1], masks[1, :, 2:4] = 1, 1
        np.testing.assert_allclose(localization_auprc(masks, masks), [1, 1])
        np.testing.assert_allclose(localization_auprc(torch.zeros(2, 1, 5, 10), masks), [0.2, 0.4])
        self.assertAlmostEqual(pooled_localization_auprc(torch.zeros(2, 1, 5, 10), masks), 0.3)
        self.assertTrue(np.isnan(pooled_localization_auprc(masks, torch.zeros(2, 5, 10))))

    def test_pooling_asks_for_one_scale(self):
        masks = torch.zeros(2, 1, 5, 10)
        masks[:, :, 1] = 1
        maps = torch.stack([masks[0], 10 + masks[1]])  # both perfect, on different scales
        np.testing.assert_allclose(localization_auprc(maps, masks), [1, 1])
        # in order: 10 hits, 40 misses, 10 hits, 40 misses
        self.assertAlmostEqual(pooled_localization_auprc(maps, masks), (1 + 20 / 60) / 2)


class TestOverlap(unittest.TestCase):
    @parameterized.expand([("2d", squares, 9, 16), ("3d", cubes, 27, 64)])
    def test_shifted_squares(self, _, pair, common, size):
        maps, masks = pair()
        np.testing.assert_allclose(localization_iou(maps, masks, 0.5), [common / (2 * size - common)])
        np.testing.assert_allclose(localization_dice(maps, masks, 0.5), [common / size])
        np.testing.assert_allclose(localization_iou(maps, masks, 1), [common / (2 * size - common)])  # >= threshold
        np.testing.assert_allclose(localization_iou(maps, masks, 1.01), [0])
        np.testing.assert_allclose(localization_iou(maps, masks, 0), [size / maps.numel()])
        np.testing.assert_allclose(localization_dice(masks, masks, 0.5), [1])

    @parameterized.expand(SHAPES)
    def test_equals_monai(self, _, size):
        maps, masks = random_pair(5, size)
        found = (maps >= 0.6).float()
        np.testing.assert_allclose(
            localization_iou(maps, masks, 0.6), compute_iou(found, masks)[:, 0].numpy(), rtol=1e-6
        )
        np.testing.assert_allclose(
            localization_dice(maps, masks, 0.6), compute_dice(found, masks)[:, 0].numpy(), rtol=1e-6
        )


class TestBestThreshold(unittest.TestCase):
    def test_equals_search_over_all_values(self):
        maps, masks = random_pair(6, (7, 8))
        masks[2] = 0
        means = {v: np.nanmean(localization_iou(maps, masks, v)) for v in np.unique(maps.double().numpy())}
        best = best_threshold(maps, masks)
        self.assertEqual(means[best], max(means.values()))

    @parameterized.expand([("all_values", 10_000, 1e-12), ("quantiles", 100, 2e-3)])
    def test_continuous_values(self, _, candidates, tolerance):
        generator = torch.Generator().manual_seed(0)
        masks = (torch.rand(10, 1, 20, 20, generator=generator) > 0.8).float()
        maps = torch.randn(10, 1, 20, 20, generator=generator).abs() + 1.5 * masks
        means = [np.nanmean(localization_iou(maps, masks, v)) for v in np.unique(maps.double().numpy())]
        chosen = best_threshold(maps, masks, candidates)
        self.assertAlmostEqual(np.nanmean(localization_iou(maps, masks, chosen)), max(means), delta=tolerance)

    def test_separable(self):
        maps, masks = squares()
        self.assertEqual(best_threshold(0.2 + 0.5 * masks.double(), masks), 0.7)
        self.assertEqual(best_threshold(maps, masks), 1)

    def test_fast(self):
        rng = np.random.default_rng(0)
        masks = rng.random((500, 1, 64, 64)) > 0.95
        maps = rng.random(masks.shape) + masks
        start = time.perf_counter()
        self.assertGreaterEqual(best_threshold(maps, masks), 1)
        self.assertLess(time.perf_counter() - start, 10)  # 0.3 s; a pass over all pixels per candidate: minutes

    def test_wrong_input(self):
        maps, masks = squares()
        with self.assertRaisesRegex(ValueError, "best_threshold: .*got 256 candidates and 0 masks"):
            best_threshold(maps, 0 * masks)
        with self.assertRaisesRegex(ValueError, "got 1 candidates and 1 masks"):
            best_threshold(maps, masks, 1)


class TestPointingGame(unittest.TestCase):
    def test_maxima(self):
        masks = torch.zeros(4, 1, 5, 5)
        masks[:, :, :2] = 1  # 10 of 25 pixels
        maps = torch.zeros(4, 1, 5, 5)
        maps[0, 0, 1, 3] = -2  # inside
        maps[1, 0, 4, 4] = 2  # outside
        maps[2, 0, [0, 0, 3], [0, 1, 0]] = 1  # two inside, one outside
        np.testing.assert_allclose(pointing_game(maps, masks), [1, 0, 2 / 3, 10 / 25])


class TestPreservation(unittest.TestCase):
    @parameterized.expand([("2d", squares), ("3d", cubes)])
    def test_constant_changes(self, _, pair):
        masks = pair()[1].expand(2, *pair()[1].shape[1:])
        sizes = torch.tensor([1.0, -2.0]).reshape(2, *[1] * (masks.ndim - 1))
        result = preservation(sizes * (0.4 * masks + 0.1 * (1 - masks)), masks)
        np.testing.assert_allclose(result.inside, [0.4, 0.8], rtol=1e-6)
        np.testing.assert_allclose(result.outside, [0.1, 0.2], rtol=1e-6)
        np.testing.assert_allclose(result.ratio, [0.25, 0.25], rtol=1e-6)

    def test_limits(self):
        masks = torch.zeros(4, 1, 4, 4)
        masks[:2, :, 0], masks[3] = 1, 1
        maps = torch.zeros(4, 1, 4, 4)
        maps[1, :, 3] = 1  # only outside
        result = preservation(maps, masks)
        np.testing.assert_array_equal(result.inside, [0, 0, np.nan, 0])
        np.testing.assert_allclose(result.outside, [0, 4 / 12, 0, np.nan])
        np.testing.assert_array_equal(result.ratio, [np.nan, np.inf, np.nan, np.nan])


class TestReport(unittest.TestCase):
    @parameterized.expand(SHAPES)
    def test_figures_are_means_over_images_with_a_mask(self, _, size):
        maps, masks = random_pair(12, size)
        masks[[2, 7]] = 0
        kept = [i for i in range(12) if i not in (2, 7)]
        report = localization_report(maps, masks, 0.6, bootstrap=200)
        self.assertEqual((report.count, report.left_out, report.threshold), (10, 2, 0.6))
        self.assertEqual(report.best_threshold, best_threshold(maps, masks))
        self.assertAlmostEqual(report.prevalence, masks[kept].mean().item(), places=6)
        for name, function in FUNCTIONS.items():
            figure = getattr(report, name)
            self.assertAlmostEqual(figure.value, function(maps[kept], masks[kept]).mean(), places=12, msg=name)
            self.assertLess(figure.low, figure.value)
            self.assertLess(figure.value, figure.high)
        ceiling = localization_iou(maps[kept], masks[kept], report.best_threshold).mean()
        self.assertAlmostEqual(report.iou_best.value, ceiling, places=12)
        self.assertGreaterEqual(ceiling, report.iou.value)
        self.assertAlmostEqual(report.ratio.value, report.outside.value / report.inside.value, places=12)
        pooled = pooled_localization_auprc(maps[kept], masks[kept])
        self.assertAlmostEqual(report.auprc_pooled.value, pooled, places=12)
        content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
        self.assertEqual(content["iou"]["value"], report.iou.value)
        self.assertEqual(content["bootstrap"]["drawn"], "images")

    @parameterized.expand([("few_values", 20, 1e-9), ("more_mask_pixels_than_levels", 10_000, 1e-3)])
    def test_interval_of_the_pooled_area(self, _, values, tolerance):
        # against the same resamples of the images, whose pixels are pooled and sorted again
        generator = torch.Generator().manual_seed(0)
        masks = (torch.rand(40, 1, 16, 20, generator=generator) > 0.85).float()
        strength = 3 * torch.rand(40, 1, 1, 1, generator=generator)
        maps = (torch.randn(40, 1, 16, 20, generator=generator).abs() + strength * masks).clamp(max=5)
        maps = (maps / 5 * values).round()
        report = localization_report(maps, masks, 0.5, bootstrap=300, seed=1)
        (weights,) = resample_weights(40, 300, 1)
        drawn = [np.repeat(np.arange(40), row.astype(int)) for row in weights]
        low, high = np.quantile([pooled_localization_auprc(maps[i], masks[i]) for i in drawn], [0.025, 0.975])
        np.testing.assert_allclose([report.auprc_pooled.low, report.auprc_pooled.high], [low, high], atol=tolerance)

    def test_one_image_has_no_spread(self):
        maps, masks = random_pair(1, (100, 100))
        maps = maps + 0.1 * torch.rand(maps.shape, generator=torch.Generator().manual_seed(0))
        report = localization_report(maps, masks, 0.5, bootstrap=20)
        for figure in (report.auprc, report.auprc_pooled, report.iou, report.ratio):
            np.testing.assert_allclose([figure.low, figure.high], figure.value, rtol=1e-9)
        self.assertEqual(report.auprc_pooled.value, report.auprc.value)

    def test_a_mask_of_the_whole_image_has_no_outside(self):
        maps, masks = random_pair(5, (9, 11))
        masks[3] = 1
        report = localization_report(maps, masks, 0.6, bootstrap=50)
        self.assertEqual(report.count, 5)
        self.assertAlmostEqual(report.outside.value, np.nanmean(FUNCTIONS["outside"](maps, masks)), places=12)
        whole = localization_report(maps, torch.ones(5, 9, 11), 0.6)
        self.assertEqual((whole.outside.value, whole.outside.reason), (None, "all masks are whole images"))
        self.assertEqual((whole.ratio.value, whole.auprc.value), (None, 1))

    def test_groups_of_alike_images_widen_the_intervals(self):
        maps, masks = random_pair(12, (6, 6))
        many = [part.repeat_interleave(10, 0) for part in (maps, masks)]
        alone = localization_report(*many, 0.6)
        grouped = localization_report(*many, 0.6, groups=[f"patient {i // 10}" for i in range(120)])
        self.assertEqual(alone.iou.value, grouped.iou.value)
        widths = [report.iou.high - report.iou.low for report in (alone, grouped)]
        self.assertAlmostEqual(widths[1] / widths[0], np.sqrt(10), delta=0.5)
        self.assertEqual(grouped.bootstrap["drawn"], "groups")

    def test_no_change_has_no_ratio(self):
        _, masks = squares()
        report = localization_report(torch.zeros(1, 1, 10, 10), masks, 0.5)
        self.assertEqual((report.inside.value, report.outside.value, report.iou.value), (0, 0, 0))
        self.assertIsNone(report.ratio.value)
        self.assertEqual(report.ratio.reason, "no outside, or nothing changed inside")
        self.assertAlmostEqual(report.auprc.value, report.prevalence)
        json.dumps(report.as_dict(), allow_nan=False)

    def test_without_bootstrap(self):
        report = localization_report(*squares(), 0.5, bootstrap=0)
        self.assertEqual((report.iou.low, report.auprc_pooled.low), (None, None))
        self.assertAlmostEqual(report.iou.value, 9 / 23)

    def test_wrong_input(self):
        maps, masks = squares()
        with self.assertRaisesRegex(ValueError, "localization_report: all 1 masks are empty"):
            localization_report(maps, 0 * masks, 0.5)
        with self.assertRaisesRegex(ValueError, r"localization_report: groups must be \(1,\), got \(2,\)"):
            localization_report(maps, masks, 0.5, groups=[1, 2])


def through_an_engine(metric, maps, masks, decollate):
    """What the metric says of 15 images in three batches."""
    engine = Engine(lambda _, batch: tuple(list(part) for part in batch) if decollate else batch)
    IgniteMetricHandler(metric, save_details=False).attach(engine, "metric")
    batches = list(zip(maps.split([1, 6, 8]), masks.split([1, 6, 8]), strict=True))
    return engine.run(batches).metrics["metric"]


class TestLocalizationMetric(unittest.TestCase):
    @parameterized.expand([("auprc", None), ("pointing", None), ("iou", 0.6), ("dice", 0.6)])
    def test_through_an_engine(self, figure, threshold):
        maps, masks = random_pair(15, (9, 11))
        masks[[0, 9]] = 0
        expected = np.nanmean(FUNCTIONS[figure](maps, masks))
        for decollate in (True, False):
            value = through_an_engine(LocalizationMetric(figure, threshold), maps, masks, decollate)
            self.assertAlmostEqual(value, expected, places=12)

    @parameterized.expand([((9, 11),), ((5, 9, 11),)])
    def test_figures_of_all_images_through_an_engine(self, shape):
        """Equal to those of the report, whatever the batches."""
        maps, masks = random_pair(15, shape)
        masks[[0, 9]] = 0
        report = localization_report(maps, masks, 0.5, bootstrap=0)
        expected = {
            BestThresholdMetric: {(): report.iou_best},
            PreservationMetric: {(name,): getattr(report, name) for name in ("inside", "outside", "ratio")},
        }
        for kind, figures in expected.items():
            for arguments, figure in figures.items():
                for decollate in (True, False):
                    value = through_an_engine(kind(*arguments), maps, masks, decollate)
                    self.assertAlmostEqual(value, figure.value, places=12)

    def test_no_mask(self):
        for metric in (LocalizationMetric(), BestThresholdMetric(), PreservationMetric()):
            metric(torch.rand(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
            self.assertTrue(np.isnan(metric.aggregate()))

    def test_wrong_input(self):
        for wrong in (("iou",), ("auprc", 0.5), ("precision",), ("precision", 0.5)):
            with self.assertRaisesRegex(ValueError, "LocalizationMetric: figure must be one of"):
                LocalizationMetric(*wrong)
        with self.assertRaisesRegex(ValueError, "PreservationMetric: figure must be one of .*got 'around'"):
            PreservationMetric("around")


if __name__ == "__main__":
    unittest.main()
