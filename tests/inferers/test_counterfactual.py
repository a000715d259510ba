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
import math
import unittest
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from parameterized import parameterized
from torch import nn

from monai_jointdiff.inferers import (
    ClassifierGuidance,
    CounterfactualInferer,
    CounterfactualQuestion,
    CounterfactualRecord,
    JointDiffusionInferer,
)
from monai_jointdiff.inferers.counterfactual import _SmallestScale, most_changed
from monai_jointdiff.networks import JointDiffusionUNet
from monai_jointdiff.schedulers import AncestralScheduler, DDIMGridScheduler
from tests.inferers.autoencoders import HalvingAutoencoder
from tests.inferers.utils import tiny_unet

STD = 0.5


class TwoGaussians(nn.Module):
    """Images of class c are N(mean_c, STD^2), of the null class N(0, STD^2); every answer in closed form.

    With class conditioning of scale 1, the probability flow keeps the standardized image: an image x that was encoded
    under the null class comes back as x + mean_c.
    """

    num_classes, class_conditional, multi_label = 2, True, False

    def __init__(self, scheduler: DDIMGridScheduler, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scheduler = scheduler
        pattern = torch.zeros(shape, dtype=torch.float64)
        pattern[:, : shape[1] // 2] = 0.4
        self.means = torch.stack([-pattern, pattern, torch.zeros_like(pattern)])
        self.scaling = nn.Parameter(torch.ones(()))  # something that could get a gradient

    def forward(self, x: torch.Tensor, timesteps: Any = None, class_labels: Any = None) -> torch.Tensor:
        if timesteps is None:  # log densities of the classes
            return -torch.stack([(x - m).square().flatten(1).sum(1) for m in self.means[:2]], dim=1) / (2 * STD**2)
        labels = torch.full((len(x),), 2) if class_labels is None else class_labels
        mean = self.means[labels].to(x)
        alpha, sigma = self.scheduler.alpha_sigma(timesteps, x)
        epsilon = sigma * (x - alpha * mean) / (alpha**2 * STD**2 + sigma**2)
        return self.scheduler.model_output_from_epsilon(epsilon, timesteps, x) * self.scaling


def toy(shape: tuple[int, ...], number: int = 3) -> tuple[DDIMGridScheduler, TwoGaussians, torch.Tensor]:
    """Scheduler, network, and images of class 0."""
    scheduler = DDIMGridScheduler(prediction_type="v_prediction")
    network = TwoGaussians(scheduler, shape)
    noise = torch.randn(number, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return scheduler, network, network.means[0] + 0.1 * noise


class TestClosedForm(unittest.TestCase):
    @parameterized.expand([("2d", (1, 8, 6)), ("3d", (2, 4, 6, 5))])
    def test_class_free_counterfactual_is_the_image_moved_by_the_mean(self, _: str, shape: tuple[int, ...]) -> None:
        scheduler, network, images = toy(shape)
        inferer = CounterfactualInferer(
            scheduler, rule="class_free", timestep=900, num_inference_steps=300, scale=1.0, probability=None
        )
        result = inferer(images, network, target=1)
        torch.testing.assert_close(result.reconstruction, images, atol=1e-3, rtol=0)
        torch.testing.assert_close(result.counterfactual, images + network.means[1], atol=2e-2, rtol=0)
        torch.testing.assert_close(result.difference, result.counterfactual - result.reconstruction)
        expected = network(result.counterfactual).softmax(1)
        torch.testing.assert_close(result.probabilities_counterfactual, expected)
        torch.testing.assert_close(result.probabilities, network(images).softmax(1))

    def test_more_iterations_of_the_inversion_come_closer_to_the_image(self) -> None:
        scheduler, network, images = toy((1, 8, 6))
        errors, calls = [], []
        for iterations in (1, 2, 5):
            inferer = CounterfactualInferer(
                scheduler,
                timestep=300,
                num_inference_steps=10,
                inversion_iterations=iterations,
                scale=1.0,
                probability=None,
            )
            result = inferer(images, network)
            errors.append(float((result.reconstruction - images).abs().max()))
            calls.append(result.network_calls)
        self.assertGreater(errors[0], 5 * errors[1])
        self.assertGreater(errors[1], 5 * errors[2])
        # classify 3 times, encode, come back unguided; guided steps classify x0_hat, too
        self.assertEqual(calls[1], 3 + 2 * 10 + 10 + 2 * 10)

    @parameterized.expand([("reaches", 0.8, True), ("does not", 0.99, False)])
    def test_an_image_that_has_the_answer_stays_as_it_is(self, _: str, probability: float, stays: bool) -> None:
        scheduler, network, images = toy((1, 4, 4))
        images[1] = 0.3 * network.means[1]  # probability of the target: .956
        options = {"timestep": 500, "num_inference_steps": 8, "max_trials": 3, "probability": probability}
        result = CounterfactualInferer(scheduler, **options)(images, network, target=1)
        self.assertEqual(result.already.tolist(), [False, True, False])
        self.assertEqual([scale == 0 for scale in result.record.scale], [False, stays, False])
        self.assertEqual(torch.equal(result.counterfactual[1], result.reconstruction[1]), stays)
        self.assertIn("already gives this answer", " ".join(result.cautions(1)))
        self.assertEqual(result.cautions(0), [])
        again = CounterfactualInferer(scheduler).replay(images, network, result.record)
        self.assertTrue(torch.equal(again.counterfactual, result.counterfactual))
        alone = CounterfactualInferer(scheduler, **options)(images[1:2], network, target=1)
        # classified three times, encoded, and back once; each trial and the end: two evaluations a step
        self.assertEqual(alone.network_calls, 3 + 2 * 8 + 8 + (0 if stays else 3 * (2 * 8 + 1) + 2 * 8))

    def test_region_is_empty_where_nothing_has_to_change(self) -> None:
        scheduler, network, images = toy((1, 4, 4))
        images[1] = network.means[1] * 1.5
        options = {"timestep": 500, "num_inference_steps": 8, "region_fraction": 0.5, "probability": 0.8}
        result = CounterfactualInferer(scheduler, **options)(images, network, target=1)
        assert result.region is not None
        self.assertEqual(result.region.flatten(1).any(1).tolist(), [True, False, True])

    def test_an_answer_that_encoding_gives_is_no_change(self) -> None:
        scheduler, network, images = toy((1, 4, 4), number=1)
        inferer = CounterfactualInferer(
            scheduler, encoding="noise", timestep=990, num_inference_steps=8, probability=0.5, max_trials=2
        )
        result = inferer(0.01 * images.expand(16, -1, -1, -1), network, target=1)
        reached = result.probabilities_reconstruction[:, 1] >= 0.5  # some of the noise leads there
        self.assertTrue(0 < int(reached.sum()) < 16)
        self.assertEqual([scale == 0 for scale in result.record.scale], reached.tolist())
        self.assertFalse(bool(result.already.any()))
        self.assertEqual(float(result.difference[reached].abs().max()), 0.0)
        self.assertIsNone(result.inversion)
        for n in range(16):
            self.assertEqual("no change was searched for" in " ".join(result.cautions(n)), bool(reached[n]))

    def test_where_no_strength_came_closer_nothing_was_reached(self) -> None:
        scheduler, network, images = toy((1, 4, 4), number=2)
        inferer = CounterfactualInferer(
            scheduler, rule="class_free", timestep=500, num_inference_steps=8, probability=0.6, max_trials=2
        )
        result = inferer(images, network, target=1)
        unmoved = replace(
            result,
            record=replace(result.record, scale=(0.0, 0.0)),
            reached=torch.tensor([False, True]),
            already=torch.tensor([False, False]),
        )
        self.assertRegex(" ".join(unmoved.cautions(0)), "^No strength that was tried came closer")
        self.assertRegex(" ".join(unmoved.cautions(1)), "^The factual reconstruction has the requested probability")

    def test_what_is_judged_is_cut_to_the_range(self) -> None:
        scheduler, network, images = toy((1, 8, 6))
        inferer = CounterfactualInferer(
            scheduler, rule="class_free", timestep=900, num_inference_steps=30, scale=6.0, probability=None
        )
        result = inferer(images, network, target=1)  # moved by about 2.4
        self.assertEqual(float(result.counterfactual.max()), 1.0)
        self.assertLessEqual(float(result.counterfactual.abs().max()), 1.0)
        torch.testing.assert_close(result.probabilities_counterfactual, network(result.counterfactual).softmax(1))
        moved = (images + 6 * network.means[1]).flatten(1).amax(1)
        torch.testing.assert_close(result.overshoot, moved - 1, atol=0.2, rtol=0)
        self.assertIn(f"by {float(result.overshoot[0]):.1f}", " ".join(result.cautions(0)))

    def test_inversion_is_told(self) -> None:
        scheduler, network, images = toy((1, 8, 6))
        options = {"num_inference_steps": 10, "scale": 1.0, "probability": None}
        for iterations, converged in ((2, False), (30, True)):
            result = CounterfactualInferer(scheduler, inversion_iterations=iterations, **options)(images, network)
            assert result.inversion is not None
            self.assertEqual(result.inversion.converged, converged)
            self.assertEqual(result.inversion.iterations.shape, (3, 10))
            self.assertEqual(result.network_calls, 3 + result.inversion.network_calls + 10 + 2 * 10)

    @parameterized.expand([("classifier",), ("class_free",)])
    def test_search_finds_the_smallest_strength_of_each_image(self, rule: str) -> None:
        scheduler, network, images = toy((1, 4, 4), number=4)
        images = images * torch.tensor([0.2, 0.6, 1.0, 1.4]).reshape(4, 1, 1, 1)  # the farther, the stronger
        options = {"rule": rule, "timestep": 600, "num_inference_steps": 12}
        inferer = CounterfactualInferer(scheduler, **options, probability=0.8, precision=1.1, max_trials=20)
        result = inferer(images, network, target=1)
        scale = torch.tensor(result.record.scale)
        self.assertTrue(bool(result.reached.all()))
        self.assertTrue(bool((scale.diff() > 0).all()), scale)
        for factor, reaches in ((1.0, True), (1 / 1.1001, False)):
            for image, strength in zip(images, scale, strict=True):
                single = CounterfactualInferer(scheduler, **options, scale=float(strength) * factor, probability=None)
                after = single(image[None], network, target=1).probabilities_counterfactual[0, 1]
                self.assertEqual(bool(after >= 0.8 - 1e-9), reaches)

    def test_an_answer_out_of_reach_is_said_to_be(self) -> None:
        scheduler, network, images = toy((1, 4, 4))
        inferer = CounterfactualInferer(
            scheduler, timestep=100, num_inference_steps=4, scale=1e-6, probability=0.99, max_trials=2
        )
        result = inferer(images, network, target=1)
        self.assertFalse(bool(result.reached.any()))
        self.assertEqual(result.record.scale, (3e-6,) * 3)  # the one that came closest: the larger of the two


class TestSearch(unittest.TestCase):
    """Of strengths whose probabilities are known curves."""

    @staticmethod
    def search(*curves: Callable[[float], float], max_trials: int = 8) -> tuple[list[float], list[float]]:
        """Strengths, and all that were tried for the first curve."""
        factual = torch.tensor([curve(0.0) for curve in curves], dtype=torch.float64)
        found, tried = _SmallestScale(factual, 0.9, 3.0, 1.5), []
        for _ in range(max_trials):
            active = found.active
            if not bool(active.any()):
                break
            tried += [float(found.scale[0])] * bool(active[0])
            answers = [curve(float(s)) for curve, s, on in zip(curves, found.scale, active, strict=True) if on]
            found.tell(torch.tensor(answers, dtype=torch.float64))
        return found.best.tolist(), tried

    def test_rising_probabilities_each_for_itself(self) -> None:
        (low, high, done), tried = self.search(lambda s: s / (s + 4), lambda s: s / (s + 0.01), lambda s: 0.95)
        self.assertTrue(36 <= low <= 36 * 1.5 and 0.09 <= high <= 0.09 * 1.5, (low, high))
        self.assertEqual(done, 0.0)
        self.assertEqual(tried[:4], [3.0, 9.0, 27.0, 81.0])

    def test_a_pause_does_not_end_the_growth(self) -> None:
        (found,), _ = self.search(lambda s: 0.95 if s > 20 else 0.3 if s > 5 else 0.1 + s / 10)
        self.assertTrue(20 < found <= 30, found)

    def test_smaller_ones_where_larger_ones_lead_away(self) -> None:
        (found,), tried = self.search(lambda s: 0.1 if s == 0 else 0.98 if 0.2 <= s <= 1.5 else 0.05)
        self.assertTrue(0.2 <= found <= 0.2 * 1.5, (found, tried))
        self.assertEqual(tried[:3], [3.0, 9.0, 1.0])

    def test_nothing_is_done_where_nothing_helps(self) -> None:
        found, tried = self.search(lambda s: 0.6 if s == 0 else 0.3, lambda s: 0.6 if s == 0 else 0.7 - abs(s - 9) / 50)
        self.assertEqual(found, [0.0, 9.0])
        np.testing.assert_allclose(tried, [3 / 3**n for n in (0, -1, 1, 2, 3, 4, 5, 6)])


class TestChains(unittest.TestCase):
    def setUp(self) -> None:
        self.scheduler = DDIMGridScheduler()
        self.images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def test_equals_guided_sampling_from_the_noisy_image(self) -> None:
        network = tiny_unet()
        inferer = CounterfactualInferer(
            self.scheduler, encoding="noise", timestep=40, num_inference_steps=5, scale=30.0, probability=None
        )
        images = 0.5 * self.images
        result = inferer(images, network, target=2, seed=11)
        noise = [torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(11 + n)) for n in range(3)]
        start = self.scheduler.add_noise(images, torch.stack(noise), torch.tensor([40]))
        self.scheduler.set_grid([40, 30, 20, 10, 0])
        sampler = JointDiffusionInferer(self.scheduler)
        torch.testing.assert_close(result.reconstruction, sampler.sample(start, network).image.clamp(-1, 1))
        guided = sampler.sample(start, network, guidance=ClassifierGuidance(2, 30.0)).image
        torch.testing.assert_close(result.counterfactual, guided.clamp(-1, 1))
        self.assertGreater(float((guided.abs() < 1).double().mean()), 0.8)

    @parameterized.expand([("classifier", 2), ("representation", 2), ("class_free", 2), ("classifier", 40)])
    def test_images_do_not_feel_each_other(self, rule: str, iterations: int) -> None:
        network, images = tiny_unet().double(), self.images.double()
        images[1] *= 0.01  # its inversion takes another number of iterations
        inferer = CounterfactualInferer(
            self.scheduler,
            rule=rule,
            timestep=200,
            num_inference_steps=3,
            inversion_iterations=iterations,
            probability=0.6,
            max_trials=3,
        )
        together = inferer(images, network, target=torch.tensor([0, 1, 2]))
        for n in range(3):
            alone = inferer(images[n : n + 1], network, target=n, seed=n)
            torch.testing.assert_close(alone.counterfactual[0], together.counterfactual[n], rtol=1e-9, atol=1e-9)
            self.assertAlmostEqual(alone.record.scale[0], together.record.scale[n])
            assert alone.inversion is not None and together.inversion is not None
            self.assertEqual(alone.inversion.iterations[0].tolist(), together.inversion.iterations[n].tolist())
        if iterations == 40:
            self.assertGreater(len(set(together.inversion.iterations.sum(1).tolist())), 1)

    @parameterized.expand(
        [
            (rule, probability, fraction)
            for rule in ("classifier", "representation", "class_free")
            for probability, fraction in ((None, None), (0.6, None), (0.6, 0.3))
        ]
    )
    def test_calls_are_those_of_the_encoder(self, rule: str, probability: float | None, fraction: float | None) -> None:
        network, seen = tiny_unet(), []
        network.middle_block.register_forward_hook(lambda module, args, output: seen.append(len(output)))
        inferer = CounterfactualInferer(
            self.scheduler,
            rule=rule,
            timestep=200,
            num_inference_steps=3,
            probability=probability,
            max_trials=2,
            region_fraction=fraction,
        )
        result = inferer(self.images, network, target=torch.tensor([0, 1, 2]))
        self.assertAlmostEqual(result.network_calls, sum(seen) / 3)

    @parameterized.expand(
        [
            (rule, multi_label, fraction)
            for rule in ("classifier", "representation", "class_free")
            for multi_label, fraction in ((False, None), (False, 0.3), (True, None))
        ]
    )
    def test_every_answer_is_that_of_its_own_call(self, rule: str, multi_label: bool, fraction: float | None) -> None:
        network, seen = tiny_unet(multi_label=multi_label), []
        network.middle_block.register_forward_hook(lambda module, args, output: seen.append(len(output)))
        options: dict[str, Any] = {"timestep": 200, "num_inference_steps": 3, "probability": 0.6, "max_trials": 2}
        inferer = CounterfactualInferer(self.scheduler, rule=rule, region_fraction=fraction, **options)
        found = inferer.every_answer(self.images, network, None)
        spent = sum(seen)
        self.assertEqual(len(found), 3 if multi_label else 2)
        self.assertAlmostEqual(sum(result.network_calls for result in found), spent / 3)
        seen.clear()
        for result in found:
            alone = inferer(self.images, network, result.record.target, result.record.enforce)
            self.assertEqual(alone.record.scale, result.record.scale)
            self.assertTrue(torch.equal(alone.counterfactual, result.counterfactual))
            self.assertTrue(torch.equal(alone.probabilities_counterfactual, result.probabilities_counterfactual))
            self.assertGreater(result.seconds, 0)
        # classified, encoded by two calls a step, back, and classified again: once for all
        self.assertEqual(sum(seen) - spent, 3 * (len(found) - 1) * (1 + 2 * 3 + 3 + 1))

    @parameterized.expand([("linear",), ("mediffusion",), ("jointdiffusion",), ("standardized",)])
    def test_representation_rule_wants_a_head_that_averages(self, head: str) -> None:
        inferer = CounterfactualInferer(
            self.scheduler, rule="representation", timestep=50, num_inference_steps=2, probability=None
        )
        if head == "standardized":
            with self.assertRaisesRegex(ValueError, "'standardized'.*head='mediffusion'.*train.json"):
                inferer(self.images, tiny_unet(head=head))
        else:
            self.assertEqual(len(inferer(self.images, tiny_unet(head=head)).counterfactual), 3)

    @parameterized.expand([("2d", 2), ("3d", 3)])
    def test_only_the_region_changes(self, _: str, spatial_dims: int) -> None:
        network = tiny_unet(spatial_dims)
        images = torch.rand(2, 1, *[8] * spatial_dims, generator=torch.Generator().manual_seed(0)) * 2 - 1
        inferer = CounterfactualInferer(
            self.scheduler, timestep=300, num_inference_steps=4, scale=20.0, probability=None, region_fraction=0.25
        )
        result = inferer(images, network, target=1)
        assert result.region is not None
        share = result.region.double().flatten(1).mean(1)
        self.assertTrue(bool((share >= 0.25).all() and (share < 0.3).all()), share)
        self.assertEqual(float(result.difference[~result.region].abs().max()), 0.0)
        self.assertGreater(float(result.difference[result.region].abs().mean()), 0.0)

    @parameterized.expand([("inversion", None, 0.5), ("noise", 0.3, 0.5), ("noise", None, None)])
    def test_replay_is_equal_bit_for_bit(
        self, encoding: str, fraction: float | None, probability: float | None
    ) -> None:
        network = tiny_unet()
        inferer = CounterfactualInferer(
            self.scheduler,
            encoding=encoding,
            timestep=250,
            num_inference_steps=4,
            probability=probability,
            max_trials=3,
            region_fraction=fraction,
        )
        result = inferer(self.images, network, seed=5)
        records = json.loads(json.dumps([result.record.of_image(n) for n in range(3)]))
        record = CounterfactualRecord.of_images(records, result.record.region)
        again = CounterfactualInferer(self.scheduler).replay(self.images, network, record)
        for name in ("counterfactual", "reconstruction", "difference", "probabilities_counterfactual", "reached"):
            self.assertTrue(torch.equal(getattr(result, name), getattr(again, name)), name)
        self.assertEqual([again.record.of_image(n) for n in range(3)], records)

    @parameterized.expand(
        [
            ("class_free", 2, {"rule": "class_free"}, {}, None),
            ("class_free, labels", 2, {"rule": "class_free"}, {"multi_label": True}, 1),
            ("representation", 2, {"rule": "representation", "region_fraction": 0.3}, {"head": "mediffusion"}, None),
            ("classifier in 3d", 3, {"region_fraction": 0.3}, {}, None),
            ("class_free in 3d", 3, {"rule": "class_free", "encoding": "noise"}, {}, None),
            (
                "latents",
                2,
                {"autoencoder": HalvingAutoencoder(), "scale_factor": 0.7, "region_fraction": 0.3},
                {},
                None,
            ),
        ]
    )
    def test_replay_by_every_rule_and_in_every_space(
        self, _: str, spatial_dims: int, options: dict[str, Any], of_network: dict[str, Any], target: int | None
    ) -> None:
        network = tiny_unet(spatial_dims, **of_network)
        size = (16, 16) if "autoencoder" in options else (8,) * spatial_dims
        x = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
        space = {name: options[name] for name in ("autoencoder", "scale_factor") if name in options}
        settings = {"timestep": 250, "num_inference_steps": 3, "probability": None, "scale": 2.0, **options}
        result = CounterfactualInferer(self.scheduler, **settings)(x, network, target=target, seed=5)
        self.assertGreater(float(result.difference.abs().max()), 0)
        records = json.loads(json.dumps([result.record.of_image(n) for n in range(2)]))
        record = CounterfactualRecord.of_images(records, result.record.region)
        again = CounterfactualInferer(self.scheduler, **space).replay(x, network, record)
        for name in ("counterfactual", "reconstruction", "difference", "probabilities_counterfactual", "reached"):
            self.assertTrue(torch.equal(getattr(result, name), getattr(again, name)), name)

    def test_replay_of_one_image_and_in_the_precision_of_the_record(self) -> None:
        network = tiny_unet()
        options = {"timestep": 250, "num_inference_steps": 4, "probability": 0.5, "max_trials": 3}
        inferer = CounterfactualInferer(self.scheduler, autocast_dtype=torch.bfloat16, **options)
        result = inferer(self.images, network)
        self.assertEqual(result.record.autocast_dtype, "bfloat16")
        plain = CounterfactualInferer(self.scheduler, **options)
        self.assertTrue(torch.equal(plain.replay(self.images, network, result.record).difference, result.difference))
        exact = plain(self.images, network)
        self.assertFalse(torch.equal(exact.difference, result.difference))
        one = CounterfactualRecord.of_images([exact.record.of_image(1)])
        alone = plain.replay(self.images[1:2], network, one)
        torch.testing.assert_close(alone.counterfactual, exact.counterfactual[1:2], rtol=0, atol=1e-5)

    @parameterized.expand(
        [
            ("model_id", {"model_id": "sha256:2"}, {}, "model_id 'sha256:1', got 'sha256:2'"),
            ("no model_id", {"model_id": None}, {}, "model_id 'sha256:1', got None"),
            ("autoencoder_id", {"autoencoder_id": "b"}, {}, "autoencoder_id None, got 'b'"),
            ("scale_factor", {"scale_factor": 0.5}, {}, "scale_factor 1.0, got 0.5"),
            ("prediction_type", {}, {"prediction_type": "v_prediction"}, "prediction_type 'epsilon', got 'v_pred"),
            ("schedule", {}, {"schedule": "cosine"}, "alphas_cumprod"),
            ("timesteps", {}, {"num_train_timesteps": 100}, "alphas_cumprod"),
        ]
    )
    def test_replay_refuses_another_model(self, _: str, options: Any, noise: Any, message: str) -> None:
        network = tiny_unet()
        settings = {"timestep": 150, "num_inference_steps": 2, "probability": None, "model_id": "sha256:1"}
        record = CounterfactualInferer(self.scheduler, **settings)(self.images, network).record
        other = {**settings, "timestep": 50, **options}
        with self.assertRaisesRegex(ValueError, f"CounterfactualInferer: the record is of {message}"):
            CounterfactualInferer(DDIMGridScheduler(**noise), **other).replay(self.images, network, record)

    def test_records_that_do_not_belong_together(self) -> None:
        inferer = CounterfactualInferer(self.scheduler, timestep=50, num_inference_steps=2, probability=None)
        record = inferer(self.images, tiny_unet()).record
        first = record.of_image(0)
        self.assertEqual((first["index"], first["batch_size"]), (0, 3))
        for contents, region, message in (
            ([], None, "at least one image expected"),
            ([{name: value for name, value in first.items() if name != "model_id"}], None, "lack model_id"),
            ([first, {**first, "rule": "class_free"}], None, "differ in rule"),
            ([{**first, "confined": True}], None, "regions for 1 of the images expected, got None"),
            ([first], torch.ones(1, 1, 8, 8, dtype=torch.bool), "regions for none of the images expected, got 1"),
        ):
            with self.assertRaisesRegex(ValueError, f"CounterfactualRecord: .*{message}"):
                CounterfactualRecord.of_images(contents, region)
        shared = replace(record, target=record.target[:1], enforce=(True,), scale=(1.0,), seeds=(0,))
        self.assertEqual(CounterfactualRecord.of_images([shared.of_image(0)]), shared)

    def test_multi_label_network_removes_and_enforces(self) -> None:
        network = tiny_unet(multi_label=True)
        inferer = CounterfactualInferer(
            self.scheduler, timestep=300, num_inference_steps=4, scale=50.0, probability=None
        )
        before = inferer(self.images, network, target=1).probabilities[:, 1]
        for enforce, sign in ((True, 1), (False, -1)):
            result = inferer(self.images, network, target=1, enforce=enforce)
            change = result.probabilities_counterfactual[:, 1] - result.probabilities_reconstruction[:, 1]
            self.assertTrue(bool((sign * change > 0).all()), change)
        flipped = inferer(self.images, network, target=1, enforce=None)
        self.assertEqual(flipped.record.enforce, tuple((before < 0.5).tolist()))

    def test_latents_of_an_autoencoder(self) -> None:
        """Without a receptive field and within the range, the chain is that of a network which is shown the latents."""
        network, small = tiny_unet(), 0.1 * self.images
        options: dict[str, Any] = {"timestep": 50, "num_inference_steps": 3, "scale": 0.5, "probability": None}
        options |= {"region_fraction": 0.25, "inversion_iterations": 15}
        inferer = CounterfactualInferer(self.scheduler, **options, autoencoder=HalvingAutoencoder(), scale_factor=0.7)
        result = inferer(nn.functional.interpolate(small, scale_factor=2.0), network, target=1)
        plain = CounterfactualInferer(self.scheduler, **options)(0.7 * small, network, target=1)
        self.assertEqual(float(result.overshoot.max()), 0.0)
        expected = nn.functional.interpolate(plain.counterfactual / 0.7, scale_factor=2.0)
        torch.testing.assert_close(result.counterfactual, expected)
        torch.testing.assert_close(result.probabilities_counterfactual, plain.probabilities_counterfactual)
        assert result.region is not None
        self.assertEqual(result.region.shape, (3, 1, 16, 16))
        self.assertEqual(float(result.difference[~result.region].abs().max()), 0.0)

    @parameterized.expand(
        [(dims, probability, fraction) for dims in (2, 3) for probability in (None, 0.6) for fraction in (None, 0.25)]
    )
    def test_latents_with_a_receptive_field(
        self, spatial_dims: int, probability: float | None, fraction: float | None
    ) -> None:
        network, autoencoder = tiny_unet(spatial_dims), BlurringAutoencoder()
        images = torch.rand(2, 1, *[16] * spatial_dims, generator=torch.Generator().manual_seed(1)) * 2 - 1
        inferer = CounterfactualInferer(
            self.scheduler,
            timestep=300,
            num_inference_steps=3,
            scale=20.0,
            probability=probability,
            max_trials=3,
            region_fraction=fraction,
            autoencoder=autoencoder,
            scale_factor=0.7,
        )
        result = inferer(images, network, target=1)
        classifier = JointDiffusionInferer(self.scheduler, autoencoder=autoencoder, scale_factor=0.7)
        for name in ("counterfactual", "reconstruction"):  # what `inference.json` would say of the delivered image
            shown = getattr(result, name)
            self.assertLessEqual(float(shown.abs().max()), 1.0)
            expected = classifier.classify(shown, network).softmax(1)
            torch.testing.assert_close(getattr(result, f"probabilities_{name}"), expected)
        answers = result.probabilities_counterfactual[:, 1] >= (probability or 0.5)
        self.assertEqual(result.reached.tolist(), answers.tolist())
        if fraction is not None:
            assert result.region is not None
            share = result.region.double().flatten(1).mean(1)
            self.assertTrue(bool((share >= fraction).all() and (share < fraction + 0.05).all()), share)
            self.assertEqual(float(result.difference[~result.region.expand_as(images)].abs().max()), 0.0)
            self.assertGreater(float(result.difference.abs().max()), 0.0)

    def test_meta_data_and_modes_survive(self) -> None:
        network = tiny_unet().train()
        network.middle_block.eval()
        affine = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0], dtype=torch.float64))
        inferer = CounterfactualInferer(self.scheduler, timestep=50, num_inference_steps=2, probability=None)
        result = inferer(MetaTensor(self.images, affine=affine), network)
        for image in (result.image, result.counterfactual, result.reconstruction, result.difference):
            self.assertIsInstance(image, MetaTensor)
            torch.testing.assert_close(image.affine, affine)
        self.assertTrue(network.training and not network.middle_block.training)
        self.assertFalse(result.counterfactual.requires_grad)
        self.assertTrue(all(p.grad is None for p in network.parameters()))

    def test_callback_sees_every_step(self) -> None:
        seen: list[int] = []
        inferer = CounterfactualInferer(self.scheduler, timestep=100, num_inference_steps=3, probability=None)
        inferer(self.images, tiny_unet(), callback=lambda timestep, sample: seen.append(timestep))
        self.assertEqual(seen, [100, 50, 0] * 2)


class BlurringAutoencoder(HalvingAutoencoder):
    """Latents are blurred, and decoding blurs, so that a pixel hears of its neighbours in both directions."""

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().encode(self._blur(images))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self._blur(super().decode(latents))

    def _blur(self, images: torch.Tensor) -> torch.Tensor:
        pool: Any = {4: nn.functional.avg_pool2d, 5: nn.functional.avg_pool3d}[images.ndim]
        return pool(images, 3, stride=1, padding=1)


class TestQuestion(unittest.TestCase):
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])

    @parameterized.expand(
        [
            ("other class", None, True, [1, 1]),
            ("one class", 2, True, [2, 2]),
            ("one each", [2, 0], None, [2, 0]),
            ("removed", [0, 1], False, [1, 2]),
            ("removed for one", [2, 2], [True, False], [2, 1]),
        ]
    )
    def test_multi_class(self, _: str, target: Any, enforce: Any, expected: list[int]) -> None:
        question = CounterfactualQuestion.of(self.probabilities, target, enforce, False)
        self.assertEqual(question.target.tolist(), expected)
        self.assertTrue(bool(question.enforce.all()))
        self.assertEqual(question.answered(self.probabilities).tolist(), [expected[0] == 0, expected[1] == 2])
        wanted = self.probabilities[torch.arange(2), torch.tensor(expected)]
        torch.testing.assert_close(question.probability(self.probabilities), wanted)

    @parameterized.expand([(True, [True, True]), (False, [False, False]), (None, [False, True])])
    def test_multi_label(self, enforce: Any, expected: list[bool]) -> None:
        question = CounterfactualQuestion.of(self.probabilities, 0, enforce, True)
        self.assertEqual(
            question.answered(self.probabilities).tolist(), [expected[0], not expected[1]]
        )  # present in the first only
        self.assertEqual(question.enforce.tolist(), expected)
        wanted = [p if present else 1 - p for p, present in zip((0.6, 0.1), expected, strict=True)]
        torch.testing.assert_close(question.probability(self.probabilities), torch.tensor(wanted))
        self.assertEqual(question.class_labels(3).tolist(), [[int(present), -1, -1] for present in expected])

    def test_every_one(self) -> None:
        found = CounterfactualQuestion.every(self.probabilities, None, False)
        self.assertEqual([question.target.tolist() for question in found], [[1, 1], [2, 0]])
        tied = CounterfactualQuestion.every(torch.tensor([[0.25, 0.25, 0.5, 0.0], [0.4, 0.4, 0.1, 0.1]]), True, False)
        self.assertEqual([question.target.tolist() for question in tied], [[0, 1], [1, 2], [3, 3]])
        labels = CounterfactualQuestion.every(self.probabilities, None, True)
        self.assertEqual([question.target.tolist() for question in labels], [[0, 0], [1, 1], [2, 2]])
        self.assertEqual([q.enforce.tolist() for q in labels], [[False, True], [True, True], [True, False]])
        with self.assertRaisesRegex(ValueError, "every other class is asked for; enforce=False needs one target"):
            CounterfactualQuestion.every(self.probabilities, False, False)

    @parameterized.expand(
        [
            ("label not named", None, True, True, "name the target"),
            ("class not named", None, False, False, "name the target"),
            ("unknown", 3, True, False, r"must lie in \[0, 2\]"),
            ("wrong number", [0, 1, 2], True, False, "one for each of 2"),
            ("not a class", 0.5, True, False, "class index"),
        ]
    )
    def test_refuses(self, _: str, target: Any, enforce: Any, multi_label: bool, message: str) -> None:
        with self.assertRaisesRegex(ValueError, message):
            CounterfactualQuestion.of(self.probabilities, target, enforce, multi_label)


class TestRegion(unittest.TestCase):
    @parameterized.expand([(2,), (3,)])
    def test_is_the_square_that_changed(self, spatial_dims: int) -> None:
        difference = torch.zeros(1, 2, *[9] * spatial_dims)
        inside = (slice(None), slice(None), *[slice(3, 6)] * spatial_dims)
        difference[inside] = -1.0
        region = most_changed(difference, 1 / 9**spatial_dims)
        self.assertEqual(region.nonzero().tolist(), [[0, 0, *[4] * spatial_dims]])  # smoothed: the centre

    def test_a_border_counts_as_much_as_the_middle(self) -> None:
        difference = torch.zeros(1, 1, 10, 10)
        difference[..., 0], difference[..., 4:7] = 1.0, 0.7
        region = most_changed(difference, 0.2)
        self.assertEqual(region[0, 0].all(0).nonzero().flatten().tolist(), [0, 5])  # 1/2 and 0.7; then 0.7 * 2/3


class TestWrongInput(unittest.TestCase):
    @parameterized.expand(
        [
            ("rule", {"rule": "magic"}, "rule must be one of"),
            ("encoding", {"encoding": "x"}, "encoding must be one of"),
            ("timestep", {"timestep": 1000}, r"\[1, 999\]"),
            ("steps", {"timestep": 5, "num_inference_steps": 9}, r"\[2, 6\]"),
            ("iterations", {"inversion_iterations": 0}, "at least 1"),
            ("scale", {"scale": -1.0}, "scale must be positive"),
            ("probability", {"probability": 1.0}, r"\(0, 1\)"),
            ("precision", {"precision": 1.0}, "above 1"),
            ("trials", {"max_trials": 0}, "at least 1"),
            ("region", {"region_fraction": 1.5}, r"\(0, 1\)"),
        ]
    )
    def test_arguments(self, _: str, options: dict[str, Any], message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"CounterfactualInferer.*{message}"):
            CounterfactualInferer(DDIMGridScheduler(), **options)

    @parameterized.expand([("linear_beta",), ("scaled_linear_beta",), ("cosine",), ("shifted_logsnr",)])
    def test_without_a_timestep_all_are_as_noisy(self, schedule: str) -> None:
        scheduler = DDIMGridScheduler(schedule=schedule, clip_sample=False)
        inferer = CounterfactualInferer(scheduler)
        found = torch.logit(scheduler.alphas_cumprod[inferer.scheduler.timesteps[0]])
        others = torch.logit(scheduler.alphas_cumprod)
        wanted = math.log(0.115 / 0.885)
        self.assertAlmostEqual(float(found), wanted, delta=0.05)
        self.assertEqual(float((found - wanted).abs()), float((others - wanted).abs().min()))

    def test_too_few_levels_take_the_noisiest(self) -> None:
        scheduler = DDIMGridScheduler(num_train_timesteps=12, clip_sample=False)
        inferer = CounterfactualInferer(scheduler, num_inference_steps=4)
        self.assertEqual(int(inferer.scheduler.timesteps[0]), 11)

    def test_scheduler(self) -> None:
        with self.assertRaisesRegex(TypeError, "DDIMGridScheduler, got AncestralScheduler"):
            CounterfactualInferer(AncestralScheduler())  # type: ignore[arg-type]

    @parameterized.expand(
        [
            ("no axes", torch.zeros(2, 3), {}, ValueError, "shape"),
            ("seeds", torch.zeros(2, 1, 8, 8), {"seed": [1]}, ValueError, "1 seeds for 2 images"),
            ("classes", torch.zeros(2, 1, 8, 8), {"target": 7}, ValueError, "3 classes"),
        ]
    )
    def test_call(self, _: str, images: torch.Tensor, options: Any, error: type[Exception], message: str) -> None:
        with self.assertRaisesRegex(error, message):
            CounterfactualInferer(DDIMGridScheduler())(images, tiny_unet(), **options)

    def test_network_without_what_the_rule_needs(self) -> None:
        images = torch.zeros(1, 1, 8, 8)
        with self.assertRaisesRegex(TypeError, "class-conditional"):
            CounterfactualInferer(DDIMGridScheduler(), rule="class_free")(images, tiny_unet(class_conditional=False))
        with self.assertRaisesRegex(TypeError, "no classes"):
            CounterfactualInferer(DDIMGridScheduler())(images, nn.Identity())
        with self.assertRaisesRegex(ValueError, "2 images, got a batch of 1"):
            network: JointDiffusionUNet = tiny_unet()
            inferer = CounterfactualInferer(DDIMGridScheduler(), timestep=9, num_inference_steps=2, probability=None)
            inferer.replay(images, network, inferer(images.expand(2, -1, -1, -1), network).record)


if __name__ == "__main__":
    unittest.main()
