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


"""The chest x-ray bundle from end to end through `monai.bundle`, in seconds: programs, files, options, wrong input."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
import warnings
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.data import BalancedOrder, ImagePreprocessing, open_source, read_image
from monai_jointdiff.engines import ModelDescription, load_trained, load_weights
from monai_jointdiff.engines.serving import images_to_classify
from monai_jointdiff.networks import JointDiffusionUNet
from monai_jointdiff.visualize import save_png
from tests.bundles.default_model import BUNDLE
from tests.bundles.runs import PHANTOMS, ROOT, TINY, leave_no_trace, message_of, run, train, use, working_directory

event_accumulator, has_tensorboard = optional_import("tensorboard.backend.event_processing.event_accumulator")

PROGRAMS = ("evaluate", "inference", "generate")
TEMPORARY = Path()
TRAINED = Path()  # two epochs of three iterations on phantoms
PRINTED = ""  # by that training
PRECISE = Path()  # the same in fp32, one iteration


def setUpModule() -> None:
    global TEMPORARY, TRAINED, PRINTED, PRECISE
    leave_no_trace()
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    TEMPORARY = Path(folder.name).resolve()
    TRAINED = TEMPORARY / "trained"
    PRINTED = train(TRAINED, **PHANTOMS)
    PRECISE = TEMPORARY / "precise"
    train(PRECISE, **PHANTOMS, precision="fp32", num_samples=0, max_minutes=1e-9)


def fresh(name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=name + "_", dir=TEMPORARY))


def content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def description() -> ModelDescription:
    return ModelDescription.load(TRAINED / "models" / "model.json")


def trained_network() -> JointDiffusionUNet:
    network = description().build_network().eval()
    network.load_state_dict(load_weights(TRAINED / "models" / "model.pt"))
    return network


def labelled_npz(path: Path, spatial_dims: int = 2, **more: Any) -> Path:
    """Bright and dark images, the first two of each part unlabelled."""
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 18), ("val", 8), ("test", 8)):
        labels = np.arange(count) % 2
        noise = generator.integers(0, 100, (count, *[16] * spatial_dims))
        arrays[f"{part}_images"] = (noise + 100 * labels.reshape(-1, *[1] * spatial_dims)).astype(np.uint8)
        labels[:2] = -1
        arrays[f"{part}_labels"] = labels.astype(np.int64)[:, None]
    np.savez(path, **{**arrays, **more})
    return path


def picture(path: Path, seed: int, shape: tuple[int, int] = (16, 16)) -> np.ndarray:
    """A file of random pixels, unlike its transposition."""
    pixels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(pixels, path)
    return pixels


class TestHalfANetwork(unittest.TestCase):
    @parameterized.expand(
        [
            ("classify", {"val_loss", "val_auc"}, ("generate", "counterfactual"), "evaluate"),
            ("denoise", {"val_loss", "val_denoising"}, ("evaluate", "inference", "counterfactual"), "generate"),
        ]
    )
    def test_trains_and_is_refused_where_the_other_half_is_needed(
        self, task: str, metrics: set[str], refused: tuple[str, ...], usable: str
    ) -> None:
        model = fresh(task)
        train(model, task=task, num_samples=0, epochs=1, **PHANTOMS)
        (events,) = (model / "output" / "tensorboard").glob("events*")
        if has_tensorboard:
            log = event_accumulator.EventAccumulator(str(events)).Reload()
            self.assertEqual({tag for tag in log.Tags()["scalars"] if tag.startswith("val_")}, metrics)
        self.assertEqual((model / "output" / "metrics.json").is_file(), task == "classify")
        for program in refused:
            with self.assertRaises((ValueError, RuntimeError)) as caught:
                use(program, model, fresh(program))
            self.assertIn(f"this model was trained with --task {task}", message_of(caught.exception))
        before = (model / "models" / "model.json").read_text()
        resume = str(model / "models" / "checkpoint_00000003.pt")
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            train(model, task="joint", num_samples=0, epochs=1, resume=resume, **PHANTOMS)
        self.assertIn(f"task was '{task}', is 'joint'", message_of(caught.exception))
        self.assertEqual((model / "models" / "model.json").read_text(), before)
        options = {"num_samples": 2, "num_inference_steps": 2} if usable == "generate" else PHANTOMS
        use(usable, model, fresh(usable), **options)


class TestTraining(unittest.TestCase):
    def test_leaves_every_file_it_promises(self) -> None:
        models = {path.name for path in (TRAINED / "models").iterdir()}
        self.assertEqual(models, {"model.pt", "model.json", "checkpoint_00000003.pt", "checkpoint_00000006.pt"})
        output = {path.name for path in (TRAINED / "output").iterdir()}
        pictures = {"roc.png", "reliability.png", "risk_coverage.png", "confusion.png", "real_and_generated.png"}
        numbers = {"summary.json", "metrics.json", "generation.json", "predictions.csv"}
        self.assertEqual(output, pictures | numbers | {"tensorboard", "training"})
        drawn = {path.name for path in (TRAINED / "output" / "training").iterdir()}
        self.assertEqual(drawn, {f"{n}_epoch{e:04d}.png" for n in ("samples", "denoising") for e in (1, 2)})
        for path in (TRAINED / "output").rglob("*.png"):
            pixels = read_image(path)
            self.assertGreater(pixels.std(), 0, path.name)

    def test_model_is_the_best_average_and_description_its_network(self) -> None:
        weights = torch.load(TRAINED / "models" / "model.pt", weights_only=True)
        checkpoint = torch.load(TRAINED / "models" / "checkpoint_00000006.pt", weights_only=True)
        torch.testing.assert_close(weights, checkpoint["best"]["weights"], rtol=0, atol=0)
        described = content(TRAINED / "models" / "model.json")
        self.assertTrue(described["trained"])
        self.assertEqual(described["data"]["class_names"], ["normal", "opacity", "effusion"])
        self.assertEqual(described["data"]["image_size"], [16, 16])
        self.assertEqual(described["network"]["channels"], [8, 16, 16])
        self.assertEqual(described["decision"]["chosen_on"], "validation part of phantoms of seed 0 (12 images)")
        JointDiffusionUNet(**described["network"]).load_state_dict(weights)

    def test_learning_rate_and_average_moved_the_weights(self) -> None:
        checkpoint = torch.load(TRAINED / "models" / "checkpoint_00000006.pt", weights_only=True)
        self.assertEqual(checkpoint["iteration"], 6)
        self.assertEqual(checkpoint["epoch_length"], 24 // 8)
        key = "conv_in.conv.weight"
        self.assertFalse(torch.equal(checkpoint["network"][key], checkpoint["ema"][key]))
        self.assertTrue(all(bool(value.isfinite().all()) for value in checkpoint["network"].values()))

    def test_summary_repeats_the_figures_of_the_other_files(self) -> None:
        summary = content(TRAINED / "output" / "summary.json")
        metrics = content(TRAINED / "output" / "metrics.json")["metrics"]
        generation = content(TRAINED / "output" / "generation.json")
        self.assertEqual(summary["data"], "phantoms of seed 0")
        for name in ("auc", "accuracy", "balanced_accuracy", "f1", "ece"):
            self.assertEqual(summary[f"test {name}"], metrics[name]["value"])
        self.assertEqual(len(generation["rows"]), 3)
        for row in generation["rows"]:
            self.assertEqual(summary[f"Frechet distance to test images: {row['images']}"], row["frechet"])
            self.assertEqual(row["count"], 8)
        figures = [value for key, value in summary.items() if key != "data"]
        self.assertEqual(len(figures), 5 + 1 + 3)
        self.assertTrue(all(math.isfinite(value) for value in figures))

    def test_prints_data_counts_places_and_final_table(self) -> None:
        self.assertIn("data: phantoms of seed 0, 16 x 16, 1 channel", PRINTED)
        self.assertIn("train: 24 images (normal 3, opacity 14, effusion 7)", PRINTED)
        self.assertIn(f"weights: {TRAINED / 'models'}", PRINTED)
        self.assertIn(f"results: {TRAINED / 'output'}", PRINTED)
        self.assertEqual(PRINTED.count("final table"), 1)

    @unittest.skipUnless(has_tensorboard, "needs tensorboard")
    def test_tensorboard_has_curves_of_every_epoch_and_pictures(self) -> None:
        events = event_accumulator.EventAccumulator(str(TRAINED / "output" / "tensorboard"))
        events.Reload()
        tags = events.Tags()
        losses = {"loss_diffusion": 6, "loss_classification": 6, "loss_total": 6}
        for tag, count in {**losses, "val_loss": 2, "val_auc": 2, "val_denoising": 2}.items():
            values = [event.value for event in events.Scalars(tag)]
            self.assertEqual(len(values), count, tag)
            self.assertTrue(all(map(math.isfinite, values)), tag)
        self.assertEqual(set(tags["images"]), {"samples", "denoising"})

    def test_best_is_the_smallest_validation_loss(self) -> None:
        if not has_tensorboard:
            self.skipTest("needs tensorboard")
        events = event_accumulator.EventAccumulator(str(TRAINED / "output" / "tensorboard"))
        events.Reload()
        losses = [event.value for event in events.Scalars("val_loss")]
        best = torch.load(TRAINED / "models" / "checkpoint_00000006.pt", weights_only=True)["best"]
        self.assertAlmostEqual(best["value"], min(losses), places=5)
        self.assertEqual(best["epoch"], 1 + losses.index(min(losses)))

    def test_no_file_names_a_place_on_this_machine(self) -> None:
        for path in [*TRAINED.rglob("*.json"), *TRAINED.rglob("*.csv")]:
            text = path.read_text(encoding="utf-8")
            self.assertNotIn(str(TEMPORARY), text, path.name)
            self.assertNotIn(str(ROOT), text, path.name)
        for path in (TRAINED / "models").glob("*.pt"):
            self.assertNotIn(str(TEMPORARY).encode(), path.read_bytes(), path.name)


class StopAfter:
    """Handler that ends a training as a broken machine does."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=self.iteration), self._stop)

    def _stop(self, engine: Engine) -> None:
        raise KeyboardInterrupt


class TestResume(unittest.TestCase):
    @parameterized.expand([("within_an_epoch", 5, 4), ("at_the_end_of_an_epoch", 4, 3)])
    def test_ends_as_the_uninterrupted_run(self, name: str, stop: int, last: int) -> None:
        folder = fresh(name)
        interval = {"checkpoint_interval": 2} if last == 4 else {}
        handlers = "$[@checkpoint, @ema, @train#loss_terms] + @train#handlers + [@stop]"
        stopper = {"_target_": "tests.bundles.test_chest_xray.StopAfter", "iteration": stop}
        with self.assertRaises(KeyboardInterrupt):
            train(folder, **PHANTOMS, **interval, stop=stopper, **{"train#trainer#train_handlers": handlers})
        file = folder / "models" / f"checkpoint_{last:08d}.pt"
        self.assertEqual(max((folder / "models").glob("checkpoint_*.pt")), file)
        train(folder, **PHANTOMS, **interval, resume=str(file))

        ends = [torch.load(f / "models" / "checkpoint_00000006.pt", weights_only=True) for f in (folder, TRAINED)]
        for part in ("network", "optimizer", "ema", "best"):
            torch.testing.assert_close(ends[0][part], ends[1][part], rtol=0, atol=0)
        torch.testing.assert_close(
            load_weights(folder / "models" / "model.pt"), load_weights(TRAINED / "models" / "model.pt"), rtol=0, atol=0
        )
        for written in ("models/model.json", "output/summary.json", "output/metrics.json", "output/predictions.csv"):
            self.assertEqual((folder / written).read_text(), (TRAINED / written).read_text(), written)

    def test_of_a_finished_run_only_reports(self) -> None:
        folder = fresh("finished")
        train(folder, **PHANTOMS, resume=str(TRAINED / "models" / "checkpoint_00000006.pt"))
        summaries = [content(f / "output" / "summary.json") for f in (folder, TRAINED)]
        self.assertEqual(*summaries)

    def test_from_a_file_of_another_run_is_refused(self) -> None:
        file = str(TRAINED / "models" / "checkpoint_00000003.pt")
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            train(fresh("other"), **PHANTOMS, resume=file, seed=1)
        self.assertIn("comes from a run with other options: ", message_of(caught.exception))
        self.assertIn("seed was 0, is 1", message_of(caught.exception))

    @parameterized.expand(
        [
            ({"image_size": 24}, r"source.image_size was \[16, 16\], is \[24, 24\]\."),
            ({"source#phantom_counts": [25, 12, 12]}, r"images was .*; source.opened_with.phantom_counts was \[24, 12"),
            ({"source#phantom_counts": [24, 13, 12]}, r"images was .*; source.opened_with.phantom_counts was \[24, 12"),
            ({"label_list": "@list"}, r"labels was 'sha256:\w+', is 'sha256:\w+'\."),
            ({"source#min_mask_pixels": 5}, "source.opened_with.min_mask_pixels was 10, is 5"),
            ({"network_def#head_dropout": 0.3}, r"network.head_dropout was None, is 0.3\."),
            ({"max_norm": 2.0, "ema#decay": 0.9}, r"ema_decay was 0.999, is 0.9; max_norm was 1.0, is 2.0\."),
            ({"optimizer#weight_decay": 0.1}, r"weight_decay was 0.01, is 0.1\."),
            ({"precision": "bf16"}, r"precision was 'torch.float32', is 'torch.bfloat16'\."),
        ]
    )
    def test_with_other_data_or_another_network_is_refused(self, options: dict[str, Any], message: str) -> None:
        folder = fresh("other")
        if options.get("label_list") == "@list":
            (folder / "list.txt").write_text("phantom/000000\nphantom/000003\n", encoding="utf-8")
            options = {"label_list": str(folder / "list.txt")}
        file = PRECISE / "models" / "checkpoint_00000001.pt"
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            train(folder, **{**PHANTOMS, "precision": "fp32", **options}, resume=str(file))
        self.assertRegex(message_of(caught.exception), f"(?s)a run with other options: {message}")
        self.assertFalse((folder / "models" / "model.json").exists())


class TestEvaluate(unittest.TestCase):
    def test_gives_the_figures_of_the_training(self) -> None:
        output = fresh("evaluate")
        printed = use("evaluate", TRAINED, output, **PHANTOMS)
        for file in ("metrics.json", "predictions.csv"):
            self.assertEqual((output / file).read_text(), (TRAINED / "output" / file).read_text())
        self.assertEqual({path.suffix for path in output.iterdir()}, {".json", ".csv", ".png"})
        self.assertIn("AUC", printed)
        self.assertIn("calibration error", printed)

    @parameterized.expand([("evaluate",), ("inference",), ("generate",)])
    def test_untrained_is_refused_unless_allowed(self, program: str) -> None:
        file = fresh("images") / "one.png"
        picture(file, 0)
        options: dict[str, Any] = {
            "evaluate": PHANTOMS,
            "inference": {"dataset_dir": str(file)},
            "generate": {"num_samples": 1, "num_inference_steps": 2},
        }[program]
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            use(program, fresh("none"), fresh(program), **options)
        self.assertIn("Train first (train.json of this bundle)", message_of(caught.exception))
        printed = use(program, fresh("none"), fresh(program), allow_untrained="true", **options)
        self.assertIn("UNTRAINED", printed)

    def test_of_data_without_parts_says_how_many_and_takes_all_if_told(self) -> None:
        folder = fresh("other")
        labels = np.arange(30) % 3
        patients = np.array([f"p{n // 2}" for n in range(30)])
        pixels = np.random.default_rng(0).integers(0, 256, (30, 16, 16)).astype(np.uint8)
        np.savez(folder / "data.npz", images=pixels, labels=labels, patients=patients)
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            use("evaluate", TRAINED, fresh("evaluate"), dataset_dir=str(folder / "data.npz"))
        self.assertIn("data.npz does not say which images are its test part", message_of(caught.exception))
        output = fresh("evaluate")
        printed = use("evaluate", TRAINED, output, dataset_dir=str(folder / "data.npz"), part="all")
        self.assertIn("taken: all 30 images", printed)
        self.assertEqual(content(output / "metrics.json")["metrics"]["count"], 30)
        self.assertEqual(content(output / "metrics.json")["metrics"]["bootstrap"]["drawn"], "groups")
        self.assertIn("15 resampled patients", printed)
        use("inference", TRAINED, output, dataset_dir=str(folder / "data.npz"))
        names = [row["image"] for row in rows(output / "predictions.csv")]
        self.assertEqual(names, [f"images/{n:06d}" for n in range(30)])

    def test_data_that_do_not_fit_the_model_are_refused(self) -> None:
        file = labelled_npz(fresh("other") / "data.npz", train_labels=np.arange(18)[:, None] % 5)
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            use("evaluate", TRAINED, fresh("evaluate"), dataset_dir=str(file))
        self.assertIn("is out of range; right are 0 to 2", message_of(caught.exception))

    def test_without_labels_is_refused(self) -> None:
        folder = fresh("unlabelled")
        for n in range(4):
            picture(folder / f"{n}.png", n)
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            use("evaluate", TRAINED, fresh("evaluate"), dataset_dir=str(folder), part="all")
        self.assertIn("has a label", message_of(caught.exception))


class TestInference(unittest.TestCase):
    def expected(self, image: Path | np.ndarray) -> np.ndarray:
        """Probabilities by hand."""
        prepare = ImagePreprocessing.from_description(description().data)
        with torch.no_grad():
            logits = trained_network()(prepare(image)[None])
        return description().decision.probabilities(logits.double().numpy())[0]

    def check(self, row: dict[str, str], image: Path | np.ndarray) -> None:
        names = description().class_names
        probabilities = np.array([float(row[f"probability_{name}"]) for name in names])
        np.testing.assert_allclose(probabilities, self.expected(image), atol=2e-6)
        self.assertEqual(row["prediction"], names[int(probabilities.argmax())])

    def test_folder_with_sub_folders(self) -> None:
        folder, output = fresh("folder"), fresh("inference")
        files = ["b.png", "left/a.png", "left/deep/c.png"]
        for n, file in enumerate(files):
            picture(folder / file, n, (20, 12))
        use("inference", TRAINED, output, precision="fp32", dataset_dir=str(folder))
        found = rows(output / "predictions.csv")
        self.assertEqual([row["image"] for row in found], files)
        self.assertNotIn("label", found[0])
        for row in found:
            self.check(row, folder / row["image"])

    def test_single_file(self) -> None:
        folder, output = fresh("single"), fresh("inference")
        picture(folder / "one.png", 5)
        use("inference", TRAINED, output, precision="fp32", dataset_dir=str(folder / "one.png"))
        (row,) = rows(output / "predictions.csv")
        self.assertEqual(row["image"], "one.png")
        self.check(row, folder / "one.png")

    def test_npz_is_read_as_files_are(self) -> None:
        folder, output = fresh("npz"), fresh("inference")
        pixels = picture(folder / "one.png", 5)
        np.savez(folder / "data.npz", test_images=np.stack([pixels, pixels.T]))
        use("inference", TRAINED, output, precision="fp32", dataset_dir=str(folder / "data.npz"))
        one, transposed = rows(output / "predictions.csv")
        self.assertEqual(one["image"], "test/000000")
        self.check(one, folder / "one.png")
        self.check(transposed, pixels.T[None])
        self.assertNotEqual(self.expected(pixels[None]).tolist(), self.expected(pixels.T[None]).tolist())

    def test_bad_file_is_named(self) -> None:
        folder = fresh("bad")
        picture(folder / "good.png", 0)
        (folder / "broken.png").write_bytes((folder / "good.png").read_bytes()[:60])
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            use("inference", TRAINED, fresh("inference"), dataset_dir=str(folder))
        self.assertIn("broken.png", message_of(caught.exception))

    def test_phantoms_when_nothing_is_named(self) -> None:
        items = images_to_classify(None, description())
        self.assertEqual(items, open_source(**description().data["opened_with"]).part("test"))


class TestGenerate(unittest.TestCase):
    def test_writes_images_and_grid_that_depend_on_the_seed_alone(self) -> None:
        folders = [fresh("generate") for _ in range(3)]
        for folder, options in zip(folders, ({}, {"batch_size": 3}, {"seed": 1}), strict=True):
            use("generate", TRAINED, folder, num_samples=4, num_inference_steps=2, **options)
        names = {f"sample_{n:05d}.png" for n in range(4)} | {"grid.png"}
        self.assertEqual({path.name for path in folders[0].iterdir()}, names)
        first, batches, other = ([read_image(f / f"sample_{n:05d}.png") for n in range(4)] for f in folders)
        self.assertEqual(first[0].shape, (1, 16, 16))
        for one, two in zip(first, batches, strict=True):
            self.assertLessEqual(np.abs(one.astype(int) - two).max(), 1)  # rounding
        self.assertTrue(all((one != two).any() for one, two in zip(first, other, strict=True)))

    @parameterized.expand(["ddim", "ddpm"])
    def test_other_samplers(self, sampler: str) -> None:
        folder = fresh("generate")
        use("generate", TRAINED, folder, num_samples=1, num_inference_steps=2, sampler=sampler)
        self.assertTrue((folder / "sample_00000.png").is_file())

    def test_class_of_an_unconditional_network_is_refused(self) -> None:
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            use("generate", TRAINED, fresh("generate"), num_samples=1, num_inference_steps=2, class_label=1)
        self.assertIn("is not class-conditional", message_of(caught.exception))
        self.assertIn("--rule classifier", message_of(caught.exception))

    def test_head_leads_to_a_class(self) -> None:
        prepare, network, images = ImagePreprocessing.from_description(description().data), trained_network(), []
        for options in ({}, {"rule": "classifier", "class_label": "effusion", "scale": 10}):
            folder = fresh("led")
            use("generate", TRAINED, folder, num_samples=4, num_inference_steps=3, precision="fp32", **options)
            images.append(torch.stack([prepare(folder / f"sample_{n:05d}.png") for n in range(4)]))
        with torch.no_grad():
            free, led = (network(each).softmax(1)[:, 2].mean() for each in images)
        self.assertGreater(float(led), float(free))
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            use("generate", TRAINED, fresh("led"), num_samples=1, rule="representation", class_label=2)
        self.assertIn("the network's head is 'standardized'", message_of(caught.exception))

    def test_class_of_a_conditional_network(self) -> None:
        folder = fresh("conditional")
        train(folder, **PHANTOMS, epochs=1, num_samples=0, **{"network_def#class_conditional": True})
        images = []
        for label in (0, 1):
            use("generate", folder, folder / str(label), num_samples=1, num_inference_steps=2, class_label=label)
            images.append(read_image(folder / str(label) / "sample_00000.png"))
        self.assertTrue((images[0] != images[1]).any())


class TestFailure(unittest.TestCase):
    """A run that fails leaves the model of an earlier one as it was."""

    @parameterized.expand(
        [
            ("on_the_way", {"learning_rate": 1e30}, "NonFiniteGuard"),
            ("workers", {"num_workers": -1}, "--num_workers must be a whole number of at least 0, got -1"),
            ("size", {"image_size": 30}, "--image_size must be a multiple of 4, got 30 x 30"),
        ]
    )
    def test_keeps_the_earlier_model(self, name: str, options: dict[str, Any], message: str) -> None:
        folder = fresh(name)
        shutil.copytree(TRAINED / "models", folder / "models")
        start = folder / "models" / "model.pt"
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            train(folder, **{**PHANTOMS, "pretrained": str(start), **options})
        self.assertIn(message, message_of(caught.exception))
        for file in ("model.pt", "model.json"):
            self.assertEqual((folder / "models" / file).read_bytes(), (TRAINED / "models" / file).read_bytes())
        network = description().build_network()
        self.assertTrue(load_trained(network, folder / "models"))

    def test_in_one_that_does_not_fail_it_is_replaced_with_its_description(self) -> None:
        folder = fresh("replaced")
        shutil.copytree(TRAINED / "models", folder / "models")
        start = folder / "models" / "model.pt"
        train(folder, **PHANTOMS, pretrained=str(start), epochs=1, num_samples=0, image_size=8)
        self.assertEqual(ModelDescription.load(folder / "models" / "model.json").image_size, (8, 8))
        self.assertNotEqual(start.read_bytes(), (TRAINED / "models" / "model.pt").read_bytes())
        self.assertTrue(load_trained(description().build_network(), folder / "models"))


class TestUnlabelled(unittest.TestCase):
    def folder(self) -> Path:
        folder = fresh("unlabelled")
        for n in range(20):
            picture(folder / "data" / f"{n:02d}.png", n)
        return folder

    @parameterized.expand([("none", False), ("weights", True)])
    def test_images_without_labels_train_a_denoiser(self, balance: str, class_conditional: bool) -> None:
        folder = self.folder()
        options = {"dataset_dir": str(folder / "data"), "task": "denoise", "balance": balance, "epochs": 1}
        printed = train(folder, **options, class_conditional=class_conditional)
        self.assertRegex(printed, r"train: 1\d images \(unlabelled 1\d\)")
        described = ModelDescription.load(folder / "models" / "model.json")
        self.assertEqual((described.network["num_classes"], described.class_names), (2, ["unlabelled"]))
        self.assertTrue((folder / "output" / "generation.json").is_file())
        use("generate", folder, folder / "generated", num_samples=1, num_inference_steps=2)
        self.assertTrue((folder / "generated" / "sample_00000.png").is_file())

    def test_but_no_classifier(self) -> None:
        folder = self.folder()
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            train(folder, dataset_dir=str(folder / "data"))
        self.assertIn("no image has a label. Give the classes (--class_names a,b)", message_of(caught.exception))


class TestOptions(unittest.TestCase):
    def test_null_on_the_command_line_is_the_default(self) -> None:
        folder = fresh("null")
        train_options = content(BUNDLE / "configs" / "train.json")
        nulls = {name: "null" for name, value in train_options.items() if value is None}
        self.assertLessEqual({"dataset_dir", "resume", "pretrained", "image_size", "class_names"}, set(nulls))
        del nulls["image_size"]  # which a small run sets; below
        train(folder, **PHANTOMS, **nulls)
        for file in ("models/model.json", "output/summary.json", "output/predictions.csv"):
            self.assertEqual((folder / file).read_text(), (TRAINED / file).read_text())
        with working_directory(ROOT):
            parser = monai.bundle.ConfigParser({**train_options, "image_size": "null"})
            self.assertEqual(parser.get_parsed_content("source").image_size, (32, 32))

    @parameterized.expand(
        [
            ("amp", {"amp": True}, "--amp is not supported"),
            ("compile", {"compile": True}, "--compile is not supported"),
            ("fp16", {"precision": "fp16"}, "fp16 is not supported"),
            ("depth_two", {"precision": "bf16", "spatial_dims": 3, "image_size": 8}, "--precision fp32"),
            ("balance", {"balance": "equal"}, "--balance is 'equal'"),
            ("channels", {"channels": "wide"}, "--channels must be a list of positive whole numbers"),
            ("channels_of_the_groups", {"channels": [12, 16]}, "--channels must be a multiple of 8, the groups"),
            ("levels", {"channels": [8] * 6}, "--image_size must be a multiple of 32, got 16 x 16"),
            ("epochs", {"epochs": 0}, "--epochs must be a whole number of at least 1"),
            ("patience", {"patience": 0}, "--patience must be a whole number of at least 1"),
            ("val_interval", {"val_interval": 0}, "--val_interval must be a whole number of at least 1, got 0"),
            ("num_samples", {"num_samples": -1}, "--num_samples must be a whole number of at least 0, got -1"),
            ("missing_data", {"dataset_dir": "/nowhere"}, "there is no /nowhere"),
            ("class_names", {"class_names": ["a", "b"]}, "phantoms have the classes"),
            ("missing_resume", {"resume": "/nowhere.pt"}, "cannot read /nowhere.pt"),
            ("missing_pretrained", {"pretrained": "/nowhere.pt"}, "cannot read weights from /nowhere.pt"),
        ]
    )
    def test_refused(self, _: str, options: dict[str, Any], message: str) -> None:
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            train(fresh("refused"), **PHANTOMS, **options)
        self.assertIn(message, message_of(caught.exception))

    def test_misspelt_option_shows_in_what_is_printed(self) -> None:
        folder = fresh("misspelt")
        printed = train(folder, **PHANTOMS, datset_dir="/my/images", run=["$None"])
        self.assertIn("data: phantoms of seed 0", printed)

    @parameterized.expand(
        [
            ("more_levels", {"channels": [8, 8, 8, 16]}),
            ("fewer_with_commas", {"channels": (8, 16)}),
            ("of_the_network_alone", {"network_def#channels": [8, 24]}),
        ]
    )
    def test_channels_give_the_levels_of_the_network(self, name: str, options: dict[str, Any]) -> None:
        folder = fresh(name)
        train(folder, **PHANTOMS, **options, num_samples=0, max_minutes=1e-9)
        network = content(folder / "models" / "model.json")["network"]
        channels = list(*options.values())
        found = [network[key] for key in ("channels", "num_res_blocks", "attention_levels")]
        last = len(channels) - 1
        self.assertEqual(found, [channels, [1 for _ in channels], [level == last for level in range(len(channels))]])
        JointDiffusionUNet(**network).load_state_dict(load_weights(folder / "models" / "model.pt"))

    def test_pretrained_and_frozen_encoder(self) -> None:
        folder = fresh("pretrained")
        start = load_weights(TRAINED / "models" / "model.pt")
        options = {"pretrained": str(TRAINED / "models" / "model.pt"), "freeze_encoder": True}
        changed = {"network_def#class_conditional": True}
        printed = train(folder, **PHANTOMS, **options, **changed, epochs=1, num_samples=0)
        self.assertRegex(printed, r"pretrained: \d+ tensors loaded")
        self.assertIn("missing: 1 (class_embedding.weight)", printed)
        end = torch.load(folder / "models" / "checkpoint_00000003.pt", weights_only=True)["network"]
        same = {key for key in start if key in end and torch.equal(start[key], end[key])}
        encoder = ("conv_in", "time_embed", "down_blocks", "middle_block")
        frozen = {key for key in end if key in start and key.startswith(encoder) and end[key].shape == start[key].shape}
        self.assertEqual(frozen, {key for key in start if key.startswith(encoder)})
        self.assertEqual(frozen - same, set())
        self.assertIn("out.2.conv.weight", set(end) - same)

    def test_encoder_that_the_pretrained_file_does_not_fill_is_not_frozen(self) -> None:
        folder = fresh("random")
        options = {"pretrained": str(TRAINED / "models" / "model.pt"), "freeze_encoder": True}
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            train(folder, **PHANTOMS, **options, **{"network_def#num_res_blocks": [1, 1, 2]}, epochs=1, num_samples=0)
        found = message_of(caught.exception)
        self.assertRegex(found, r"--freeze_encoder would keep random weights of \d+ tensors \(down_blocks\.2\.")
        self.assertFalse((folder / "models").exists())

    def test_time_limit_before_the_first_validation_still_leaves_a_model(self) -> None:
        folder = fresh("limit")
        (folder / "models").mkdir()
        torch.save({"of another run": torch.zeros(1)}, folder / "models" / "model.pt")
        train(folder, **PHANTOMS, max_minutes=1e-9, num_samples=0)
        names = {path.name for path in (folder / "models").iterdir()}
        self.assertEqual(names, {"model.pt", "model.json", "checkpoint_00000001.pt"})
        average = torch.load(folder / "models" / "checkpoint_00000001.pt", weights_only=True)["ema"]
        torch.testing.assert_close(load_weights(folder / "models" / "model.pt"), average, rtol=0, atol=0)
        self.assertTrue((folder / "output" / "summary.json").is_file())

    def test_early_stop(self) -> None:
        folder = fresh("patience")
        train(folder, **PHANTOMS, patience=1, epochs=50, learning_rate=1e-30, num_samples=0)
        last = max((folder / "models").glob("checkpoint_*.pt"))
        checkpoint = torch.load(last, weights_only=True)
        self.assertLess(checkpoint["iteration"], 150)
        self.assertEqual(checkpoint["iteration"] // 3 - checkpoint["best"]["epoch"], 1)

    def test_last_epoch_is_validated_and_patience_waits_for_a_validation(self) -> None:
        folder = fresh("interval")
        short: dict[str, Any] = {**PHANTOMS, "train#epoch_length": 1, "num_samples": 0, "val_interval": 3}
        train(folder, **short, epochs=8, patience=2)
        best = torch.load(folder / "models" / "checkpoint_00000008.pt", weights_only=True)["best"]
        self.assertEqual((best["epoch"], best["validated"]), (8, 8))
        folder = fresh("in_vain")
        train(folder, **short, epochs=8, patience=2, learning_rate=1e-30)
        last = max((folder / "models").glob("checkpoint_*.pt"))
        self.assertEqual(last.name, "checkpoint_00000006.pt")

    def test_precision_bf16(self) -> None:
        folder = fresh("bf16")
        train(folder, **PHANTOMS, precision="bf16", epochs=1, num_samples=0)
        weights = load_weights(folder / "models" / "model.pt")
        self.assertEqual({value.dtype for value in weights.values()}, {torch.float32})

    def test_label_list_leaves_the_others_unlabelled(self) -> None:
        folder = fresh("list")
        (folder / "list.txt").write_text("phantom/000000\nphantom/000003\n", encoding="utf-8")
        printed = train(folder, **PHANTOMS, label_list=str(folder / "list.txt"), run=["$None"])
        self.assertIn("unlabelled 22", printed)


class TestData(unittest.TestCase):
    def test_npz_with_unlabelled_images_and_class_weights(self) -> None:
        folder = fresh("npz")
        file = labelled_npz(folder / "2024.npz", class_names=np.array(["dark", "bright"]))
        printed = train(folder, dataset_dir=str(file), balance="weights", epochs=1)
        self.assertIn("data: 2024.npz, 16 x 16", printed)
        self.assertIn("train: 18 images (dark 8, bright 8, unlabelled 2)", printed)
        decision = content(folder / "models" / "model.json")["decision"]
        self.assertEqual(decision["chosen_on"], "validation part of 2024.npz (6 images)")
        self.assertEqual(len(decision["thresholds"]), 1)
        found = rows(folder / "output" / "predictions.csv")
        self.assertEqual([row["label"] for row in found], ["", ""] + ["dark", "bright"] * 3)
        output = fresh("evaluate")
        use("evaluate", folder, output, dataset_dir=str(file))
        self.assertEqual(content(output / "metrics.json"), content(folder / "output" / "metrics.json"))
        self.assertNotIn(str(TEMPORARY), (folder / "models" / "model.json").read_text())

    def test_folder_with_classes_unlabelled_images_and_a_numeric_name(self) -> None:
        folder = fresh("folder")
        for n in range(24):
            name = "" if n % 4 == 0 else f"class{n % 2}/"
            picture(folder / "2024" / f"{name}{n:02d}.png", n, (12, 20))
        with working_directory(folder):
            options: dict[str, Any] = {"bundle_root": str(BUNDLE), "dataset_dir": 2024, "epochs": 1}
            printed = train(folder, folder, str(BUNDLE / "train.json"), **options)
        self.assertIn("data: 2024, 16 x 16", printed)
        self.assertIn("unlabelled", printed)
        names = [row["image"] for row in rows(folder / "output" / "predictions.csv")]
        self.assertTrue(all(not name.startswith("/") and (folder / "2024" / name).is_file() for name in names))

    def test_all_bad_files_are_named_before_training(self) -> None:
        folder = fresh("bad")
        for n in range(8):
            picture(folder / "data" / f"class{n % 2}" / f"{n}.png", n)
        for n in (2, 5):
            (folder / "data" / f"class{n % 2}" / f"{n}.png").write_bytes(b"no picture")
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            train(folder, dataset_dir=str(folder / "data"))
        self.assertIn("2 images of data cannot be used", message_of(caught.exception))
        self.assertIn("class0/2.png", message_of(caught.exception))
        self.assertIn("class1/5.png", message_of(caught.exception))
        self.assertFalse((folder / "models").exists())

    def test_several_labels_an_image(self) -> None:
        folder = fresh("multi")
        with open(folder / "labels.csv", "w", encoding="utf-8") as stream:
            stream.write("file,label\n")
            for n in range(40):
                picture(folder / f"{n:02d}.png", n)
                stream.write(f"{n:02d}.png,{('a', 'b', 'a|b', 'no finding', '')[n % 5]}\n")
        train(folder, dataset_dir=str(folder), balance="weights", epochs=1, batch_size=4)
        described = content(folder / "models" / "model.json")
        self.assertTrue(described["data"]["multi_label"])
        self.assertEqual(len(described["decision"]["thresholds"]), 2)
        inference = fresh("inference")
        np.savez(inference / "new.npz", test_images=np.zeros((3, 16, 16), np.uint8))
        use("inference", folder, inference, dataset_dir=str(inference / "new.npz"))
        self.assertEqual(len(rows(inference / "predictions.csv")), 3)
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            train(fresh("multi"), dataset_dir=str(folder), balance="sampler", epochs=1)
        self.assertIn("--balance sampler needs one class per image", message_of(caught.exception))

    def test_volumes(self) -> None:
        folder = fresh("volumes")
        counts = {"source#phantom_counts": [8, 8, 8]}
        train(folder, **counts, spatial_dims=3, batch_size=4, epochs=1, num_samples=4)
        self.assertEqual(content(folder / "models" / "model.json")["data"]["image_size"], [16, 16, 16])
        output = fresh("generate")
        use("generate", folder, output, num_samples=2, num_inference_steps=2)
        names = {"sample_00000.nii.gz", "sample_00001.nii.gz", "grid.png"}
        self.assertEqual({path.name for path in output.iterdir()}, names)
        self.assertEqual(read_image(output / "sample_00000.nii.gz", 3).shape, (1, 16, 16, 16))
        use("inference", folder, output, dataset_dir=str(output / "sample_00000.nii.gz"))
        self.assertEqual(rows(output / "predictions.csv")[0]["image"], "sample_00000.nii.gz")

    def test_balanced_sampler_and_class_weights_reach_the_parts(self) -> None:
        options = {**TINY, **PHANTOMS, "ckpt_dir": str(fresh("parts")), "output_dir": str(fresh("parts"))}
        for balance in ("sampler", "weights"):
            with working_directory(ROOT), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parser = monai.bundle.ConfigParser()
                parser.read_config("bundles/chest_xray/configs/train.json")
                parser.update({**options, "balance": balance})
                order, loss = parser.get_parsed_content("train#order"), parser.get_parsed_content("loss")
            self.assertEqual(isinstance(order, BalancedOrder), balance == "sampler")
            if balance == "weights":
                np.testing.assert_allclose(loss.class_weights.numpy(), 24 / (3 * np.array([3, 14, 7])), rtol=1e-6)
            else:
                self.assertIsNone(loss.class_weights)


class TestPlaces(unittest.TestCase):
    def test_copy_of_the_bundle_writes_into_itself(self) -> None:
        place = fresh("copy")
        shutil.copytree(BUNDLE, place / "bundles" / "chest_xray", symlinks=True)
        options = {**TINY, **PHANTOMS, "epochs": 1, "num_samples": 0}
        run("bundles/chest_xray/train.json", place, **options)
        inside = place / "bundles" / "chest_xray"
        self.assertTrue((inside / "models" / "model.pt").is_file())
        self.assertTrue((inside / "output" / "summary.json").is_file())
        summary = content(inside / "output" / "summary.json")
        shutil.rmtree(inside / "models")
        shutil.rmtree(inside / "output")
        run("configs/train.json", inside, **options)
        self.assertEqual(content(inside / "output" / "summary.json"), summary)
        run("configs/evaluate.json", inside, progress=False, **PHANTOMS)
        self.assertTrue((inside / "output" / "evaluate" / "metrics.json").is_file())

    @parameterized.expand(["train", *PROGRAMS])
    def test_from_elsewhere_asks_for_the_bundle_root(self, program: str) -> None:
        elsewhere = fresh("elsewhere")
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            run(str(BUNDLE / f"{program}.json"), elsewhere)
        self.assertIn("say where it is: --bundle_root PATH", message_of(caught.exception))
        self.assertEqual(list(elsewhere.iterdir()), [])

    def test_literal_command(self) -> None:
        folder = fresh("command")
        options = {**TINY, **PHANTOMS, "epochs": 1, "num_samples": 4}
        folders = {"ckpt_dir": folder / "models", "output_dir": folder / "output"}
        arguments = [text for key, value in {**options, **folders}.items() for text in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "bundles/chest_xray/train.json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr[-3000:])
        self.assertIn("final table", done.stdout)
        self.assertIn("val_loss", done.stdout)
        self.assertTrue((folder / "models" / "model.pt").is_file())


class TestProcesses(unittest.TestCase):
    @unittest.skipUnless(torch.distributed.is_available(), "needs torch.distributed")
    def test_two_processes(self) -> None:
        folder = fresh("processes")
        start = TRAINED / "models" / "model.pt"
        common: dict[str, Any] = {"epochs": 1, "num_samples": 4, "precision": "fp32"}
        common |= {"pretrained": str(start), "freeze_encoder": True}
        common["network_def#head_dropout"] = 0.0  # its masks depend on the process
        options = {**TINY, **PHANTOMS, **common, "batch_size": 4}
        folders = {"ckpt_dir": folder / "models", "output_dir": folder / "output"}
        arguments = [text for key, value in {**options, **folders}.items() for text in (f"--{key}", str(value))]
        configs = "['bundles/chest_xray/configs/train.json','bundles/chest_xray/configs/multi_gpu_train.json']"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*launch, "-m", "monai.bundle", "run", "--config_file", configs, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr[-3000:])
        for said_once in ("final table", "data: phantoms", "weights: ", "tensors loaded"):
            self.assertEqual(done.stdout.count(said_once), 1, said_once)
        self.assertEqual(len(list((folder / "output" / "tensorboard").iterdir())), 1)
        self.assertEqual(
            {path.name for path in (folder / "models").iterdir()}, {"model.pt", "model.json", "checkpoint_00000003.pt"}
        )
        one = fresh("one_process")
        train(one, **PHANTOMS, **common, batch_size=8)
        before = load_weights(start)
        two, single = (load_weights(f / "models" / "checkpoint_00000003.pt") for f in (folder, one))
        self.assertEqual(set(two), set(single))
        apart = sum(float((two[key] - single[key]).square().sum()) for key in before)
        moved = sum(float((single[key] - before[key]).square().sum()) for key in before)
        self.assertGreater(moved, 0)
        self.assertLess(apart, 1e-3 * moved)  # the same images, noise and steps
        summaries = [content(f / "output" / "summary.json") for f in (folder, one)]
        self.assertEqual(list(summaries[0]), list(summaries[1]))


class TestBundleFormat(unittest.TestCase):
    def test_trained_model_exports_by_tracing(self) -> None:
        folder = fresh("export")
        with working_directory(ROOT), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            monai.bundle.ckpt_export(
                net_id="network_def",
                filepath=str(folder / "model.ts"),
                ckpt_file=str(TRAINED / "models" / "model.pt"),
                meta_file=str(BUNDLE / "configs" / "metadata.json"),
                config_file=str(BUNDLE / "configs" / "inference.json"),
                use_trace=True,
                input_shape=[1, 1, 16, 16],
                ckpt_dir=str(TRAINED / "models"),
            )
        images = torch.rand(3, 1, 16, 16) * 2 - 1
        with torch.no_grad():
            exported = torch.jit.load(folder / "model.ts")(images)
            torch.testing.assert_close(exported, trained_network()(images))


if __name__ == "__main__":
    unittest.main()
