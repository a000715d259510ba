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

import re
import unittest
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


class TestReadme(unittest.TestCase):
    def test_example_runs_as_it_stands(self):
        names: dict = {}
        exec(compile(BLOCKS[0], "README.md", "exec"), names)
        self.assertEqual(names["logits"].shape, (4, 3))
        self.assertEqual(names["images"].shape, (4, 1, 32, 32))
        self.assertTrue(torch.isfinite(names["images"]).all())

    def test_workflow_example_names_a_configuration_that_is_there(self):
        compile(BLOCKS[1], "README.md", "exec")
        (path,) = re.findall(r'config_file="([^"]+)"', BLOCKS[1])
        self.assertTrue((ROOT / path).is_file())

    def test_links_and_pictures_exist(self):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
            self.assertTrue((ROOT / target).exists(), target)


if __name__ == "__main__":
    unittest.main()
