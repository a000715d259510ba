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

"""ACPL: every equation against a recomputation by hand, and the choice on clusters whose answer is known."""

from __future__ import annotations

import unittest

import numpy as np
from parameterized import parameterized

from monai_jointdiff.data import (
    AntiCurriculumPseudoLabeller,
    LabelledFeatures,
    Neighbours,
    UnlabelledFeatures,
    informative_mixup,
    informative_samples,
    mutual_neighbours,
    nearest_neighbours,
    neighbour_labels,
)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def random_case(seed: int = 0, multi_label: bool = False) -> tuple[LabelledFeatures, UnlabelledFeatures]:
    generator = np.random.default_rng(seed)
    features, others = generator.normal(size=(20, 5)), generator.normal(size=(60, 5))
    if multi_label:
        labels = generator.choice([0.0, 1.0, np.nan], size=(20, 4))
        probabilities = generator.uniform(size=(60, 4))
    else:
        labels = np.eye(4)[generator.integers(4, size=20)]
        probabilities = generator.dirichlet(np.ones(4), size=60)
    return LabelledFeatures(features, labels), UnlabelledFeatures(others, probabilities)


class TestEquations(unittest.TestCase):
    @parameterized.expand([(1,), (4,), (20,), (99,)])
    def test_neighbours_and_density(self, k: int) -> None:
        anchors, unlabelled = random_case()
        found = nearest_neighbours(unlabelled.features, anchors.features, k)
        self.assertEqual(found.indices.shape, (60, min(k, 20)))
        for row, x in enumerate(unlabelled.features):
            all_of_them = [cosine(x, a) for a in anchors.features]
            expected = sorted(range(20), key=lambda n: -all_of_them[n])[:k]
            self.assertEqual(found.indices[row].tolist(), expected)
            np.testing.assert_allclose(found.similarities[row], [all_of_them[n] for n in expected], atol=1e-12)
            self.assertAlmostEqual(found.density[row], np.mean([all_of_them[n] for n in expected]), places=12)

    def test_similarity_is_that_of_directions(self) -> None:
        anchors, unlabelled = random_case()
        scale = np.random.default_rng(1).uniform(0.1, 10, size=(60, 1))
        one = nearest_neighbours(unlabelled.features, anchors.features, 5)
        other = nearest_neighbours(unlabelled.features * scale, 7 * anchors.features, 5)
        np.testing.assert_allclose(one.similarities, other.similarities, atol=1e-12)
        np.testing.assert_array_equal(one.indices, other.indices)

    def test_votes(self) -> None:
        anchors, unlabelled = random_case(multi_label=True)
        indices = nearest_neighbours(unlabelled.features, anchors.features, 3).indices
        found = neighbour_labels(anchors.labels, indices)
        unknown = 0
        for row in range(60):
            for finding in range(4):
                votes = [v for v in anchors.labels[indices[row], finding] if not np.isnan(v)]
                unknown += not votes
                np.testing.assert_allclose(found[row, finding], sum(votes) / len(votes) if votes else np.nan)
        self.assertGreater(unknown, 0)

    def test_mixup(self) -> None:
        p, votes = np.array([[0.2, 0.8]] * 4), np.array([[1.0, 0.0]] * 3 + [[np.nan, 0.0]])
        found = informative_mixup(p, votes, np.array([0.0, 0.25, 1.0, 0.5]))
        np.testing.assert_allclose(found, [[1, 0], [0.8, 0.2], [0.2, 0.8], [0.2, 0.4]], atol=1e-12)

    def test_mixup_weighs_by_the_place_among_the_densities(self) -> None:
        """Cosines near 1: the least dense image still has its neighbours' label, the densest the network's."""
        p, votes = np.array([[0.2, 0.8]] * 3), np.array([[1.0, 0.0]] * 3)
        expected = [[1, 0], [0.8, 0.2], [0.2, 0.8]]
        for density in ([0.90, 0.92, 0.98], [-0.5, -0.25, 0.5]):
            np.testing.assert_allclose(informative_mixup(p, votes, np.array(density)), expected, atol=1e-12)
        np.testing.assert_allclose(informative_mixup(p, votes, np.full(3, 0.9)), votes)  # all are the least dense

    def test_mutual_neighbours(self) -> None:
        anchors, unlabelled = random_case()
        ours = nearest_neighbours(unlabelled.features, anchors.features, 6).indices
        theirs = nearest_neighbours(anchors.features, unlabelled.features, 6).indices
        expected = [sum(row in theirs[a] for a in ours[row]) for row in range(60)]
        self.assertEqual(mutual_neighbours(ours, theirs).tolist(), expected)
        self.assertGreater(len(set(expected)), 2)


class TestChoice(unittest.TestCase):
    @parameterized.expand([((0, 1, 2),), ((2, 0, 1),)])
    def test_lowest_of_three_heaps(self, places: tuple[int, int, int]) -> None:
        generator = np.random.default_rng(0)
        heap = np.array(places).repeat(50)
        density = 0.3 + 0.2 * heap + 0.01 * generator.normal(size=150)
        np.testing.assert_array_equal(informative_samples(density), heap == 0)

    def test_scale_and_place_do_not_matter(self) -> None:
        density = np.random.default_rng(2).beta(5, 2, size=300)
        chosen = informative_samples(density)
        np.testing.assert_array_equal(informative_samples(0.99 + 1e-5 * density), chosen)
        self.assertTrue(0 < chosen.sum() < 300)

    def test_no_dense_image_is_chosen(self) -> None:
        """A wide heap of low mean, and a narrow one within it: the wide Gaussian is likelier at both ends."""
        generator = np.random.default_rng(1)
        wide, narrow = generator.normal(0.4, 0.2, size=400), generator.normal(0.55, 0.01, size=400)
        density = np.concatenate([wide, narrow])
        chosen = informative_samples(density)
        self.assertTrue(chosen.any())
        self.assertLess(density[chosen].max(), density[~chosen].max())
        self.assertLess(density[chosen].max(), 0.56)

    @parameterized.expand([([0.5], [True]), ([0.5, 0.5, 0.5], [True] * 3), ([0.9, 0.2], [False, True])])
    def test_few_images(self, density: list[float], expected: list[bool]) -> None:
        self.assertEqual(informative_samples(np.array(density)).tolist(), expected)


class TestLabeller(unittest.TestCase):
    def test_images_unlike_the_labelled_come_first(self) -> None:
        """Anchors look one way; images like them, images half way and images of another kind."""
        generator = np.random.default_rng(0)
        directions = np.array([[1.0, 0.1, 0.0], [0.7, 0.7, 0.1], [0.1, 0.2, 1.0]])
        kind = np.arange(90) % 3
        features = directions[kind] + 0.02 * generator.normal(size=(90, 3))
        anchors = LabelledFeatures(directions[0] + 0.02 * generator.normal(size=(10, 3)), np.eye(2)[np.arange(10) % 2])
        sure = np.array([[0.95, 0.05]] * 90)  # the network is as sure of all: confidence does not choose
        found = AntiCurriculumPseudoLabeller(4)(anchors, UnlabelledFeatures(features, sure))
        np.testing.assert_array_equal(found.weights, kind == 2)

    @parameterized.expand([(False, None), (False, 7), (True, None), (True, 7)])
    def test_is_the_equations_one_after_the_other(self, multi_label: bool, k: int | None) -> None:
        anchors, unlabelled = random_case(3, multi_label)
        found = AntiCurriculumPseudoLabeller(k)(anchors, unlabelled)
        similarity = np.array([[cosine(x, a) for a in anchors.features] for x in unlabelled.features])
        k = k or 2  # a tenth of 20
        near = np.argsort(-similarity, axis=1)[:, :k]
        density = np.take_along_axis(similarity, near, axis=1).mean(axis=1)
        chosen = informative_samples(density)
        np.testing.assert_array_equal(found.weights, chosen)
        mutual = [sum(row in np.argsort(-similarity[:, a])[:k] for a in near[row]) for row in range(60)]
        lowest, highest = min(density), max(density)
        least = min(count for count, is_chosen in zip(mutual, chosen, strict=True) if is_chosen)
        loose = [row for row in range(60) if chosen[row] and mutual[row] == least]
        new = sorted(loose, key=lambda row: density[row])[:20]  # no more than there are labels
        expected = [row in new for row in range(60)]
        self.assertEqual(found.anchors.tolist(), expected)
        self.assertTrue(0 < chosen.sum() < 60 and any(expected))
        for row in np.flatnonzero(chosen):
            for entry in range(4):
                votes = [v for v in anchors.labels[near[row], entry] if not np.isnan(v)]
                p, d = unlabelled.probabilities[row, entry], (density[row] - lowest) / (highest - lowest)
                mixed = d * p + (1 - d) * np.mean(votes) if votes else p
                self.assertAlmostEqual(found.probabilities[row, entry], mixed, places=12)
        if not multi_label:
            np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-12)

    def test_guesses_do_not_outnumber_the_labels(self) -> None:
        """Neighbours are counted by the labels, and a round adds as many anchors as there are labels, not more."""
        generator = np.random.default_rng(0)
        unlabelled = UnlabelledFeatures(generator.normal(size=(400, 5)), np.full((400, 2), 0.5))
        labels = np.eye(2)[np.arange(80) % 2]
        anchors = LabelledFeatures(generator.normal(size=(80, 5)), labels, guessed=np.arange(80) >= 20)
        self.assertEqual(anchors.num_labelled, 20)
        found = AntiCurriculumPseudoLabeller()(anchors, unlabelled)
        self.assertEqual(int(found.anchors.sum()), 20)
        self.assertGreater(found.weights.sum(), 20)
        two = AntiCurriculumPseudoLabeller(2)(anchors, unlabelled)  # a tenth of 20, not of 80
        np.testing.assert_array_equal(found.probabilities, two.probabilities)
        with self.assertRaisesRegex(ValueError, r"guessed must be \(80,\), got \(3,\)"):
            LabelledFeatures(anchors.features, labels, guessed=np.zeros(3, bool))

    def test_order_of_the_images_does_not_matter(self) -> None:
        anchors, unlabelled = random_case(4)
        permutation = np.random.default_rng(0).permutation(60)
        labeller = AntiCurriculumPseudoLabeller(5)
        one = labeller(anchors, unlabelled)
        shuffled = UnlabelledFeatures(unlabelled.features[permutation], unlabelled.probabilities[permutation])
        other = labeller(anchors, shuffled)
        np.testing.assert_array_equal(one.weights[permutation], other.weights)
        np.testing.assert_array_equal(one.anchors[permutation], other.anchors)
        again = labeller(anchors, unlabelled)
        np.testing.assert_array_equal(one.probabilities, again.probabilities)

    def test_one_image_left(self) -> None:
        anchors, unlabelled = random_case()
        found = AntiCurriculumPseudoLabeller()(
            anchors, UnlabelledFeatures(unlabelled.features[:1], unlabelled.probabilities[:1])
        )
        self.assertEqual((found.weights.tolist(), found.anchors.tolist()), ([1], [True]))

    @parameterized.expand([(None, 5, 1), (None, 50, 5), (None, 5000, 200), (7, 50, 7), (7, 4, 4)])
    def test_number_of_neighbours(self, wanted: int | None, anchors: int, expected: int) -> None:
        self.assertEqual(AntiCurriculumPseudoLabeller(wanted).num_neighbours_of(anchors), expected)

    def test_wrong_input(self) -> None:
        for wrong in (0, 2.5, True):
            with self.assertRaisesRegex(ValueError, f"num_neighbours must be a whole number >= 1 or None, got {wrong}"):
                AntiCurriculumPseudoLabeller(wrong)  # type: ignore[arg-type]
        anchors, unlabelled = random_case()
        with self.assertRaisesRegex(ValueError, "NaN"):
            nearest_neighbours(unlabelled.features * np.nan, anchors.features, 3)

    def test_neighbours_are_a_pair(self) -> None:
        self.assertEqual(Neighbours(np.array([[0.5, 0.1]]), np.array([[3, 1]])).density.tolist(), [0.3])


if __name__ == "__main__":
    unittest.main()
