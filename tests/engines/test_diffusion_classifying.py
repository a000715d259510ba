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
    Decision,
    DiffusionClassificationReporter,
    DiffusionClassifierPrepareBatch,
    DrawCalibration,
    ModelDescription,
    UnusualRule,
    answers_of_first_draws,
    classify_by_diffusion,
    conditional_description,
    doubt,
    images_to_decide,
    source_of_model,
    write_diffusion_csv,
)
from monai_jointdiff.handlers import DiffusionPredictions
from monai_jointdiff.inferers import (
    DenoisingProfile,
    DiffusionClassifierInferer,
    DiffusionClassifierResult,
    Typicality,
    replay,
)
from monai_jointdiff.metrics import fit_temperature
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
    logits = ((counts + 1) / (made[:, None] + 3)).log()
    if head_probabilities is not None:
        chosen = torch.where(made > 0, chosen, head_probabilities.argmax(dim=1))
        probabilities = torch.where(made[:, None] > 0, probabilities, head_probabilities.double())
        left_out = (made == 0)[:, None] & (torch.arange(3) != chosen[:, None])
        logits = logits.masked_fill(left_out, -math.inf)
    return DiffusionClassifierResult(
        prediction=chosen,
        probabilities=probabilities,
        votes=counts,
        logits=logits,
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
        logits=(torch.stack([5 - present, present + 1], dim=-1) / 6).log().double(),
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
        extent, reference = str(found).split("\n")
        self.assertRegex(extent, "^taken: the test part: 4 of 14 images")
        self.assertEqual(reference, "abstention is chosen on the validation part of phantoms of seed 0 (4 images)")
        val = images_to_decide(None, model, part="val")
        self.assertEqual((val.items, val.reference), (source.part("val"), []))
        self.assertTrue(str(val).endswith("\nabstention is chosen on the images themselves"))

    def test_all_parts_of_data_that_the_model_has_not_seen(self) -> None:
        folder = temporary_folder(self)
        for number in range(10):
            picture(folder / ("Pear" if number % 2 else "Apple") / f"{number}.png")
        model = model_of(["pear", "apple"])
        found = images_to_decide(str(folder), model, part="all")
        self.assertEqual((len(found.items), found.reference), (10, []))
        self.assertEqual(str(found), "taken: all 10 images\nabstention is chosen on the images themselves")
        drawn = images_to_decide(str(folder), model)
        self.assertLess(len(drawn.items), 10)
        self.assertIn("the test part, drawn by the seed (whether as for training is not recorded)", str(drawn))

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

    def test_of_the_head_alone_is_what_it_leaves_to_others(self) -> None:
        """A head that answers alone is not the surest of all: between votes of 10 : 0 and of 6 : 4."""
        head = [[0.2, 0.1, 0.7]] * 3
        result = result_of([[0] * 10, [0] * 6 + [1] * 4, []], 10, head=head)
        np.testing.assert_allclose(doubt(result, "majority"), [0, 0.4, 0.3], rtol=1e-6)
        rule = AbstentionRule.choose(result, "majority", 0.3, "x")
        self.assertEqual(rule.abstains(result).tolist(), [False, True, True])

    def test_with_the_head_as_prior_is_of_both_together(self) -> None:
        errors = torch.tensor([[[0.0] * 4, [1.0] * 4], [[1.0] * 4, [0.0] * 4]])  # 4 : 0 for class 0 and for class 1
        logits = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log()
        result = replay(errors, inferer_of(num_draws=4, head="prior"), logits)
        expected = [0.1 / (0.9 * 5 + 0.1), 0.5 / (0.9 + 0.5)]  # 1 - p of the answers 0 and 0
        self.assertEqual(result.prediction.tolist(), [0, 0])
        np.testing.assert_allclose(doubt(result, "majority"), expected, rtol=1e-6)

    def test_of_several_labels(self) -> None:
        expected = [[0, 1 / 4, 0], [1 / 4, 1 / 2, 1 / 4]]
        np.testing.assert_allclose(doubt(labels_of_several(), "majority"), expected)

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
        self.assertIn("more than 25.0% of the votes (with the head: of the probability) are against", str(rule))
        self.assertIn("at least 80% of the images themselves", str(rule))
        self.assertIn("the entropy is above 0.25", str(replace(rule, rule="mean")))


def votes_that_are_too_sure(count: int = 200, seed: int = 0) -> tuple[DiffusionClassifierResult, np.ndarray]:
    """Images of which class 0 or 1 gets all of nine votes and is right in three quarters of the cases."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    answers = np.where(generator.random(count) < 0.75, labels, 1 - labels)
    return result_of([[int(answer)] * 9 for answer in answers], 9), labels


class TestDrawCalibration(unittest.TestCase):
    def test_makes_unanimous_votes_as_sure_as_they_are_right(self) -> None:
        result, labels = votes_that_are_too_sure(2000)
        rule = DrawCalibration.fit(result, labels, "x")
        assert rule is not None
        sure = np.asarray(result.calibrated(rule.temperature)).max(axis=1)
        right = (np.asarray(result.prediction) == labels).mean()
        # the third class, which never is right, holds as much as the second does
        self.assertAlmostEqual(float(sure.mean()), right, delta=0.05)
        self.assertEqual(rule.temperature, fit_temperature(result.logits, labels))

    def test_images_that_say_nothing_are_left_out(self) -> None:
        result, labels = votes_that_are_too_sure(40)
        expected = DrawCalibration.fit(result, labels, "x")
        more = result_of([[int(answer)] * 9 for answer in result.prediction] + [[], [0] * 9], 9, [[0.2, 0.8, 0]] * 42)
        found = DrawCalibration.fit(more, np.append(labels, [0, -1]), "x")
        assert found is not None and expected is not None
        self.assertAlmostEqual(found.temperature, expected.temperature, places=9)

    def test_too_few_labels(self) -> None:
        result, labels = votes_that_are_too_sure(20)
        self.assertIsNotNone(DrawCalibration.fit(result, labels, "x"))
        labels[3] = -1
        self.assertIsNone(DrawCalibration.fit(result, labels, "x"))

    def test_several_labels_are_a_question_each(self) -> None:
        result = labels_of_several()
        many = replace(result, logits=result.logits.repeat(5, 1, 1))
        labels = np.tile([[1.0, 1.0, 0.0], [1.0, -1.0, 1.0]], (5, 1))
        rule = DrawCalibration.fit(many, labels, "x")
        assert rule is not None
        difference = (many.logits[..., 1] - many.logits[..., 0]).numpy()
        self.assertAlmostEqual(rule.temperature, fit_temperature(difference, labels, multi_label=True), places=6)

    def test_in_words(self) -> None:
        self.assertEqual(str(DrawCalibration(2.0, "x")), "calibrated with temperature 2, fitted on x")


class TestUnusualRule(unittest.TestCase):
    def test_flags_few_known_images_and_other_ones(self) -> None:
        profiles = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
        rule = UnusualRule.fit(profiles[:100], "x")
        assert rule is not None
        self.assertAlmostEqual(float((rule.scores(profiles[100:]) > rule.threshold).mean()), 0.05, delta=0.05)
        self.assertTrue((rule.scores(profiles + 20) > rule.threshold).all())
        self.assertEqual(rule.threshold, Typicality.held_out_threshold(profiles[:100]))
        self.assertIn("95% of x stay below", str(rule))

    def test_too_few_images(self) -> None:
        profiles = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
        self.assertIsNotNone(UnusualRule.fit(profiles, "x"))
        self.assertIsNone(UnusualRule.fit(profiles[:19], "x"))


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
                "head_prediction": "normal",
                "head_normal": "0.500000",
                "head_opacity": "0.250000",
                "head_effusion": "0.250000",
                "label": "normal",
            },
        )
        part = {"prediction": "opacity", "draws": "2", "decided": "True", "abstain": "False", "label": ""}
        self.assertEqual(two, {**two, **part})

    def test_head_alone_has_no_votes(self) -> None:
        path = temporary_folder(self) / "x.csv"
        result = result_of([[], [0, 1]], 4, head=[[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
        write_diffusion_csv(DiffusionPredictions(["1", "2"], np.full(2, -1), result), np.zeros(2, bool), NAMES, path)
        columns = ("vote_share", "uncertainty", "draws", "probability_normal")
        self.assertEqual([rows(path)[0][key] for key in columns], ["", "", "0", "0.500000"])
        self.assertEqual([rows(path)[1][key] for key in columns], ["0.500000", "0.250000", "2", "0.500000"])

    def test_calibrated_unusual_and_the_decision_of_the_head(self) -> None:
        path = temporary_folder(self) / "x.csv"
        errors = torch.tensor([[[0.0] * 4, [1.0] * 4]]).repeat(2, 1, 1)
        result = replay(errors, inferer_of(num_draws=4, head="prior"), torch.tensor([[0.4, 0.6], [0.2, 0.8]]).log())
        profiles = torch.tensor([[0.0], [3.0]]).double()
        rule = UnusualRule(Typicality(torch.zeros(1).double(), torch.eye(1).double()), 2.0, 0.95, "x")
        predictions = DiffusionPredictions(["1", "2"], np.full(2, -1), result, profiles)
        write_diffusion_csv(
            predictions,
            np.zeros(2, bool),
            ["no", "yes"],
            path,
            decision=Decision(thresholds=[0.7]),
            calibration=DrawCalibration(2.0, "x"),
            unusual=rule,
        )
        found = rows(path)
        self.assertEqual([row["head_prediction"] for row in found], ["no", "yes"])  # .6 is below the threshold
        self.assertEqual([(row["unusual_score"], row["unusual"]) for row in found], [("0", "False"), ("3", "True")])
        product = [(5 * 0.4) ** 0.5, 0.6**0.5]  # 5 and 1 votes times the head, to the power 1 / 2
        self.assertAlmostEqual(float(found[0]["calibrated_no"]), product[0] / sum(product), places=5)

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
        self,
        result: DiffusionClassifierResult,
        labels: Any,
        multi_label: bool = False,
        patients: list[str] | None = None,
        **options: Any,
    ) -> tuple[dict[str, Any], set[str]]:
        """`summary.json` and the names of all files."""
        folder = temporary_folder(self)
        inferer = inferer_of(num_draws=result.draw_errors.shape[-1], **options)
        reporter = DiffusionClassificationReporter(
            model_of(NAMES, multi_label), inferer, folder, coverage=0.5, bootstrap=20
        )
        names = [f"{n}.png" for n in range(len(labels))]
        with contextlib.redirect_stdout(io.StringIO()):
            reporter(DiffusionPredictions(names, np.asarray(labels), result, patients=patients))
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

    def test_intervals_are_those_of_patients(self) -> None:
        right = [[0, 0, 1], [1, 1, 1]] * 12  # 24 images, of which the second half is answered wrongly
        labels = [0, 1] * 6 + [1, 0] * 6
        result = result_of(right, 3, head=[[0.5, 0.3, 0.2]] * 24)

        def width(figure: dict[str, Any]) -> float:
            return float(figure["high"] - figure["low"])

        def figures(patients: list[str] | None) -> list[dict[str, Any]]:
            summary, _ = self.report(result, labels, patients=patients, head="nominate")
            self.assertEqual("notes" in summary, patients is not None)
            accuracies = [part["selective"]["accuracy_at_coverage"][0] for part in (summary, summary["head"])]
            return [*accuracies, summary["accuracy_of_first_draws"][-1], summary["brier"]]

        alone = figures(None)
        of_two = figures([f"{n // 2}" for n in range(24)])  # both images of a patient are right or both wrong
        for image, patient in zip(alone, of_two, strict=True):
            self.assertEqual(image["value"], patient["value"])
        self.assertGreater(width(of_two[0]), width(alone[0]))
        self.assertGreater(width(of_two[2]), width(alone[2]))
        for figure in figures([f"{n // 3}" for n in range(24)]):  # eight patients
            self.assertIsNone(figure["low"])

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
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            reporter = DiffusionClassificationReporter(
                description,
                inferer,
                temporary_folder(self),
                bootstrap=0,
                profile=DenoisingProfile(inferer.scheduler, 2),
            )
            images = replace(images_to_decide(None, model), reference=data, reference_name="others")
            reporter.fit(network, images, lambda item: item, torch.device("cpu"), batch_size=4)
        found = classify_by_diffusion(network, inferer, ItemList(data), torch.device("cpu"), batch_size=3)
        self.assertEqual(found.names, [item["name"] for item in data])
        expected = AbstentionRule.choose(found.result, "majority", 0.8, "others (6 images)")
        self.assertEqual(reporter.abstention, expected)
        self.assertIsNone(reporter.calibration)  # six labels are too few, and six images
        self.assertIsNone(reporter.unusual)
        self.assertIn("not calibrated: fewer than 20 labels of others (6 images)", printed.getvalue())
        self.assertIn("no image is called unusual: fewer than 20 images", printed.getvalue())
        reporter.abstention = None
        reporter.fit(network, replace(images, reference=[]), None, torch.device("cpu"))
        self.assertIsNone(reporter.abstention)

    def test_calibration_and_what_is_unusual_come_from_the_reference(self) -> None:
        network, model = conditional_network(), phantom_model()
        scheduler = make_scheduler("ddim")
        inferer, profile = inferer_of(num_draws=5), DenoisingProfile(scheduler, 3)
        reference, data = items([n % 3 for n in range(24)]), items([2, 0, 1, -1])
        data[1]["image"] = torch.full_like(data[1]["image"], 30.0)  # far beyond any gray value
        folder = temporary_folder(self)
        description = ModelDescription({**network.config}, {}, {**model.data, "class_names": NAMES})
        reporter = DiffusionClassificationReporter(description, inferer, folder, bootstrap=0, profile=profile)
        images = replace(images_to_decide(None, model), reference=reference, reference_name="others")
        device = torch.device("cpu")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            reporter.fit(network, images, lambda item: item, device, batch_size=7)
            reporter(classify_by_diffusion(network, inferer, ItemList(data), device, profile=profile))
        known = classify_by_diffusion(network, inferer, ItemList(reference), device)
        calibration = DrawCalibration.fit(known.result, known.labels, "others (24 images)")
        assert calibration is not None and reporter.calibration is not None
        self.assertAlmostEqual(reporter.calibration.temperature, calibration.temperature, places=6)
        pictures = torch.stack([item["image"] for item in reference])
        unusual = UnusualRule.fit(profile(pictures, network), "others (24 images)")
        assert unusual is not None
        new = unusual.scores(profile(torch.stack([item["image"] for item in data]), network))
        found = rows(folder / "diffusion_predictions.csv")
        np.testing.assert_allclose([float(row["unusual_score"]) for row in found], new, rtol=1e-3)
        self.assertEqual([row["unusual"] for row in found], [str(bool(score > unusual.threshold)) for score in new])
        self.assertEqual(found[1]["unusual"], "True")
        result = classify_by_diffusion(network, inferer, ItemList(data), device).result
        calibrated = [[float(row[f"calibrated_{name}"]) for name in NAMES] for row in found]
        np.testing.assert_allclose(calibrated, result.calibrated(calibration.temperature), atol=1e-5)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        self.assertEqual(summary["unusual"]["flagged"], float((new > unusual.threshold).mean()))
        self.assertEqual((summary["unusual"]["draws"], summary["unusual"]["share"]), (3, 0.95))
        hot = np.eye(3)[[2, 0, 1]]
        for figures, values in ((summary, result.probabilities), (summary["calibrated"], np.array(calibrated))):
            brier = np.square(np.asarray(values)[:3] - hot).sum(axis=1).mean()
            self.assertAlmostEqual(figures["brier"]["value"], brier, places=5)
            self.assertIn("ece", figures)
        for words in ("calibrated with temperature", "unusual above a score", "brier, calibrated", "share unusual"):
            self.assertIn(words, printed.getvalue())

    def test_head_decides_by_its_threshold(self) -> None:
        folder = temporary_folder(self)
        model = replace(model_of(["no", "yes"]), decision=Decision(thresholds=[0.7]))
        errors = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(0))
        inferer = inferer_of(num_draws=3, head="prior")
        result = replay(errors, inferer, torch.tensor([[0.4, 0.6], [0.2, 0.8], [0.35, 0.65], [0.9, 0.1]]).log())
        reporter = DiffusionClassificationReporter(model, inferer, folder, bootstrap=0)
        with contextlib.redirect_stdout(io.StringIO()):
            reporter(DiffusionPredictions(list("abcd"), np.array([0, 1, 1, 0]), result))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        accuracy = summary["head"]["selective"]["accuracy_at_coverage"]
        # answers 0 1 0 0; probabilities of another answer .6 .2 .65 .1
        self.assertEqual([entry["value"] for entry in accuracy if entry["coverage"] in (1.0, 0.5)], [0.75, 1.0])

    def test_settings_tell_how_it_was_made(self) -> None:
        options = {"stages": [(1, 2)], "rule": "mean", "head_temperature": 1.5}
        summary, _ = self.report(result_of([[0, 1, 1], [0, 0, 0]], 3), [-1, -1], **options)
        found = {key: summary["settings"][key] for key in ("stages", "head_temperature", "num_draws")}
        self.assertEqual(found, {"stages": [[1, 2]], "head_temperature": 1.5, "num_draws": 3})

    @parameterized.expand([(0,), (1.5,)])
    def test_wrong_coverage(self, coverage: float) -> None:
        with self.assertRaisesRegex(ValueError, r"DiffusionClassificationReporter: coverage must lie in \(0, 1\]"):
            DiffusionClassificationReporter(phantom_model(), inferer_of(), "x", coverage)


if __name__ == "__main__":
    unittest.main()
