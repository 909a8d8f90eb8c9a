"""What several test files share: modules without a fit, networks that note what they see, equations by plain loops."""

import copy
import math
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from nba_lightning.networks import SmallCNN


def run_script(command):
    """Run ``[python, script, *arguments]`` like :func:`subprocess.run`, without the seconds that imports take.

    A process of its own, forked from one that has imported the libraries, but nothing of ours.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lightning.pytorch", "torchmetrics", "torchvision", "sklearn.datasets"])
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = context.Process(target=_script, args=(command[1:], str(out), str(err)))
        process.start()
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())


def _script(arguments, out, err):
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv, sys.path[:] = arguments, [str(Path(arguments[0]).parent), *sys.path]
    runpy.run_path(arguments[0], run_name="__main__")


def ready(module, trainer):
    """A module whose steps can be called without a fit."""
    module.trainer, module.log, module.log_dict = trainer(), lambda *args, **kwargs: None, lambda *args, **kwargs: None
    return module


def batch(size=6):
    """Images and labels of the digits' shape."""
    return torch.rand(size, 1, 8, 8), torch.randint(0, 10, (size,))


def lively(network, seed=0):
    """The network with BatchNorm weights, biases and statistics that are not those of a fresh one."""
    generator = torch.Generator().manual_seed(seed)
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor, low, high in (
            (norm.weight.data, 0.5, 1.5),
            (norm.bias.data, -1.0, 1.0),
            (norm.running_mean, -0.5, 0.5),
            (norm.running_var, 0.5, 1.5),
        ):
            tensor.uniform_(low, high, generator=generator)
    return network


def drifted(network, amount=0.05, seed=5):
    """A copy of a network with other weights."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        parameter.data += amount * torch.randn(parameter.shape, generator=generator)
    return other


def cross_entropy(logits, labels, smoothing=0.0):
    """Image by image, from the definition."""
    total, classes = 0.0, logits.shape[1]
    for one, label in zip(logits, labels.tolist(), strict=True):
        normaliser = sum(math.e**value for value in one).log()
        for k in range(classes):
            share = (1 - smoothing) * (k == label) + smoothing / classes
            total = total - share * (one[k] - normaliser)
    return total / len(logits)


class Spy(nn.Module):
    """A network that notes what it is called with, and in which mode each of its layers is."""

    feature_layers = ("net.block1", "net.block2", "net.block3")

    def __init__(self, net):
        super().__init__()
        self.net, self.images, self.modes = net, [], []

    def forward(self, images):
        self.images.append(images.detach().clone())
        self.modes.append({module.training for module in self.net.modules()})
        return self.net(images)


def small(seed=1):
    """A network of the digits' shape."""
    torch.manual_seed(seed)
    return SmallCNN(width=4, in_channels=1)


def normalised_by_hand(network, images, weights, biases):
    """Logits where every BatchNorm is written out, with other weights and biases; one `(C,)` of each for each layer."""

    def replace(norm, weight, bias):
        def hook(module, inputs, output):
            x, shape = inputs[0], (1, -1, 1, 1)
            mean, variance = norm.running_mean, norm.running_var
            if norm.training:
                mean, variance = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
            scaled = (x - mean.view(shape)) / (variance.view(shape) + norm.eps) ** 0.5
            return scaled * weight.view(shape) + bias.view(shape)

        return norm.register_forward_hook(hook)

    handles = [replace(*triple) for triple in zip(norms_of(network), weights, biases, strict=True)]
    try:
        return network(images)
    finally:
        for handle in handles:
            handle.remove()


def norms_of(network):
    """The BatchNorm layers of a network, in its order."""
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
