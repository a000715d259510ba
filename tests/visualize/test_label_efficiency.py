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
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.metrics import mean_of_repeats
from monai_jointdiff.visualize import label_efficiency_figure

_, has_matplotlib = optional_import("matplotlib")
_, has_scipy = optional_import("scipy")

SUPERVISED = {20: [0.6, 0.7, 0.5], 100: [0.8, 0.75, 0.85]}
FIXMATCH = {100: [0.9, 0.92, 0.88], 20: [0.71, 0.76, 0.81]}


@unittest.skipUnless(has_matplotlib and has_scipy, "matplotlib or scipy is not installed")
class TestLabelEfficiencyFigure(unittest.TestCase):
    def test_what_is_drawn(self) -> None:
        curves = {"supervised": SUPERVISED, "fixmatch": FIXMATCH}
        figure = label_efficiency_figure({"accuracy": curves, "AUC": curves})
        self.assertEqual([axes.get_title() for axes in figure.axes], ["accuracy", "AUC"])
        axes = figure.axes[0]
        lines = {line.get_label(): line for line in axes.lines if line.get_label() in curves}
        for name, points in curves.items():
            counts, means = lines[name].get_data()
            np.testing.assert_allclose(counts, [20, 100], rtol=0.05)
            np.testing.assert_allclose(means, [np.mean(points[20]), np.mean(points[100])])
        places = [line.get_xdata() for line in lines.values()]
        self.assertTrue((np.abs(places[1] / places[0] - 1) > 0.01).all())  # side by side
        bars = np.array([collection.get_segments()[0] for collection in axes.collections])  # (4, 2, 2)
        expected = [mean_of_repeats(points[n]) for points in curves.values() for n in (20, 100)]
        np.testing.assert_allclose(bars[:, :, 1], [[mean.low, mean.high] for mean in expected])
        dots = np.concatenate([line.get_ydata() for line in axes.lines if line.get_label() not in curves])
        self.assertEqual(sorted(dots), sorted(v for points in curves.values() for one in points.values() for v in one))
        self.assertEqual(axes.get_xscale(), "log")
        self.assertEqual(list(axes.get_xticks()), [20, 100])
        self.assertEqual([text.get_text() for text in figure.legends[0].get_texts()], list(curves))

    def test_long_bars_do_not_squeeze_what_was_measured(self) -> None:
        axes = label_efficiency_figure({"AUC": {"a": {10: [0.9, 0.95], 20: [0.96, 0.98]}}}).axes[0]
        low, high = axes.get_ylim()
        self.assertTrue(0.85 < low < 0.9)
        self.assertTrue(0.98 < high <= 1.01)

    def test_one_draw_has_no_bar_and_one_count_a_picture(self) -> None:
        axes = label_efficiency_figure({"AUC": {"a": {50: [0.9]}}}).axes[0]
        self.assertEqual((len(axes.collections), len(axes.lines)), (0, 1))
        low, high = axes.get_xlim()
        self.assertTrue(low < 50 < high)

    @parameterized.expand(
        [
            ("none", {}, "every metric needs the same algorithms, at least one"),
            ("others", {"x": {"a": {5: [0.5]}}, "y": {"b": {5: [0.5]}}}, "same algorithms"),
            ("no_points", {"x": {"a": {}}}, "'a' needs values of 'x' at numbers"),
            ("no_values", {"x": {"a": {5: []}}}, "'a' needs values of 'x' at numbers"),
            ("no_labels", {"x": {"a": {0: [0.5]}}}, "'a' needs values of 'x' at numbers"),
            ("range", {"x": {"a": {5: [1.5]}}}, r"values of 'x' must be in \[0, 1\]"),
        ]
    )
    def test_wrong_input(self, _: str, metrics: dict[str, Any], message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"label_efficiency_figure: .*{message}"):
            label_efficiency_figure(metrics)


if __name__ == "__main__":
    unittest.main()
