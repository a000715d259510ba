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

"""Anti-curriculum pseudo-labelling: the images least like the labelled ones get their label first."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from monai.utils import optional_import

from monai_jointdiff.data.pseudo_labels import LabelledFeatures, PseudoLabels, UnlabelledFeatures

__all__ = [
    "AntiCurriculumPseudoLabeller",
    "Neighbours",
    "informative_mixup",
    "informative_samples",
    "mutual_neighbours",
    "nearest_neighbours",
    "neighbour_labels",
    "purified_anchors",
]

sklearn_neighbors, _ = optional_import("sklearn.neighbors")
sparse, _ = optional_import("scipy.sparse")
sklearn_mixture, _ = optional_import("sklearn.mixture")

INFORMATIVENESS = 3  # components of the mixture: high, medium and low informativeness


class Neighbours(NamedTuple):
    """The nearest of some images to each of others, the nearest first.

    Args:
        similarities: (N, k) cosines of the features.
        indices: (N, k) which image.
    """

    similarities: np.ndarray
    indices: np.ndarray

    @property
    def density(self) -> np.ndarray:
        r"""Mean similarity (N,) to the neighbours: the density score d of ACPL.

        .. math::
            d(x) = \frac{1}{k} \sum_{a \in N(x)} \frac{f(x)^T f(a)}{\|f(x)\| \|f(a)\|}
        """
        mean: np.ndarray = self.similarities.mean(axis=1)
        return mean


class AntiCurriculumPseudoLabeller:
    r"""ACPL: labels the unlabelled images that are least like the anchors, by the network and their nearest anchors.

    Liu et al., "ACPL: Anti-curriculum Pseudo-labelling for Semi-supervised Medical Image Classification", CVPR 2022,
    arXiv 2111.12918. A curriculum would begin with images of which the network is sure; those are like the labelled
    ones and of frequent classes. In each round:

    1. cross-distribution sample informativeness: :func:`nearest_neighbours` among the anchors, their mean similarity
       (:attr:`Neighbours.density`), and :func:`informative_samples`, those of lowest density;
    2. informative mix-up: :func:`neighbour_labels`, and with the network's answer :func:`informative_mixup`;
    3. anchor set purification: of those labelled, the ones with the fewest :func:`mutual_neighbours` become anchors,
       by :func:`purified_anchors`.

    It is the same for one and for several labels per image. Where this differs from the publication: it takes
    k = 200 of thousands of labels; of 50 labelled images all would be neighbours of every image, their mean label
    always the same, and so k is a tenth of the labelled ones by default. A k this small leaves most images without a
    connection, all of which would become anchors, thousands of guesses beside 50 labels: a round adds no more anchors
    than there are labels. :func:`informative_samples` leaves out a part of the component of lowest
    density.

    Args:
        num_neighbours: k, at most the number of anchors with a label; None: a tenth of that, at most 200, at least 1.
        seed: of the mixture's start.

    Raises:
        ValueError: for a number of neighbours below 1; when called, for features of another width or not finite.
        OptionalImportError: when called without scikit-learn.
    """

    def __init__(self, num_neighbours: int | None = None, seed: int = 0) -> None:
        if num_neighbours is not None and (type(num_neighbours) is not int or num_neighbours < 1):
            raise ValueError(
                f"{type(self).__name__}: num_neighbours must be a whole number >= 1 or None, got {num_neighbours!r}."
            )
        self.num_neighbours = num_neighbours
        self.seed = seed

    def __call__(self, anchors: LabelledFeatures, unlabelled: UnlabelledFeatures) -> PseudoLabels:
        """Label the most informative of the unlabelled images.

        Args:
            anchors: A images with labels.
            unlabelled: U images without.

        Returns:
            pseudo-labels, of weight 1 for informative images.
        """
        k = self.num_neighbours_of(anchors.num_labelled)
        among_anchors = nearest_neighbours(unlabelled.features, anchors.features, k)
        among_unlabelled = nearest_neighbours(anchors.features, unlabelled.features, k)
        selected = informative_samples(among_anchors.density, self.seed)
        votes = neighbour_labels(anchors.labels, among_anchors.indices)
        labels = informative_mixup(unlabelled.probabilities, votes, among_anchors.density)
        connections = mutual_neighbours(among_anchors.indices, among_unlabelled.indices)
        purified = purified_anchors(selected, connections, among_anchors.density, anchors.num_labelled)
        return PseudoLabels(labels, selected.astype(float), purified)

    def num_neighbours_of(self, num_labelled: int) -> int:
        """The number of neighbours k where so many anchors have a label."""
        wanted = min(200, num_labelled // 10) if self.num_neighbours is None else self.num_neighbours
        return max(1, min(wanted, num_labelled))


def nearest_neighbours(features: np.ndarray, others: np.ndarray, k: int) -> Neighbours:
    """The k nearest images by the cosine of features: N(x) of ACPL.

    Args:
        features: (N, F), of the images whose neighbours are looked for.
        others: (M, F), of those among which they are.
        k: how many, >= 1; all M where there are fewer.

    Returns:
        similarities and indices (N, min(k, M)).
    """
    search = sklearn_neighbors.NearestNeighbors(n_neighbors=min(k, len(others)), metric="cosine", algorithm="brute")
    distances, indices = search.fit(np.asarray(others, dtype=float)).kneighbors(np.asarray(features, dtype=float))
    return Neighbours(1 - distances, indices)


def informative_samples(density: np.ndarray, seed: int = 0) -> np.ndarray:
    """Which images are informative: those of the component of lowest density in a mixture of three Gaussians.

    ACPL, cross-distribution sample informativeness: h(x) = 1 where p(high informativeness | d(x)) is the largest of
    the three. The mixture is fitted to densities scaled to [0, 1]; the scale matters only for the least variance that
    scikit-learn keeps. Fewer different densities than components have as many components as values; a single one makes
    all images informative. A wide component of low mean can be the likeliest at the far end of the **high** densities,
    too: unlike in the publication, images denser than the mean of the next component are left out.

    Args:
        density: (U,) density scores.
        seed: of the mixture's start.

    Returns:
        (U,) bool.
    """
    components = min(INFORMATIVENESS, len(np.unique(density)))
    if components == 1:
        return np.ones(len(density), dtype=bool)
    scaled = _scaled(density)
    mixture = sklearn_mixture.GaussianMixture(components, random_state=seed)
    mixture.fit(np.sort(scaled)[:, None])  # sorted: its start depends on the order of the images
    lowest, following = np.argsort(mixture.means_[:, 0])[:2]
    informative: np.ndarray = (mixture.predict(scaled[:, None]) == lowest) & (scaled <= mixture.means_[following, 0])
    return informative


def neighbour_labels(labels: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    r"""Mean label of the nearest anchors, the KNN prediction of ACPL.

    .. math::
        y_{KNN}(x) = \frac{1}{k} \sum_{a \in N(x)} y_a

    Unknown entries do not vote.

    Args:
        labels: (A, K) of the anchors, NaN where unknown.
        neighbours: (U, k) indices among the anchors.

    Returns:
        (U, K), NaN where no neighbour's label is known.
    """
    (images, k), known = neighbours.shape, ~np.isnan(labels)
    rows = np.arange(images + 1) * k
    is_neighbour = sparse.csr_matrix((np.ones(images * k), neighbours.ravel(), rows), shape=(images, len(labels)))
    total, number = is_neighbour @ np.where(known, labels, 0.0), is_neighbour @ known.astype(float)  # (U, K)
    mean: np.ndarray = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    return mean


def informative_mixup(probabilities: np.ndarray, votes: np.ndarray, density: np.ndarray) -> np.ndarray:
    r"""Mix of the network's answer and the neighbours' labels: the denser, the more the network counts.

    ACPL, informative mix-up, with densities scaled over the unlabelled images of the round, as in the published code:

    .. math::
        \hat d(x) = \frac{d(x) - \min d}{\max d - \min d}, \qquad
        \tilde y(x) = \hat d(x)\, p(x) + (1 - \hat d(x))\, y_{KNN}(x)

    Cosines of features that share a direction are all near 1; unscaled, the network would decide alone just where it
    is trusted least. The least dense image is labelled by its neighbours, the densest by the network. Where all are
    equally dense they are all the least dense, and as :func:`informative_samples` takes them all for informative, the
    neighbours decide. Where the neighbours know nothing, the network's answer stands alone.

    Args:
        probabilities: (U, K) p of the network.
        votes: (U, K) of :func:`neighbour_labels`.
        density: (U,) d, of all unlabelled images of the round.

    Returns:
        (U, K) in [0, 1].
    """
    d = _scaled(density)[:, None]
    mixed: np.ndarray = d * probabilities + (1 - d) * np.where(np.isnan(votes), probabilities, votes)
    return np.clip(mixed, 0.0, 1.0)  # rounding


def _scaled(density: np.ndarray) -> np.ndarray:
    """Densities (U,) from 0, the least, to 1, the largest; all 0 where they are equal."""
    span = density.max() - density.min()
    scaled: np.ndarray = (density - density.min()) / (span if span > 0 else 1.0)
    return scaled


def mutual_neighbours(among_anchors: np.ndarray, among_unlabelled: np.ndarray) -> np.ndarray:
    r"""How many anchors and an unlabelled image are neighbours of each other: its connections.

    ACPL, anchor set purification, where the least connected of the pseudo-labelled images become anchors: those that
    tell something no anchor tells yet.

    .. math::
        c(x) = \sum_{a \in N_A(x)} 1[x \in N_U(a)]

    Args:
        among_anchors: (U, k) indices of the anchors nearest to each unlabelled image, N_A.
        among_unlabelled: (A, l) indices of the unlabelled images nearest to each anchor, N_U.

    Returns:
        (U,) counts.
    """
    num_unlabelled, num_anchors = len(among_anchors), len(among_unlabelled)
    ours = np.arange(num_unlabelled)[:, None] * num_anchors + among_anchors  # (U, k) a number for each pair
    theirs = among_unlabelled * num_anchors + np.arange(num_anchors)[:, None]  # (A, l)
    count: np.ndarray = np.isin(ours, theirs).sum(axis=1)
    return count


def purified_anchors(selected: np.ndarray, connections: np.ndarray, density: np.ndarray, most: int) -> np.ndarray:
    """Which of the pseudo-labelled images become anchors: the least connected, and of these the least dense.

    ACPL, anchor set purification, takes all of the least connected; here there is a limit to them.

    Args:
        selected: (U,) bool, images with a pseudo-label of this round.
        connections: (U,) counts of :func:`mutual_neighbours`.
        density: (U,) density scores.
        most: anchors of a round at most.

    Returns:
        (U,) bool.
    """
    anchors = np.zeros(len(selected), dtype=bool)
    if selected.any():
        least = np.flatnonzero(selected & (connections == connections[selected].min()))
        anchors[least[np.argsort(density[least], kind="stable")][:most]] = True
    return anchors
