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

import numpy as np
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.metrics import Interval, area_under_risk_coverage, risk_coverage_curve
from monai_jointdiff.visualize import accuracy_against_calls_figure, risk_coverage_figure

_, has_matplotlib = optional_import("matplotlib")


def decisions(count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    uncertainty = rng.random(count)
    return uncertainty, rng.random(count) > 0.5 * uncertainty


@unittest.skipUnless(has_matplotlib, "matplotlib is not installed")
class TestRiskCoverageFigure(unittest.TestCase):
    def test_lines_and_marks(self):
        uncertainty, correct = decisions()
        few = np.round(uncertainty, 1)
        curves = {"entropy": risk_coverage_curve(uncertainty, correct), "votes": risk_coverage_curve(few, correct)}
        figure = risk_coverage_figure(curves)
        axes = figure.axes[0]
        self.assertEqual(len(axes.lines), 3)  # marks only where there are few thresholds
        for line, curve in zip(axes.lines, curves.values(), strict=False):
            coverage, risk = line.get_data()
            np.testing.assert_allclose(risk, curve.risk_at(coverage))
            self.assertTrue(set(curve.coverage) <= set(coverage))
        np.testing.assert_allclose(axes.lines[2].get_data(), [curves["votes"].coverage, curves["votes"].risk])
        self.assertEqual(axes.lines[2].get_color(), axes.lines[1].get_color())
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        areas = [area_under_risk_coverage(scores, correct) for scores in (uncertainty, few)]
        self.assertEqual(names, [f"entropy: AURC {areas[0]:.4f}", f"votes: AURC {areas[1]:.4f}"])

    def test_one_surely_wrong_image_does_not_squeeze_the_curve(self):
        uncertainty, correct = decisions()
        correct[uncertainty.argmin()] = False
        curve = risk_coverage_curve(uncertainty, correct)
        self.assertEqual(curve.risk[0], 1)
        top = risk_coverage_figure({"entropy": curve}).axes[0].get_ylim()[1]
        self.assertLess(top, 0.5)
        self.assertGreater(top, curve.risk[curve.coverage >= 0.05].max())

    def test_a_classifier_without_errors(self):
        low, high = risk_coverage_figure({"perfect": risk_coverage_curve([0, 1], [1, 1])}).axes[0].get_ylim()
        self.assertTrue(low < 0 < high)

    def test_no_curves(self):
        with self.assertRaisesRegex(ValueError, "risk_coverage_figure: at least one curve"):
            risk_coverage_figure({})


@unittest.skipUnless(has_matplotlib, "matplotlib is not installed")
class TestAccuracyAgainstCallsFigure(unittest.TestCase):
    def test_what_is_drawn(self):
        votes = {22: Interval(0.82, 0.79, 0.85), 2: Interval(0.7, 0.66, 0.74), 6: Interval(0.76, 0.72, 0.8)}
        curves = {"majority": votes, "head": {1: Interval(0.88, 0.86, 0.9)}}
        axes = accuracy_against_calls_figure(curves, {"published": {10: 0.75, 2: 0.67}}).axes[0]
        published, majority, head = axes.lines[:3]
        np.testing.assert_allclose(published.get_data(), [[2, 10], [0.67, 0.75]])
        np.testing.assert_allclose(majority.get_data(), [[2, 6, 22], [0.7, 0.76, 0.82]])
        np.testing.assert_allclose(head.get_xydata(), [[1, 0.88]])
        bands, bars = axes.collections
        corners = bands.get_paths()[0].vertices
        for calls, interval in votes.items():
            heights = corners[corners[:, 0] == calls, 1]
            np.testing.assert_allclose([heights.min(), heights.max()], [interval.low, interval.high])
        np.testing.assert_allclose(bars.get_segments()[0], [[1, 0.86], [1, 0.9]])
        self.assertEqual(axes.get_xscale(), "log")
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        self.assertEqual(set(names), {"published", "majority", "head"})

    def test_points_without_an_interval_have_no_band(self):
        curves = {"a": {1: Interval(0.5), 2: Interval(0.6)}, "b": {3.5: Interval(0.7)}}
        axes = accuracy_against_calls_figure(curves).axes[0]
        np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.5, 0.6])
        drawn = [path.vertices for part in axes.collections for path in part.get_paths()]
        self.assertFalse(any(np.isfinite(vertices).all(1).any() and np.ptp(vertices[:, 1]) > 0 for vertices in drawn))

    @parameterized.expand(
        [
            ("none", {}, None, "at least one curve"),
            ("empty", {"a": {}}, None, "'a' needs points"),
            ("zero", {"a": {0: Interval(0.5)}}, None, r"above 0, got \[0\]"),
            ("undefined", {"a": {1: Interval(None, reason="no images")}}, None, r"not defined \(no images\)"),
            ("published", {"a": {1: Interval(0.5)}}, {"them": {}}, "'them' needs points"),
        ]
    )
    def test_wrong_input(self, _, curves, published, message):
        with self.assertRaisesRegex(ValueError, f"accuracy_against_calls_figure: .*{message}"):
            accuracy_against_calls_figure(curves, published)


if __name__ == "__main__":
    unittest.main()
