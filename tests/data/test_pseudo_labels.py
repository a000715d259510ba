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

"""Pseudo-labels: what a labeller may return, and the table of a training."""

from __future__ import annotations

import unittest
from typing import Any

import numpy as np
import torch
from parameterized import parameterized

from monai_jointdiff.data import (
    LabelledFeatures,
    PseudoLabels,
    PseudoLabelTable,
    ShuffledOrder,
    TwoStreamOrder,
    UnlabelledFeatures,
)

LABELS = [0, -1, 2, -1, -1, -1]
FINDINGS = [[1, -1], [-1, -1], [0, 1], [-1, -1]]


def table(labels: Any = LABELS, num_classes: int = 3) -> PseudoLabelTable:
    return PseudoLabelTable(labels, num_classes, ShuffledOrder(len(labels), seed=1))


def found(weights: list[float], anchors: list[bool], num_classes: int = 3) -> PseudoLabels:
    """Labels that differ in every entry; those of weight 0 are no probabilities at all."""
    weight = np.array(weights)
    labels = np.arange(1, 1 + len(weights) * num_classes).reshape(-1, num_classes) / (1 + len(weights) * num_classes)
    return PseudoLabels(np.where(weight[:, None] > 0, labels, np.nan), weight, np.array(anchors))


class TestTable(unittest.TestCase):
    def test_before_the_first_round(self) -> None:
        ours = table()
        indices, labels = ours.anchor_labels()
        self.assertEqual(indices.tolist(), [0, 2])
        self.assertEqual(labels.tolist(), [[1, 0, 0], [0, 0, 1]])
        self.assertEqual(ours.waiting().tolist(), [1, 3, 4, 5])
        probabilities, weights = ours.of_draws(torch.arange(30))
        self.assertEqual((probabilities.shape, float(probabilities.sum()), float(weights.sum())), ((30, 3), 0, 0))

    def test_rounds_add_up(self) -> None:
        ours = table()
        first = found([0.0, 1.0, 0.5, 0.0], [False, True, False, False])
        ours.add(ours.waiting(), first)
        self.assertEqual(ours.waiting().tolist(), [1, 5])
        indices, labels = ours.anchor_labels()
        self.assertEqual(indices.tolist(), [0, 2, 3])
        np.testing.assert_allclose(labels[2], first.probabilities[1], atol=1e-7)
        second = found([1.0, 1.0], [False, False])
        ours.add(ours.waiting(), second)
        self.assertEqual(len(ours.waiting()), 0)
        self.assertEqual(ours.weights.tolist(), [0, 1, 0, 1, 0.5, 1])
        for row, source in ((3, first.probabilities[1]), (4, first.probabilities[2]), (5, second.probabilities[1])):
            np.testing.assert_allclose(ours.probabilities[row], source, atol=1e-7)

    def test_is_asked_by_draw(self) -> None:
        order = TwoStreamOrder(LABELS, seed=3, unlabelled_per_labelled=2)
        ours = PseudoLabelTable(LABELS, 3, order)
        ours.add(ours.waiting(), found([1.0, 0.0, 2.0, 1.0], [True, False, False, False]))
        draws = torch.tensor([7, 0, 100, 5, 5])
        probabilities, weights = ours.of_draws(draws)
        for row, draw in enumerate(draws.tolist()):
            torch.testing.assert_close(probabilities[row], ours.probabilities[order(draw)], rtol=0, atol=0)
            self.assertEqual(float(weights[row]), float(ours.weights[order(draw)]))

    def test_several_labels(self) -> None:
        ours = table(FINDINGS, 2)
        indices, labels = ours.anchor_labels()
        self.assertEqual((indices.tolist(), ours.waiting().tolist(), ours.multi_label), ([0, 2], [1, 3], True))
        np.testing.assert_equal(labels, [[1, np.nan], [0, 1]])

    def test_state_goes_into_another_table(self) -> None:
        ours, other = table(), table()
        ours.add(ours.waiting(), found([1.0, 0.0, 0.5, 0.0], [True, False, False, False]))
        other.load_state_dict({name: value.clone() for name, value in ours.state_dict().items()})
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)
        self.assertEqual(other.waiting().tolist(), ours.waiting().tolist())
        with self.assertRaisesRegex(ValueError, r"probabilities must have shape \(4, 2\), got \(6, 3\)"):
            table(FINDINGS, 2).load_state_dict(ours.state_dict())

    @parameterized.expand(
        [
            (LABELS, 2, r"labels must be below num_classes=2, got 2"),
            ([[0, 1, 1]], 2, r"labels must be \(N,\) or \(N, K=2\), got shape \(1, 3\)"),
            ([-1, -1], 2, "there is no labelled image to learn from"),
        ]
    )
    def test_wrong_labels(self, labels: Any, num_classes: int, message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"PseudoLabelTable: {message}"):
            table(labels, num_classes)

    def test_wrong_number(self) -> None:
        with self.assertRaisesRegex(ValueError, "the order arranges 5 images, there are 6 labels"):
            PseudoLabelTable(LABELS, 3, ShuffledOrder(5, 0))
        ours = table()
        with self.assertRaisesRegex(ValueError, r"expected pseudo-labels of shape \(4, 3\), got \(3, 3\)"):
            ours.add(ours.waiting(), found([1.0] * 3, [True] * 3))


class TestTypes(unittest.TestCase):
    @parameterized.expand([(LabelledFeatures, "labels"), (UnlabelledFeatures, "probabilities")])
    def test_one_row_for_each_image(self, kind: type, name: str) -> None:
        kind(np.zeros((4, 7)), np.zeros((4, 2)))
        with self.assertRaisesRegex(ValueError, rf"{kind.__name__}: .* features \(4, 7\) and {name} \(3, 2\)"):
            kind(np.zeros((4, 7)), np.zeros((3, 2)))
        with self.assertRaisesRegex(ValueError, f"{kind.__name__}: expected one row"):
            kind(np.zeros((4, 7)), np.zeros(4))

    @parameterized.expand(
        [
            (np.zeros((2, 3)), [1.0], [True], r"got \(2, 3\), \(1,\) and \(1,\)"),
            (np.zeros((2, 3)), [1.0, -1.0], [False, False], "weights must be >= 0, got -1.0"),
            (np.zeros((2, 3)), [1.0, np.nan], [False, False], "weights must be >= 0"),
            (np.zeros((2, 3)), [1.0, 0.0], [False, True], "true only where there is a pseudo-label"),
            (np.zeros((2, 3)), [1.0, 1.0], [0, 1], "anchors must be bool"),
            (np.full((2, 3), 1.5), [1.0, 0.0], [False, False], r"must be in \[0, 1\] wherever"),
            (np.full((2, 3), np.nan), [1.0, 0.0], [False, False], r"must be in \[0, 1\] wherever"),
        ]
    )
    def test_wrong_pseudo_labels(self, probabilities: np.ndarray, weights: Any, anchors: Any, message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"PseudoLabels: .*{message}"):
            PseudoLabels(probabilities, np.array(weights), np.array(anchors))


if __name__ == "__main__":
    unittest.main()
