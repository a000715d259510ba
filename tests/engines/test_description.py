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


"""`model.json` and the decision rule in it."""

from __future__ import annotations

import json
import unittest
from dataclasses import asdict, replace

import numpy as np
import torch
from parameterized import parameterized

from monai_jointdiff.engines import Decision, ModelDescription
from tests.bundles.runs import temporary_folder
from tests.engines.small_run import small_network

DATA = {
    "class_names": ["no", "yes", "perhaps"],
    "multi_label": False,
    "spatial_dims": 2,
    "image_size": [8, 12],
    "in_channels": 1,
    "intensity": {"kind": "window", "percentiles": [0.5, 99.5], "float_range": None, "window": [-1000.0, 400.0]},
}
SCHEDULER = {"num_train_timesteps": 100, "schedule": "linear_beta", "prediction_type": "v_prediction"}


def small_description() -> ModelDescription:
    decision = Decision(1.7, None, "some data")
    return ModelDescription(small_network().config, SCHEDULER, DATA, decision)


class TestDecision(unittest.TestCase):
    @parameterized.expand([(1.0,), (0.5,), (3.0,)])
    def test_probabilities(self, temperature: float) -> None:
        logits = np.random.default_rng(0).normal(size=(5, 3)) * 4
        decision = Decision(temperature)
        powers = np.exp(logits / temperature)
        np.testing.assert_allclose(decision.probabilities(logits), powers / powers.sum(1, keepdims=True), rtol=1e-12)
        np.testing.assert_allclose(decision.probabilities(logits, True), powers / (1 + powers), rtol=1e-12)
        self.assertEqual(decision.probabilities(logits.astype(np.float32)).dtype, np.float64)

    def test_binary_threshold_is_inclusive(self) -> None:
        probabilities = np.array([[0.75, 0.25], [0.76, 0.24], [0.4, 0.6]])
        self.assertEqual(Decision(thresholds=[0.25]).classes(probabilities).tolist(), [1, 0, 1])
        self.assertEqual(Decision().classes(probabilities).tolist(), [0, 0, 1])

    def test_multi_class_takes_the_largest(self) -> None:
        self.assertEqual(Decision().classes(np.array([[0.2, 0.5, 0.3], [0.4, 0.3, 0.3]])).tolist(), [1, 0])

    def test_multi_label_has_one_threshold_a_label(self) -> None:
        probabilities = np.array([[0.6, 0.6], [0.4, 0.9]])
        self.assertEqual(Decision(thresholds=[0.3, 0.8]).classes(probabilities, True).tolist(), [[1, 0], [1, 1]])
        self.assertEqual(Decision().classes(probabilities, True).tolist(), [[1, 1], [0, 1]])

    @parameterized.expand([(0.0,), (-1.0,), (float("nan"),)])
    def test_temperature_must_be_positive(self, temperature: float) -> None:
        with self.assertRaisesRegex(ValueError, "temperature must be > 0"):
            Decision(temperature)


class TestModelDescription(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)
        self.path = self.folder / "model.json"

    def test_comes_back_from_its_file(self) -> None:
        description = small_description()
        description.save(self.path)
        loaded = ModelDescription.load(self.path)
        for part in ("scheduler", "data", "decision", "trained"):
            self.assertEqual(getattr(loaded, part), getattr(description, part))
        loaded.save(self.folder / "again.json")
        self.assertEqual(self.path.read_text(), (self.folder / "again.json").read_text())

    def test_properties(self) -> None:
        description = small_description()
        self.assertEqual(description.class_names, ["no", "yes", "perhaps"])
        self.assertEqual(description.image_size, (8, 12))
        self.assertEqual(description.image_shape, (1, 8, 12))
        self.assertFalse(description.multi_label)
        self.assertEqual(description.with_decision(Decision(2.0)), replace(description, decision=Decision(2.0)))

    @parameterized.expand(
        [("binary", 2, [0.2], False), ("classes", 3, None, False), ("labels", 3, [0.1, 0.5, 0.9], True)]
    )
    def test_decides_from_probabilities_as_from_logits(
        self, _: str, num_classes: int, thresholds: list[float] | None, multi_label: bool
    ) -> None:
        decision = Decision(2.5, thresholds)
        data = {**DATA, "class_names": list("abc"[:num_classes]), "multi_label": multi_label}
        description = replace(small_description(), data=data, decision=decision)
        logits = 6 * torch.randn(200, num_classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        logits[0], logits[1, 0], logits[2, 0] = 0.0, 800.0, -800.0  # probabilities of exactly 1 and 0
        probabilities = logits.sigmoid() if multi_label else logits.softmax(1)
        expected = decision.classes(decision.probabilities(logits.numpy(), multi_label), multi_label)
        np.testing.assert_array_equal(description.decide(probabilities), expected)
        plain = (probabilities >= 0.5).long() if multi_label else probabilities.argmax(1)
        self.assertEqual(bool((plain.numpy() != expected).any()), thresholds is not None)

    def test_network_of_the_file_takes_the_weights(self) -> None:
        small_description().save(self.path)
        network = small_network().eval()
        rebuilt = ModelDescription.load(self.path).build_network().eval()
        rebuilt.load_state_dict(network.state_dict())
        image = torch.randn(2, 1, 8, 8)
        torch.testing.assert_close(rebuilt(image), network(image), rtol=0, atol=0)

    def test_scheduler_has_the_noise_process_of_the_training(self) -> None:
        description = small_description()
        for name in ("ddpm", "ddim", "dpm_solver"):
            scheduler = description.build_scheduler(name)
            self.assertEqual(scheduler.num_train_timesteps, 100)
            self.assertEqual(scheduler.prediction_type, "v_prediction")
        self.assertEqual(description.build_scheduler("ddim", prediction_type="epsilon").prediction_type, "epsilon")

    @parameterized.expand([("joint", []), ("classify", ["denoise"]), ("denoise", ["classify"])])
    def test_what_was_never_learned_is_refused(self, task: str, lacking: list[str]) -> None:
        description = replace(small_description(), task=task)
        description.save(self.folder / "model.json")
        loaded = ModelDescription.load(self.folder / "model.json")
        for ability in ("denoise", "classify"):
            if ability in lacking:
                with self.assertRaisesRegex(ValueError, f"trained with --task {task}.* learned to {ability}"):
                    loaded.require("denoise", "classify")
            else:
                loaded.require(ability)

    def test_files_of_before_were_trained_for_both(self) -> None:
        content = json.loads(json.dumps({"format_version": 2, **asdict(small_description())}))
        del content["task"]
        ModelDescription.from_dict(content).require("denoise", "classify")

    def test_names_of_channels(self) -> None:
        description = small_description()
        self.assertIsNone(description.channel_names)  # as of files of before
        named = replace(description, data={**description.data, "channel_names": ["FLAIR"]})
        named.save(self.path)
        self.assertEqual(ModelDescription.load(self.path).channel_names, ["FLAIR"])

    def test_a_task_that_does_not_exist(self) -> None:
        content = {"format_version": 2, **asdict(small_description()), "task": "clasify"}
        with self.assertRaisesRegex(ValueError, "ModelDescription: task must be one of joint, .*, got 'clasify'"):
            ModelDescription.from_dict(content)

    def test_untrained_description_where_there_is_no_model(self) -> None:
        untrained = replace(small_description(), trained=False)
        untrained.save(self.folder / "default.json")
        self.assertFalse(ModelDescription.load(self.path, untrained=self.folder / "default.json").trained)
        small_description().save(self.path)
        self.assertTrue(ModelDescription.load(self.path, untrained=self.folder / "default.json").trained)

    def test_wrong_files(self) -> None:
        with self.assertRaisesRegex(ValueError, "cannot read the model description .*model.json.*Train first"):
            ModelDescription.load(self.path)
        self.path.write_text("{", encoding="utf-8")
        with self.assertRaisesRegex(ValueError, "cannot read the model description"):
            ModelDescription.load(self.path)
        small_description().save(self.path)
        content = json.loads(self.path.read_text())
        with self.assertRaisesRegex(ValueError, "format_version is 7, this version .* reads 1"):
            ModelDescription.from_dict({**content, "format_version": 7})
        del content["network"], content["trained"]
        with self.assertRaisesRegex(ValueError, "missing in the model description: network, trained"):
            ModelDescription.from_dict(content)


if __name__ == "__main__":
    unittest.main()
