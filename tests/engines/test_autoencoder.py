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

"""Training of an autoencoder: its figures and pictures, what it leaves, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import unittest
from typing import Any
from unittest import mock

import numpy as np
import torch
from monai.data import Dataset, MetaTensor
from parameterized import parameterized
from PIL import Image

from monai_jointdiff.engines import (
    AutoencoderPrepareBatch,
    AutoencoderReport,
    ModelDescription,
    ReconstructionPictures,
    autoencoder,
    check_autoencoder_folder,
    evaluate_reconstruction,
    make_perceptual,
    open_first_stage,
    reconstruction_metrics,
    start_autoencoder,
)
from monai_jointdiff.handlers import BestModel
from monai_jointdiff.visualize import image_grid
from tests.bundles.runs import temporary_folder
from tests.engines import test_first_stage as small
from tests.engines.small_run import use_one_thread
from tests.inferers.autoencoders import IdentityAutoencoder

CPU = torch.device("cpu")


def setUpModule() -> None:
    use_one_thread()


class Darkening(IdentityAutoencoder):
    """Reconstructions are darker by a tenth of a unit."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents - 0.1


class TestPrepareBatch(unittest.TestCase):
    def test_image_is_input_and_target(self) -> None:
        image = torch.rand(2, 1, 4, 4, dtype=torch.float64)
        prepared = AutoencoderPrepareBatch()({"image": MetaTensor(image)}, "cpu", dtype=torch.float32)
        for tensor in prepared:
            self.assertIs(type(tensor), torch.Tensor)
            torch.testing.assert_close(tensor, image.float())


class TestFigures(unittest.TestCase):
    @parameterized.expand([(2, 12), (2, 8), (3, 8)])
    def test_of_a_known_error(self, spatial_dims: int, size: int) -> None:
        """A constant error of .1 in a range of 2: 20 log10(2 / .1) dB."""
        data = small.source(spatial_dims, size)
        found = evaluate_reconstruction(Darkening().eval(), data, "val", CPU, batch_size=3)
        self.assertEqual(set(found), {"l1", "psnr", "ssim"})
        self.assertAlmostEqual(found["l1"], 0.1, places=5)
        self.assertAlmostEqual(found["psnr"], 20 * np.log10(2 / 0.1), places=3)
        exact = evaluate_reconstruction(IdentityAutoencoder().eval(), data, "val", CPU)
        self.assertEqual((exact["l1"], round(exact["ssim"], 5)), (0.0, 1.0))
        self.assertLess(found["ssim"], exact["ssim"])

    def test_names_have_their_prefix(self) -> None:
        self.assertEqual(list(reconstruction_metrics(2, (8, 8), "val_")), ["val_l1", "val_psnr", "val_ssim"])


class TestPictures(unittest.TestCase):
    @parameterized.expand([(2,), (3,)])
    def test_images_above_reconstructions(self, spatial_dims: int) -> None:
        data = small.source(spatial_dims)
        dataset = Dataset(data.part("train"), data.preprocessing())
        network = small.autoencoder(spatial_dims=spatial_dims)
        (stack,) = ReconstructionPictures(dataset, 4)(network).values()
        images = torch.stack([dataset[index]["image"] for index in (0, 4, 7, 11)])
        torch.testing.assert_close(stack[0], images)
        with torch.no_grad():
            torch.testing.assert_close(stack[1], network.reconstruct(images))


class TestReport(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)
        self.source = small.source()

    def report(self, **options: Any) -> AutoencoderReport:
        network = small.autoencoder(seed=9)
        arguments = (self.source, network, small.ARGUMENTS, self.folder / "models", self.folder / "output", CPU)
        return AutoencoderReport(*arguments, num_images=3, **options)

    def test_leaves_an_autoencoder_to_train_a_diffusion_model_on(self) -> None:
        (self.folder / "models").mkdir()
        torch.save(small.autoencoder().state_dict(), self.folder / "models" / "autoencoder.pt")
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            summary = self.report().run()
        stage = open_first_stage(self.folder / "models", self.source, CPU)
        self.assertEqual(stage.description, small.first_stage().description)
        assert summary is not None
        self.assertEqual(json.loads((self.folder / "output" / "summary.json").read_text()), summary)
        self.assertEqual((summary["latents"], summary["data"]), ("2 x 4 x 4", "phantoms of seed 0"))
        for part, words in (("val", "validation"), ("test", "test")):
            for name, value in evaluate_reconstruction(small.autoencoder(), self.source, part, CPU).items():
                self.assertEqual(summary[f"{words} {name}"], value)
        self.assertIn("test psnr", text.getvalue())
        dataset = Dataset(self.source.part("test"), self.source.preprocessing())
        images = torch.stack([dataset[index]["image"] for index in (0, 2, 3)])
        with torch.no_grad():
            pairs = torch.cat([images, small.autoencoder().reconstruct(images)])
        shown = np.asarray(Image.open(self.folder / "output" / "reconstructions.png"))
        np.testing.assert_array_equal(shown, image_grid(pairs, columns=3))

    def test_run_without_a_validation_validates_first(self) -> None:
        best = BestModel(small.autoencoder(), self.folder / "models", "val_l1", False, "autoencoder.pt")

        def validate() -> None:
            best.value = 0.1
            (self.folder / "models").mkdir()
            torch.save(small.autoencoder().state_dict(), best.path)

        with contextlib.redirect_stdout(io.StringIO()):
            self.report(best=best, evaluator=mock.Mock(run=validate)).run()
        self.assertTrue((self.folder / "models" / "autoencoder.json").is_file())

    def test_no_weights(self) -> None:
        with self.assertRaisesRegex(ValueError, "this run left no autoencoder.pt in .*models"):
            self.report().run()


class TestStart(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)
        self.stage = small.first_stage()
        self.stage.save(self.folder)

    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def test_new_run_removes_an_old_autoencoder(self) -> None:
        check_autoencoder_folder(self.folder)
        self.assertEqual(self.files(), {"autoencoder.pt", "autoencoder.json"})
        start_autoencoder(self.folder)
        self.assertEqual(self.files(), set())

    def test_model_on_its_latents_is_kept_from_harm(self) -> None:
        model = ModelDescription({}, {}, small.source().description(), autoencoder=self.stage.description)
        model.save(self.folder / "model.json")
        check_autoencoder_folder(self.folder)  # no weights: nothing to keep
        (self.folder / "model.pt").touch()
        for refuse in (check_autoencoder_folder, start_autoencoder):
            with self.assertRaisesRegex(ValueError, "holds a diffusion model on the latents.*Choose another folder"):
                refuse(self.folder)
        self.assertLessEqual({"autoencoder.pt", "autoencoder.json", "model.pt"}, self.files())


class TestPerceptual(unittest.TestCase):
    def test_none_is_asked_for(self) -> None:
        self.assertIsNone(make_perceptual(0.0, None, 2, 1))

    def test_takes_the_weights_at_hand(self) -> None:
        file = temporary_folder(self) / "resnet50.pt"
        file.touch()
        with (
            mock.patch.object(autoencoder, "optional_import", return_value=(None, True)),
            mock.patch.object(autoencoder, "PerceptualLoss") as distance,
        ):
            self.assertIs(make_perceptual(0.5, str(file), 3, 1), distance.return_value)
            distance.assert_called_once_with(3, "resnet50", pretrained=True, pretrained_path=str(file))
            distance.side_effect = RuntimeError("Missing key(s)")
            with self.assertRaisesRegex(ValueError, r"resnet50.pt holds no weights of ResNet-50: Missing key\(s\)"):
                make_perceptual(0.5, str(file), 3, 1)

    def test_is_refused_where_it_cannot_be(self) -> None:
        file = temporary_folder(self) / "resnet50.pt"
        for weights in (None, "null", str(file)):
            with self.assertRaisesRegex(
                ValueError, "weights of torchvision's ResNet-50 in a file, got .*nothing is do"
            ):
                make_perceptual(1.0, weights, 2, 1)
        file.touch()
        with self.assertRaisesRegex(ValueError, "1 or 3 channels, these have 2"):
            make_perceptual(1.0, file, 2, 2)
        with mock.patch.object(autoencoder, "optional_import", return_value=(None, False)):
            with self.assertRaisesRegex(ValueError, "needs torchvision"):
                make_perceptual(1.0, file, 2, 1)


if __name__ == "__main__":
    unittest.main()
