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

"""What pytest prints at the end of the suite: how many tests did not run because their data are not there."""

from __future__ import annotations

from typing import Any

NEEDS = ("JOINTDIFF_DATA", "JOINTDIFF_META_SCHEMA")  # a test that skips for want of one of these names it in its reason


def wants_data(report: Any) -> bool:
    """Whether a skipped test's reason names a variable that says where data are."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return any(name in reason for name in NEEDS)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the number of skipped tests, and how many of them lack data."""
    skipped = terminalreporter.stats.get("skipped", [])
    wanting = sum(map(wants_data, skipped))
    terminalreporter.write_line(
        f"skipped: {len(skipped)} tests, {wanting} of them for want of data ({' or '.join(NEEDS)} not set)"
    )
