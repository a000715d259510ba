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

"""The notebooks run from top to bottom as plain Python, with a training of seconds; in git they have no outputs."""

from __future__ import annotations

import ast
import json
import re
import tempfile
import unittest
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import, set_determinism
from parameterized import parameterized

from tests.bundles.runs import working_directory
from tests.engines.small_run import use_one_thread

matplotlib, has_matplotlib = optional_import("matplotlib")

TUTORIALS = Path(__file__).resolve().parent.parent / "tutorials"
NOTEBOOKS = [(path.stem, path) for path in sorted(TUTORIALS.glob("*.ipynb"))]


def setUpModule() -> None:
    use_one_thread()
    unittest.addModuleCleanup(set_determinism, None)


def cells_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def execute(path: Path, settings: dict[str, int]) -> tuple[dict[str, Any], list[Any]]:
    """Run the code cells in a folder of their own; other settings stand for those at the top of the notebook.

    Returns:
        the names that are left, and what each cell would have shown.
    """
    names: dict[str, Any] = {}
    shown = []
    missing = set(settings)
    with tempfile.TemporaryDirectory() as folder, working_directory(Path(folder)):
        for number, cell in enumerate(cells_of(path)):
            if cell["cell_type"] != "code":
                continue
            source = "".join(cell["source"])
            for name, value in settings.items():
                source, count = re.subn(rf"(?m)^{name} = \d+", f"{name} = {value}", source)
                missing -= {name} if count else set()
            body = ast.parse(source).body
            last = body.pop() if isinstance(body[-1], ast.Expr) else None
            # `dont_inherit`: the notebook's own future imports, not this file's
            exec(compile(ast.Module(body, []), f"{path.name}#{number}", "exec", dont_inherit=True), names)
            if isinstance(last, ast.Expr):
                shown.append(eval(compile(ast.Expression(last.value), f"{path.name}#{number}", "eval"), names))
        written = list(Path(folder).iterdir())
    if missing or written:
        raise AssertionError(f"{path.name}: settings that are not there {missing}, files that it leaves {written}")
    return names, [value for value in shown if value is not None]


class TestFormat(unittest.TestCase):
    def test_there_are_notebooks(self) -> None:
        self.assertIn("100_labels", dict(NOTEBOOKS))

    @parameterized.expand(NOTEBOOKS)
    def test_is_a_notebook_without_outputs(self, _: str, path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        self.assertEqual((content["nbformat"], content["nbformat_minor"]), (4, 5))
        identities = [cell["id"] for cell in content["cells"]]
        self.assertEqual(len(set(identities)), len(identities))
        for cell in content["cells"]:
            self.assertIn(cell["cell_type"], ("code", "markdown"))
            self.assertTrue(all(line.endswith("\n") for line in cell["source"][:-1]))
            if cell["cell_type"] == "code":
                self.assertEqual((cell["outputs"], cell["execution_count"]), ([], None))
        first, *_ = content["cells"]
        self.assertIn("Licensed under the Apache License, Version 2.0", "".join(first["source"]))

    @parameterized.expand(NOTEBOOKS)
    def test_links_lead_somewhere(self, _: str, path: Path) -> None:
        texts = ["".join(cell["source"]) for cell in cells_of(path) if cell["cell_type"] == "markdown"]
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", "\n".join(texts)):
            self.assertTrue((path.parent / target).exists(), target)


@unittest.skipUnless(has_matplotlib, "matplotlib is not installed")
class TestHundredLabels(unittest.TestCase):
    def test_runs_and_shows_what_it_says(self) -> None:
        matplotlib.use("Agg")
        path = TUTORIALS / "100_labels.ipynb"
        names, shown = execute(path, {"max_epochs": 2, "val_interval": 1, "num_images": 160, "num_labels": 40})
        source = names["source"]
        self.assertEqual(sum(item["label"] >= 0 for item in source.part("train")), 40)
        self.assertEqual((len(source.part("train")), len(source.part("val"))), (160, 40))
        views, figure, samples = shown
        self.assertEqual((views.size[0] // 96, views.size[1] // 96), (8, 3))
        pictures = np.asarray(views).astype(int)
        self.assertGreater(np.abs(pictures[:96, :96] - pictures[-96:, :96]).max(), 20)  # an image and its strong view
        self.assertEqual((samples.size[0] // 96, samples.size[1] // 96), (8, 2))
        self.assertEqual([axes.get_title() for axes in figure.axes], ["validation, 40 labels", "pseudo-labels"])
        trained = names["trained"]
        for _, accuracies, sure in trained.values():
            self.assertEqual(list(accuracies), [1, 2])
            self.assertEqual(len(sure), 10)
        decoded = {name: any(bool(p.any()) for p in net.out[-1].parameters()) for name, (net, _, _) in trained.items()}
        self.assertEqual(decoded, {"supervised": False, "fixmatch": True})  # the last layer starts at zero
        self.assertEqual([row["algorithm"] for row in names["results"]], ["supervised", "fixmatch"])


if __name__ == "__main__":
    unittest.main()
