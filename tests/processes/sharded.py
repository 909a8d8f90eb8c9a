"""The same fits under DDP and under FSDP2."""

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule

from nba_lightning import Classifier, FineTuning
from nba_lightning.attacks import BadNets
from nba_lightning.callbacks import Guard
from nba_lightning.io.weights import whole_state
from nba_lightning.pseudo import TriggerFamilies
from tests.processes.cases import data, trainer


class Layered(nn.Module):
    """It has a parameter of its own, blocks in a container without a forward pass, and BatchNorm; nothing is even."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(5, 1, 1))
        self.blocks = nn.ModuleList(self.block(*channels) for channels in ((1, 5), (5, 5)))
        self.fc = nn.Linear(5, 10)

    @staticmethod
    def block(before, after):
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.Tanh())

    def forward(self, images):
        for block in self.blocks:
            images = block(images) + self.shift
        return self.fc(images.mean(dim=(2, 3)))


def network():
    torch.manual_seed(11)
    return Layered()


def fsdp2():
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)


SHARDED = {
    "poisoned_training": (lambda: Classifier(network(), lr=0.5), "poisoned"),
    "sharded_fine_tuning": (lambda: FineTuning(network(), pseudo=TriggerFamilies(), mixed_share=0.5), "clean"),
}
STRATEGIES = {"ddp": lambda: "ddp", "fsdp2": fsdp2}


def fit(folder, name, strategy, ckpt_path=None):
    """Fit, test, and tell what is left behind."""
    make, train_on = SHARDED[name]
    module, loaded, guard = make(), data(2, BadNets(poison_rate=0.3), train_on), Guard()
    saver = ModelCheckpoint(folder / "checkpoints", filename="{epoch}", save_top_k=-1)
    runner = trainer(
        folder,
        2,
        strategy=STRATEGIES[strategy](),
        callbacks=[saver, *([guard] if name == "sharded_fine_tuning" else [])],
        enable_checkpointing=True,
        gradient_clip_val=0.2,
        limit_train_batches=8,
        limit_val_batches=1.0,
    )
    runner.fit(module, loaded, ckpt_path=ckpt_path)
    found = {"val": {key: float(value) for key, value in runner.callback_metrics.items() if key.startswith("val/")}}
    found |= {"sharded": isinstance(module.model, FSDPModule), "weights": whole_state(module.model)}
    found |= {"statistics": {key: value.clone() for key, value in module.model.named_buffers()}}
    found |= {"guard": {role: accuracy.value for role, accuracy in guard.accuracies.items()}}
    found |= {"metrics": runner.test(module, loaded, verbose=False)}
    return found


def shard(folder, names):
    """What was found under both strategies, and by a fit that goes on after its first epoch."""
    found = {}
    for name in (name for name in SHARDED if name in names):
        for strategy in STRATEGIES:
            found[name, strategy] = fit(folder / name / strategy, name, strategy)
        first = folder / name / "fsdp2" / "checkpoints" / "epoch=0.ckpt"
        found[name, "resumed"] = fit(folder / name / "resumed", name, "fsdp2", first)
    return {"/".join(key): value for key, value in found.items()}
