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

"""Both stages of a model on latents through `monai.bundle`, and every program that uses it."""

from __future__ import annotations

import csv
import json
import tempfile
import unittest
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import torch
from monai.networks.nets import AutoencoderKL
from PIL import Image

from monai_jointdiff.data import ImageSource, open_source
from monai_jointdiff.engines import (
    AutoencoderDescription,
    FirstStage,
    ModelDescription,
    SamplingInferer,
    evaluate_reconstruction,
    load_weights,
    noise_of_draws,
    preprocessing_of_model,
    source_of_model,
    space_of_model,
)
from monai_jointdiff.inferers import JointDiffusionInferer
from tests.bundles import runs
from tests.bundles.runs import PHANTOMS, ROOT, leave_no_trace, message_of, working_directory
from tests.bundles.test_chest_xray_semi import StopAfter
from tests.inferers.autoencoders import IdentityAutoencoder

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    **PHANTOMS,
    "image_size": 16,
    "batch_size": 8,
    "epochs": 2,
    "autoencoder_def#channels": [8, 8, 16],
    "autoencoder_def#norm_num_groups": 4,
    "discriminator_def#channels": 4,
    "progress": False,
    "precision": "fp32",
}
ADVERSARIAL = {"adversarial_weight": 0.1, "adversarial_start": 2, "checkpoint_interval": 2}
DIFFUSION: dict[str, Any] = {
    **PHANTOMS,
    "balance": "none",
    "epochs": 1,
    "num_samples": 4,
    "class_conditional": True,
    "counterfactual_pictures": 1,
    "precision": "fp32",
}
TEMPORARY = Path()
FIRST = Path()  # an autoencoder after two epochs of three iterations, the last four against a discriminator
SECOND = Path()  # a class-conditional model on its latents


def setUpModule() -> None:
    global TEMPORARY, FIRST, SECOND
    leave_no_trace()
    folder = tempfile.TemporaryDirectory()
    unittest.addModuleCleanup(folder.cleanup)
    TEMPORARY = Path(folder.name).resolve()
    FIRST, SECOND = TEMPORARY / "first", TEMPORARY / "second"
    train_first(FIRST, **ADVERSARIAL)
    train_second(SECOND, autoencoder=str(FIRST / "models"))


def train_first(directory: Path, bundle: str = "skin_lesion", **options: Any) -> str:
    folders = {"ckpt_dir": str(directory / "models"), "output_dir": str(directory / "output")}
    return runs.run(f"bundles/{bundle}/train_autoencoder.json", **{**SMALL, **folders, **options})


def train_second(directory: Path, bundle: str = "skin_lesion", **options: Any) -> str:
    files: Any = [f"bundles/{bundle}/{name}.json" for name in ("train", "train_latent")]
    return runs.train(directory, config_file=files, **{**DIFFUSION, **options})


def use(program: str, output: Path, model: Path | None = None, bundle: str = "skin_lesion", **options: Any) -> str:
    return runs.use(program, SECOND if model is None else model, output, bundle=bundle, precision="fp32", **options)


def checkpoint(directory: Path, iteration: int) -> dict[str, Any]:
    return torch.load(directory / "models" / f"checkpoint_{iteration:08d}.pt", weights_only=True)


def content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def identity_stage(source: ImageSource) -> FirstStage:
    """Latents that are the images."""
    arguments = {"channels": [1], "latent_channels": source.in_channels}
    return FirstStage(IdentityAutoencoder(), AutoencoderDescription(arguments, 1.0, ""))  # type: ignore[arg-type]


class TestFirstStage(unittest.TestCase):
    def test_leaves_an_autoencoder_of_monai_with_its_arguments(self) -> None:
        described = content(FIRST / "models" / "autoencoder.json")
        network = AutoencoderKL(**described["network"]).eval()
        network.load_state_dict(load_weights(FIRST / "models" / "autoencoder.pt"))
        source = open_source(image_size=16, phantoms="skin", phantom_counts=PHANTOMS["source#phantom_counts"])
        figures = evaluate_reconstruction(network, source, "test", CPU)
        summary = content(FIRST / "output" / "summary.json")
        for name, value in figures.items():
            self.assertAlmostEqual(summary[f"test {name}"], value, places=5)
        self.assertEqual(described["data"]["class_names"], source.class_names)
        pictures = {path.name for path in (FIRST / "output").rglob("*.png")}
        self.assertEqual(pictures, {"reconstructions.png", *(f"reconstructions_epoch000{n}.png" for n in (1, 2))})

    def test_discriminator_joins_at_its_iteration(self) -> None:
        states = [checkpoint(FIRST, iteration)["network"] for iteration in (4, 6)]
        started = [int(state["1.0.adn.N.num_batches_tracked"]) for state in states]
        self.assertEqual(started, [2 * 3, 4 * 3])  # in an iteration: for the autoencoder, and on both kinds of images
        self.assertFalse(torch.equal(*(state["1.final_conv.conv.weight"] for state in states)))

    def test_resumed_run_ends_as_the_uninterrupted_one(self) -> None:
        folder = TEMPORARY / "stopped"
        handlers = "$[@checkpoint, @ema, @train#loss_terms] + @train#handlers + [@stop]"
        stopper = {"_target_": f"{StopAfter.__module__}.StopAfter", "iteration": 5}
        with self.assertRaises(KeyboardInterrupt):
            train_first(folder, **ADVERSARIAL, **{"stop": stopper, "train#trainer#train_handlers": handlers})
        train_first(folder, **ADVERSARIAL, resume=str(folder / "models" / "checkpoint_00000004.pt"))
        ends = [checkpoint(directory, 6) for directory in (folder, FIRST)]
        for part in ("network", "optimizer", "ema", "best"):
            torch.testing.assert_close(ends[0][part], ends[1][part], rtol=0, atol=0)
        ours, theirs = (content(directory / "models" / "autoencoder.json") for directory in (folder, FIRST))
        self.assertEqual(ours, theirs)

    def test_has_every_property_that_monai_checks(self) -> None:
        for files, options in (("train_autoencoder", SMALL), (("train", "train_latent"), DIFFUSION)):
            names = (files,) if isinstance(files, str) else files
            with working_directory(ROOT):
                workflow = monai.bundle.create_workflow(
                    config_file=[f"bundles/skin_lesion/configs/{name}.json" for name in names],
                    workflow_type="train",
                    logging_file=False,
                    **{**options, "image_size": 16, "ckpt_dir": str(FIRST / "models"), "output_dir": str(TEMPORARY)},
                )
                self.assertEqual(workflow.check_properties(), [])

    def test_training_does_not_harm_a_model_on_the_latents_of_another(self) -> None:
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            train_first(SECOND)
        self.assertIn("Choose another folder (--ckpt_dir)", message_of(caught.exception))
        space_of_model(ModelDescription.load(SECOND / "models" / "model.json"), SECOND / "models", CPU)


class TestSecondStage(unittest.TestCase):
    def test_folder_needs_nothing_else(self) -> None:
        for name in ("autoencoder.pt", "autoencoder.json"):
            self.assertTrue((SECOND / "models" / name).is_file())
        described = ModelDescription.load(SECOND / "models" / "model.json")
        first = FirstStage.load(FIRST / "models" / "autoencoder.pt", CPU)
        self.assertEqual(described.autoencoder, first.description)
        self.assertEqual((described.network["in_channels"], described.network["out_channels"]), (4, 4))
        self.assertEqual((described.image_shape, described.noise_shape), ((3, 16, 16), (4, 4, 4)))
        self.assertEqual(checkpoint(SECOND, 3)["options"]["autoencoder"], first.description.fingerprint)
        self.assertNotIn(str(TEMPORARY), (SECOND / "models" / "model.json").read_text())
        pictures = {path.name for path in (SECOND / "output" / "training").iterdir()}
        self.assertEqual(pictures, {f"{name}_epoch0001.png" for name in ("samples", "denoising", "counterfactuals")})

    def test_identity_autoencoder_is_pixel_space_bit_for_bit(self) -> None:
        """Weights, predictions and distances of samples of a whole training."""
        with_it, without = TEMPORARY / "identity", TEMPORARY / "pixels"
        stage = {"_target_": f"{__name__}.identity_stage", "source": "@source"}
        options = {**DIFFUSION, "counterfactual_pictures": 0}
        train_second(with_it, **{**options, "first_stage": stage})
        runs.train(without, config_file="bundles/skin_lesion/train.json", **options)
        weights = [load_weights(directory / "models" / "model.pt") for directory in (with_it, without)]
        torch.testing.assert_close(*weights, rtol=0, atol=0)
        for file in ("predictions.csv", "metrics.json", "generation.json", "summary.json"):
            self.assertEqual(*((directory / "output" / file).read_text() for directory in (with_it, without)))

    def test_any_autoencoder_of_monai(self) -> None:
        network = AutoencoderKL(2, 3, 3, 1, (4, 8), (False, False), 2, 4, include_fc=False)
        path = TEMPORARY / "any.pt"
        torch.save(network.state_dict(), path)
        names = ("spatial_dims", "in_channels", "out_channels", "num_res_blocks", "channels", "attention_levels")
        values = (2, 3, 3, 1, [4, 8], [False, False])
        definition = {**dict(zip(names, values, strict=True)), "latent_channels": 2, "norm_num_groups": 4}
        parser = monai.bundle.ConfigParser()
        parser.read_config([ROOT / "bundles/skin_lesion/configs" / f"train{part}.json" for part in ("", "_latent")])
        with working_directory(ROOT):
            parser.update({**PHANTOMS, "image_size": 16, "autoencoder": str(path)})
            parser.update({"autoencoder_def": {**definition, "include_fc": False}})
            self.assertEqual(parser.get_parsed_content("latent_shape"), (2, 8, 8))
            joint = parser.get_parsed_content("network_def")
        self.assertEqual(joint.config["in_channels"], 2)

    def test_says_what_to_train_first(self) -> None:
        with self.assertRaises((ValueError, RuntimeError)) as caught:
            train_second(TEMPORARY / "nothing")
        self.assertIn("autoencoder.pt. Train one with train_autoencoder.json", message_of(caught.exception))


class TestPrograms(unittest.TestCase):
    def setUp(self) -> None:
        self.output = Path(tempfile.mkdtemp(dir=TEMPORARY))
        self.description = ModelDescription.load(SECOND / "models" / "model.json")
        self.network = self.description.build_network().eval()
        self.network.load_state_dict(load_weights(SECOND / "models" / "model.pt"))
        self.space = space_of_model(self.description, SECOND / "models", CPU)

    def test_evaluation_repeats_the_figures_of_the_training(self) -> None:
        use("evaluate", self.output)
        for file in ("metrics.json", "predictions.csv"):
            self.assertEqual((self.output / file).read_text(), (SECOND / "output" / file).read_text())

    def test_inference_encodes(self) -> None:
        use("inference", self.output)
        items = source_of_model(self.description, None).part("test")
        prepare = preprocessing_of_model(self.description)
        images = torch.stack([prepare(item)["image"] for item in items])
        with torch.no_grad():
            mean, _ = self.space.autoencoder.encode(images)
            logits = self.network(mean * self.space.scale_factor).double().numpy()
        expected = self.description.decision.probabilities(logits)
        found = rows(self.output / "predictions.csv")
        for k, name in enumerate(self.description.class_names):
            np.testing.assert_allclose([float(row[f"probability_{name}"]) for row in found], expected[:, k], atol=2e-6)

    def test_generation_decodes(self) -> None:
        options = {"num_samples": 2, "num_inference_steps": 2, "class_label": "mel", "seed": 3}
        use("generate", self.output, **options)
        scheduler = self.description.build_scheduler()
        inferer = JointDiffusionInferer(scheduler)
        noise = noise_of_draws([0, 1], (4, 4, 4), 3)
        latents = SamplingInferer(inferer, scheduler, 2, 3, self.description.class_names.index("mel"))
        with torch.no_grad():
            images = self.space.autoencoder.decode(latents(noise, self.network) / self.space.scale_factor)
        for n, image in enumerate(images):
            expected = np.asarray(image.clamp(-1, 1)).transpose(1, 2, 0) * 127.5 + 127.5
            found = np.asarray(Image.open(self.output / f"sample_{n:05d}.png"))
            np.testing.assert_allclose(found, expected, atol=0.51)

    def test_counterfactuals_are_images(self) -> None:
        options = {"num_inference_steps": 2, "scale": 1.0, "probability": None, "limit": 2, "region_fraction": 0.3}
        use("counterfactual", self.output, **options)
        self.assertEqual(len(rows(self.output / "counterfactuals.csv")), 2)
        for case in (self.output / "cases").iterdir():
            for name in ("counterfactual", "reconstruction", "difference", "region"):
                self.assertEqual(Image.open(case / f"{name}.png").size, (16, 16))

    def test_diffusion_classification_with_maps(self) -> None:
        options = {"num_draws": 2, "limit": 3, "reference_limit": 2, "maps": True, "error_rate": None}
        use("diffusion_classify", self.output, **options)
        self.assertEqual(len(rows(self.output / "diffusion_predictions.csv")), 3)
        self.assertEqual(len(list((self.output / "maps").glob("*.png"))), 3)


class TestVolumes(unittest.TestCase):
    def test_both_stages_and_samples(self) -> None:
        folder, output = TEMPORARY / "volumes", TEMPORARY / "generated"
        options: dict[str, Any] = {"spatial_dims": 3, "image_size": 8, "epochs": 1}
        levels = {"autoencoder_def#channels": [4, 8], "autoencoder_def#num_res_blocks": 1}
        levels["autoencoder_def#attention_levels"] = [False, False]
        train_first(folder, "chest_xray", **options, **levels)
        few = {"num_samples": 0, "counterfactual_pictures": 0, "class_conditional": False}
        train_second(folder, "chest_xray", **options, **few)
        use("generate", output, folder, "chest_xray", num_samples=1, num_inference_steps=2)
        volume = monai.transforms.LoadImage(image_only=True)(output / "sample_00000.nii.gz")
        self.assertEqual(tuple(volume.shape), (8, 8, 8))
        self.assertGreater(float(volume.std()), 0)


if __name__ == "__main__":
    unittest.main()
