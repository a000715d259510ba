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

import torch
from monai.data import MetaTensor
from monai.networks.nets import AutoencoderKL
from parameterized import parameterized

from monai_jointdiff.inferers import AutoencoderInferer, AutoencoderOutput


def small_autoencoder(spatial_dims: int = 2) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        spatial_dims,
        num_res_blocks=1,
        channels=(4, 8),
        attention_levels=(False, False),
        latent_channels=2,
        norm_num_groups=4,
        include_fc=False,
    )


class TestAutoencoderInferer(unittest.TestCase):
    @parameterized.expand([(2,), (3,)])
    def test_decodes_the_mean_in_evaluation_and_a_draw_in_training(self, spatial_dims: int) -> None:
        network = small_autoencoder(spatial_dims)
        images = torch.randn(2, 1, *[8] * spatial_dims)
        with torch.no_grad():
            found = AutoencoderInferer()(MetaTensor(images), network.eval())
            self.assertIsInstance(found, AutoencoderOutput)
            self.assertIs(type(found.reconstruction), torch.Tensor)
            torch.testing.assert_close(found.reconstruction, network.reconstruct(images))
            torch.manual_seed(5)
            drawn = AutoencoderInferer()(images, network.train())
            torch.manual_seed(5)
            mean, sigma = network.encode(images)
            expected = network.decode(mean + sigma * torch.randn_like(sigma))
        for ours, theirs in zip(drawn, (expected, mean, sigma), strict=True):
            torch.testing.assert_close(ours, theirs)
        self.assertFalse(torch.equal(found.reconstruction, drawn.reconstruction))

    def test_autocast_ends_at_the_inferer(self) -> None:
        network, images = small_autoencoder().eval(), torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            exact, rough = (AutoencoderInferer(kind)(images, network) for kind in (None, torch.bfloat16))
        self.assertEqual({part.dtype for part in rough}, {torch.float32})
        self.assertFalse(torch.equal(exact.reconstruction, rough.reconstruction))
        torch.testing.assert_close(rough.reconstruction, exact.reconstruction, rtol=0.1, atol=0.05)


if __name__ == "__main__":
    unittest.main()
