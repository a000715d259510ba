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
import torch
from monai.metrics import FIDMetric
from parameterized import parameterized

from monai_jointdiff.metrics import (
    GaussianReference,
    frechet_distance,
    frechet_distance_of_moments,
    gaussian_moments,
    kernel_distance,
)


def features(count: int, dimension: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dimension)) @ rng.normal(size=(dimension, dimension)) + rng.normal(size=dimension)


class TestFrechetDistance(unittest.TestCase):
    def test_diagonal_gaussians(self):
        rng = np.random.default_rng(0)
        mean_a, mean_b, std_a, std_b = rng.normal(size=5), rng.normal(size=5), rng.random(5), rng.random(5)
        value = frechet_distance_of_moments(mean_a, np.diag(std_a**2), mean_b, np.diag(std_b**2))
        self.assertAlmostEqual(value, ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum(), places=12)

    def test_two_by_two_in_closed_form(self):
        # tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for a 2 x 2 matrix, here M = A B, which do not commute
        a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.3], [-0.3, 3.0]])
        root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
        zero = np.zeros(2)
        self.assertAlmostEqual(
            frechet_distance_of_moments(zero, a, zero, b), np.trace(a) + np.trace(b) - 2 * root, places=12
        )

    @parameterized.expand([("full", 300, 10), ("many", 100, 40)])
    def test_equals_monai(self, _, count, dimension):
        a, b = features(count, dimension, 0), features(count + 50, dimension, 1)
        try:
            expected = FIDMetric()(torch.from_numpy(a), torch.from_numpy(b)).item()
        except TypeError as error:  # MONAI 1.6.1 passes an argument that SciPy 1.18 removed (MONAI #9076)
            self.skipTest(f"MONAI's FIDMetric does not run with this SciPy: {error}")
        self.assertAlmostEqual(frechet_distance(a, b) / expected, 1, places=6)

    def test_fewer_images_than_features(self):
        # with singular covariances: tr sqrt(A B) is the nuclear norm of the product of the centred data
        a, b = features(20, 50, 0), features(30, 50, 1)
        centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
        root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((x**2).sum() for x in centred) - 2 * root
        self.assertAlmostEqual(frechet_distance(a, b) / expected, 1, places=7)

    def test_invariances(self):
        a, b = features(60, 8, 0), features(70, 8, 1)
        value = frechet_distance(a, b)
        rotation = np.linalg.qr(features(8, 8, 2))[0]
        self.assertAlmostEqual(frechet_distance(b, a), value, places=8)
        self.assertAlmostEqual(frechet_distance(a @ rotation, b @ rotation), value, places=8)
        self.assertAlmostEqual(frechet_distance(3 * a, 3 * b) / value, 9, places=8)
        self.assertAlmostEqual(frechet_distance(a, a), 0, places=5)
        self.assertAlmostEqual(frechet_distance(a, a + 2), 4 * 8, places=5)

    def test_moments(self):
        a = features(30, 4, 0)
        mean, covariance = gaussian_moments(torch.from_numpy(a))
        np.testing.assert_allclose(mean, a.mean(0))
        np.testing.assert_allclose(covariance, np.cov(a, rowvar=False))

    @parameterized.expand([(frechet_distance,), (kernel_distance,)])
    def test_wrong_input(self, distance):
        good = np.zeros((5, 3))
        for bad in (np.zeros((1, 3)), np.zeros(3), np.full((5, 3), np.nan)):
            with self.assertRaisesRegex(ValueError, "two finite feature vectors"):
                distance(good, bad)
        with self.assertRaisesRegex(ValueError, "same number of features"):
            distance(good, np.zeros((5, 4)))


def unbiased_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Term by term, as in the definition."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / len(x) + 1) ** 3

    within = [np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (a, b)]
    return sum(within) - 2 * float(np.mean([kernel(x, y) for x in a for y in b]))


class TestKernelDistance(unittest.TestCase):
    def test_all_images_in_one_subset(self):
        a, b = features(12, 3, 0), features(12, 3, 1)
        result = kernel_distance(a, b, num_subsets=3, subset_size=12)
        self.assertAlmostEqual(result.value / unbiased_mmd(a, b), 1, places=10)
        self.assertLess(result.std / result.value, 1e-12)

    def test_subsets(self):
        a, b = features(9, 3, 0), features(7, 3, 1)
        result = kernel_distance(a, b, num_subsets=20, subset_size=4, seed=3)
        rng = np.random.default_rng(3)
        chosen = [[rng.permutation(len(x))[:4] for _ in range(20)] for x in (a, b)]
        values = [unbiased_mmd(a[i], b[j]) for i, j in zip(*chosen, strict=True)]
        self.assertAlmostEqual(result.value / np.mean(values), 1, places=10)
        self.assertAlmostEqual(result.std / np.std(values), 1, places=10)

    def test_blocks_of_rows(self):
        a, b = features(1500, 2, 0), features(1100, 2, 1)
        result = kernel_distance(a, b, num_subsets=1, subset_size=1100, seed=0)
        rng = np.random.default_rng(0)
        a, b = a[rng.permutation(1500)[:1100]], b[rng.permutation(1100)[:1100]]
        kernels = [(x @ y.T / 2 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]
        within = [(k.sum() - np.trace(k)) / (1100 * 1099) for k in kernels[:2]]
        self.assertAlmostEqual(result.value / (sum(within) - 2 * kernels[2].mean()), 1, places=9)

    def test_unbiased(self):
        rng = np.random.default_rng(0)
        values = [kernel_distance(*rng.normal(size=(2, 20, 4)), subset_size=10).value for _ in range(200)]
        self.assertLess(abs(np.mean(values)), 4 * np.std(values) / np.sqrt(200))
        self.assertLess(min(values), 0)

    def test_default_subsets_differ(self):
        result = kernel_distance(features(40, 3, 0), features(60, 3, 1))
        self.assertEqual((result.subset_size, result.num_subsets), (20, 100))
        self.assertGreater(result.std, 0)

    def test_wrong_subsets(self):
        a = features(10, 3, 0)
        for options in ({"subset_size": 11}, {"subset_size": 1}, {"num_subsets": 0}):
            with self.assertRaisesRegex(ValueError, "subset_size must lie in"):
                kernel_distance(a, a, **options)


class TestGaussianReference(unittest.TestCase):
    @parameterized.expand([("2d", (1, 2, 3)), ("3d", (2, 1, 2, 2))])
    def test_moments_of_the_draws_are_those_of_the_pixels(self, _, shape):
        pixels = int(np.prod(shape))
        images = (0.1 * features(40, pixels, 0)).reshape(40, *shape)
        reference = GaussianReference(torch.from_numpy(images))
        covariance = np.cov(images.reshape(40, -1), rowvar=False)
        np.testing.assert_allclose(reference.factor.T @ reference.factor, covariance, atol=1e-6)
        draws = reference.sample(50000, seed=1, clip=False)
        self.assertEqual((draws.shape, draws.dtype), ((50000, *shape), np.float32))
        flat = draws.reshape(50000, -1)
        np.testing.assert_allclose(flat.mean(0), images.reshape(40, -1).mean(0), atol=0.01)
        np.testing.assert_allclose(np.cov(flat, rowvar=False), covariance, atol=0.03 * covariance.max())

    def test_fewer_images_than_pixels_stays_in_their_span(self):
        images = features(4, 30, 0).reshape(4, 1, 5, 6)
        draws = GaussianReference(images).sample(20, clip=False).reshape(20, -1)
        centred = np.concatenate([draws, images.reshape(4, -1)]) - images.reshape(4, -1).mean(0)
        self.assertEqual(np.linalg.matrix_rank(centred, tol=1e-3), 3)

    def test_function_of_the_seed_within_the_range_of_images(self):
        reference = GaussianReference(2 * features(10, 16, 0).reshape(10, 1, 4, 4))
        draws = reference.sample(5, seed=3)
        np.testing.assert_array_equal(draws, reference.sample(5, seed=3))
        self.assertTrue((draws != reference.sample(5, seed=4)).any())
        self.assertLessEqual(np.abs(draws).max(), 1)

    def test_wrong_input(self):
        for bad in (np.zeros((1, 1, 4, 4)), np.zeros((5, 4)), np.full((5, 1, 4), np.inf)):
            with self.assertRaisesRegex(ValueError, "GaussianReference: at least two finite images"):
                GaussianReference(bad)


if __name__ == "__main__":
    unittest.main()
