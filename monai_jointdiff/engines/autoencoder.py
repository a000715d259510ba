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

"""Training of the autoencoder below a diffusion model on latents: what stock engines need, and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader, Dataset
from monai.engines import PrepareBatch, SupervisedEvaluator
from monai.handlers import IgniteMetricHandler
from monai.inferers import Inferer
from monai.losses import PerceptualLoss
from monai.metrics import MAEMetric, PSNRMetric, SSIMMetric
from monai.networks.nets import AutoencoderKL
from monai.utils import optional_import
from torch import Tensor, nn

from monai_jointdiff.data import ImageSource
from monai_jointdiff.engines.bundle import json_word, load_weights
from monai_jointdiff.engines.description import ModelDescription
from monai_jointdiff.engines.explaining import spread
from monai_jointdiff.engines.first_stage import DESCRIPTION, WEIGHTS, describe_autoencoder
from monai_jointdiff.engines.training_report import writes_report
from monai_jointdiff.handlers.atomic import atomic_write_text
from monai_jointdiff.handlers.best_model import BestModel
from monai_jointdiff.inferers import AutoencoderInferer
from monai_jointdiff.visualize import format_table, image_grid, save_png

__all__ = [
    "AutoencoderPrepareBatch",
    "AutoencoderReport",
    "ReconstructionPictures",
    "check_autoencoder_folder",
    "evaluate_reconstruction",
    "make_perceptual",
    "reconstruction_metrics",
    "start_autoencoder",
]

_RANGE = 2.0  # of images in [-1, 1]
_LARGEST_WINDOW = 11  # pixels, of the structural similarity (Wang et al. 2004)


class AutoencoderPrepareBatch(PrepareBatch):
    """Turns a batch into the arguments of an autoencoder's training step: the image is input and target."""

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Prepare one batch.

        Args:
            batchdata: `image` (N, C, *spatial) in [-1, 1].
            device: of the results.
            non_blocking: as for `Tensor.to`.
            kwargs: further arguments of `Tensor.to`, for example `dtype`.

        Returns:
            the image, twice, a plain tensor.
        """
        image = torch.as_tensor(batchdata["image"]).as_subclass(Tensor)
        image = image.to(device=device, non_blocking=non_blocking, **kwargs)
        return image, image


def reconstruction_metrics(spatial_dims: int, image_size: Sequence[int], prefix: str = "") -> dict[str, Any]:
    """How near reconstructions are to images in [-1, 1], for a stock evaluator.

    Args:
        spatial_dims: 2 or 3.
        image_size: of the images: the window of the structural similarity is 11 pixels, or what fits.
        prefix: before the names.

    Returns:
        `l1` (mean absolute error), `psnr` (dB, of a range of 2) and `ssim` (at most 1), MONAI's, by name.
    """
    window = min(_LARGEST_WINDOW, *image_size)
    metrics = {
        "l1": MAEMetric(),
        "psnr": PSNRMetric(max_val=_RANGE),
        "ssim": SSIMMetric(spatial_dims, data_range=_RANGE, win_size=window - (window + 1) % 2),
    }
    return {
        prefix + name: IgniteMetricHandler(
            metric_fn=metric,
            output_transform=lambda output: (output["pred"].reconstruction, output["label"]),
        )
        for name, metric in metrics.items()
    }


def evaluate_reconstruction(
    network: nn.Module,
    source: ImageSource,
    part: str,
    device: torch.device,
    inferer: Inferer | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """Reconstruct a part of the data with a stock evaluator.

    Args:
        network: the autoencoder.
        source: the data.
        part: `train`, `val` or `test`.
        device: where the network is.
        inferer: reconstructs; None: in the precision of the network.
        batch_size: images at once.

    Returns:
        the figures of :func:`reconstruction_metrics`, means over the images.
    """
    metrics = reconstruction_metrics(source.spatial_dims, source.image_size)
    loader = DataLoader(Dataset(source.part(part), source.preprocessing()), batch_size=batch_size, num_workers=0)
    evaluator = SupervisedEvaluator(
        device=device,
        val_data_loader=loader,
        network=network,
        prepare_batch=AutoencoderPrepareBatch(),
        inferer=AutoencoderInferer() if inferer is None else inferer,
        key_val_metric={"l1": metrics["l1"]},  # without one, the engine of MONAI 1.6 ignores all metrics
        additional_metrics={name: metric for name, metric in metrics.items() if name != "l1"},
        decollate=False,
    )
    evaluator.run()
    return {name: float(evaluator.state.metrics[name]) for name in metrics}


class ReconstructionPictures:
    """Reconstructs the same images every time: a sampler for :class:`~monai_jointdiff.handlers.SampleImages`.

    Args:
        dataset: prepared items with `image`.
        num_images: S, evenly spread over the data set, at most.
    """

    def __init__(self, dataset: Any, num_images: int = 8) -> None:
        indices = spread(range(len(dataset)), num_images, "--num_images")
        images = [torch.as_tensor(dataset[index]["image"]).as_subclass(Tensor) for index in indices]
        self.images = torch.stack(images)

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> dict[str, Tensor]:
        """Reconstruct.

        Args:
            network: the autoencoder, in evaluation mode.

        Returns:
            `reconstructions`: (2, S, C, *spatial), the images above their reconstructions.
        """
        images = self.images.to(next(network.parameters()).device)
        return {"reconstructions": torch.stack([images, AutoencoderInferer()(images, network).reconstruction])}


def make_perceptual(
    weight: float, weights: str | Path | None, spatial_dims: int, in_channels: int
) -> PerceptualLoss | None:
    """MONAI's perceptual distance by torchvision's ResNet-50, with weights that are at hand; nothing is downloaded.

    Args:
        weight: of the term; with 0 there is none.
        weights: file with the network's state dict, for example RadImageNet's or ImageNet's.
        spatial_dims: 2; 3: the distance of half of the slices, drawn at random.
        in_channels: 1 or 3.

    Returns:
        the distance, None without the term.

    Raises:
        ValueError: when there are no weights, torchvision is missing, or images have other channels.
    """
    if not weight > 0:
        return None
    weights = json_word(weights)
    if weights is None or not Path(weights).is_file():
        raise ValueError(
            "make_perceptual: a perceptual term needs the weights of torchvision's ResNet-50 in a file, got "
            f"{weights!r} (nothing is downloaded): --perceptual_weights FILE, or --perceptual_weight 0."
        )
    if in_channels not in (1, 3):
        raise ValueError(f"make_perceptual: ResNet-50 sees images of 1 or 3 channels, these have {in_channels}.")
    if not optional_import("torchvision")[1]:
        raise ValueError("make_perceptual: a perceptual term needs torchvision; install it, or --perceptual_weight 0.")
    try:
        return PerceptualLoss(spatial_dims, "resnet50", pretrained=True, pretrained_path=str(weights))
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"make_perceptual: {weights} holds no weights of ResNet-50: {error}") from error


def check_autoencoder_folder(ckpt_dir: str | Path) -> None:
    """Refuse to train an autoencoder where a diffusion model needs the one that is there.

    Args:
        ckpt_dir: folder of `autoencoder.pt` and `autoencoder.json`.

    Raises:
        ValueError: when a trained diffusion model in the folder works on its latents.
    """
    folder = Path(ckpt_dir)
    if (folder / "model.pt").is_file() and ModelDescription.load(folder / "model.json").autoencoder is not None:
        raise ValueError(
            f"check_autoencoder_folder: {folder} holds a diffusion model on the latents of the {WEIGHTS} there, which "
            "a new one would make useless. Choose another folder (--ckpt_dir), or remove model.pt first."
        )


def start_autoencoder(ckpt_dir: str | Path) -> None:
    """Make room for the first weights that the training of an autoencoder is about to write: an old one goes.

    Args:
        ckpt_dir: folder of `autoencoder.pt` and `autoencoder.json`.
    """
    check_autoencoder_folder(ckpt_dir)
    for name in (WEIGHTS, DESCRIPTION):
        (Path(ckpt_dir) / name).unlink(missing_ok=True)


class AutoencoderReport:
    """What happens when the training of an autoencoder is over: measure its scale, test it, say it in one table.

    The best weights (by validation) are loaded; the scale factor is measured on training images; `autoencoder.pt` and
    `autoencoder.json` are what a diffusion model is then trained on. Reconstructions, in the network's own precision,
    are compared with the images of the validation and the test part. Runs on the first process only.

    Args:
        source: the data.
        network: the (EMA) autoencoder, changed in place.
        definition: its constructor arguments.
        ckpt_dir: holds `autoencoder.pt`; `autoencoder.json` is written beside it.
        output_dir: receives `summary.json` and `reconstructions.png`.
        device: where to run.
        best: the handler that wrote `autoencoder.pt`; None takes the file as it is.
        evaluator: the validation with `best` among its handlers, for a run that ended before its first.
        num_images: test images in the picture, each above its reconstruction.
        batch_size: images at once.
    """

    def __init__(
        self,
        source: ImageSource,
        network: AutoencoderKL,
        definition: Mapping[str, Any],
        ckpt_dir: str | Path,
        output_dir: str | Path,
        device: torch.device,
        best: BestModel | None = None,
        evaluator: SupervisedEvaluator | None = None,
        num_images: int = 8,
        batch_size: int = 64,
    ) -> None:
        self.source = source
        self.network = network
        self.definition = definition
        self.ckpt_dir = Path(ckpt_dir)
        self.output_dir = Path(output_dir)
        self.device = device
        self.best = best
        self.evaluator = evaluator
        self.num_images = num_images
        self.batch_size = batch_size

    def run(self) -> dict[str, Any] | None:
        """Write autoencoder.json, all numbers and the picture.

        Returns:
            the final table as a dictionary (also `summary.json`), None on all but the first process.

        Raises:
            ValueError: when there is no `autoencoder.pt`, because no validation gave a number.
        """
        if not writes_report(self.ckpt_dir / WEIGHTS, self.best, self.evaluator):
            return None
        self.network.load_state_dict(load_weights(self.ckpt_dir / WEIGHTS))
        stage = describe_autoencoder(self.network, self.definition, self.source, self.device)
        stage.save(self.ckpt_dir)
        summary: dict[str, Any] = {
            "data": self.source.name,
            "latents": " x ".join(map(str, stage.description.latent_shape(self.source.image_size))),
            "scale factor": stage.description.scale_factor,
        }
        for part, words in (("val", "validation"), ("test", "test")):
            figures = evaluate_reconstruction(self.network, self.source, part, self.device, batch_size=self.batch_size)
            summary.update({f"{words} {name}": value for name, value in figures.items()})
        atomic_write_text(self.output_dir / "summary.json", json.dumps(summary, indent=4) + "\n")
        self._draw()
        table = format_table([{"figure": key, "value": value} for key, value in summary.items()])
        print(
            f"\nfinal table\n{table}\nnumbers and pictures: {self.output_dir}\nautoencoder: {self.ckpt_dir / WEIGHTS}",
            flush=True,
        )
        return summary

    def _draw(self) -> None:
        """Test images in the first row, their reconstructions in the second."""
        dataset = Dataset(self.source.part("test"), self.source.preprocessing())
        pairs = ReconstructionPictures(dataset, self.num_images)(self.network)["reconstructions"]
        images = np.asarray(pairs.flatten(0, 1).clamp(-1, 1).cpu())
        save_png(image_grid(images, columns=pairs.shape[1]), self.output_dir / "reconstructions.png")
