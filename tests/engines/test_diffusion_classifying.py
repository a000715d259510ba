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
import csv
import io
import json
import math
import unittest
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parameterized import parameterized

from monai_jointdiff.engines import (
    AbstentionRule,
    DiffusionClassificationReporter,
    DiffusionClassifierPrepareBatch,
    ModelDescription,
    answers_of_first_draws,
    classify_by_diffusion,
    conditional_description,
    doubt,
    images_to_decide,
    source_of_model,
    write_diffusion_csv,
)
from monai_jointdiff.handlers import DiffusionPredictions
from monai_jointdiff.inferers import DiffusionClassifierInferer, DiffusionClassifierResult
from monai_jointdiff.networks import JointDiffusionUNet
from monai_jointdiff.schedulers import make_scheduler
from monai_jointdiff.visualize import save_png
from tests.bundles.runs import temporary_folder
from tests.engines.small_run import ItemList, items, use_one_thread
from tests.engines.test_serving import model_of, phantom_model

NAMES = ["normal", "opacity", "effusion"]
NAN = math.nan


def setUpModule() -> None:
    use_one_thread()


def result_of(votes: Sequence[Sequence[int]], num_draws: int, head: Any = None) -> DiffusionClassifierResult:
    """Images whose draws vote for the given classes of three, in this order; fewer votes: stopped early."""
    errors = torch.full((len(votes), 3, num_draws), NAN)
    for image, classes in enumerate(votes):
        for draw, winner in enumerate(classes):
            errors[image, :, draw] = torch.tensor([1.0, 2.0, 3.0])
            errors[image, winner, draw] = 0.5
    counts = torch.stack([torch.bincount(torch.tensor(v, dtype=torch.int64), minlength=3) for v in votes]).double()
    made = torch.tensor([len(v) for v in votes])
    head_probabilities = None if head is None else torch.tensor(head)
    chosen = counts.argmax(dim=1)
    probabilities = counts / made.clamp(min=1)[:, None]
    if head_probabilities is not None:
        chosen = torch.where(made > 0, chosen, head_probabilities.argmax(dim=1))
        probabilities = torch.where(made[:, None] > 0, probabilities, head_probabilities.double())
    return DiffusionClassifierResult(
        prediction=chosen,
        probabilities=probabilities,
        votes=counts,
        errors=errors.double().nanmean(dim=-1).nan_to_num(nan=torch.inf),
        num_draws=made,
        network_calls=3.0 * made + float(head is not None),
        decided=made < num_draws,
        draw_errors=errors,
        head_probabilities=head_probabilities,
        evidence=None,
        seconds=2.0,
    )


def labels_of_several() -> DiffusionClassifierResult:
    """Two images with three labels, four draws each: how many of them say present."""
    present = torch.tensor([[4, 1, 0], [3, 2, 1]])
    errors = torch.ones(2, 3, 2, 4)
    for image, label in np.ndindex(2, 3):
        errors[image, label, 1, : present[image, label]] = 0.5
        errors[image, label, 1, present[image, label] :] = 1.5
    prediction = (present > 2).long()
    return DiffusionClassifierResult(
        prediction=prediction,
        probabilities=present / 4.0,
        votes=present.double(),
        errors=errors.mean(dim=-1).double(),
        num_draws=torch.full((2, 3), 4),
        network_calls=torch.full((2,), 24.0),
        decided=torch.zeros(2, 3, dtype=torch.bool),
        draw_errors=errors,
        head_probabilities=torch.tensor([[0.9, 0.2, 0.2], [0.9, 0.6, 0.2]]),
        evidence=None,
        seconds=1.0,
    )


def inferer_of(**options: Any) -> DiffusionClassifierInferer:
    return DiffusionClassifierInferer(make_scheduler("ddim"), **options)


def conditional_network(**options: Any) -> JointDiffusionUNet:
    torch.manual_seed(0)
    network = JointDiffusionUNet(
        2,
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
    return network.eval()


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(np.random.default_rng(seed).integers(0, 256, (9, 6)).astype(np.uint8), path)


class TestConditionalDescription(unittest.TestCase):
    def test_trained_one_is_taken_as_it_is(self) -> None:
        folder = temporary_folder(self)
        model = phantom_model()
        wanted = replace(model, network={**model.network, "class_conditional": True})
        wanted.save(folder / "model.json")
        self.assertEqual(conditional_description(folder, "nowhere"), wanted)

    def test_unconditional_one_is_refused_with_the_remedy(self) -> None:
        folder = temporary_folder(self)
        phantom_model().save(folder / "model.json")
        with self.assertRaisesRegex(ValueError, "not class-conditional.*Train one with train.json and train_condit"):
            conditional_description(folder, "nowhere")

    def test_untrained_default_is_made_conditional(self) -> None:
        folder = temporary_folder(self)
        replace(phantom_model(), trained=False).save(folder / "default.json")
        description = conditional_description(folder / "empty", folder / "default.json")
        self.assertFalse(description.trained)
        self.assertTrue(description.build_network().class_conditional)


class TestImages(unittest.TestCase):
    def names(self, found: Sequence[Any]) -> list[str]:
        return [item["name"] for item in found]

    def test_phantoms_have_parts(self) -> None:
        model = phantom_model()
        source = source_of_model(model, None)
        found = images_to_decide(None, model)
        self.assertEqual((found.items, found.reference), (source.part("test"), source.part("val")))
        self.assertEqual(str(found), "abstention is chosen on the validation part of phantoms of seed 0 (4 images)")
        val = images_to_decide(None, model, part="val")
        self.assertEqual((val.items, val.reference), (source.part("val"), []))
        self.assertEqual(str(val), "abstention is chosen on the images themselves")

    def test_limits(self) -> None:
        found = images_to_decide(None, phantom_model(), limit=2, reference_limit=3)
        self.assertEqual(self.names(found.items), ["phantom/000010", "phantom/000013"])
        self.assertEqual(self.names(found.reference), ["phantom/000006", "phantom/000008", "phantom/000009"])
        for option, message in (("limit", "--limit"), ("reference_limit", "--reference_limit")):
            with self.assertRaisesRegex(ValueError, f"{message} must be a whole number of at least 1"):
                images_to_decide(None, phantom_model(), **{option: 0})  # type: ignore[arg-type]

    def test_labelled_folder_is_divided_as_in_training(self) -> None:
        folder = temporary_folder(self)
        for number, part in enumerate(("train", "val", "val", "test")):
            picture(folder / part / "Pear" / f"{number}.png")
        found = images_to_decide(str(folder), model_of(["pear", "apple"]))
        self.assertEqual(self.names(found.items), ["test/Pear/3.png"])
        self.assertEqual(found.items[0]["label"], 0)
        self.assertEqual(self.names(found.reference), ["val/Pear/1.png", "val/Pear/2.png"])

    def test_table_alone_gives_labels(self) -> None:
        folder = temporary_folder(self)
        for number in range(3):
            picture(folder / f"{number}.png")
        lines = ["file,label,split", "0.png,apple,test", "1.png,,test", "2.png,pear,val"]
        (folder / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
        found = images_to_decide(str(folder), model_of(["pear", "apple"]))
        self.assertEqual([(item["name"], item["label"]) for item in found.items], [("0.png", 1), ("1.png", -1)])
        self.assertEqual(self.names(found.reference), ["2.png"])

    def test_other_folders_and_files_are_their_own_reference(self) -> None:
        folder = temporary_folder(self)
        for name in ("b.png", "ward/a.png"):
            picture(folder / name)
        model = model_of(["pear", "apple"])
        found = images_to_decide(str(folder), model)
        self.assertEqual((self.names(found.items), found.reference), (["b.png", "ward/a.png"], []))
        one = images_to_decide(str(folder / "b.png"), model)
        self.assertEqual((self.names(one.items), one.reference), (["b.png"], []))

    def test_named_reference(self) -> None:
        folder = temporary_folder(self)
        for name in ("reference/1.png", "reference/2.png", "new/3.png"):
            picture(folder / name)
        found = images_to_decide(
            str(folder / "new"), model_of(["pear", "apple"]), reference_dir=str(folder / "reference")
        )
        self.assertEqual((self.names(found.items), self.names(found.reference)), (["3.png"], ["1.png", "2.png"]))
        self.assertEqual(str(found), "abstention is chosen on reference (2 images)")


class TestPrepareBatch(unittest.TestCase):
    def test_arguments_of_the_inferer(self) -> None:
        images, labels = torch.rand(2, 1, 4, 4), torch.tensor([0, -1])
        batch = {"image": images, "name": ["a", "b"], "label": labels}
        prepare = DiffusionClassifierPrepareBatch(3, maps="true", progress="false")
        prepared, found, arguments, keywords = prepare(batch, "cpu", dtype=torch.float64)
        torch.testing.assert_close(prepared, images.double())
        self.assertIs(found, labels)
        self.assertEqual(arguments, ())
        self.assertEqual({key: keywords[key] for key in ("maps", "progress")}, {"maps": True, "progress": False})

    def test_noise_of_an_image_depends_on_its_name_and_the_seed_alone(self) -> None:
        def seeds(names: list[str], seed: int = 0) -> list[int]:
            batch = {"image": torch.zeros(len(names), 1, 4, 4), "name": names}
            return DiffusionClassifierPrepareBatch(seed)(batch)[3]["seed"]

        self.assertEqual(seeds(["a", "b"])[1], seeds(["b", "c"])[0])
        self.assertEqual(len({*seeds(["a", "b", "c"]), *seeds(["a"], seed=1)}), 4)


class TestDoubt(unittest.TestCase):
    def test_orders_two_answers_as_the_variance_of_a_vote(self) -> None:
        result = result_of([[0] * a + [1] * (11 - a) for a in range(12)], 11)
        by_variance = np.argsort(np.round(np.asarray(result.uncertainty), 9), kind="stable")
        by_doubt = np.argsort(np.round(doubt(result, "majority"), 9), kind="stable")
        self.assertEqual(by_doubt.tolist(), by_variance.tolist())

    def test_of_three_classes_grows_with_the_votes_against_the_answer(self) -> None:
        result = result_of([[0] * 10, [0] * 7 + [1] * 3, [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]], 10)
        np.testing.assert_allclose(doubt(result, "majority"), [0, 0.3, 0.6])
        np.testing.assert_allclose(np.asarray(result.uncertainty), [0, 0.21, 0.24])

    def test_of_the_mean_is_the_entropy(self) -> None:
        result = result_of([[0, 0], [0, 1]], 2)
        np.testing.assert_allclose(doubt(result, "mean"), [0, math.log(2)])
        self.assertFalse(np.signbit(doubt(result, "mean")).any())


class TestAbstention(unittest.TestCase):
    def test_answers_at_least_the_wanted_share(self) -> None:
        shares = (10, 10, 9, 8, 8, 8, 6, 6, 5, 5)
        result = result_of([[0] * a + [1] * (10 - a) for a in shares], 10)
        for coverage, answered in ((0.1, 2), (0.2, 2), (0.3, 3), (0.35, 6), (0.8, 8), (0.9, 10), (1.0, 10)):
            rule = AbstentionRule.choose(result, "majority", coverage, "x")
            self.assertEqual((~rule.abstains(result)).tolist(), [k < answered for k in range(10)], coverage)

    def test_equal_shares_of_votes_are_treated_alike_whatever_their_rounding(self) -> None:
        # a share of 2 / 3 against: of 3 votes (1 - 1 / 3) and of 6 (1 - 2 / 6)
        three, six = result_of([[0, 1, 2]], 6), result_of([[0, 0, 1, 2, 1, 2]], 6)
        for one, other in ((three, six), (six, three)):
            self.assertEqual(AbstentionRule.choose(one, "majority", 1.0, "x").abstains(other).tolist(), [False])

    def test_several_labels_share_one_threshold(self) -> None:
        result = labels_of_several()
        rule = AbstentionRule.choose(result, "majority", 0.3, "x")
        self.assertEqual(rule.threshold, 0)
        self.assertEqual(rule.abstains(result).tolist(), [[False, True, False], [True, True, True]])

    def test_in_words(self) -> None:
        rule = AbstentionRule(0.8, 0.25, "majority", "the images themselves")
        self.assertIn("more than 25.0% of the votes are against the answer", str(rule))
        self.assertIn("at least 80% of the images themselves", str(rule))
        self.assertIn("the entropy is 0.25", str(replace(rule, rule="mean")))


class TestFirstDraws(unittest.TestCase):
    @parameterized.expand(["majority", "mean"])
    def test_equal_answers_of_a_classifier_with_so_many_draws(self, rule: str) -> None:
        # draws at random: the first n of many are those of a classifier with n
        network = conditional_network()
        images = torch.stack([item["image"] for item in items([0, 1, 2, 1])])
        many = inferer_of(num_draws=9, draws="random", rule=rule)(images, network, seed=5)
        for count in (1, 2, 5, 9):
            few = inferer_of(num_draws=count, draws="random", rule=rule)(images, network, seed=5)
            self.assertEqual(answers_of_first_draws(many, count, rule).tolist(), few.prediction.tolist(), count)

    def test_who_is_done_keeps_the_answer(self) -> None:
        result = result_of([[2, 0, 0], [1, 1, 0, 0, 0], []], 5, head=[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0, 0, 1.0]])
        expected = {1: [2, 1, 2], 2: [0, 1, 2], 3: [0, 1, 2], 4: [0, 0, 2], 5: [0, 0, 2]}
        for count, answers in expected.items():
            self.assertEqual(answers_of_first_draws(result, count, "majority").tolist(), answers, count)
        self.assertEqual(expected[5], result.prediction.tolist())

    def test_several_labels(self) -> None:
        answers = [answers_of_first_draws(labels_of_several(), count, "majority").tolist() for count in (1, 4)]
        self.assertEqual(answers, [[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 0, 0]]])


class TestTable(unittest.TestCase):
    def test_one_class_an_image(self) -> None:
        path = temporary_folder(self) / "x.csv"
        result = result_of([[0, 0, 2, 0], [1, 1]], 4, head=[[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
        predictions = DiffusionPredictions(["a/1.png", "2.png"], np.array([0, -1]), result)
        write_diffusion_csv(predictions, np.array([True, False]), NAMES, path)
        one, two = rows(path)
        entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
        self.assertEqual(
            one,
            {
                "image": "a/1.png",
                "prediction": "normal",
                "probability_normal": "0.750000",
                "probability_opacity": "0.000000",
                "probability_effusion": "0.250000",
                "votes_normal": "3",
                "votes_opacity": "0",
                "votes_effusion": "1",
                "vote_share": "0.750000",
                "uncertainty": "0.187500",
                "entropy": f"{entropy:.6g}",
                "draws": "4",
                "network_calls": "13",
                "decided": "False",
                "abstain": "True",
                "head_normal": "0.500000",
                "head_opacity": "0.250000",
                "head_effusion": "0.250000",
                "label": "normal",
            },
        )
        part = {"prediction": "opacity", "draws": "2", "decided": "True", "abstain": "False", "label": ""}
        self.assertEqual(two, {**two, **part})

    def test_several_labels(self) -> None:
        path = temporary_folder(self) / "x.csv"
        predictions = DiffusionPredictions(["1", "2"], np.full((2, 3), -1.0), labels_of_several())
        write_diffusion_csv(predictions, np.eye(2, 3, dtype=bool), NAMES, path)
        one, two = rows(path)
        self.assertNotIn("label", one)
        self.assertEqual([row["prediction"] for row in (one, two)], ["normal", "normal"])
        columns = ("votes_opacity", "vote_share_opacity", "abstain_opacity", "head_opacity", "network_calls")
        self.assertEqual([one[key] for key in columns], ["1", "0.750000", "False", "0.200000", "24"])
        self.assertEqual([two[key] for key in columns], ["2", "0.500000", "True", "0.600000", "24"])


class TestReporter(unittest.TestCase):
    def report(
        self, result: DiffusionClassifierResult, labels: Any, multi_label: bool = False, **options: Any
    ) -> tuple[dict[str, Any], set[str]]:
        """`summary.json` and the names of all files."""
        folder = temporary_folder(self)
        inferer = inferer_of(num_draws=result.draw_errors.shape[-1], **options)
        reporter = DiffusionClassificationReporter(
            model_of(NAMES, multi_label), inferer, folder, coverage=0.5, bootstrap=20
        )
        names = [f"{n}.png" for n in range(len(labels))]
        with contextlib.redirect_stdout(io.StringIO()):
            reporter(DiffusionPredictions(names, np.asarray(labels), result))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return summary, {path.name for path in folder.iterdir()}

    def test_figures_by_hand(self) -> None:
        head = [[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.2, 0.2, 0.6], [0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]
        votes = [[1, 0, 0], [1, 1, 1], [2, 2, 0], [0, 0, 0], [0, 1, 2]]  # answers 0 1 2 0 0
        result = result_of(votes, 3, head=head)
        summary, files = self.report(result, [0, 1, 1, 0, -1], head="nominate")
        self.assertEqual((summary["images"], summary["labelled"]), (5, 4))
        accuracy = summary["selective"]["accuracy_at_coverage"]
        self.assertEqual((accuracy[0]["coverage"], accuracy[0]["value"]), (1.0, 3 / 4))
        # doubts 1/3, 0, 1/3, 0, 2/3: half of the images have at most 1/3
        self.assertAlmostEqual(summary["abstention"]["threshold"], 1 / 3)
        self.assertAlmostEqual(summary["abstention"]["abstained"], 1 / 5)
        self.assertEqual(summary["accuracy_of_answered"], 3 / 4)
        self.assertEqual(summary["network_calls"], {"mean": 10.0, "smallest": 10.0, "largest": 10.0})
        first = [(e["draws"], e["network_calls"], e["value"]) for e in summary["accuracy_of_first_draws"]]
        self.assertEqual(first, [(1, 4.0, 2 / 4), (3, 10.0, 3 / 4)])
        one_hot = np.eye(3)[[0, 1, 1, 0]]
        brier = float(((np.asarray(result.probabilities)[:4] - one_hot) ** 2).sum(axis=1).mean())
        self.assertAlmostEqual(summary["brier"]["value"], brier)
        self.assertEqual(summary["head"]["selective"]["accuracy_at_coverage"][0]["value"], 3 / 4)
        pictures = {"risk_coverage.png", "accuracy_against_calls.png"}
        self.assertEqual(files, pictures | {"summary.json", "diffusion_predictions.csv"})

    def test_several_labels_are_a_question_each(self) -> None:
        labels = [[1.0, 1.0, 0.0], [1.0, -1.0, 1.0]]  # answers 1 0 0, 1 0 0
        summary, _ = self.report(labels_of_several(), labels, multi_label=True)
        self.assertEqual(summary["labelled"], 5)
        self.assertAlmostEqual(summary["selective"]["accuracy_at_coverage"][0]["value"], 3 / 5)
        self.assertEqual(summary["accuracy_of_first_draws"][0]["value"], 5 / 5)  # 1 1 0, 1 1 1
        # votes against the answers 0 1/4 0, 1/4 1/2 1/4: half of the answers have at most 1/4
        self.assertAlmostEqual(summary["abstention"]["threshold"], 1 / 4)
        self.assertAlmostEqual(summary["abstention"]["abstained"], 1 / 6)
        squares = np.square([0, 3 / 4, 0, 1 / 4, 3 / 4]).mean()
        self.assertAlmostEqual(summary["brier"]["value"], float(squares))

    def test_without_labels_there_are_answers_only(self) -> None:
        summary, files = self.report(result_of([[0, 1], [0, 0]], 2), [-1, -1])
        self.assertEqual(files, {"summary.json", "diffusion_predictions.csv"})
        self.assertNotIn("selective", summary)

    def test_with_the_head_as_prior_the_draws_alone_are_no_answer(self) -> None:
        head = [[0.8, 0.1, 0.1], [0.3, 0.6, 0.1]]
        _, files = self.report(result_of([[0, 1, 1], [0, 0, 1]], 3, head=head), [1, 0], head="prior")
        self.assertNotIn("accuracy_against_calls.png", files)
        self.assertIn("risk_coverage.png", files)

    def test_threshold_comes_from_the_reference(self) -> None:
        network, model = conditional_network(), phantom_model()
        description = ModelDescription({**network.config}, {}, model.data)
        inferer = inferer_of(num_draws=5)
        data = items([0, 1, 2, 1, 0, 2])
        with contextlib.redirect_stdout(io.StringIO()):
            reporter = DiffusionClassificationReporter(description, inferer, temporary_folder(self), bootstrap=0)
            images = replace(images_to_decide(None, model), reference=data, reference_name="others")
            reporter.choose_abstention(network, images, lambda item: item, torch.device("cpu"), batch_size=4)
        found = classify_by_diffusion(network, inferer, ItemList(data), torch.device("cpu"), batch_size=3)
        self.assertEqual(found.names, [item["name"] for item in data])
        expected = AbstentionRule.choose(found.result, "majority", 0.8, "others (6 images)")
        self.assertEqual(reporter.abstention, expected)
        reporter.abstention = None
        reporter.choose_abstention(network, replace(images, reference=[]), None, torch.device("cpu"))
        self.assertIsNone(reporter.abstention)

    @parameterized.expand([(0,), (1.5,)])
    def test_wrong_coverage(self, coverage: float) -> None:
        with self.assertRaisesRegex(ValueError, r"DiffusionClassificationReporter: coverage must lie in \(0, 1\]"):
            DiffusionClassificationReporter(phantom_model(), inferer_of(), "x", coverage)


if __name__ == "__main__":
    unittest.main()
