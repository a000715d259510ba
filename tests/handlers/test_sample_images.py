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

import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from ignite.engine import Engine
from monai.utils import optional_import
from parameterized import parameterized
from torch import nn

from monai_jointdiff.handlers import FixedNoiseSampler, SampleImages
from monai_jointdiff.inferers import JointDiffusionInferer
from monai_jointdiff.schedulers import make_scheduler
from tests.engines.small_run import small_network, use_one_thread
from tests.inferers.autoencoders import HalvingAutoencoder

SummaryWriter, _ = optional_import("torch.utils.tensorboard", name="SummaryWriter")
Image, has_pil = optional_import("PIL.Image")
event_accumulator, has_tensorboard = optional_import("tensorboard.backend.event_processing.event_accumulator")


def setUpModule() -> None:
    use_one_thread()


def ramp(*shape: int) -> torch.Tensor:
    """Each image has one gray value, from -1 for the first to 1 for the last."""
    values = torch.linspace(-1, 1, int(np.prod(shape)))
    return values.reshape(*shape, 1, 1, 1).expand(*shape, 1, 8, 8)


class TestPicture(unittest.TestCase):
    def setUp(self):
        self.handler = SampleImages(lambda network: {}, nn.Identity(), "unused")
        self.volumes = SampleImages(lambda network: {}, nn.Identity(), "unused", spatial_dims=3)

    def means(self, picture: np.ndarray, rows: int, columns: int) -> list[int]:
        """Gray value at the middle of each tile, in reading order."""
        height, width = picture.shape[:2]
        gray = picture if picture.ndim == 2 else picture[..., 0]
        return [
            int(gray[int((r + 0.5) * height / rows), int((c + 0.5) * width / columns)])
            for r in range(rows)
            for c in range(columns)
        ]

    def test_grid(self):
        picture = self.handler.picture(ramp(4))
        self.assertEqual(picture.dtype, np.uint8)
        np.testing.assert_allclose(self.means(picture, 2, 2), [0, 85, 170, 255], atol=1)

    def test_strip(self):
        picture = self.handler.picture(ramp(2, 3).numpy())
        self.assertGreater(picture.shape[1], picture.shape[0])
        np.testing.assert_allclose(self.means(picture, 2, 3), [0, 51, 102, 153, 204, 255], atol=1)

    def test_middle_slice_of_volumes(self):
        volumes = ramp(4)[:, :, None].repeat(1, 1, 3, 1, 1)
        volumes[:, :, [0, 2]] = 0.0
        np.testing.assert_array_equal(self.volumes.picture(volumes), self.handler.picture(ramp(4)))

    def test_wrong_input(self):
        with self.assertRaisesRegex(ValueError, "2 spatial axes, got shape"):
            self.handler.picture(torch.zeros(8, 8))
        with self.assertRaisesRegex(ValueError, "spatial_dims must be 2 or 3, got 1"):
            SampleImages(lambda network: {}, nn.Identity(), "unused", spatial_dims=1)
        with self.assertRaisesRegex(ValueError, "interval must be >= 1 epoch, got 0"):
            SampleImages(lambda network: {}, nn.Identity(), "unused", interval=0)


@unittest.skipUnless(has_pil, "needs pillow")
class TestSampleImages(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def run_epochs(self, epochs: int, **options) -> list[str]:
        network = nn.Dropout().train()
        modes: list[bool] = []

        def sampler(given: nn.Module) -> dict[str, torch.Tensor]:
            modes.append(given.training)
            return {"samples": ramp(4), "denoising": ramp(2, 3)}

        engine = Engine(lambda engine, batch: None)
        SampleImages(sampler, network, self.folder / "images", **options).attach(engine)
        engine.run([0], max_epochs=epochs)
        self.assertTrue(network.training)
        self.assertFalse(any(modes))
        return sorted(path.name for path in (self.folder / "images").glob("*"))

    def test_files(self):
        names = [f"{name}_epoch{epoch:04d}.png" for name in ("denoising", "samples") for epoch in (2, 4)]
        self.assertEqual(self.run_epochs(5, interval=2), names)
        handler = SampleImages(lambda network: {}, nn.Identity(), "unused")
        with Image.open(self.folder / "images" / names[2]) as image:
            np.testing.assert_array_equal(np.asarray(image), handler.picture(ramp(4)))

    @unittest.skipUnless(has_tensorboard, "needs tensorboard")
    def test_tensorboard(self):
        with SummaryWriter(str(self.folder / "logs")) as writer:
            self.run_epochs(2, summary_writer=writer)
        events = event_accumulator.EventAccumulator(str(self.folder / "logs"))
        events.Reload()
        self.assertEqual(sorted(events.Tags()["images"]), ["denoising", "samples"])
        self.assertEqual([event.step for event in events.Images("samples")], [1, 2])

    def test_only_rank_0(self):
        with mock.patch("monai_jointdiff.handlers.sample_images.is_writing_process", return_value=False):
            self.assertEqual(self.run_epochs(2), [])


class TestFixedNoiseSampler(unittest.TestCase):
    @parameterized.expand([(2, "ddim"), (3, "ddpm")])
    def test_same_noise_every_time(self, spatial_dims, name):
        scheduler = make_scheduler(name)
        scheduler.set_timesteps(5)
        inferer = JointDiffusionInferer(scheduler)
        network = small_network(spatial_dims=spatial_dims).eval()
        shape = (1, *[8] * spatial_dims)
        sampler = FixedNoiseSampler(inferer, scheduler, shape, num_samples=3, num_frames=4, seed=2)
        first, again = sampler(network), sampler(network)
        self.assertEqual(first["samples"].shape, (3, *shape))
        self.assertEqual(first["denoising"].shape, (2, 4, *shape))
        for key in first:
            torch.testing.assert_close(first[key], again[key], rtol=0, atol=0)
        generator = torch.Generator().manual_seed(2)
        noise = torch.randn(3, *shape, generator=generator)
        expected = inferer.sample(noise, network, scheduler, generator=generator).image
        torch.testing.assert_close(first["samples"], expected)
        # the strip ends where the chain of the first image ends, and there the last estimate is the image
        torch.testing.assert_close(first["denoising"][0, -1], expected[0])
        torch.testing.assert_close(first["denoising"][1, -1], expected[0])

    def test_of_latents_the_images_are_shown(self):
        scheduler = make_scheduler("ddim")
        scheduler.set_timesteps(3)
        inferer = JointDiffusionInferer(scheduler, autoencoder=HalvingAutoencoder(), scale_factor=0.5)
        found = FixedNoiseSampler(inferer, scheduler, (1, 8, 8), 2, 3)(small_network().eval())
        self.assertEqual(found["samples"].shape, (2, 1, 16, 16))
        self.assertEqual(found["denoising"].shape, (2, 3, 1, 16, 16))
        for row in found["denoising"]:
            torch.testing.assert_close(row[-1], found["samples"][0])

    def test_wrong_input(self):
        for options in ({"num_samples": 0}, {"num_frames": 0}):
            with self.assertRaisesRegex(ValueError, "must be at least 1"):
                FixedNoiseSampler(mock.Mock(), mock.Mock(), (1, 8, 8), **options)


if __name__ == "__main__":
    unittest.main()
