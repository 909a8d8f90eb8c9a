"""Networks that are sharded over processes: FSDP2, under Lightning's ``ModelParallelStrategy``."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from nba_lightning.core.checks import expected

_WHOLE = "one that keeps the whole network on each process, such as `ddp`"


def prepare_sharding(module: Any) -> bool:
    """Check that a module's network can be sharded where its Trainer asks for it, and have it sharded.

    Args:
        module: a :class:`~nba_lightning.training.classifier.Classifier` with a Trainer whose processes have started.

    Returns:
        Whether it will be sharded by FSDP2.

    Raises:
        ValueError: for a method, network or setting that sharding does not bear.
    """
    strategy, name = module.trainer.strategy, type(module).__name__
    got = type(strategy).__name__
    if module.needs_whole_network and isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        why = f"{_WHOLE}, for {name}, whose hooks, perturbations or copies need all of it"
        raise expected("strategy", why, got)
    if not isinstance(strategy, ModelParallelStrategy):
        if isinstance(module.model, FSDPModule):  # a pass of one process alone would wait for the others
            other = "a whole network; load what was saved (`weights`) into a new one"
            raise expected("model", other, f"one that another fit has sharded, under {got}")
        return False
    _check_settings(module)
    _check_weights(module.model)
    if not is_overridden("configure_model", module):
        # Not written in the class: averaging callbacks warn wherever a class has this hook, whatever the strategy.
        vars(module)["configure_model"] = partial(_shard, module)
    return True


def _check_settings(module: Any) -> None:
    strategy = module.trainer.strategy
    parts, processes = strategy.device_mesh["tensor_parallel"].size(), module.trainer.world_size
    kinds = (WeightAveraging, StochasticWeightAveraging)
    averaging = [type(one).__name__ for one in module.trainer.callbacks if isinstance(one, kinds)]
    sizes = f"1, and `data_parallel_size` {processes}, since data-parallel processes alone share out the network"
    refused = {
        "tensor_parallel_size": (parts != 1, sizes, parts),
        "sync_batchnorm": (bool(getattr(strategy, "_layer_sync", None)), "false, since it does nothing here", True),
        "compile": (module.compile_networks, "false", module.compile_networks),
        "channels_last": (module.channels_last, "none or false", module.channels_last),
        "callbacks": (averaging, "without averaging of whole networks", averaging),
    }
    for name, (wrong, wanted, got) in refused.items():
        if wrong:
            raise expected(name, f"{wanted}, under {type(strategy).__name__} (or take `ddp`)", got)


def _check_weights(network: nn.Module) -> None:
    own = dict(network.named_parameters())
    twice = [name for name, _ in network.named_parameters(remove_duplicate=False) if name not in own]
    if twice:  # each place would get a shard of its own, and they would part
        raise expected(
            "model", "a network without tied weights, to be sharded (or take `ddp`)", f"one with {twice[0]!r}"
        )


def _shard(module: Any) -> None:
    """Shard the network by its large blocks, and what is left of it last; once."""
    network = module.model
    if isinstance(network, FSDPModule) or not isinstance(module.trainer.strategy, ModelParallelStrategy):
        return
    mesh = module.trainer.strategy.device_mesh["data_parallel"]
    for block in [*blocks_of(network), network]:
        fully_shard(block, mesh=mesh)
    network.register_forward_pre_hook(FirstProcessBuffers())


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The parts of a network whose weights are gathered together, one part after the other.

    They are its children with parameters. Containers (``nn.Sequential`` and what has no forward pass of its own) and
    children with more than half of all parameters are taken apart; such as the encoder of a transformer, whose blocks
    are the parts then.
    """
    half = _size(network) / 2
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            container = isinstance(child, nn.Sequential) or type(child).forward is nn.Module.forward
            if (container or _size(child) > half) and next(child.children(), None) is not None:
                walk(child)
            elif not container and _size(child):
                found.append(child)

    walk(network)
    return found


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class FirstProcessBuffers:
    """Forward pre-hook: a network in ``eval`` mode goes by the first process's BatchNorm statistics, as under DDP.

    In training each process has its own, and those of the first one are saved.
    """

    def __init__(self) -> None:
        self.differ = True

    def __call__(self, network: nn.Module, args: Any) -> None:
        """Take them over before the first pass in ``eval`` mode after one in training mode."""
        if self.differ and not network.training:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, src=0)
        self.differ = network.training
