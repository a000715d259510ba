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

"""What holds for the package as a whole: version, import rules, license headers, public names, paths."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import unittest
import unittest.mock
from collections.abc import Iterator
from pathlib import Path

import monai_jointdiff

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "monai_jointdiff"

HEADER = """\
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
"""

FOUNDATION = frozenset({"networks", "schedulers", "losses", "metrics", "transforms", "data"})
UPPER = frozenset({"engines", "handlers", "visualize"})
# what each subpackage may import of its siblings
ALLOWED: dict[str, frozenset[str]] = {
    **{name: frozenset() for name in FOUNDATION},
    "inferers": frozenset({"networks", "schedulers"}),
    **{name: FOUNDATION | {"inferers"} | (UPPER - {name}) for name in UPPER},
}


def subpackages() -> list[str]:
    return sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def python_files() -> list[Path]:
    folders = ("monai_jointdiff", "tests", "benchmarks", "bundles", "docs", "tutorials")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(files + list(ROOT.glob("*.py")))


def text_files() -> list[Path]:
    suffixes = {".py", ".json", ".md", ".toml", ".txt", ".conf", ".cfg", ".yaml", ".yml", ".csv"}
    folders = ("monai_jointdiff", "tests", "benchmarks", "bundles", "docs", "tutorials")
    written = ("models", "output", "eval")  # what a user's runs leave behind inside a bundle
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    kept = [path for path in found if not (path.is_relative_to(ROOT / "bundles") and set(path.parts) & set(written))]
    top = [path for path in ROOT.iterdir() if path.is_file() and (path.suffix in suffixes or path.name == "Makefile")]
    return sorted(kept + top + [ROOT / ".ci" / "run"])


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of all modules a file imports, at the top or inside functions; relative ones resolved."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def sibling_imports(name: str) -> dict[str, set[Path]]:
    """The siblings a subpackage imports, with the files that do."""
    found: dict[str, set[Path]] = {}
    for path in (PACKAGE / name).rglob("*.py"):
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[0] == "monai_jointdiff" and len(parts) > 1 and parts[1] in subpackages() and parts[1] != name:
                found.setdefault(parts[1], set()).add(path.relative_to(ROOT))
    return found


class TestVersion(unittest.TestCase):
    def test_equals_pyproject(self):
        declared = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
        self.assertIsNotNone(declared)
        self.assertEqual(monai_jointdiff.__version__, declared.group(1))

    def test_constraints_are_exact_and_portable(self):
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        for line in (line for line in lines if line and not line.startswith("#")):
            self.assertRegex(line, r"^[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*$", "a pin is name==version")
            self.assertNotRegex(line, r"(?i)^(nvidia|cuda|triton)", "these come with the build of torch in use")


class TestImports(unittest.TestCase):
    def test_package_alone_is_light(self):
        code = (
            "import sys, monai_jointdiff; heavy = {'torch', 'monai', 'numpy', 'ignite', 'matplotlib'}; "
            "print(sorted({m.split('.')[0] for m in sys.modules} & heavy))"
        )
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        self.assertEqual(result.stdout.strip(), "[]")

    def test_every_subpackage_has_a_rule(self):
        self.assertEqual(set(subpackages()) - set(ALLOWED), set(), "new subpackages are entered in ALLOWED")

    def test_one_way(self):
        for name in subpackages():
            with self.subTest(subpackage=name):
                forbidden = {k: sorted(map(str, v)) for k, v in sibling_imports(name).items() if k not in ALLOWED[name]}
                self.assertEqual(forbidden, {}, f"{name} may import only {sorted(ALLOWED[name])}")

    def test_no_cycle(self):
        graph = {name: set(sibling_imports(name)) for name in subpackages()}
        while leaves := [name for name, needs in graph.items() if not needs & set(graph)]:
            graph = {name: needs for name, needs in graph.items() if name not in leaves}
        self.assertEqual(graph, {}, "these subpackages import each other in a circle")

    def test_nothing_imports_what_stands_above(self):
        for path in PACKAGE.rglob("*.py"):
            above = {m for m in imported_modules(path) if m.split(".")[0] in ("bundles", "tests", "benchmarks")}
            self.assertEqual(above, set(), path.relative_to(ROOT))

    def test_relative_imports_are_resolved(self):
        # the oracle of the rule itself: a relative import of a sibling is seen as what it is
        engines = PACKAGE / "engines" / "example.py"
        names = {"from ..losses import x": "monai_jointdiff.losses", "from . import y": "monai_jointdiff.engines.y"}
        for source, expected in names.items():
            with self.subTest(source=source), unittest.mock.patch.object(Path, "read_text", return_value=source):
                self.assertIn(expected, set(imported_modules(engines)))


class TestPublicNames(unittest.TestCase):
    def test_all_resolves_and_is_documented(self):
        for subpackage in subpackages():
            module = importlib.import_module(f"monai_jointdiff.{subpackage}")
            with self.subTest(subpackage=subpackage):
                self.assertTrue(inspect.getdoc(module), "a subpackage says what it holds")
                self.assertEqual(len(module.__all__), len(set(module.__all__)))
                for name in module.__all__:
                    self.assertTrue(hasattr(module, name), f"{subpackage}.__all__ names {name}, which is not there")
                    public = getattr(module, name)
                    if inspect.isclass(public) or inspect.isroutine(public):
                        doc = public.__dict__.get("__doc__") if inspect.isclass(public) else public.__doc__
                        # dataclass and NamedTuple write "Name(field, ...)" where the author wrote nothing
                        self.assertTrue(doc and not doc.startswith(f"{name}("), f"{subpackage}.{name} has no docstring")


class TestFiles(unittest.TestCase):
    def test_license_headers(self):
        without = [
            str(p.relative_to(ROOT)) for p in python_files() if not p.read_text(encoding="utf-8").startswith(HEADER)
        ]
        self.assertEqual(without, [])

    def test_no_paths_of_one_machine(self):
        absolute = re.compile(r"(?<![\w.:/-])(?:/(?:home|root|Users|work|mnt|scratch)/\w|[A-Z]:\\\\?Users)")
        hits = [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            for path in text_files()
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if absolute.search(line)
        ]
        self.assertEqual(hits, [])

    def test_license_is_apache(self):
        text = (ROOT / "LICENSE").read_text(encoding="utf-8")
        self.assertIn("Apache License\n                           Version 2.0, January 2004", text)
        self.assertIn("END OF TERMS AND CONDITIONS", text)

    def test_typed(self):
        self.assertTrue((PACKAGE / "py.typed").is_file())


if __name__ == "__main__":
    unittest.main()
