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

"""Terms for images without a label, and the objective with one of them."""

from __future__ import annotations

import math
import unittest
from unittest import mock

import torch
import torch.nn.functional as F
from parameterized import parameterized
from torch import Tensor

from monai_jointdiff.losses import (
    FixMatchLoss,
    JointDiffusionLoss,
    PiModelLoss,
    PseudoLabelLoss,
    SemiSupervisedLoss,
    UnlabelledSums,
)

LOSSES = "monai_jointdiff.losses.semi_supervised"


def normal(*size: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(size, generator=generator, dtype=torch.float64)).requires_grad_()


def joint_case(unlabelled: int = 6, views: int = 2) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Two labelled images, then the views of the unlabelled; all are denoised."""
    rows, images = 2 + views * unlabelled, 2 + unlabelled
    output = normal(rows, 3), normal(images, 1, 4, 4, seed=1)
    targets = {
        "label": torch.tensor([2, 0] + [-1] * (rows - 2)),
        "view": torch.tensor([-1, -1] + [n for n in range(views) for _ in range(unlabelled)]),
        "target": torch.zeros(images, 1, 4, 4),
        "weight": torch.ones(images),
    }
    return output, targets


class TestFixMatch(unittest.TestCase):
    @parameterized.expand([(0.0,), (0.6,), (0.95,), (1.0,)])
    def test_by_hand(self, threshold: float) -> None:
        weak, strong = normal(20, 3), normal(20, 3, seed=1)
        sums = FixMatchLoss(threshold)([weak, strong])
        expected, sure = 0.0, 0
        for w, s in zip(weak.tolist(), strong.tolist(), strict=True):
            p = [math.exp(x) / sum(map(math.exp, w)) for x in w]
            if max(p) >= threshold:
                sure += 1
                expected -= math.log(math.exp(s[p.index(max(p))]) / sum(map(math.exp, s)))
        self.assertAlmostEqual(sums.loss.item(), expected, places=9)
        self.assertEqual((int(sums.count), int(sums.reported["pseudo_label_rate"])), (20, sure))
        if threshold == 0.95:
            self.assertTrue(0 < sure < 20)  # the case says something

    def test_several_labels_by_hand(self) -> None:
        weak, strong = normal(20, 3), normal(20, 3, seed=1)
        sums = FixMatchLoss(0.9, multi_label=True)([weak, strong])
        expected, sure = 0.0, 0
        for w, s in zip(weak.flatten().tolist(), strong.flatten().tolist(), strict=True):
            p, q = 1 / (1 + math.exp(-w)), 1 / (1 + math.exp(-s))
            if max(p, 1 - p) >= 0.9:
                sure += 1
                expected -= math.log(q if p > 0.5 else 1 - q)
        self.assertAlmostEqual(sums.loss.item(), expected, places=9)
        self.assertEqual((int(sums.count), int(sums.reported["pseudo_label_rate"])), (60, sure))
        self.assertTrue(0 < sure < 60)

    @parameterized.expand([(False,), (True,)])
    def test_weak_view_gets_no_gradient_and_unsure_images_none(self, multi_label: bool) -> None:
        weak, strong = normal(8, 3, scale=0.1), normal(8, 3, seed=1)
        with torch.no_grad():
            weak[:3] *= 1000
        FixMatchLoss(0.9, multi_label)([weak, strong]).loss.backward()
        self.assertIsNone(weak.grad)
        changed = strong.grad.abs().sum(dim=1) > 0
        self.assertEqual(changed.tolist(), [True] * 3 + [False] * 5)

    @parameterized.expand([(-0.1,), (1.1,), (float("nan"),)])
    def test_wrong_threshold(self, threshold: float) -> None:
        with self.assertRaisesRegex(ValueError, r"FixMatchLoss: threshold must be in \[0, 1\], got"):
            FixMatchLoss(threshold)


class TestPiModel(unittest.TestCase):
    @parameterized.expand([(False,), (True,)])
    def test_by_hand(self, multi_label: bool) -> None:
        first, second = normal(5, 3), normal(5, 3, seed=1)
        sums = PiModelLoss(multi_label)([first, second])
        p, q = (x.sigmoid() if multi_label else x.exp() / x.exp().sum(dim=1, keepdim=True) for x in (first, second))
        torch.testing.assert_close(sums.loss / sums.count, F.mse_loss(p, q))
        self.assertEqual(sums.reported, {})
        sums.loss.backward()
        self.assertGreater(min(float(view.grad.abs().min()) for view in (first, second)), 0.0)

    def test_equal_views_cost_nothing(self) -> None:
        logits = normal(5, 3)
        self.assertEqual(float(PiModelLoss()([logits, logits]).loss), 0.0)


class TestPseudoLabels(unittest.TestCase):
    def test_by_hand(self) -> None:
        logits, q = normal(6, 3), normal(6, 3, seed=1).softmax(dim=1).detach()
        w = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 2.0])
        sums = PseudoLabelLoss()([logits], pseudo_label=q, pseudo_weight=w)
        expected = 0.0
        for one, label, weight in zip(logits.tolist(), q.tolist(), w.tolist(), strict=True):
            total = sum(map(math.exp, one))
            expected -= weight * sum(p * math.log(math.exp(x) / total) for x, p in zip(one, label, strict=True))
        self.assertAlmostEqual(sums.loss.item(), expected, places=9)
        self.assertEqual((int(sums.count), int(sums.reported["pseudo_label_rate"])), (6, 4))
        sums.loss.backward()
        self.assertEqual((logits.grad.abs().sum(dim=1) > 0).tolist(), (w > 0).tolist())

    def test_several_labels_by_hand(self) -> None:
        logits, q, w = normal(4, 3), normal(4, 3, seed=1).sigmoid().detach(), torch.tensor([1.0, 0.0, 0.5, 1.0])
        sums = PseudoLabelLoss(multi_label=True)([logits], pseudo_label=q, pseudo_weight=w)
        p = logits.sigmoid()
        expected = -(w[:, None] * (q * p.log() + (1 - q) * (1 - p).log())).sum()
        torch.testing.assert_close(sums.loss, expected)
        self.assertEqual((int(sums.count), int(sums.reported["pseudo_label_rate"])), (12, 9))

    def test_hard_pseudo_labels_are_labels(self) -> None:
        """With one for each unlabelled image the term is the cross-entropy of these labels."""
        output, targets = joint_case(views=1)
        hidden = torch.tensor([2, 1, 0, 0, 1, 2])
        loss = SemiSupervisedLoss(PseudoLabelLoss(), classification_weight=0.3)
        pseudo = {"pseudo_label": F.one_hot(hidden, 3).double(), "pseudo_weight": torch.ones(6)}
        total = loss(output, {**targets, **pseudo})
        expected = F.cross_entropy(output[0][2:], hidden)
        torch.testing.assert_close(loss.terms["unlabelled"], expected.detach())
        rest = loss.terms["diffusion"] + 0.3 * loss.terms["classification"]
        torch.testing.assert_close(total.detach(), rest + 0.3 * expected.detach())
        self.assertEqual(float(loss.terms["pseudo_label_rate"]), 1.0)

    def test_nothing_before_the_first_round(self) -> None:
        (logits, prediction), targets = joint_case(views=1)
        loss = SemiSupervisedLoss(PseudoLabelLoss())
        loss((logits, prediction), {**targets, "pseudo_label": torch.zeros(6, 3), "pseudo_weight": torch.zeros(6)})
        self.assertEqual((float(loss.terms["unlabelled"]), float(loss.terms["pseudo_label_rate"])), (0.0, 0.0))

    def test_wrong_input(self) -> None:
        output, targets = joint_case(views=1)
        with self.assertRaisesRegex(ValueError, "PseudoLabelLoss: the targets hold no pseudo-labels; give"):
            SemiSupervisedLoss(PseudoLabelLoss())(output, targets)
        with self.assertRaisesRegex(ValueError, r"pseudo-labels of logits \(6, 3\) .* got \(6, 2\) and \(6,\)"):
            PseudoLabelLoss()([normal(6, 3)], torch.zeros(6, 2), torch.zeros(6))


class TestSemiSupervisedLoss(unittest.TestCase):
    @parameterized.expand([(FixMatchLoss(0.8),), (PiModelLoss(),)])
    def test_is_the_joint_loss_and_the_weighted_mean_of_the_term(self, term: FixMatchLoss | PiModelLoss) -> None:
        output, targets = joint_case()
        loss = SemiSupervisedLoss(term, unlabelled_weight=2.0, classification_weight=0.3)
        total = loss(output, targets)
        joint = JointDiffusionLoss(classification_weight=0.3)
        without = joint((output[0][:2], output[1]), {**targets, "label": targets["label"][:2]})
        sums = term([output[0][2:8], output[0][8:]])
        torch.testing.assert_close(total, without + 0.3 * 2.0 * sums.loss / sums.count)
        for name in ("diffusion", "classification"):
            torch.testing.assert_close(loss.terms[name], joint.terms[name])
        torch.testing.assert_close(loss.terms["unlabelled"], (sums.loss / sums.count).detach())
        torch.testing.assert_close(loss.terms["total"], total.detach())
        reported = {"pseudo_label_rate"} if isinstance(term, FixMatchLoss) else set()
        self.assertEqual(set(loss.terms), {"diffusion", "classification", "unlabelled", "total"} | reported)
        self.assertFalse(any(value.requires_grad for value in loss.terms.values()))
        if reported:
            sure = (output[0][2:8].softmax(1).amax(1) >= 0.8).double().mean()
            self.assertAlmostEqual(float(loss.terms["pseudo_label_rate"]), float(sure))

    def test_alone_without_denoising(self) -> None:
        output, targets = joint_case()
        loss = SemiSupervisedLoss(FixMatchLoss(0.5), classification_weight=0.5)
        total = loss(output[0], {key: targets[key] for key in ("label", "view")})
        terms = loss.terms
        self.assertAlmostEqual(float(total), 0.5 * float(terms["classification"] + terms["unlabelled"]), places=12)

    def test_order_of_rows_does_not_matter(self) -> None:
        (logits, prediction), targets = joint_case()
        order = torch.tensor([2, 8, 0, 3, 9, 10, 1, 4, 5, 11, 6, 12, 7, 13])  # of each view the same order
        loss = SemiSupervisedLoss(PiModelLoss())
        first = loss((logits, prediction), targets)
        mixed = {**targets, "label": targets["label"][order], "view": targets["view"][order]}
        torch.testing.assert_close(loss((logits[order], prediction), mixed), first)

    def test_teacher_gives_the_first_view(self) -> None:
        (logits, prediction), targets = joint_case(views=1)
        taught = normal(6, 3, seed=5)
        loss = SemiSupervisedLoss(PiModelLoss())
        only_second = torch.where(targets["view"] == 0, 1, targets["view"])
        loss((logits, prediction), {**targets, "view": only_second, "teacher_logits": taught}).backward()
        expected = F.mse_loss(taught.softmax(1), logits[2:].softmax(1))
        self.assertAlmostEqual(float(loss.terms["unlabelled"]), float(expected), places=12)
        self.assertIsNone(taught.grad)

    def test_validation_and_joint_have_no_term(self) -> None:
        output, targets = joint_case()
        joint = JointDiffusionLoss()(output, targets)
        validation = SemiSupervisedLoss(FixMatchLoss(0.0))
        del targets["view"]
        self.assertEqual(float(validation(output, targets)), float(joint))
        self.assertNotIn("unlabelled", validation.terms)
        output, targets = joint_case(views=0)
        without = SemiSupervisedLoss(None)
        self.assertEqual(float(without(output, targets)), float(JointDiffusionLoss()(output, targets)))

    @parameterized.expand([(FixMatchLoss(),), (PiModelLoss(True),)])
    def test_no_unlabelled_image(self, term: FixMatchLoss | PiModelLoss) -> None:
        output, targets = joint_case(unlabelled=0)
        loss = SemiSupervisedLoss(term)
        loss(output, targets).backward()
        self.assertEqual(float(loss.terms["unlabelled"]), 0.0)
        self.assertTrue(bool(output[0].grad.isfinite().all()))

    def test_mean_is_over_the_images_of_all_processes(self) -> None:
        """Two processes with 4 and 2 unlabelled images: the mean of their gradients is that of one with all 6."""
        term = PiModelLoss()
        (logits, prediction), targets = joint_case()
        SemiSupervisedLoss(term, classification_weight=1.0)((logits, prediction), targets).backward()
        rows = [torch.tensor([0, 2, 3, 4, 5, 8, 9, 10, 11]), torch.tensor([1, 6, 7, 12, 13])]
        parts = torch.zeros_like(logits)
        for own, other_unlabelled in zip(rows, (2, 4), strict=True):
            counts = iter([1, other_unlabelled * 3])  # of the other process: labels, entries of the term
            copy = logits.detach()[own].requires_grad_()
            with (
                mock.patch("torch.distributed.is_initialized", lambda: True),
                mock.patch("torch.distributed.get_world_size", lambda: 2),
                mock.patch("torch.distributed.all_reduce", lambda x, c=counts: x.add_(next(c))),
            ):
                own_targets = {key: targets[key][own] for key in ("label", "view")}
                SemiSupervisedLoss(term, classification_weight=1.0)(copy, own_targets).backward()
            parts[own] = copy.grad / 2  # DistributedDataParallel averages over the processes
        torch.testing.assert_close(parts, logits.grad)

    def test_term_of_ones_own(self) -> None:
        class Entropy:
            views = ("image_cls",)

            def __call__(self, logits):
                p = logits[0].softmax(dim=1)
                return UnlabelledSums(-(p * p.log()).sum(), torch.tensor(len(p)), {})

        output, targets = joint_case(views=1)
        loss = SemiSupervisedLoss(Entropy())
        loss(output, targets)
        expected = torch.distributions.Categorical(logits=output[0][2:]).entropy().mean()
        self.assertAlmostEqual(float(loss.terms["unlabelled"]), float(expected), places=12)

    def test_wrong_input(self) -> None:
        with self.assertRaisesRegex(ValueError, "SemiSupervisedLoss: unlabelled_weight must be >= 0, got -1"):
            SemiSupervisedLoss(None, unlabelled_weight=-1)
        with self.assertRaisesRegex(ValueError, "JointDiffusionLoss: classification_weight must be >= 0"):
            SemiSupervisedLoss(None, classification_weight=-1)
        loss = SemiSupervisedLoss(FixMatchLoss())
        output, targets = joint_case()
        with self.assertRaisesRegex(ValueError, r"view \(M,\), got \(14, 3\) and \(3,\)"):
            loss(output, {**targets, "view": torch.zeros(3)})
        uneven = targets["view"].clone()
        uneven[2] = 1
        with self.assertRaisesRegex(ValueError, "compares the views image_cls, image_strong, .* hold 5, 7 of them"):
            loss(output, {**targets, "view": uneven})
        with self.assertRaisesRegex(ValueError, "hold 6, 6 of them, and 12 rows of views"):
            loss(output, {**targets, "teacher_logits": normal(6, 3)})


if __name__ == "__main__":
    unittest.main()
