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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from parameterized import parameterized
from torch import Tensor, nn

from monai_jointdiff.losses import JointDiffusionLoss

CLASS_WEIGHTS = [0.5, 1.0, 4.0]


class Output(NamedTuple):
    logits: Tensor | None
    prediction: Tensor | None


def random_case(spatial_dims: int, labels: list[int]) -> tuple[Output, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    n, shape = len(labels), (2, *(4 + d for d in range(spatial_dims)))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    output = Output(normal(n, 3).requires_grad_(), normal(n, *shape).requires_grad_())
    return output, {"label": torch.tensor(labels), "target": normal(n, *shape), "weight": normal(n).abs()}


class TestTerms(unittest.TestCase):
    @parameterized.expand([(2,), (3,)])
    def test_hand_computed(self, spatial_dims):
        output, targets = random_case(spatial_dims, [2, -1, 0, 1, -1])
        loss = JointDiffusionLoss(classification_weight=0.3)
        total = loss(output, targets)
        diffusion = sum(
            float(targets["weight"][n]) * float(((output.prediction[n].detach() - targets["target"][n]) ** 2).sum())
            for n in range(5)
        ) / (5 * output.prediction[0].numel())
        classification = -sum(output.logits[n].log_softmax(0)[c].item() for n, c in ((0, 2), (2, 0), (3, 1))) / 3
        self.assertAlmostEqual(float(loss.terms["diffusion"]), diffusion, places=12)
        self.assertAlmostEqual(float(loss.terms["classification"]), classification, places=12)
        self.assertAlmostEqual(float(total), diffusion + 0.3 * classification, places=12)
        self.assertEqual(float(loss.terms["total"]), float(total))
        self.assertEqual(list(loss.terms), ["diffusion", "classification", "total"])
        self.assertFalse(any(term.requires_grad for term in loss.terms.values()))
        self.assertEqual((total.ndim, total.dtype), (0, torch.float64))

    @parameterized.expand([(weights, smoothing) for weights in (None, CLASS_WEIGHTS) for smoothing in (0.0, 0.1)])
    def test_equals_cross_entropy(self, weights, smoothing):
        output, targets = random_case(2, [2, -1, 0, 1, 2])
        loss = JointDiffusionLoss(class_weights=weights, label_smoothing=smoothing)
        torch_weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        known = targets["label"] >= 0
        expected = F.cross_entropy(
            output.logits[known], targets["label"][known], torch_weights, label_smoothing=smoothing, reduction="none"
        ).mean()
        torch.testing.assert_close(loss.classification(output.logits, targets["label"]), expected)
        # labels of -1 have no influence at all
        only_known = loss.classification(output.logits[known], targets["label"][known])
        torch.testing.assert_close(only_known, expected)

    def test_every_class_has_its_weight_however_the_batches_fall(self):
        # twelve images in batches of two: most batches are of one class, and their mean is still the loss of all
        labels = torch.tensor([0] * 9 + [1] * 2 + [2])
        weights = len(labels) / (3 * torch.bincount(labels))
        loss = JointDiffusionLoss(class_weights=weights)
        logits = torch.zeros(12, 3, dtype=torch.float64, requires_grad=True)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        batches = [loss.classification(logits[rows], labels[rows]) for rows in order.split(2)]
        torch.testing.assert_close(sum(batches) / 6, loss.classification(logits, labels))
        sum(batches).backward()
        pull = [float(logits.grad[labels == k, k].sum()) for k in range(3)]  # of the images of each class on their own
        torch.testing.assert_close(pull, [pull[0]] * 3)

    @parameterized.expand([(None, 0.0), ([0.5, 1.0, 4.0], 0.0), (None, 0.2)])
    def test_equals_binary_cross_entropy_of_known_entries(self, weights, smoothing):
        logits = random_case(2, [0] * 4)[0].logits
        label = torch.tensor([[1, 0, -1], [-1, -1, -1], [0, 1, 1], [-1, 1, 0]], dtype=torch.float64)
        loss = JointDiffusionLoss(multi_label=True, class_weights=weights, label_smoothing=smoothing)
        positive = torch.ones(3).double() if weights is None else torch.tensor(weights).double()
        known = label >= 0
        smooth = torch.where(label == 1, 1 - smoothing / 2, smoothing / 2).double()
        expected = F.binary_cross_entropy_with_logits(
            logits[known], smooth[known], pos_weight=positive.expand(4, 3)[known]
        )
        torch.testing.assert_close(loss.classification(logits, label), expected)
        if smoothing == 0.0 and weights is None:
            by_hand = -torch.where(label == 1, logits.sigmoid().log(), (1 - logits.sigmoid()).log())[known].mean()
            torch.testing.assert_close(expected, by_hand)

    @parameterized.expand([(False,), (True,)])
    def test_nothing_labelled(self, multi_label):
        output, targets = random_case(2, [-1, -1])
        if multi_label:
            targets["label"] = -torch.ones(2, 3)
        head = nn.Linear(3, 3).double()
        loss = JointDiffusionLoss(class_weights=CLASS_WEIGHTS, multi_label=multi_label)
        total = loss((head(output.logits), output.prediction), targets)
        total.backward()
        self.assertEqual(float(loss.terms["classification"]), 0.0)
        self.assertEqual(float(total), float(loss.terms["diffusion"]))
        for parameter in head.parameters():  # zero, not None: DistributedDataParallel waits for every parameter
            self.assertIsNotNone(parameter.grad)
            self.assertEqual(float(parameter.grad.abs().max()), 0.0)

    def test_weight_zero_keeps_the_head_in_the_graph(self):
        output, targets = random_case(2, [0, 1])
        JointDiffusionLoss(classification_weight=0.0)(output, targets).backward()
        self.assertEqual(float(output.logits.grad.abs().max()), 0.0)

    def test_gradients(self):
        # of the logits: alpha (softmax - one-hot) / labelled; of the prediction: 2 w (prediction - target) / size
        output, targets = random_case(2, [2, -1])
        JointDiffusionLoss(classification_weight=0.3)(output, targets).backward()
        expected = 0.3 * (output.logits.softmax(1) - F.one_hot(torch.tensor([2, 0]), 3)) * torch.tensor([[1.0], [0.0]])
        torch.testing.assert_close(output.logits.grad, expected)
        error = output.prediction - targets["target"]
        expected = 2 * targets["weight"].reshape(2, 1, 1, 1) * error / error.numel()
        torch.testing.assert_close(output.prediction.grad, expected)


class TestSingleTasks(unittest.TestCase):
    @parameterized.expand([("prediction",), ("logits",)])
    def test_half_missing(self, kept):
        output, targets = random_case(2, [2, -1, 0])
        loss = JointDiffusionLoss(classification_weight=0.3)
        loss(output, targets)
        both = loss.terms
        term = {"prediction": "diffusion", "logits": "classification"}[kept]
        factor = {"prediction": 1.0, "logits": 0.3}[kept]
        half = Output(**{"logits": None, "prediction": None, kept: getattr(output, kept)})
        self.assertAlmostEqual(float(loss(half, targets)), factor * float(both[term]), places=12)
        self.assertEqual(set(loss.terms), {term, "total"})
        # the same from a bare tensor and the targets of that task
        keys = {"prediction": ("target", "weight"), "logits": ("label",)}[kept]
        bare = loss(getattr(output, kept), {key: targets[key] for key in keys})
        self.assertAlmostEqual(float(bare), factor * float(both[term]), places=12)

    def test_other_batch_size_of_the_clean_half(self):
        output, targets = random_case(2, [2, -1, 0])
        loss = JointDiffusionLoss()
        loss((output.logits[:2], output.prediction), {**targets, "label": targets["label"][:2]})
        expected = F.cross_entropy(output.logits[:1], targets["label"][:1])
        torch.testing.assert_close(loss.terms["classification"], expected.detach())


class TestWrongInput(unittest.TestCase):
    @parameterized.expand(
        [
            ({"classification_weight": -1.0}, "classification_weight must be >= 0"),
            ({"classification_weight": float("nan")}, "classification_weight must be >= 0"),
            ({"label_smoothing": 1.0}, "label_smoothing must be in"),
            ({"class_weights": [1.0, 0.0]}, "class_weights must be K positive numbers"),
            ({"class_weights": [[1.0]]}, "class_weights must be K positive numbers"),
        ]
    )
    def test_options(self, options, message):
        with self.assertRaisesRegex(ValueError, message):
            JointDiffusionLoss(**options)

    @parameterized.expand(
        [
            ({}, {"label": torch.tensor([0, 3])}, r"label 3 is out of range, it must be -1 .* or a class from 0 to 2"),
            ({}, {"label": torch.tensor([0, -2])}, "label -2 is out of range"),
            ({}, {"label": torch.tensor([0.0, 1.0])}, "must be int64, got torch.float32"),
            ({}, {"label": torch.tensor([0])}, r"logits must be \(M, K\) and label \(M,\), got \(2, 3\) and \(1,\)"),
            ({"multi_label": True}, {}, r"label \(M, K\)"),
            ({"multi_label": True}, {"label": torch.full((2, 3), 2.0)}, "label 2.0 is out of range"),
            ({"multi_label": True}, {"label": torch.full((2, 3), float("nan"))}, "label nan is out of range"),
            ({"class_weights": [1.0, 2.0]}, {}, "2 class_weights were given for 3 classes"),
            ({}, {"target": torch.zeros(2, 2, 4, 4)}, "prediction and target must have one shape"),
            ({}, {"weight": torch.ones(1)}, r"weight \(N,\)"),
        ]
    )
    def test_targets(self, options, changes, message):
        output, targets = random_case(2, [0, 1])
        with self.assertRaisesRegex(ValueError, message):
            JointDiffusionLoss(**options)(output, {**targets, **changes})

    def test_output(self):
        output, targets = random_case(2, [0, 1])
        loss = JointDiffusionLoss()
        with self.assertRaisesRegex(TypeError, r"must be \(logits, prediction\), got dict"):
            loss({"logits": output.logits}, targets)
        with self.assertRaisesRegex(ValueError, "neither logits nor a prediction"):
            loss((None, None), targets)
        with self.assertRaisesRegex(ValueError, "either 'target' or 'label'"):
            loss(output.prediction, targets)
        with self.assertRaisesRegex(ValueError, "the targets lack 'weight'"):
            loss(output, {"label": targets["label"], "target": targets["target"]})


if __name__ == "__main__":
    unittest.main()
