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

import numpy as np
import torch
from ignite.engine import Engine
from monai.handlers import IgniteMetricHandler
from monai.metrics import MSEMetric
from parameterized import parameterized

from monai_jointdiff.metrics import DenoisingErrorMetric, MacroAUCMetric, area_under_roc


def run(metric, batches, decollate: bool):
    """Let an ignite engine feed the batches to the metric, as a validation does."""

    def step(engine, batch):
        return tuple(list(part) for part in batch) if decollate else batch

    engine = Engine(step)
    IgniteMetricHandler(metric, save_details=False).attach(engine, "metric")
    return engine.run(batches).metrics["metric"]


def in_batches(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    return list(zip(*[tensor.split([5, 17, 8]) for tensor in tensors], strict=True))


class TestMacroAUCMetric(unittest.TestCase):
    def setUp(self):
        generator = torch.Generator().manual_seed(0)
        self.logits = torch.randn(30, 3, generator=generator)
        self.labels = torch.arange(30) % 3
        self.logits[torch.arange(30), self.labels] += 1

    @parameterized.expand([(True,), (False,)])
    def test_multi_class_through_an_engine(self, decollate):
        labels = self.labels.clone()
        labels[::7] = -1
        value = run(MacroAUCMetric(), in_batches(self.logits, labels), decollate)
        known, p = labels >= 0, self.logits.softmax(1)
        areas = [area_under_roc(p[known, k], (labels[known] == k).long()) for k in range(3)]
        self.assertAlmostEqual(value, np.mean(areas), places=12)

    @parameterized.expand([(True,), (False,)])
    def test_multi_label_through_an_engine(self, decollate):
        labels = torch.nn.functional.one_hot(self.labels, 3).float()
        labels[::4, 1] = -1
        value = run(MacroAUCMetric(multi_label=True), in_batches(self.logits, labels), decollate)
        areas = [area_under_roc(self.logits[:, k], labels[:, k]) for k in range(3)]
        self.assertAlmostEqual(value, np.mean(areas), places=12)

    def test_binary_equals_the_area_of_the_difference_of_logits(self):
        labels = (self.labels > 0).long()
        metric = MacroAUCMetric()
        metric(self.logits[:, :2], labels)
        self.assertAlmostEqual(metric.aggregate(), area_under_roc(self.logits[:, 1] - self.logits[:, 0], labels))
        metric.reset()
        metric(self.logits[:3, :2], torch.ones(3, dtype=torch.long))
        self.assertTrue(np.isnan(metric.aggregate()))

    def test_probabilities_are_taken_as_they_are(self):
        from_logits, from_probabilities = MacroAUCMetric(), MacroAUCMetric(from_logits=False)
        from_logits(self.logits, self.labels)
        from_probabilities(self.logits.softmax(1), self.labels)
        self.assertAlmostEqual(from_logits.aggregate(), from_probabilities.aggregate(), places=6)

    def test_wrong_shapes(self):
        with self.assertRaisesRegex(ValueError, r"MacroAUCMetric: predictions \(N, K\) and labels \(N,\)"):
            MacroAUCMetric()(self.logits, self.labels[:, None])
        with self.assertRaisesRegex(ValueError, r"labels \(N, K\)"):
            MacroAUCMetric(multi_label=True)(self.logits, self.labels)


class TestDenoisingErrorMetric(unittest.TestCase):
    @parameterized.expand([((4, 5), True), ((4, 5), False), ((2, 3, 4), True), ((2, 3, 4), False)])
    def test_mean_over_images_whatever_the_batches(self, size, decollate):
        generator = torch.Generator().manual_seed(0)
        prediction, target = torch.randn(2, 30, 2, *size, generator=generator)
        value = run(DenoisingErrorMetric(), in_batches(prediction, target), decollate)
        self.assertAlmostEqual(value, torch.nn.functional.mse_loss(prediction, target).item(), places=6)
        theirs = MSEMetric()
        theirs(prediction, target)
        self.assertAlmostEqual(value, theirs.aggregate().item(), places=6)

    def test_wrong_shapes(self):
        with self.assertRaisesRegex(ValueError, "DenoisingErrorMetric: prediction and target of one shape"):
            DenoisingErrorMetric()(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 5))


if __name__ == "__main__":
    unittest.main()
