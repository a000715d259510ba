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
import json
import re
import tempfile
import unittest
from pathlib import Path

from parameterized import parameterized

from benchmarks import render

RESULT = {
    "name": "speed",
    "title": "Speed of one step",
    "rows": [
        {"method": "ours", "images/s": {"mean": 70.12, "low": 68.0, "high": 72.5, "n": 10}, "ratio": 2.126},
        {"method": "two calls", "images/s": 33.0, "steps": 1200, "passed": False},
    ],
    "notes": ["Median of 10 repeats."],
    "environment": {"cpu": "A CPU", "threads": 2, "versions": {"torch": "2.13.0"}, "commit": "abc"},
}

TABLE = """\
**Speed of one step**

| method | images/s | ratio | steps | passed |
|---|---:|---:|---:|---:|
| ours | 70.1 [68.0, 72.5] | 2.13 | - | - |
| two calls | 33.0 | - | 1,200 | no |

Median of 10 repeats.

*Measured on A CPU, 2 threads, torch 2.13.0, commit abc*"""

JUDGED = {
    **RESULT,
    "targets": [
        {"figure": "step", "asked": "at least 2 times", "found": "2.13 times", "met": True, "about": "2 threads"},
        {"figure": "other step", "asked": "at least 3 times", "found": "1.5 times", "met": False, "about": ""},
    ],
}
LEFT = {**RESULT, "name": "left", "targets": [{"figure": "a|b", "asked": "0.9", "found": "", "met": None}]}
INDEX = """\
# Benchmarks
## Curves: `python -m benchmarks.the_curve`, 2D & 3D
<!-- table:left -->
<!-- end:left -->
### Speed
<!-- table:speed -->
<!-- end:speed -->
<!-- table:never -->
<!-- end:never -->
"""
SUMMARY = """\
**Of 4 targets 1 are met, 1 MISSED, 2 not run**

| what | asked for | measured | verdict | where |
|---|---|---|---|---|
| a\\|b | 0.9 | - | not run | [the_curve](benchmarks/README.md#curves-python--m-benchmarksthe_curve-2d--3d) |
| step | at least 2 times | 2.13 times; 2 threads | met | [Speed](benchmarks/README.md#speed) |
| other step | at least 3 times | 1.5 times | MISSED | [Speed](benchmarks/README.md#speed) |
| the table `never` | measured | - | not run | [Speed](benchmarks/README.md#speed) |"""

DOCUMENT = "# Title\n\n<!-- table:speed -->\nold\n<!-- end:speed -->\n\nafter\n"


class TestFormat(unittest.TestCase):
    @parameterized.expand(
        [
            (None, None, "-"),
            (True, None, "yes"),
            (3, None, "3"),
            (12345, None, "12,345"),
            (0.98123, None, "0.981"),
            (0.98123, 4, "0.9812"),
            (0.0, None, "0"),
            (1234.5, None, "1,234"),
            (-0.0123, None, "-0.0123"),
            (2.5e-7, None, "2.5e-07"),
            ("a|b", None, "a\\|b"),
            ({"mean": 0.5, "low": None, "high": None, "n": 1}, None, "0.500"),
            ({"mean": 0.00002, "low": -0.004, "high": 0.00404}, None, "0.00002 [-0.00400, 0.00404]"),
            ({"mean": 0.9812, "low": 0.97, "high": 1.0}, 2, "0.98 [0.97, 1.00]"),
        ]
    )
    def test_value(self, value, digits, expected):
        self.assertEqual(render.format_value(value, digits), expected)

    def test_refuses_what_is_no_value(self):
        for value in ([1, 2], {"low": 1}):
            with self.subTest(value=value), self.assertRaisesRegex(TypeError, "format_value: got"):
                render.format_value(value)


class TestDocument(unittest.TestCase):
    def test_table(self):
        self.assertEqual(render.render_table(RESULT), TABLE)

    def test_replaces_between_markers_only(self):
        expected = f"# Title\n\n<!-- table:speed -->\n{TABLE}\n<!-- end:speed -->\n\nafter\n"
        self.assertEqual(render.render_document(DOCUMENT, {"speed": RESULT}), expected)

    def test_idempotent(self):
        once = render.render_document(DOCUMENT, {"speed": RESULT})
        self.assertEqual(render.render_document(once, {"speed": RESULT}), once)

    def test_table_without_results_says_so(self):
        text = "<!-- table:none -->\n<!-- end:none -->\n"
        rendered = render.render_document(text, {"speed": RESULT})
        self.assertEqual(rendered, "<!-- table:none -->\nNot measured yet.\n<!-- end:none -->\n")
        self.assertEqual(render.render_document(rendered, {}), rendered)

    def test_two_tables(self):
        other = {**RESULT, "name": "other", "title": "Other"}
        text = DOCUMENT + "<!-- table:other -->\n<!-- end:other -->\n"
        rendered = render.render_document(text, {"speed": RESULT, "other": other})
        self.assertEqual([name for name, _, _ in render.marked_spans(rendered, "d")], ["speed", "other"])
        self.assertIn("**Other**", rendered)

    @parameterized.expand(
        [
            ("open", "<!-- table:speed -->\n", "markers come in pairs"),
            ("crossed", "<!-- table:speed -->\n<!-- end:other -->\n", "markers come in pairs"),
            ("swapped", "<!-- end:speed -->\n<!-- table:speed -->\n", "markers come in pairs"),
        ]
    )
    def test_wrong_markers(self, _, text, message):
        with self.assertRaisesRegex(ValueError, message):
            render.render_document(text, {"speed": RESULT})

    def test_no_rows(self):
        with self.assertRaisesRegex(ValueError, "no rows"):
            render.render_table({**RESULT, "rows": []})


class TestTargets(unittest.TestCase):
    def test_stand_between_table_and_notes(self):
        first = "- step, at least 2 times: met (2.13 times; 2 threads)."
        second = "- other step, at least 3 times: MISSED (1.5 times)."
        before, after = TABLE.split("\n\nMedian")
        expected = f"{before}\n\nAsked for, and found:\n\n{first}\n{second}\n\nMedian{after}"
        self.assertEqual(render.render_table(JUDGED), expected)

    def test_result_without_targets(self):
        self.assertEqual(render.render_table({**RESULT, "targets": []}), TABLE)

    def test_summary_has_the_order_of_the_index(self):
        results = {"speed": JUDGED, "left": LEFT}
        self.assertEqual(render.render_table(render.summary(results, INDEX)), SUMMARY)

    def test_table_without_targets_has_no_row(self):
        found = render.summary({"speed": RESULT, "left": LEFT, "never": RESULT}, INDEX)
        self.assertEqual([row["what"] for row in found["rows"]], ["a|b"])

    def test_no_target_is_lost(self):
        with self.assertRaisesRegex(ValueError, "targets of other have no table"):
            render.summary({"speed": JUDGED, "left": LEFT, "other": JUDGED}, INDEX)

    @parameterized.expand(
        [
            ("unknown", {"figure": "a", "asked": "b", "found": "c", "met": True, "verdict": "met"}),
            ("missing", {"figure": "a", "asked": "b"}),
            ("no verdict", {"figure": "a", "asked": "b", "found": "c", "met": None}),
        ]
    )
    def test_wrong_target(self, _, target):
        with self.assertRaisesRegex(ValueError, "result 'speed' has a wrong target"):
            render.render_table({**RESULT, "targets": [target]})


class TestMain(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.document = self.folder / "README.md"
        self.document.write_text(DOCUMENT, encoding="utf-8")
        (self.folder / "speed.json").write_text(json.dumps(RESULT), encoding="utf-8")

    def run_main(self, *options: str) -> tuple[int, str]:
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            status = render.main([str(self.document), "--results", str(self.folder), *options])
        return status, output.getvalue()

    def test_check_fails_when_stale_and_writes_nothing(self):
        status, output = self.run_main("--check")
        self.assertEqual(status, 1)
        self.assertIn("README.md is out of date", output)
        self.assertEqual(self.document.read_text(encoding="utf-8"), DOCUMENT)

    def test_write_then_check(self):
        self.assertEqual(self.run_main()[0], 0)
        self.assertIn(TABLE, self.document.read_text(encoding="utf-8"))
        self.assertEqual(self.run_main("--check"), (0, ""))

    def test_new_result_makes_it_stale(self):
        self.run_main()
        changed = {**RESULT, "title": "Changed"}
        (self.folder / "speed.json").write_text(json.dumps(changed), encoding="utf-8")
        self.assertEqual(self.run_main("--check")[0], 1)

    def test_name_is_that_of_the_file(self):
        (self.folder / "renamed.json").write_text(json.dumps(RESULT), encoding="utf-8")
        with self.assertRaisesRegex(ValueError, "renamed.json"):
            self.run_main()

    def test_summary_is_of_the_results_of_the_folder(self):
        self.document.write_text("<!-- table:summary -->\n<!-- end:summary -->\n", encoding="utf-8")
        (self.folder / "speed.json").write_text(json.dumps(JUDGED), encoding="utf-8")
        self.assertEqual(self.run_main()[0], 0)
        text = self.document.read_text(encoding="utf-8")
        self.assertIn("| other step | at least 3 times | 1.5 times | MISSED | [speed](benchmarks/README.md#", text)
        self.assertIn("| the table `main_job` | measured | - | not run |", text)

    def test_wrong_target_names_the_file(self):
        (self.folder / "speed.json").write_text(json.dumps({**RESULT, "targets": [{}]}), encoding="utf-8")
        with self.assertRaisesRegex(ValueError, "'speed' has a wrong target"):
            self.run_main()


class TestRepository(unittest.TestCase):
    def test_every_target_stands_once_in_the_readme(self):
        results = render.load_results()
        text = (render.ROOT / "README.md").read_text(encoding="utf-8")
        ((_, start, end),) = render.marked_spans(text, "README.md")
        rows = [line[2:].split(" | ")[0] for line in text[start:end].splitlines() if line.startswith("| ")]
        figures = [target["figure"] for result in results.values() for target in result.get("targets", ())]
        self.assertEqual(len(figures), len(set(figures)))
        shown = [row for row in rows[1:] if not row.startswith("the table `")]  # of which there are no results
        self.assertEqual(sorted(shown), sorted(figures))

    def test_links_of_the_summary_lead_to_headings(self):
        text = (render.ROOT / "README.md").read_text(encoding="utf-8")
        headings = set(re.findall(r"^#+ (.*)$", render.INDEX.read_text(encoding="utf-8"), re.M))
        anchors = {re.sub(r"[`:,.&]", "", heading).lower().replace(" ", "-") for heading in headings}
        linked = set(re.findall(r"\(benchmarks/README.md#(.*?)\)", text))
        self.assertGreater(len(linked), 8)
        self.assertLessEqual(linked, anchors)

    def test_committed_documents_are_up_to_date(self):
        output = io.StringIO()
        with contextlib.redirect_stderr(output):
            status = render.main(["--check"])
        self.assertEqual(status, 0, output.getvalue())


if __name__ == "__main__":
    unittest.main()
