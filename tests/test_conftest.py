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

from __future__ import annotations

import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

CONFTEST = Path(__file__).with_name("conftest.py")

EXAMPLES = """
import unittest

@unittest.skip("JOINTDIFF_DATA is not set")
class TestNeedsData(unittest.TestCase):
    def test_one(self): pass
    def test_two(self): pass

class TestOther(unittest.TestCase):
    def test_passes(self): pass
    def test_needs_schema(self): self.skipTest("JOINTDIFF_META_SCHEMA is not set")
    @unittest.skip("needs a GPU")
    def test_needs_gpu(self): pass
"""


WRITES = """
import unittest
from pathlib import Path

class TestWrites(unittest.TestCase):
    def test_passes(self):
        path = Path("{path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("new")
"""


def run_suite(tests: str, *present: str) -> subprocess.CompletedProcess:
    """The suite of a checkout with these tests and files."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
        (Path(folder) / "test_examples.py").write_text(tests, encoding="utf-8")
        for name in present:
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).touch()
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--rootdir", ".", "."]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


class TestSkipSummary(unittest.TestCase):
    def test_counts_skips_for_want_of_data(self):
        result = run_suite(EXAMPLES)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        lines = result.stdout.strip().splitlines()
        self.assertIn(
            "skipped: 4 tests, 3 of them for want of data (JOINTDIFF_DATA or JOINTDIFF_META_SCHEMA not set)", lines
        )
        self.assertIn("1 passed, 4 skipped", lines[-1], "pytest's own closing line comes last")


class TestCheckout(unittest.TestCase):
    def test_what_a_test_writes_into_a_bundle_fails_the_suite(self):
        for path in ("bundles/one/output/tensorboard/events", "models/model.pt"):
            result = run_suite(WRITES.format(path=path), "bundles/one/configs/train.json")
            self.assertEqual(result.returncode, 1, result.stdout + result.stderr)
            self.assertRegex(result.stdout, rf"written into the checkout by a test: .*{path}")
            self.assertIn("1 passed", result.stdout)

    def test_what_was_there_or_lies_elsewhere_does_not(self):
        result = run_suite(WRITES.format(path="build/new"), "bundles/one/output/summary.json")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertNotIn("written into the checkout", result.stdout)


if __name__ == "__main__":
    unittest.main()
