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


"""What a classifier says of a whole data set, collected."""

from __future__ import annotations

import unittest
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from monai.utils import CommonKeys
from parameterized import parameterized
from torch import nn

from monai_jointdiff.handlers import PredictionCollector, Predictions


class Joint(NamedTuple):
    logits: torch.Tensor
    prediction: torch.Tensor


def batches(sizes: list[int], multi_label: bool = False, with_label: bool = True) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    found, start = [], 0
    for size in sizes:
        shape = (size, 2) if multi_label else (size,)
        batch: dict[str, Any] = {
            CommonKeys.IMAGE: torch.randn(size, 3, generator=generator),
            "name": [f"{n}.png" for n in range(start, start + size)],
        }
        if with_label:
            batch[CommonKeys.LABEL] = torch.randint(-1, 2, shape, generator=generator)
        found.append(batch)
        start += size
    return found


def prepare(batch: dict[str, Any], device: Any, non_blocking: bool, **kwargs: Any) -> Any:
    return batch[CommonKeys.IMAGE], batch.get(CommonKeys.LABEL)


def collect(collector: PredictionCollector, data: list[dict[str, Any]], network: nn.Module, runs: int = 1) -> None:
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=data,
        network=network,
        prepare_batch=prepare,
        val_handlers=[collector],
        decollate=False,
    )
    for _ in range(runs):
        evaluator.run()


class JointNetwork(nn.Module):
    def forward(self, x: torch.Tensor) -> Joint:
        return Joint(2 * x, torch.zeros(1))


class MetaNetwork(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return MetaTensor(x).to(torch.bfloat16)


class TestCollector(unittest.TestCase):
    @parameterized.expand([(1,), (2,)])
    def test_all_batches_of_the_last_run_in_order(self, runs: int) -> None:
        data = batches([4, 4, 1])
        collector = PredictionCollector()
        collect(collector, data, nn.Identity(), runs)
        found = collector.predictions
        assert found is not None
        self.assertEqual(found.names, [f"{n}.png" for n in range(9)])
        np.testing.assert_array_equal(found.logits, torch.cat([b["image"] for b in data]).double().numpy())
        np.testing.assert_array_equal(found.labels, torch.cat([b["label"] for b in data]).numpy())
        self.assertEqual((found.logits.dtype, found.labels.dtype), (np.float64, np.int64))

    def test_logits_of_a_joint_output(self) -> None:
        data = batches([3])
        collector = PredictionCollector()
        collect(collector, data, JointNetwork())
        assert collector.predictions is not None
        np.testing.assert_array_equal(collector.predictions.logits, 2 * data[0]["image"].double().numpy())

    def test_low_precision_and_meta_tensors_become_plain(self) -> None:
        data = batches([3])
        collector = PredictionCollector()
        collect(collector, data, MetaNetwork())
        assert collector.predictions is not None
        self.assertIs(type(collector.predictions.logits), np.ndarray)
        expected = data[0]["image"].to(torch.bfloat16).double().numpy()
        np.testing.assert_array_equal(collector.predictions.logits, expected)

    def test_missing_labels_are_minus_one(self) -> None:
        collector = PredictionCollector()
        collect(collector, batches([2, 3], with_label=False), nn.Identity())
        assert collector.predictions is not None
        self.assertEqual(collector.predictions.labels.tolist(), [-1] * 5)

    def test_patients_of_the_last_run_where_one_is_known(self) -> None:
        data = batches([2, 2])
        collector = PredictionCollector()
        collect(collector, data, nn.Identity())
        assert collector.predictions is not None
        self.assertIsNone(collector.predictions.patients)
        for batch, patients in zip(data, (["p", ""], ["p", "q"]), strict=True):
            batch["patient"] = patients
        collect(collector, data, nn.Identity(), runs=2)
        self.assertEqual(collector.predictions.patients, ["p", "", "p", "q"])

    def test_consumers_are_called_once_each_in_turn(self) -> None:
        seen: list[tuple[str, Any]] = []
        collector = PredictionCollector([lambda p: seen.append(("one", p)), lambda p: seen.append(("two", p))])
        collect(collector, batches([2, 2]), nn.Identity())
        self.assertEqual([name for name, _ in seen], ["one", "two"])
        self.assertTrue(all(p is collector.predictions for _, p in seen))


class TestLabelled(unittest.TestCase):
    def test_classes(self) -> None:
        given = Predictions(["a", "b", "c"], np.arange(6.0).reshape(3, 2), np.array([1, -1, 0]))
        found = given.labelled()
        self.assertEqual(found.names, ["a", "c"])
        self.assertEqual(found.labels.tolist(), [1, 0])
        self.assertEqual(found.logits.tolist(), [[0.0, 1.0], [4.0, 5.0]])

    def test_keeps_the_patients_of_its_images(self) -> None:
        given = Predictions(["a", "b", "c"], np.zeros((3, 2)), np.array([1, -1, 0]), ["p", "p", "q"])
        self.assertEqual(given.labelled().patients, ["p", "q"])
        self.assertIsNone(given.labelled().groups)

    def test_several_labels_need_one_known_entry(self) -> None:
        given = Predictions(["a", "b"], np.zeros((2, 2)), np.array([[-1, -1], [-1, 0]]))
        self.assertEqual(given.labelled(True).names, ["b"])


class TestGroups(unittest.TestCase):
    def test_patients_and_images_without_one(self) -> None:
        given = Predictions(list("abcd"), np.zeros((4, 2)), np.zeros(4, int), ["0", "", "0", ""])
        self.assertEqual(given.groups, ["patient 0", "image 1", "patient 0", "image 3"])

    @parameterized.expand([(None,), (["", "", ""],), (["p", "", "q"],)])
    def test_none_where_no_two_images_belong_together(self, patients: list[str] | None) -> None:
        self.assertIsNone(Predictions(list("abc"), np.zeros((3, 2)), np.zeros(3, int), patients).groups)


if __name__ == "__main__":
    unittest.main()
