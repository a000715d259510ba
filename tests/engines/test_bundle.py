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


"""Helpers of the configurations: places, options, weights."""

from __future__ import annotations

import contextlib
import io
import unittest
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from parameterized import parameterized

from monai_jointdiff.data import BalancedOrder, ImageSource, ShuffledOrder, open_source
from monai_jointdiff.engines import (
    PretrainedReport,
    announce,
    check_channels,
    check_image_size,
    check_options,
    class_weights,
    draw_order,
    epoch_length,
    find_bundle_root,
    freeze_encoder,
    head_classes,
    json_word,
    load_pretrained,
    load_weights,
)
from monai_jointdiff.networks import JointDiffusionUNet
from tests.bundles.runs import temporary_folder, working_directory
from tests.engines.small_run import small_network


def conditional_network() -> JointDiffusionUNet:
    return JointDiffusionUNet(**{**small_network().config, "class_conditional": True})


def labelled(*labels: Any) -> list[dict[str, Any]]:
    return [{"label": label} for label in labels]


class TestPlaces(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)
        bundle = self.folder / "bundles" / "one"
        (bundle / "configs").mkdir(parents=True)
        (bundle / "configs" / "metadata.json").write_text('{"name": "one"}', encoding="utf-8")

    def test_from_the_repository_and_from_the_bundle(self) -> None:
        with working_directory(self.folder):
            self.assertEqual(find_bundle_root("one"), str(Path("bundles/one")))
        with working_directory(self.folder / "bundles" / "one"):
            self.assertEqual(find_bundle_root("one"), ".")

    @parameterized.expand(["two", "on"])
    def test_another_bundle_or_place_is_refused(self, name: str) -> None:
        with working_directory(self.folder / "bundles" / "one"):
            with self.assertRaisesRegex(ValueError, f"bundle '{name}'.*--bundle_root PATH"):
                find_bundle_root(name)


class TestDraws(unittest.TestCase):
    @parameterized.expand([(24, 8, 1, 3), (25, 8, 1, 3), (24, 8, 2, 1), (3, 8, 1, 1), (100, 7, 3, 4)])
    def test_epoch_length(self, images: int, batch: int, processes: int, expected: int) -> None:
        self.assertEqual(epoch_length(images, batch, processes), expected)

    @parameterized.expand([(0, 8), (8, 0)])
    def test_epoch_length_refuses(self, images: int, batch: int) -> None:
        with self.assertRaisesRegex(ValueError, "at least one training image"):
            epoch_length(images, batch)

    def test_order(self) -> None:
        items = labelled(0, 0, 0, 1, -1)
        self.assertIsInstance(draw_order(items, 0), ShuffledOrder)
        self.assertIsInstance(draw_order(items, 0, "weights"), ShuffledOrder)
        balanced = draw_order(items, 0, "sampler")
        self.assertIsInstance(balanced, BalancedOrder)
        drawn = [items[balanced(n)]["label"] for n in range(5)]
        self.assertEqual(sorted(drawn), [-1, 0, 0, 1, 1])
        with self.assertRaisesRegex(ValueError, "one class per image"):
            draw_order(labelled([0.0, 1.0]), 0, "sampler")


class TestClassWeights(unittest.TestCase):
    def test_every_class_has_the_same_total_weight_and_the_mean_is_one(self) -> None:
        labels = np.array([0] * 5 + [1] * 2 + [2] * 9 + [-1] * 4)
        weights = class_weights(labelled(*labels.tolist()), 3, "weights")
        assert weights is not None
        totals = [weights[k] * (labels == k).sum() for k in range(3)]
        np.testing.assert_allclose(totals, totals[0])
        self.assertAlmostEqual(float(np.mean([weights[label] for label in labels if label >= 0])), 1.0)

    def test_presence_of_a_label_weighs_as_much_as_its_absence(self) -> None:
        weights = class_weights(labelled([1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, 1.0]), 2, "weights")
        np.testing.assert_allclose(weights, [3 / 1, 1 / 2])

    def test_none_unless_asked_for(self) -> None:
        self.assertIsNone(class_weights(labelled(0, 1), 2))
        self.assertIsNone(class_weights(labelled(0, 1), 2, "sampler"))

    @parameterized.expand(
        [
            ([0, 0, 2, -1], 3, "of class 1 of 3"),
            ([[1.0, 1.0], [0.0, 1.0]], 2, "without class 1 of 2"),
            ([[1.0, 0.0], [0.0, 0.0]], 2, "of class 1 of 2"),
        ]
    )
    def test_class_that_does_not_occur_is_refused(self, labels: list[Any], count: int, message: str) -> None:
        with self.assertRaisesRegex(ValueError, f"no labelled training image {message}"):
            class_weights(labelled(*labels), count, "weights")


class TestOptions(unittest.TestCase):
    def test_announce_prints_data_and_places_and_reads_all_files_if_asked(self) -> None:
        source = open_source(phantom_counts=(3, 2, 1))
        for preflight in (True, False):
            text = io.StringIO()
            with mock.patch.object(type(source), "preflight") as check, contextlib.redirect_stdout(text):
                announce(source, "a/models", "a/output", preflight)
            self.assertEqual(check.call_count, int(preflight))
            self.assertEqual(text.getvalue(), f"{source.summary()}\nweights: a/models\nresults: a/output\n")

    def test_of_several_processes_the_first_announces_and_all_check_the_files(self) -> None:
        source, text = open_source(phantom_counts=(3, 2, 1)), io.StringIO()
        with (
            mock.patch("torch.distributed.is_initialized", return_value=True),
            mock.patch("torch.distributed.get_rank", return_value=1),
            mock.patch.object(type(source), "preflight", side_effect=ValueError("bad.png")),
            contextlib.redirect_stdout(text),
            self.assertRaisesRegex(ValueError, "bad.png"),
        ):
            announce(source, "a/models", "a/output")
        self.assertEqual(text.getvalue(), "")

    def test_right_options_pass(self) -> None:
        check_options(epochs=1, batch_size=1, learning_rate=1e-9, max_minutes=None, patience=None, balance="sampler")
        check_options(num_workers=0, num_samples=0, val_interval=1, max_minutes=0.5, patience=1, epochs=np.int64(2))

    @parameterized.expand(
        [
            ({"amp": True}, "--amp is not supported"),
            ({"compile": True}, "--compile is not supported"),
            ({"balance": "both"}, "--balance is 'both'"),
            ({"head": "magic"}, "--head is 'magic', it must be one of standardized, mediffusion"),
            ({"task": "segment"}, "--task is 'segment', it must be one of joint, denoise, classify"),
            ({"num_workers": -1}, "--num_workers must be a whole number of at least 0, got -1"),
            ({"num_workers": 0.5}, "--num_workers must be a whole number of at least 0, got 0.5"),
            ({"num_samples": -1}, "--num_samples must be a whole number of at least 0, got -1"),
            ({"epochs": 0}, "--epochs must be a whole number of at least 1, got 0"),
            ({"epochs": 2.5}, "--epochs must be a whole number of at least 1, got 2.5"),
            ({"epochs": True}, "--epochs must be a whole number of at least 1, got True"),
            ({"batch_size": 2.5}, "--batch_size must be a whole number of at least 1, got 2.5"),
            ({"batch_size": "many"}, "--batch_size must be a whole number of at least 1, got 'many'"),
            ({"val_interval": 0}, "--val_interval must be a whole number of at least 1, got 0"),
            ({"patience": 1.5}, "--patience must be a whole number of at least 1, got 1.5"),
            ({"learning_rate": -1.0}, "--learning_rate must be a number greater than 0, got -1.0"),
            ({"learning_rate": "abc"}, "--learning_rate must be a number greater than 0, got 'abc'"),
            ({"learning_rate": False}, "--learning_rate must be a number greater than 0, got False"),
            ({"max_minutes": float("nan")}, "--max_minutes must be a number greater than 0"),
        ]
    )
    def test_wrong_options(self, options: dict[str, Any], message: str) -> None:
        with self.assertRaisesRegex(ValueError, message):
            check_options(**options)

    def network_of(self, channels: Sequence[int], groups: int, head: int | list[int]) -> JointDiffusionUNet:
        attention = [False] * (len(channels) - 1) + [True]
        sizes: dict[str, Any] = {"channels": channels, "norm_num_groups": groups, "num_head_channels": head}
        return JointDiffusionUNet(2, 1, 1, num_classes=2, num_res_blocks=1, attention_levels=attention, **sizes)

    @parameterized.expand([([16, 32, 64], 8, 32), ((8, 12), 4, 6), ([16], 8, 16), ([12, 8], 4, [5, 8])])
    def test_right_channels_pass_and_make_a_network(
        self, channels: Sequence[int], groups: int, head: int | list[int]
    ) -> None:
        check_channels(channels, groups, head)
        self.assertEqual(self.network_of(channels, groups, head).config["channels"], list(channels))

    @parameterized.expand([([],), ("",), ("[8, 16]",), (32,), (None,), ([8, 0],), ([8, -8],), ([8.0],), ([True],)])
    def test_channels_that_are_no_list_of_counts(self, channels: Any) -> None:
        with self.assertRaises(ValueError) as caught:
            check_channels(channels, 8, 8)
        self.assertRegex(str(caught.exception), "--channels must be a list of positive whole numbers")
        self.assertIn(f'like "[16, 32, 64]", got {channels!r}.', str(caught.exception))

    @parameterized.expand(
        [
            ([8, 12, 16], 8, 16, r"each number of --channels must be a multiple of 8, .* got \[8, 12, 16\]"),
            ([8, 32, 16], 8, 32, r"the last number of --channels must be a multiple of 32, .* got \[8, 32, 16\]; or"),
            ([8, 16], 8, [8, 3], "a multiple of 3, .* give --network_def#num_head_channels"),
        ]
    )
    def test_channels_of_which_no_network_is_made(
        self, channels: list[int], groups: int, head: int | list[int], message: str
    ) -> None:
        with self.assertRaisesRegex(ValueError, message):
            check_channels(channels, groups, head)
        with self.assertRaises(ValueError):
            self.network_of(channels, groups, head)

    @parameterized.expand([(2, (16, 16)), (3, (4, 8, 16)), (1, (7, 9))])
    def test_size_that_can_be_halved_passes(self, levels: int, size: tuple[int, ...]) -> None:
        check_image_size(size, levels)

    @parameterized.expand([(2, (16, 17), "2"), (3, (8, 8, 6), "4"), (4, (12, 8), "8")])
    def test_size_that_cannot_be_halved(self, levels: int, size: tuple[int, ...], factor: str) -> None:
        given = " x ".join(map(str, size))
        with self.assertRaisesRegex(ValueError, f"of --image_size must be a multiple of {factor}, got {given}"):
            check_image_size(size, levels)
        with self.assertRaisesRegex(ValueError, "of the latents must be"):
            check_image_size(size, levels, "the latents")

    def test_sizes_refused_are_those_that_the_network_cannot_denoise(self) -> None:
        network = small_network(dropout=0.0)  # of two levels
        for size in (6, 7):
            images = torch.zeros(1, 1, size, 8)
            if size % 2:
                with self.assertRaisesRegex(ValueError, "needs spatial sizes that are multiples of 2"):
                    network(images, torch.tensor([5]))
                with self.assertRaisesRegex(ValueError, "must be a multiple of 2, got 7 x 8"):
                    check_image_size((size, 8), 2)
            else:
                check_image_size((size, 8), 2)
                self.assertEqual(network(images, torch.tensor([5])).shape, images.shape)

    @parameterized.expand(["denoise", "classify"])
    def test_half_a_network_trains_in_one_process(self, task: str) -> None:
        check_options(task=task)
        with (
            mock.patch("torch.distributed.is_initialized", return_value=True),
            mock.patch("torch.distributed.get_world_size", return_value=2),
        ):
            check_options(task="joint")
            with self.assertRaisesRegex(ValueError, f"--task {task} leaves half of the network"):
                check_options(task=task)


class TestHeadClasses(unittest.TestCase):
    def source(self, *class_names: str, label: Any = 0, multi_label: bool = False) -> ImageSource:
        source = open_source(phantom_counts=(2, 1, 1))
        items = {part: [{**item, "label": label} for item in source.part(part)] for part in source.items}
        return replace(source, items=items, class_names=list(class_names), multi_label=multi_label)

    def test_one_for_each_class(self) -> None:
        for task in ("joint", "denoise", "classify"):
            self.assertEqual(head_classes(self.source("a", "b", "c"), task), 3)
            self.assertEqual(head_classes(self.source("a", label=[1.0], multi_label=True), task), 1)

    def test_denoising_needs_no_labels(self) -> None:
        self.assertEqual(head_classes(self.source("unlabelled", label=-1), "denoise"), 2)

    @parameterized.expand([(-1, "no image has a label"), (0, "all are of the class 'one'")])
    def test_nothing_to_choose_from(self, label: int, reason: str) -> None:
        with self.assertRaisesRegex(ValueError, f"phantoms of seed 0 .*: {reason}. Give .*--class_names a,b"):
            head_classes(self.source("one", label=label))


class TestWeights(unittest.TestCase):
    def setUp(self) -> None:
        self.folder = temporary_folder(self)

    def save(self, content: Any) -> Path:
        torch.save(content, self.folder / "file.pt")
        return self.folder / "file.pt"

    def test_state_dict_and_checkpoint(self) -> None:
        weights = {"a": torch.arange(3.0)}
        torch.testing.assert_close(load_weights(self.save(weights)), weights)
        checkpoint = {"ema": weights, "network": {"a": torch.zeros(3)}, "iteration": 3}
        torch.testing.assert_close(load_weights(self.save(checkpoint)), weights)

    def test_other_files_are_refused_by_name(self) -> None:
        broken = self.folder / "broken.pt"
        broken.write_bytes(b"nothing")
        for path, message in (
            (self.folder / "none.pt", "cannot read weights from .*none.pt"),
            (broken, "cannot read weights from .*broken.pt"),
            (self.save([1, 2]), "file.pt holds no state dict"),
            (self.save({"a": 1}), "file.pt holds no state dict"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                load_weights(path)

    def test_pretrained_takes_what_fits_and_says_what_not(self) -> None:
        network, other = small_network(), small_network()
        weights = {key: value + 1 for key, value in other.state_dict().items()}
        missing, mismatched = list(weights)[:2]
        del weights[missing]
        weights[mismatched] = torch.zeros(1, 2, 3)
        weights["more"] = torch.zeros(1)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            report = load_pretrained(network, self.save(weights))
        assert report is not None
        self.assertEqual((report.missing, report.mismatched, report.unexpected), ([missing], [mismatched], ["more"]))
        self.assertEqual(set(report.loaded), set(before) - {missing, mismatched})
        for key, value in network.state_dict().items():
            torch.testing.assert_close(value, weights[key] if key in report.loaded else before[key], rtol=0, atol=0)
        self.assertIn(f"pretrained: {len(before) - 2} tensors loaded", text.getvalue())
        self.assertIn(f"missing: 1 ({missing})", text.getvalue())

    def test_pretrained_that_fits_nowhere_is_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "no tensor of .*file.pt fits JointDiffusionUNet"):
            load_pretrained(small_network(), self.save({"a": torch.zeros(1)}))
        self.assertIsNone(load_pretrained(small_network(), None))

    def test_frozen_encoder_has_no_gradient_and_the_rest_has(self) -> None:
        network = small_network()
        trainable = freeze_encoder(network)
        image = torch.randn(2, 1, 8, 8)
        output = network(image, torch.tensor([3, 700]), clean=image)
        (output.logits.square().sum() + output.prediction.square().sum()).backward()
        with_gradient = {name for name, p in network.named_parameters() if p.grad is not None}
        encoder = ("conv_in.", "time_embed.", "down_blocks.", "middle_block.")
        expected = {name for name, _ in network.named_parameters() if not name.startswith(encoder)}
        self.assertEqual(with_gradient, expected)
        self.assertEqual(len(trainable), len(expected))
        self.assertEqual(len(freeze_encoder(small_network(), False)), len(list(network.parameters())))

    def test_random_weights_are_not_frozen(self) -> None:
        for key in ("conv_in.conv.weight", "middle_block.resnet_1.conv1.conv.bias"):
            full = small_network().state_dict()
            lacking = {name: weight for name, weight in full.items() if name != key}
            for content in (lacking, {**full, key: torch.zeros(99)}):
                network = small_network()
                report = self.load(network, content)
                with self.assertRaisesRegex(ValueError, rf"keep random weights of 1 tensors \({key}\)\. Give the"):
                    freeze_encoder(network, True, report)
                self.assertTrue(all(parameter.requires_grad for parameter in network.parameters()))
                self.assertEqual(len(freeze_encoder(network, False, report)), len(list(network.parameters())))

    def test_the_rest_of_the_network_may_be_new(self) -> None:
        content = {key: weight for key, weight in small_network().state_dict().items() if not key.startswith("out.")}
        network = small_network()
        expected = len(freeze_encoder(small_network()))
        self.assertEqual(len(freeze_encoder(network, True, self.load(network, content))), expected)

    def test_new_class_condition_learns_and_a_loaded_one_does_not(self) -> None:
        for start, learns in ((small_network(), True), (conditional_network(), False)):
            network = conditional_network()
            freeze_encoder(network, True, self.load(network, dict(start.state_dict())))
            self.assertEqual(network.class_embedding.weight.requires_grad, learns)
            self.assertFalse(network.conv_in.conv.weight.requires_grad)

    def load(self, network: JointDiffusionUNet, content: dict[str, torch.Tensor]) -> PretrainedReport:
        with contextlib.redirect_stdout(io.StringIO()):
            report = load_pretrained(network, self.save(content))
        assert report is not None
        return report


class TestWords(unittest.TestCase):
    @parameterized.expand([("null", None), ("None", None), ("true", True), ("False", False), ("x", "x"), (0.5, 0.5)])
    def test_as_in_json(self, given: Any, expected: Any) -> None:
        self.assertIs(type(json_word(given)), type(expected))
        self.assertEqual(json_word(given), expected)


if __name__ == "__main__":
    unittest.main()
