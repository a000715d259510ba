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


"""From stored gray values to [-1, 1]."""

from __future__ import annotations

import json
import unittest
from typing import Any

import numpy as np
from parameterized import parameterized

from monai_jointdiff.data import IntensityRule


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(300.0, 100.0, shape)


class TestScaling(unittest.TestCase):
    def test_8_bit_values_have_a_fixed_range(self) -> None:
        image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
        scaled = IntensityRule()(image)
        np.testing.assert_allclose(scaled.ravel(), np.linspace(-1, 1, 256), atol=1e-6)
        self.assertEqual(scaled.dtype, np.float32)
        np.testing.assert_allclose(IntensityRule()(image[:, :2]), scaled[:, :2], atol=0)

    @parameterized.expand([((4, 5),), ((3, 4, 5),)])
    def test_booleans_are_the_ends(self, shape: tuple[int, ...]) -> None:
        image = values(2, *shape) > values(2, *shape).mean()
        np.testing.assert_array_equal(IntensityRule()(image), np.where(image, 1.0, -1.0))
        np.testing.assert_array_equal(IntensityRule()(np.ones((1, *shape), bool)), np.ones((1, *shape)))

    @parameterized.expand(
        [
            (dtype, shape)
            for dtype in (np.uint16, np.int16, np.int32, np.float32, np.float64)
            for shape in ((20, 10), (9, 6, 5))
        ]
    )
    def test_others_are_scaled_between_percentiles_of_each_channel(self, dtype: Any, shape: tuple[int, ...]) -> None:
        image = values(2, *shape).clip(1).astype(dtype)
        image[1] = image[1] * 3
        scaled = IntensityRule(percentiles=(5, 90))(image)
        for channel, given in zip(scaled, image, strict=True):
            low, high = np.percentile(given, 5), np.percentile(given, 90)
            expected = np.interp(given, (low, high), (-1.0, 1.0))
            np.testing.assert_allclose(channel, expected, atol=1e-5)
        self.assertEqual((scaled.dtype, scaled.shape), (np.float32, image.shape))

    def test_scale_and_offset_of_a_scanner_do_not_matter(self) -> None:
        image = values(1, 12, 12)
        np.testing.assert_allclose(IntensityRule()(image), IntensityRule()(40.0 * image - 1000.0), atol=1e-4)

    @parameterized.expand([(np.int16,), (np.uint8,), (np.float32,)])
    def test_window_holds_whatever_the_storage(self, dtype: Any) -> None:
        image = np.array([[[0, 20, 45, 70, 120]]]).astype(dtype)
        rule = IntensityRule(kind="window", window=(20, 70))
        np.testing.assert_allclose(rule(image), [[[-1, -1, 0, 1, 1]]], atol=1e-6)

    def test_hounsfield_units(self) -> None:
        rule = IntensityRule(kind="window", window=(-1000, 400))
        image = np.array([[[-2048, -1000, -300, 400, 3000]]], dtype=np.int16)
        np.testing.assert_allclose(rule(image), [[[-1, -1, 0, 1, 1]]], atol=1e-6)

    def test_floating_range(self) -> None:
        rule = IntensityRule(float_range=(0, 1))
        np.testing.assert_allclose(
            rule(np.array([[[0.0, 0.25, 1.0, 1.009, -0.009]]])), [[[-1, -0.5, 1, 1, -1]]], atol=1e-6
        )
        np.testing.assert_array_equal(rule(np.array([[[0, 255]]], dtype=np.uint8)), [[[-1, 1]]])
        for wrong in (1.02, -0.02):
            with self.assertRaisesRegex(
                ValueError, r"floating values must lie in \[0.0, 1.0\] as in the training data"
            ):
                rule(np.array([[[0.5, wrong]]]))

    def test_no_contrast_is_black(self) -> None:
        np.testing.assert_array_equal(IntensityRule()(np.full((1, 4, 4), 700, dtype=np.uint16)), -np.ones((1, 4, 4)))
        np.testing.assert_array_equal(IntensityRule()(np.zeros((2, 4, 4, 4))), -np.ones((2, 4, 4, 4)))

    @parameterized.expand(
        [
            (wrong, rule)
            for wrong in (np.nan, np.inf, -np.inf)
            for rule in ({}, {"float_range": (0, 1)}, {"kind": "window", "window": (0, 1)})
        ]
    )
    def test_values_that_are_no_numbers_are_refused(self, wrong: float, rule: dict[str, Any]) -> None:
        image = np.full((1, 4, 4), 0.5, dtype=np.float32)
        image[0, 1, 2] = wrong
        with self.assertRaisesRegex(ValueError, "IntensityRule: the image holds NaN or infinite values"):
            IntensityRule(**rule)(image)

    def test_given_image_stays_as_it_is(self) -> None:
        image = values(1, 5, 5)
        before = image.copy()
        IntensityRule()(image)
        np.testing.assert_array_equal(image, before)


class TestRule(unittest.TestCase):
    @parameterized.expand(
        [
            ({},),
            ({"percentiles": (1, 99)},),
            ({"float_range": (0, 1)},),
            ({"kind": "window", "window": (-1000, 400)},),
        ]
    )
    def test_survives_json(self, arguments: dict[str, Any]) -> None:
        rule = IntensityRule(**arguments)
        self.assertEqual(IntensityRule.from_dict(json.loads(json.dumps(rule.as_dict()))), rule)
        self.assertEqual(IntensityRule.from_dict(arguments), rule)

    @parameterized.expand(
        [
            ("unit", np.array([0.0, 0.7]), (0.0, 1.0)),
            ("symmetric", np.array([-0.2, 1.0], dtype=np.float32), (-1.0, 1.0)),
            ("wide", np.array([-5.0, 1.0]), None),
            ("whole", np.array([0, 1], dtype=np.int16), None),
            ("bytes", np.array([0, 1], dtype=np.uint8), None),
            ("empty", np.zeros(0), None),
        ]
    )
    def test_for_array(self, _: str, images: np.ndarray, expected: tuple[float, float] | None) -> None:
        self.assertEqual(IntensityRule.for_array(images), IntensityRule(float_range=expected))

    @parameterized.expand(
        [
            (IntensityRule(), "8-bit values 0 to 255, others percentiles 0.5 to 99.5"),
            (IntensityRule(float_range=(0, 1)), "8-bit values 0 to 255, floating values 0 to 1, others percentiles .*"),
            (IntensityRule(kind="window", window=(-1000, 400)), "window -1000 to 400"),
        ]
    )
    def test_in_words(self, rule: IntensityRule, expected: str) -> None:
        self.assertRegex(str(rule), f"^{expected}$")

    @parameterized.expand(
        [
            ({"kind": "minmax"}, "kind must be one of dtype, window, got 'minmax'"),
            ({"kind": "window"}, "kind 'window' and window None contradict"),
            ({"window": (0, 1)}, "kind 'dtype' and window .* contradict"),
            ({"kind": "window", "window": (1, 1)}, "window must be .lower, upper. with lower < upper"),
            ({"kind": "window", "window": (0, np.nan)}, "window must be .lower, upper. with lower < upper"),
            ({"percentiles": (99, 1)}, "percentiles must be .lower, upper. with lower < upper"),
            ({"percentiles": (-1, 99)}, "percentiles must lie in .0, 100."),
            ({"percentiles": (1, 101)}, "percentiles must lie in .0, 100."),
            ({"float_range": (0, 1, 2)}, "float_range must be"),
        ]
    )
    def test_wrong_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"IntensityRule: {message}"):
            IntensityRule(**arguments)

    def test_unknown_entries_are_named(self) -> None:
        with self.assertRaisesRegex(ValueError, "unknown entries widow; it has kind, percentiles, float_range, window"):
            IntensityRule.from_dict({"kind": "window", "widow": [0, 1]})


if __name__ == "__main__":
    unittest.main()
