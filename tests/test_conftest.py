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


class TestSkipSummary(unittest.TestCase):
    def test_counts_skips_for_want_of_data(self):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
            (Path(folder) / "test_examples.py").write_text(EXAMPLES, encoding="utf-8")
            command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "."]
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        lines = result.stdout.strip().splitlines()
        self.assertIn(
            "skipped: 4 tests, 3 of them for want of data (JOINTDIFF_DATA or JOINTDIFF_META_SCHEMA not set)", lines
        )
        self.assertIn("1 passed, 4 skipped", lines[-1], "pytest's own closing line comes last")


if __name__ == "__main__":
    unittest.main()
