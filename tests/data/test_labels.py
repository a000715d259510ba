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


"""Labels as people write them."""

from __future__ import annotations

import math
import unittest
from typing import Any

import numpy as np
from parameterized import parameterized

from monai_jointdiff.data import EncodedLabels, encode_labels
from monai_jointdiff.data.labels import split_names


def encode(labels: list[Any], class_names: list[str] | None = None, multi_label: bool | None = None) -> EncodedLabels:
    return encode_labels(labels, class_names, [f"{n}.png" for n in range(len(labels))], multi_label)


class TestOneLabel(unittest.TestCase):
    @parameterized.expand(
        [
            ("int", [1, 0, 2]),
            ("numpy", list(np.array([1, 0, 2], dtype=np.uint8))),
            ("text", ["1", " 0", "2 "]),
            ("whole_floats", [1.0, "0.0", np.float32(2)]),
        ]
    )
    def test_indices(self, _: str, labels: list[Any]) -> None:
        self.assertEqual(encode(labels), ([1, 0, 2], ["0", "1", "2"], False))
        self.assertEqual(encode(labels, ["a", "b", "c", "d"]), ([1, 0, 2], ["a", "b", "c", "d"], False))

    def test_names_are_sorted_unless_given(self) -> None:
        labels = ["pneumonia", "normal", " pneumonia "]
        self.assertEqual(encode(labels), ([1, 0, 1], ["normal", "pneumonia"], False))
        self.assertEqual(encode(labels, ["pneumonia", "normal", "covid"]).labels, [0, 1, 0])

    def test_names_joined_by_commas(self) -> None:
        expected = encode(["normal", "pleural effusion"], ["pleural effusion", "normal"])
        names: Any = "pleural effusion, normal"
        self.assertEqual(encode(["normal", "pleural effusion"], names), expected)
        self.assertEqual(expected, ([1, 0], ["pleural effusion", "normal"], False))

    def test_case_is_ignored_only_where_names_are_given(self) -> None:
        self.assertEqual(encode(["NORMAL", "pneumonia", "Normal"], ["normal", "Pneumonia"]).labels, [0, 1, 0])
        self.assertEqual(encode(["Normal", "normal"]).class_names, ["Normal", "normal"])
        self.assertEqual(encode(["a", "A", "A"], ["A", "a"]).labels, [1, 0, 0])

    @parameterized.expand(
        [(None,), ("",), ("  ",), ("nan",), ("NaN",), (math.nan,), (-1,), ("-1",), (-1.0,), ("-1.0",)]
    )
    def test_missing(self, missing: Any) -> None:
        self.assertEqual(encode([1, missing, 0]).labels, [1, -1, 0])
        self.assertEqual(encode(["b", missing, "a"]).labels, [1, -1, 0])
        self.assertEqual(encode(["B", missing], ["a", "b"]).labels, [1, -1])
        self.assertEqual(encode([missing, "a|b"]).labels, [[-1, -1], [1, 1]])
        self.assertEqual(encode([[1, 0], missing, [missing, 1]]).labels, [[1, 0], [-1, -1], [-1, 1]])

    def test_no_label_at_all(self) -> None:
        self.assertEqual(encode([None, "", -1]), ([-1, -1, -1], ["unlabelled"], False))
        self.assertEqual(encode([None, None], ["a", "b"]), ([-1, -1], ["a", "b"], False))

    def test_given_names_may_be_numbers(self) -> None:
        self.assertEqual(encode(["2", "4a", "5"], ["2", "4a", "5"]).labels, [0, 1, 2])
        self.assertEqual(encode([5, 2], ["2", "5"]).labels, [1, 0])

    @parameterized.expand(
        [
            ("too_large", [0, 1, 2], ["a", "b"], "label 2 of '2.png' is out of range; right are 0 to 1"),
            ("negative", [0, -2, 1], ["a", "b"], "label -2 of '1.png' is out of range"),
            ("gap", [0, 255, 1], None, "the labels 0, 1, 255 .*'1.png'.* are not 0 to K-1; missing labels are -1"),
            ("from_one", [1, 2], None, "the labels 1, 2 .* are not 0 to K-1"),
            ("unknown", ["a", "c"], ["a", "b"], "label 'c' of '1.png' is none of the classes a, b"),
            ("number_among_names", ["a", "b", "1"], None, "label '1' of '2.png' is a number"),
            ("number_among_given", ["a", "b", "1"], ["a", "b"], "label '1' of '2.png' is none of the classes"),
            ("fraction", [0, 0.5, 1], None, "label '0.5' of '1.png' is a number that is neither a class index"),
            ("twice", ["a"], ["a", "b", "a"], "class_names holds a name twice"),
        ]
    )
    def test_wrong_labels(self, _: str, labels: list[Any], class_names: list[str] | None, message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"encode_labels: {message}"):
            encode(labels, class_names)


class TestSeveralLabels(unittest.TestCase):
    def test_sets_of_names(self) -> None:
        labels = ["effusion|mass", "No Finding", "mass", None, " mass | effusion "]
        vectors = [[1, 1], [0, 0], [0, 1], [-1, -1], [1, 1]]
        self.assertEqual(encode(labels), (vectors, ["effusion", "mass"], True))
        expected = [[v[1], v[0] if v[0] < 0 else 0, v[0]] for v in vectors]
        self.assertEqual(encode(labels, ["Mass", "hernia", "Effusion"]).labels, expected)

    def test_single_names_become_sets_on_demand(self) -> None:
        self.assertEqual(
            encode(["a", "b", "no finding"], multi_label=True), ([[1, 0], [0, 1], [0, 0]], ["a", "b"], True)
        )
        self.assertEqual(encode(["", None], multi_label=True), ([[-1], [-1]], ["unlabelled"], True))

    def test_sets_can_be_forbidden(self) -> None:
        self.assertEqual(encode(["a|b", "c"], multi_label=False), ([0, 1], ["a|b", "c"], False))

    def test_vectors(self) -> None:
        labels = [[1, 0, -1], ("0", "1.0", ""), [np.uint8(1), None, math.nan]]
        vectors = [[1, 0, -1], [0, 1, -1], [1, -1, -1]]
        self.assertEqual(encode(labels), (vectors, ["0", "1", "2"], True))
        self.assertEqual(encode(labels, ["a", "b", "c"]), (vectors, ["a", "b", "c"], True))

    @parameterized.expand(
        [
            ("unknown_name", ["a|b", "a|c"], ["a", "b"], "label 'c' of '1.png' is none of the classes a, b"),
            ("entry", [[0, 1], [0, 2]], None, "entry 2 of the label of '1.png' is out of range; right are 1, 0"),
            ("fraction", [[0, 0.5]], None, "entry 0.5 of the label of '0.png' is out of range"),
            ("text", [[0, "yes"]], None, "entry 'yes' of the label of '0.png' is out of range"),
            ("length", [[0, 1], [0, 1, 1]], None, "the label of '1.png' has 3 entries, others have 2"),
            ("no_vector", [[0, 1], 1], None, "label 1 of '1.png' is one value, others have 2 entries"),
            ("names", [[0, 1]], ["a", "b", "c"], "the labels have 2 entries, but there are 3 class names"),
        ]
    )
    def test_wrong_labels(self, _: str, labels: list[Any], class_names: list[str] | None, message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"encode_labels: {message}"):
            encode(labels, class_names)


class TestSplitNames(unittest.TestCase):
    @parameterized.expand([("a",), ("a,b c",), (" a , b c ",), (["a", "b c"],), (("a", "b c"),), ([1, "b"],)])
    def test_texts_and_sequences(self, names: Any) -> None:
        expected = {"a": ("a",), "[1, 'b']": ("1", "b")}.get(str(names), ("a", "b c"))
        self.assertEqual(split_names(names, "x"), expected)

    @parameterized.expand([(2,), (None,), ({"a"},)])
    def test_others_are_refused(self, names: Any) -> None:
        with self.assertRaisesRegex(TypeError, "split_names: class_names must be a list of names"):
            split_names(names, "class_names")


if __name__ == "__main__":
    unittest.main()
