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

"""Batches for a training on latents: encoded images, noise of their shape, targets in their space."""

from __future__ import annotations

import unittest
from typing import Any

import torch
from parameterized import parameterized
from torch import Tensor

from monai_jointdiff.engines import JointPrepareBatch, SemiSupervisedPrepareBatch, ValidationPrepareBatch
from monai_jointdiff.schedulers import make_scheduler
from tests.engines.small_run import small_network, use_one_thread
from tests.inferers.autoencoders import HalvingAutoencoder, IdentityAutoencoder

VIEWS = ("image_cls", "image_strong")


def setUpModule() -> None:
    use_one_thread()


def batch(spatial_dims: int = 2, factor: int = 1) -> dict[str, Any]:
    """The same images at one or several times their size."""
    generator = torch.Generator().manual_seed(0)
    size = (3, 1, *[8] * spatial_dims)
    drawn = {key: torch.rand(size, generator=generator) * 2 - 1 for key in ("image", *VIEWS)}
    if factor > 1:
        drawn = {
            key: torch.nn.functional.interpolate(image, scale_factor=float(factor)) for key, image in drawn.items()
        }
    return {**drawn, "label": torch.tensor([1, -1, 0]), "draw": torch.arange(3), "name": ["a", "b", "c"]}


def parts(prepared: Any) -> dict[str, Tensor]:
    return {"inputs": prepared.inputs, **prepared.targets, **prepared.kwargs}


def assert_equal(one: Any, two: Any) -> None:
    torch.testing.assert_close(parts(one), parts(two), rtol=0, atol=0)


class TestLatents(unittest.TestCase):
    def setUp(self) -> None:
        self.scheduler = make_scheduler("ddim", prediction_type="v_prediction")

    @parameterized.expand(
        [
            (kind, task, dims)
            for kind in (JointPrepareBatch, ValidationPrepareBatch)
            for task in ("joint", "denoise", "classify")
            for dims in (2, 3)
        ]
    )
    def test_are_what_the_network_would_be_shown(self, kind: Any, task: str, spatial_dims: int) -> None:
        """Latents of the large images are the small ones, exactly: gain and scale factor are powers of two."""
        options = {"autoencoder": HalvingAutoencoder(2.0), "scale_factor": 0.5}
        ours = kind(self.scheduler, 0, task=task, **options)(batch(spatial_dims, factor=2), "cpu")
        theirs = kind(self.scheduler, 0, task=task)(batch(spatial_dims), "cpu")
        assert_equal(ours, theirs)
        self.assertFalse(any(tensor.requires_grad for tensor in parts(ours).values()))

    def test_identity_is_pixel_space(self) -> None:
        ours = JointPrepareBatch(self.scheduler, 0, autoencoder=IdentityAutoencoder())(batch(), "cpu")
        assert_equal(ours, JointPrepareBatch(self.scheduler, 0)(batch(), "cpu"))

    @parameterized.expand([(teacher, noisy) for teacher in (False, True) for noisy in ("all", "unlabelled")])
    def test_of_the_views_of_unlabelled_images(self, teacher: bool, noisy: str) -> None:
        options: dict[str, Any] = {"views": VIEWS, "noisy": noisy}
        if teacher:
            options["teacher"] = small_network().eval()
        space = {"autoencoder": HalvingAutoencoder(2.0), "scale_factor": 0.5}
        ours = SemiSupervisedPrepareBatch(self.scheduler, 0, **options, **space)(batch(factor=2), "cpu")
        theirs = SemiSupervisedPrepareBatch(self.scheduler, 0, **options)(batch(), "cpu")
        assert_equal(ours, theirs)
        self.assertEqual("teacher_logits" in ours.targets, teacher)


if __name__ == "__main__":
    unittest.main()
