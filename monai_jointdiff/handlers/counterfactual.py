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


"""Counterfactuals as files and a page, and as pictures while a network learns."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import nn

from monai_jointdiff.data.restoring import OriginalGrid, nifti_bytes, original_grid
from monai_jointdiff.inferers import CounterfactualInferer, CounterfactualRecord, CounterfactualResult
from monai_jointdiff.metrics import CounterfactualFigures, counterfactual_figures
from monai_jointdiff.visualize import (
    CounterfactualCase,
    counterfactual_panel,
    counterfactual_report,
    counterfactual_strip,
    png_bytes,
    save_png,
    to_tile,
)

from .atomic import atomic_write_bytes, atomic_write_text
from .predictions import patient_groups
from .utils import is_writing_process

__all__ = ["CounterfactualImages", "CounterfactualWriter", "read_counterfactual_records"]

_LONGEST_NAME = 80  # characters of a folder's name
_LOOKED_AT = 256  # items of a data set among which the pictures of a training are chosen
_SUFFIXES = re.compile(r"\.(nii\.gz|[A-Za-z0-9]{1,5})$")

_WRITTEN = re.compile(r"((counterfactual|reconstruction|difference|region)(_channel\d+)?\.(png|nii\.gz)|record\.json)$")
_Classify = Callable[[torch.Tensor], torch.Tensor]


class CounterfactualWriter:
    """Handler of an evaluator that makes counterfactuals: writes each of them, a table, and a page of all.

    ================================== ================================================================================
    file                               content
    ================================== ================================================================================
    `index.html`                       all cases on one page (:func:`~monai_jointdiff.visualize.counterfactual_report`)
    `counterfactuals.csv`              a row for each case
    `metrics.json`                     all figures of the run (:class:`~monai_jointdiff.metrics.CounterfactualFigures`),
                                       where there is a judge
    `cases/<name>/panel.png`           the case as a picture
    `cases/<name>/record.json`         what is needed to make it again, see :func:`read_counterfactual_records`
    `cases/<name>/counterfactual.*`    the counterfactual on the pixels of the original file
    `cases/<name>/reconstruction.*`    the factual reconstruction
    `cases/<name>/difference.*`        counterfactual minus reconstruction, signed
    `cases/<name>/region.*`            where change was allowed, if it was confined
    ================================== ================================================================================

    The images come back to the size of the original file, without the padding of the network's input. Of an image that
    lies in a patient (DICOM, NIfTI, NRRD) and of volumes they are `.nii.gz` files with the axes and the affine of the
    original and float32 values in [-1, 1]. Of all others they are 8-bit `.png` files: -1 is black, 1 is white; of the
    difference 128 is no change, and 255 and 0 are a change of +2 and -2; images of other than 1 or 3 channels are one
    file a channel. Of an image that was brought to several targets, all but panel and reconstruction are in folders
    `cases/<name>/to_<target>`.

    The evaluator must not decollate; its output's `pred` is a :class:`~monai_jointdiff.inferers.CounterfactualResult`,
    or a tuple of them, the same batch for several targets (:class:`~monai_jointdiff.engines.CounterfactualTargets`).
    Its batch has `name`, and if they are known `label`, `mask` (the true finding, outlined in the pictures) and
    `patient` (empty where it is not known; of slices the volume). Intervals are those of patients, and of images with
    several targets: what belongs together is drawn together, and fewer than ten are not drawn at all.

    Args:
        output_dir: folder for the files.
        class_names: names in the order of the logits.
        items: the items of the data set before they were prepared, with `image` (a file, an array, or the number of a
            phantom) and `name`; None: arrays are written on the pixels of the network. What `not_held_out` says (see
            :func:`~monai_jointdiff.engines.images_to_explain`) page and `metrics.json` say, too; `out_of` the page.
        multi_label: whether the classes are independent labels.
        title: of the page.
        channel_names: of the channels, shown for images of other than 1 or 3; None: they are not named.
        judge: the model that was explained, which maps images (B, C, *spatial) to probabilities (B, K), as
            :class:`~monai_jointdiff.engines.HeadJudge` does; None: no figures are measured.
        oracle: an independent classifier, in the same way; None: there is none.
        oracle_id: identity of its weights, for `metrics.json`.
        decide: the model's own rule, :meth:`~monai_jointdiff.engines.ModelDescription.decide`: what it calls images
            stands in the table, and beside a case where that is not the most probable class; None: it is not known.
        batch_size: images for each call of judge and oracle.

    Raises:
        ValueError: for an oracle without a judge.
    """

    def __init__(
        self,
        output_dir: str | Path,
        class_names: Sequence[str],
        items: Sequence[Mapping[Hashable, Any]] | None = None,
        multi_label: bool = False,
        title: str = "Counterfactual explanations",
        channel_names: Sequence[str] | None = None,
        judge: _Classify | None = None,
        oracle: _Classify | None = None,
        oracle_id: str | None = None,
        decide: Callable[[torch.Tensor], Any] | None = None,
        batch_size: int = 64,
    ) -> None:
        if oracle is not None and judge is None:
            raise ValueError("CounterfactualWriter: an oracle stands beside a judge, the model itself; got none.")
        self.output_dir = Path(output_dir)
        self.class_names = list(class_names)
        self.originals = None if items is None else {item["name"]: item["image"] for item in items}
        self.not_held_out = next((item["not_held_out"] for item in items or () if "not_held_out" in item), None)
        self.out_of = next((item["out_of"] for item in items or () if "out_of" in item), None)
        self.multi_label = multi_label
        self.title = title
        self.channel_names = channel_names
        self.judge = judge
        self.oracle = oracle
        self.oracle_id = oracle_id
        self.decide = decide
        self.batch_size = batch_size
        self._reset()

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator that does not decollate (`decollate: false`)."""
        engine.add_event_handler(Events.EPOCH_STARTED, lambda engine: self._reset())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _reset(self) -> None:
        self.cases: list[tuple[CounterfactualCase, ...]] = []  # of each image, a case for each target
        self._settings = ""
        self._shown_names: Sequence[str] | None = None
        self._folders: set[str] = set()
        self._measured: list[_Measured] = []

    def _write(self, engine: Engine) -> None:
        output: Any = engine.state.output
        batch: Any = engine.state.batch
        results: tuple[CounterfactualResult, ...]
        results = output["pred"] if isinstance(output["pred"], tuple) else (output["pred"],)
        self._settings = _settings_in_words(results[0].record)
        names, masks, labels = list(batch["name"]), batch.get("mask"), batch.get("label")
        one_picture = results[0].image.shape[1] in (1, 3)
        self._shown_names = None if one_picture else self.channel_names
        for index, name in enumerate(names):
            parts: dict[str, Any] = {
                "multi_label": self.multi_label,
                "name": name,
                "mask": None if masks is None else masks[index],
                "label": None if labels is None else self._label_in_words(labels[index]),
                "decide": self.decide,
            }
            cases = (
                CounterfactualCase.of_targets(results, index, self.class_names, **parts)
                if len(results) > 1
                else (CounterfactualCase.of(results[0], index, self.class_names, **parts),)
            )
            self._write_image(self.output_dir / "cases" / self._folder_name(name), cases, results, index, names)
            self.cases.append(cases)
        if self.judge is not None:
            patients = batch.get("patient", [""] * len(names))
            self._measured += [_Measured.of(result, names, patients, masks) for result in results]

    def _write_image(
        self,
        folder: Path,
        cases: Sequence[CounterfactualCase],
        results: Sequence[CounterfactualResult],
        index: int,
        names: list[str],
    ) -> None:
        """All files of one image."""
        for stale in [path for path in (*folder.glob("*"), *folder.glob("to_*/*")) if _WRITTEN.match(path.name)]:
            stale.unlink()  # of an earlier run, which may have had a region, other targets or another kind of file
        atomic_write_bytes(folder / "panel.png", png_bytes(counterfactual_panel(cases, self._shown_names)))
        grid = self._grid(cases[0].name, _array(results[0].counterfactual[index]))
        _write_image(folder, "reconstruction", grid.restore(_array(results[0].reconstruction[index])), grid)
        taken: set[str] = set()
        for case, result in zip(cases, results, strict=True):
            inner = folder if len(cases) == 1 else folder / f"to_{_free_name(case.class_names[case.target], taken)}"
            self._write_target(inner, result, index, names, grid)

    def _write_target(
        self, folder: Path, result: CounterfactualResult, index: int, names: list[str], grid: OriginalGrid
    ) -> None:
        """What there is of one image and one target."""
        restored = {
            name: grid.restore(_array(getattr(result, name)[index])) for name in ("counterfactual", "difference")
        }
        if result.region is not None:
            restored["region"] = (grid.restore(_array(result.region[index])) > 0.5).astype(np.float32)
        for name, image in restored.items():
            _write_image(folder, name, image, grid)
        content = {"name": names[index], **result.record.of_image(index), "batch": names}
        if result.record.region is not None:
            content["region"] = _pack(result.record.region[index])
        atomic_write_text(folder / "record.json", json.dumps(content, indent=4) + "\n")

    def _grid(self, name: str, image: np.ndarray) -> OriginalGrid:
        """The pixels of the original; those of the network for phantoms and where no original is known."""
        spatial = image.shape[1:]
        original = None if self.originals is None else self.originals.get(name)
        if original is None or isinstance(original, int):
            return OriginalGrid.of_array(spatial)
        return original_grid(original, len(spatial))

    def _folder_name(self, name: str) -> str:
        """A name below `cases` that no other case has."""
        return _free_name(_SUFFIXES.sub("", name).replace("/", "__"), self._folders)

    def _label_in_words(self, label: Any) -> str | None:
        """The true class or labels; None where they are unknown."""
        values = torch.as_tensor(label)
        if values.ndim == 0:
            return self.class_names[int(values)] if values >= 0 else None
        present = ", ".join(name for name, value in zip(self.class_names, values, strict=True) if value == 1)
        return present or (None if bool((values < 0).any()) else "none")

    def _finish(self, engine: Engine) -> None:
        atomic_write_text(self.output_dir / "counterfactuals.csv", self._table())  # before anything that may fail
        figures = self._figures()
        if figures is not None:
            content = {"oracle_id": self.oracle_id, **figures.as_dict()}
            atomic_write_text(self.output_dir / "metrics.json", json.dumps(content, indent=4) + "\n")
        page = counterfactual_report(self.cases, self.title, self._settings, self._shown_names, figures, self.out_of)
        atomic_write_text(self.output_dir / "index.html", page)

    def _figures(self) -> CounterfactualFigures | None:
        """All figures of the run; None without a judge."""
        if self.judge is None:
            return None
        every = _Measured.joined(self._measured)
        figures = counterfactual_figures(
            every.images,
            every.reconstructions,
            every.counterfactuals,
            every.target,
            every.enforce,
            classify=self.judge,
            oracle=self.oracle,
            masks=every.masks,
            multi_label=self.multi_label,
            class_names=self.class_names,
            groups=patient_groups(every.units),
            batch_size=self.batch_size,
        )
        if self.not_held_out is None:
            return figures
        return replace(figures, settings={**figures.settings, "images": self.not_held_out})

    def _table(self) -> str:
        stages = ("image", "reconstruction", "counterfactual")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        probabilities = [f"probability_{name}_{stage}" for stage in stages for name in self.class_names]
        figures = ["reached", "already", "scale", "l1_input", "l1_reconstruction", "l1_encoding"]
        figures += ["network_calls", "seconds", "decision", "decision_counterfactual"]
        writer.writerow(["image", "label", "prediction", "target", "enforce", *probabilities, *figures])
        for case in (case for cases in self.cases for case in cases):
            values = (
                *case.probabilities,
                *case.probabilities_reconstruction,
                *case.probabilities_counterfactual,
            )
            target = self.class_names[case.target]
            writer.writerow(
                [case.name, case.label or "", case.prediction, target, case.enforce]
                + [f"{value:.6f}" for value in values]
                + [case.reached, case.already, f"{case.scale:.6g}"]
                + [f"{value:.6f}" for value in (case.l1_input, case.l1_reconstruction, case.l1_encoding)]
                + [f"{case.network_calls:.1f}", f"{case.seconds:.3f}"]
                + [case.decision or "", case.decision_counterfactual or ""]
            )
        return text.getvalue()


@dataclass(frozen=True)
class _Measured:
    """What the figures are measured on, of one batch and one target; all on the CPU."""

    images: torch.Tensor
    reconstructions: torch.Tensor
    counterfactuals: torch.Tensor
    masks: torch.Tensor | None
    target: tuple[int, ...]
    enforce: tuple[bool, ...]
    units: tuple[str, ...]  # the patient, or where it is not known the image

    @classmethod
    def of(cls, result: CounterfactualResult, names: Sequence[str], patients: Sequence[str], masks: Any) -> _Measured:
        shape = (len(names), 1, *result.image.shape[2:])
        return cls(
            images=_tensor(result.image),
            reconstructions=_tensor(result.reconstruction),
            counterfactuals=_tensor(result.counterfactual),
            masks=None if masks is None else (_tensor(masks).reshape(shape) > 0.5).float(),
            target=result.record.target,
            enforce=result.record.enforce,
            units=tuple(patient or f"image {name}" for name, patient in zip(names, patients, strict=True)),
        )

    @classmethod
    def joined(cls, parts: Sequence[_Measured]) -> _Measured:
        masks = [part.masks for part in parts if part.masks is not None]
        return cls(
            images=torch.cat([part.images for part in parts]),
            reconstructions=torch.cat([part.reconstructions for part in parts]),
            counterfactuals=torch.cat([part.counterfactuals for part in parts]),
            masks=torch.cat(masks) if len(masks) == len(parts) else None,
            target=tuple(value for part in parts for value in part.target),
            enforce=tuple(value for part in parts for value in part.enforce),
            units=tuple(value for part in parts for value in part.units),
        )


class CounterfactualImages:
    """Handler of a trainer: shows every few epochs counterfactuals of the same images, in TensorBoard and as PNG files.

    One row an image: the image, its factual reconstruction, its counterfactual and the change in color, with what the
    network says of each. A multi-class network is asked for the most probable other class; a multi-label one for the
    opposite of a label, of each image the next label in turn. The images are taken from all classes in turn.

    Args:
        inferer: makes the counterfactuals; few steps are enough to see whether they mean anything.
        dataset: its items have `image` (C, *spatial) in [-1, 1], `label`, and if it is known `mask`.
        network: the network, in general the average (`ema.ema_model`). Its mode is kept.
        directory: of the files `counterfactuals_epoch<epoch>.png`, made when it is missing.
        class_names: names in the order of the logits.
        num_images: number of images, at most those of the data set.
        multi_label: whether the classes are independent labels.
        interval: epochs between two pictures, >= 1.
        summary_writer: a TensorBoard `SummaryWriter`; None: PNG files only.

    Raises:
        ValueError: for fewer than one image or an interval below 1.
    """

    def __init__(
        self,
        inferer: CounterfactualInferer,
        dataset: Any,
        network: nn.Module,
        directory: str | Path,
        class_names: Sequence[str],
        num_images: int = 4,
        multi_label: bool = False,
        interval: int = 1,
        summary_writer: Any = None,
    ) -> None:
        if num_images < 1 or interval < 1:
            raise ValueError(
                f"CounterfactualImages: at least one image and an interval >= 1 epoch expected, got {num_images} and "
                f"{interval}."
            )
        self.inferer = inferer
        self.dataset = dataset
        self.network = network
        self.directory = Path(directory)
        self.class_names = list(class_names)
        self.num_images = num_images
        self.multi_label = multi_label
        self.interval = interval
        self.summary_writer = summary_writer
        self._items: list[Mapping[Hashable, Any]] | None = None

    def attach(self, engine: Engine) -> None:
        """Register with a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)

    def __call__(self, engine: Engine) -> None:
        """Draw and write the picture of the present epoch; only rank 0 does."""
        if not is_writing_process():
            return
        picture = self.picture()
        save_png(picture, self.directory / f"counterfactuals_epoch{engine.state.epoch:04d}.png")
        if self.summary_writer is not None:
            self.summary_writer.add_image("counterfactuals", picture, global_step=engine.state.epoch, dataformats="HWC")

    def picture(self) -> np.ndarray:
        """The counterfactuals of the present network as one picture, uint8 (rows, columns, 3)."""
        if self._items is None:
            self._items = [self.dataset[index] for index in _varied(self.dataset, self.num_images)]
        device = next(self.network.parameters()).device
        images = torch.stack([torch.as_tensor(item["image"]) for item in self._items]).to(device)
        if self.multi_label:
            labels = [index % len(self.class_names) for index in range(len(images))]
            result = self.inferer(images, self.network, labels, None)
        else:
            result = self.inferer(images, self.network)
        return counterfactual_strip(
            [
                CounterfactualCase.of(
                    result, index, self.class_names, multi_label=self.multi_label, mask=item.get("mask")
                )
                for index, item in enumerate(self._items)
            ]
        )


def read_counterfactual_records(paths: Sequence[str | Path]) -> CounterfactualRecord:
    """The record of a batch from the `record.json` of its images, for :meth:`CounterfactualInferer.replay`.

    Args:
        paths: one file an image, in the order of the batch, of one run.

    Returns:
        the record.

    Raises:
        ValueError: for no file, or files of runs with other settings.
    """
    contents = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    regions = [_unpack(content["region"]) for content in contents if "region" in content]
    return CounterfactualRecord.of_images(contents, torch.stack(regions) if regions else None)


def _pack(region: torch.Tensor) -> dict[str, Any]:
    """A mask as text: its bits, eight in a byte, in base64."""
    bits = np.packbits(region.cpu().numpy())
    return {"shape": list(region.shape), "bits": base64.b64encode(bits.tobytes()).decode("ascii")}


def _unpack(packed: Mapping[str, Any]) -> torch.Tensor:
    shape = packed["shape"]
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed["bits"]), np.uint8), count=int(np.prod(shape)))
    return torch.from_numpy(bits.astype(bool).reshape(shape))


def _settings_in_words(record: CounterfactualRecord) -> str:
    confined = "everywhere" if record.region is None else "within a region"
    calls = f", at most {record.inversion_iterations} network calls a step" if record.encoding == "inversion" else ""
    return (
        f"Rule: {record.rule}. Encoding: {record.encoding}{calls}, up to timestep {record.timesteps[0]}, and back in "
        f"{len(record.timesteps)} steps. Change was allowed {confined}."
    )


def _write_image(folder: Path, name: str, image: np.ndarray, grid: OriginalGrid) -> None:
    """An image on its original grid: NIfTI where it lies in a patient, else PNG."""
    if grid.affine is not None:
        atomic_write_bytes(folder / f"{name}.nii.gz", nifti_bytes(image, grid))
        return
    shown = {"difference": image / 2, "region": image * 2 - 1}.get(name, image)
    if len(image) in (1, 3):
        atomic_write_bytes(folder / f"{name}.png", png_bytes(to_tile(shown)))
        return
    for number, channel in enumerate(shown):
        atomic_write_bytes(folder / f"{name}_channel{number}.png", png_bytes(to_tile(channel[None])))


def _free_name(text: str, taken: set[str]) -> str:
    """A file name like the text that is not taken, on systems that do not tell A from a either; taken from now on."""
    plain = re.sub(r"[^\w-]+", "_", text)[-_LONGEST_NAME:].strip("_") or "case"
    chosen, number = plain, 1
    while chosen.casefold() in taken:
        number += 1
        chosen = f"{plain}-{number}"
    taken.add(chosen.casefold())
    return chosen


def _tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(_array(torch.as_tensor(image)))


def _array(image: torch.Tensor) -> np.ndarray:
    return np.asarray(image.detach().float().cpu())


def _varied(dataset: Any, count: int) -> list[int]:
    """The first items of each class in turn; of a multi-label data set simply the first."""
    by_class: dict[Any, list[int]] = {}
    for index in range(min(len(dataset), _LOOKED_AT)):
        label = torch.as_tensor(dataset[index]["label"])
        by_class.setdefault(int(label) if label.ndim == 0 else None, []).append(index)
    turns = sorted((turn, str(name), index) for name, found in by_class.items() for turn, index in enumerate(found))
    return [index for _, _, index in turns[:count]]
