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
import unittest
from unittest import mock

import numpy as np
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric, MAEMetric, RMSEMetric, SSIMMetric
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.metrics import (
    CompositionMetric,
    CounterfactualTransitionMetric,
    CounterfactualValidityMetric,
    LocalizationMetric,
    ProximityMetric,
    RealismMetric,
    ReversibilityMetric,
    composition,
    cout,
    flip_rate,
    frechet_distance,
    grouped_wilson_interval,
    kernel_distance,
    l1_distance,
    l2_distance,
    reached_target,
    reversibility,
    sparsity,
    split_frechet_distance,
    structural_similarity,
    target_probability,
    wilson_interval,
)

proportion, has_scipy = optional_import("scipy.stats", name="binomtest")

SHAPES = [("2d", (2, 12, 16)), ("3d", (1, 5, 12, 11))]


def random_images(count: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def two_classes(p) -> np.ndarray:
    """(N, 2) from the probability of class 1."""
    p = np.asarray(p, dtype=np.float64)
    return np.stack([1 - p, p], axis=1)


class TestTarget(unittest.TestCase):
    def test_multi_class(self):
        p = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.4, 0.2, 0.4]])
        np.testing.assert_allclose(target_probability(p, [1, 2, 0]), [0.5, 0.1, 0.4])
        np.testing.assert_allclose(target_probability(torch.tensor(p), torch.tensor([1, 2, 0])), [0.5, 0.1, 0.4])
        np.testing.assert_allclose(target_probability(p, 2), [0.3, 0.1, 0.4])
        self.assertEqual(reached_target(p, [1, 2, 0]).tolist(), [True, False, True])
        self.assertEqual(reached_target(p, (0, 0, 2)).tolist(), [False, True, False])  # a tie goes to the first

    def test_multi_label(self):
        p = np.array([[0.9, 0.5], [0.9, 0.4], [0.1, 0.4], [0.1, 0.5]])
        target, enforce = (0, 1, 0, 1), (True, True, False, False)
        np.testing.assert_allclose(target_probability(p, target, enforce, multi_label=True), [0.9, 0.4, 0.9, 0.5])
        reached = reached_target(p, target, enforce, multi_label=True)
        self.assertEqual(reached.tolist(), [True, False, True, False])

    @parameterized.expand(
        [
            ("rows", [[0.5, 0.5]] * 3, [0, 1], True, False, r"one value or \(3,\), got \(2,\)"),
            ("enforce", [[0.5, 0.5]] * 3, 0, [True, False], True, r"got \(\) and \(2,\)"),
            ("class", [[0.5, 0.5]], 2, True, False, r"in \[0, 2\), got 2"),
            ("unlabelled", [[0.5, 0.5]], [-1], True, False, "got -1"),
            ("part", [[0.5, 0.5]], [float("nan")], True, False, "got nan"),
            ("removal", [[0.5, 0.5]], 1, False, False, "goes with multi_label=True"),
            ("logits", [[3.0, -2.0]], 1, True, False, "were logits given"),
            ("sum", [[0.9, 0.9]], 1, True, False, "must sum to 1"),
            ("vector", [0.9, 0.1], 1, True, False, r"must be \(N, K\)"),
        ]
    )
    def test_wrong_input(self, _, probabilities, target, enforce, multi_label, message):
        for function in (target_probability, reached_target):
            with self.assertRaisesRegex(ValueError, f"{function.__name__}: .*{message}"):
                function(probabilities, target, enforce, multi_label=multi_label)


class TestWilsonInterval(unittest.TestCase):
    @unittest.skipUnless(has_scipy, "scipy is not installed")
    @parameterized.expand([(0, 10, 0.95), (10, 10, 0.95), (3, 10, 0.9), (990, 1000, 0.99), (1, 1, 0.5)])
    def test_equals_scipy(self, successes, count, confidence):
        interval = wilson_interval(successes, count, confidence)
        expected = proportion(successes, count).proportion_ci(confidence, "wilson")
        self.assertEqual(interval.value, successes / count)
        np.testing.assert_allclose([interval.low, interval.high], [expected.low, expected.high], atol=1e-12)

    def test_no_image_and_wrong_input(self):
        self.assertEqual(
            wilson_interval(0, 0).as_dict(), {"value": None, "low": None, "high": None, "reason": "no image"}
        )
        for wrong in ((3, 2), (-1, 2), (1, 2, 1.0)):
            with self.assertRaisesRegex(ValueError, "wilson_interval"):
                wilson_interval(*wrong)


class TestGroupedWilsonInterval(unittest.TestCase):
    def assert_same(self, found, expected):
        self.assertAlmostEqual(found.value, expected.value)
        np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high], atol=1e-12)

    @parameterized.expand([(0, 12, 0.95), (12, 12, 0.95), (5, 12, 0.9), (1, 40, 0.95), (1, 1, 0.95)])
    def test_known_designs(self, successes, count, confidence):
        hits, expected = np.arange(count) < successes, wilson_interval(successes, count, confidence)
        order = np.random.default_rng(0).permutation(count)
        self.assert_same(grouped_wilson_interval(hits[order], order, confidence), expected)  # groups of one image
        for size in (2, 7):  # the images of a group are copies of one: they are worth as much as that one
            copies = grouped_wilson_interval(np.repeat(hits, size), np.repeat(np.arange(count), size), confidence)
            self.assert_same(copies, expected)

    def test_independent_images_are_worth_no_more_than_groups_and_no_less_than_their_design_effect(self):
        hits, groups = np.tile([0, 1], 10), np.arange(20) // 2  # in each group one of two: no variance between groups
        self.assert_same(grouped_wilson_interval(hits, groups), wilson_interval(5, 10))
        # half of four groups of four hit 3 of 4, half 1 of 4: variance 4 * 1 / 256, design effect 1
        self.assert_same(
            grouped_wilson_interval([1, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0], np.arange(16) // 4),
            wilson_interval(2, 4),
        )
        # 2 groups of 3 alike and 6 images: share 1/2, sums of squares 2 * 1.5^2 + 6 * 0.5^2 = 6, so 36 / 6 = 6 of 8
        uneven = grouped_wilson_interval([1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, *range(2, 8)])
        self.assert_same(uneven, wilson_interval(3, 6))

    def test_no_image_and_wrong_input(self):
        self.assertEqual(grouped_wilson_interval([], []), wilson_interval(0, 0))
        for wrong in (([2], ["a"]), ([[1]], ["a"]), ([1], ["a"], 1.0), ([1], ["a", "b"]), ([1], None)):
            with self.assertRaisesRegex(ValueError, "grouped_wilson_interval"):
                grouped_wilson_interval(*wrong)


class TestFlipRate(unittest.TestCase):
    def test_directions_of_two_classes(self):
        # to 1: two of three flip; to 0: one of two flips, one was 0 already
        before, after = [0.1, 0.2, 0.3, 0.9, 0.8, 0.2], [0.9, 0.8, 0.4, 0.1, 0.6, 0.1]
        report = flip_rate(
            two_classes(before), two_classes(after), [1, 1, 1, 0, 0, 0], class_names=["normal", "pneumonia"]
        )
        self.assertEqual(list(report.directions), ["pneumonia", "normal"])
        up, down = report.directions["pneumonia"], report.directions["normal"]
        self.assertEqual((up.count, up.left_out, down.count, down.left_out), (3, 0, 2, 1))
        self.assertEqual((up.rate, down.rate), (wilson_interval(2, 3), wilson_interval(1, 2)))
        self.assertAlmostEqual(up.gain.value, (0.8 + 0.6 + 0.1) / 3)
        self.assertAlmostEqual(down.gain.value, (0.8 + 0.2) / 2)
        self.assertEqual((report.overall.count, report.overall.left_out), (5, 1))
        self.assertEqual(report.overall.rate, wilson_interval(3, 5))
        self.assertAlmostEqual(report.overall.gain.value, 0.5)
        self.assertEqual(report.lowest, "normal")
        json.dumps(report.as_dict(), allow_nan=False)

    def test_multi_label_directions(self):
        before, after = np.full((4, 2), 0.2), np.full((4, 2), 0.2)
        before[2:, 1], after[:3, 1] = 0.7, 0.6  # label 1: absent, absent, present, present; in the end only 3 lacks it
        report = flip_rate(before, after, 1, [True, True, False, False], multi_label=True, class_names=["a", "b"])
        self.assertEqual(list(report.directions), ["enforce b", "remove b"])
        self.assertEqual(report.directions["enforce b"].rate.value, 1)
        self.assertEqual(report.directions["remove b"].rate.value, 0.5)
        self.assertAlmostEqual(report.directions["remove b"].gain.value, (0.1 + 0.5) / 2)

    def test_order_of_images_does_not_matter(self):
        rng = np.random.default_rng(0)
        before, after = rng.dirichlet(np.ones(3), (2, 40))
        target, order = rng.integers(0, 3, 40), rng.permutation(40)
        one = flip_rate(before, after, target, bootstrap=0)
        two = flip_rate(before[order], after[order], target[order], bootstrap=0)
        for name in one.directions:
            self.assertEqual(one.directions[name].rate, two.directions[name].rate)
            self.assertAlmostEqual(one.directions[name].gain.value, two.directions[name].gain.value, places=12)
        chosen = (before.argmax(1) != target) & (target == 2)
        self.assertEqual(one.directions["2"].rate.value, (after[chosen].argmax(1) == 2).mean())

    def test_identity_flips_nothing(self):
        p = two_classes(np.linspace(0.05, 0.45, 9))
        report = flip_rate(p, p, 1)
        self.assertEqual((report.overall.rate.value, report.overall.gain.value), (0, 0))
        self.assertGreater(report.overall.rate.high, 0.2)  # nine images do not prove a rate of zero

    def test_groups_of_alike_images_widen_the_interval(self):
        flips = np.repeat(np.arange(20) % 2, 10)  # 20 patients, all ten images of one behave alike
        before, after = two_classes(np.full(200, 0.1)), two_classes(np.where(flips, 0.9, 0.1))
        alone, grouped = flip_rate(before, after, 1), flip_rate(before, after, 1, groups=np.arange(200) // 10)
        self.assertEqual(alone.overall.rate.value, grouped.overall.rate.value)
        widths = [report.overall.rate.high - report.overall.rate.low for report in (alone, grouped)]
        self.assertAlmostEqual(widths[1] / widths[0], np.sqrt(10), delta=0.4)
        self.assertIn("groups", grouped.settings["intervals"])

    def test_groups_of_one_image_are_images(self):
        before, after = two_classes(np.full(20, 0.1)), two_classes(np.full(20, 0.9))
        target = np.full(20, 1)
        grouped = flip_rate(before, after, target, groups=np.arange(20))
        self.assertEqual(grouped.overall, flip_rate(before, after, target).overall)
        self.assertLess(grouped.overall.rate.low, 0.9)  # a bootstrap of equal flips would have no width
        p = np.full((20, 3), 0.2)
        p[:, 0] = 0.6
        flipped, keys = p[:, [1, 0, 2]], np.arange(20) // 2  # each image once toward class 1 and once toward 2
        report = flip_rate(p, flipped, np.arange(20) % 2 + 1, groups=keys)
        self.assertEqual(report.directions["1"].rate, wilson_interval(10, 10))
        self.assertEqual(report.overall.rate.value, 0.5)

    @parameterized.expand([(0.1, 0.0), (0.9, 1.0)])
    def test_groups_that_all_do_the_same_prove_no_rate(self, after, rate):
        before, after = two_classes(np.full(48, 0.1)), two_classes(np.full(48, after))
        found = flip_rate(before, after, 1, groups=np.arange(48) // 4).overall.rate  # 12 patients
        self.assertEqual(found, wilson_interval(int(12 * rate), 12))
        self.assertGreater(found.high - found.low, 0.2)

    @parameterized.expand([("images", 9, None), ("groups", 36, np.arange(36) // 4)])
    def test_gains_of_fewer_than_ten_have_no_interval(self, kind, count, groups):
        rng = np.random.default_rng(0)
        before, after = two_classes(np.full(count, 0.1)), two_classes(rng.uniform(0.2, 0.8, count))
        found = flip_rate(before, after, 1, groups=groups).overall
        self.assertIsNone(found.gain.low)
        self.assertRegex(found.gain.reason, f"9 {kind}.* are too few for an interval")
        self.assertLess(found.rate.low, found.rate.high)  # which knows how few there are
        more = np.arange(count + 4)
        before, after = two_classes(np.full(len(more), 0.1)), two_classes(rng.uniform(0.2, 0.8, len(more)))
        enough = flip_rate(before, after, 1, groups=None if groups is None else more // 4).overall
        self.assertLess(enough.gain.low, enough.gain.high)

    def test_nothing_can_flip(self):
        report = flip_rate(two_classes([0.9, 0.8]), two_classes([0.9, 0.8]), 1)
        self.assertEqual((report.overall.count, report.overall.left_out, report.overall.rate.value), (0, 2, None))
        with self.assertRaisesRegex(ValueError, "no direction has an image"):
            report.lowest  # noqa: B018

    def test_wrong_input(self):
        p = two_classes([0.2, 0.8])
        with self.assertRaisesRegex(ValueError, r"one shape, got \(2, 3\)"):
            flip_rate(np.full((2, 3), 1 / 3), p, 1)
        with self.assertRaisesRegex(ValueError, "2 distinct class names"):
            flip_rate(p, p, 1, class_names=["a", "a"])
        with self.assertRaisesRegex(ValueError, r"groups must be \(2,\)"):
            flip_rate(p, p, 1, groups=[1, 2, 3])


class TestProximity(unittest.TestCase):
    @parameterized.expand(SHAPES)
    def test_shift_by_a_constant(self, _, shape):
        images = random_images(3, shape) / 2
        shift = torch.tensor([0.0, 0.25, -0.5]).reshape(-1, *[1] * len(shape))
        for distance in (l1_distance, l2_distance):
            np.testing.assert_allclose(distance(images, images + shift), [0, 0.25, 0.5], atol=1e-7)
        np.testing.assert_allclose(sparsity(images, images + shift, 0.3), [0, 0, 1])

    def test_one_changed_pixel(self):
        images = torch.zeros(2, 2, 4, 5)
        others = images.clone()
        others[0, 1, 2, 3] = -1  # one channel of one of 20 pixels
        others[1, :, 0, 0] = 0.05  # no more than the tolerance
        np.testing.assert_allclose(l1_distance(images, others), [1 / 40, 0.05 / 20], rtol=1e-6)
        np.testing.assert_allclose(l2_distance(images, others), [np.sqrt(1 / 40), 0.05 / np.sqrt(20)], rtol=1e-6)
        np.testing.assert_allclose(sparsity(images, others, 0.0500001), [1 / 20, 0])
        np.testing.assert_allclose(sparsity(images, others, 0.01), [1 / 20, 1 / 20])
        np.testing.assert_allclose(sparsity(images, others, 0.9), [1 / 20, 0])
        np.testing.assert_allclose(sparsity(images, others, 1), [0, 0])

    @parameterized.expand(SHAPES)
    def test_equals_monai(self, _, shape):
        images, others = random_images(5, shape), random_images(5, shape, 1)
        for ours, theirs in ((l1_distance, MAEMetric()), (l2_distance, RMSEMetric())):
            np.testing.assert_allclose(ours(images, others), theirs(others, images)[:, 0].numpy(), rtol=1e-5)

    def test_similarity_equals_monai_on_intensities_from_zero(self):
        for shape, window in (((2, 12, 16), 11), ((1, 8, 9), (7, 9)), ((1, 5, 12, 11), (5, 11, 11))):
            images = random_images(4, shape)
            others = (images + 0.3 * random_images(4, shape, 1)).clamp(-1, 1)
            theirs = SSIMMetric(len(shape) - 1, data_range=1.0, win_size=window)((others + 1) / 2, (images + 1) / 2)
            np.testing.assert_allclose(structural_similarity(images, others), theirs[:, 0].numpy(), rtol=1e-6)
            np.testing.assert_allclose(structural_similarity(images, images), 1, rtol=1e-6)

    def test_similarity_of_constant_images(self):
        # only the luminance term is left: (2 a b + c1) / (a^2 + b^2 + c1) with intensities in [0, 1], c1 = 1e-4
        images, others = torch.full((1, 1, 16, 16), -0.2), torch.full((1, 1, 16, 16), 0.2)
        a, b = 0.4, 0.6
        expected = (2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4)
        self.assertAlmostEqual(structural_similarity(images, others)[0], expected, places=3)

    @parameterized.expand([(l1_distance,), (l2_distance,), (sparsity,), (structural_similarity,)])
    def test_every_image_for_itself(self, distance):
        images, others = random_images(6, (1, 12, 12)), random_images(6, (1, 12, 12), 1)
        values, order = distance(images, others), [3, 1, 5, 0, 4, 2]
        self.assertEqual(values.dtype, np.float64)
        np.testing.assert_allclose(distance(images[order], others[order]), values[order], rtol=1e-6)
        np.testing.assert_allclose(distance(others, images), values, rtol=1e-6)
        np.testing.assert_allclose(distance(MetaTensor(images), others.numpy()), values, rtol=1e-6)
        with self.assertRaisesRegex(ValueError, f"{distance.__name__}: two sets of images"):
            distance(images, others[:5])
        with self.assertRaisesRegex(ValueError, "must be finite"):
            distance(images, others * float("nan"))

    def test_wrong_input(self):
        with self.assertRaisesRegex(ValueError, "tolerance must be at least 0, got -1"):
            sparsity(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), -1)
        with self.assertRaisesRegex(ValueError, "two or three spatial axes"):
            structural_similarity(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))


def linear_classifier(weight: torch.Tensor):
    """p of class 1 is the weighted sum of the pixels, which must lie in [0, 1]."""

    def classify(images: torch.Tensor) -> torch.Tensor:
        p = (images * weight).flatten(1).sum(1)
        return torch.stack([1 - p, p], dim=1)

    return classify


class TestCOUT(unittest.TestCase):
    @parameterized.expand([("2d", (1, 4, 5)), ("3d", (2, 2, 2, 5)), ("one_by_one", (1, 4, 5), 20)])
    def test_only_the_pixels_that_matter_change(self, _, shape, steps=10):
        # p looks at the first a = 30 % of the pixels only, all of which go from 0 to 1: p rises from 0 to 1 on [0, a]
        # and stays, so its area is 1 - a / 2, and that of q = 1 - p is a / 2
        pixels = int(np.prod(shape[1:]))
        change = torch.zeros(1, 1, pixels)
        change[..., : int(0.3 * pixels)] = 1
        change = change.reshape(1, 1, *shape[1:]).expand(1, *shape)
        value = cout(torch.zeros(1, *shape), change, linear_classifier(change / change.sum()), 1, 0, steps=steps)
        np.testing.assert_allclose(value, [0.7], atol=1e-6)

    def test_uniform_change_scores_zero(self):
        # every pixel counts alike and changes alike: p rises linearly, both areas are 1 / 2
        weight = torch.full((1, 1, 8, 8), 1 / 64)
        value = cout(torch.zeros(3, 1, 8, 8), torch.ones(3, 1, 8, 8), linear_classifier(weight), 1)
        np.testing.assert_allclose(value, 0, atol=1e-6)

    def test_order_of_insertion(self):
        # changes .1, .4, .2, 0 count one half each: in falling order p = .3, .5, .6, .65, .65 at f = 0, 1/4, ... 1
        images = torch.tensor([[[[0.6, 0.0, 0.0, 0.0]]]])
        others = torch.tensor([[[[0.7, 0.4, 0.2, 0.0]]]])
        classify = linear_classifier(torch.full((1, 1, 1, 4), 0.5))
        area = (0.3 / 2 + 0.5 + 0.6 + 0.65 + 0.65 / 2) / 4
        np.testing.assert_allclose(cout(images, others, classify, 1), [2 * area - 1], atol=1e-6)
        # a change in the wrong direction first: p = .65, .45, .35, .3, .3 for the way back, asked for class 0
        back = ((1 - 0.65) / 2 + (1 - 0.45) + (1 - 0.35) + (1 - 0.3) + (1 - 0.3) / 2) / 4
        np.testing.assert_allclose(cout(others, images, classify, 0), [2 * back - 1], atol=1e-6)

    @parameterized.expand([("portions", 7), ("more_than_pixels", 500)])
    def test_equals_insertion_in_a_loop(self, _, steps):
        shape, classes = (2, 5, 6), 3
        images, others = random_images(4, shape), random_images(4, shape, 1)
        weight = torch.randn(60, classes, generator=torch.Generator().manual_seed(2))

        def classify(batch):
            self.assertLessEqual(len(batch), 16)
            return (batch.flatten(1) @ weight).softmax(1)

        source = classify(images).argmax(1)
        target = (source + torch.tensor([1, 2, 1, 2])) % classes
        expected = []
        for image, other, s, t in zip(images, others, source, target, strict=True):
            order = sorted(range(30), key=lambda i: -float((other - image).abs().sum(0).flatten()[i]))
            knots = [round(k * 30 / min(steps, 30)) for k in range(min(steps, 30) + 1)]
            curve = []
            for knot in knots:
                mixed = image.flatten(1).clone()
                mixed[:, order[:knot]] = other.flatten(1)[:, order[:knot]]
                p = classify(mixed.reshape(1, *shape))[0]
                curve.append(float(p[t] - p[s]))
            expected.append(np.interp(np.linspace(0, 30, 6001), knots, curve).mean())  # area of straight lines
        values = cout(images, others, classify, target, steps=steps, batch_size=16)
        np.testing.assert_allclose(values, expected, atol=1e-3)
        one_by_one = [
            cout(images[i : i + 1], others[i : i + 1], classify, target[i], source[i], steps=steps, batch_size=16)[0]
            for i in (2, 0, 3, 1)
        ]
        np.testing.assert_allclose(one_by_one, values[[2, 0, 3, 1]], atol=1e-6)

    def test_equal_images_are_the_limit_of_small_changes(self):
        images, step = random_images(3, (1, 6, 6)) * 0.5 + 0.5, random_images(3, (1, 6, 6), 1)
        classify = linear_classifier(torch.full((1, 1, 6, 6), 1 / 72))  # p below 1/2
        p = classify(images)
        values = cout(images, images.clone(), classify, 1)
        np.testing.assert_allclose(values, p[:, 1] - p[:, 0], atol=1e-6)
        np.testing.assert_allclose(cout(images, images + 1e-4 * step, classify, 1), values, atol=1e-3)
        self.assertTrue((values < 0).all())  # doing nothing earns nothing

    def test_multi_label(self):
        # a removal of label 0, whose p is the mean: the areas of 1 - p and p
        images, others = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
        others[..., :2, :] = 0

        def classify(batch):
            p = batch.flatten(1).mean(1)
            return torch.stack([p, torch.full_like(p, 0.9)], dim=1)

        area = 3 / 4 / 2 + 0.5 / 2  # p falls from 1 to 1/2 on [0, 1/2], then stays
        removal = cout(images, others, classify, 0, enforce=False, multi_label=True, steps=16)
        np.testing.assert_allclose(removal, [1 - 2 * area], atol=1e-6)
        enforced = cout(images, others, classify, 0, multi_label=True, steps=16)
        np.testing.assert_allclose(enforced, [2 * area - 1], atol=1e-6)

    def test_wrong_input(self):
        images, classify = torch.zeros(2, 1, 4, 4), linear_classifier(torch.ones(1, 1, 4, 4))
        with self.assertRaisesRegex(ValueError, "cout: image 1 has the target as its source"):
            cout(images, images, classify, [1, 0])
        with self.assertRaisesRegex(ValueError, "cout: image 0 has the target as its source"):
            cout(images, images, classify, 1, 1)
        with self.assertRaisesRegex(ValueError, "source goes with multi_label=False"):
            cout(images, images, classify, 1, 0, multi_label=True)
        with self.assertRaisesRegex(ValueError, "at least 1, got 0 and 64"):
            cout(images, images, classify, 1, steps=0)
        with self.assertRaisesRegex(ValueError, r"to probabilities \(B, K\)"):
            cout(images, images, lambda batch: classify(batch)[:, 1], 1)
        with self.assertRaisesRegex(ValueError, "two sets of images"):
            cout(images, images[:1], classify, 1)


class TestSplitFrechetDistance(unittest.TestCase):
    def test_own_image_is_never_on_the_other_side(self):
        # counterfactuals that are their images: the plain distance is 0, the split one that of two halves of the images
        features = np.random.default_rng(0).normal(size=(61, 4)) * np.arange(1, 5)
        value = split_frechet_distance(features, torch.from_numpy(features), seed=3)
        order = np.random.default_rng(3).permutation(61)
        expected = frechet_distance(features[order[:30]], features[order[30:60]])
        self.assertAlmostEqual(value, expected, places=8)
        self.assertGreater(value, 0.05)
        self.assertAlmostEqual(frechet_distance(features, features), 0, places=6)

    def test_shift(self):
        # halves differ by a small e in the mean: |d + e|^2 one way and |d - e|^2 the other average to |d|^2 + |e|^2
        rng = np.random.default_rng(0)
        real = rng.normal(size=(4000, 3))
        value = split_frechet_distance(real + np.array([1.0, 0, -2.0]), real)
        self.assertAlmostEqual(value, 5, delta=0.05)

    def test_seed_and_wrong_input(self):
        a, b = np.random.default_rng(0).normal(size=(2, 20, 3))
        self.assertEqual(split_frechet_distance(a, b, 1), split_frechet_distance(a, b, 1))
        self.assertNotEqual(split_frechet_distance(a, b, 1), split_frechet_distance(a, b, 2))
        for wrong in ((a, b[:-1]), (a[:3], b[:3]), (a[0], b[0])):
            with self.assertRaisesRegex(ValueError, "split_frechet_distance: features"):
                split_frechet_distance(*wrong)


class TestAxioms(unittest.TestCase):
    @parameterized.expand(SHAPES)
    def test_a_shrinking_reconstruction(self, _, shape):
        images = random_images(3, shape)
        size = images.abs().flatten(1).mean(1).numpy()
        distances = composition(images, lambda x: 0.9 * x, cycles=(1, 3, 10))
        self.assertEqual(list(distances), [1, 3, 10])
        for cycles, values in distances.items():
            np.testing.assert_allclose(values, size * (1 - 0.9**cycles), rtol=1e-5)
        for values in composition(images, lambda x: x).values():
            np.testing.assert_array_equal(values, 0)

    @parameterized.expand(SHAPES)
    def test_there_and_back(self, _, shape):
        images = random_images(3, shape)
        np.testing.assert_allclose(reversibility(images, lambda x: 2 * x, lambda x: x / 2), 0)
        np.testing.assert_allclose(reversibility(images, lambda x: x + 0.5, lambda x: x - 0.2), 0.3, rtol=1e-5)

    def test_wrong_cycles(self):
        for cycles in ((), (0, 1)):
            with self.assertRaisesRegex(ValueError, "composition: numbers of cycles"):
                composition(torch.zeros(1, 1, 4, 4), lambda x: x, cycles)


def run(metric, batches, decollate: bool):
    """Let an ignite engine feed the batches to the metric, as a validation does."""

    def step(engine, batch):
        return tuple(list(part) for part in batch) if decollate else batch

    engine = Engine(step)
    IgniteMetricHandler(metric, save_details=False).attach(engine, "metric")
    return engine.run(batches).metrics["metric"]


def bright(images: torch.Tensor) -> torch.Tensor:
    """Probabilities (N, 2) by the mean of the image: class 1 from 0.1."""
    p = torch.sigmoid(images.flatten(1).mean(1) * 5 - 0.5)
    return torch.stack([1 - p, p], 1)


def in_batches(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    return list(zip(*[tensor.split([5, 2, 8]) for tensor in tensors], strict=True))


class TestMetrics(unittest.TestCase):
    @parameterized.expand([(True,), (False,)])
    def test_validity_through_an_engine(self, decollate):
        p = torch.rand(15, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
        target = torch.arange(15) % 3
        self.assertAlmostEqual(
            run(CounterfactualValidityMetric(), in_batches(p, target), decollate),
            (p.argmax(1) == target).float().mean().item(),
        )
        mean = p[torch.arange(15), target].mean().item()
        value = run(CounterfactualValidityMetric("probability"), in_batches(p, target), decollate)
        self.assertAlmostEqual(value, mean, places=6)

    @parameterized.expand([(True,), (False,)])
    def test_validity_of_labels(self, decollate):
        p = torch.rand(15, 2, generator=torch.Generator().manual_seed(0))
        asked = torch.full((15, 2), -1)
        asked[:8, 1], asked[8:, 0] = 1, 0
        reached = torch.cat([p[:8, 1] >= 0.5, p[8:, 0] < 0.5])
        value = run(CounterfactualValidityMetric(multi_label=True), in_batches(p, asked), decollate)
        self.assertAlmostEqual(value, reached.float().mean().item())
        for wrong in (torch.zeros(15, 2), torch.full((15, 2), -1), torch.zeros(15)):
            with self.assertRaisesRegex(ValueError, "CounterfactualValidityMetric"):
                CounterfactualValidityMetric(multi_label=True)(p, wrong)

    @parameterized.expand(
        [
            ("l1", (1, 9, 9), l1_distance),
            ("l2", (1, 9, 9), l2_distance),
            ("ssim", (2, 4, 9, 9), structural_similarity),
            ("sparsity", (2, 9, 9), sparsity),
        ]
    )
    def test_proximity_through_an_engine(self, figure, shape, function):
        images, others = random_images(15, shape), random_images(15, shape, 1)
        for decollate in (True, False):
            value = run(ProximityMetric(figure), in_batches(others, images), decollate)
            self.assertAlmostEqual(value, function(images, others).mean(), places=6)

    @parameterized.expand([(True,), (False,)])
    def test_gain_through_an_engine(self, decollate):
        pairs = torch.rand(15, 2, 3, generator=torch.Generator().manual_seed(0)).softmax(2)
        target = torch.arange(15) % 3
        before, after = (pairs[torch.arange(15), stage, target] for stage in (0, 1))
        value = run(CounterfactualValidityMetric("gain"), in_batches(pairs, target), decollate)
        self.assertAlmostEqual(value, (after - before).mean().item(), places=6)
        asked = torch.full((15, 3), -1)
        asked[:, 1] = 0
        value = run(CounterfactualValidityMetric("gain", multi_label=True), in_batches(pairs, asked), decollate)
        self.assertAlmostEqual(value, (pairs[:, 0, 1] - pairs[:, 1, 1]).mean().item(), places=6)
        with self.assertRaisesRegex(ValueError, r"pairs of probabilities \(N, 2, K\), got shape \(15, 3\)"):
            CounterfactualValidityMetric("gain")(pairs[:, 0], target)

    @parameterized.expand([((1, 6, 6), True), ((2, 4, 6, 6), False)])
    def test_transition_through_an_engine(self, shape, decollate):
        images, others = random_images(15, shape), random_images(15, shape, 1)
        scores = torch.sigmoid(images.flatten(1).mean(1) * 5 - 0.5)
        target = (scores < 0.5).long()  # what the image is not
        pairs = torch.stack([images, others], 1)
        metric = CounterfactualTransitionMetric(bright, steps=7, batch_size=4)
        value = run(metric, in_batches(pairs, target), decollate)
        self.assertAlmostEqual(value, cout(images, others, bright, target, steps=7).mean(), places=6)
        asked = torch.full((15, 2), -1)
        asked[:, 0] = bright(images)[:, 0] < 0.5  # the opposite of what it is
        metric = CounterfactualTransitionMetric(bright, multi_label=True, steps=7)
        expected = cout(images, others, bright, 0, enforce=asked[:, 0] == 1, multi_label=True, steps=7).mean()
        self.assertAlmostEqual(run(metric, in_batches(pairs, asked), decollate), expected, places=6)
        with self.assertRaisesRegex(ValueError, "CounterfactualTransitionMetric: predictions must be pairs of images"):
            metric(pairs[:, :1], asked)

    def test_transition_leaves_out_images_that_have_the_answer(self):
        images, others = random_images(15, (1, 6, 6)), random_images(15, (1, 6, 6), 1)
        said = bright(images).argmax(1)
        target = torch.where(torch.arange(15) % 2 == 0, said, 1 - said)  # every other one is what it is
        metric = CounterfactualTransitionMetric(bright, steps=7, batch_size=2)
        value = run(metric, in_batches(torch.stack([images, others], 1), target), False)
        odd = slice(1, None, 2)
        self.assertAlmostEqual(value, cout(images[odd], others[odd], bright, target[odd], steps=7).mean(), places=6)
        asked = torch.full((15, 2), -1)
        asked[:, 0] = (bright(images)[:, 0] >= 0.5).long()
        metric = CounterfactualTransitionMetric(bright, multi_label=True, steps=7)
        self.assertTrue(np.isnan(run(metric, in_batches(torch.stack([images, others], 1), asked), False)))

    @parameterized.expand([((1, 4, 3), True), ((1, 4, 3), False), ((2, 3, 2, 2), True)])
    def test_realism_through_an_engine(self, shape, decollate):
        real, extent = random_images(15, shape), int(np.prod(shape))
        moved = real + 0.3  # equal covariances: the distance is that of the means
        value = run(RealismMetric("frechet", lambda x: x.flatten(1)), in_batches(moved, real), decollate)
        self.assertAlmostEqual(value, 0.3**2 * extent, places=4)
        features = moved.flatten(1), real.flatten(1)
        value = run(RealismMetric(), in_batches(*features), decollate)
        self.assertAlmostEqual(value, split_frechet_distance(*features), places=6)
        value = run(RealismMetric("kernel"), in_batches(*features), decollate)
        self.assertAlmostEqual(value, kernel_distance(*features).value, places=6)

    @parameterized.expand(SHAPES)
    def test_axioms_through_an_engine(self, _, shape):
        images = random_images(15, shape)
        size = images.abs().mean().item()
        batches = [(batch, None) for (batch,) in in_batches(images)]
        value = run(CompositionMetric(lambda x: 0.9 * x, cycles=3), batches, False)
        self.assertAlmostEqual(value, size * (1 - 0.9**3), places=6)
        value = run(ReversibilityMetric(lambda x: x + 0.5, lambda x: x - 0.2), batches, False)
        self.assertAlmostEqual(value, 0.3, places=6)
        with self.assertRaisesRegex(ValueError, "CompositionMetric: cycles must be at least 1, got 0"):
            CompositionMetric(lambda x: x, 0)

    def test_unknown_figures(self):
        for metric in (CounterfactualValidityMetric, ProximityMetric, RealismMetric):
            with self.assertRaisesRegex(ValueError, f"{metric.__name__}: figure must be one of .*got 'psnr'"):
                metric("psnr")

    def test_two_processes_of_different_length_equal_one(self):
        # the gathering of MONAI's buffers, which appends what the other process holds, without a second process
        alone, first, second = (measured(part) for part in (slice(None), slice(0, 3), slice(3, None)))
        for whole, own, other in zip(alone, first, second, strict=True):
            expected, held = whole.aggregate(), other.get_buffer()
            with mock.patch(
                "monai.metrics.metric.evenly_divisible_all_gather",
                lambda own, concat, held=held: torch.cat([own, held]),
            ):
                self.assertAlmostEqual(own.aggregate(), expected, places=12)


def measured(part: slice) -> tuple[CumulativeIterationMetric, ...]:
    """One metric of each kind that saw a part of nine images, one of whose masks is empty."""
    images, others = random_images(9, (1, 8, 8)), random_images(9, (1, 8, 8), 1)
    masks = (random_images(9, (1, 8, 8), 2) > 0.5).float()
    masks[7] = 0
    p = images.flatten(1)[:, :2].softmax(1)
    metrics = (CounterfactualValidityMetric("probability"), ProximityMetric("l2"), LocalizationMetric("iou", 0.5))
    metrics += (CompositionMetric(lambda x: x / 2),)
    pairs = ((p, torch.arange(9) % 2), (others, images), (others - images, masks), (images, images))
    for metric, (first, second) in zip(metrics, pairs, strict=True):
        metric(first[part], second[part])
    return metrics


if __name__ == "__main__":
    unittest.main()
