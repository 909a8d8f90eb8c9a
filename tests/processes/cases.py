"""What one process of several does; torchrun starts it, and the tests call it in one process to compare.

torchrun --standalone --nproc-per-node 2 -m tests.processes.cases FOLDER NAME...
"""

import logging
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from nba_lightning import (
    ANP,
    BAN,
    BTIDBF,
    D3,
    FST,
    FTSAM,
    IBAU,
    NAD,
    NBA,
    NPD,
    RNP,
    SAU,
    BackdoorDataModule,
    Classifier,
    FinePruning,
    FineTuning,
    InputAwareTraining,
    Unlearning,
)
from nba_lightning.attacks import LC, BadNets, InputAware, TrojanNN
from nba_lightning.defenses.nba import Terms
from nba_lightning.networks import SmallCNN
from nba_lightning.pseudo import ClassPatches, ClassPerturbations, LatentPerturbations, UniversalPerturbations
from tests.helpers import lively

GLOBAL_BATCH = 24


class NoStatistics(nn.Module):
    """A network without batch normalisation, whose mean gradient does not depend on how a batch is split."""

    feature_layers = ["first", "second"]

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2))
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.Tanh())
        self.fc = nn.Linear(8, 10)

    def forward(self, images):
        return self.fc(self.second(self.first((images - 0.5) / 0.25)).mean(dim=(2, 3)))


def network(cls=NoStatistics):
    torch.manual_seed(11)
    return SmallCNN(width=4, in_channels=1) if cls is SmallCNN else cls()


def teacher():
    torch.manual_seed(12)
    return NoStatistics()


def resting():
    """A network whose BatchNorm layers rest in ``eval`` mode, and so do not depend on the batch either."""
    found = lively(network(SmallCNN))
    for norm in (module for module in found.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eval()
    return found


TERMS = Terms(cross_entropy=1.0, teacher=1.0, alignment=1.0)


def nba():
    """All images are pseudo samples, none is mixed: which ones are depends on the split otherwise."""
    pseudo = UniversalPerturbations(rms=0.2, steps=3)
    return NBA(network(), teacher=teacher(), pseudo=pseudo, pseudo_share=1.0, terms=TERMS, mixed_share=0.0)


# Defences whose step on a global batch is the same however the batch is split.
SAME = {
    "fine_tuning": lambda: FineTuning(network()),
    "fine_pruning": lambda: FinePruning(network(), max_drop=0.0),
    "nad": lambda: NAD(network(), teacher=teacher(), betas=[1.0, 1.0], lr=0.02),
    "nba": nba,
    "ft_sam": lambda: FTSAM(network(), rho=20.0, lr=0.1),
    "anp": lambda: ANP(resting(), steps=2),
    "fst": lambda: FST(network()),
    "d3": lambda: D3(network()),
    "rnp": lambda: RNP(resting(), unlearning_rounds=2, lr=20.0, max_drop=1.0),
    "ban": lambda: BAN(resting(), steps=2),
    "npd": lambda: NPD(network(), lr=1e-3),
    "sau": lambda: SAU(network(), lr=1e-3),
    "i_bau": lambda: IBAU(network(), portion=1.0, lr=1e-3),
}


def trainer(folder, world, **kwargs):
    defaults = {
        "accelerator": "cpu",
        "devices": world,
        "strategy": "ddp" if world > 1 else "auto",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
        "default_root_dir": folder,
        "max_epochs": 2,
    }
    return pl.Trainer(**(defaults | kwargs))


def data(world, attack=None, train_on="clean", **kwargs):
    return BackdoorDataModule(
        attack=attack or BadNets(), train_on=train_on, batch_size=GLOBAL_BATCH // world, eval_batch_size=13, **kwargs
    )


def run(folder, world, names):
    """Everything that must be the same on every process and for any number of them."""
    found = {}
    for name in (name for name in SAME if name in names):
        module, loaded, runner = SAME[name](), data(world), trainer(Path(folder) / name, world)
        runner.fit(module, loaded)
        learned = {key: value for key, value in module.state_dict().items() if key.startswith(("masks.", "polarizer."))}
        found[name] = {**module.model.state_dict(), **learned}
        found[f"{name}/metrics"] = trainer(folder, world).test(module, loaded, verbose=False)
        if name == "nba":
            found["bank"], found["partition"] = module.pseudo.bank, vars(loaded.partition)
    return found


def agree(folder, world, names):
    """What must be the same on every process, but depends on how batches are split."""
    return {name: AGREE[name](folder, world) for name in AGREE if name in names}


def input_aware(folder, world):
    joint = data(world, InputAware(width=8), "untriggered")
    joint.batch_size = 128
    module = InputAwareTraining(network(SmallCNN), mask_epochs=1)
    strategy = "ddp_find_unused_parameters_true" if world > 1 else "auto"
    trainer(folder, world, strategy=strategy).fit(module, joint)
    return {**module.model.state_dict(), **joint.attack.pattern_network.state_dict()}


def optimised(make):
    """A trigger that is optimised before training."""

    def fit(folder, world):
        attack = make()
        poisoned = data(world, attack, "poisoned")
        poisoned.batch_size = 128
        classifier = Classifier(network(SmallCNN))
        trainer(folder, world, max_steps=3, max_epochs=-1).fit(classifier, poisoned)
        state = {key: value for key, value in attack.state_dict().items() if isinstance(value, torch.Tensor)}
        return {**classifier.model.state_dict(), **state}

    return fit


def bti_dbf(folder, world):
    """Each process generates a tenth and one of its own images."""
    defense = BTIDBF(network(), layer="second", mask_epochs=1, generator_epochs=1, generator_width=4, lr=1e-3)
    trainer(folder, world).fit(defense, data(world))
    target = torch.tensor(defense.inversion.target)
    return {**defense.model.state_dict(), **defense.inversion.generator.state_dict(), "target": target}


def anp_by_batch(folder, world):
    """The mask of a channel is trained on every process; running statistics are each process's own."""
    anp, saver = ANP(network(SmallCNN)), ModelCheckpoint(Path(folder) / "ckpt", save_last=True)
    trainer(folder, world, enable_checkpointing=True, callbacks=[saver]).fit(anp, data(world))
    return {f"mask{i}": mask.detach() for i, mask in enumerate(anp.masks)}


def unlearning(folder, world):
    """Which images are pseudo samples, and of which row of the bank, depends on the split."""
    parts = {"perturbations": ClassPerturbations((0.1,), 2, 4), "patches": ClassPatches(2, 2, 2)}
    defense = Unlearning(network(), teacher=teacher(), classes=[0, 3], **parts)
    trainer(folder, world).fit(defense, data(world))
    return {
        **defense.model.state_dict(),
        "perturbations": parts["perturbations"].bank,
        "patches": parts["patches"].bank,
    }


def perturbed_features(folder, world):
    """Which images carry them depends on the split."""
    latent = LatentPerturbations(steps=2, images_each=2)
    defense = FineTuning(network(), latent=latent)
    trainer(folder, world).fit(defense, data(world))
    return {**defense.model.state_dict(), **latent.banks}


AGREE = {
    "perturbed_features": perturbed_features,
    "unlearning": unlearning,
    "input_aware": input_aware,
    "trojannn": optimised(lambda: TrojanNN(network(SmallCNN).eval(), steps=3)),
    "lc": optimised(lambda: LC(network(SmallCNN).eval(), steps=2)),
    "anp_by_batch": anp_by_batch,
    "bti_dbf": bti_dbf,
}


def main():
    from tests.processes.sharded import shard  # which needs this file

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder, names, world = Path(sys.argv[1]), sys.argv[2:], 2
    found = run(folder, world, names) | agree(folder / "agree", world, names) | shard(folder / "sharded", names)
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main()
