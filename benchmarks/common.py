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

"""What the benchmark scripts share: the environment of a measurement, a store of cells, and means with intervals.

A benchmark is a grid of cells (data, method, seed). Each cell is written to its own file as soon as it is measured, so
an interrupted run loses one cell at most and a second run measures only what is missing::

    store = CellStore("joint_vs_single", settings={"steps": 2000, "batch_size": 64})
    cells = [Cell("pneumoniamnist_28", method, seed) for method in ("joint", "classifier") for seed in range(3)]
    measured = store.run_missing(cells, measure)  # measure(cell) -> {"auc": ...}
    auc = mean_interval(store.values("pneumoniamnist_28", "joint", "auc"))
    target = Target("AUC of the joint model", "at least 0.98", f"{auc['mean']:.3f}", auc["mean"] >= 0.98, "3 seeds")
    write_result("joint_vs_single", "Joint against single task", [{"method": "joint", "AUC": auc}], targets=[target])

Run the scripts from the repository's root, ``python -m benchmarks.<script>``; ``python -m benchmarks.render`` then
renders the tables of the README files.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "Cell",
    "CellStore",
    "RESULTS",
    "ROOT",
    "Target",
    "counted",
    "ensure_trained",
    "environment_record",
    "mean_interval",
    "paired_difference",
    "train_bundle",
    "write_json",
    "write_result",
]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

_TRAINED_BY = "trained_by.json"
PACKAGES = ("monai", "torch", "numpy", "pytorch-ignite", "diffusers", "scikit-learn")


# --------------------------------------------------------------------------------------------------------------------
# files


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside the target, flush it and rename: a reader sees the old file or the new one, never a half.

    Raises:
        ValueError: when ``content`` holds NaN or an infinity, which JSON does not have.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------------
# environment


def cpu_model() -> str:
    """The processor's name as the system gives it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def cpu_count() -> int:
    """The number of logical processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_commit(root: Path = ROOT) -> str:
    """Short hash of the checked out commit, with ``+changes`` when code differs from it; ``unknown`` outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", "monai_jointdiff", "bundles", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+changes" if changed else commit


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of those of the named packages that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def environment_record() -> dict[str, Any]:
    """Where a number was measured: processor, cores, threads, accelerator, versions, commit, date (UTC)."""
    import torch

    import monai_jointdiff

    return {
        "cpu": cpu_model(),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"monai-jointdiff": monai_jointdiff.__version__, **package_versions()},
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


# --------------------------------------------------------------------------------------------------------------------
# trainings


def train_bundle(config_files: Sequence[str], folder: Path, options: Mapping[str, Any]) -> float:
    """Train as a user does, `python -m monai.bundle run`, by options alone.

    Args:
        config_files: within ``bundles``, the overlays last.
        folder: for ``models``, ``output``, ``log.txt`` and ``trained_by.json``, the options.
        options: of the training, by name.

    Returns:
        minutes of the whole program.

    Raises:
        CalledProcessError: when it fails; the log says why.
    """
    given = {"ckpt_dir": folder / "models", "output_dir": folder / "output", "progress": False, **options}
    files = [f"bundles/{file}" for file in config_files]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files)]
    command += [part for name, value in given.items() for part in (f"--{name}", str(value))]
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)
    write_json(folder / _TRAINED_BY, _as_recorded(options))
    return (time.perf_counter() - started) / 60


def ensure_trained(config_files: Sequence[str], folder: Path, options: Mapping[str, Any]) -> None:
    """Train as :func:`train_bundle` does, unless that has run to its end in the folder with these options.

    Args:
        config_files: as there.
        folder: as there.
        options: as there.

    Raises:
        ValueError: when it ran with other options: its network is not the one that is asked for.
        CalledProcessError: when it fails; the log says why.
    """
    path = folder / _TRAINED_BY
    if not path.is_file():
        train_bundle(config_files, folder, options)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if found != _as_recorded(options):
        raise ValueError(
            f"ensure_trained: {folder.name} was trained with {found}, asked for is {_as_recorded(options)}. Remove the "
            "folder to train again."
        )


def _as_recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a file gives them back; of places only the last name."""
    plain = {name: value.name if isinstance(value, Path) else value for name, value in options.items()}
    found: dict[str, Any] = json.loads(json.dumps(plain))
    return found


# --------------------------------------------------------------------------------------------------------------------
# statistics


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """Mean of independent repeats with Student's t-interval.

    Args:
        values: one figure per seed, finite.
        confidence: level of the two-sided interval, in (0, 1).

    Returns:
        ``{"mean", "low", "high", "n"}``; with one value there is no interval, and low and high are None.

    Raises:
        ValueError: for no values, a value that is not finite, or a level outside (0, 1).
    """
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(f"mean_interval: got {list(values)}, expected at least one value, all finite.")
    if not 0 < confidence < 1:
        raise ValueError(f"mean_interval: got confidence={confidence}, expected a level between 0 and 1.")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    from scipy.stats import t as student  # comes with scikit-learn; not needed where tables are only rendered

    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(student.ppf((1 + confidence) / 2, n - 1)) * deviation / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def paired_difference(
    ours: Mapping[int, float], reference: Mapping[int, float], larger_is_better: bool = True
) -> dict[str, Any]:
    """Difference ours - reference of runs that share a seed, as mean with interval and as the worst seed.

    Args:
        ours: figure by seed.
        reference: figure by seed, of the same seeds.
        larger_is_better: which sign of the difference counts as worse.

    Returns:
        :func:`mean_interval` of the differences, and ``"worst"``: the least favourable difference.

    Raises:
        ValueError: when the seeds differ.
    """
    if set(ours) != set(reference):
        raise ValueError(f"paired_difference: got seeds {sorted(ours)} and {sorted(reference)}, expected the same.")
    differences = [ours[seed] - reference[seed] for seed in sorted(ours)]
    worst = min(differences) if larger_is_better else max(differences)
    return {**mean_interval(differences), "worst": worst}


# --------------------------------------------------------------------------------------------------------------------
# cells


@dataclass(frozen=True)
class Cell:
    """One measurement of a benchmark.

    Attributes:
        data: name of the data set.
        method: name of what is measured.
        seed: seed of the run.
    """

    data: str
    method: str
    seed: int

    def __post_init__(self) -> None:
        for name in (self.data, self.method):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*(_[A-Za-z0-9.+-]+)*", name):
                raise ValueError(
                    f"Cell: got name {name!r}, expected letters, digits and . + - with single underscores between them."
                )

    @property
    def file_name(self) -> str:
        return f"{self.data}__{self.method}__seed{self.seed}.json"


class CellStore:
    """The cells of one benchmark, one JSON file each under ``<root>/<benchmark>/``.

    A file holds the cell, the settings it was measured with, its values, the seconds it took and the environment.

    Args:
        benchmark: name of the benchmark, and of the folder.
        settings: what all cells have in common and what decides their values (steps, batch size, margins ...). A file
            measured with other settings is refused, never mixed in.
        root: folder that holds the benchmarks' folders.
    """

    def __init__(
        self, benchmark: str, settings: Mapping[str, Any] | None = None, root: Path | str = RESULTS / "cells"
    ) -> None:
        self.benchmark = benchmark
        self.settings = json.loads(json.dumps(dict(settings or {})))  # as a file gives it back: tuples are lists
        self.folder = Path(root) / benchmark

    def path(self, cell: Cell) -> Path:
        return self.folder / cell.file_name

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """The values of a cell, or None when it is still to be measured.

        Raises:
            ValueError: when the file was measured with other settings.
        """
        path = self.path(cell)
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["settings"] != self.settings:
            raise ValueError(
                f"CellStore: {path.name} was measured with settings {record['settings']}, "
                f"this run has {self.settings}. Remove the file to measure it again."
            )
        return record["values"]

    def put(self, cell: Cell, values: Mapping[str, Any], seconds: float) -> None:
        """Write a measured cell."""
        record = {
            "cell": asdict(cell),
            "settings": self.settings,
            "values": dict(values),
            "seconds": round(seconds, 2),
            "environment": environment_record(),
        }
        write_json(self.path(cell), record)

    def run_missing(
        self, cells: Iterable[Cell], measure: Callable[[Cell], Mapping[str, Any]]
    ) -> dict[Cell, dict[str, Any]]:
        """Measure the cells that have no file, and return the values of all.

        Args:
            cells: the grid, in the order to measure.
            measure: called with a cell, returns its values, which JSON can hold.

        Returns:
            Values by cell, in the order given, as the files hold them.
        """
        cells = list(cells)
        found = {cell: self.get(cell) for cell in cells}  # all of them first: a refusal comes before hours are spent
        for number, cell in enumerate(cells, 1):
            label = f"[{number}/{len(cells)}] {self.benchmark}: {cell.data} {cell.method} seed {cell.seed}"
            if found[cell] is not None:
                print(f"{label}: measured before", flush=True)
                continue
            print(f"{label} ...", flush=True)
            start = time.perf_counter()
            measured = measure(cell)
            seconds = time.perf_counter() - start
            self.put(cell, measured, seconds)
            print(f"{label}: {seconds:.0f} s", flush=True)
        return {cell: values for cell in cells if (values := self.get(cell)) is not None}

    def environment(self, cell: Cell) -> dict[str, Any]:
        """Where a cell was measured, which is not where its table is written.

        Raises:
            FileNotFoundError: when it has not been measured.
        """
        environment: dict[str, Any] = json.loads(self.path(cell).read_text(encoding="utf-8"))["environment"]
        return environment

    def records(self) -> list[dict[str, Any]]:
        """All files of the benchmark, by name; settings are not compared."""
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob("*.json"))]

    def by_seed(self, data: str, method: str, key: str) -> dict[int, float]:
        """One figure of all seeds of a data set and method.

        Args:
            data: name of the data set.
            method: name of the method.
            key: name of the figure within the cells' values.

        Returns:
            Figure by seed, seeds ascending.

        Raises:
            ValueError: when no such cell has been measured, or one with other settings.
            KeyError: when a cell has no such figure.
        """
        cells = [Cell(**record["cell"]) for record in self.records()]
        seeds = sorted(cell.seed for cell in cells if (cell.data, cell.method) == (data, method))
        if not seeds:
            raise ValueError(f"CellStore: {self.benchmark} has no cell of data {data!r} and method {method!r}.")
        values = {seed: self.get(Cell(data, method, seed)) for seed in seeds}
        return {seed: found[key] for seed, found in values.items() if found is not None}

    def values(self, data: str, method: str, key: str) -> list[float]:
        """:meth:`by_seed` without the seeds."""
        return list(self.by_seed(data, method, key).values())


# --------------------------------------------------------------------------------------------------------------------
# results


@dataclass(frozen=True)
class Target:
    """One thing that was asked of a benchmark, and what came out.

    Attributes:
        figure: what is measured, in plain words that need no table beside them.
        asked: the bound, such as ``at least 0.98``.
        found: what was measured, such as ``0.978 [0.968, 0.988]``; empty when it was not run.
        met: whether the figure keeps to the bound; None when it was not run.
        about: what qualifies the figure, in a few words: images, seeds, threads.
    """

    figure: str
    asked: str
    found: str
    met: bool | None
    about: str = ""

    def __post_init__(self) -> None:
        texts = (self.figure, self.asked, self.found, self.about)
        if not all(isinstance(text, str) for text in texts) or not isinstance(self.met, (bool, type(None))):
            raise TypeError(f"Target: got {self}, expected text, and met to be True, False or None.")
        if not (self.figure and self.asked):
            raise ValueError(f"Target: got {self}, expected words for the figure and for what was asked.")
        if bool(self.found) != (self.met is not None):
            raise ValueError(f"Target: got {self}, expected a finding with a verdict, or neither (not run).")

    @property
    def verdict(self) -> str:
        """``met``, ``MISSED`` or ``not run``."""
        return "not run" if self.met is None else "met" if self.met else "MISSED"

    @property
    def details(self) -> str:
        """What was found and what qualifies it."""
        return "; ".join(text for text in (self.found, self.about) if text)

    def sentence(self) -> str:
        """The target as it stands below a table."""
        return f"{self.figure}, {self.asked}: {self.verdict}{f' ({self.details})' if self.details else ''}."


def counted(number: int, noun: str) -> str:
    """A number with its noun in the singular or the plural: ``1 thread``, ``2 threads``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def write_result(
    name: str,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    targets: Sequence[Target] = (),
    notes: str | Sequence[str] = (),
    digits: Mapping[str, int] | None = None,
    environment: Mapping[str, Any] | None = None,
    folder: Path | str = RESULTS,
) -> Path:
    """Write ``<folder>/<name>.json``, which :mod:`benchmarks.render` turns into the table ``name``.

    Args:
        name: name of the file and of the markers in the documents.
        title: line above the table.
        rows: one mapping per row, column to value: text, number, None, or a mapping with ``mean``, ``low``, ``high``.
        targets: what was asked for; they stand below the table and in the table of all targets.
        notes: sentences below the targets: what the columns and intervals are, what else was found.
        digits: decimals by column where the default does not fit.
        environment: record of the measurement; None records the one of this process.
        folder: where results lie.

    Returns:
        The path written.
    """
    path = Path(folder) / f"{name}.json"
    content = {
        "name": name,
        "title": title,
        "rows": [dict(row) for row in rows],
        "targets": [asdict(target) for target in targets],
        "notes": [notes] if isinstance(notes, str) else list(notes),
        "digits": dict(digits or {}),
        "environment": dict(environment) if environment is not None else environment_record(),
    }
    write_json(path, content)
    return path
