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

"""Training the chest x-ray bundle with few labels: what a run leaves, exact resuming, presets."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import monai.bundle
import torch
from ignite.engine import Engine, Events
from parameterized import parameterized

from monai_jointdiff.data import choose_labelled, labelled_names, open_source, write_label_list
from monai_jointdiff.engines import ModelDescription, SemiSupervisedPrepareBatch, load_weights, parameter_groups
from monai_jointdiff.handlers import GroupLearningRateSchedule, UnlabelledWeightSchedule, WeightSchedule
from monai_jointdiff.losses import FixMatchLoss
from tests.bundles import runs
from tests.bundles.runs import (
    PHANTOMS,
    ROOT,
    SMALL_NETWORK,
    TINY,
    leave_no_trace,
    message_of,
    temporary_folder,
    working_directory,
)

TRAIN, SEMI = "bundles/chest_xray/train.json", "bundles/chest_xray/train_semi.json"
STUDY = "bundles/chest_xray/label_efficiency.json"
FEW: dict[str, Any] = {
    **PHANTOMS,
    "num_labels": 6,
    "num_samples": 0,
    "picture_interval": 9,
    "head_learning_rate": 2e-4,
    "threshold": 0.4,
    "teacher": "true",
    "classification_every": 2,
}
TEMPORARY = Path()
TRAINED = Path()  # two epochs of three iterations


def setUpModule() -> None:
    global TEMPORARY, TRAINED
    leave_no_trace()
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    TEMPORARY = Path(folder.name).resolve()
    TRAINED = TEMPORARY / "trained"
    train(TRAINED)


def train(directory: Path, **options: Any) -> str:
    return runs.train(directory, config_file=[TRAIN, SEMI], **{**FEW, **options})


def checkpoint(directory: Path, iteration: int = 6) -> dict[str, Any]:
    return torch.load(directory / "models" / f"checkpoint_{iteration:08d}.pt", weights_only=True)


def last_handler(parser: monai.bundle.ConfigParser) -> str:
    return f"train#handlers#{len(parser['train#handlers']) - 1}"


class StopAfter:
    """Handler that ends a training as a broken machine does."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=self.iteration), self._stop)

    def _stop(self, engine: Engine) -> None:
        raise KeyboardInterrupt


class TestTraining(unittest.TestCase):
    def test_list_of_labels_is_there_and_can_be_given_again(self) -> None:
        options = {"image_size": 16, "phantom_counts": PHANTOMS["source#phantom_counts"]}
        train_part = open_source(**options).part("train")
        expected = choose_labelled([item["label"] for item in train_part], 6)
        file = TRAINED / "output" / "labelled.txt"
        self.assertEqual(file.read_text().splitlines(), [train_part[n]["name"] for n in expected])
        again = open_source(**options, label_list=file).part("train")
        self.assertEqual(labelled_names(again), file.read_text().splitlines())

    def test_a_list_of_labels_is_taken_as_a_whole(self) -> None:
        listed = [item["name"] for item in open_source(image_size=16, phantom_counts=[90, 6, 6]).part("train")][:70]
        file = write_label_list(TEMPORARY / "listed.txt", listed)
        given = {"source#phantom_counts": [90, 6, 6], "label_list": str(file)}
        for options, number in (({}, 70), ({"num_labels": 20}, 20)):
            parser = monai.bundle.ConfigParser()
            with working_directory(ROOT):
                parser.read_config([TRAIN, SEMI])
                parser.update({**SMALL_NETWORK, "image_size": 16, **given, **options})
                kept = labelled_names(parser.get_parsed_content("source").part("train"))
            self.assertEqual(len(kept), number)
            self.assertLessEqual(set(kept), set(listed))

    def test_leaves_a_model_and_its_settings(self) -> None:
        state = checkpoint(TRAINED)
        network = ModelDescription.load(TRAINED / "models" / "model.json").build_network()
        network.load_state_dict(load_weights(TRAINED / "models" / "model.pt"))
        settings = {"algorithm": "fixmatch", "num_labels": 6, "unlabelled_per_labelled": 3, "noisy": "unlabelled"}
        self.assertLessEqual(settings.items(), state["options"].items())
        rest, head = state["optimizer"]["param_groups"]
        self.assertAlmostEqual(head["lr"], 0.2 * rest["lr"])
        self.assertTrue(all(bool(value.isfinite().all()) for value in state["network"].values()))

    def test_resumed_run_ends_as_the_uninterrupted_one(self) -> None:
        folder = TEMPORARY / "stopped"
        handlers = "$[@checkpoint, @ema, @train#loss_terms] + @train#handlers + [@stop]"
        stopper = {"_target_": "tests.bundles.test_chest_xray_semi.StopAfter", "iteration": 5}
        stop = {"stop": stopper, "train#trainer#train_handlers": handlers, "checkpoint_interval": 2}
        with self.assertRaises(KeyboardInterrupt):
            train(folder, **stop)
        file = folder / "models" / "checkpoint_00000004.pt"
        train(folder, resume=str(file), checkpoint_interval=2)
        ends = [checkpoint(directory) for directory in (folder, TRAINED)]
        for part in ("network", "optimizer", "ema", "best"):
            torch.testing.assert_close(ends[0][part], ends[1][part], rtol=0, atol=0)

    def test_without_denoising_on_labels_alone(self) -> None:
        """The control: the decoder stays as it was, no picture of its samples is made, validation is as small."""
        folder = TEMPORARY / "supervised"
        options = {"algorithm": "supervised", "num_labels": 6, "validation_count": "labelled", "num_samples": 0}
        text = runs.train(folder, config_file=[TRAIN, SEMI], **{**PHANTOMS, **options, "epochs": 1})
        self.assertIn("val: 6 images", text)
        state = checkpoint(folder, 3)
        self.assertEqual(state["options"]["algorithm"], "supervised")
        moments = state["optimizer"]["state"]
        network = ModelDescription.load(folder / "models" / "model.json").build_network()
        learning = [parameter for group in parameter_groups(network) for parameter in group["params"]]
        decoder = {id(parameter) for part in (network.up_blocks, network.out) for parameter in part.parameters()}
        moved = {id(learning[number]) for number in moments}
        self.assertEqual({id(parameter) for parameter in learning} - moved, decoder)
        written = {path.name for path in (folder / "output").iterdir()}
        self.assertLessEqual({"metrics.json", "labelled.txt"}, written)
        self.assertNotIn("training", written)

    def test_rounds_of_pseudo_labels(self) -> None:
        folder = TEMPORARY / "rounds"
        options = {"algorithm": "acpl", "num_labels": 6, "num_samples": 0, "picture_interval": 9, "neighbours": 3}
        runs.train(folder, config_file=[TRAIN, SEMI], **{**PHANTOMS, **options})
        state = checkpoint(folder)
        self.assertEqual(state["options"]["rounds"], ["AntiCurriculumPseudoLabeller", 1, 1, 3])
        table = state["further"]["pseudo_labels"]
        given = table["weights"] > 0
        self.assertTrue(0 < int(given.sum()) <= 18)
        end_of_epoch = checkpoint(folder, 3)["further"]["pseudo_labels"]  # written after the round of its epoch
        torch.testing.assert_close(end_of_epoch, table)
        torch.testing.assert_close(table["probabilities"].sum(dim=1), given.float())
        train_part = open_source(image_size=16, phantom_counts=PHANTOMS["source#phantom_counts"]).part("train")
        labelled = choose_labelled([item["label"] for item in train_part], 6)
        self.assertFalse(bool(given[list(labelled)].any()))  # what has a label needs none
        self.assertTrue((folder / "output" / "metrics.json").is_file())

    @parameterized.expand(
        [
            ({"num_labels": 7}, r"labels was 'sha256:\w+', is 'sha256:\w+'; num_labels was 6, is 7\."),
            ({"num_labels": "null", "label_list": "@list"}, r"labels was 'sha256.*; num_labels was 6, is None\."),
            ({"threshold": 0.5, "num_operations": 3}, r"num_operations was 2, is 3; threshold was 0.4, is 0.5\."),
            ({"magnitude": 5.0, "unlabelled_ramp": 2}, r"magnitude was 10.0, is 5.0; unlabelled_ramp was 0, is 2\."),
            ({"head_learning_rate": 3e-4}, r"head_learning_rate was 0.0002, is 0.0003\."),
            (
                {"classification_every": 1, "classification_start": 2, "classification_ramp": 3},
                "classification_every was 2, is 1; classification_ramp was 0, is 3; classification_start was 0, is 2",
            ),
        ]
    )
    def test_other_settings_are_another_run(self, options: dict[str, Any], message: str) -> None:
        if "label_list" in options:
            names = [item["name"] for item in open_source(phantom_counts=[24, 12, 12]).part("train")][::3]
            options = {**options, "label_list": str(write_label_list(TEMPORARY / "list.txt", names))}
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            train(TEMPORARY / "other", resume=str(TRAINED / "models" / "checkpoint_00000003.pt"), **options)
        self.assertRegex(message_of(caught.exception), f"from a run with other options: {message}")

    def test_a_classifier_that_would_never_learn_is_refused(self) -> None:
        """As with the settings of a long run, which a short one takes over."""
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            train(TEMPORARY / "never", classification_start=6)
        message = "WeightSchedule: start is 6, and the training ends after iteration 6"
        self.assertIn(message, message_of(caught.exception))


class TestConfiguration(unittest.TestCase):
    def parser(self, *files: str, **options: Any) -> monai.bundle.ConfigParser:
        parser = monai.bundle.ConfigParser()
        with working_directory(ROOT):
            parser.read_config([TRAIN, SEMI, *files])
            folder = temporary_folder(self)
            folders = {"ckpt_dir": str(folder / "models"), "output_dir": str(folder / "output")}
            parser.update({**SMALL_NETWORK, **PHANTOMS, **folders, "image_size": 16, "num_labels": 6, **options})
        return parser

    def test_parts_of_the_default(self) -> None:
        parser = self.parser(teacher="false", learning_rate=0.01)
        with working_directory(ROOT):
            loss, prepare = (parser.get_parsed_content(key) for key in ("loss", "train#prepare_batch"))
            self.assertIsInstance(loss.term, FixMatchLoss)
            self.assertIsInstance(prepare, SemiSupervisedPrepareBatch)
            self.assertEqual((prepare.views, prepare.teacher, prepare.noisy), (loss.term.views, None, "unlabelled"))
            found = (prepare.pseudo_labels, parser.get_parsed_content("checkpoint").further)
            self.assertEqual(found, (None, {}))
            self.assertEqual(parser.get_parsed_content("head_learning_rate"), 0.01)  # follows the other one
            validation = parser.get_parsed_content("validate#key_metric#val_loss")._loss_fn
            loss.classification_weight = 0.0  # as in iterations without the term
            self.assertEqual(validation.classification_weight, 0.005)
            schedules = [parser.get_parsed_content(key) for key in ("train#handlers#1", last_handler(parser))]
            unlabelled = parser.get_parsed_content(f"train#handlers#{len(parser['train#handlers']) - 3}")
        self.assertIsInstance(schedules[0], GroupLearningRateSchedule)
        self.assertIsInstance(schedules[1], WeightSchedule)
        self.assertIsInstance(unlabelled, UnlabelledWeightSchedule)
        self.assertIs(unlabelled.loss, loss)
        self.assertEqual([unlabelled.weight_at(n) for n in (1, 100)], [1.0, 1.0])  # FixMatch needs no ramp

    def test_the_pi_model_begins_softly(self) -> None:
        """Over 80 of 300 epochs, as published: 4 of 15."""
        parser = self.parser(algorithm="pi_model", batch_size=8, epochs=30, unlabelled_weight=2.0)
        with working_directory(ROOT):
            ramp = parser.get_parsed_content(f"train#handlers#{len(parser['train#handlers']) - 3}")
        self.assertEqual((ramp.ramp, ramp.weight), (8 * 3, 2.0))
        self.assertAlmostEqual(ramp.weight_at(1), 2 * math.exp(-5))
        self.assertEqual(ramp.weight_at(25), 2.0)

    def test_head_that_is_asked_for(self) -> None:
        for options, expected in (({}, "standardized"), ({"head": "linear"}, "linear")):
            parser = self.parser(**options)
            with working_directory(ROOT):
                self.assertEqual(parser.get_parsed_content("network_def").config["head"], expected)

    @parameterized.expand([("mediffusion_nih", 24, 2), ("mediffusion_isic", 32, 7)])
    def test_presets(self, preset: str, batch_size: int, ratio: int) -> None:
        parser = self.parser(preset=preset, batch_size=batch_size)
        with working_directory(ROOT):
            network, order = (parser.get_parsed_content(key) for key in ("network_def", "train#order"))
            optimizer, schedule = (parser.get_parsed_content(key) for key in ("optimizer", last_handler(parser)))
            settings = parser.get_parsed_content("settings")
        self.assertEqual((network.config["head"], network.config["head_dropout"]), ("mediffusion", 0.3))
        self.assertEqual(order.block, 1 + ratio)
        factor = settings.head_learning_rate / settings.learning_rate
        rest, head = optimizer.param_groups
        self.assertEqual(rest["lr_factor"], 1.0)
        self.assertAlmostEqual(head["lr_factor"], factor, places=12)
        self.assertEqual((schedule.start, schedule.every), (settings.start, settings.every))

    def test_without_a_term_and_class_conditional(self) -> None:
        parser = self.parser(algorithm="joint", class_conditional=True)
        with working_directory(ROOT):
            prepare, views = (
                parser.get_parsed_content(f"train#{key}") for key in ("prepare_batch", "dataset#random_transform")
            )
        self.assertEqual((prepare.views, prepare.noisy, prepare.class_conditional), ((), "all", True))
        self.assertEqual(len(views.transforms), 1)

    def test_a_labeller_of_ones_own(self) -> None:
        labeller = {"_target_": "tests.handlers.test_pseudo_labels.MostConfident", "number": 4}
        parser = self.parser(algorithm="acpl", labeller=labeller, round_start=2, round_every=3)
        with working_directory(ROOT):
            rounds = parser.get_parsed_content(f"train#handlers#{len(parser['train#handlers']) - 2}")
            prepare, saved = (parser.get_parsed_content(key) for key in ("train#prepare_batch", "checkpoint"))
        self.assertEqual((rounds.labeller.number, rounds.start, rounds.every), (4, 2, 3))
        self.assertIs(rounds.table, prepare.pseudo_labels)
        self.assertIs(rounds.table, saved.further["pseudo_labels"])
        self.assertEqual(saved.options["rounds"], ["MostConfident", 2, 3, None])

    @parameterized.expand([("fixmatch", "SampleImages", False), ("fixmatch_alone", "SampleImages", True)])
    def test_pictures_of_samples_only_where_there_is_a_denoiser(self, algorithm: str, name: str, off: bool) -> None:
        parser = self.parser(algorithm=algorithm)
        with working_directory(ROOT):
            self.assertTrue(parser["train#handlers#7#_target_"].endswith(name))
            self.assertEqual(parser.get_parsed_content("train#handlers#7#_disabled_"), off)
            self.assertEqual(parser.get_parsed_content("report#num_samples"), 0 if off else 500)
            self.assertTrue(parser["train#handlers#8#_target_"].endswith("CounterfactualImages"))
            self.assertEqual(parser.get_parsed_content("train#handlers#8#_disabled_"), off)
            self.assertIsInstance(parser.get_parsed_content("loss").term, FixMatchLoss)

    def test_several_gpus_keep_their_start(self) -> None:
        parser = monai.bundle.ConfigParser()
        with working_directory(ROOT):
            parser.read_config([TRAIN, "bundles/chest_xray/multi_gpu_train.json", SEMI])
        self.assertIn("init_process_group", "".join(parser["initialize"]))
        self.assertIn("check_task", parser["initialize"][-1])
        self.assertIn("get_rank", parser["train#sampler#rank"])

    @parameterized.expand(
        [
            ({"batch_size": 30}, "TwoStreamOrder: the batch size must be a multiple of 4"),
            ({"algorithm": "mixmatch"}, "algorithm must be one of"),
            ({"validation_count": "few"}, "open_with_few_labels: validation_count must be a number"),
            ({"num_labels": "null"}, "TwoStreamOrder: needs labelled and unlabelled images, got 24 and 0"),
        ]
    )
    def test_wrong_options(self, options: dict[str, Any], message: str) -> None:
        parser = self.parser(**options)
        with working_directory(ROOT), self.assertRaises((ValueError, RuntimeError)) as caught:
            parser.get_parsed_content("train#order")
            parser.get_parsed_content("loss")
        self.assertIn(message, message_of(caught.exception))

    def test_task_is_that_of_the_algorithm(self) -> None:
        folder = TEMPORARY / "contradiction"
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            train(folder, algorithm="supervised", task="joint", teacher="false")
        self.assertIn("--algorithm supervised has the task 'classify', got --task joint", message_of(caught.exception))


class TestOtherBundle(unittest.TestCase):
    def test_overlays_are_the_same(self) -> None:
        one, other = (ROOT / "bundles" / name / "configs" / "train_semi.json" for name in ("chest_xray", "skin_lesion"))
        self.assertEqual(one.read_text(), other.read_text())

    def test_views_of_skin_are_mirrored_as_its_training_does(self) -> None:
        parser = monai.bundle.ConfigParser()
        with working_directory(ROOT):
            parser.read_config([f"bundles/skin_lesion/{name}.json" for name in ("train", "train_semi")])
            options = {"image_size": 16, "source#phantom_counts": [150, 6, 6], "num_labels": 7}
            parser.update({**SMALL_NETWORK, **options, "algorithm": "pi_model"})
            views = parser.get_parsed_content("train#dataset#random_transform").transforms
            train_part = parser.get_parsed_content("source").part("train")
        self.assertEqual([(view.new_key, view.flip) for view in views], [("image_cls", True), ("image_second", True)])
        self.assertEqual(sorted(item["label"] for item in train_part)[-7:], list(range(7)))


class TestLabelEfficiency(unittest.TestCase):
    def test_trains_as_the_overlay_does(self) -> None:
        """The program, with trainings in this process; its training is the one that the other tests look at."""

        def start(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            names, values = command[4::2], command[5::2]
            options = {name[2:]: ast.literal_eval(value) for name, value in zip(names, values, strict=True)}
            runs.run(options.pop("config_file"), **options)
            return subprocess.CompletedProcess(command, 0)

        folder = TEMPORARY / "study"
        study = {"counts": [6], "algorithms": ["fixmatch"], "label_seeds": [0], "fair_validation": "false"}
        options = {name: value for name, value in {**TINY, **FEW}.items() if name != "num_labels"}
        with mock.patch("subprocess.run", start):
            text = runs.run(STUDY, output_dir=str(folder), train_options=options, **study)
        self.assertIn("[1/1] fixmatch, 6 labels, seed 0", text)
        for file in ("metrics.json", "labelled.txt", "predictions.csv"):
            found = folder / "runs" / "fixmatch_6_labels_seed_0" / "output" / file
            self.assertEqual(found.read_text(), (TRAINED / "output" / file).read_text())
        metrics = json.loads((TRAINED / "output" / "metrics.json").read_text())["metrics"]
        (point,) = json.loads((folder / "label_efficiency.json").read_text())["means"]
        for name in ("auc", "balanced_accuracy"):
            self.assertEqual(point[name]["value"], metrics[name]["value"])
        self.assertEqual(point["macro_f1"]["value"], metrics["f1"]["value"])  # of three classes the macro mean
        self.assertTrue((folder / "label_efficiency.png").is_file())


if __name__ == "__main__":
    unittest.main()
