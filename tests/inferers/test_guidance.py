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
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from parameterized import parameterized
from torch import nn

from monai_jointdiff.inferers import (
    ClassifierGuidance,
    Guidance,
    GuidanceStep,
    JointDiffusionInferer,
    RepresentationGuidance,
)
from monai_jointdiff.networks import JointDiffusionUNet
from monai_jointdiff.schedulers import DDIMGridScheduler, GridScheduler
from tests.inferers.utils import GaussianNetwork, Recorder, tiny_unet

TYPES = ("epsilon", "sample", "v_prediction")
SIZES = {2: (8, 8), 3: (4, 8, 4)}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_step(timestep: int = 400, prediction_type: str = "epsilon") -> DDIMGridScheduler:
    scheduler = DDIMGridScheduler(prediction_type=prediction_type)
    scheduler.set_grid([timestep])
    return scheduler


class LinearJoint(nn.Module):
    """epsilon = c x, logits = W x: every gradient is known."""

    num_classes, multi_label, class_conditional = 3, False, False

    def __init__(self, scheduler: GridScheduler, slope: float = 0.3) -> None:
        super().__init__()
        self.scheduler, self.slope = scheduler, slope
        self.weight = nn.Parameter(randn(3, 64, seed=5) / 8)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor | None = None) -> torch.Tensor:
        if timesteps is None:
            return x.flatten(1) @ self.weight.T
        return self.scheduler.model_output_from_epsilon(self.slope * x, timesteps, x)


class TestClassifierGuidance(unittest.TestCase):
    @parameterized.expand(list(product(TYPES, (False, True))))
    def test_equals_closed_form(self, prediction_type: str, multi_label: bool) -> None:
        t, scale, x = 400, 1.7, randn(2, 1, 8, 8)
        scheduler = one_step(t, prediction_type)
        net = LinearJoint(scheduler)
        net.multi_label = multi_label
        inferer = JointDiffusionInferer(scheduler)
        result = inferer.sample(x, net, guidance=ClassifierGuidance([2, 0], scale))

        # eps' = eps + s sigma g,  g = (1 - sigma c) / alpha  W^T d loss / d logits
        alpha, sigma = (float(v) for v in scheduler.alpha_sigma(t, x))
        factor = (1 - sigma * net.slope) / alpha
        with torch.no_grad():
            logits = net(factor * x)
            onehot = F.one_hot(torch.tensor([2, 0]), 3).double()
            slope = (logits.sigmoid() - 1) * onehot if multi_label else logits.softmax(1) - onehot
            gradient = factor * (slope @ net.weight).reshape(x.shape)
        epsilon = net.slope * x + scale * sigma * gradient
        # the only step of the grid ends at x0_hat
        torch.testing.assert_close(result.image, (x - sigma * epsilon) / alpha, rtol=1e-9, atol=1e-9)
        self.assertEqual(result.network_calls, 2)

    def test_parameters_get_no_gradient(self) -> None:
        scheduler = one_step()
        net = LinearJoint(scheduler)
        JointDiffusionInferer(scheduler).sample(randn(1, 1, 8, 8), net, guidance=ClassifierGuidance(1))
        self.assertIsNone(net.weight.grad)

    def test_head_sees_timestep_zero_of_the_estimate(self) -> None:
        scheduler, net = one_step(), Recorder(tiny_unet().double())
        x = randn(2, 1, 8, 8)
        JointDiffusionInferer(scheduler).sample(x, net, guidance=ClassifierGuidance(1))
        predicted, classified = net.calls
        self.assertIsNone(classified["timesteps"])
        with torch.no_grad():
            original = scheduler.predict_original(net.network(x, torch.tensor([400])), 400, x)
        torch.testing.assert_close(classified["x"], original)


class TestRepresentationGuidance(unittest.TestCase):
    def test_maps_descend_by_the_numerical_gradient(self) -> None:
        net, rule = tiny_unet().double(), RepresentationGuidance(2, scale=0.5)
        with torch.no_grad():
            features = net.encode(randn(1, 1, 8, 8), torch.tensor([400]))
            moved = rule.descend(features, net.head)
            h = 1e-6
            for which, position in ((0, (0, 3, 2, 5)), (2, (0, 0, 1, 1)), (-1, (0, 7, 3, 0))):
                losses = []
                for sign in (1, -1):
                    maps = [m.clone() for m in (*features.skips, features.middle)]
                    maps[which][position] += sign * h
                    logits = net.head(features._replace(skips=maps[:-1], middle=maps[-1]))
                    losses.append(float(-logits.log_softmax(1)[0, 2]))
                before, after = ([*f.skips, f.middle][which][position] for f in (features, moved))
                self.assertAlmostEqual(float(after - before), -0.5 * (losses[0] - losses[1]) / (2 * h), places=9)
        self.assertIs(moved.emb, features.emb)

    def test_sample_decodes_the_moved_maps(self) -> None:
        scheduler, net, rule = one_step(), tiny_unet().double(), RepresentationGuidance([0, 2], scale=30.0)
        x, labels = randn(2, 1, 8, 8), torch.tensor([1, 1])
        result = JointDiffusionInferer(scheduler).sample(x, net, class_labels=labels, guidance=rule)
        with torch.no_grad():
            features = net.encode(x, torch.tensor([400]), class_labels=labels)
            expected = scheduler.predict_original(net.decode(rule.descend(features, net.head)), 400, x)
            unguided = JointDiffusionInferer(scheduler).sample(x, net, class_labels=labels).image
        torch.testing.assert_close(result.image, expected)
        self.assertGreater(float((result.image - unguided).abs().max()), 1e-2)
        self.assertEqual(result.network_calls, 1)

    def test_bfloat16(self) -> None:
        scheduler, net, x = one_step(), tiny_unet(), randn(2, 1, 8, 8).float()
        for rule in (RepresentationGuidance(1, 100.0), ClassifierGuidance(1, 1.0)):
            exact = JointDiffusionInferer(scheduler).sample(x, net, guidance=rule).image
            rounded = JointDiffusionInferer(scheduler, torch.bfloat16).sample(x, net, guidance=rule).image
            self.assertEqual(rounded.dtype, torch.float32)
            torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05 * float(exact.abs().max()))


class TestOneStepLowersTheCrossEntropy(unittest.TestCase):
    """The signs: a step toward the target lowers its cross-entropy in both spaces, the opposite one raises it."""

    cases = [
        (f"{d}d_{kind}_{p}", d, p, options, multi_label)
        for d in (2, 3)
        for p in TYPES
        for kind, options, multi_label in (
            ("class", {"target": 1}, False),
            ("classes", {"target": torch.tensor([2, 0, 1, 1])}, False),
            ("enforce", {"target": 2, "enforce": True}, True),
            ("remove", {"target": 2, "enforce": False}, True),
        )
    ]

    def _network(self, dims: int, multi_label: bool) -> tuple[JointDiffusionUNet, torch.Tensor]:
        return tiny_unet(dims, multi_label=multi_label).double(), randn(4, 1, *SIZES[dims])

    def _cross_entropy(self, logits: torch.Tensor, options: dict[str, Any], multi_label: bool) -> torch.Tensor:
        """Per image, recomputed from probabilities."""
        rows, target = torch.arange(4), torch.as_tensor(options["target"]).expand(4)
        if not multi_label:
            return -logits.softmax(1)[rows, target].log()
        present = logits.sigmoid()[rows, target]
        return -(present if options["enforce"] else 1 - present).log()

    @parameterized.expand(cases)
    def test_image_space(self, _: str, dims: int, prediction_type: str, options: dict, multi_label: bool) -> None:
        net, x = self._network(dims, multi_label)
        if prediction_type == "sample":
            # The estimate of a denoiser grows with its input (its Jacobian is a covariance). A random network predicts
            # noise or velocity next to x_t, which keeps this true, but not images.
            net.register_forward_hook(lambda _, args, output: args[0] + 0.1 * output if len(args) > 1 else output)
        scheduler = one_step(400, prediction_type)
        inferer = JointDiffusionInferer(scheduler)
        losses = {}
        for scale in (-0.05, 0.0, 0.05):
            image = inferer.sample(x, net, guidance=ClassifierGuidance(scale=scale, **options)).image
            losses[scale] = self._cross_entropy(inferer.classify(image, net), options, multi_label)
        self.assertTrue(bool((losses[0.05] < losses[0.0]).all()))
        self.assertTrue(bool((losses[-0.05] > losses[0.0]).all()))

    @parameterized.expand([case for case in cases if "epsilon" in case[0]])
    def test_representation_space(self, _: str, dims: int, p: str, options: dict, multi_label: bool) -> None:
        net, x = self._network(dims, multi_label)
        losses = {}
        with torch.no_grad():
            features = net.encode(x, torch.tensor([400]))
            for scale in (-5.0, 0.0, 5.0):
                moved = RepresentationGuidance(scale=scale, **options).descend(features, net.head, multi_label)
                losses[scale] = self._cross_entropy(net.head(moved), options, multi_label)
        self.assertTrue(bool((losses[5.0] < losses[0.0]).all()))
        self.assertTrue(bool((losses[-5.0] > losses[0.0]).all()))

    def test_whole_chain(self) -> None:
        net, x = self._network(2, False)
        scheduler = DDIMGridScheduler()
        scheduler.set_grid([300, 200, 100, 50])
        inferer = JointDiffusionInferer(scheduler)
        losses = []
        for scale in (0.0, 0.5):
            image = inferer.sample(x, net, guidance=ClassifierGuidance(0, scale)).image
            losses.append(self._cross_entropy(inferer.classify(image, net), {"target": 0}, False))
        self.assertTrue(bool((losses[1] < losses[0]).all()))


class TestAnyRule(unittest.TestCase):
    rules = [("classifier", ClassifierGuidance, 0.7), ("representation", RepresentationGuidance, 50.0)]

    def setUp(self) -> None:
        self.net, self.x = tiny_unet().double(), randn(3, 1, 8, 8)
        self.inferer = JointDiffusionInferer(one_step())

    @parameterized.expand(rules)
    def test_scale_zero_is_no_guidance(self, _: str, rule: type[Guidance], scale: float) -> None:
        options = {"class_labels": 1, "guidance_scale": 2.0}
        unguided = self.inferer.sample(self.x, self.net, **options)
        guided = self.inferer.sample(self.x, self.net, guidance=rule(0, scale=0.0), **options)
        torch.testing.assert_close(guided.image, unguided.image)

    @parameterized.expand(rules)
    def test_images_do_not_feel_their_neighbours(self, _: str, rule: type[Guidance], scale: float) -> None:
        options = {"guidance_scale": 2.0}
        together = self.inferer.sample(
            self.x, self.net, class_labels=torch.tensor([0, 1, 2]), guidance=rule([1, 2, 0], scale), **options
        ).image
        for i, (label, target) in enumerate(((0, 1), (1, 2), (2, 0))):
            alone = self.inferer.sample(
                self.x[i : i + 1], self.net, class_labels=label, guidance=rule(target, scale), **options
            ).image
            torch.testing.assert_close(alone[0], together[i])

    @parameterized.expand(rules)
    def test_interval(self, _: str, rule: type[Guidance], scale: float) -> None:
        scheduler = DDIMGridScheduler()
        scheduler.set_grid([400, 300, 200])
        inferer = JointDiffusionInferer(scheduler)
        guided, plain = (
            inferer.sample(self.x, self.net, guidance=g, guidance_interval=(250, 350), intermediate_steps=1)
            for g in (rule(1, scale), None)
        )
        # it starts at 300: the first step is the same, from the second on they differ
        torch.testing.assert_close(guided.intermediates[0], plain.intermediates[0])
        self.assertFalse(torch.allclose(guided.intermediates[1], plain.intermediates[1]))
        self.assertEqual(guided.network_calls, 4 if rule is ClassifierGuidance else 3)

    @parameterized.expand(rules)
    def test_wrapped_network_in_training_mode(self, _: str, rule: type[Guidance], scale: float) -> None:
        net = tiny_unet(dropout=0.5, head_dropout=0.5).double().train()
        images = [
            self.inferer.sample(self.x, network, guidance=rule(1, scale)).image
            for network in (net, net, nn.DataParallel(net))
        ]
        self.assertTrue(torch.equal(images[0], images[1]))
        self.assertTrue(torch.equal(images[0], images[2]))
        self.assertTrue(net.training)

    def test_own_rule(self) -> None:
        class Constant(Guidance):
            def __call__(self, step: GuidanceStep) -> torch.Tensor:
                return torch.full_like(step.sample, self.scale)

        alpha, sigma = (float(v) for v in one_step().alpha_sigma(400, self.x))
        result = self.inferer.sample(self.x, self.net, guidance=Constant(0, 0.5))
        torch.testing.assert_close(result.image, (self.x - sigma * 0.5) / alpha)

    @parameterized.expand(
        [
            ("float", torch.tensor([1.0])),
            ("bool", torch.tensor([True])),
            ("matrix", torch.zeros(2, 2, dtype=torch.int64)),
        ]
    )
    def test_target_that_is_no_index(self, _: str, target: torch.Tensor) -> None:
        with self.assertRaisesRegex(ValueError, "ClassifierGuidance: target must be a class index"):
            ClassifierGuidance(target)

    @parameterized.expand(
        [
            ("unknown", {"target": 3}, r"target must lie in \[0, 2\], the network has 3 classes, got 3"),
            ("negative", {"target": -1}, r"target must lie in \[0, 2\]"),
            ("count", {"target": [0, 1]}, "targets of shape \\(2,\\) for 3 images"),
            ("remove", {"target": 1, "enforce": False}, "enforce=False needs a multi-label network"),
        ]
    )
    def test_target_that_does_not_fit(self, _: str, options: dict, message: str) -> None:
        for rule in (ClassifierGuidance, RepresentationGuidance):
            with self.assertRaisesRegex(ValueError, f"{rule.__name__}: {message}"):
                self.inferer.sample(self.x, self.net, guidance=rule(**options))

    def test_network_without_a_head(self) -> None:
        net = GaussianNetwork(one_step(), 0.0, 1.0)
        with self.assertRaisesRegex(TypeError, "lacks .*'num_classes'.* got GaussianNetwork"):
            self.inferer.sample(self.x, net, guidance=ClassifierGuidance(0))
        with self.assertRaisesRegex(TypeError, "lacks .*'head'.* got LinearJoint"):
            self.inferer.sample(self.x, LinearJoint(one_step()), guidance=RepresentationGuidance(0))

    @parameterized.expand([("direct", False), ("wrapped", True)])
    def test_representation_guidance_refuses_a_head_of_maxima(self, _: str, wrapped: bool) -> None:
        net: nn.Module = tiny_unet(head="standardized").double()
        net = nn.DataParallel(net) if wrapped else net
        with self.assertRaisesRegex(ValueError, "RepresentationGuidance: .*head='mediffusion'"):
            self.inferer.sample(self.x, net, guidance=RepresentationGuidance(0))
        self.assertEqual(len(self.inferer.sample(self.x, net, guidance=ClassifierGuidance(0)).image), 3)

    def test_inference_mode(self) -> None:
        with torch.inference_mode(), self.assertRaisesRegex(RuntimeError, "needs gradients"):
            self.inferer.sample(self.x, self.net, guidance=ClassifierGuidance(0))

    def test_loss_repeats_targets_for_both_halves_of_the_batch(self) -> None:
        logits = randn(4, 3)
        rule = ClassifierGuidance([1, 2])
        expected = -logits.log_softmax(1)[torch.arange(4), torch.tensor([1, 2, 1, 2])].sum()
        torch.testing.assert_close(rule.loss(logits, multi_label=False), expected)


if __name__ == "__main__":
    unittest.main()
