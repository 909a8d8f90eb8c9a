"""The authors' code of Neural Attention Distillation, for ``peers.py``.

Input is ``data_loader.get_train_loader``, distillation ``main.train_step``, training and evaluation ``train_step`` and
``test`` of ``train_badnet.py``, all with its WideResNet-16-1. In the place of ``datasets.CIFAR10`` stand our images.
"""

import argparse
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from clones import Clone, Imported, Pictures
from common import Noise
from peers_ours import BATCH, Nothing, data, epoch, plain, test
from timing import timed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nba_lightning import FineTuning
from nba_lightning.attacks import BadNets
from nba_lightning.defenses import NAD

CLONE = Clone(
    "--nad",
    "github.com/bboylyg/NAD",
    ("main", "train_badnet", "data_loader", "config", "at", "models.wresnet"),
)


def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...]) -> list[Tensor]:
    """In percent, in the place of theirs."""
    hits = output.topk(max(topk), 1).indices.eq(target[:, None])
    return [hits[:, :k].float().sum() * (100 / len(target)) for k in topk]


def options(clone: Imported) -> Any:
    """Their own defaults, without a GPU, with all images, and without a word."""
    found = clone.config.get_arguments().parse_args([])
    found.cuda, found.device, found.ratio, found.print_freq = 0, "cpu", 1.0, 10**9
    found.batch_size, found.target_label = BATCH, 0
    return found


def _ours_in_place_of_cifar(args: argparse.Namespace, clone: Imported) -> Any:
    pictures = Pictures(Noise(args.images))
    return patch.object(clone.data_loader, "datasets", SimpleNamespace(CIFAR10=lambda **_: pictures))


def train_loader(args: argparse.Namespace, clone: Imported) -> DataLoader[Any]:
    with _ours_in_place_of_cifar(args, clone):
        loader: DataLoader[Any] = clone.data_loader.get_train_loader(options(clone))
    return loader


def _network(clone: Imported) -> nn.Module:
    found: nn.Module = clone.wresnet.WideResNet(depth=16, num_classes=10, widen_factor=1, dropRate=0)
    return found


def _epoch(args: argparse.Namespace, clone: Imported, script: Any) -> float:
    opt, loader, student, teacher = options(clone), train_loader(args, clone), _network(clone), _network(clone)
    nets = {"snet": student, "tnet": teacher.eval().requires_grad_(False)}
    criterions = {"criterionCls": nn.CrossEntropyLoss(), "criterionAT": clone.at.AT(opt.p)}
    optimizer = torch.optim.SGD(
        student.parameters(), opt.lr, momentum=opt.momentum, weight_decay=opt.weight_decay, nesterov=True
    )
    with patch.object(script, "accuracy", accuracy):
        return timed(lambda: script.train_step(opt, loader, nets, optimizer, criterions, 1)) / args.images


def inputs(args: argparse.Namespace, clone: Imported) -> Any:
    """Their training loader over ours, which also triggers a tenth of the images."""
    loader = train_loader(args, clone)
    return (
        lambda: timed(lambda: [None for _ in loader]) / args.images,
        lambda: epoch(args, Nothing(), data(args, BadNets())),
    )


def distillation(args: argparse.Namespace, clone: Imported) -> Any:
    """An epoch of their student over one of our NAD."""
    clean = {"train_on": "clean", "clean_fraction": 1.0}
    return (
        lambda: _epoch(args, clone, clone.main),
        lambda: epoch(args, NAD(plain(args), teacher=plain(args)), data(args, None, **clean)),
    )


def training(args: argparse.Namespace, clone: Imported) -> Any:
    """An epoch with cross-entropy alone, on the same images, over one of our FineTuning."""
    clean = {"train_on": "clean", "clean_fraction": 1.0}
    return (
        lambda: _epoch(args, clone, clone.train_badnet),
        lambda: epoch(args, FineTuning(plain(args)), data(args, None, **clean)),
    )


def evaluation(args: argparse.Namespace, clone: Imported) -> Any:
    """Clean and triggered test images; theirs leaves the target's class out of both, hence per image."""
    opt, nets, criterions = options(clone), {"snet": _network(clone)}, {"criterionCls": nn.CrossEntropyLoss()}
    with _ours_in_place_of_cifar(args, clone):
        loaders = clone.data_loader.get_test_loader(opt)
    images = sum(len(loader.dataset) for loader in loaders)
    script = clone.train_badnet

    def theirs() -> float:
        with (
            patch.object(script, "accuracy", accuracy),
            patch.object(script, "pd", MagicMock()),
            patch.object(Tensor, "cuda", lambda tensor: tensor),
        ):
            return timed(lambda: script.test(opt, *loaders, nets, criterions, 1)) / images

    return theirs, lambda: test(args, data(args, BadNets()))
