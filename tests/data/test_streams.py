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

"""Labelled and unlabelled images in fixed turns."""

from __future__ import annotations

import unittest
from collections import Counter

import numpy as np
from parameterized import parameterized

from monai_jointdiff.data import DrawBatchSampler, DrawDataset, TwoStreamOrder

LABELS = [0, -1, -1, 1, -1, 0, -1, -1, -1, 0, -1, -1]
LABELLED, UNLABELLED = {0, 3, 5, 9}, {1, 2, 4, 6, 7, 8, 10, 11}


class TestTwoStreamOrder(unittest.TestCase):
    @parameterized.expand([(1,), (3,), (7,)])
    def test_every_block_and_every_image_of_a_stream_once_per_epoch(self, mu: int) -> None:
        order = TwoStreamOrder(LABELS, seed=1, unlabelled_per_labelled=mu)
        draws = [order(draw) for draw in range(16 * (1 + mu))]
        labelled = [index for n, index in enumerate(draws) if n % (1 + mu) == 0]
        unlabelled = [index for n, index in enumerate(draws) if n % (1 + mu)]
        for stream, images in ((labelled, LABELLED), (unlabelled, UNLABELLED)):
            epochs = [stream[n : n + len(images)] for n in range(0, len(stream), len(images))]
            for epoch in epochs:
                self.assertEqual((set(epoch), len(epoch)), (images, len(images)))
            self.assertGreater(len(set(map(tuple, epochs))), 1)  # in a new order

    def test_is_a_function_of_seed_and_draw(self) -> None:
        first = [TwoStreamOrder(LABELS, 1)(draw) for draw in range(64)]
        order = TwoStreamOrder(LABELS, 1)
        backwards = [order(draw) for draw in reversed(range(64))]
        self.assertEqual(first, backwards[::-1])
        self.assertNotEqual(first, [TwoStreamOrder(LABELS, 2)(draw) for draw in range(64)])

    def test_streams_are_unrelated(self) -> None:
        half = [-1, 0] * 50
        order = TwoStreamOrder(half, 0, 1)
        pairs = np.array([order(draw) for draw in range(200)]).reshape(100, 2)
        self.assertLess(abs(np.corrcoef(pairs.T)[0, 1]), 0.4)

    @parameterized.expand([(1,), (2,), (4,)])
    def test_every_process_has_both_kinds_whatever_their_number(self, world_size: int) -> None:
        items = [{"label": label} for label in LABELS]
        order = TwoStreamOrder(LABELS, 0, 3, batch_size=16 // world_size)
        dataset = DrawDataset(items, lambda item: item, order=order)
        seen = []
        for batch in zip(
            *(DrawBatchSampler(16 // world_size, 3, r, world_size) for r in range(world_size)), strict=True
        ):
            for part in batch:
                labels = [dataset[draw]["label"] for draw in part]
                self.assertEqual(sum(label >= 0 for label in labels), len(part) // 4)
            seen.append([order(draw) for part in batch for draw in part])
        self.assertEqual(seen, [[order(16 * n + draw) for draw in range(16)] for n in range(3)])

    def test_classes_of_the_labelled_stream_equally_often(self) -> None:
        plain, balanced = (TwoStreamOrder(LABELS, 0, 1, balance=balance) for balance in ("none", "sampler"))
        counts = [Counter(LABELS[order(draw)] for draw in range(0, 80, 2)) for order in (plain, balanced)]
        self.assertEqual(counts, [{0: 30, 1: 10}, {0: 20, 1: 20}])

    def test_several_labels(self) -> None:
        vectors = np.full((5, 2), -1.0)
        vectors[1], vectors[3, 0] = [0, 1], 0
        order = TwoStreamOrder(vectors, 0, 2)
        self.assertEqual({order(draw) for draw in range(0, 12, 3)}, {1, 3})
        self.assertEqual({order(draw) for draw in range(12) if draw % 3}, {0, 2, 4})

    def test_arranged_epochs_are_its_draws(self) -> None:
        order = TwoStreamOrder(LABELS, 0, 3)
        together = np.concatenate([order.arrange(0), order.arrange(1)])
        self.assertEqual(together.tolist(), [order(draw) for draw in range(24)])

    @parameterized.expand(
        [
            (LABELS, {"unlabelled_per_labelled": 0}, "unlabelled_per_labelled must be at least 1, got 0"),
            (LABELS, {"unlabelled_per_labelled": 1.5}, "unlabelled_per_labelled must be a whole number, got 1.5"),
            (LABELS, {"unlabelled_per_labelled": 3, "batch_size": 6}, "must be a multiple of 4, .* got 6"),
            ([0, 1], {}, "got 2 and 0. Take fewer labels .--num_labels., or .* by train.json alone"),
            ([-1, -1], {}, "got 0 and 2. Give some training images a label"),
            ([[[0]]], {}, r"labels must be \(N,\) or \(N, K\), got shape \(1, 1, 1\)"),
            ([[0, 1], [-1, -1]], {"balance": "sampler"}, "balance 'sampler' needs one class per image"),
        ]
    )
    def test_wrong_arguments(self, labels: list, options: dict, message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"TwoStreamOrder: .*{message}"):
            TwoStreamOrder(labels, 0, **options)


if __name__ == "__main__":
    unittest.main()
