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

"""The brain MRI bundle from end to end through `monai.bundle`: what it has beside the programs of `chest_xray`."""

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
from parameterized import parameterized

from monai_jointdiff.data import BrainPhantoms, ImageFiles, read_image
from monai_jointdiff.engines import ModelDescription, load_weights, preprocessing_of_model
from tests.bundles import runs
from tests.bundles.default_model import BUNDLES
from tests.bundles.runs import PHANTOMS, ROOT, TINY, leave_no_trace, message_of, run, working_directory

BUNDLE, CHEST = BUNDLES / "brain_mri", BUNDLES / "chest_xray"
DATA = os.environ.get("JOINTDIFF_DATA")
NEEDS_DATA = "JOINTDIFF_DATA does not say where the real data are"
TRAIN = "bundles/brain_mri/train.json"
SCAN = {"image_column": ["flair", "t1c"], "mask_column": "seg", "min_mask_pixels": 4}
TEMPORARY = Path()
TRAINED = Path()  # one epoch of three iterations on phantoms

# Every place where the programs of the two bundles differ; `imports` of train.json have one line more, too.
OPTIONS_OF_VOLUMES = {"mask_column", "slice_axis", "slice_every", "min_foreground", "min_mask_pixels"}
DIFFERENCES = {
    "train": {
        "imports",
        "bundle_root",
        "image_column",
        "epochs",
        "bias_correction",
        *OPTIONS_OF_VOLUMES,
        *(f"source#{name}" for name in OPTIONS_OF_VOLUMES),
        *(f"source#{name}" for name in ("mask_classes", "intensity", "correction", "phantoms", "usual_columns")),
    },
    "multi_gpu_train": set(),
    "evaluate": {"bundle_root", *OPTIONS_OF_VOLUMES, *(f"source#{name}" for name in OPTIONS_OF_VOLUMES)},
    "inference": {"bundle_root", "image_column", "slice_axis", "slice_every", "min_foreground", "dataset#data"},
    "generate": {"bundle_root"},
    "train_conditional": set(),
    "diffusion_classify": {"bundle_root", *OPTIONS_OF_VOLUMES, "images"},
    "counterfactual": {"bundle_root", "slice_axis", "slice_every", "min_foreground", "dataset#data"},
}


def setUpModule() -> None:
    global TEMPORARY, TRAINED
    leave_no_trace()
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    TEMPORARY = Path(folder.name).resolve()
    TRAINED = TEMPORARY / "trained"
    train(TRAINED, **PHANTOMS)


def fresh(name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=name + "_", dir=TEMPORARY))


def train(directory: Path, **options: Any) -> str:
    return runs.train(directory, config_file=TRAIN, **{"epochs": 1, "num_samples": 0, **options})


def use(program: str, model: Path, output: Path, **options: Any) -> str:
    return runs.use(program, model, output, bundle="brain_mri", **options)


def content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def save_scans(folder: Path, count: int = 8) -> Path:
    """Volumes of phantoms as scanners store them: one file for each channel, and one for the tumour."""
    phantoms = BrainPhantoms(3, (10, 16, 16), 1)
    for n in range(count):
        phantom = phantoms(n, n % 2)
        flair, t1c = phantom.image.astype(np.int16) * 9
        (folder / f"case{n}").mkdir(parents=True, exist_ok=True)
        for name, array in (("flair", flair), ("t1c", t1c), ("seg", phantom.mask[0].astype(np.uint8))):
            image = nibabel.Nifti1Image(array.T, np.diag([-2.0, -2.0, 3.0, 1.0]))
            nibabel.save(image, folder / f"case{n}" / f"case{n}_{name}.nii.gz")
    return folder


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """The entries of a configuration by their full names."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {
        k: v for key, value in config.items() for k, v in leaves(value, f"{prefix}#{key}" if prefix else key).items()
    }


class TestPrograms(unittest.TestCase):
    def test_training_describes_what_it_saw(self) -> None:
        described = content(TRAINED / "models" / "model.json")
        self.assertEqual(described["data"]["class_names"], ["no_tumour", "tumour"])
        self.assertEqual((described["network"]["in_channels"], described["network"]["out_channels"]), (2, 2))
        self.assertEqual(described["data"]["opened_with"]["phantoms"], "brain")
        self.assertEqual(described["data"]["bias_correction"], None)
        self.assertEqual(described["data"]["channel_names"], ["FLAIR", "T1c"])
        self.assertIn("test auc", content(TRAINED / "output" / "summary.json"))

    def test_evaluation_repeats_the_figures_of_the_training(self) -> None:
        output = fresh("evaluate")
        use("evaluate", TRAINED, output)
        for file in ("metrics.json", "predictions.csv"):
            self.assertEqual((output / file).read_text(), (TRAINED / "output" / file).read_text())

    def test_generates_both_channels(self) -> None:
        output = fresh("generate")
        use("generate", TRAINED, output, num_samples=2, num_inference_steps=2)
        self.assertEqual({path.name for path in output.iterdir()}, {"sample_00000.png", "sample_00001.png", "grid.png"})
        self.assertEqual(read_image(output / "sample_00000.png").size, 2 * 16 * 16)

    def test_inference_of_scans_without_any_option(self) -> None:
        """The slices of each scan, with the probabilities that the network gives by hand."""
        folder, output = save_scans(fresh("scans"), 2), fresh("inference")
        use("inference", TRAINED, output, precision="fp32", dataset_dir=str(folder))
        found = rows(output / "predictions.csv")
        names = [f"case{n}/case{n}_flair.nii.gz#slice_{k:03d}" for n in (0, 1) for k in range(10)]
        self.assertTrue(found and {row["image"] for row in found} < set(names))
        description = ModelDescription.load(TRAINED / "models" / "model.json")
        network = description.build_network().eval()
        network.load_state_dict(load_weights(TRAINED / "models" / "model.pt"))
        for row in found[::5]:
            case, index = row["image"].split("/")[0], int(row["image"][-3:])
            files = tuple(folder / case / f"{case}_{name}.nii.gz" for name in ("flair", "t1c"))
            image = ImageFiles(files, 0, index)
            prepared = preprocessing_of_model(description)({"image": image, "label": -1, "name": ""})["image"]
            with torch.no_grad():
                logits = network(prepared.as_tensor()[None]).double().numpy()
            expected = description.decision.probabilities(logits)[0]
            self.assertAlmostEqual(float(row["probability_tumour"]), expected[1], places=5)

    def test_inference_with_other_files_and_slices(self) -> None:
        folder, output = save_scans(fresh("scans"), 1), fresh("inference")
        options = {"image_column": "flair,seg", "slice_axis": 2, "slice_every": 4, "min_foreground": 0.0}
        use("inference", TRAINED, output, dataset_dir=str(folder), **options)
        found = [row["image"] for row in rows(output / "predictions.csv")]
        self.assertEqual(found, [f"case0/case0_flair.nii.gz#slice_{n:03d}" for n in (0, 4, 8, 12)])

    def test_counterfactuals_of_slices(self) -> None:
        folder, output = save_scans(fresh("scans"), 1), fresh("counterfactual")
        options = {"slice_axis": 2, "slice_every": 8, "min_foreground": 0.0, "num_inference_steps": 2, "scale": 1.0}
        options |= {"mask_column": "seg", "target": "tumour", "probability": None}
        use("counterfactual", TRAINED, output, dataset_dir=str(folder), **options)
        found = [row["image"] for row in rows(output / "counterfactuals.csv")]
        self.assertEqual(found, [f"case0/case0_flair.nii.gz#slice_{n:03d}" for n in (0, 8)])
        self.assertEqual(len(list(output.glob("cases/*/counterfactual*.nii.gz"))), 2)
        page = (output / "index.html").read_text(encoding="utf-8")
        self.assertIn("from top to bottom: FLAIR, T1c.", page)
        metrics = content(output / "metrics.json")
        drawn = np.asarray(nibabel.load(folder / "case0" / "case0_seg.nii.gz").dataobj)
        tumours = sum(bool(drawn[n].any()) for n in (0, 8))  # sagittal slices
        self.assertEqual("true finding" in page, tumours > 0)
        self.assertLessEqual(sum(part["count"] for part in (metrics["localization"] or {}).values()), tumours)


class TestScans(unittest.TestCase):
    def test_conditional_training_and_classification_by_the_denoiser(self) -> None:
        folder, model, output = save_scans(fresh("scans")), fresh("model"), fresh("output")
        overlay = "bundles/brain_mri/train_conditional.json"
        runs.train(model, config_file=[TRAIN, overlay], dataset_dir=str(folder), **SCAN, epochs=1, num_samples=0)
        options: dict[str, Any] = {"num_draws": 3, "limit": 3, "reference_limit": 2, "maps": True}
        printed = use("diffusion_classify", model, output, dataset_dir=str(folder), **options)
        self.assertRegex(printed, r"abstention is chosen on the validation part of .* \(2 images\)")
        found = rows(output / "diffusion_predictions.csv")
        self.assertEqual(len(found), 3)
        for row in found:  # the mask of the slice gives its label
            case, index = row["image"].split("/")[0], int(row["image"][-3:])
            drawn = np.asarray(nibabel.load(folder / case / f"{case}_seg.nii.gz").dataobj)[..., index].any()
            self.assertEqual(row["label"], "tumour" if drawn else "no_tumour")
        (picture, *_) = sorted((output / "maps").iterdir())
        self.assertGreater(read_image(picture).shape[1], 2 * 256)  # both channels, one below the other

    def test_training_with_masks_and_bias_correction_and_evaluation(self) -> None:
        folder, model = save_scans(fresh("scans")), fresh("model")
        correction = {"_target_": "monai_jointdiff.transforms.N4BiasFieldCorrection", "iterations": [2]}
        options = {**SCAN, "slice_every": 2, "source#correction": correction}
        printed = train(model, dataset_dir=str(folder), **options)
        self.assertRegex(printed, r"train: \d+ images \(no_tumour \d+, tumour \d+\)")
        data = content(model / "models" / "model.json")["data"]
        self.assertEqual(data["bias_correction"]["iterations"], [2])
        self.assertEqual(data["channel_names"], ["flair", "t1c"])
        self.assertEqual((data["opened_with"]["slice_every"], data["opened_with"]["mask_column"]), (2, "seg"))
        output = fresh("evaluate")
        use("evaluate", model, output, dataset_dir=str(folder))
        for file in ("metrics.json", "predictions.csv"):
            self.assertEqual((output / file).read_text(), (model / "output" / file).read_text())
        self.assertTrue(all("#slice_" in row["image"] for row in rows(output / "predictions.csv")))
        self.assertNotIn(str(TEMPORARY), (model / "models" / "model.json").read_text())

    def test_training_by_a_table(self) -> None:
        folder = save_scans(fresh("scans"))
        with open(folder / "labels.csv", "w", encoding="utf-8") as stream:
            stream.write("flair,contrast,label,patient,split\n")
            for n in range(6):
                scan, label, part = f"case{n}/case{n}", ("tumour", "no_tumour")[n % 2], ("train", "val", "test")[n // 2]
                stream.write(f"{scan}_flair.nii.gz,{scan}_t1c.nii.gz,{label},p{n},{part}\n")
        model = fresh("model")
        printed = train(model, dataset_dir=str(folder), image_column="flair,contrast", slice_axis=1)
        self.assertRegex(printed, r"train: \d+ images \(no_tumour \d+, tumour \d+\)")
        self.assertEqual({row["image"][:5] for row in rows(model / "output" / "predictions.csv")}, {"case4", "case5"})

    def test_scans_that_do_not_fit_are_named_before_training(self) -> None:
        folder = save_scans(fresh("scans"), 3)
        short = nibabel.Nifti1Image(np.zeros((16, 16, 9), np.int16), np.diag([-2.0, -2.0, 3.0, 1.0]))
        nibabel.save(short, folder / "case1" / "case1_t1c.nii.gz")
        (folder / "case2" / "case2_flair.nii.gz").write_bytes(b"no image")
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            train(fresh("model"), dataset_dir=str(folder), **SCAN)
        message = message_of(caught.exception)
        self.assertIn("2 volumes cannot be cut into slices", message)
        for name in ("case1_t1c.nii.gz': its shape is (9, 16, 16)", "case2_flair.nii.gz"):
            self.assertIn(name, message)

    @parameterized.expand(
        [
            ("corrected", {"bias_correction": "true"}, True, 0),
            ("plain", {"bias_correction": "false", "slice_axis": "null", "mask_column": "null"}, False, None),
            ("of_the_file", {}, False, 0),
        ]
    )
    def test_words_of_the_command_line(
        self, _: str, options: dict[str, Any], corrected: bool, axis: int | None
    ) -> None:
        """`monai.bundle run` hands on true, false and null as texts."""
        parser = monai.bundle.ConfigParser()
        parser.read_config(BUNDLE / "configs" / "train.json")
        with working_directory(ROOT):
            parser.update({**PHANTOMS, **options})
            description = parser.get_parsed_content("source").description()
        self.assertEqual(description["bias_correction"] is not None, corrected)
        self.assertEqual(description["opened_with"]["slice_axis"], axis)
        self.assertIsNone(description["opened_with"]["mask_column"])


@unittest.skipUnless(DATA, NEEDS_DATA)
class TestRealData(unittest.TestCase):
    def test_slices(self) -> None:
        model, output = fresh("model"), fresh("evaluate")
        file = str(Path(str(DATA)) / "brats2013_slices_64.npz")
        printed = train(model, dataset_dir=file, preflight=False, **{"train#epoch_length": 3})
        self.assertIn("train: 371 images (no_tumour 117, tumour 254)", printed)
        use("evaluate", model, output, dataset_dir=file, batch_size=128)
        self.assertEqual((output / "metrics.json").read_text(), (model / "output" / "metrics.json").read_text())

    def test_volumes_in_one_file(self) -> None:
        file = str(Path(str(DATA)) / "brats2013_vol_64.npz")
        options = {"slice_axis": 2, "slice_every": 8, "train#epoch_length": 2}
        printed = train(fresh("model"), dataset_dir=file, **options)
        self.assertRegex(printed, r"test: \d+ images \(no_tumour \d+, tumour \d+\)")

    def test_scan_as_it_was_published(self) -> None:
        folder, output = Path(str(DATA)) / "originals" / "brats2013_pat0006", fresh("inference")
        use("inference", TRAINED, output, dataset_dir=str(folder), slice_every=30)
        names = [row["image"] for row in rows(output / "predictions.csv")]
        self.assertEqual(names, [f"Flair_subtrMeanDivStd.nii.gz#slice_{n:03d}" for n in (30, 60, 90, 120)])


class TestBundleFormat(unittest.TestCase):
    @parameterized.expand(DIFFERENCES)
    def test_differs_from_the_chest_bundle_only_where_listed(self, program: str) -> None:
        ours, theirs = ((bundle / "configs" / f"{program}.json").read_text() for bundle in (BUNDLE, CHEST))
        one, two = leaves(json.loads(ours)), leaves(json.loads(theirs))
        differing = {key for key in one.keys() | two.keys() if one.get(key, "missing") != two.get(key, "missing")}
        listed = DIFFERENCES[program]
        self.assertEqual(
            {key for key in differing if not any(key == k or key.startswith(f"{k}#") for k in listed)}, set()
        )
        self.assertEqual(
            {k for k in listed if not any(key == k or key.startswith(f"{k}#") for key in differing)}, set()
        )

    def test_imports_and_root_differ_by_what_they_must(self) -> None:
        ours, theirs = (content(bundle / "configs" / "train.json") for bundle in (BUNDLE, CHEST))
        self.assertEqual(ours["imports"], [*theirs["imports"], "$import monai_jointdiff.transforms as transforms"])
        self.assertEqual(ours["bundle_root"], theirs["bundle_root"].replace("chest_xray", "brain_mri"))

    def test_copy_of_the_bundle_alone_works(self) -> None:
        inside = fresh("copy") / "brain_mri"
        shutil.copytree(BUNDLE, inside, symlinks=True)
        run("configs/train.json", inside, **{**TINY, **PHANTOMS, "epochs": 1, "num_samples": 0})
        self.assertTrue((inside / "models" / "model.pt").is_file())


class TestReadme(unittest.TestCase):
    def test_lists_the_options_of_volumes(self) -> None:
        readme = (BUNDLE / "docs" / "README.md").read_text(encoding="utf-8")
        for name in ("mask_column", *OPTIONS_OF_VOLUMES, "bias_correction"):
            self.assertIn(f"`--{name}`", readme)


if __name__ == "__main__":
    unittest.main()
