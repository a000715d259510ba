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


"""Numbered samples, and their distance to real images."""

from __future__ import annotations

import contextlib
import io
import json
import unittest
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from parameterized import parameterized

from monai_jointdiff.data import read_image
from monai_jointdiff.engines import (
    ModelDescription,
    SamplingInferer,
    compare_generation,
    draw_samples,
    guidance_to_generate,
    noise_of_draws,
    write_generation,
)
from monai_jointdiff.inferers import ClassifierGuidance, Guidance, JointDiffusionInferer, RepresentationGuidance
from monai_jointdiff.networks import JointDiffusionUNet
from monai_jointdiff.schedulers import make_scheduler
from tests.bundles.runs import temporary_folder
from tests.engines.small_run import small_network, use_one_thread


def setUpModule() -> None:
    use_one_thread()


class Pixels:
    """The pixels themselves as features."""

    def extract(self, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float64)


def model_of(network: JointDiffusionUNet) -> ModelDescription:
    return ModelDescription(network.config, {}, {"class_names": ["a", "b", "c"], "multi_label": False})


def sampling(name: str, seed: int = 0, steps: int = 3) -> SamplingInferer:
    scheduler = make_scheduler(name)
    return SamplingInferer(JointDiffusionInferer(scheduler), scheduler, steps, seed)


class TestNoise(unittest.TestCase):
    @parameterized.expand([((1, 4, 6),), ((2, 3, 4, 5),)])
    def test_of_a_draw_depends_on_its_number_and_the_seed_alone(self, shape: tuple[int, ...]) -> None:
        together = noise_of_draws([0, 1, 2, 3], shape, seed=5)
        self.assertEqual(together.shape, (4, *shape))
        torch.testing.assert_close(noise_of_draws([3, 1], shape, seed=5), together[[3, 1]], rtol=0, atol=0)
        self.assertFalse(torch.equal(noise_of_draws([3], shape, seed=6)[0], together[3]))

    def test_is_standard_normal(self) -> None:
        noise = noise_of_draws(range(200), (1, 16, 16), seed=0).flatten().double()
        self.assertLess(abs(float(noise.mean())), 4 / len(noise) ** 0.5)
        self.assertLess(abs(float(noise.var()) - 1), 4 * (2 / len(noise)) ** 0.5)


class TestSampling(unittest.TestCase):
    def setUp(self) -> None:
        self.network = small_network(dropout=0.0).eval()
        self.noise = noise_of_draws(range(4), (1, 8, 8), seed=0)

    @parameterized.expand([(False, 2), (True, [-1, 1, -1])])
    def test_of_a_class(self, multi_label: bool, condition: Any) -> None:
        config = {**self.network.config, "class_conditional": True, "multi_label": multi_label}
        network = JointDiffusionUNet(**config).eval()
        for parameter in network.parameters():  # MONAI's last layers start at 0
            if parameter.ndim > 1 and not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.3)
        scheduler = make_scheduler("ddim", 3)
        inferer = JointDiffusionInferer(scheduler)
        labels = torch.tensor([condition] * 4)
        expected = inferer.sample(self.noise, network, scheduler, class_labels=labels, guidance_scale=2.0).image
        found = SamplingInferer(inferer, scheduler, 3, class_labels=condition, guidance_scale=2.0)(self.noise, network)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        free = SamplingInferer(inferer, scheduler, 3)(self.noise, network)
        self.assertGreater(float((free - found).abs().max()), 1e-3)

    @parameterized.expand([("classifier", ClassifierGuidance, 3.0), ("representation", RepresentationGuidance, 100.0)])
    def test_led_by_the_head(self, rule: str, kind: type[Guidance], scale: float) -> None:
        network = JointDiffusionUNet(**{**self.network.config, "head": "mediffusion"}).eval()
        for parameter in network.parameters():  # MONAI's last layers start at 0
            if parameter.ndim > 1 and not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.3)
        scheduler = make_scheduler("ddim", 3)
        inferer = JointDiffusionInferer(scheduler)
        found = []
        for given, strength in ((None, scale), ("null", scale), (2 * scale, 2 * scale)):
            guidance = guidance_to_generate(model_of(network), rule, 2, given)
            expected = inferer.sample(self.noise, network, scheduler, guidance=kind(2, strength)).image
            found.append(SamplingInferer(inferer, scheduler, 3, guidance=guidance)(self.noise, network))
            torch.testing.assert_close(found[-1], expected, rtol=0, atol=0)
        free = SamplingInferer(inferer, scheduler, 3)(self.noise, network)
        for one, other in ((found[0], free), (found[0], found[2])):
            self.assertGreater(float((one - other).abs().max()), 1e-4)

    def test_class_condition_is_no_rule_of_the_head(self) -> None:
        self.assertIsNone(guidance_to_generate(model_of(self.network), "class_free", 2))

    @parameterized.expand(
        [
            (("nearest", 1, None), "--rule is 'nearest', it must be one of classifier, representation, class_free"),
            (("classifier", None, None), "--rule classifier leads to a class: --class_label is needed"),
            (("classifier", 1, 0), "--scale must be greater than 0, got 0"),
            (("class_free", 1, 2.0), "--rule class_free has --guidance_scale"),
        ]
    )
    def test_rules_that_lead_nowhere_are_refused(self, given: tuple[Any, ...], message: str) -> None:
        with self.assertRaisesRegex(ValueError, message):
            guidance_to_generate(model_of(self.network), *given)

    def test_head_that_learned_nothing_cannot_lead(self) -> None:
        denoiser = replace(model_of(self.network), task="denoise")
        with self.assertRaisesRegex(ValueError, "trained with --task denoise"):
            guidance_to_generate(denoiser, "classifier", 1)

    def test_is_what_the_inferer_samples(self) -> None:
        one = sampling("ddim")
        scheduler = make_scheduler("ddim", 3)
        expected = JointDiffusionInferer(scheduler).sample(self.noise, self.network, scheduler).image
        torch.testing.assert_close(one(self.noise, self.network), expected, rtol=0, atol=0)

    def test_ancestral_noise_repeats_with_the_seed_and_differs_between_batches(self) -> None:
        images = [sampling("ddpm", seed)(self.noise, self.network) for seed in (0, 0, 1)]
        torch.testing.assert_close(images[0], images[1], rtol=0, atol=0)
        self.assertFalse(torch.equal(images[0], images[2]))

        added: list[torch.Tensor] = []
        scheduler = make_scheduler("ddpm")
        step = scheduler.step

        def recorded(model_output, timestep, sample, generator=None):
            added.append(torch.randn(3, generator=generator))
            return step(model_output, timestep, sample, generator)

        scheduler.step = recorded
        one = SamplingInferer(JointDiffusionInferer(scheduler), scheduler, 2)
        one(self.noise[:2], self.network)
        one(self.noise[2:], self.network)
        self.assertFalse(torch.equal(added[0], added[2]))

    @parameterized.expand([(1,), (3,), (100,)])
    def test_samples_do_not_depend_on_the_batch_size(self, batch_size: int) -> None:
        device = torch.device("cpu")
        images = draw_samples(self.network, sampling("ddim"), (1, 8, 8), 4, batch_size, 0, device, progress=False)
        expected = sampling("ddim")(self.noise, self.network).clamp(-1, 1).numpy()
        self.assertEqual(images.dtype, np.float32)
        np.testing.assert_allclose(images, expected, atol=1e-3)  # rounding, enlarged by the division by alpha


class TestComparison(unittest.TestCase):
    def setUp(self) -> None:
        generator = np.random.default_rng(0)
        self.real = np.clip(generator.normal(size=(120, 1, 3, 3)) / 3, -1, 1).astype(np.float32)

    def test_rows(self) -> None:
        train, test = self.real[:80], self.real[80:]
        rows = compare_generation(test, train, test, Pixels(), seed=0)
        self.assertEqual([row.images.split()[0] for row in rows], ["samples", "draws", "real"])
        self.assertEqual([row.count for row in rows], [40] * 3)
        self.assertAlmostEqual(rows[0].frechet, 0.0, places=6)
        self.assertGreater(rows[1].frechet, 0.01)
        self.assertGreater(rows[2].frechet, 0.01)

    def test_frechet_distance_of_shifted_images_grows_by_the_square_of_the_shift(self) -> None:
        test = self.real[80:]
        samples, _, _ = compare_generation(test + 0.5, self.real[:80], test, Pixels())
        self.assertAlmostEqual(samples.frechet, 9 * 0.5**2, places=4)

    def test_all_sets_have_the_size_of_the_smallest(self) -> None:
        rows = compare_generation(self.real[:10], self.real[:80], self.real[80:], Pixels())
        self.assertEqual([row.count for row in rows], [10] * 3)

    def test_files(self) -> None:
        folder = temporary_folder(self)
        rows = compare_generation(self.real[:10], self.real[:80], self.real[80:], Pixels())
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            content = write_generation(rows, self.real[:10], self.real[80:], "pixels", folder)
        self.assertEqual(json.loads((folder / "generation.json").read_text()), content)
        self.assertEqual([row["frechet"] for row in content["rows"]], [row.frechet for row in rows])
        self.assertIn("distance to test images (pixels)", text.getvalue())
        self.assertGreater(read_image(folder / "real_and_generated.png").std(), 0)


if __name__ == "__main__":
    unittest.main()
