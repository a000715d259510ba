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

import io
import unittest
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any
from unittest import mock

import torch
from ignite.engine import Events
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from monai.inferers import DiffusionInferer, Inferer
from monai.networks.nets import DiffusionModelUNet
from parameterized import parameterized

from monai_jointdiff.inferers import JointDiffusionInferer, SampleResult, StepInfo
from monai_jointdiff.networks import JointDiffusionUNet, JointOutput
from monai_jointdiff.schedulers import DDIMGridScheduler, GridScheduler, make_scheduler
from tests.inferers.utils import GaussianNetwork, Recorder, tiny_unet

SIZES = {2: (8, 8), 3: (4, 8, 4)}
DIMS = [("2d", 2), ("3d", 3)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact_unet(spatial_dims: int = 2, **options: Any) -> JointDiffusionUNet:
    """In double precision: an untrained network lets a chain grow to a hundred, and rounding with it."""
    return tiny_unet(spatial_dims, **options).double()


def sampler(name: str, steps: int, **options: Any) -> GridScheduler:
    scheduler = make_scheduler(name, **options)
    scheduler.set_timesteps(steps)
    return scheduler


class TestForward(unittest.TestCase):
    """``__call__`` and ``classify``."""

    def setUp(self) -> None:
        self.inferer = JointDiffusionInferer(DDIMGridScheduler())
        self.timesteps = torch.tensor([3, 500, 999])

    def test_is_a_monai_inferer(self) -> None:
        self.assertIsInstance(self.inferer, Inferer)

    @parameterized.expand(DIMS)
    def test_joint_equals_manual(self, _: str, dims: int) -> None:
        net, size = tiny_unet(dims), SIZES[dims]
        x, noise, clean = randn(3, 1, *size), randn(3, 1, *size, seed=1), randn(4, 1, *size, seed=2)
        labels = torch.tensor([0, 2, 3])
        result = self.inferer(x, net, noise=noise, timesteps=self.timesteps, clean=clean, class_labels=labels)
        self.assertIsInstance(result, JointOutput)

        alpha_bar = DDIMGridScheduler().alphas_cumprod[self.timesteps].reshape(3, *[1] * (dims + 1))
        noisy = (alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise).float()
        torch.testing.assert_close(result.prediction, net(noisy, self.timesteps, class_labels=labels))
        torch.testing.assert_close(result.logits, net(clean))
        single = self.inferer(x, net, noise=noise, timesteps=self.timesteps, class_labels=labels)
        torch.testing.assert_close(single, result.prediction)

    def test_equals_monais_inferer(self) -> None:
        net, x, noise = (
            tiny_unet(with_conditioning=True, cross_attention_dim=4),
            randn(3, 1, 8, 8),
            randn(3, 1, 8, 8, seed=1),
        )
        condition = randn(3, 2, 4)
        theirs = DiffusionInferer(DDIMGridScheduler())(x, net, noise, self.timesteps, condition=condition)
        ours = self.inferer(x, net, noise, self.timesteps, condition=condition)
        torch.testing.assert_close(ours, theirs)

    @parameterized.expand(DIMS)
    def test_classification(self, _: str, dims: int) -> None:
        net = tiny_unet(dims, dropout=0.5).train()
        x = randn(3, 1, *SIZES[dims])
        expected = net.eval()(x)
        net.train()
        with mock.patch.object(net, "decode", side_effect=AssertionError("the decoder ran")):
            torch.testing.assert_close(self.inferer.classify(x, net), expected)
            self.assertTrue(net.training)
            # as a forward in training it leaves the mode alone: dropout acts
            self.assertFalse(torch.allclose(self.inferer(x, net), expected))
        net.eval()
        torch.testing.assert_close(self.inferer(x, net), expected)

    @parameterized.expand(DIMS)
    def test_features_of_the_head(self, _: str, dims: int) -> None:
        net = tiny_unet(dims, dropout=0.5).train()
        x = randn(3, 1, *SIZES[dims])
        features, logits = self.inferer.features(x, net)
        last = net.classifier.layers[-1]
        self.assertEqual((features.shape, net.training, logits.requires_grad), ((3, last.in_features), True, False))
        torch.testing.assert_close(features @ last.weight.T + last.bias, logits)
        torch.testing.assert_close(logits, self.inferer.classify(x, net), rtol=0, atol=0)

    def test_gradients_follow_the_caller(self) -> None:
        net, x = tiny_unet(), randn(2, 1, 8, 8)
        self.assertTrue(self.inferer.classify(x, net).requires_grad)
        with torch.no_grad():
            self.assertFalse(self.inferer.classify(x, net).requires_grad)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(self.inferer.classify(x, net)[:, 0].sum(), x)
        self.assertGreater(float(gradient.abs().max()), 0)

    def test_bfloat16_autocast_gives_float32(self) -> None:
        net, x, noise = tiny_unet(), randn(3, 1, 8, 8), randn(3, 1, 8, 8, seed=1)
        inside: list[torch.dtype] = []
        net.conv_in.register_forward_hook(lambda module, args, output: inside.append(output.dtype))
        exact = self.inferer(x, net, noise, self.timesteps, clean=x)
        inferer = JointDiffusionInferer(DDIMGridScheduler(), autocast_dtype=torch.bfloat16)
        rounded = inferer(x, net, noise, self.timesteps, clean=x)
        self.assertEqual(inside, [torch.float32, torch.bfloat16])
        for a, b in zip(rounded, exact, strict=True):
            self.assertEqual(a.dtype, torch.float32)
            self.assertFalse(torch.equal(a, b))
            torch.testing.assert_close(a, b, rtol=0, atol=0.03 * float(b.detach().abs().max()))
        self.assertEqual(inferer.classify(x, net).dtype, torch.float32)
        self.assertEqual(inferer(x, net).dtype, torch.float32)
        # a single-precision loss has single-precision gradients
        rounded.logits.sum().backward()
        self.assertEqual(net.conv_in.conv.weight.grad.dtype, torch.float32)

    def test_double_stays_double(self) -> None:
        net, x = tiny_unet().double(), randn(3, 1, 8, 8, dtype=torch.float64)
        result = self.inferer(x, net, noise=torch.ones_like(x), timesteps=self.timesteps, clean=x)
        self.assertEqual([r.dtype for r in result], [torch.float64] * 2)

    def test_half_inputs_are_noised_in_single(self) -> None:
        net, x = tiny_unet(), randn(3, 1, 8, 8).bfloat16()
        result = self.inferer(x, net, noise=x, timesteps=self.timesteps)
        expected = self.inferer(x.float(), net, noise=x.float(), timesteps=self.timesteps)
        self.assertTrue(torch.equal(result, expected))

    def test_network_gets_plain_tensors(self) -> None:
        net = Recorder(tiny_unet())
        x = MetaTensor(randn(3, 1, 8, 8))
        result = self.inferer(x, net, noise=x, timesteps=self.timesteps, clean=x)
        for value in (net.calls[0]["x"], net.calls[0]["clean"], *result):
            self.assertNotIsInstance(value, MetaTensor)

    def test_in_a_stock_evaluator(self) -> None:
        net, x = tiny_unet(), randn(4, 1, 8, 8)
        seen: list[torch.Tensor] = []
        evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=[{"image": x, "label": torch.zeros(4, dtype=torch.int64)}],
            network=net,
            inferer=self.inferer,
            decollate=False,
        )
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output["pred"]))
        evaluator.run()
        torch.testing.assert_close(seen[0], net(x))

    @parameterized.expand(
        [
            ("timesteps_alone", {"timesteps": torch.tensor([1, 2, 3])}, "need noise"),
            ("clean_alone", {"clean": torch.zeros(3, 1, 8, 8)}, "need noise"),
            (
                "noise_shape",
                {"noise": torch.zeros(3, 1, 4, 4)},
                r"shape of the inputs \(3, 1, 8, 8\), got \(3, 1, 4, 4\)",
            ),
            ("no_timesteps", {"noise": torch.zeros(3, 1, 8, 8)}, "got None"),
            ("one_timestep", {"noise": torch.zeros(3, 1, 8, 8), "timesteps": torch.tensor([1])}, r"shape \(3,\)"),
            ("float_timesteps", {"noise": torch.zeros(3, 1, 8, 8), "timesteps": torch.ones(3)}, "float32"),
            ("late", {"noise": torch.zeros(3, 1, 8, 8), "timesteps": torch.tensor([1, 2, 1000])}, "1000"),
        ]
    )
    def test_wrong_arguments(self, _: str, arguments: dict, message: str) -> None:
        with self.assertRaisesRegex(ValueError, message):
            self.inferer(torch.zeros(3, 1, 8, 8), tiny_unet(), **arguments)

    def test_wrong_autocast_type(self) -> None:
        with self.assertRaisesRegex(ValueError, "autocast_dtype must be torch.bfloat16"):
            JointDiffusionInferer(DDIMGridScheduler(), autocast_dtype=torch.float64)


class TestSampleGaussian(unittest.TestCase):
    """Samples of the optimal network for a Gaussian."""

    mean, std = -0.3, 0.5

    @parameterized.expand(
        [(f"{d}d_{p}", d, p) for d in (2, 3) for p in ("epsilon", "sample", "v_prediction")]  # fmt: skip
    )
    def test_dpm_solver_follows_the_flow(self, _: str, dims: int, prediction_type: str) -> None:
        scheduler = sampler("dpm_solver", 20, prediction_type=prediction_type)
        network = GaussianNetwork(scheduler, self.mean, self.std)
        noise = randn(4, 1, *SIZES[dims], dtype=torch.float64)
        image = JointDiffusionInferer(scheduler).sample(noise, network).image
        self.assertEqual(image.dtype, torch.float64)
        # 20 steps: within 2 % of the standard deviation per unit of noise
        torch.testing.assert_close(
            image, network.flow(noise, 999), rtol=0, atol=0.02 * self.std * float(noise.abs().max())
        )

    @parameterized.expand([("ddpm_2d", "ddpm", 2), ("ddpm_3d", "ddpm", 3), ("ddim_2d", "ddim", 2)])
    def test_statistics(self, _: str, name: str, dims: int) -> None:
        scheduler = sampler(name, 250)
        noise = randn(128, 1, *SIZES[dims])  # 8192 pixels and more: standard errors .6 % of std, 1 % for the mean
        network = GaussianNetwork(scheduler, self.mean, self.std)
        image = (
            JointDiffusionInferer(scheduler).sample(noise, network, generator=torch.Generator().manual_seed(1)).image
        )
        self.assertAlmostEqual(float(image.mean()), self.mean, delta=0.02)
        self.assertAlmostEqual(float(image.std()) / self.std, 1.0, delta=0.04)

    def test_chain_may_start_in_the_middle(self) -> None:
        scheduler = make_scheduler("ddim")
        scheduler.set_grid(range(400, -1, -2))
        network = GaussianNetwork(scheduler, self.mean, self.std)
        x_t = randn(4, 1, 8, 8, dtype=torch.float64)
        image = JointDiffusionInferer(scheduler).sample(x_t, network).image
        torch.testing.assert_close(image, network.flow(x_t, 400), rtol=0, atol=0.02)


class TestSample(unittest.TestCase):
    def setUp(self) -> None:
        self.net = exact_unet()
        self.noise = randn(3, 1, 8, 8, dtype=torch.float64)
        self.labels = torch.tensor([0, 1, 2])

    def _sample(self, scheduler: Any = None, network: Any = None, **options: Any) -> SampleResult:
        scheduler = sampler("dpm_solver", 4) if scheduler is None else scheduler
        inferer = JointDiffusionInferer(scheduler)
        return inferer.sample(self.noise, self.net if network is None else network, **options)

    @parameterized.expand([(f"{name}_{d}d", name, d) for name in ("ddim", "ddpm", "dpm_solver") for d in (2, 3)])
    def test_equals_monais_inferer(self, _: str, name: str, dims: int) -> None:
        scheduler, net, noise = sampler(name, 6), exact_unet(dims), randn(2, 1, *SIZES[dims], dtype=torch.float64)
        torch.manual_seed(7)
        expected = DiffusionInferer(scheduler).sample(noise, net, verbose=False)
        torch.manual_seed(7)
        result = JointDiffusionInferer(scheduler).sample(noise, net)
        torch.testing.assert_close(result.image, expected)
        self.assertFalse(result.image.requires_grad)
        self.assertEqual((result.network_calls, result.intermediates), (6, ()))

    def test_other_scheduler_than_the_inferers(self) -> None:
        expected = self._sample(sampler("ddim", 5)).image
        inferer = JointDiffusionInferer(sampler("ddpm", 3))
        self.assertTrue(torch.equal(inferer.sample(self.noise, self.net, sampler("ddim", 5)).image, expected))

    def _manual(self, predict: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
        scheduler, x = sampler("ddim", 4), self.noise
        with torch.no_grad():
            for t in scheduler.timesteps.tolist():
                x, _ = scheduler.step(predict(x, t), t, x)
        return x

    @parameterized.expand([(s,) for s in (-1.0, 0.0, 1.0, 3.0)])
    def test_classifier_free_guidance_equals_two_calls(self, scale: float) -> None:
        def predict(x: torch.Tensor, t: int) -> torch.Tensor:
            null = self.net(x, torch.full((3,), t))
            return null + scale * (self.net(x, torch.full((3,), t), class_labels=self.labels) - null)

        recorder = Recorder(self.net)
        result = self._sample(sampler("ddim", 4), recorder, class_labels=self.labels, guidance_scale=scale)
        torch.testing.assert_close(result.image, self._manual(predict), rtol=1e-9, atol=1e-9)
        if scale != 1.0:
            plain = self._sample(sampler("ddim", 4), class_labels=self.labels).image
            self.assertGreater(float((result.image - plain).abs().max()), 0.1)
        # one call a step, of the double batch only where both halves matter
        self.assertEqual([len(call["x"]) for call in recorder.calls], [3 if scale in (0, 1) else 6] * 4)
        self.assertEqual(result.network_calls, 4)

    def test_classifier_free_guidance_multi_label(self) -> None:
        self.net = exact_unet(multi_label=True)
        labels = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, -1]])

        def predict(x: torch.Tensor, t: int) -> torch.Tensor:
            null = self.net(x, torch.full((3,), t))
            return null + 2 * (self.net(x, torch.full((3,), t), class_labels=labels.double()) - null)

        result = self._sample(sampler("ddim", 4), class_labels=labels, guidance_scale=2.0)
        torch.testing.assert_close(result.image, self._manual(predict), rtol=1e-9, atol=1e-9)

    def test_classifier_free_guidance_with_context(self) -> None:
        self.net = exact_unet(with_conditioning=True, cross_attention_dim=4)
        context = randn(3, 2, 4, dtype=torch.float64)

        def predict(x: torch.Tensor, t: int) -> torch.Tensor:
            null = self.net(x, torch.full((3,), t), context=context)
            return null + 2 * (self.net(x, torch.full((3,), t), context=context, class_labels=self.labels) - null)

        result = self._sample(sampler("ddim", 4), class_labels=self.labels, guidance_scale=2.0, context=context)
        torch.testing.assert_close(result.image, self._manual(predict), rtol=1e-9, atol=1e-9)

    def test_guidance_interval(self) -> None:
        def predict(x: torch.Tensor, t: int) -> torch.Tensor:
            null = self.net(x, torch.full((3,), t))
            conditional = self.net(x, torch.full((3,), t), class_labels=self.labels)
            return null + 3 * (conditional - null) if 333 <= t <= 666 else conditional

        recorder = Recorder(self.net)  # grid 999, 666, 333, 0: both ends of the interval count
        result = self._sample(
            sampler("ddim", 4), recorder, class_labels=self.labels, guidance_scale=3.0, guidance_interval=(333, 666)
        )
        torch.testing.assert_close(result.image, self._manual(predict), rtol=1e-9, atol=1e-9)
        self.assertEqual([len(call["x"]) for call in recorder.calls], [3, 6, 6, 3])

    def test_one_class_for_all(self) -> None:
        single = self._sample(class_labels=2).image
        self.assertTrue(torch.equal(single, self._sample(class_labels=torch.tensor([2, 2, 2])).image))
        self.assertFalse(torch.allclose(single, self._sample().image))
        # None is the null class
        self.assertTrue(torch.equal(self._sample(class_labels=3).image, self._sample().image))

    def test_monais_class_conditional_network(self) -> None:
        net = DiffusionModelUNet(
            2, 1, 1, 1, (8, 8), (False, False), norm_num_groups=2, num_class_embeds=3, num_head_channels=8
        )
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
        net.double()
        first, second = (self._sample(network=net, class_labels=k).image for k in (0, 1))
        self.assertFalse(torch.allclose(first, second))
        with self.assertRaisesRegex(ValueError, r"lie in \[0, 2\]"):
            self._sample(network=net, class_labels=3)
        with self.assertRaisesRegex(TypeError, "null class .*got DiffusionModelUNet"):
            self._sample(network=net, class_labels=1, guidance_scale=2.0)

    def test_generator(self) -> None:
        scheduler = sampler("ddpm", 4)

        def draw(seed: int) -> torch.Tensor:
            return self._sample(scheduler, generator=torch.Generator().manual_seed(seed)).image

        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = draw(5)
        self.assertTrue(torch.equal(torch.get_rng_state(), state))
        torch.manual_seed(123)
        self.assertTrue(torch.equal(draw(5), first))
        self.assertFalse(torch.allclose(draw(6), first))

    def test_evaluation_mode_and_restoration(self) -> None:
        self.net.train()
        self.net.conv_in.eval()  # a frozen part
        modes = {name: module.training for name, module in self.net.named_modules()}
        recorder = Recorder(self.net).train()
        self.net.conv_in.eval()
        self._sample(network=recorder)
        self.assertFalse(any(call["training"] for call in recorder.calls))
        self.assertEqual({name: module.training for name, module in self.net.named_modules()}, modes)

        def fail(info: StepInfo) -> None:
            raise KeyboardInterrupt

        with self.assertRaises(KeyboardInterrupt):
            self._sample(callback=fail)
        self.assertEqual({name: module.training for name, module in self.net.named_modules()}, modes)

    def test_dropout_is_off(self) -> None:
        net = exact_unet(dropout=0.5).train()
        self.assertTrue(torch.equal(self._sample(network=net).image, self._sample(network=net).image))

    def test_callback_and_intermediates(self) -> None:
        infos: list[StepInfo] = []
        scheduler = sampler("ddim", 7)
        result = self._sample(scheduler, callback=infos.append, intermediate_steps=3)
        grid = scheduler.timesteps.tolist()
        self.assertEqual([info["step"] for info in infos], list(range(7)))
        self.assertEqual([info["timestep"] for info in infos], grid)
        self.assertEqual([info["next_timestep"] for info in infos], [*grid[1:], -1])
        self.assertEqual({info["num_steps"] for info in infos}, {7})
        # what the callback saw is the chain: each sample is the step from the one before
        x = self.noise
        for info in infos:
            with torch.no_grad():
                output = self.net(x, torch.full((3,), info["timestep"]))
            torch.testing.assert_close(info["original"], scheduler.predict_original(output, info["timestep"], x))
            x = info["sample"]
        self.assertEqual(len(result.intermediates), 3)  # after steps 3, 6, and 7, the last
        for kept, step in zip(result.intermediates, (2, 5, 6), strict=True):
            self.assertTrue(torch.equal(kept, infos[step]["sample"]))
        self.assertTrue(torch.equal(result.image, result.intermediates[-1]))

    def test_intermediates_end_once(self) -> None:
        self.assertEqual(len(self._sample(sampler("ddim", 6), intermediate_steps=3).intermediates), 2)

    def test_progress_bar(self) -> None:
        with redirect_stderr(io.StringIO()) as silent:
            self._sample()
        with redirect_stderr(io.StringIO()) as shown:
            self._sample(progress=True)
        self.assertEqual(silent.getvalue(), "")
        self.assertIn("4/4", shown.getvalue())

    def test_meta_tensor(self) -> None:
        affine = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0], dtype=torch.float64))
        noise = MetaTensor(self.noise, affine=affine, meta={"name": "chest"})
        recorder = Recorder(self.net)
        scheduler = sampler("ddim", 4)
        result = JointDiffusionInferer(scheduler).sample(noise, recorder, intermediate_steps=2)
        for image in (result.image, *result.intermediates):
            self.assertIsInstance(image, MetaTensor)
            self.assertEqual(image.meta["name"], "chest")
            torch.testing.assert_close(image.affine, affine)
        self.assertFalse(any(isinstance(call["x"], MetaTensor) for call in recorder.calls))
        self.assertTrue(torch.equal(result.image.as_tensor(), self._sample(scheduler).image))

    def test_bfloat16_autocast(self) -> None:
        scheduler = sampler("ddim", 4)
        net, noise = self.net.float(), self.noise.float()
        exact = JointDiffusionInferer(scheduler).sample(noise, net).image
        rounded = JointDiffusionInferer(scheduler, torch.bfloat16).sample(noise, net).image
        self.assertEqual(rounded.dtype, torch.float32)
        self.assertFalse(torch.equal(rounded, exact))
        torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05 * float(exact.abs().max()))

    def test_wrapped_networks(self) -> None:
        for wrapped in (torch.nn.DataParallel(self.net), torch.compile(self.net, backend="eager")):
            for options in ({}, {"class_labels": 1, "guidance_scale": 2.0}):
                expected = self._sample(**options)
                result = self._sample(network=wrapped, **options)
                torch.testing.assert_close(result.image, expected.image)

    @parameterized.expand(
        [
            ("class", {"class_labels": 4}, r"lie in \[0, 3\], got \[4, 4, 4\]"),
            ("negative_class", {"class_labels": torch.tensor([0, -1, 1])}, r"lie in \[0, 3\]"),
            ("labels_shape", {"class_labels": torch.tensor([0, 1])}, r"class indices of shape \(3,\), got .* \(2,\)"),
            ("labels_type", {"class_labels": torch.zeros(3)}, "class indices of shape .* got torch.float32"),
            ("no_labels", {"guidance_scale": 2.0}, "guidance_scale=2.0 needs class_labels"),
            ("interval", {"guidance_interval": (500, 100)}, "low, high"),
            ("intermediates", {"intermediate_steps": -1}, "0 or more"),
        ]
    )
    def test_wrong_arguments(self, _: str, options: dict, message: str) -> None:
        with self.assertRaisesRegex(ValueError, message):
            self._sample(**options)

    def test_wrong_networks(self) -> None:
        with self.assertRaisesRegex(ValueError, "JointDiffusionUNet is not class-conditional"):
            self._sample(network=exact_unet(class_conditional=False), class_labels=1)
        with self.assertRaisesRegex(ValueError, r"multi-hot of shape \(3, 3\)"):
            self._sample(network=exact_unet(multi_label=True), class_labels=1)

    def test_wrong_noise(self) -> None:
        inferer = JointDiffusionInferer(sampler("ddim", 2))
        for shape in ((1, 8), (1, 2, 8, 8), (1, 1, 8, 8, 8), (1, 1, 7, 8)):
            with self.assertRaisesRegex(ValueError, "shape|multiples"):
                inferer.sample(torch.zeros(shape), self.net.float())


if __name__ == "__main__":
    unittest.main()
