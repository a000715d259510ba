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

"""Training with few labels where other parts of a bundle meet it: color and rare classes, latents, volumes."""

from __future__ import annotations

import json
import tempfile
import unittest
from pathlib import Path
from typing import Any

import torch
from parameterized import parameterized

from monai_jointdiff.data import SKIN_CLASSES
from monai_jointdiff.engines import ModelDescription, load_weights
from tests.bundles import runs
from tests.bundles.runs import PHANTOMS, leave_no_trace, message_of

SKIN: dict[str, Any] = {  # 144 phantoms are as few as hold every class
    "source#phantom_counts": [150, 12, 60],
    "train#epoch_length": 2,
    "num_labels": 7,
    "threshold": 0.1,
    "num_samples": 0,
    "precision": "fp32",
}
AUTOENCODER: dict[str, Any] = {
    "source#phantom_counts": [150, 12, 60],
    "train#epoch_length": 1,
    "image_size": 16,
    "batch_size": 8,
    "epochs": 1,
    "autoencoder_def#channels": [8, 8, 16],
    "autoencoder_def#norm_num_groups": 4,
    "progress": False,
    "precision": "fp32",
}
FOLDERS = {"ckpt_dir": "models", "output_dir": "output"}
TEMPORARY = Path()


def setUpModule() -> None:
    global TEMPORARY
    leave_no_trace()
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    TEMPORARY = Path(folder.name).resolve()


def train(directory: Path, bundle: str, *overlays: str, **options: Any) -> str:
    files: Any = [f"bundles/{bundle}/{name}.json" for name in ("train", "train_semi", *overlays)]
    return runs.train(directory, config_file=files, **options)


def content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def checkpoint(directory: Path, iteration: int) -> dict[str, Any]:
    return torch.load(directory / "models" / f"checkpoint_{iteration:08d}.pt", weights_only=True)


def check_model(case: unittest.TestCase, folder: Path, labels: int) -> ModelDescription:
    """What every training leaves: weights that fit their description, figures of the test part, the list of labels."""
    description = ModelDescription.load(folder / "models" / "model.json")
    weights = load_weights(folder / "models" / "model.pt")
    description.build_network().load_state_dict(weights)
    case.assertTrue(all(bool(weight.isfinite().all()) for weight in weights.values()))
    auc = content(folder / "output" / "metrics.json")["metrics"]["auc"]["value"]
    case.assertTrue(0 <= auc <= 1, auc)
    case.assertEqual(len((folder / "output" / "labelled.txt").read_text().splitlines()), labels)
    return description


class TestPixels(unittest.TestCase):
    def test_color_and_one_label_of_each_class(self) -> None:
        folder = TEMPORARY / "skin"
        train(folder, "skin_lesion", **SKIN)
        self.assertEqual(check_model(self, folder, 7).data["class_names"], list(SKIN_CLASSES))
        options = checkpoint(folder, 4)["options"]
        self.assertEqual((options["balance"], options["num_labels"], options["noisy"]), ("weights", 7, "unlabelled"))

    def test_volumes(self) -> None:
        folder = TEMPORARY / "volumes"
        options = {"source#phantom_counts": [12, 8, 8], "num_labels": 3, "num_samples": 0}
        train(folder, "chest_xray", **options, spatial_dims=3, batch_size=4, epochs=1)
        self.assertEqual(check_model(self, folder, 3).data["image_size"], [16, 16, 16])

    def test_refused_run_leaves_the_labels_of_the_model_that_stays(self) -> None:
        folder = TEMPORARY / "kept"
        options = {**PHANTOMS, "num_samples": 0, "epochs": 1}
        train(folder, "chest_xray", **options, num_labels=6)
        files = [folder / "output" / "labelled.txt", *(folder / "models" / name for name in ("model.pt", "model.json"))]
        before = [file.read_bytes() for file in files]
        resume = str(folder / "models" / "checkpoint_00000003.pt")
        for refused, message in (({"resume": resume}, "other options"), ({"classification_start": 3}, "start is 3")):
            with self.assertRaises((ValueError, RuntimeError)) as caught:
                train(folder, "chest_xray", **options, num_labels=9, **refused)
            self.assertIn(message, message_of(caught.exception))
            self.assertEqual([file.read_bytes() for file in files], before)
        train(folder, "chest_xray", **options, num_labels=9)
        check_model(self, folder, 9)


class TestLatents(unittest.TestCase):
    """The teacher and the rounds are asked about images, the network in training about latents.

    Images have three channels, latents four: a network that is given the wrong kind fails.
    """

    @classmethod
    def setUpClass(cls) -> None:
        folders = {name: str(TEMPORARY / "first" / kind) for name, kind in FOLDERS.items()}
        runs.run("bundles/skin_lesion/train_autoencoder.json", **{**AUTOENCODER, **folders})

    @parameterized.expand([("fixmatch", {"teacher": "true"}), ("acpl", {"neighbours": 3})])
    def test_second_stage(self, algorithm: str, options: dict[str, Any]) -> None:
        folder = TEMPORARY / algorithm
        options = {**SKIN, "algorithm": algorithm, "autoencoder": str(TEMPORARY / "first" / "models"), **options}
        train(folder, "skin_lesion", "train_latent", **options)
        description = check_model(self, folder, 7)
        assert description.autoencoder is not None
        self.assertEqual(description.autoencoder.latent_shape((16, 16)), (4, 4, 4))
        self.assertTrue((folder / "models" / "autoencoder.pt").is_file())
        state = checkpoint(folder, 4)
        self.assertEqual(state["options"]["teacher"], algorithm == "fixmatch")
        if algorithm == "acpl":
            self.assertGreater(int((state["further"]["pseudo_labels"]["weights"] > 0).sum()), 0)


if __name__ == "__main__":
    unittest.main()
