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
from parameterized import parameterized
from torch import nn

from monai_jointdiff.networks import HEADS, ClassifierHead, FeatureStandardization


def shapes_of(head: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(m.weight.shape) for m in head.modules() if isinstance(m, nn.Linear)]


class TestClassifierHead(unittest.TestCase):
    @parameterized.expand([((5, 7),), ((3, 4, 5),)])
    def test_linear_head_is_an_affine_map_of_the_averages(self, size):
        torch.manual_seed(0)
        head = ClassifierHead((2, 3), 4, variant="linear")
        maps = [torch.randn(6, 2, *size), torch.randn(6, 3, *(1,) * len(size))]
        averages = torch.stack(
            [m.flatten(2)[:, c].sum(-1) / m[0, 0].numel() for m in maps for c in range(m.shape[1])], 1
        )
        weight, bias = head.layers[1].weight, head.layers[1].bias
        torch.testing.assert_close(head(maps), averages @ weight.T + bias)

    @parameterized.expand([(name,) for name in HEADS])
    def test_logits_do_not_depend_on_size_or_on_the_batch(self, variant):
        torch.manual_seed(0)
        head = ClassifierHead((8, 16), 3, variant).eval()
        a, b = torch.randn(5, 8), torch.randn(5, 16)

        def constant(z, *size):
            return z.reshape(*z.shape, *(1,) * len(size)).expand(*z.shape, *size)

        logits = head([constant(a, 8, 8), constant(b, 4, 4)])
        self.assertEqual(logits.shape, (5, 3))
        torch.testing.assert_close(logits, head([constant(a, 3, 5, 2), constant(b, 2, 1, 7)]))
        torch.testing.assert_close(logits[2:3], head([constant(a[2:3], 8, 8), constant(b[2:3], 4, 4)]))

    @parameterized.expand([(name,) for name in HEADS])
    def test_features_are_what_the_last_layer_sees(self, variant):
        torch.manual_seed(0)
        head = ClassifierHead((8, 16), 3, variant).eval()
        maps = [torch.randn(5, 8, 4, 4), torch.randn(5, 16, 2, 2)]
        features, logits = head.features(maps)
        last = head.layers[-1]
        self.assertEqual(features.shape, (5, last.in_features))
        torch.testing.assert_close(features @ last.weight.T + last.bias, logits)
        torch.testing.assert_close(logits, head(maps), rtol=0, atol=0)
        with self.assertRaisesRegex(ValueError, "ClassifierHead: got 1 feature maps, expected 2"):
            head.features(maps[:1])

    def test_standardization_equals_batch_normalization(self):
        torch.manual_seed(0)
        ours, reference = FeatureStandardization(6).double(), nn.BatchNorm1d(6).double()
        for module in (ours, reference):
            nn.init.uniform_(module.weight, generator=torch.Generator().manual_seed(1))
        for step in range(4):
            z = (torch.randn(5 + step, 6, dtype=torch.float64) * 0.01 + 3).requires_grad_()
            results = []
            for module in (ours, reference):
                out = module(z)
                results.append((out, *torch.autograd.grad(out.pow(3).sum(), [z, module.weight, module.bias])))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)
        torch.testing.assert_close(ours.running_mean, reference.running_mean)
        torch.testing.assert_close(ours.running_var, reference.running_var)
        z = torch.randn(1, 6, dtype=torch.float64)
        expected = reference.eval()(z)
        torch.testing.assert_close(ours(z), expected)  # one image in training: running statistics
        torch.testing.assert_close(ours.eval()(z), expected)

    def test_standardized_head_sees_average_and_maximum(self):
        torch.manual_seed(0)
        head = ClassifierHead((2,), 3, "standardized").eval()
        x = torch.zeros(1, 2, 4, 4)
        x[0, :, 0, 0], x[0, :, 1, 1] = 1.0, -1.0  # average 0, maximum 1
        y = torch.zeros(1, 2, 4, 4)  # average 0, maximum 0
        first = head.layers[2].weight  # (128, 4): two averages, two maxima
        with torch.no_grad():
            first[:, :2] = 0
        self.assertFalse(torch.allclose(head([x]), head([y])))
        with torch.no_grad():
            first[:, 2:] = 0
            first[:, :2] = 1
        torch.testing.assert_close(head([x]), head([y]))

    def test_published_widths(self):
        # JointDiffusion at 32 px: 29 maps of 128 channels, half of it in the middle; Mediffusion: 5632 to 1024
        joint = ClassifierHead([128] * 29, 10, "jointdiffusion")
        self.assertEqual(shapes_of(joint), [(1856, 3712), (10, 1856)])
        self.assertEqual([m.p for m in joint.modules() if isinstance(m, nn.Dropout)], [0.7, 0.7])
        mediffusion = ClassifierHead([5632], 14, "mediffusion")
        self.assertEqual(shapes_of(mediffusion), [(1024, 5632), (14, 1024)])
        self.assertEqual([m.p for m in mediffusion.modules() if isinstance(m, nn.Dropout)], [0.3, 0.3])

    def test_options_replace_the_published_values(self):
        head = ClassifierHead([8], 2, "jointdiffusion", hidden=5, dropout=0.0)
        self.assertEqual(shapes_of(head), [(5, 8), (2, 5)])
        x = torch.randn(3, 8, 4, 4)
        torch.testing.assert_close(head.train()([x]), head.eval()([x]))

    def test_no_batch_normalization(self):
        for variant in HEADS:
            kinds = [type(m).__name__ for m in ClassifierHead([8], 2, variant).modules()]
            self.assertFalse([k for k in kinds if "BatchNorm" in k])

    def test_logits_keep_single_precision_under_autocast(self):
        torch.manual_seed(0)
        head = ClassifierHead([8], 2, "mediffusion").eval()
        x = torch.randn(3, 8, 4, 4).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            logits = head([x])
        self.assertEqual(logits.dtype, torch.float32)
        torch.testing.assert_close(logits, head([x.float()]))

    @parameterized.expand(
        [
            ({"variant": "resnet"}, "unknown head 'resnet'"),
            ({"variant": "linear", "hidden": 4}, "no hidden layer"),
            ({"hidden": 0}, "hidden must be a positive width"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ]
    )
    def test_wrong_arguments(self, arguments, message):
        with self.assertRaisesRegex(ValueError, message):
            ClassifierHead([8], 2, **arguments)

    def test_wrong_number_of_maps(self):
        with self.assertRaisesRegex(ValueError, "got 1 feature maps, expected 2"):
            ClassifierHead([8, 8], 2)([torch.zeros(1, 8, 2, 2)])


if __name__ == "__main__":
    unittest.main()
