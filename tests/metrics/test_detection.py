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

import numpy as np
import torch
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.metrics import (
    MomentsDetector,
    PrincipalComponentDetector,
    detection_report,
    max_softmax_score,
)

sklearn_metrics, has_sklearn = optional_import("sklearn.metrics")
covariance, _ = optional_import("sklearn.covariance")


def scores(decimals: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=90).round(decimals), (rng.normal(size=60) + 1).round(decimals)


def textures(count: int, channels: int, size: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Noise images of random brightness and contrast."""
    rng = np.random.default_rng(seed)
    brightness, contrast = rng.normal(size=(2, count, channels, *[1] * len(size)))
    return (0.3 * brightness + np.exp(0.2 * contrast) * rng.normal(size=(count, channels, *size))).astype(np.float32)


class TestDetectionReport(unittest.TestCase):
    @unittest.skipUnless(has_sklearn, "scikit-learn is the oracle")
    @parameterized.expand([("ties", 1), ("distinct", 12)])
    def test_against_scikit_learn(self, _, decimals):
        usual, unusual = scores(decimals)
        report = detection_report(torch.from_numpy(usual), unusual, bootstrap=0)
        truth, values = np.repeat([0, 1], [90, 60]), np.append(usual, unusual)
        self.assertAlmostEqual(report.auroc.value, sklearn_metrics.roc_auc_score(truth, values), places=12)
        self.assertAlmostEqual(report.aupr.value, sklearn_metrics.average_precision_score(truth, values), places=12)
        flagged, found, _ = sklearn_metrics.roc_curve(truth, values, drop_intermediate=False)
        self.assertAlmostEqual(report.fpr_at_95_tpr.value, flagged[found >= 0.95].min(), places=12)
        self.assertEqual((report.count_in, report.count_out, report.prevalence), (90, 60, 0.4))

    def test_by_hand(self):
        # 19 of 20 unusual images are found at a threshold of 2, which flags one of the four usual ones
        report = detection_report([0, 1, 1.5, 2], [*range(2, 21), 0.5], bootstrap=0)
        self.assertEqual(report.fpr_at_95_tpr.value, 0.25)
        self.assertAlmostEqual(report.auroc.value, (18 * 4 + 3.5 + 1) / 80)
        perfect = detection_report([0, 1], [2, 3], bootstrap=0)
        self.assertEqual([perfect.auroc.value, perfect.aupr.value, perfect.fpr_at_95_tpr.value], [1, 1, 0])
        reverse = detection_report([2, 3], [0, 1], bootstrap=0)
        self.assertEqual([reverse.auroc.value, reverse.fpr_at_95_tpr.value], [0, 1])
        nothing = detection_report(np.zeros(30), np.zeros(10), bootstrap=0)
        self.assertEqual([nothing.auroc.value, nothing.aupr.value, nothing.fpr_at_95_tpr.value], [0.5, 0.25, 1])

    def test_intervals_are_those_of_images_drawn_one_by_one(self):
        usual, unusual = scores(1)
        report = detection_report(usual, unusual, bootstrap=2000)
        rng = np.random.default_rng(5)
        drawn = [
            detection_report(usual[rng.integers(0, 90, 90)], unusual[rng.integers(0, 60, 60)], bootstrap=0)
            for _ in range(400)
        ]
        for name in ("auroc", "aupr", "fpr_at_95_tpr"):
            ends = np.quantile([getattr(part, name).value for part in drawn], [0.025, 0.975])
            interval = getattr(report, name)
            np.testing.assert_allclose([interval.low, interval.high], ends, atol=0.15 * np.diff(ends)[0], err_msg=name)

    def test_as_dict_and_table(self):
        report = detection_report(*scores(1), bootstrap=20)
        content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
        for name in ("auroc", "aupr", "fpr_at_95_tpr"):
            self.assertEqual(content[name], getattr(report, name).as_dict())
        self.assertEqual((content["count_in"], content["count_out"]), (90, 60))
        lines = report.table().splitlines()
        self.assertEqual(lines[0], "60 out-of-distribution images against 90 usual ones")
        self.assertIn(f"{report.aupr}; chance 0.400", lines[2])

    @parameterized.expand(
        [
            ("empty", [], [1], r"scores_in must be finite and \(N,\)"),
            ("nan", [1], [np.nan], r"scores_out must be finite"),
            ("shape", [1], [[1, 2]], r"scores_out .* got shape \(1, 2\)"),
        ]
    )
    def test_wrong_input(self, _, usual, unusual, message):
        with self.assertRaisesRegex(ValueError, f"detection_report: {message}"):
            detection_report(usual, unusual)


class TestMaxSoftmaxScore(unittest.TestCase):
    def test_values(self):
        p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0], [0.1, 0.7, 0.2, 0.0]])
        np.testing.assert_allclose(max_softmax_score(p), [0.75, 0, 0.3], atol=1e-7)

    def test_wrong_input(self):
        with self.assertRaisesRegex(ValueError, "max_softmax_score: rows"):
            max_softmax_score([[0.9, 0.9]])


class TestMomentsDetector(unittest.TestCase):
    @unittest.skipUnless(has_sklearn, "scikit-learn is the oracle")
    @parameterized.expand([("2d", 2, (9, 7)), ("3d", 1, (6, 5, 4))])
    def test_mahalanobis_distance_of_scikit_learn(self, _, channels, size):
        usual, unusual = textures(200, channels, size), 1.5 * textures(20, channels, size, seed=1)

        def moments(images: np.ndarray) -> np.ndarray:
            rows = []
            for image in images.astype(np.float64):
                slopes = [[np.abs(np.diff(channel, axis=k)).mean() for k in range(len(size))] for channel in image]
                rows.append([f(channel) for f in (np.mean, np.std) for channel in image] + [*map(np.mean, slopes)])
            return np.array(rows)

        model = covariance.EmpiricalCovariance().fit(moments(usual))  # covariance with 1/N, here 1/(N - 1)
        expected = np.sqrt(model.mahalanobis(moments(unusual)) * 199 / 200)
        found = MomentsDetector().fit(torch.from_numpy(usual)).score(torch.from_numpy(unusual))
        np.testing.assert_allclose(found, expected, rtol=2e-3)

    @parameterized.expand([("2d", (8, 8)), ("3d", (5, 5, 5))])
    def test_scores_do_not_change_with_intensity_or_orientation(self, _, size):
        usual, unusual = textures(60, 2, size), textures(10, 2, size, seed=1)
        expected = MomentsDetector().fit(usual).score(unusual)
        changes = (lambda x: 3 * x - 2, lambda x: np.swapaxes(x, -1, -2), lambda x: x[..., ::-1], lambda x: x[:, ::-1])
        for change in changes:
            np.testing.assert_allclose(MomentsDetector().fit(change(usual)).score(change(unusual)), expected, rtol=1e-3)

    @parameterized.expand([("brighter", lambda x: x + 3), ("smoother", lambda x: np.sort(x, axis=-1))])
    def test_unusual_images_score_higher(self, _, change):
        images = textures(150, 1, (8, 8))
        detector = MomentsDetector().fit(images[:50])
        report = detection_report(detector.score(images[50:100]), detector.score(change(images[100:])), bootstrap=0)
        self.assertGreater(report.auroc.value, 0.98)

    def test_colors_are_far_from_gray_images_with_replicated_channels(self):
        gray = np.repeat(textures(60, 1, (8, 8)), 3, axis=1)  # a covariance of rank 3 of 9
        detector = MomentsDetector().fit(gray[:40])
        tinted = gray[40:] + np.float32([[[[0.2]], [[0]], [[-0.2]]]])
        self.assertGreater(detector.score(tinted).min(), 10 * detector.score(gray[40:]).max())

    def test_wrong_input(self):
        images = textures(10, 2, (5, 5))
        with self.assertRaisesRegex(ValueError, r"MomentsDetector.fit: more than 6 images .* got 6"):
            MomentsDetector().fit(images[:6])
        with self.assertRaisesRegex(ValueError, r"MomentsDetector.fit: finite images .* got shape \(10, 2, 5\)"):
            MomentsDetector().fit(images[..., 0])
        with self.assertRaisesRegex(ValueError, "MomentsDetector.fit: the images do not differ"):
            MomentsDetector().fit(np.ones((10, 1, 4, 4)))
        with self.assertRaisesRegex(ValueError, "two pixels or more"):
            MomentsDetector().fit(images[..., :1])
        with self.assertRaisesRegex(ValueError, "MomentsDetector.fit: finite images"):
            MomentsDetector().fit(np.full((10, 1, 4, 4), np.nan))
        with self.assertRaisesRegex(RuntimeError, "MomentsDetector.score: call fit first"):
            MomentsDetector().score(images)
        with self.assertRaisesRegex(ValueError, r"fitted shape \(2, 5, 5\) expected, got \(2, 5, 4\)"):
            MomentsDetector().fit(images).score(images[..., :4])


@unittest.skipUnless(has_sklearn, "scikit-learn is not installed")
class TestPrincipalComponentDetector(unittest.TestCase):
    @parameterized.expand([("2d", (2, 5, 6)), ("3d", (1, 4, 3, 5))])
    def test_residual_is_what_lies_outside_the_space(self, _, shape):
        # images in an affine space of three dimensions, plus a known step at right angles to it
        rng = np.random.default_rng(0)
        pixels = int(np.prod(shape))
        basis = np.linalg.qr(rng.normal(size=(pixels, 4)))[0].T
        images = rng.normal(size=pixels) + rng.normal(size=(50, 3)) @ basis[:3]
        steps = np.linspace(0, 2, 50)
        detector = PrincipalComponentDetector(3).fit(images.reshape(50, *shape))
        moved = (images + steps[:, None] * basis[3]).reshape(50, *shape)
        np.testing.assert_allclose(detector.score(torch.from_numpy(moved)), steps / np.sqrt(pixels), atol=1e-5)

    def test_equals_the_decomposition(self):
        rng = np.random.default_rng(0)
        flat = 5 * rng.normal(size=(40, 8)) @ rng.normal(size=(8, 36)) + rng.normal(size=(40, 36))
        images = flat.reshape(40, 1, 6, 6)
        mean = flat[:30].mean(0)
        components = np.linalg.svd(flat[:30] - mean)[2][:8]
        centered = flat[30:] - mean
        expected = np.sqrt(((centered - centered @ components.T @ components) ** 2).mean(1))
        detector = PrincipalComponentDetector(8).fit(images[:30])
        np.testing.assert_allclose(detector.score(images[30:]), expected, rtol=1e-3)

    def test_wrong_input(self):
        images = textures(10, 1, (5, 5))
        with self.assertRaisesRegex(ValueError, "components must be at least 1, got 0"):
            PrincipalComponentDetector(0)
        with self.assertRaisesRegex(ValueError, "10 components need more .* got 10 images of 25 pixels"):
            PrincipalComponentDetector(10).fit(images)
        with self.assertRaisesRegex(RuntimeError, "PrincipalComponentDetector.score: call fit first"):
            PrincipalComponentDetector(2).score(images)
        with self.assertRaisesRegex(ValueError, "fitted shape"):
            PrincipalComponentDetector(2).fit(images).score(images[..., :4])


if __name__ == "__main__":
    unittest.main()
