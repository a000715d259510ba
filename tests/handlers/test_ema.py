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
from ignite.engine import Engine
from parameterized import parameterized
from torch import nn

from monai_jointdiff.handlers import ExponentialMovingAverage
from monai_jointdiff.networks import JointDiffusionUNet


def scalar_network(value: float) -> nn.Module:
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)).double()
    nn.init.constant_(network[0].weight, value)
    return network


def weight(network: nn.Module) -> float:
    return network[0].weight.item()


class TestExponentialMovingAverage(unittest.TestCase):
    def test_equals_its_definition(self):
        network = scalar_network(1.0)
        average = ExponentialMovingAverage(network, decay=0.6, warmup=3)
        expected = 1.0
        for iteration in range(1, 9):
            value = float(iteration**2)
            nn.init.constant_(network[0].weight, value)
            decay = min(0.6, (1 + iteration) / (3 + iteration))
            expected = decay * expected + (1 - decay) * value
            average.update(iteration)
            self.assertAlmostEqual(weight(average.ema_model), expected, places=12)
            self.assertEqual(average.iteration, iteration)

    @parameterized.expand([(10.0, 1e-20), (100.0, 1e-9)])
    def test_warm_up_fits_a_thousand_steps(self, warmup, largest_share):
        # weights of 0 from the first step on: what is left of the initial 1 is its share
        network = scalar_network(1.0)
        average = ExponentialMovingAverage(network, decay=0.999, warmup=warmup)
        nn.init.zeros_(network[0].weight)
        shares = []
        for iteration in range(1, 1001):
            average.update(iteration)
            shares.append(weight(average.ema_model))
        self.assertLess(shares[-1], largest_share)
        # closed form of prod (1 + i) / (w + i) = (n + 1)! w! / (n + w)!
        logarithm = torch.lgamma(torch.tensor([1002.0, warmup + 1, 1001 + warmup]).double())
        self.assertAlmostEqual(shares[-1] / float((logarithm[0] + logarithm[1] - logarithm[2]).exp()), 1.0, places=9)

    def test_decay_is_bounded(self):
        average = ExponentialMovingAverage(scalar_network(1.0), decay=0.99)
        decays = [average.decay_at(i) for i in range(1, 3000)]
        self.assertEqual(decays, sorted(decays))
        self.assertAlmostEqual(decays[0], 2 / 11)
        self.assertEqual(decays[-1], 0.99)

    def test_handler_starts_from_the_weights_of_the_run(self):
        network = scalar_network(1.0)
        average = ExponentialMovingAverage(network, decay=0.9)
        nn.init.constant_(network[0].weight, 7.0)  # pretrained weights loaded after the handler was made
        engine = Engine(lambda engine, batch: None)
        average.attach(engine)
        engine.run([0, 1, 2])
        self.assertEqual(weight(average.ema_model), 7.0)
        self.assertEqual(average.iteration, 3)

    def test_state_goes_on_exactly(self):
        network = scalar_network(1.0)
        one, other = ExponentialMovingAverage(network), ExponentialMovingAverage(network)
        for iteration in (1, 2):
            nn.init.constant_(network[0].weight, 5.0 * iteration)
            one.update(iteration)
        other.load_state_dict(one.state_dict(), iteration=2)
        self.assertEqual(other.iteration, 2)
        for average in (one, other):
            average.update(3)
        self.assertEqual(weight(one.ema_model), weight(other.ema_model))

    def test_copy_is_apart(self):
        network = scalar_network(2.0)
        average = ExponentialMovingAverage(network)
        self.assertFalse(average.ema_model.training)
        self.assertFalse(any(p.requires_grad for p in average.ema_model.parameters()))
        network.train()
        network(torch.randn(8, 1).double() + 3)  # moves the running mean
        average.update(1)
        # like the weights the running mean goes from its initial 0 toward the present one; counters are copied
        expected = (1 - average.decay_at(1)) * network[1].running_mean
        torch.testing.assert_close(average.ema_model[1].running_mean, expected)
        self.assertEqual(average.ema_model[1].num_batches_tracked, network[1].num_batches_tracked)
        self.assertEqual(set(average.state_dict()), set(network.state_dict()))

    def test_covers_the_class_embedding_and_everything_else(self):
        network = JointDiffusionUNet(
            2,
            1,
            1,
            3,
            num_res_blocks=1,
            channels=(4, 4),
            attention_levels=(False, True),
            norm_num_groups=2,
            num_head_channels=2,
            class_conditional=True,
        )
        average = ExponentialMovingAverage(network, decay=0.5, warmup=1)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1.0)
        average.update(1)
        learned = {name for name, _ in network.named_parameters()}
        self.assertIn("class_embedding.weight", learned)
        for name in learned:
            torch.testing.assert_close(average.state_dict()[name], before[name] + 0.5)

    def test_accumulated_steps(self):
        # the average moves only when the optimizer does: iterations 2, 4 and the last, 5
        network, moves = scalar_network(1.0), []
        average = ExponentialMovingAverage(network)
        engine = Engine(lambda engine, batch: None)
        engine.accumulation_steps = 2
        average.update = moves.append  # type: ignore[method-assign]
        average.attach(engine)
        engine.run(range(5), max_epochs=2)
        self.assertEqual(moves, [2, 4, 5, 7, 9, 10])

    @parameterized.expand([({"decay": 1.0}, r"decay must be in \[0, 1\)"), ({"warmup": 0.5}, "warmup must be >= 1")])
    def test_wrong_input(self, options, message):
        with self.assertRaisesRegex(ValueError, message):
            ExponentialMovingAverage(scalar_network(1.0), **options)


if __name__ == "__main__":
    unittest.main()
