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

"""How good a classifier becomes with how many labels: trainings of a bundle one after the other, in one picture."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from monai_jointdiff.data import ImageSource, keep_few_labels, labelled_names
from monai_jointdiff.handlers.atomic import atomic_write_text
from monai_jointdiff.metrics import Interval, mean_of_repeats
from monai_jointdiff.visualize import format_table, label_efficiency_figure, save_figure

from .bundle import announce
from .semi_supervised import ALGORITHMS

__all__ = ["LabelEfficiencyStudy", "LabelRun", "LabelRunResult", "summarize_label_runs"]

FIGURES = {"balanced_accuracy": "balanced accuracy", "auc": "macro AUC", "macro_f1": "macro F1"}
QUICK = {"num_samples": 0, "counterfactual_pictures": 0, "progress": False}  # a study looks at classification alone
OWN = {
    "algorithm",
    "ckpt_dir",
    "config_file",
    "label_seed",
    "num_labels",
    "output_dir",
    "resume",
    "task",
    "validation_count",
}
RECORD = "run.json"
_LAST_LINES = 15  # of the log of a training that failed without a word about the error


@dataclass(frozen=True)
class LabelRun:
    """One training of a study.

    Args:
        algorithm: as of :func:`~monai_jointdiff.engines.make_unlabelled_term`.
        num_labels: labels asked for.
        label_seed: seed of their choice.
    """

    algorithm: str
    num_labels: int
    label_seed: int

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f"{self.algorithm}_{self.num_labels}_labels_seed_{self.label_seed}"

    def __str__(self) -> str:
        return f"{self.algorithm}, {self.num_labels} labels, seed {self.label_seed}"


@dataclass(frozen=True)
class LabelRunResult:
    """What a training came to.

    Args:
        run: which training.
        labelled: training images with a label; whole patients may make it differ from what was asked for.
        minutes: of the whole program.
        balanced_accuracy: on the test part, at the threshold that validation chose; None where it is not defined.
        auc: area under the ROC curve, macro mean over the classes.
        macro_f1: mean of the classes' F1.
    """

    run: LabelRun
    labelled: int
    minutes: float
    balanced_accuracy: float | None
    auc: float | None
    macro_f1: float | None

    def as_row(self) -> dict[str, Any]:
        """All of it in one flat dictionary."""
        content = asdict(self)
        return {**content.pop("run"), **content}


def summarize_label_runs(results: Sequence[LabelRunResult]) -> list[dict[str, Any]]:
    """Means over the draws of the labels, with 95 % t-intervals where there are several.

    Args:
        results: of a study, or of as much of it as there is.

    Returns:
        for each algorithm and number of labels, in the order of their first appearance, `algorithm`, `num_labels`,
        `draws`, and for each figure an :class:`~monai_jointdiff.metrics.Interval`.
    """
    points: dict[tuple[str, int], list[LabelRunResult]] = {}
    for result in results:
        points.setdefault((result.run.algorithm, result.run.num_labels), []).append(result)
    return [
        {
            "algorithm": algorithm,
            "num_labels": num_labels,
            "draws": len(found),
            **{name: _mean([getattr(result, name) for result in found]) for name in FIGURES},
        }
        for (algorithm, num_labels), found in points.items()
    ]


def _mean(values: Sequence[float | None]) -> Interval:
    defined = [value for value in values if value is not None]
    return mean_of_repeats(defined) if defined else Interval(None, reason="not defined for the labels of the test part")


class LabelEfficiencyStudy:
    """Trains a bundle for each algorithm, number of labels and draw of the labels, and puts the results together.

    Every training is a process of its own (`python -m monai.bundle run`) with a folder of its own in `runs`. A training
    that is complete has a `run.json` there and is not repeated: a study that was interrupted goes on where it was, and
    one with more draws or numbers of labels adds to what is there. The seed of the trainings is the same in all, and
    with it the division of the data and the test part; draws differ in which training images have a label, and the
    intervals say how much that matters, no more.

    After every training the files are written anew, of all complete trainings in the folder with the same options:
    `label_efficiency.json` (settings, means, trainings), `label_efficiency.csv` (a row for each training) and
    `label_efficiency.png`. Of the place of the data and of the configuration files a hash stands among the options:
    trainings of other data of the same name, or by changed configurations, are not mixed.

    Args:
        config_files: the configurations of a training with few labels, the overlay last.
        output_dir: folder of the results.
        counts: numbers of labels.
        algorithms: names, as of :func:`~monai_jointdiff.engines.make_unlabelled_term`.
        label_seeds: seeds of the draws of the labels.
        fair_validation: validate on no more images than have a label; False: on the whole validation part.
        options: further options of all trainings, of plain values; None among them leaves the training's default.

    Raises:
        ValueError: for an empty list, one with something twice, a number of labels below 1, an unknown algorithm, a
            configuration file that is missing, or an option that the study sets itself or that is not plain; when run,
            for a folder with one of its trainings by other options, numbers of labels that the data cannot have, or
            configurations that change meanwhile.
    """

    def __init__(
        self,
        config_files: Sequence[str | Path],
        output_dir: str | Path,
        counts: Sequence[int],
        algorithms: Sequence[str],
        label_seeds: Sequence[int],
        fair_validation: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._check_list("counts", counts, "whole numbers >= 1", lambda n: type(n) is int and n >= 1)
        self._check_list("algorithms", algorithms, f"among {', '.join(ALGORITHMS)}", lambda name: name in ALGORITHMS)
        self._check_list("label_seeds", label_seeds, "whole numbers >= 0", lambda n: type(n) is int and n >= 0)
        given = {name: value for name, value in (options or {}).items() if value is not None}
        taken = sorted(OWN & set(given))
        if taken:
            raise ValueError(f"{self._name}: the study sets {', '.join(taken)} itself; they are no options of it.")
        try:
            json.dumps(given)
        except TypeError as error:
            raise ValueError(f"{self._name}: options must be plain values, got {given}: {error}") from error
        self.config_files = [str(file) for file in config_files]
        missing = [file for file in self.config_files if not Path(file).is_file()]
        if missing:
            raise ValueError(f"{self._name}: there is no configuration file {missing[0]}.")
        self.output_dir = Path(output_dir)
        self.runs = [LabelRun(a, n, seed) for seed in label_seeds for n in sorted(counts) for a in algorithms]
        self.options = {**QUICK, **given, "validation_count": "labelled" if fair_validation else None}
        self.described = self._described()

    def run(self) -> list[LabelRunResult]:
        """Say what will be trained, make the trainings that are missing, and write the results after each.

        Returns:
            of the trainings asked for, in the order in which they are made: draw by draw, so that each draw adds a
            whole picture.

        Raises:
            ValueError: when a folder holds a training of other options, a number of labels is too small or too large
                for the data, or a configuration file has changed meanwhile.
            RuntimeError: when a training fails; its log is named, and its errors are quoted.
        """
        results: list[LabelRunResult] = []
        stored = {run: self._stored(run) for run in self.runs}  # a wrong folder is found before anything is trained
        missing = [run for run in self.runs if stored[run] is None]
        if missing:  # complete trainings are put together without their data
            source = self._source()
            self._announce(source, len(missing))
            self._check_counts(source, missing)
        for number, run in enumerate(self.runs, 1):
            known = stored[run]
            print(f"[{number}/{len(self.runs)}] {run}" + (" (complete)" if known else ""), flush=True)
            results.append(known or self._train(run))
            if known is None or number == len(self.runs):
                self._write(self._complete())
        print(f"\n{self._table(self._complete())}\n\nnumbers and picture: {self.output_dir}", flush=True)
        return results

    def command(self, run: LabelRun) -> list[str]:
        """How a training is started.

        Args:
            run: which one.

        Returns:
            program and arguments.
        """
        folder = self._folder(run)
        own = {**asdict(run), "ckpt_dir": str(folder / "models"), "output_dir": str(folder / "output")}
        arguments = {"config_file": self.config_files, **self.options, **own}
        command = [sys.executable, "-m", "monai.bundle", "run"]
        for name, value in arguments.items():
            command += [f"--{name}", repr(value)]  # a Python value, and a text that looks like a number stays one
        return command

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_list(self, name: str, values: Any, right: str, is_right: Callable[[Any], bool]) -> None:
        listed = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
        if not listed or not all(map(is_right, values)) or len(set(values)) < len(values):
            raise ValueError(f"{self._name}: {name} must be a list of different ones, {right}, got {values!r}.")

    def _source(self) -> ImageSource:
        """The data as the trainings open them, with all labels and the whole validation part."""
        parser = ConfigParser()
        parser.read_config(self.config_files)
        parser.update({**self.options, "num_labels": None, "label_seed": 0, "validation_count": None})
        source: ImageSource = parser.get_parsed_content("source")
        return source

    def _announce(self, source: ImageSource, missing: int) -> None:
        """A misspelt option is ignored by MONAI without a word; here it shows that it was not understood."""
        announce(source, self.output_dir / "runs", self.output_dir, preflight=False)  # each training reads all files
        options = [f"{name} {value}" for name, value in self.options.items() if name != "bundle_root"]
        print(f"options: {', '.join(options)}\ntrainings: {len(self.runs)}, {missing} of them to make", flush=True)

    def _check_counts(self, source: ImageSource, runs: Sequence[LabelRun]) -> None:
        """Refuse what would stop a training, perhaps after hours of others."""
        train = source.part("train")
        labelled = len(labelled_names(train))
        most = labelled if labelled < len(train) else labelled - 1  # some training images must be unlabelled
        least = 1 if source.multi_label else source.num_classes  # one image may have several labels
        for run in runs:
            if not least <= run.num_labels <= most:
                raise ValueError(
                    f"{self._name}: counts must be from {least} to {most}: {source.name} has {source.num_classes} "
                    f"classes and {len(train)} training images, {labelled} of them with a label; got {run.num_labels}. "
                    "All labels are trained with train.json."
                )
        for count, seed in dict.fromkeys((run.num_labels, run.label_seed) for run in runs):
            kept = keep_few_labels(source, count, seed, self.options["validation_count"])
            if len(labelled_names(kept.part("train"))) == len(train):  # whole patients
                raise ValueError(
                    f"{self._name}: {count} labels, seed {seed}, whole patients together, leave no training image of "
                    f"{source.name} unlabelled; take a smaller count. All labels are trained with train.json."
                )

    def _folder(self, run: LabelRun) -> Path:
        return self.output_dir / "runs" / run.folder

    def _described(self) -> dict[str, Any]:
        """The options as results show them: without the places of this machine."""
        shown = {name: value for name, value in self.options.items() if name != "bundle_root"}
        if "dataset_dir" in shown:
            path = Path(str(shown["dataset_dir"]))
            place = str(path.resolve()) if path.exists() else str(path)  # medmnist:NAME is no path
            shown |= {"dataset_dir": path.name, "dataset_fingerprint": _fingerprint(place.encode())}
        files = [Path(file).read_bytes() for file in self.config_files]
        shown["config_fingerprint"] = _fingerprint(*files)
        return dict(json.loads(json.dumps(shown)))

    def _complete(self) -> list[LabelRunResult]:
        """All trainings in the folder that have these options, draw by draw, also those of earlier calls."""
        found = []
        for file in (self.output_dir / "runs").glob(f"*/{RECORD}"):
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.pop("options") == self.described:
                found.append(LabelRunResult(LabelRun(**content.pop("run")), **content))
        order = list(dict.fromkeys([*(run.algorithm for run in self.runs), *ALGORITHMS]))
        return sorted(found, key=lambda one: (one.run.label_seed, one.run.num_labels, order.index(one.run.algorithm)))

    def _stored(self, run: LabelRun) -> LabelRunResult | None:
        """The result of a training that is complete."""
        file = self._folder(run) / RECORD
        if not file.is_file():
            return None
        content = json.loads(file.read_text(encoding="utf-8"))
        before, now = content.pop("options"), self.described
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if changed:
            differences = ", ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed)
            raise ValueError(
                f"{self._name}: {file.parent} holds a training of other options ({differences}); take another "
                "output_dir, or remove the folder."
            )
        return LabelRunResult(LabelRun(**content.pop("run")), **content)

    def _train(self, run: LabelRun) -> LabelRunResult:
        if self._described() != self.described:
            raise ValueError(f"{self._name}: a configuration file has changed since the study began; start another.")
        folder = self._folder(run)
        shutil.rmtree(folder, ignore_errors=True)  # of a training that was interrupted
        folder.mkdir(parents=True)
        log = folder / "log.txt"
        started = time.perf_counter()
        with open(log, "w", encoding="utf-8") as stream:
            code = subprocess.run(self.command(run), stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            errors = [line for line in lines if re.match(r"[\w.]+Error: ", line)] or lines[-_LAST_LINES:]
            raise RuntimeError(
                f"{self._name}: the training {run} failed (code {code}), see {log}:\n" + "\n".join(errors)
            )
        minutes = (time.perf_counter() - started) / 60
        result = _read(run, folder / "output", minutes)
        content = {"options": self.described, **asdict(result)}
        atomic_write_text(folder / RECORD, json.dumps(content, indent=4) + "\n")
        for checkpoint in (folder / "models").glob("checkpoint_*.pt"):
            checkpoint.unlink()  # nothing goes on from here; model.pt and model.json stay
        return result

    def _write(self, results: Sequence[LabelRunResult]) -> None:
        """Numbers, table and picture of the results so far."""
        means = [
            {name: value.as_dict() if isinstance(value, Interval) else value for name, value in point.items()}
            for point in summarize_label_runs(results)
        ]
        rows = [result.as_row() for result in results]
        asked = {*self.runs, *(result.run for result in results)}
        content = {"settings": {"trainings": len(asked), **self.described}, "means": means, "runs": rows}
        atomic_write_text(self.output_dir / "label_efficiency.json", json.dumps(content, indent=4) + "\n")
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write_text(self.output_dir / "label_efficiency.csv", text.getvalue())
        metrics = {title: _curves(results, name) for name, title in FIGURES.items()}
        drawn = {title: curves for title, curves in metrics.items() if curves}
        if drawn:
            save_figure(label_efficiency_figure(drawn), self.output_dir / "label_efficiency.png")

    def _table(self, results: Sequence[LabelRunResult]) -> str:
        points = summarize_label_runs(results)
        return format_table([{FIGURES.get(name, name): _cell(v) for name, v in point.items()} for point in points])


def _fingerprint(*contents: bytes) -> str:
    """Hash of contents, in their order."""
    return "sha256:" + hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()


def _cell(value: Any) -> Any:
    return str(value) if isinstance(value, Interval) else value


def _curves(results: Sequence[LabelRunResult], figure: str) -> dict[str, dict[int, list[float]]]:
    """For each algorithm the values of its draws by the number of labels."""
    curves: dict[str, dict[int, list[float]]] = {}
    for result in results:
        value = getattr(result, figure)
        if value is not None:
            curves.setdefault(result.run.algorithm, {}).setdefault(result.run.num_labels, []).append(value)
    return curves


def _read(run: LabelRun, output: Path, minutes: float) -> LabelRunResult:
    """The result from the files of a training."""
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    of_classes = [figures["f1"]["value"] for figures in metrics["per_class"].values()]
    defined = [value for value in of_classes if value is not None]
    return LabelRunResult(
        run,
        labelled=len((output / "labelled.txt").read_text(encoding="utf-8").splitlines()),
        minutes=minutes,
        balanced_accuracy=metrics["balanced_accuracy"]["value"],
        auc=metrics["auc"]["value"],
        macro_f1=sum(defined) / len(defined) if defined else None,
    )
