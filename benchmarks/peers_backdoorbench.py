"""BackdoorBench's code, for ``peers.py``.

Input is ``prepro_cls_DatasetBD_v2`` with the transforms of ``get_transform``, in PyTorch's loader; training and
evaluation are ``train_one_epoch_on_mix``, ``test_given_dataloader`` and ``test_given_dataloader_on_mix`` of
``BackdoorModelTrainer``. WaNet is ``Wanet.train_step``, which warps in the step.
"""

import argparse
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from clones import Clone, Imported, Pictures
from common import Noise
from peers_ours import BATCH, Constant, Nothing, data, epoch, plain, test
from timing import timed
from torch import nn
from torch.utils.data import DataLoader

from nba_lightning import Classifier
from nba_lightning.attacks import Attack, BadNets, Blended, WaNet
from nba_lightning.networks import Normalize

CLONE = Clone(
    "--backdoorbench",
    "github.com/SCLBD/BackdoorBench",
    (
        "utils.bd_dataset_v2",
        "utils.trainer_cls",
        "utils.aggregate_block.dataset_and_transform_generate",
        "utils.bd_img_transform.patch",
        "utils.bd_img_transform.blended",
        "attack.wanet",
    ),
)
OURS: dict[str, type[Attack]] = {"badnets": BadNets, "blended": Blended, "wanet": WaNet}
CPU = torch.device("cpu")


def _triggered(clone: Imported, name: str, pictures: Pictures, poisoned: np.ndarray) -> Any:
    """Their poisoned set; the trigger is put on here, before anything is timed."""
    if name == "badnets":
        square = np.zeros((32, 32, 3), np.uint8)
        square[-3:, -3:] = 255
        trigger = clone.patch.AddMaskPatchTrigger(square)
    else:
        trigger = clone.blended.blendedImageAttack(np.random.default_rng(0).integers(0, 256, (32, 32, 3)), 0.2)
    return clone.bd_dataset_v2.prepro_cls_DatasetBD_v2(
        pictures,
        poison_indicator=poisoned,
        bd_image_pre_transform=lambda image, **_: np.clip(trigger(np.array(image)), 0, 255),
        bd_label_pre_transform=lambda label: 0,
    )


def _loader(clone: Imported, images: Any, train: bool, augment: bool = True) -> DataLoader[Any]:
    transform = clone.dataset_and_transform_generate.get_transform("cifar10", 32, 32, train=train and augment)
    return DataLoader(
        clone.bd_dataset_v2.dataset_wrapper_with_transform(images, transform), BATCH, shuffle=train, drop_last=train
    )


def _poisoned_loader(args: argparse.Namespace, clone: Imported, name: str) -> DataLoader[Any]:
    poisoned = np.zeros(args.images)
    poisoned[np.random.default_rng(0).permutation(args.images)[: args.images // 10]] = 1
    return _loader(clone, _triggered(clone, name, Pictures(Noise(args.images)), poisoned), train=True)


def _unnormalised(args: argparse.Namespace) -> nn.Module:
    found = plain(args)
    found.normalize = nn.Identity()
    return found


def _trainer(clone: Imported, model: nn.Module, loader: DataLoader[Any]) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    found = clone.trainer_cls.BackdoorModelTrainer(model)
    found.set_with_dataloader(loader, {}, nn.CrossEntropyLoss(), optimizer, schedule, CPU, False, 0, None, "attack")
    return found


def _wanet(args: argparse.Namespace, clone: Imported, model: nn.Module) -> float:
    """Seconds per image of their step, which loads, warps, augments and trains."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    opt = SimpleNamespace(dataset="cifar10", input_height=32, input_width=32, non_blocking=False, pratio=0.1)
    opt.attack_label_trans, opt.attack_target, opt.num_classes, opt.cross_ratio = "all2one", 0, 10, 2
    opt.s, opt.k, opt.grid_rescale, opt.random_crop, opt.random_rotation = 0.5, 4, 1, 5, 10  # their defaults
    field = torch.rand(1, 32, 32, 2) * 2 - 1
    identity = F.affine_grid(torch.eye(2, 3)[None], [1, 3, 32, 32], align_corners=True)
    loader = _loader(clone, Pictures(Noise(args.images)), train=True, augment=False)
    attack = clone.wanet.Wanet()
    attack.device = CPU
    step = attack.train_step
    return timed(lambda: step(model, optimizer, schedule, loader, field, identity, 0, opt)) / args.images


def inputs(name: str, args: argparse.Namespace, clone: Imported) -> Any:
    """Their loader over ours with normalisation, which is our network's first layer."""
    if name == "wanet":
        return (
            lambda: _wanet(args, clone, Constant()),
            lambda: epoch(args, Classifier(nn.Sequential(Normalize(), Constant())), data(args, WaNet())),
        )
    loader = _poisoned_loader(args, clone, name)
    return (
        lambda: timed(lambda: [None for _ in loader]) / args.images,
        lambda: epoch(args, Nothing(Normalize()), data(args, OURS[name]())),
    )


def training(name: str, args: argparse.Namespace, clone: Imported) -> Any:
    """An epoch of poisoned training over one of our Classifier."""
    loader = None if name == "wanet" else _poisoned_loader(args, clone, name)

    def theirs() -> float:
        model = _unnormalised(args)
        if loader is None:
            return _wanet(args, clone, model)
        runner = _trainer(clone, model, loader)
        return timed(lambda: runner.train_one_epoch_on_mix(verbose=1)) / args.images

    return theirs, lambda: epoch(args, Classifier(plain(args)), data(args, OURS[name]()))


def evaluation(args: argparse.Namespace, clone: Imported) -> Any:
    """Clean test images, and triggered ones of all classes but the target's."""
    pictures = Pictures(Noise(args.images))
    others = (np.array(pictures.targets) != 0).astype(float)
    triggered = _triggered(clone, "badnets", pictures, others)
    triggered.subset(np.where(others == 1)[0])
    clean, bad = (_loader(clone, images, train=False) for images in (pictures, triggered))
    runner = _trainer(clone, _unnormalised(args), clean)

    def loop() -> None:
        runner.test_given_dataloader(clean, verbose=1)
        runner.test_given_dataloader_on_mix(bad, verbose=1)

    number = len(clean.dataset) + len(bad.dataset)
    return lambda: timed(loop) / number, lambda: test(args, data(args, BadNets()))
