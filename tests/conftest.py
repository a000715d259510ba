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

"""At the end of the suite: how many tests did not run because their data are not there, and what they left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BEFORE = pytest.StashKey[set[Path]]()  # where a bundle run without --ckpt_dir and --output_dir would write
LEFT = pytest.StashKey[list[Path]]()
NEEDS = ("JOINTDIFF_DATA", "JOINTDIFF_META_SCHEMA")  # a test that skips for want of one of these names it in its reason


def wants_data(report: Any) -> bool:
    """Whether a skipped test's reason names a variable that says where data are."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return any(name in reason for name in NEEDS)


def files_of_bundles(root: Path) -> set[Path]:
    """Everything in the folder of the bundles, and `models` and `output` of the checkout itself."""
    folders = [root / name for name in ("bundles", "models", "output")]
    return {path for folder in folders for path in folder.rglob("*")} | {one for one in folders if one.exists()}


def pytest_sessionstart(session: Any) -> None:
    """Remember which files there are before the tests."""
    session.config.stash[BEFORE] = files_of_bundles(session.config.rootpath)


def pytest_sessionfinish(session: Any) -> None:
    """Fail where tests wrote into the checkout."""
    left = sorted(files_of_bundles(session.config.rootpath) - session.config.stash[BEFORE])
    session.config.stash[LEFT] = left
    if left and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the number of skipped tests, how many of them lack data, and files that tests left in the checkout."""
    for path in terminalreporter.config.stash[LEFT]:
        terminalreporter.write_line(f"written into the checkout by a test: {path}", red=True)
    skipped = terminalreporter.stats.get("skipped", [])
    wanting = sum(map(wants_data, skipped))
    terminalreporter.write_line(
        f"skipped: {len(skipped)} tests, {wanting} of them for want of data ({' or '.join(NEEDS)} not set)"
    )
