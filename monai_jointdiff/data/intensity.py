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

"""From stored gray values to [-1, 1]: a rule that is chosen on the training data and stored with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ["IntensityRule"]

_KINDS = ("dtype", "window")
_TOLERANCE = 0.01  # by which floating values may leave their range, as a share of it (interpolation overshoots)


@dataclass(frozen=True)
class IntensityRule:
    """How gray values become [-1, 1].

    `kind="dtype"` goes by how the values are stored: 8-bit values have the fixed range 0 to 255, booleans 0 to 1;
    floating values have the range `float_range` where one is given; all others (12- and 16-bit x-rays, MR, ...) have no
    absolute meaning, and each channel of each image is scaled between its own `percentiles`. `kind="window"` scales a
    fixed window (such as Hounsfield units -1000 to 400) whatever the storage. Values beyond the ends are clipped.

    Args:
        kind: "dtype" or "window".
        percentiles: lower and upper percentile that become -1 and 1.
        float_range: range of floating values, for data that are stored already scaled, such as (0, 1).
        window: lower and upper end of the window that become -1 and 1.

    Raises:
        ValueError: for an unknown kind, or a pair that does not increase.
    """

    kind: str = "dtype"
    percentiles: tuple[float, float] = (0.5, 99.5)
    float_range: tuple[float, float] | None = None
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"IntensityRule: kind must be one of {', '.join(_KINDS)}, got {self.kind!r}.")
        if (self.kind == "window") != (self.window is not None):
            raise ValueError(f"IntensityRule: kind {self.kind!r} and window {self.window} contradict each other.")
        for name in ("percentiles", "float_range", "window"):
            pair = getattr(self, name)
            if pair is None:
                continue
            if len(pair) != 2 or not pair[0] < pair[1]:
                raise ValueError(f"IntensityRule: {name} must be (lower, upper) with lower < upper, got {pair}.")
            object.__setattr__(self, name, (float(pair[0]), float(pair[1])))
        if not 0.0 <= self.percentiles[0] < self.percentiles[1] <= 100.0:
            raise ValueError(f"IntensityRule: percentiles must lie in [0, 100], got {self.percentiles}.")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> IntensityRule:
        """The rule that :meth:`as_dict` wrote down.

        Args:
            content: the arguments by name.

        Returns:
            the rule.

        Raises:
            ValueError: for a name that is no argument.
        """
        unknown = sorted(set(content) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"IntensityRule: unknown entries {', '.join(unknown)}; it has {', '.join(cls.__dataclass_fields__)}."
            )
        arguments: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
        return cls(**arguments)

    @classmethod
    def for_array(cls, images: np.ndarray) -> IntensityRule:
        """The rule for a whole data set in one array: floating values within [0, 1] or [-1, 1] keep that range.

        Args:
            images: all training images.

        Returns:
            the rule.
        """
        if not np.issubdtype(images.dtype, np.floating) or images.size == 0:
            return cls()
        low, high = float(images.min()), float(images.max())
        if 0.0 <= low and high <= 1.0:
            return cls(float_range=(0.0, 1.0))
        if -1.0 <= low and high <= 1.0:
            return cls(float_range=(-1.0, 1.0))
        return cls()

    def as_dict(self) -> dict[str, Any]:
        """The arguments by name, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Scale one image.

        Args:
            image: (C, *spatial), as stored.

        Returns:
            (C, *spatial) float32 in [-1, 1]; a channel without contrast under percentiles is -1 everywhere.

        Raises:
            ValueError: for NaN or infinite values, or floating values outside of the range that the rule knows.
        """
        if np.issubdtype(image.dtype, np.floating) and not np.isfinite(image).all():
            raise ValueError("IntensityRule: the image holds NaN or infinite values.")
        low, high = self._ends(image)
        scaled = (image.astype(np.float32) - low) * (2.0 / np.maximum(high - low, 1e-12)) - 1.0
        return np.clip(scaled, -1.0, 1.0).astype(np.float32)

    def _ends(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The values (C or 1, 1, ...) that become -1 and 1."""
        pair: Any
        if self.window is not None:
            pair = self.window
        elif image.dtype == np.uint8:
            pair = (0.0, 255.0)
        elif image.dtype == np.bool_:
            pair = (0.0, 1.0)
        elif self.float_range is not None and np.issubdtype(image.dtype, np.floating):
            pair = self._checked_range(image)
        else:
            pair = np.percentile(image.reshape(len(image), -1), self.percentiles, axis=1)
        low, high = (np.asarray(end, dtype=np.float32).reshape(-1, *(1,) * (image.ndim - 1)) for end in pair)
        return low, high

    def _checked_range(self, image: np.ndarray) -> tuple[float, float]:
        assert self.float_range is not None
        low, high = self.float_range
        slack = _TOLERANCE * (high - low)
        if image.min() < low - slack or image.max() > high + slack:
            raise ValueError(
                f"IntensityRule: floating values must lie in [{low}, {high}] as in the training data, "
                f"got {image.min()} to {image.max()}."
            )
        return low, high

    def __str__(self) -> str:
        """In words."""
        if self.window is not None:
            return f"window {self.window[0]:g} to {self.window[1]:g}"
        floating = f", floating values {self.float_range[0]:g} to {self.float_range[1]:g}" if self.float_range else ""
        return f"8-bit values 0 to 255{floating}, others percentiles {self.percentiles[0]:g} to {self.percentiles[1]:g}"
