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

import unittest

import numpy as np
from parameterized import parameterized

from monai_jointdiff.visualize import format_table

ROWS = [
    {"images": "samples", "count": 600, "frechet": 0.0123456},
    {"images": "real | floor", "count": np.int64(20), "frechet": None, "kernel": np.float32(2e-6)},
]


class TestFormatTable(unittest.TestCase):
    def test_plain(self):
        expected = [
            "images        count  frechet    kernel",
            "------------  -----  -------  --------",
            "samples         600  0.01235         -",
            "real | floor     20        -  2.00e-06",
        ]
        self.assertEqual(format_table(ROWS), "\n".join(expected))

    def test_markdown_can_be_read_back(self):
        lines = format_table(ROWS, style="markdown").splitlines()
        cells = [[cell.strip() for cell in line.replace("\\|", "&").strip("|").split("|")] for line in lines]
        self.assertEqual(cells[0], ["images", "count", "frechet", "kernel"])
        self.assertEqual([cell.endswith(":") for cell in cells[1]], [False, True, True, True])
        self.assertEqual(cells[2:], [["samples", "600", "0.01235", "-"], ["real & floor", "20", "-", "2.00e-06"]])
        self.assertEqual(len({len(line) for line in lines}), 1)

    def test_columns_choose_and_order(self):
        self.assertEqual(format_table(ROWS, ["count", "images"]).splitlines()[0].split(), ["count", "images"])

    @parameterized.expand([(True, "True"), (0.0, "0"), (123456.0, "1.235e+05"), (-0.5, "-0.5"), ("x", "x")])
    def test_cells(self, value, expected):
        self.assertEqual(format_table([{"a": value}]).splitlines()[2].strip(), expected)

    def test_wrong_input(self):
        for rows, style in (([], "plain"), (ROWS, "html")):
            with self.assertRaisesRegex(ValueError, "format_table"):
                format_table(rows, style=style)


if __name__ == "__main__":
    unittest.main()
