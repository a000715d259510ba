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


"""The n-th image of a run is the same whatever the processes, the workers and the interruptions."""

from __future__ import annotations

import pickle
import unittest
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader as MonaiDataLoader
from monai.transforms import (
    Compose,
    OneOf,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from parameterized import parameterized
from torch.utils.data import DataLoader

from monai_jointdiff.data import BalancedOrder, DrawBatchSampler, DrawDataset, DrawOrder, ShuffledOrder, draw_seed
from monai_jointdiff.data.draws import share_random_state
from monai_jointdiff.transforms import ClassificationAugmentation

COUNT = 7


def items(spatial_dims: int = 2) -> list[Mapping[Hashable, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.rand(1, *(6,) * spatial_dims, generator=generator) * 2 - 1, "number": n} for n in range(COUNT)
    ]


def prepare(item: dict[Hashable, Any]) -> dict[Hashable, Any]:
    return {**item, "prepared": True}


def random_views(spatial_dims: int = 2) -> Compose:
    choice = OneOf([RandScaleIntensityd("image", 0.5, prob=1.0), RandShiftIntensityd("image", 0.5, prob=1.0)])
    nested = Compose([RandGaussianNoised("image", prob=0.5), choice])
    turn = RandAffined("image", prob=0.7, rotate_range=0.5, padding_mode="border")
    return Compose([RandFlipd("image", prob=0.5), turn, nested, ClassificationAugmentation(spatial_dims)])


def dataset(spatial_dims: int = 2, seed: int = 4, **options: Any) -> DrawDataset:
    return DrawDataset(items(spatial_dims), prepare, random_views(spatial_dims), seed=seed, **options)


def images(item: Mapping[Hashable, Any]) -> torch.Tensor:
    return torch.stack([torch.as_tensor(item[key]).as_subclass(torch.Tensor) for key in ("image", "image_cls")])


def take(sampler: DrawBatchSampler, iteration: int) -> list[list[int]]:
    sampler.iteration = iteration
    return list(sampler)


class TestDrawSeed(unittest.TestCase):
    @parameterized.expand(
        [
            (0, 0, "noise", 14025120531199270275),
            (0, 1, "noise", 11509205340955073050),
            (1, 0, "noise", 3497558405417290725),
            (0, 0, "transforms", 646260461130087484),
            (-3, 10**12, "order", 4702471235317319162),
        ]
    )
    def test_stays_the_same_for_ever(self, seed: int, draw: int, stream: str, expected: int) -> None:
        """Other numbers would change every resumed run; these are what `printf 0/0/noise | b2sum -l 64` says."""
        self.assertEqual(draw_seed(seed, draw, stream), expected)

    def test_seeds_runs_draws_and_streams_apart(self) -> None:
        keys = [(s, d, stream) for s in range(10) for d in range(100) for stream in ("noise", "timesteps", "order")]
        self.assertEqual(len({draw_seed(*key) for key in keys}), len(keys))

    def test_bits_are_even_and_neighbours_unrelated(self) -> None:
        seeds = np.array([draw_seed(0, draw, "noise") for draw in range(2000)], dtype=np.uint64)
        bits = (seeds[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
        np.testing.assert_allclose(bits.mean(0), 0.5, atol=5 * 0.5 / np.sqrt(2000))
        self.assertAlmostEqual(float((bits[1:] != bits[:-1]).mean()), 0.5, delta=5 * 0.5 / np.sqrt(2000 * 64))

    def test_generators_take_the_largest_seeds(self) -> None:
        largest = max(draw_seed(0, draw, "noise") for draw in range(8))
        self.assertGreaterEqual(largest, 2**63)
        torch.Generator().manual_seed(largest)
        np.random.default_rng(largest)

    def test_number_types_do_not_matter(self) -> None:
        self.assertEqual(draw_seed(np.int64(3), torch.tensor(5), "noise"), draw_seed(3, 5, "noise"))  # type: ignore


class TestShuffledOrder(unittest.TestCase):
    @parameterized.expand([(1,), (2,), (COUNT,), (100,)])
    def test_each_epoch_is_a_permutation(self, length: int) -> None:
        order = ShuffledOrder(length, seed=1)
        for epoch in range(5):
            shown = [order(epoch * length + position) for position in range(length)]
            self.assertEqual(sorted(shown), list(range(length)))

    def test_epochs_and_seeds_differ(self) -> None:
        one, two = ShuffledOrder(50, 0), ShuffledOrder(50, 1)
        self.assertFalse(np.array_equal(one.arrange(0), one.arrange(1)))
        self.assertFalse(np.array_equal(one.arrange(0), two.arrange(0)))

    def test_depends_on_seed_and_draw_alone(self) -> None:
        forward = ShuffledOrder(COUNT, 3)
        shown = [forward(draw) for draw in range(4 * COUNT)]
        backward = ShuffledOrder(COUNT, 3)
        self.assertEqual([backward(draw) for draw in reversed(range(4 * COUNT))], shown[::-1])

    def test_first_place_is_uniform(self) -> None:
        order = ShuffledOrder(4, 0)
        counts = Counter(order(4 * epoch) for epoch in range(2000))
        for index in range(4):
            self.assertAlmostEqual(counts[index] / 2000, 0.25, delta=5 * np.sqrt(0.25 * 0.75 / 2000))

    @parameterized.expand([(0,), (-1,)])
    def test_no_image_is_refused(self, length: int) -> None:
        with self.assertRaisesRegex(ValueError, f"ShuffledOrder: needs at least one image, got length={length}"):
            ShuffledOrder(length, 0)


class TestBalancedOrder(unittest.TestCase):
    @parameterized.expand(
        [
            ("whole", [0] * 9 + [1] * 3 + [2] * 3, {0: 5, 1: 5, 2: 5}),
            ("unlabelled", [0] * 9 + [1] + [-1] * 6, {0: 5, 1: 5, -1: 6}),
            ("classes_that_do_not_occur", [3] * 7 + [9], {3: 4, 9: 4}),
            ("one_class", [2] * 5, {2: 5}),
            ("no_label", [-1] * 4, {-1: 4}),
        ]
    )
    def test_classes_are_drawn_equally_often(self, _: str, labels: list[int], expected: dict[int, int]) -> None:
        order = BalancedOrder(labels, seed=0)
        for epoch in range(4):
            shown = [labels[order(epoch * len(labels) + n)] for n in range(len(labels))]
            self.assertEqual(Counter(shown), expected)

    def test_remainder_goes_round(self) -> None:
        labels = np.array([0] * 8 + [1] * 2 + [2])  # 11 draws, 3 classes: 4, 4, 3
        order = BalancedOrder(labels, seed=0)
        counts = np.array([np.bincount(labels[order.arrange(epoch)], minlength=3) for epoch in range(300)])
        np.testing.assert_array_equal(np.sort(counts, axis=1), np.tile([3, 4, 4], (300, 1)))
        np.testing.assert_allclose(counts.mean(0), 11 / 3, atol=5 * np.sqrt(2 / 9 / 300))

    def test_images_of_a_class_take_turns(self) -> None:
        labels = np.array([0] * 20 + [1] * 3 + [-1] * 4)
        order = BalancedOrder(labels, seed=5)
        for epoch in range(5):
            seen = np.bincount(order.arrange(epoch), minlength=len(labels))
            for label in (0, 1):
                self.assertLessEqual(np.ptp(seen[labels == label]), 1)
            np.testing.assert_array_equal(seen[labels == -1], 1)

    def test_depends_on_seed_and_draw_alone(self) -> None:
        labels = [0, 0, 0, 1, -1]
        one, two, other = BalancedOrder(labels, 3), BalancedOrder(labels, 3), BalancedOrder(labels, 4)
        shown = [one(draw) for draw in range(40)]
        self.assertEqual([two(draw) for draw in reversed(range(40))], shown[::-1])
        self.assertNotEqual([other(draw) for draw in range(40)], shown)

    @parameterized.expand([([[0, 1], [1, 0]],), ([0.0, 1.0],), ([],)])
    def test_wrong_labels(self, labels: Any) -> None:
        with self.assertRaisesRegex(ValueError, "BalancedOrder"):
            BalancedOrder(labels, 0)


class TestDrawBatchSampler(unittest.TestCase):
    @parameterized.expand([(1, 3), (2, 3), (3, 2), (4, 1)])
    def test_ranks_share_the_draws_of_one_process(self, world_size: int, batch_size: int) -> None:
        ranks = [list(DrawBatchSampler(batch_size, 5, rank, world_size)) for rank in range(world_size)]
        together = [sum(batches, []) for batches in zip(*ranks, strict=True)]
        self.assertEqual(together, list(DrawBatchSampler(batch_size * world_size, 5)))
        self.assertEqual(sum(together, []), list(range(5 * batch_size * world_size)))

    def test_resumes_in_the_middle_and_at_the_end_of_an_epoch(self) -> None:
        sampler = DrawBatchSampler(2, 4, rank=1, world_size=3)
        whole = [batch for epoch in range(3) for batch in take(sampler, 4 * epoch)]
        self.assertEqual(len(whole), 12)
        for iteration in range(12):
            end = 4 * (iteration // 4 + 1)
            self.assertEqual(take(sampler, iteration), whole[iteration:end])

    def test_remembers_nothing_and_has_a_length(self) -> None:
        sampler = DrawBatchSampler(2, 4)
        self.assertEqual(list(sampler), list(sampler))
        self.assertEqual(len(sampler), 4)

    @parameterized.expand(
        [
            ((0, 1), "batch_size must be at least 1, got 0"),
            ((1, 0), "iterations_per_epoch must be at least 1, got 0"),
            ((1, 1, 0, 0), "world_size must be at least 1, got 0"),
            ((1, 1, 2, 2), r"rank must be in \[0, world_size=2\), got 2"),
            ((1, 1, -1, 2), r"rank must be in \[0, world_size=2\), got -1"),
        ]
    )
    def test_wrong_numbers(self, arguments: tuple[int, ...], message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"DrawBatchSampler: {message}"):
            DrawBatchSampler(*arguments)


class TestDrawDataset(unittest.TestCase):
    def test_shows_the_image_that_the_order_says(self) -> None:
        data = DrawDataset(items(), prepare, seed=4)
        order = ShuffledOrder(COUNT, 4)
        for draw in (0, 3, 6, 7, 100):
            shown = data[draw]
            self.assertEqual((shown["number"], shown["draw"], shown["prepared"]), (order(draw), draw, True))
            torch.testing.assert_close(shown["image"], items()[order(draw)]["image"], rtol=0, atol=0)
        self.assertEqual(len(data), COUNT)

    def test_undisturbed_items_by_index(self) -> None:
        for cache in (True, False):
            data = dataset(cache=cache)
            for index in (0, COUNT - 1):
                shown = data.undisturbed(index)
                torch.testing.assert_close(shown["image"], items()[index]["image"], rtol=0, atol=0)
                self.assertNotIn("draw", shown)

    @parameterized.expand([(2,), (3,)])
    def test_random_transforms_replay_per_draw(self, spatial_dims: int) -> None:
        one, two = dataset(spatial_dims), dataset(spatial_dims, cache=False)
        forward = [images(one[draw]) for draw in range(2 * COUNT)]
        for draw in [5, 13, 0, 5, 7, 1]:
            np.random.rand(3)  # noqa: NPY002 (the global state has no say)
            torch.testing.assert_close(images(two[draw]), forward[draw], rtol=0, atol=0)

    def test_views_of_one_image_and_of_other_seeds_differ(self) -> None:
        class Constant(DrawOrder):
            def arrange(self, epoch: int) -> np.ndarray:
                return np.zeros(self.length, dtype=int)

        views = [
            images(DrawDataset(items(), prepare, random_views(), Constant(COUNT, 0), seed)[draw])
            for seed, draw in ((0, 0), (0, 1), (0, 2), (1, 0))
        ]
        for n, view in enumerate(views):
            for other in views[:n]:
                self.assertFalse(torch.equal(view, other))

    def test_transform_is_called_once_per_item_with_a_cache(self) -> None:
        for cache, expected in ((True, COUNT), (False, 3 * COUNT)):
            calls: list[int] = []

            def count(item: dict[Hashable, Any], calls: list[int] = calls) -> dict[Hashable, Any]:
                calls.append(item["number"])
                return item

            data = DrawDataset(items(), count, cache=cache)
            _ = [data[draw] for draw in range(3 * COUNT)]
            self.assertEqual(Counter(calls), {n: expected // COUNT for n in range(COUNT)})

    def test_cached_items_stay_as_they_are(self) -> None:
        data = dataset()
        before = [images({**data[d], "image_cls": data[d]["image"]}) for d in range(COUNT)]
        shown = data[0]
        shown["image"] = None
        shown["more"] = 1
        self.assertNotIn("more", data[0])
        for draw, image in enumerate(before):
            torch.testing.assert_close(images({**data[draw], "image_cls": data[draw]["image"]}), image, rtol=0, atol=0)

    @parameterized.expand([("torch", DataLoader), ("monai", MonaiDataLoader)])
    def test_workers_change_nothing(self, _: str, loader: Any) -> None:
        """MONAI's loader seeds the transforms of each worker; the draw must win."""
        torch.manual_seed(1)
        runs = []
        for workers in (0, 2):
            data = dataset()
            batches = loader(data, batch_sampler=DrawBatchSampler(3, 4), num_workers=workers)
            runs.append([(batch["draw"].tolist(), images(batch)) for batch in batches])
        for (draws, one), (others, two) in zip(*runs, strict=True):
            self.assertEqual(draws, others)
            torch.testing.assert_close(one, two, rtol=0, atol=0)

    def test_resumed_epoch_shows_the_same_items(self) -> None:
        sampler = DrawBatchSampler(3, 4)
        whole = [images(batch) for batch in DataLoader(dataset(), batch_sampler=sampler)]
        sampler.iteration = 2
        rest = [images(batch) for batch in DataLoader(dataset(), batch_sampler=sampler)]
        self.assertEqual(len(rest), 2)
        torch.testing.assert_close(rest, whole[2:], rtol=0, atol=0)

    def test_a_copy_for_another_process_shows_the_same(self) -> None:
        data = dataset()
        copy = pickle.loads(pickle.dumps(data))
        for draw in (8, 2):
            torch.testing.assert_close(images(copy[draw]), images(data[draw]), rtol=0, atol=0)

    def test_wrong_orders(self) -> None:
        with self.assertRaisesRegex(ValueError, "the order arranges 3 images, there are 7 items"):
            DrawDataset(items(), prepare, order=ShuffledOrder(3, 0))
        with self.assertRaisesRegex(ValueError, "needs at least one image"):
            DrawDataset([], prepare)


class TestShareRandomState(unittest.TestCase):
    def test_every_leaf_has_the_state(self) -> None:
        state = np.random.RandomState(0)
        views = random_views()
        share_random_state(views, state)
        flip, turn, nested, augmentation = views.transforms
        noise, choice = nested.transforms
        for transform in (views, flip, turn.rand_affine, nested, noise, choice, *choice.transforms, augmentation):
            self.assertIs(transform.R, state)

    def test_any_callable_passes(self) -> None:
        share_random_state(prepare, np.random.RandomState(0))


if __name__ == "__main__":
    unittest.main()
