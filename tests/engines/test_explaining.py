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
from torch import nn

from monai_jointdiff.engines import (
    CounterfactualPrepareBatch,
    CounterfactualTargets,
    HeadJudge,
    ModelDescription,
    class_of_target,
    class_to_generate,
    fingerprint_of_model,
    images_to_classify,
    images_to_explain,
    open_oracle,
    question_in_words,
    spread,
    weights_fingerprint,
)
from monai_jointdiff.inferers import CounterfactualInferer, LatentSpace
from monai_jointdiff.networks import JointDiffusionUNet
from monai_jointdiff.schedulers import make_scheduler
from tests.bundles.runs import temporary_folder
from tests.engines.small_run import small_network, use_one_thread
from tests.engines.test_serving import phantom_model
from tests.inferers.autoencoders import HalvingAutoencoder

NAMES = ["normal", "opacity", "effusion"]


def model(multi_label: bool = False) -> ModelDescription:
    description = phantom_model()
    return replace(description, data={**description.data, "multi_label": multi_label})


def network_with(**options: Any) -> JointDiffusionUNet:
    return JointDiffusionUNet(**{**small_network().config, **options})


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

    def test_every_other_answer(self) -> None:
        self.assertIn("For each other class in turn", question_in_words(model(), "all", None))
        self.assertIn("For each label in turn", question_in_words(model(True), "all", "null"))
        with self.assertRaisesRegex(ValueError, "--target all asks for every other class; --enforce false needs one"):
            question_in_words(model(), "all", "false")

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
        with self.assertRaisesRegex(ValueError, "not class-conditional. .*--rule classifier.*train_conditional"):
            class_to_generate(self.model(conditional=False), "effusion")


class TestImages(unittest.TestCase):
    def test_some_are_spread_over_all(self) -> None:
        items = images_to_classify(None, model())
        self.assertEqual(images_to_explain(None, model(), "null"), items)
        self.assertEqual(images_to_explain(None, model(), 100), items)
        said = {"out_of": len(items)}
        self.assertEqual(images_to_explain(None, model(), 1), [{**items[0], **said}])
        some = images_to_explain(None, model(), 3)
        self.assertEqual(len(some), 3)
        self.assertEqual((some[0], some[-1]), ({**items[0], **said}, {**items[-1], **said}))

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

    def test_every_target(self) -> None:
        batch = {"image": torch.zeros(1, 1, 4, 4), "name": ["a"]}
        self.assertEqual(CounterfactualPrepareBatch(NAMES, "all")(batch)[3]["target"], "all")
        self.assertEqual(CounterfactualPrepareBatch(["none", "all"], "all")(batch)[3]["target"], 1)  # a class so named

    def test_wrong_flag(self) -> None:
        with self.assertRaisesRegex(ValueError, "--enforce must be true, false or null, got 'perhaps'"):
            CounterfactualPrepareBatch(NAMES, 0, "perhaps")


class TestTargets(unittest.TestCase):
    def setUp(self) -> None:
        use_one_thread()
        steps: dict[str, Any] = {"timestep": 100, "num_inference_steps": 2, "probability": None, "scale": 20.0}
        self.inferer = CounterfactualInferer(make_scheduler("ddim"), encoding="noise", **steps)
        self.images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def test_one_target_is_what_the_inferer_gives(self) -> None:
        network = small_network()
        (found,) = CounterfactualTargets(self.inferer)(self.images, network, 1, True, seed=[4, 5, 6])
        expected = self.inferer(self.images, network, 1, True, seed=[4, 5, 6])
        torch.testing.assert_close(found.counterfactual, expected.counterfactual, rtol=0, atol=0)

    def test_every_other_class_once_from_the_same_noise(self) -> None:
        network = small_network()
        found = CounterfactualTargets(self.inferer)(self.images, network, "all", None, seed=[4, 5, 6])
        self.assertEqual(len(found), 2)
        p = found[0].probabilities
        for n in range(3):
            order = p[n].argsort(descending=True).tolist()
            self.assertEqual([result.record.target[n] for result in found], order[1:])
        for result in found:
            torch.testing.assert_close(result.reconstruction, found[0].reconstruction, rtol=0, atol=0)
            again = self.inferer(self.images, network, list(result.record.target), seed=[4, 5, 6])
            torch.testing.assert_close(result.counterfactual, again.counterfactual, rtol=0, atol=0)

    def test_two_classes_have_one_other(self) -> None:
        found = CounterfactualTargets(self.inferer)(self.images, network_with(num_classes=2), "all")
        self.assertEqual(len(found), 1)

    def test_every_label(self) -> None:
        network = network_with(multi_label=True)
        found = CounterfactualTargets(self.inferer)(self.images, network, "all", None)
        self.assertEqual([result.record.target for result in found], [(k,) * 3 for k in range(3)])
        for k, result in enumerate(found):
            present = (result.probabilities[:, k] >= 0.5).tolist()
            self.assertEqual([not enforced for enforced in result.record.enforce], present)

    def test_another_word(self) -> None:
        with self.assertRaisesRegex(ValueError, "target must be an index, None or 'all', got 'most'"):
            CounterfactualTargets(self.inferer)(self.images, small_network(), "most")


class TestOracle(unittest.TestCase):
    def setUp(self) -> None:
        use_one_thread()
        self.folder = temporary_folder(self)
        self.description = phantom_model()
        self.save("model", seed=0)

    def save(self, name: str, seed: int, description: ModelDescription | None = None) -> nn.Module:
        torch.manual_seed(seed)
        network = self.description.build_network().eval()
        (self.folder / name).mkdir()
        torch.save(network.state_dict(), self.folder / name / "model.pt")
        (self.description if description is None else description).save(self.folder / name / "model.json")
        return network

    def open(self, name: str | None) -> HeadJudge | None:
        oracle = None if name is None else self.folder / name
        return open_oracle(oracle, self.description, self.folder / "model", torch.device("cpu"))

    @parameterized.expand([(False,), (True,)])
    def test_says_what_its_head_says(self, multi_label: bool) -> None:
        self.description = model(multi_label)
        network = self.save("oracle", 1)
        oracle = self.open("oracle")
        assert oracle is not None
        images = torch.rand(2, 1, 8, 8)
        with torch.no_grad():
            logits = network(images)
        torch.testing.assert_close(oracle(images).float(), logits.sigmoid() if multi_label else logits.softmax(1))

    def test_on_latents(self) -> None:
        """The judge sees an image as inference does: encoded."""
        autoencoder, network = HalvingAutoencoder(2.0), small_network().eval()
        judge = HeadJudge(network, self.description, LatentSpace(autoencoder, 0.5))
        images = torch.rand(2, 1, 8, 8)
        with torch.no_grad():
            expected = network(autoencoder.encode(images)[0] * 0.5).softmax(1)
        torch.testing.assert_close(judge(images).float(), expected)

    def test_none_and_fingerprints(self) -> None:
        self.assertIsNone(self.open(None))
        self.assertIsNone(open_oracle("null", self.description, self.folder, torch.device("cpu")))
        weights = torch.load(self.folder / "model" / "model.pt", weights_only=True)
        self.assertEqual(fingerprint_of_model(self.folder / "model"), weights_fingerprint(weights))
        for nothing in (None, self.folder):
            self.assertIsNone(fingerprint_of_model(nothing))

    def test_refusals(self) -> None:
        with self.assertRaisesRegex(ValueError, "holds no model.pt"):
            self.open("nowhere")
        with self.assertRaisesRegex(ValueError, "--oracle has the weights of the model that is explained"):
            self.open("model")
        other = replace(self.description, data={**self.description.data, "class_names": ["a", "b", "c"]})
        self.save("other", 1, other)
        with self.assertRaisesRegex(ValueError, r"class_names: \['a', 'b', 'c'\] instead of \['normal', 'opacity'"):
            self.open("other")
        self.save("denoiser", 1, replace(self.description, task="denoise"))
        with self.assertRaisesRegex(ValueError, "learned to classify"):
            self.open("denoiser")


if __name__ == "__main__":
    unittest.main()
