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
from monai.inferers import DiffusionInferer
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import Scheduler
from parameterized import parameterized

from monai_jointdiff.schedulers import make_scheduler

CASES = [(name, d) for name in ("ddpm", "ddim", "dpm_solver") for d in (2, 3)]


def tiny_unet(spatial_dims: int, context: bool = False) -> DiffusionModelUNet:
    torch.manual_seed(0)
    return DiffusionModelUNet(
        spatial_dims=spatial_dims,
        in_channels=1,
        out_channels=1,
        channels=(8, 8),
        num_res_blocks=(1, 1),
        attention_levels=(False, True),
        norm_num_groups=8,
        with_conditioning=context,
        cross_attention_dim=4 if context else None,
    ).eval()


def disturb(network: DiffusionModelUNet) -> DiffusionModelUNet:
    """MONAI initializes the output layer with 0; give it something to say."""
    torch.nn.init.normal_(network.out[-1].conv.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    return network


def noise(spatial_dims: int) -> torch.Tensor:
    return torch.randn((2, 1) + (8,) * spatial_dims, generator=torch.Generator().manual_seed(0))


class TestInMONAIsInferer(unittest.TestCase):
    """MONAI's DiffusionInferer drives every scheduler of ours as it is."""

    @parameterized.expand(CASES)
    def test_an_untrained_network_only_rescales(self, name, spatial_dims):
        """MONAI's UNet begins at prediction 0: deterministic chains then end at x / alpha of the first grid point."""
        scheduler = make_scheduler(name)
        self.assertIsInstance(scheduler, Scheduler)
        scheduler.set_timesteps(6)
        x, network = noise(spatial_dims), tiny_unet(spatial_dims)
        sample = DiffusionInferer(scheduler).sample(x, network, verbose=False)
        if name == "ddpm":
            self.assertTrue(bool(sample.isfinite().all()))
        else:
            torch.testing.assert_close(sample, x / scheduler.level(999).alpha, rtol=1e-4, atol=1e-3)

    @parameterized.expand(CASES)
    def test_equals_the_loop_written_out(self, name, spatial_dims):
        scheduler = make_scheduler(name, prediction_type="v_prediction", clip_sample=True)
        scheduler.set_timesteps(6)
        network, inferer = disturb(tiny_unet(spatial_dims)), DiffusionInferer(scheduler)
        torch.manual_seed(1)
        sample, between = inferer.sample(
            noise(spatial_dims), network, verbose=False, save_intermediates=True, intermediate_steps=1
        )
        torch.manual_seed(1)
        x = noise(spatial_dims)
        with torch.no_grad():
            for t in scheduler.timesteps.tolist():
                x, _ = scheduler.step(network(x, torch.tensor([float(t)])), t, x)
        self.assertTrue(torch.equal(sample, x))
        self.assertEqual(len(between), 6)

    @parameterized.expand([(d,) for d in (2, 3)])
    def test_sampling_twice_gives_the_same(self, spatial_dims):
        """The inferer never calls set_timesteps between chains, so a multistep solver must begin anew by itself."""
        scheduler = make_scheduler("dpm_solver")
        scheduler.set_timesteps(6)
        network, inferer = disturb(tiny_unet(spatial_dims)), DiffusionInferer(scheduler)
        first, second = (inferer.sample(noise(spatial_dims), network, verbose=False) for _ in range(2))
        self.assertTrue(torch.equal(first, second))

    def test_conditioning_and_guidance(self):
        """With conditions all alike, guidance of any strength changes nothing."""
        scheduler = make_scheduler("dpm_solver")
        scheduler.set_timesteps(4)
        network, inferer = disturb(tiny_unet(2, context=True)), DiffusionInferer(scheduler)
        condition = torch.full((2, 1, 4), -1.0)
        plain = inferer.sample(noise(2), network, conditioning=condition, verbose=False)
        guided = inferer.sample(noise(2), network, conditioning=condition, cfg=3.0, verbose=False)
        torch.testing.assert_close(guided, plain, rtol=1e-3, atol=1e-3)

    def test_training_call(self):
        scheduler = make_scheduler("ddim")
        network = disturb(tiny_unet(2))
        timesteps = torch.tensor([5, 900])
        with torch.no_grad():
            out = DiffusionInferer(scheduler)(noise(2), network, noise(2) + 1, timesteps)
            expected = network(scheduler.add_noise(noise(2), noise(2) + 1, timesteps), timesteps)
        self.assertTrue(torch.equal(out, expected))

    @parameterized.expand([("ddpm",), ("ddim",), ("dpm_solver",)])
    def test_meta_tensors_keep_their_affine(self, name):
        scheduler = make_scheduler(name)
        scheduler.set_timesteps(3)
        affine = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0], dtype=torch.float64))
        sample = DiffusionInferer(scheduler).sample(MetaTensor(noise(2), affine=affine), tiny_unet(2), verbose=False)
        self.assertIsInstance(sample, MetaTensor)
        self.assertTrue(torch.equal(sample.affine, affine))


if __name__ == "__main__":
    unittest.main()
