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

import contextlib
import io
import re
import unittest
from pathlib import Path
from unittest import mock

import monai.bundle
import torch

from tests.bundles.runs import PHANTOMS, TINY, leave_no_trace, temporary_folder, working_directory

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def setUpModule() -> None:
    leave_no_trace()


class TestReadme(unittest.TestCase):
    def test_example_runs_as_it_stands(self):
        names: dict = {}
        exec(compile(BLOCKS[0], "README.md", "exec"), names)
        self.assertEqual(names["logits"].shape, (4, 3))
        self.assertEqual(names["images"].shape, (4, 1, 32, 32))
        self.assertTrue(torch.isfinite(names["images"]).all())

    def test_workflow_example_runs_and_initializes_once(self):
        folder, text = temporary_folder(self), io.StringIO()
        small = {**TINY, **PHANTOMS, "num_samples": 0, "ckpt_dir": str(folder), "output_dir": str(folder / "output")}
        create = monai.bundle.create_workflow

        def create_small(epochs: int, **options):
            self.assertEqual(epochs, 2)
            return create(logging_file=False, **options, **{**small, "epochs": 1})

        with (
            mock.patch.object(monai.bundle, "create_workflow", create_small),
            working_directory(ROOT),
            contextlib.redirect_stdout(text),
        ):
            exec(compile(BLOCKS[1], "README.md", "exec"), {})
        self.assertTrue((folder / "model.pt").is_file())
        self.assertIn("final table", text.getvalue())
        self.assertEqual(text.getvalue().count("data: phantoms of seed 0"), 1)

    def test_links_and_pictures_exist(self):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
            self.assertTrue((ROOT / target).exists(), target)


if __name__ == "__main__":
    unittest.main()
