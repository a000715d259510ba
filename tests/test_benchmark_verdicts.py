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

"""Targets of the benchmarks: met, missed or not run."""

from __future__ import annotations

import json
import unittest
from collections.abc import Callable
from dataclasses import asdict
from types import ModuleType
from typing import Any
from unittest import mock

from parameterized import parameterized

from benchmarks import (
    few_labels,
    joint_vs_single,
    kermany,
    latent_space,
    loader,
    localization,
    main_job,
    sampler_steps,
    speed,
)
from benchmarks.common import RESULTS, Cell, CellStore, mean_interval
from tests.bundles.runs import temporary_folder


class TestMainJob(unittest.TestCase):
    @parameterized.expand(
        [
            ((6.0, 0.95, 0.849, 0.05), (True, True, True, True)),
            ((6.1, 0.949, 0.85, 0.0977), (False, False, False, False)),
            ((5.0, 0.99, 0.85, 0.10), (True, True, False, False)),
        ]
    )
    def test_each_target(self, figures: tuple[float, ...], met: tuple[bool, ...]) -> None:
        names = (
            "minutes",
            "test auc",
            "test auc of PCA + logistic regression (floor)",
            "Frechet distance to test images: samples of the model",
        )
        gaussian = {"Frechet distance to test images: draws from a Gaussian fitted to the training pixels": 0.0977}
        found = main_job.targets({**dict(zip(names, figures, strict=True)), **gaussian}, threads=2)
        self.assertEqual(tuple(target.met for target in found), met)
        words = (
            f"at most 6 on 2 cores: .* .{figures[0]:.1f}; 2 threads",
            f"at least 0.95: .* .{figures[1]:.3f}",
            f"below 0.85: .* .{figures[2]:.3f}",
            f"Gaussian.*: .* .{figures[3]:.4f} against 0.0977",
        )
        for target, expected in zip(found, words, strict=True):
            self.assertRegex(target.sentence(), expected)


class TestSpeed(unittest.TestCase):
    @parameterized.expand([(2.0, True), (1.99, False)])
    def test_against_the_faster_attention(self, ratio: float, met: bool) -> None:
        seconds = {variant.label: [9.0] * 3 for variant in speed.VARIANTS} | {speed.OURS.label: [1.0] * 3}
        seconds[speed.SEPARATE[1].label] = [ratio] * 3
        target = speed.ratio_target(seconds, threads=2)
        self.assertIs(target.met, met)
        self.assertRegex(target.sentence(), f"at least 2 times.*{ratio:.2f} times; 2 threads; .*attention, einsum")


class TestJointAgainstSingle(unittest.TestCase):
    def store(self, auc: float, minutes: float, weights: tuple[float, ...]) -> CellStore:
        store = CellStore("joint_vs_single", {}, temporary_folder(self))
        for seed, weight in enumerate(weights):
            values = {
                "joint": {"auc": auc, "accuracy": 0.9, "minutes": minutes + seed},
                "classifier": {"classification_weight": weight},
            }
            for method, found in values.items():
                store.run_missing([Cell(joint_vs_single.DATA, method, seed)], lambda _, found=found: found)
        return store

    @parameterized.expand([(0.98, 19.0, True, True), (0.979, 19.1, False, False)])
    def test_targets(self, auc: float, minutes: float, of_auc: bool, of_minutes: bool) -> None:
        store = self.store(auc, minutes, (0.005, 0.005))
        found, accuracy, budget = joint_vs_single.targets(store, (0, 1))
        self.assertEqual((found.met, accuracy.met, budget.met), (of_auc, True, of_minutes))
        self.assertRegex(found.sentence(), rf"AUC.*at least 0.98: .* .{auc:.3f} \[.*mean over 2 of 3 seeds")
        self.assertRegex(accuracy.sentence(), "accuracy.*at least 0.89: met .0.900")
        threads = store.environment(Cell(joint_vs_single.DATA, "joint", 0))["threads"]
        words = rf"at most 20 on 2 cores: .*{minutes:.1f}, {minutes + 1:.1f}; {threads} thread"
        self.assertRegex(budget.sentence(), words)

    def test_controls_of_unequal_weight_are_named(self) -> None:
        (note,) = joint_vs_single.control_notes(self.store(0.98, 20, (0.05, 0.005)), (0, 1))
        self.assertTrue(note.endswith("0.05 (seed 0), 0.005 (seed 1)."))
        self.assertEqual(joint_vs_single.control_notes(self.store(0.98, 20, (0.005, 0.005)), (0, 1)), [])

    @parameterized.expand(
        [
            ("within", 0.966, 1.099, (True, True)),
            ("mean and worst seed", 0.95, 1.14, (False, False)),
            ("by the worst seed", 0.964, 1.12, (False, False)),
        ]
    )
    def test_margins(self, _: str, auc: float, distance: float, met: tuple[bool, ...]) -> None:
        """Of two seeds, the second as given and the first as good as the control."""
        store = CellStore("joint_vs_single", {}, temporary_folder(self))
        for seed, (ours, far) in enumerate([(0.97, 1.0), (auc, distance)]):
            values = {
                "joint": {"auc": ours, "frechet, CNN": 2 * far},
                "classifier": {"auc": 0.97},
                "denoiser": {"frechet, CNN": 2.0},
            }
            for method, found in values.items():
                store.run_missing([Cell(joint_vs_single.DATA, method, seed)], lambda _, found=found: found)
        rows = joint_vs_single.comparison(store, (0, 1))
        self.assertEqual([row["margin"] for row in rows], [-0.005, 0.10])
        found = joint_vs_single.margin_targets(rows, (0, 1))
        self.assertEqual(tuple(target.met for target in found), met)
        first, second = (target.sentence() for target in found)
        self.assertRegex(
            first, rf"classifier alone: AUC, at least -0.0050.*worst seed {auc - 0.97:+.4f}; 2 of 3 seeds, s"
        )
        worst = 100 * (distance - 1)
        self.assertRegex(
            second, rf"denoiser alone: Frechet distance, CNN, at most \+10.0 %.*worst seed \+{worst:.1f} %"
        )


class TestKermany(unittest.TestCase):
    @parameterized.expand(
        [
            ((20.0, 0.99), (17.0, 0.99), (True, True, True)),
            ((20.1, 0.9899), (17.0, 0.9898), (False, False, True)),
            ((17.8, 0.9923), (17.3, 0.9955), (True, True, False)),
        ]
    )
    def test_targets(self, ours: tuple[float, float], plain: tuple[float, float], met: tuple[bool, ...]) -> None:
        values = {m: dict(zip(("minutes", "auc"), v, strict=True)) for m, v in (("joint", ours), ("cnn", plain))}
        found = kermany.targets(values, {"joint": 2, "cnn": 1})
        self.assertEqual(tuple(target.met for target in found), met)
        self.assertRegex(found[0].sentence(), f"at most 20: .* .{ours[0]}; one seed, 2 threads")
        self.assertRegex(found[1].sentence(), f"at least 0.99: .* .{ours[1]:.4f}")
        self.assertRegex(
            found[2].sentence(),
            rf"CNN, at least 0 .*\{ours[1] - plain[1]:+.4f}; .*CNN had {plain[0]} minutes on 1 thread\)",
        )

    def test_not_run(self) -> None:
        values = {"minutes": 10.0, "auc": 1.0}
        self.assertEqual([t.met for t in kermany.targets({"joint": values}, {"joint": 1})], [True, True, None])
        self.assertEqual([t.met for t in kermany.targets({"cnn": values}, {"cnn": 1})], [None])


class TestSamplerSteps(unittest.TestCase):
    @parameterized.expand([(109.0, 109.0, True), (112.0, 112.0, False), (112.0, 128.0, True), (88.0, 88.0, False)])
    def test_within_ten_percent_or_the_noises(self, few: float, other: float, met: bool) -> None:
        distances = {"20 steps": few, "20 steps, other noise": other, "100 steps": 100.0}
        rows = sampler_steps.compare({case: {"space": value} for case, value in distances.items()})
        (target,) = sampler_steps.targets(rows, seed=1)
        self.assertIs(target.met, met)
        noises = 100 * abs(few / other - 1)
        words = f"space, differs by at most 10 %.*{abs(few - 100):.1f} %, between noises {noises:.1f} %; .*seed 1"
        self.assertRegex(target.sentence(), words)


def located(data: str, method: str, runs: int = 1, **figures: float) -> dict[str, Any]:
    means = {name: mean_interval([value]) for name, value in figures.items()}
    return {"data": data, "method": method, "runs": runs, **means}


class TestLocalization(unittest.TestCase):
    @parameterized.expand(
        [
            ((0.95, 0.6, 0.0999), (True, True, True)),
            ((0.949, 0.599, 0.1), (False, False, False)),
        ]
    )
    def test_phantoms(self, values: tuple[float, ...], met: tuple[bool, ...]) -> None:
        def row(method: str, values: tuple[float, ...]) -> dict[str, Any]:
            figures = dict(zip(("pointing, relative", "iou, relative", "ratio"), values, strict=True))
            return located("phantoms", method, runs=2, pointing=0.7, iou=0.7, **figures)

        found = localization.targets(
            [row("counterfactual", values), row("counterfactual in a region", (0.5, 0.51, 0.52))]
        )
        self.assertEqual(tuple(target.met for target in found), (*met, None, None))
        for target, bound, value, beside in zip(
            found, ("at least 0.95", "at least 0.6", "below 0.1"), values, (0.5, 0.51, 0.52), strict=False
        ):
            words = rf"phantoms, {bound}: .* .{value:.3f}; 2 of 3 seeds; counterfactual in a region {beside:.3f}\)"
            self.assertRegex(target.sentence(), words)

    @parameterized.expand([(0.5, 0.41, True), (0.49, 0.41, False), (0.5, 0.4, False)])
    def test_above_every_control_elsewhere(self, auprc: float, iou: float, met: bool) -> None:
        def row(method: str, auprc: float, iou: float) -> dict[str, Any]:
            figures = {"auprc": 0.1, "iou": 0.1, "auprc, relative": auprc, "iou, relative": iou}
            return located(localization.BRAIN, method, runs=2, **figures)

        rows = [
            row("counterfactual", auprc, iou),
            row("Grad-CAM", 0.49, 0.3),
            row("occlusion", 0.3, 0.2),
            row("no model", 0.9, 0.8),
        ]
        rows[2]["iou"] = mean_interval([0.4])  # better as it is
        *phantoms, brain, busi = localization.targets(rows)
        self.assertEqual([target.met for target in (*phantoms, busi)], [None] * 4)
        self.assertIs(brain.met, met)
        words = (
            f"{auprc:.3f} against 0.490, {iou:.3f} against 0.400; by the means, 2 of 6 patients; no model: 0.900, 0.800"
        )
        self.assertIn(words, brain.sentence())


class TestFewLabels(unittest.TestCase):
    def found(self, gain: float, few: float) -> dict[few_labels.Key, dict[str, float]]:
        """All cells of two seeds, and all labels."""

        def values(auc: float, balanced: float) -> dict[str, float]:
            return {"auc": auc, "balanced_accuracy": balanced, "macro_f1": 0.5, "minutes": 1.0}

        cells = {key: values(0.8, 0.4) for key in few_labels.all_cells() if key[3] < 2}
        for seed in range(2):
            cells["ham10000_28", 86, "fixmatch", seed] = values(0.8, 0.4 + gain)
            cells["pneumoniamnist_28", 50, "fixmatch", seed] = values(few, 0.4)
        return cells

    def targets(self, found: dict[few_labels.Key, dict[str, float]]) -> list[Any]:
        return few_labels.targets(few_labels.tabulate(found), few_labels.all_cells(), found)

    @parameterized.expand([(0.051, 0.777, True, True), (0.049, 0.775, False, False)])
    def test_gain_and_share(self, gain: float, few: float, of_gain: bool, of_share: bool) -> None:
        gained, share, grid = self.targets(self.found(gain, few))
        self.assertEqual((gained.met, share.met, grid.met), (of_gain, of_share, None))
        self.assertRegex(gained.sentence(), rf"86 labels, at least \+0.050: .* .{gain:.3f} \[.*2 of 3 seeds")
        self.assertRegex(
            share.sentence(), f"at least 97 %: .* .{few / 0.008:.1f} %; of 0.800, that of this network; 2 of"
        )
        self.assertRegex(grid.sentence(), r"not run \(12 of them are missing: of ham10000_28 with 86 labels, ")

    def test_without_all_labels_against_the_main_table(self) -> None:
        found = {key: v for key, v in self.found(0.1, 0.9).items() if key[1] != few_labels.ALL}
        with mock.patch.object(few_labels, "main_table", return_value=(0.95, "another network")):
            _, share, _ = self.targets(found)
        self.assertRegex(share.sentence(), r"MISSED \(94.7 %; of 0.950, that of another network")

    def test_not_run(self) -> None:
        key: few_labels.Key = ("ham10000_28", 418, "joint", 0)
        found = {key: self.found(0, 0)[key]}
        self.assertEqual([target.met for target in self.targets(found)], [None] * 3)
        every = dict.fromkeys(few_labels.all_cells(), self.found(0, 0)[key])
        self.assertRegex(self.targets(every)[2].sentence(), r"40 trainings: met \(40 trainings\)")


class TestLatentSpace(unittest.TestCase):
    FOUND = {
        "autoencoder": {"psnr": 29.21, "ssim": 0.74, "minutes": 9.0},
        "latent": {"auc": 0.83},
        "pixel": {"auc": 0.88},
        "speed": {"latent training": 50, "pixel training": 10, "latent sampling": 30, "pixel sampling": 3},
    }

    def test_reported(self) -> None:
        target = latent_space.target(self.FOUND)
        words = "training 5.0, sampling 10.0; PSNR 29.2 dB, SSIM 0.740; macro AUC 0.830 against 0.880"
        self.assertIn(words, target.found)
        self.assertTrue(target.met)

    def test_not_run(self) -> None:
        target = latent_space.target({"latent": self.FOUND["latent"]})
        self.assertEqual((target.met, target.about), (None, "without autoencoder, pixel, speed"))


class TestLoader(unittest.TestCase):
    @parameterized.expand([(1.01, True), (1.0, False)])
    def test_slowest_data_set_counts(self, step: float, met: bool) -> None:
        beside = {"loading": 0.1, "step": 1.0}
        seconds = {"a": ({"loading": 1.0, "step": 9.0}, beside), "b": ({"loading": 1.0, "step": step}, beside)}
        target = loader.target(loader.compare(seconds), threads=1)
        self.assertIs(target.met, met)
        self.assertRegex(target.sentence(), r"above 1 .* \(1.0 on b, the least of 2; 1 thread for the network")


class TestRepository(unittest.TestCase):
    """The committed results are those of the committed cells."""

    def written(self, module: ModuleType, write: Callable[[], None]) -> list[Any]:
        with mock.patch.object(module, "write_result") as result:
            write()
        return result.call_args_list

    def joint_vs_single(self) -> list[Any]:
        settings = {"epochs": 6, "samples": 2000, "optimizer": "AdamW, batch 32", "threads": 1}
        rows = json.loads((RESULTS / "pneumonia.json").read_text(encoding="utf-8"))["rows"]
        floor = {name: value for name, value in rows[-1].items() if name != "method"}
        store = CellStore("joint_vs_single", settings)
        return self.written(joint_vs_single, lambda: joint_vs_single.tables(store, floor, settings))

    def kermany(self) -> list[Any]:
        settings = {"minutes": kermany.MINUTES, "epochs": kermany.EPOCHS, "network": kermany.NETWORK}
        return self.written(kermany, lambda: kermany.tables(CellStore("kermany", settings)))

    def sampler_steps(self) -> list[Any]:
        names = {case: case.replace(", ", "-").replace(" ", "_") for case in sampler_steps.CASES}
        cells = {case: Cell(joint_vs_single.DATA, name, 1) for case, name in names.items()}
        store = CellStore("sampler_steps", {"samples": 2000})
        return self.written(sampler_steps, lambda: sampler_steps.tables(store, cells))

    def localization(self) -> list[Any]:
        stores = localization.stores_in(RESULTS / "cells")
        return self.written(localization, lambda: localization.tables(stores))

    def main_job(self) -> list[Any]:
        committed = json.loads((RESULTS / "main_job.json").read_text(encoding="utf-8"))
        figures = {row["figure"]: row["value"] for row in committed["rows"]}
        return self.written(main_job, lambda: main_job.tables(figures, committed["environment"]))

    @parameterized.expand([("joint_vs_single",), ("kermany",), ("sampler_steps",), ("localization",), ("main_job",)])
    def test_results(self, script: str) -> None:
        for (name, title, rows), keywords in getattr(self, script)():
            committed = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
            with self.subTest(name=name):
                self.assertEqual((committed["title"], committed["rows"]), (title, rows))
                self.assertEqual(committed["targets"], [asdict(target) for target in keywords["targets"]])
                self.assertEqual(committed["environment"], keywords["environment"])


if __name__ == "__main__":
    unittest.main()
