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

"""Mean of independent repeats, and how far it may be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from monai.utils import optional_import

from monai_jointdiff.metrics.bootstrap import Interval

__all__ = ["mean_of_repeats"]

student_t, _ = optional_import("scipy.stats", name="t")


def mean_of_repeats(values: Sequence[float], confidence: float = 0.95) -> Interval:
    r"""Mean of a figure over independent repeats, with Student's interval.

    With n repeats of mean m and standard deviation s (over n - 1) the ends are :math:`m \pm t_{n-1}\, s / \sqrt{n}`. Of
    few repeats it is wide: with two the factor t is 12.7, with three 4.3, with five 2.8. For a figure that is bounded
    it may reach beyond the bounds.

    Args:
        values: the figure of each repeat.
        confidence: of the interval, in (0, 1).

    Returns:
        mean and interval; with one repeat there is no interval, and `reason` says so.

    Raises:
        ValueError: for no values, one that is not finite, or a confidence out of range.
        OptionalImportError: for several values without scipy.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"mean_of_repeats: at least one value, all finite, expected, got {list(values)}.")
    if not 0 < confidence < 1:
        raise ValueError(f"mean_of_repeats: confidence must be in (0, 1), got {confidence}.")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, reason="one repeat")
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(student_t.ppf((1 + confidence) / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)
