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

"""Autoencoders below a diffusion model: their description, weights of several origins, their scale."""

from __future__ import annotations

import json
import unittest
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.networks.nets import AutoencoderKL
from parameterized import parameterized

from monai_jointdiff.data import ImageSource, open_source
from monai_jointdiff.engines import (
    AutoencoderDescription,
    FirstStage,
    ModelDescription,
    autoencoder_arguments,
    build_autoencoder,
    describe_autoencoder,
    latent_scale_factor,
    load_autoencoder_weights,
    open_first_stage,
    space_of_model,
    start_model,
    weights_fingerprint,
)
from tests.bundles.runs import temporary_folder
from tests.engines.small_run import use_one_thread

CPU = torch.device("cpu")
ARGUMENTS: dict[str, Any] = {
    "spatial_dims": 2,
    "num_res_blocks": [1, 1],
    "channels": [4, 8],
    "attention_levels": [False, True],
    "latent_channels": 2,
    "norm_num_groups": 4,
    "include_fc": False,
}


def setUpModule() -> None:
    use_one_thread()


def source(spatial_dims: int = 2, image_size: int = 8, **options: Any) -> ImageSource:
    return open_source(spatial_dims=spatial_dims, image_size=image_size, **{"phantom_counts": (12, 4, 4), **options})


def autoencoder(seed: int = 0, **options: Any) -> AutoencoderKL:
    torch.manual_seed(seed)
    return build_autoencoder({**ARGUMENTS, **options}).eval()


def first_stage(**options: Any) -> FirstStage:
    return describe_autoencoder(autoencoder(**options), {**ARGUMENTS, **options}, source(), CPU)


def old_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as monai-generative would have named them, with its attention's layer that was never used."""
    old = {}
    for name, value in weights.items():
        old[name.replace(".attn.to_", ".to_").replace("postconv", "conv")] = value
        if ".attn.to_q." in name:
            old[name.replace(".attn.to_q.", ".proj_attn.")] = torch.randn_like(value)
    return old


class TestDescription(unittest.TestCase):
    def test_comes_back_from_its_file(self) -> None:
        folder = temporary_folder(self)
        stage = first_stage()
        stage.save(folder)
        loaded = FirstStage.load(folder / "autoencoder.pt", CPU)
        self.assertEqual(loaded.description, stage.description)
        self.assertEqual(stage.description.data, source().description())
        images = torch.rand(2, 1, 8, 8)
        for space in (stage.space, loaded.space):
            latents = space.encode(images)
            torch.testing.assert_close(latents, stage.network.encode(images)[0] * stage.description.scale_factor)
            torch.testing.assert_close(space.decode(latents), stage.network.reconstruct(images), rtol=1e-4, atol=1e-5)
        self.assertFalse(loaded.network.training or any(p.requires_grad for p in loaded.network.parameters()))

    @parameterized.expand([(2, (8, 12), (2, 4, 6)), (3, (4, 8, 4), (2, 2, 4, 2))])
    def test_shape_of_the_latents(self, spatial_dims: int, size: tuple[int, ...], expected: tuple[int, ...]) -> None:
        options = {"spatial_dims": spatial_dims}
        description = AutoencoderDescription(autoencoder_arguments({**ARGUMENTS, **options}), 1.0, "")
        self.assertEqual(description.latent_shape(size), expected)
        mean, _ = autoencoder(**options).encode(torch.zeros(1, 1, *size))
        self.assertEqual(tuple(mean.shape[1:]), expected)

    def test_size_that_is_not_divisible(self) -> None:
        description = first_stage().description
        with self.assertRaisesRegex(ValueError, "2 pixels one; each of image_size must be divisible by it, got 8 x 9"):
            description.latent_shape((8, 9))

    def test_wrong_content(self) -> None:
        content = asdict(first_stage().description)
        with self.assertRaisesRegex(ValueError, "format_version is 5, .* reads 1"):
            AutoencoderDescription.from_dict({**content, "format_version": 5})
        with self.assertRaisesRegex(ValueError, "missing in the autoencoder's description: scale_factor, fingerprint"):
            AutoencoderDescription.from_dict({"network": ARGUMENTS})
        for wrong in (0.0, -1.0, float("nan"), float("inf")):
            with self.assertRaisesRegex(ValueError, "scale_factor must be > 0"):
                AutoencoderDescription.from_dict({**content, "scale_factor": wrong})

    def test_defaults_are_written_out(self) -> None:
        arguments = autoencoder_arguments(ARGUMENTS)
        self.assertEqual((arguments["norm_eps"], arguments["use_convtranspose"]), (1e-6, False))
        self.assertEqual(json.loads(json.dumps(arguments)), arguments)
        old = {**ARGUMENTS, "num_channels": (4, 8)}
        del old["channels"]
        self.assertEqual(autoencoder_arguments(old), arguments)

    @parameterized.expand(
        [
            ({"spatial_dims": 2, "chanels": [4]}, "unknown: chanels. MONAI's AutoencoderKL takes spatial_dims, in_ch"),
            ({"channels": [4]}, "missing: spatial_dims"),
            ("AutoencoderKL", "a dictionary of AutoencoderKL's arguments expected, got 'AutoencoderKL'"),
        ]
    )
    def test_wrong_arguments(self, definition: Any, message: str) -> None:
        with self.assertRaisesRegex(ValueError, message):
            autoencoder_arguments(definition)

    def test_other_weights_have_another_fingerprint(self) -> None:
        weights = autoencoder().state_dict()
        fingerprint = weights_fingerprint(weights)
        self.assertEqual(weights_fingerprint(dict(reversed(weights.items()))), fingerprint)
        first = next(iter(weights))
        changed = weights[first].clone()
        changed.view(-1)[-1] += 1e-6
        for other in ({**weights, first: changed}, {**weights, "new": torch.zeros(())}, old_names(weights)):
            self.assertNotEqual(weights_fingerprint(other), fingerprint)


class TestScale(unittest.TestCase):
    @parameterized.expand([(2,), (3,)])
    def test_scaled_latents_of_the_training_images_have_unit_deviation(self, spatial_dims: int) -> None:
        data, network = source(spatial_dims), autoencoder(spatial_dims=spatial_dims)
        prepare = data.preprocessing()
        images = torch.stack([prepare(item)["image"] for item in data.part("train")])
        with torch.no_grad():
            latents = np.asarray(network.encode(images)[0], dtype=np.float64)
        self.assertAlmostEqual(latent_scale_factor(network, data, CPU, batch_size=5), 1 / latents.std(), places=5)
        fewer = 1 / latents[::3].std()  # 4 of 12 images
        self.assertAlmostEqual(latent_scale_factor(network, data, CPU, max_images=4), fewer, places=5)

    def test_equal_latents_are_refused(self) -> None:
        network = autoencoder()
        torch.nn.init.zeros_(network.quant_conv_mu.conv.weight)
        torch.nn.init.constant_(network.quant_conv_mu.conv.bias, 0.3)
        with self.assertRaisesRegex(ValueError, "variance of the latents is .*they tell nothing of the images"):
            latent_scale_factor(network, source(), CPU)


class TestWeights(unittest.TestCase):
    def test_of_monai_generative(self) -> None:
        network, images = autoencoder(), torch.rand(2, 1, 8, 8)
        path = temporary_folder(self) / "old.pt"
        torch.save(old_names(network.state_dict()), path)
        loaded = autoencoder(seed=1)
        load_autoencoder_weights(loaded, path)
        torch.testing.assert_close(loaded.reconstruct(images), network.reconstruct(images), rtol=0, atol=0)
        with self.assertRaisesRegex(ValueError, "weights of monai-generative, .* say include_fc false"):
            load_autoencoder_weights(autoencoder(include_fc=True), path)

    def test_that_do_not_fit(self) -> None:
        path = temporary_folder(self) / "weights.pt"
        for weights in (autoencoder(channels=[8, 8]).state_dict(), {"a": torch.zeros(1)}):
            torch.save(weights, path)
            with self.assertRaisesRegex(ValueError, "weights.pt does not fit the autoencoder's arguments"):
                load_autoencoder_weights(autoencoder(), path)


class TestOpen(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)

    def file(self, **options: Any) -> Path:
        path = self.folder / "any.pt"
        torch.save(autoencoder(**options).state_dict(), path)
        return path

    def test_folder_of_a_training_and_its_file(self) -> None:
        stage = first_stage()
        stage.save(self.folder)
        for path in (self.folder, self.folder / "autoencoder.pt"):
            self.assertEqual(open_first_stage(path, source(), CPU).description, stage.description)
        self.assertEqual(open_first_stage(self.folder, source(image_size=16), CPU, "null").description.downsampling, 2)

    def test_any_file_with_its_arguments(self) -> None:
        path = self.file()
        (self.folder / "any.json").write_text(json.dumps(ARGUMENTS), encoding="utf-8")
        for definition in (None, ARGUMENTS):
            stage = open_first_stage(path, source(), CPU, definition)
            self.assertIsNone(stage.description.data)
            self.assertEqual(stage.description, replace(first_stage().description, data=None))

    def test_errors_say_what_is_missing(self) -> None:
        with self.assertRaisesRegex(ValueError, "there is no .*autoencoder.pt. Train one with train_autoencoder.json"):
            open_first_stage(self.folder, source(), CPU)
        with self.assertRaisesRegex(ValueError, "cannot read the arguments of the autoencoder from .*any.json"):
            open_first_stage(self.file(), source(), CPU)
        (self.folder / "any.json").write_text("[]", encoding="utf-8")
        with self.assertRaisesRegex(ValueError, "any.json holds no JSON object"):
            open_first_stage(self.file(), source(), CPU)

    def test_data_that_do_not_fit(self) -> None:
        for definition in ({"in_channels": 3, "out_channels": 3}, {"spatial_dims": 3}):
            name, value = next(iter(definition.items()))
            with self.assertRaisesRegex(ValueError, rf"{name} {value} \(of the images: [12]\)"):
                open_first_stage(self.file(**definition), source(), CPU, {**ARGUMENTS, **definition})
        with self.assertRaisesRegex(ValueError, "must be divisible by it, got 9 x 9"):
            open_first_stage(self.file(), source(image_size=9), CPU, ARGUMENTS)
        first_stage().save(self.folder)
        window = source(intensity={"kind": "window", "window": (0.0, 100.0)})
        with self.assertRaisesRegex(ValueError, "trained on images scaled by .*dtype.*, those of phantoms .*window"):
            open_first_stage(self.folder, window, CPU)

    def test_weights_that_were_exchanged(self) -> None:
        first_stage().save(self.folder)
        torch.save(autoencoder(seed=1).state_dict(), self.folder / "autoencoder.pt")
        with self.assertRaisesRegex(ValueError, "is not the autoencoder that autoencoder.json is about"):
            open_first_stage(self.folder, source(), CPU)


class TestModel(unittest.TestCase):
    """A diffusion model with the autoencoder beside it."""

    def setUp(self) -> None:
        self.folder = temporary_folder(self)
        self.stage = first_stage()
        self.model = ModelDescription({}, {}, source().description(), autoencoder=self.stage.description)

    def test_needs_nothing_but_its_folder(self) -> None:
        start_model(self.model, self.folder, first_stage=self.stage)
        self.assertEqual(
            {path.name for path in self.folder.iterdir()}, {"model.json", "autoencoder.pt", "autoencoder.json"}
        )
        described = ModelDescription.load(self.folder / "model.json")
        self.assertEqual(described, self.model)
        self.assertEqual((described.image_shape, described.noise_shape), ((1, 8, 8), (2, 4, 4)))
        space, images = space_of_model(described, self.folder, CPU), torch.rand(2, 1, 8, 8)
        self.assertEqual(space.scale_factor, self.stage.description.scale_factor)
        torch.testing.assert_close(space.encode(images), self.stage.space.encode(images), rtol=0, atol=0)

    def test_another_autoencoder_is_refused(self) -> None:
        start_model(self.model, self.folder, first_stage=self.stage)
        torch.save(autoencoder(seed=1).state_dict(), self.folder / "autoencoder.pt")
        with self.assertRaisesRegex(
            ValueError, "is not the autoencoder that model.json is about: it was trained again"
        ):
            space_of_model(self.model, self.folder, CPU)
        (self.folder / "autoencoder.pt").unlink()
        with self.assertRaisesRegex(ValueError, "cannot read weights from .*autoencoder.pt"):
            space_of_model(self.model, self.folder, CPU)

    def test_model_on_images_has_none(self) -> None:
        model = replace(self.model, autoencoder=None)
        start_model(model, self.folder)
        content = json.loads((self.folder / "model.json").read_text())
        self.assertIsNone(content.pop("autoencoder"))
        for version in (1, 2):  # files of the first version do not mention autoencoders
            self.assertEqual(ModelDescription.from_dict({**content, "format_version": version}), model)
        self.assertEqual(model.noise_shape, (1, 8, 8))
        self.assertIsNone(space_of_model(model, self.folder, CPU).autoencoder)


if __name__ == "__main__":
    unittest.main()
