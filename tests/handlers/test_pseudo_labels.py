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

"""Rounds of pseudo-labels in a training: when, on what, and what a labeller of one's own has to be."""

from __future__ import annotations

import tempfile
import unittest
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ignite.engine import Engine
from parameterized import parameterized

from monai_jointdiff.data import (
    DrawDataset,
    LabelledFeatures,
    PseudoLabels,
    PseudoLabelTable,
    ShuffledOrder,
    UnlabelledFeatures,
)
from monai_jointdiff.handlers import PseudoLabelRounds
from monai_jointdiff.inferers import JointDiffusionInferer
from monai_jointdiff.networks import JointDiffusionUNet
from monai_jointdiff.schedulers import make_scheduler
from tests.engines.small_run import items, small_network, use_one_thread

LABELS = [0, -1, -1, 1, -1, 2, -1]
FINDINGS = [[1, 0, -1], [-1, -1, -1], [-1, -1, -1], [0, -1, 1]]
WORLD_SIZE = 2


def setUpModule() -> None:
    use_one_thread()


class MostConfident:
    """A labeller of one's own: the so many images of which the network is surest, as it says; none is an anchor."""

    def __init__(self, number: int = 1) -> None:
        self.number = number
        self.asked: list[tuple[LabelledFeatures, UnlabelledFeatures]] = []

    def __call__(self, anchors: LabelledFeatures, unlabelled: UnlabelledFeatures) -> PseudoLabels:
        self.asked.append((anchors, unlabelled))
        rank = (-unlabelled.probabilities.max(axis=1)).argsort().argsort()
        weights = (rank < self.number).astype(float)
        return PseudoLabels(unlabelled.probabilities, weights, np.zeros(len(rank), dtype=bool))


def brighter(item: Any) -> Any:
    return {**item, "image": item["image"] + 5}


class Case:
    def __init__(self, labels: Any = None, spatial_dims: int = 2, network: Any = None, **options: Any) -> None:
        labels = LABELS if labels is None else labels
        self.items = items([0] * len(labels), spatial_dims)
        order = ShuffledOrder(len(labels), 0)
        dataset = DrawDataset(self.items, dict, brighter, order)
        self.network = small_network(0.5, spatial_dims).eval() if network is None else network
        self.inferer = JointDiffusionInferer(make_scheduler("ddim"))
        self.table = PseudoLabelTable(labels, 3, order)
        self.labeller = options.pop("labeller", MostConfident())
        self.rounds = PseudoLabelRounds(
            self.labeller, self.table, dataset, self.network, self.inferer, batch_size=2, **options
        )

    def run(self, epochs: int) -> Case:
        engine = Engine(lambda engine, batch: None)
        self.rounds.attach(engine)
        engine.run([0], max_epochs=epochs)
        return self


class TestRounds(unittest.TestCase):
    @parameterized.expand([(1, 1, 5, [1, 2, 3, 4]), (2, 2, 7, [2, 4, 6]), (3, 5, 8, [3])])
    def test_after_which_epochs(self, start: int, every: int, epochs: int, expected: list[int]) -> None:
        writer = mock.Mock()
        case = Case(start=start, every=every, summary_writer=writer).run(epochs)
        found = [call.args[2] for call in writer.add_scalar.call_args_list if call.args[0] == "pseudo_labels/new"]
        self.assertEqual(found, expected)
        self.assertEqual(len(case.labeller.asked), len(expected))
        self.assertEqual(int((case.table.weights > 0).sum()), len(expected))

    @parameterized.expand([(1, 1), (3, 3), (10, 5)])
    def test_a_training_without_a_round_is_refused(self, start: int, epochs: int) -> None:
        with self.assertRaisesRegex(ValueError, f"start is {start}, and the training ends after epoch {epochs}"):
            Case(start=start).run(epochs)

    @parameterized.expand([(2,), (3,)])
    def test_undisturbed_images_in_evaluation(self, spatial_dims: int) -> None:
        case = Case(spatial_dims=spatial_dims).run(3)
        images = torch.stack([item["image"] for item in case.items])
        features, logits = case.inferer.features(images, case.network)
        anchors, unlabelled = case.labeller.asked[0]
        known, hidden = [0, 3, 5], [1, 2, 4, 6]
        np.testing.assert_allclose(anchors.features, features[known].double(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(anchors.labels, np.eye(3))
        np.testing.assert_array_equal(anchors.guessed, [False] * 3)
        np.testing.assert_allclose(unlabelled.features, features[hidden].double(), rtol=1e-5, atol=1e-6)
        probabilities = logits[hidden].double().softmax(dim=1)
        np.testing.assert_allclose(unlabelled.probabilities, probabilities, rtol=1e-5)
        surest = hidden[int(probabilities.max(dim=1).values.argmax())]
        torch.testing.assert_close(case.table.probabilities[surest].double(), logits[surest].double().softmax(dim=0))
        self.assertEqual(len(case.labeller.asked[1][1].features), 3)  # one image less is asked about

    def test_several_labels(self) -> None:
        case = Case(FINDINGS).run(2)
        anchors, unlabelled = case.labeller.asked[0]
        np.testing.assert_equal(anchors.labels, [[1, 0, np.nan], [0, np.nan, 1]])
        images = torch.stack([case.items[n]["image"] for n in (1, 2)])
        expected = case.inferer.classify(images, case.network).sigmoid().detach()
        np.testing.assert_allclose(unlabelled.probabilities, expected, rtol=1e-5)

    def test_ends_when_all_images_have_a_label(self) -> None:
        case = Case(labeller=MostConfident(3)).run(9)
        self.assertEqual(len(case.labeller.asked), 2)
        self.assertEqual(len(case.table.waiting()), 0)

    def test_summary(self) -> None:
        def opposite(anchors: LabelledFeatures, unlabelled: UnlabelledFeatures) -> PseudoLabels:
            labels = np.eye(3)[unlabelled.probabilities.argmin(axis=1)]
            labels[0] = np.eye(3)[unlabelled.probabilities[0].argmax()]
            given = np.arange(len(labels)) < 3
            return PseudoLabels(labels, given.astype(float), given)

        with self.assertLogs("ignite.engine.engine.Engine", "INFO") as log:
            last = Case(labeller=opposite).run(2).rounds.last
        assert last is not None and last.agreement is not None
        self.assertEqual((last.epoch, last.new, last.total, last.waiting, last.anchors), (1, 3, 3, 1, 6))
        self.assertAlmostEqual(last.agreement, 1 / 3)
        self.assertAlmostEqual(sum(last.class_means), 1)
        self.assertIn("3 new pseudo-labels, 3 in all, 1 images without, 6 anchors; 33% of", "".join(log.output))

    def test_a_round_without_a_new_label(self) -> None:
        last = Case(labeller=MostConfident(0)).run(2).rounds.last
        assert last is not None
        self.assertEqual((last.new, last.agreement, last.class_means, last.anchors), (0, None, (), 3))
        self.assertIn("0 new pseudo-labels", str(last))

    @parameterized.expand([("start", 0), ("every", 0), ("every", 1.5), ("batch_size", 0)])
    def test_wrong_numbers(self, name: str, value: Any) -> None:
        case = Case()
        arguments = (case.labeller, case.table, case.rounds.dataset, case.network, case.inferer)
        with self.assertRaisesRegex(ValueError, f"PseudoLabelRounds: {name} must be a whole number >= 1, got {value}"):
            PseudoLabelRounds(*arguments, **{name: value})


def other_network(rank: int) -> JointDiffusionUNet:
    """Averages that differ between processes, as no training leaves them: the first one counts."""
    network = small_network().eval()
    with torch.no_grad():
        network.classifier.layers[-1].bias[rank] += 5
    return network


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD_SIZE)
    case = Case(network=other_network(rank), labeller=MostConfident(2)).run(2)
    torch.save(case.table.state_dict(), f"{folder}/table{rank}.pt")
    dist.destroy_process_group()


class TestTwoProcesses(unittest.TestCase):
    def test_the_table_of_the_first_counts(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(process, args=(folder,), nprocs=WORLD_SIZE)
            tables = [torch.load(f"{folder}/table{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]
        alone = Case(network=other_network(0), labeller=MostConfident(2)).run(2).table.state_dict()
        for table in tables:
            torch.testing.assert_close(table, alone, rtol=0, atol=0)
        self.assertEqual(int((alone["weights"] > 0).sum()), 2)


if __name__ == "__main__":
    unittest.main()
