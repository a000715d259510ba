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

"""Distances between sets of generated and real images, and a Gaussian as the generator to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from monai_jointdiff.metrics.inputs import as_array

__all__ = [
    "GaussianReference",
    "KernelDistance",
    "frechet_distance",
    "frechet_distance_of_moments",
    "gaussian_moments",
    "kernel_distance",
]

_BLOCK_ROWS = 1024


def gaussian_moments(features: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased covariance of feature vectors.

    Args:
        features: (N, D), N >= 2.

    Returns:
        mean (D,) and covariance (D, D), float64.

    Raises:
        ValueError: for another shape or values that are not finite.
    """
    values = _check_features(features, "gaussian_moments")
    mean = values.mean(0)
    centred = values - mean
    return mean, centred.T @ centred / (len(values) - 1)


def frechet_distance_of_moments(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    r"""Squared Frechet (2-Wasserstein) distance of two Gaussians (Dowson and Landau 1982).

    .. math:: |m_a - m_b|^2 + \mathrm{tr}(C_a + C_b) - 2\,\mathrm{tr}(C_a^{1/2} C_b C_a^{1/2})^{1/2}

    The symmetric product has real eigenvalues >= 0, so eigenvalues suffice and singular covariances need no care.

    Args:
        mean_a: (D,).
        covariance_a: (D, D), symmetric.
        mean_b: (D,).
        covariance_b: (D, D), symmetric.

    Returns:
        distance >= 0 up to rounding, in squared units of the features.
    """
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(min=0)).sum()
    difference = mean_a - mean_b
    return float(difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * trace_of_root)


def frechet_distance(features_a: Any, features_b: Any) -> float:
    """Frechet distance of two sets of feature vectors, each summarized by a Gaussian (Heusel et al., NeurIPS 2017).

    It depends on the number of images (bias of order 1/N): compare only distances from equal numbers, and show the
    distance of real against real images of that number beside it.

    Args:
        features_a: (N_a, D).
        features_b: (N_b, D).

    Returns:
        squared distance, lower is closer.

    Raises:
        ValueError: for other shapes, different D, fewer than two vectors, or values that are not finite.
    """
    _check_pair(features_a, features_b, "frechet_distance")
    return frechet_distance_of_moments(*gaussian_moments(features_a), *gaussian_moments(features_b))


@dataclass(frozen=True)
class KernelDistance:
    """Kernel distance over subsets.

    Args:
        value: mean over subsets; unbiased, so it may be below zero for sets that are alike.
        std: standard deviation over subsets.
        subset_size: vectors of each set in a subset.
        num_subsets: number of subsets.
    """

    value: float
    std: float
    subset_size: int
    num_subsets: int


def kernel_distance(
    features_a: Any, features_b: Any, num_subsets: int = 100, subset_size: int | None = None, seed: int = 0
) -> KernelDistance:
    r"""Unbiased squared maximum mean discrepancy with a cubic kernel (KID; Binkowski et al., ICLR 2018).

    .. math:: k(x, y) = (x \cdot y / D + 1)^3

    The sums over all subsets are taken in one pass over the kernel matrix: with s the 0/1 vector of a subset, the sum
    of its kernel values is s K s.

    Args:
        features_a: (N_a, D).
        features_b: (N_b, D).
        num_subsets: number of subsets, drawn without replacement within each.
        subset_size: vectors of each set in a subset; None: half of the smaller set, at most 1000.
        seed: of the subsets.

    Returns:
        mean and standard deviation over the subsets.

    Raises:
        ValueError: for wrong features, no subset, or a subset size outside [2, min(N_a, N_b)].
    """
    a, b = _check_pair(features_a, features_b, "kernel_distance")
    smaller = min(len(a), len(b))
    size = min(1000, max(2, smaller // 2)) if subset_size is None else subset_size
    if not 2 <= size <= smaller or num_subsets < 1:
        raise ValueError(
            f"kernel_distance: subset_size must lie in [2, {smaller}] and num_subsets be at least 1, "
            f"got {subset_size} and {num_subsets}."
        )
    rng = np.random.default_rng(seed)
    in_a, in_b = (_subsets(len(values), num_subsets, size, rng) for values in (a, b))
    within = _kernel_sums(a, a, in_a, in_a, diagonal=False) + _kernel_sums(b, b, in_b, in_b, diagonal=False)
    between = _kernel_sums(a, b, in_a, in_b, diagonal=True)
    estimates = within / (size * (size - 1)) - 2 * between / size**2
    return KernelDistance(float(estimates.mean()), float(estimates.std()), size, num_subsets)


def _subsets(count: int, num_subsets: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """(num_subsets, count) indicators of random subsets."""
    chosen = np.zeros((num_subsets, count))
    for row in chosen:
        row[rng.permutation(count)[:size]] = 1
    return chosen


def _kernel_sums(a: np.ndarray, b: np.ndarray, in_a: np.ndarray, in_b: np.ndarray, diagonal: bool) -> np.ndarray:
    """Sum of k(a_i, b_j) over each subset, (num_subsets,); without i = j where `diagonal` is False (b is a)."""
    sums = np.zeros(len(in_a))
    for start in range(0, len(a), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        kernel = (a[rows] @ b.T / a.shape[1] + 1) ** 3
        if not diagonal:
            block = np.arange(len(kernel))
            kernel[block, start + block] = 0
        sums += (in_a[:, rows] * (in_b @ kernel.T)).sum(1)
    return sums


class GaussianReference:
    """Gaussian with the mean and covariance of the training pixels: a generator that knows nothing but second order.

    A model whose samples are no closer to real images than draws from this Gaussian has learned no structure. With the
    centred images as rows of X, the covariance is X' X / (N - 1), so X' z / sqrt(N - 1) with z standard normal (N,) has
    it exactly: no (pixels x pixels) matrix is formed, and large images and volumes need only the memory of the images.

    Args:
        train_images: (N, C, *spatial) in [-1, 1], N >= 2.

    Raises:
        ValueError: for fewer than two images, no spatial axis, or values that are not finite.
    """

    def __init__(self, train_images: Any) -> None:
        images = as_array(train_images, np.float32)
        if images.ndim < 3 or len(images) < 2 or not np.isfinite(images).all():
            raise ValueError(
                f"{type(self).__name__}: at least two finite images (N, C, *spatial) expected, "
                f"got shape {images.shape}."
            )
        self.image_shape = images.shape[1:]
        flat = images.reshape(len(images), -1)
        self.mean = flat.mean(0, dtype=np.float64).astype(np.float32)
        self.factor = (flat - self.mean) / np.float32(np.sqrt(len(flat) - 1))  # (N, pixels)

    def sample(self, count: int, seed: int = 0, clip: bool = True) -> np.ndarray:
        """Draw images.

        Args:
            count: number of images n.
            seed: of the draws.
            clip: cut to [-1, 1], the range of images.

        Returns:
            (n, C, *spatial) float32.
        """
        normal = np.random.default_rng(seed).standard_normal((count, len(self.factor)), dtype=np.float32)
        images = (self.mean + normal @ self.factor).reshape(count, *self.image_shape)
        return images.clip(-1, 1) if clip else images


def _check_features(features: Any, caller: str) -> np.ndarray:
    values = as_array(features)
    if values.ndim != 2 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"{caller}: at least two finite feature vectors (N, D) expected, got shape {values.shape}.")
    return values


def _check_pair(features_a: Any, features_b: Any, caller: str) -> tuple[np.ndarray, np.ndarray]:
    a, b = _check_features(features_a, caller), _check_features(features_b, caller)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{caller}: both sets need the same number of features, got {a.shape[1]} and {b.shape[1]}.")
    return a, b
