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
from types import SimpleNamespace

import torch
from parameterized import parameterized
from torch import nn

from monai_jointdiff.handlers import GradientClipping, NonFiniteGuard
from monai_jointdiff.losses import JointDiffusionLoss
from tests.engines.small_run import items, small_run, use_one_thread


def setUpModule() -> None:
    use_one_thread()


def fake_engine(**state) -> SimpleNamespace:
    names = ["a.png", "b.png", "c.png"]
    batch = {"name": names, "image": torch.zeros(3, 1, 4, 4), "label": torch.zeros(3)}
    defaults = {"iteration": 12, "epoch": 2, "epoch_length": 8, "batch": batch, "output": {"pred": None}}
    return SimpleNamespace(state=SimpleNamespace(**{**defaults, **state}), accumulation_steps=1)


class TestGradientClipping(unittest.TestCase):
    @parameterized.expand([(5.0, 0.2), (0.5, 1.0)])
    def test_norm(self, length, factor):
        # gradients (3, 0) and (0, 4) / 5 * length have the norm `length` together
        network = nn.ParameterList([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))])
        gradients = [torch.tensor([0.6, 0.0]) * length, torch.tensor([0.0, 0.8]) * length]
        for parameter, gradient in zip(network, gradients, strict=True):
            parameter.grad = gradient.clone()
        clipping = GradientClipping(1.0, network)
        clipping(fake_engine())
        self.assertAlmostEqual(clipping.norm, length, places=5)
        for parameter, gradient in zip(network, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient * factor, rtol=1e-4, atol=0)

    def test_waits_for_accumulated_gradients(self):
        parameter = nn.Parameter(torch.zeros(1))
        parameter.grad = torch.full((1,), 8.0)
        clipping = GradientClipping(1.0, nn.ParameterList([parameter]))
        engine = fake_engine(iteration=1)
        engine.accumulation_steps = 2
        clipping(engine)
        self.assertEqual(float(parameter.grad), 8.0)
        engine.state.iteration = 2
        clipping(engine)
        self.assertAlmostEqual(float(parameter.grad), 1.0, places=5)

    def test_not_finite(self):
        parameter = nn.Parameter(torch.zeros(1))
        parameter.grad = torch.full((1,), float("inf"))
        with self.assertRaisesRegex(FloatingPointError, r"norm is inf at step 12 \(epoch 2\), images .*a.png.*c.png"):
            GradientClipping(1.0, nn.ParameterList([parameter]))(fake_engine())

    def test_wrong_input(self):
        with self.assertRaisesRegex(ValueError, "max_norm must be > 0, got 0"):
            GradientClipping(0, nn.Linear(1, 1))


class TestNonFiniteGuard(unittest.TestCase):
    def guard(self, **terms) -> NonFiniteGuard:
        loss = JointDiffusionLoss()
        loss.terms = {name: torch.tensor(value) for name, value in terms.items()}
        return NonFiniteGuard(loss)

    def test_finite(self):
        self.guard(diffusion=1.0, classification=0.5, total=1.5)(fake_engine())

    def test_names_term_and_step(self):
        guard = self.guard(diffusion=1.0, classification=float("inf"), total=float("nan"))
        message = r"classification = inf, total = nan at step 12 \(epoch 2\); images of this batch: a.png, b.png, c.png"
        with self.assertRaisesRegex(FloatingPointError, message):
            guard(fake_engine())

    def test_names_images_with_broken_pixels(self):
        engine = fake_engine()
        engine.state.batch["image"][1, 0, 2, 2] = float("nan")
        with self.assertRaisesRegex(FloatingPointError, "images whose pixels are not finite: b.png"):
            self.guard(diffusion=float("nan"), total=float("nan"))(engine)

    def test_names_images_with_broken_outputs(self):
        prediction = torch.zeros(3, 1, 4, 4)
        prediction[2, 0, 0, 0] = float("inf")
        engine = fake_engine(output={"pred": (torch.zeros(2, 3), prediction)})
        with self.assertRaisesRegex(FloatingPointError, "images whose network outputs are not finite: c.png"):
            self.guard(diffusion=float("inf"), total=float("inf"))(engine)

    def test_in_training(self):
        data = items([0, 1, 2, -1, 0, 2])
        data[4]["image"][0, 3, 3] = float("nan")
        with tempfile.TemporaryDirectory() as folder:
            run = small_run(Path(folder), data=data)
            before = [weight.detach().clone() for weight in run.network.parameters()]
            with self.assertRaisesRegex(FloatingPointError, "diffusion = nan.* at step 1 .*not finite: image_4.png"):
                run.trainer.run()
            for weight, kept in zip(run.network.parameters(), before, strict=True):
                self.assertTrue(torch.equal(weight, kept))  # the step did not reach the weights


if __name__ == "__main__":
    unittest.main()
