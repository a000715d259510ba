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


"""`counterfactual.json` of the chest x-ray bundle from end to end through `monai.bundle`: files, page, options."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
import unittest
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel
import numpy as np
import torch
from monai.utils import optional_import
from parameterized import parameterized

from monai_jointdiff.data import ImagePreprocessing, read_image
from monai_jointdiff.engines import (
    ModelDescription,
    fingerprint_of_model,
    images_to_classify,
    load_weights,
    preprocessing_of_model,
)
from monai_jointdiff.handlers import read_counterfactual_records
from monai_jointdiff.inferers import CounterfactualInferer
from monai_jointdiff.visualize import save_png
from tests.bundles.default_model import BUNDLE
from tests.bundles.runs import PHANTOMS, ROOT, leave_no_trace, message_of, run, train, use
from tests.visualize.test_report import Page, check_self_contained

event_accumulator, has_tensorboard = optional_import("tensorboard.backend.event_processing.event_accumulator")

DATA = os.environ.get("JOINTDIFF_DATA")
ORIGINALS = Path(DATA or ".") / "originals"
NEEDS_DATA = "set JOINTDIFF_DATA to the folder with the test data"
FAST = {"num_inference_steps": 3, "timestep": 100, "inversion_iterations": 1, "probability": "null", "scale": 300.0}

TEMPORARY = Path()
TRAINED = Path()  # one epoch of three iterations on phantoms


def setUpModule() -> None:
    global TEMPORARY, TRAINED
    leave_no_trace()
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    TEMPORARY = Path(folder.name).resolve()
    TRAINED = TEMPORARY / "trained"
    train(TRAINED, **PHANTOMS, epochs=1, num_samples=0, counterfactual_pictures=2)


def fresh(name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=name + "_", dir=TEMPORARY))


def rows(path: Path) -> list[dict[str, str]]:
    with open(path / "counterfactuals.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def explain(output: Path, model: Path | None = None, **options: Any) -> str:
    return use("counterfactual", TRAINED if model is None else model, output, **{**FAST, **options})


def page_of(case: unittest.TestCase, output: Path) -> Page:
    """The page, after a check of all that was written for places on this machine."""
    for path in output.rglob("*"):
        if path.is_file():
            for place in (TEMPORARY, ROOT, *([ORIGINALS.resolve()] if DATA else [])):
                case.assertNotIn(str(place).encode(), path.read_bytes(), path.name)
    return check_self_contained(case, (output / "index.html").read_text(encoding="utf-8"))


def model_of(folder: Path) -> tuple[ModelDescription, torch.nn.Module]:
    description = ModelDescription.load(folder / "models" / "model.json")
    network = description.build_network().eval()
    network.load_state_dict(load_weights(folder / "models" / "model.pt"))
    return description, network


def inferer_of(description: ModelDescription, **options: Any) -> CounterfactualInferer:
    arguments: dict[str, Any] = {**FAST, "probability": None, **options}
    return CounterfactualInferer(description.build_scheduler("ddim"), **arguments)


def content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def picture(path: Path, seed: int, shape: tuple[int, ...] = (20, 12)) -> None:
    save_png(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8), path)


class TestProgram(unittest.TestCase):
    def test_phantoms_give_what_the_inferer_gives(self) -> None:
        output = fresh("phantoms")
        printed = explain(output, limit=3)
        self.assertIn("What would have to change for the most probable other class?", printed)
        self.assertIn("only 3 of 12 images, evenly spread; all of them with --limit null", printed)
        self.assertIn(f"page of all cases: {output}/index.html", printed)
        description, network = model_of(TRAINED)
        items = images_to_classify(None, description)
        chosen = [items[index] for index in (0, 6, 11)]  # of 12, spread
        images = torch.stack([preprocessing_of_model(description)(item)["image"] for item in chosen])
        inferer = inferer_of(description, model_id=fingerprint_of_model(TRAINED / "models"))
        expected = inferer(images, network)
        found = rows(output)
        self.assertEqual([row["image"] for row in found], [item["name"] for item in chosen])
        names = description.class_names
        self.assertEqual([row["label"] for row in found], [names[item["label"]] for item in chosen])
        self.assertEqual([row["target"] for row in found], [names[k] for k in expected.record.target])
        self.assertEqual([row["decision"] for row in found], [names[k] for k in expected.probabilities.argmax(1)])
        for stage, probabilities in {
            "image": expected.probabilities,
            "reconstruction": expected.probabilities_reconstruction,
            "counterfactual": expected.probabilities_counterfactual,
        }.items():
            written = [[float(row[f"probability_{name}_{stage}"]) for name in names] for row in found]
            np.testing.assert_allclose(written, probabilities, atol=2e-5)
        page = page_of(self, output)
        self.assertEqual(len(page.all("img")), 3 * 4)
        self.assertIn("phantom/", page.text)
        self.assertIn("3 images of 12, evenly spread", page.text)

        number = chosen[0]["name"].replace("/", "__")
        case = output / "cases" / number
        shown = read_image(case / "difference.png")[0].astype(float) / 127.5 - 1
        np.testing.assert_allclose(shown, expected.difference[0, 0].clamp(-2, 2) / 2, atol=0.01)
        records = [output / "cases" / item["name"].replace("/", "__") / "record.json" for item in chosen]
        again = inferer.replay(images, network, read_counterfactual_records(records))
        torch.testing.assert_close(again.counterfactual, expected.counterfactual, rtol=0, atol=0)
        self.assertEqual(content(records[0])["batch"], [item["name"] for item in chosen])
        with self.assertRaisesRegex(ValueError, "model"):  # of other weights
            inferer_of(description).replay(images, network, read_counterfactual_records(records))

        metrics = content(output / "metrics.json")
        self.assertEqual((metrics["count"], metrics["oracle"], metrics["oracle_id"]), (3, None, None))
        distance = np.mean(np.abs((expected.counterfactual - images).numpy()))
        self.assertAlmostEqual(metrics["to_input"]["l1"]["value"], distance, places=5)
        self.assertGreaterEqual(sum(found["count"] for found in metrics["localization"].values()), 1)
        self.assertNotIn("images", metrics["settings"])  # phantoms of the test part
        self.assertIn("its own verdict proves nothing", page.text)

    def test_every_other_class_with_an_oracle(self) -> None:
        output, oracle = fresh("all"), fresh("oracle")
        train(oracle, **PHANTOMS, epochs=1, num_samples=0, seed=1)
        printed = explain(output, limit=2, target="all", oracle=str(oracle / "models"))
        self.assertIn("For each other class in turn: what would have to change for it?", printed)
        found = rows(output)
        self.assertEqual(len(found), 4)
        for image in (found[:2], found[2:]):
            asked = [row["target"] for row in image]
            self.assertEqual({*asked, image[0]["prediction"]}, {"normal", "opacity", "effusion"})
            folder = output / "cases" / image[0]["image"].replace("/", "__")
            folders = {path.name for path in folder.iterdir() if path.is_dir()}
            self.assertEqual(folders, {f"to_{name}" for name in asked})
            self.assertEqual(len({row["l1_encoding"] for row in image}), 1)  # one encoding, one reconstruction
            probabilities = [float(row[f"probability_{row['target']}_image"]) for row in image]
            self.assertGreaterEqual(probabilities[0], probabilities[1])
        metrics = content(output / "metrics.json")
        self.assertEqual((metrics["count"], metrics["settings"]["drawn"]), (4, "groups"))
        self.assertEqual(metrics["oracle_id"], fingerprint_of_model(oracle / "models"))
        page = page_of(self, output)
        self.assertEqual(len(page.all("img")), 2 * (2 + 2 * 2))
        self.assertIn("by the oracle: ", page.text)

    def test_oracle_must_be_another_model(self) -> None:
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            explain(fresh("refused"), limit=1, oracle=str(TRAINED / "models"))
        self.assertIn("--oracle has the weights of the model that is explained", message_of(caught.exception))

    def test_rule_of_the_representation_needs_its_head(self) -> None:
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            explain(fresh("refused"), limit=1, rule="representation")
        self.assertIn("--head mediffusion", message_of(caught.exception))
        model, output = fresh("model"), fresh("output")
        train(model, **PHANTOMS, epochs=1, num_samples=0, head="mediffusion")
        self.assertEqual(model_of(model)[0].network["head"], "mediffusion")
        explain(output, model, limit=1, rule="representation")
        self.assertEqual(len(rows(output)), 1)

    def test_masks_of_a_folder(self) -> None:
        folder, output = fresh("masks"), fresh("output")
        with open(folder / "labels.csv", "w", encoding="utf-8") as stream:
            stream.write("file,mask\n")
            for n in range(2):
                picture(folder / f"{n}.png", n)
                pixels = np.zeros((20, 12), np.uint8)
                pixels[5:9, 2:6] = 255
                save_png(pixels, folder / "masks" / f"{n}.png")
                stream.write(f"{n}.png,masks/{n}.png\n")
        printed = explain(output, dataset_dir=str(folder), mask_column="mask", target=0)
        self.assertIn("may have trained the model", printed)
        self.assertEqual([row["image"] for row in rows(output)], ["0.png", "1.png"])
        metrics = content(output / "metrics.json")
        asked = metrics["count"] - metrics["already"]
        if asked:
            self.assertEqual(sum(found["count"] for found in metrics["localization"].values()), asked)
            self.assertTrue(all(name.endswith(" -> normal") for name in metrics["localization"]))
        self.assertIn("may have trained the model", metrics["settings"]["images"])
        self.assertIn("true finding", page_of(self, output).text)

    def test_a_part_with_its_labels(self) -> None:
        folder = fresh("labelled")
        table = ["file,finding,set,mask"]
        for n, (label, part) in enumerate((("normal", "train"), ("effusion", "test"), ("", "test"), ("normal", "val"))):
            picture(folder / f"{n}.png", n)
            table.append(f"{n}.png,{label},{part}," + ("1.png" if n == 1 else ""))
        (folder / "labels.csv").write_text("\n".join(table), encoding="utf-8")
        columns = {"label_column": "finding", "split_column": "set"}
        for part, expected, held_out in (
            ("test", {"1.png": "effusion", "2.png": ""}, None),
            ("train", {"0.png": "normal"}, "the train part: these images trained the model"),
            ("val", {"3.png": "normal"}, "the val part: these images chose epoch and thresholds of the model"),
            (
                "all",
                {"0.png": "normal", "1.png": "effusion", "2.png": "", "3.png": "normal"},
                "they may have trained the model",
            ),
            (None, {f"{n}.png": "" for n in range(4)}, "they may have trained the model"),
        ):
            with self.subTest(part):
                output = fresh("output")
                printed = explain(output, dataset_dir=str(folder), target=0, part=part, **(columns if part else {}))
                self.assertEqual({row["image"]: row["label"] for row in rows(output)}, expected)
                self.assertEqual("not held out" in printed, part != "test")
                settings = content(output / "metrics.json")["settings"]
                self.assertEqual("images" in settings, part != "test")
                if held_out is not None:
                    self.assertIn(held_out, printed)
                    self.assertIn(held_out, settings["images"])
                    self.assertIn(held_out, page_of(self, output).text)
        for options, message in (
            ({"part": "rest", **columns}, "'rest' is no part; right are train, val, test, all"),
            ({"part": "test"}, "has no column 'label'"),
            ({"part": "test", "mask_column": "mask", **columns}, "--mask_column mask finds no mask for some images"),
        ):
            with self.subTest(message), self.assertRaises((ValueError, RuntimeError)) as caught:
                explain(fresh("output"), dataset_dir=str(folder), **options)
            self.assertIn(message, message_of(caught.exception))

    def test_folder_with_sub_folders_and_a_named_target(self) -> None:
        folder, output = fresh("folder"), fresh("output")
        for number, name in enumerate(("a.png", "left/a.png", "left/b.png")):
            picture(folder / name, number)
        explain(output, dataset_dir=str(folder), target="effusion", region_fraction=0.25, batch_size=2)
        found = rows(output)
        self.assertEqual([row["image"] for row in found], ["a.png", "left/a.png", "left/b.png"])
        self.assertEqual({row["target"] for row in found}, {"effusion"})
        self.assertEqual({path.name for path in (output / "cases").iterdir()}, {"a", "left__a", "left__b"})
        for case in (output / "cases").iterdir():
            for name in ("counterfactual", "reconstruction", "difference", "region"):
                self.assertEqual(read_image(case / f"{name}.png").shape, (1, 20, 12))
            change = read_image(case / "difference.png")[0].astype(int) - 128
            region = read_image(case / "region.png")[0] > 0
            self.assertLess(region.mean(), 0.6)
            self.assertGreater(np.abs(change[region]).mean(), np.abs(change[~region]).mean())
        self.assertIn("change was allowed inside", page_of(self, output).text)

    def test_single_file_toward_a_probability(self) -> None:
        folder, output = fresh("single"), fresh("output")
        picture(folder / "one.png", 5)
        explain(output, dataset_dir=str(folder / "one.png"), target=0, probability=0.3, scale="null")
        (row,) = rows(output)
        self.assertEqual((row["image"], row["target"]), ("one.png", "normal"))
        reached = float(row["probability_normal_counterfactual"]) >= 0.3
        self.assertEqual(row["reached"], str(reached))

    def test_several_labels(self) -> None:
        folder, output = fresh("multi"), fresh("output")
        with open(folder / "labels.csv", "w", encoding="utf-8") as stream:
            stream.write("file,label\n")
            for n in range(30):
                picture(folder / f"{n:02d}.png", n, (16, 16))
                stream.write(f"{n:02d}.png,{('a', 'b', 'a|b', 'no finding', '')[n % 5]}\n")
        train(folder, dataset_dir=str(folder), epochs=1, batch_size=4, num_samples=0, counterfactual_pictures=2)
        self.assertTrue((folder / "output" / "training" / "counterfactuals_epoch0001.png").is_file())
        explain(output, folder, dataset_dir=str(folder / "00.png"), target="b", enforce="false")
        (row,) = rows(output)
        self.assertEqual((row["target"], row["enforce"]), ("b", "False"))
        self.assertIn("b: no", page_of(self, output).text)
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            explain(output, folder, dataset_dir=str(folder / "00.png"))
        self.assertIn("--target is needed; it must be one of a, b", message_of(caught.exception))

    def test_untrained_is_refused_unless_allowed(self) -> None:
        empty, output = fresh("none"), fresh("output")
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            explain(output, empty)
        self.assertIn("answers of an untrained network mean nothing. Train first", message_of(caught.exception))
        self.assertEqual(list(output.iterdir()), [])
        printed = explain(output, empty, allow_untrained="true", limit=1)
        self.assertIn("UNTRAINED", printed)
        self.assertTrue((output / "index.html").is_file())

    @parameterized.expand(
        [
            ({"target": "efusion"}, "--target is 'efusion', it must be one of normal, opacity, effusion"),
            ({"target": 3}, "--target is 3"),
            ({"enforce": "no"}, "--enforce must be true, false or null"),
            ({"rule": "magic"}, "rule must be one of"),
            ({"rule": "class_free"}, "'class_free' needs a class-conditional network"),
            ({"encoding": "magic"}, "encoding must be one of"),
            ({"timestep": 1000}, "timestep must lie in"),
            ({"probability": 1.5}, "probability must lie in"),
            ({"region_fraction": 2}, "region_fraction in (0, 1)"),
            ({"limit": 0}, "--limit must be a whole number of at least 1"),
            ({"dataset_dir": "/nowhere"}, "there is no /nowhere"),
            ({"precision": "fp16"}, "fp16 is not supported"),
        ]
    )
    def test_wrong_options_are_refused(self, options: dict[str, Any], message: str) -> None:
        output = fresh("refused")
        with self.assertRaises((ValueError, TypeError, RuntimeError)) as caught:
            explain(output, limit=options.pop("limit", 1), **options)
        self.assertIn(message, message_of(caught.exception))
        self.assertEqual(list(output.iterdir()), [])


class TestVolumes(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.model = fresh("volumes")
        options = {"source#phantom_counts": [8, 8, 8], "spatial_dims": 3, "batch_size": 4, "epochs": 1}
        train(cls.model, **options, num_samples=0)

    def test_axes_and_place_of_the_file(self) -> None:
        folder, output = fresh("nifti"), fresh("output")
        affine = np.array([[0, 0, -2.0, 7], [3, 0, 0, 8], [0, 1.5, 0, 9], [0, 0, 0, 1]])
        array = np.random.default_rng(0).integers(0, 1000, (8, 16, 12)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(array, affine), folder / "volume.nii.gz")
        explain(output, self.model, dataset_dir=str(folder))
        for name in ("counterfactual", "reconstruction", "difference"):
            written = nibabel.load(output / "cases" / "volume" / f"{name}.nii.gz")
            np.testing.assert_allclose(written.affine, affine)
            self.assertEqual(written.shape, array.shape)
        self.assertRegex(page_of(self, output).text, r"slice \d+ of 16")

    @unittest.skipUnless(DATA, NEEDS_DATA)
    def test_real_files(self) -> None:
        folder, output = fresh("real"), fresh("output")
        names = ["nifti_monai/reoriented_anat_moved.nii", "nrrd/prostate_phantom_subvolume.nrrd"]
        for name in names:
            shutil.copy(ORIGINALS / name, folder)
        explain(output, self.model, dataset_dir=str(folder))
        self.assertEqual(len(rows(output)), 2)
        self.assertEqual(len(page_of(self, output).all("img")), 8)
        prepare = ImagePreprocessing.from_description(model_of(self.model)[0].data)
        for name in names:
            written = output / "cases" / Path(name).stem / "reconstruction.nii.gz"
            self.assertEqual(read_image(written, 3).shape, read_image(ORIGINALS / name, 3).shape)
            # what the network reads from the written file lies where it lay in the original
            one, two = prepare(ORIGINALS / name), prepare(written)
            alike = float(np.corrcoef(one.flatten(), two.flatten())[0, 1])
            for axis in (1, 2, 3):
                self.assertGreater(alike, float(np.corrcoef(one.flip(axis).flatten(), two.flatten())[0, 1]))


@unittest.skipUnless(DATA, NEEDS_DATA)
class TestRealPictures(unittest.TestCase):
    def test_jpeg_and_dicom(self) -> None:
        folder, output = fresh("real"), fresh("output")
        names = ["kermany_cxr_224/NORMAL/IM-0424-0001.jpeg", "dicom/cxr/Fake_MONOHR1.dcm", "busi/normal/normal (4).png"]
        for name in names:
            shutil.copy(ORIGINALS / name, folder)
        explain(output, dataset_dir=str(folder))
        self.assertEqual([row["image"] for row in rows(output)], sorted(Path(name).name for name in names))
        page = page_of(self, output)
        self.assertEqual(len(page.all("img")), 12)
        cases = output / "cases"
        prepare = ImagePreprocessing.from_description(model_of(TRAINED)[0].data)
        for name, written in {
            names[0]: cases / "IM-0424-0001" / "reconstruction.png",
            names[1]: cases / "Fake_MONOHR1" / "reconstruction.nii.gz",
            names[2]: cases / "normal_4" / "reconstruction.png",
        }.items():
            self.assertEqual(read_image(written).shape[1:], read_image(ORIGINALS / name).shape[1:], name)
            one, two = prepare(ORIGINALS / name), prepare(written)
            alike = float(np.corrcoef(one.flatten(), two.flatten())[0, 1])
            self.assertGreater(alike, 0.6, name)
            for other in (one.flip(1), one.flip(2), one.transpose(1, 2)):
                self.assertGreater(alike, float(np.corrcoef(other.flatten(), two.flatten())[0, 1]), name)
        affine = nibabel.load(cases / "Fake_MONOHR1" / "difference.nii.gz").affine
        self.assertGreater(np.abs(np.linalg.det(affine)), 0)


class TestTraining(unittest.TestCase):
    def test_pictures_of_every_epoch(self) -> None:
        drawn = {path.name for path in (TRAINED / "output" / "training").iterdir()}
        self.assertIn("counterfactuals_epoch0001.png", drawn)
        pixels = read_image(TRAINED / "output" / "training" / "counterfactuals_epoch0001.png")
        self.assertEqual(pixels.shape[0], 3)
        self.assertGreater(pixels.shape[2], pixels.shape[1])  # two rows of four
        if has_tensorboard:
            events = event_accumulator.EventAccumulator(str(TRAINED / "output" / "tensorboard"))
            events.Reload()
            self.assertEqual(set(events.Tags()["images"]), {"samples", "denoising", "counterfactuals"})

    def test_they_change_no_weight_and_can_be_left_out(self) -> None:
        folder = fresh("without")
        train(folder, **PHANTOMS, epochs=1, num_samples=0, counterfactual_pictures=0)
        drawn = {path.name for path in (folder / "output" / "training").iterdir()}
        self.assertEqual(drawn, {"samples_epoch0001.png", "denoising_epoch0001.png"})
        one, two = (load_weights(place / "models" / "model.pt") for place in (folder, TRAINED))
        torch.testing.assert_close(one, two, rtol=0, atol=0)


class TestFormat(unittest.TestCase):
    def test_from_elsewhere_asks_for_the_bundle_root(self) -> None:
        elsewhere = fresh("elsewhere")
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            run(str(BUNDLE / "counterfactual.json"), elsewhere)
        self.assertIn("say where it is: --bundle_root PATH", message_of(caught.exception))
        self.assertEqual(list(elsewhere.iterdir()), [])

    def test_documented_options_are_those_of_the_program(self) -> None:
        readme = (BUNDLE / "docs" / "README.md").read_text(encoding="utf-8")
        table = readme.split("## Explain")[1].split("\n## ")[0]
        known = monai.bundle.ConfigParser.load_config_file(BUNDLE / "configs" / "counterfactual.json")
        cells = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `--")]
        named = {part.strip(" `-") for first, _ in cells for part in first.split(",")}
        options = {key for key, value in known.items() if not isinstance(value, (dict, list))} - {
            "bundle_root",
            "description",
            "network_def",
            "network",
            "oracle_model",
            "preprocessing",
            "scheduler",
            "space",
        }
        self.assertEqual(named, options)


if __name__ == "__main__":
    unittest.main()
