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
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine
from parameterized import parameterized

from monai_jointdiff.data import read_image
from monai_jointdiff.handlers import DiffusionPredictionCollector, EvidenceWriter, join_results
from monai_jointdiff.inferers import DiffusionClassifierInferer, DiffusionClassifierResult
from monai_jointdiff.networks import JointDiffusionUNet
from monai_jointdiff.schedulers import make_scheduler
from monai_jointdiff.visualize import evidence_panel
from tests.bundles.runs import temporary_folder
from tests.engines.small_run import use_one_thread

NAMES = ["a", "b", "c"]


def setUpModule() -> None:
    use_one_thread()


def images(count: int, spatial_dims: int = 2) -> torch.Tensor:
    return torch.rand(count, 1, *[8] * spatial_dims, generator=torch.Generator().manual_seed(0)) * 2 - 1


def classify(inputs: torch.Tensor, seed: int = 0, maps: bool = False, **options: Any) -> DiffusionClassifierResult:
    torch.manual_seed(0)
    network = JointDiffusionUNet(
        inputs.ndim - 2,
        1,
        1,
        3,
        num_res_blocks=1,
        channels=(4, 4),
        attention_levels=(False, False),
        norm_num_groups=2,
        num_head_channels=4,
        class_conditional=True,
        **options,
    )
    for parameter in network.parameters():  # MONAI's last layers start at 0: no class would make a difference
        if parameter.ndim > 1 and not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.3)
    return DiffusionClassifierInferer(make_scheduler("ddim"), num_draws=4)(inputs, network, seed=seed, maps=maps)


def run(handler: Any, batches: list[dict[str, Any]], results: list[DiffusionClassifierResult]) -> None:
    """An evaluator's epoch whose predictions are known."""
    answers = iter(results)
    engine = Engine(lambda engine, batch: {"pred": next(answers)})
    handler.attach(engine)
    engine.run(batches)


class TestCollector(unittest.TestCase):
    @parameterized.expand([(False,), (True,)])
    def test_batches_give_what_one_batch_gives(self, multi_label: bool) -> None:
        inputs, names = images(5), [f"{n}.png" for n in range(5)]
        labels = torch.tensor([0, 2, -1, 1, 0])
        if multi_label:
            labels = torch.stack([labels, labels.flip(0), -torch.ones(5)], dim=1).clamp(max=1)
        whole = classify(inputs, multi_label=multi_label)
        parts = [slice(0, 3), slice(3, 5)]
        batches = [{"name": names[part], "label": labels[part]} for part in parts]
        results = [classify(inputs[part], seed=part.start, maps=True, multi_label=multi_label) for part in parts]
        seen: list[Any] = []
        collector = DiffusionPredictionCollector([seen.append])
        run(collector, batches, results)
        self.assertIs(seen[0], collector.predictions)
        self.assertEqual(seen[0].names, names)
        np.testing.assert_array_equal(seen[0].labels, labels.numpy())
        for part in fields(whole):
            if part.name not in ("seconds", "evidence"):
                one, two = getattr(whole, part.name), getattr(seen[0].result, part.name)
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4, equal_nan=True)
        self.assertIsNone(seen[0].result.evidence)
        self.assertAlmostEqual(seen[0].result.seconds, sum(result.seconds for result in results))

    def test_profiles_are_taken_of_the_images_of_the_evaluator(self) -> None:
        inputs, network, results = images(5), torch.nn.Identity(), [classify(images(3)), classify(images(2))]
        asked: list[Any] = []

        def profile(batch: torch.Tensor, asked_network: Any) -> torch.Tensor:
            asked.append(asked_network)
            return batch.flatten(1)[:, :2].double()

        collector = DiffusionPredictionCollector(profile=profile)  # type: ignore[arg-type]
        outputs = iter([{"pred": results[0], "image": inputs[:3]}, {"pred": results[1], "image": inputs[3:]}])
        engine = Engine(lambda engine, batch: next(outputs))
        engine.network = network  # type: ignore[attr-defined]
        collector.attach(engine)
        engine.run([{"name": ["a", "b", "c"]}, {"name": ["d", "e"]}])
        assert collector.predictions is not None and collector.predictions.profiles is not None
        torch.testing.assert_close(collector.predictions.profiles, inputs.flatten(1)[:, :2].double())
        self.assertTrue(all(each is network for each in asked))

    def test_starts_afresh_and_does_without_labels(self) -> None:
        collector = DiffusionPredictionCollector()
        results = [classify(images(2))]
        for _ in range(2):
            run(collector, [{"name": ["x", "y"]}], results)
        assert collector.predictions is not None
        self.assertEqual((collector.predictions.names, collector.predictions.labels.tolist()), (["x", "y"], [-1, -1]))
        self.assertIsNone(collector.predictions.profiles)

    def test_result_keeps_its_properties(self) -> None:
        one, two = classify(images(2)), classify(images(3), seed=7)
        joined = join_results([one, two])
        for name in ("vote_share", "uncertainty", "entropy", "margin"):
            torch.testing.assert_close(getattr(joined, name), torch.cat([getattr(one, name), getattr(two, name)]))


class TestEvidenceWriter(unittest.TestCase):
    def write(self, folder: Path, maps: bool = True, spatial_dims: int = 2, **options: Any) -> None:
        inputs = images(3, spatial_dims)
        names = ["in/a b.png", "in_a_b.png", "c.nii.gz#slice_004"]
        batches = [{"image": inputs[:2], "name": names[:2]}, {"image": inputs[2:], "name": names[2:]}]
        results = [classify(inputs[:2], maps=maps), classify(inputs[2:], seed=2, maps=maps)]
        run(EvidenceWriter(folder, NAMES, **options), batches, results)

    @parameterized.expand([(2,), (3,)])
    def test_one_picture_an_image(self, spatial_dims: int) -> None:
        folder = temporary_folder(self)
        self.write(folder, spatial_dims=spatial_dims)
        names = ["0000_in_a_b_png.png", "0001_in_a_b_png.png", "0002_c_nii_gz_slice_004.png"]
        self.assertEqual(sorted(path.name for path in folder.iterdir()), names)
        result = classify(images(3, spatial_dims)[2:], seed=2, maps=True)
        answer = int(result.prediction[0])
        second = int(result.errors[0].index_fill(0, torch.tensor(answer), torch.inf).argmin())
        captions = ["c.nii.gz#slice_004", f"{NAMES[answer]} rather than {NAMES[second]}"]
        assert result.evidence is not None
        expected = evidence_panel(images(3, spatial_dims)[2], result.evidence[0], captions)
        np.testing.assert_array_equal(np.moveaxis(read_image(folder / names[2]), 0, -1), expected)

    def test_limit_and_removal_of_those_before(self) -> None:
        folder = temporary_folder(self)
        self.write(folder)
        (folder / "mine.png").touch()
        self.write(folder, limit=1)
        self.assertEqual(sorted(path.name for path in folder.iterdir()), ["0000_in_a_b_png.png", "mine.png"])

    def test_results_without_maps_are_left_out(self) -> None:
        folder = temporary_folder(self)
        self.write(folder, maps=False)
        self.assertEqual(list(folder.iterdir()), [])

    def test_wrong_limit(self) -> None:
        with self.assertRaisesRegex(ValueError, "EvidenceWriter: at least 1 image to draw expected, got 0"):
            EvidenceWriter("x", NAMES, 0)


if __name__ == "__main__":
    unittest.main()
