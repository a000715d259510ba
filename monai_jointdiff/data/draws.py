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

"""Every random number of a training run is a function of (seed, number of the draw).

Draw n is the n-th image that the whole run sees, whatever the number of processes, loader workers and interruptions.
The sampler yields draw numbers, the order says which image a draw shows, and the data set seeds its random transforms
from the draw, so that a resumed run continues the very same stream without any saved random state.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import Compose, Randomizable
from torch.utils.data import Dataset, Sampler

__all__ = [
    "BalancedOrder",
    "DrawBatchSampler",
    "DrawDataset",
    "DrawOrder",
    "ShuffledOrder",
    "draw_seed",
    "share_random_state",
]


def draw_seed(seed: int, draw: int, stream: str) -> int:
    """A 64-bit seed for one purpose of one draw: a hash, so that neighbouring draws and streams are unrelated.

    Args:
        seed: seed of the run.
        draw: number of the draw (or of the iteration, epoch, sample: whatever is counted).
        stream: what the numbers are for, such as `"noise"` or `"transforms"`.

    Returns:
        an integer in [0, 2**64), accepted by `torch.Generator.manual_seed` and `numpy.random.default_rng`.
    """
    digest = hashlib.blake2b(f"{int(seed)}/{int(draw)}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class DrawOrder(ABC):
    """Which of `length` images draw number n shows: a pure function of (seed, n).

    The draws are cut into epochs of `length` draws; a subclass arranges one epoch.

    Args:
        length: number of images.
        seed: seed of the run.

    Raises:
        ValueError: when there is no image.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"{type(self).__name__}: needs at least one image, got length={length}.")
        self.length = length
        self.seed = seed
        self._kept: tuple[int, np.ndarray] | None = None

    @abstractmethod
    def arrange(self, epoch: int) -> np.ndarray:
        """The indices (length,) of the images that the draws of one epoch show."""

    def generator(self, epoch: int) -> np.random.Generator:
        """The random numbers that arrange one epoch."""
        return np.random.default_rng(draw_seed(self.seed, epoch, "order"))

    def __call__(self, draw: int) -> int:
        """Index of the image that draw number `draw` shows."""
        epoch, position = divmod(draw, self.length)
        if self._kept is None or self._kept[0] != epoch:
            self._kept = epoch, self.arrange(epoch)
        return int(self._kept[1][position])


class ShuffledOrder(DrawOrder):
    """Every image once per epoch, in a new order each time."""

    def arrange(self, epoch: int) -> np.ndarray:
        """A permutation (length,) of all images."""
        return self.generator(epoch).permutation(self.length)


class BalancedOrder(DrawOrder):
    """The labelled draws of an epoch are shared equally among the classes; unlabelled images are seen once per epoch.

    With U unlabelled images, the N - U labelled draws of an epoch go to the C classes that occur, as equally as whole
    numbers allow (who gets the remainder changes from epoch to epoch). A class's images take turns: none is seen twice
    more often than another of its class within the epoch.

    Args:
        labels: (N,) class indices, -1 for unlabelled.
        seed: seed of the run.

    Raises:
        ValueError: when the labels are not one integer per image.
    """

    def __init__(self, labels: Sequence[int] | np.ndarray, seed: int) -> None:
        array = np.asarray(labels)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"{type(self).__name__}: balancing needs one integer label per image, got shape {array.shape} of "
                f"{array.dtype}; use ShuffledOrder for multi-label data."
            )
        super().__init__(len(array), seed)
        self.unlabelled = np.flatnonzero(array < 0)
        self.members = [np.flatnonzero(array == label) for label in np.unique(array[array >= 0])]

    def arrange(self, epoch: int) -> np.ndarray:
        """The indices (length,) of one epoch, classes equally often."""
        generator = self.generator(epoch)
        shares = self._shares(generator)
        labelled = [self._turns(members, share, generator) for members, share in zip(self.members, shares, strict=True)]
        return generator.permutation(np.concatenate([self.unlabelled, *labelled]))

    def _shares(self, generator: np.random.Generator) -> np.ndarray:
        classes = len(self.members)
        if classes == 0:
            return np.zeros(0, dtype=int)
        base, remainder = divmod(self.length - len(self.unlabelled), classes)
        return base + generator.permutation(np.arange(classes) < remainder)

    @staticmethod
    def _turns(members: np.ndarray, share: int, generator: np.random.Generator) -> np.ndarray:
        rounds = -(-int(share) // len(members))
        return np.concatenate([generator.permutation(members) for _ in range(rounds)] or [members[:0]])[: int(share)]


def share_random_state(transform: Any, state: np.random.RandomState) -> None:
    """Let every random transform inside `transform` draw from one `RandomState`.

    `Compose.set_random_state` gives each leaf a state of its own, which has to be seeded for every item (0.9 ms for
    five transforms); with one shared state, seeding that state is enough.

    Args:
        transform: a MONAI transform, a `Compose` of such (nested, `OneOf` and the like included), or any callable.
        state: the state to share.
    """
    if isinstance(transform, Compose):
        transform.R = state
        for child in transform.transforms:
            share_random_state(child, state)
    elif isinstance(transform, Randomizable):
        transform.set_random_state(state=state)


class DrawDataset(Dataset[dict[Hashable, Any]]):
    """Data set that is asked for draws instead of images.

    Args:
        data: items, dictionaries.
        transform: deterministic part of the preparation; its result is cached and must not be changed in place.
        random_transform: random part; all its MONAI transforms draw from one state, seeded from (seed, draw).
        order: which item a draw shows. None: :class:`ShuffledOrder`.
        seed: seed of the run.
        cache: keep the results of `transform` (made here, once) in memory.

    Raises:
        ValueError: when the order is for another number of items.
    """

    def __init__(
        self,
        data: Sequence[Mapping[Hashable, Any]],
        transform: Callable[[Any], Mapping[Hashable, Any]],
        random_transform: Callable[[Any], Mapping[Hashable, Any]] | None = None,
        order: DrawOrder | None = None,
        seed: int = 0,
        cache: bool = True,
    ) -> None:
        self.order = order if order is not None else ShuffledOrder(len(data), seed)
        if self.order.length != len(data):
            raise ValueError(
                f"{type(self).__name__}: the order arranges {self.order.length} images, there are {len(data)} items."
            )
        self.data = data
        self.transform = transform
        self.random_transform = random_transform
        self.seed = seed
        self.state = np.random.RandomState()
        if random_transform is not None:
            share_random_state(random_transform, self.state)
        self._cached = [transform(dict(item)) for item in data] if cache else None

    def __len__(self) -> int:
        """Number of items: the draws of one epoch of the order; draws themselves are unbounded."""
        return len(self.data)

    def __getitem__(self, draw: int) -> dict[Hashable, Any]:
        """The item that draw number `draw` shows, randomly transformed as this draw demands, and `draw` itself."""
        item = self.undisturbed(self.order(draw))
        if self.random_transform is not None:
            low_high = divmod(draw_seed(self.seed, draw, "transforms"), 2**32)
            self.state.seed(low_high)
            item = dict(self.random_transform(item))
        item["draw"] = draw
        return item

    def undisturbed(self, index: int) -> dict[Hashable, Any]:
        """Item number `index`, whatever draw shows it, without random transforms."""
        return dict(self.transform(dict(self.data[index])) if self._cached is None else self._cached[index])

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> DrawDataset:
        """Change nothing: MONAI's `DataLoader` calls this in every worker, and here the draw alone decides.

        Args:
            seed: ignored.
            state: ignored.

        Returns:
            this data set.
        """
        return self


class DrawBatchSampler(Sampler[list[int]]):
    """Batches of draw numbers for one process, from the iteration where the run stands to the end of that epoch.

    Iteration i on rank r of W, with B images per rank, has the draws i*B*W + r*B + [0..B): together the ranks see
    exactly the draws that one process with batch size B*W would see. A handler sets `iteration` before each epoch (and
    when a run is resumed); the sampler itself remembers nothing.

    Args:
        batch_size: images per iteration and rank, B.
        iterations_per_epoch: iterations per epoch.
        rank: number of this process, r.
        world_size: number of processes, W.

    Raises:
        ValueError: when a number is not positive, or the rank not below the world size.
    """

    def __init__(self, batch_size: int, iterations_per_epoch: int, rank: int = 0, world_size: int = 1) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("iterations_per_epoch", iterations_per_epoch),
            ("world_size", world_size),
        ):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be at least 1, got {value}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"{type(self).__name__}: rank must be in [0, world_size={world_size}), got {rank}.")
        self.batch_size = batch_size
        self.iterations_per_epoch = iterations_per_epoch
        self.rank = rank
        self.world_size = world_size
        self.iteration = 0

    def __len__(self) -> int:
        """Iterations of a whole epoch."""
        return self.iterations_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Lists of B draw numbers, for the iterations that are left of the current epoch."""
        end = (self.iteration // self.iterations_per_epoch + 1) * self.iterations_per_epoch
        for iteration in range(self.iteration, end):
            first = (iteration * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
