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


"""Options of the program that explains: what they mean, and what is refused with what words."""

from __future__ import annotations

import unittest
from dataclasses import replace
from typing import Any

import torch
from parameterized import parameterized

from monai_jointdiff.engines import (
    CounterfactualPrepareBatch,
    ModelDescription,
    class_of_target,
    class_to_generate,
    images_to_classify,
    images_to_explain,
    question_in_words,
    spread,
)
from tests.engines.test_serving import phantom_model

NAMES = ["normal", "opacity", "effusion"]


def model(multi_label: bool = False) -> ModelDescription:
    description = phantom_model()
    return replace(description, data={**description.data, "multi_label": multi_label})


class TestTarget(unittest.TestCase):
    @parameterized.expand(
        [
            ("opacity", NAMES, 1),
            (2, NAMES, 2),
            (None, NAMES, None),
            ("null", NAMES, None),
            (1, ["1", "2", "3"], 0),  # the name, not the index
            ("none", ["some", "none"], 1),
            ("true", ["false", "true"], 1),
        ]
    )
    def test_name_index_or_nothing(self, target: Any, names: list[str], expected: int | None) -> None:
        self.assertEqual(class_of_target(target, names), expected)

    @parameterized.expand(
        [
            (
                "efusion",
                r"--target is 'efusion', it must be one of normal, opacity, effusion.*Did you mean 'effusion'\?",
            ),
            ("tumour", r"must be one of normal, opacity, effusion, an index from 0 to 2, or null\.$"),
            (3, "--target is 3"),
            (-1, "--target is -1"),
            (True, "--target is True"),
            (0.5, "--target is 0.5"),
        ]
    )
    def test_anything_else_is_refused_with_the_names(self, target: Any, message: str) -> None:
        with self.assertRaisesRegex(ValueError, message):
            class_of_target(target, NAMES)

    @parameterized.expand(
        [
            (False, None, None, "the most probable other class"),
            (False, "opacity", None, "change for opacity?"),
            (False, "opacity", "false", "another class than opacity?"),
            (True, "opacity", "false", "opacity to be absent?"),
            (True, 1, True, "opacity to be present?"),
            (True, 1, "null", "opacity to be the opposite of what it is?"),
        ]
    )
    def test_question(self, multi_label: bool, target: Any, enforce: Any, expected: str) -> None:
        self.assertIn(expected, question_in_words(model(multi_label), target, enforce))

    @parameterized.expand([(True, None), (False, False)])
    def test_a_question_that_needs_a_target(self, multi_label: bool, enforce: Any) -> None:
        with self.assertRaisesRegex(ValueError, "--target is needed; it must be one of normal, opacity, effusion"):
            question_in_words(model(multi_label), None, enforce)


class TestClassToGenerate(unittest.TestCase):
    def model(self, multi_label: bool = False, conditional: bool = True) -> ModelDescription:
        description = model(multi_label)
        return replace(description, network={**description.network, "class_conditional": conditional})

    def test_index_or_the_label_alone(self) -> None:
        self.assertEqual(class_to_generate(self.model(), "effusion"), 2)
        self.assertEqual(class_to_generate(self.model(multi_label=True), 1), [-1, 1, -1])
        for nothing in (None, "null"):
            self.assertIsNone(class_to_generate(self.model(conditional=False), nothing))

    def test_refusals(self) -> None:
        with self.assertRaisesRegex(ValueError, "--class_label is 'efusion', it must be one of"):
            class_to_generate(self.model(), "efusion")
        with self.assertRaisesRegex(ValueError, "the model is not class-conditional. Train one .*train_conditional"):
            class_to_generate(self.model(conditional=False), "effusion")


class TestImages(unittest.TestCase):
    def test_some_are_spread_over_all(self) -> None:
        items = images_to_classify(None, model())
        self.assertEqual(images_to_explain(None, model(), "null"), items)
        self.assertEqual(images_to_explain(None, model(), 100), items)
        self.assertEqual(images_to_explain(None, model(), 1), items[:1])
        some = images_to_explain(None, model(), 3)
        self.assertEqual(len(some), 3)
        self.assertEqual((some[0], some[-1]), (items[0], items[-1]))

    def test_spread_names_the_option(self) -> None:
        self.assertEqual(spread(range(9), 3), [0, 4, 8])
        with self.assertRaisesRegex(ValueError, "spread: --some must be"):
            spread([1], 0, "--some")

    @parameterized.expand([(0,), (-1,), (1.5,), (True,), ("many",)])
    def test_wrong_limit(self, limit: Any) -> None:
        with self.assertRaisesRegex(ValueError, "--limit must be a whole number of at least 1, or null"):
            images_to_explain(None, model(), limit)


class TestPrepareBatch(unittest.TestCase):
    def test_arguments_of_the_inferer(self) -> None:
        prepare = CounterfactualPrepareBatch(NAMES, "effusion", "false", seed=3, progress="false")
        images, labels = torch.rand(2, 1, 4, 4), torch.tensor([0, -1])
        batch = {"image": images, "name": ["a", "b"], "label": labels}
        prepared, found, arguments, keywords = prepare(batch, "cpu", dtype=torch.float64)
        torch.testing.assert_close(prepared, images.double())
        self.assertIs(found, labels)
        self.assertEqual(arguments, ())
        self.assertEqual(
            {key: keywords[key] for key in ("target", "enforce", "progress")},
            {"target": 2, "enforce": False, "progress": False},
        )

    def test_seed_of_an_image_depends_on_its_name_alone(self) -> None:
        prepare = CounterfactualPrepareBatch(NAMES)
        seeds = [
            prepare({"image": torch.zeros(len(n), 1, 4, 4), "name": n})[3]["seed"] for n in (["a", "b"], ["b", "c"])
        ]
        self.assertEqual(seeds[0][1], seeds[1][0])
        self.assertEqual(len({*seeds[0], *seeds[1]}), 3)
        other = CounterfactualPrepareBatch(NAMES, seed=1)({"image": torch.zeros(1, 1, 4, 4), "name": ["b"]})[3]["seed"]
        self.assertNotEqual(other, seeds[1][:1])

    def test_wrong_flag(self) -> None:
        with self.assertRaisesRegex(ValueError, "--enforce must be true, false or null, got 'perhaps'"):
            CounterfactualPrepareBatch(NAMES, 0, "perhaps")


if __name__ == "__main__":
    unittest.main()
