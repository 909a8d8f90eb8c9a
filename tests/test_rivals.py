"""The core step of each rival defence against an independent formulation."""

import copy
import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from nba_lightning import ANP, FTSAM, IBAU, NAD, SAU, FinePruning
from nba_lightning.core.features import features
from nba_lightning.defenses.fine_pruning import keep_mask
from nba_lightning.defenses.ft_sam import adaptive_step
from nba_lightning.defenses.i_bau import hypergradient
from nba_lightning.defenses.sau import unlearning_loss
from nba_lightning.networks import SmallCNN


def ready(module, trainer):
    module.trainer, module.log = trainer(), lambda *args, **kwargs: None
    return module


def test_nad_s_loss_is_the_equation(network, trainer):
    teacher = SmallCNN(width=4, in_channels=1)
    module = ready(NAD(network, teacher=teacher, betas=[1.0, 2.0, 3.0]), trainer).eval()
    images, labels = torch.rand(5, 1, 8, 8), torch.randint(0, 10, (5,))
    loss = module.training_step((images, labels), 1)
    names = ["block1", "block2", "block3"]
    logits, observed = features(network, images, names)
    wanted = features(teacher.eval(), images, names)[1]
    expected = nn.functional.cross_entropy(logits, labels)
    for beta, name in zip((1.0, 2.0, 3.0), names, strict=True):
        total, count = 0.0, 0
        for mine, theirs in zip(observed[name], wanted[name], strict=True):  # one image and one position at a time
            maps = [(f**2).sum(dim=0).flatten() for f in (mine, theirs)]
            maps = [m / (m**2).sum().sqrt() for m in maps]
            total, count = total + ((maps[0] - maps[1]) ** 2).sum(), count + len(maps[0])
        expected = expected + beta * total / count
    torch.testing.assert_close(loss, expected)


def test_nad_s_defaults_and_bad_arguments(network):
    assert NAD(network).betas == [500.0, 1000.0, 1000.0]
    with pytest.raises(ValueError, match=r"Expected `betas` to be 3 weights, one for each layer, but got \[1.0\]"):
        NAD(network, betas=[1.0])
    with pytest.raises(ValueError, match="Expected `betas` to be at least 0, but got -1"):
        NAD(network, betas=[1.0, -1.0, 1.0])
    with pytest.raises(ValueError, match="got blok. Available"):
        NAD(network, layers=["blok"])


def test_the_adaptive_step_by_hand():
    weights = [torch.tensor([3.0, -1.0]), torch.tensor([2.0])]
    gradients = [torch.tensor([1.0, 2.0]), torch.tensor([0.0])]
    first, second = adaptive_step(weights, gradients, rho=2.0)
    norm = (3.0**2 + 2.0**2) ** 0.5  # of |w| g = (3, 2, 0)
    torch.testing.assert_close(first, torch.tensor([2 * 9 / norm, 2 * 2 / norm]))
    assert second.item() == 0.0
    scaled = adaptive_step(weights, [1000 * g for g in gradients], rho=2.0)
    torch.testing.assert_close(scaled[0], first)


def test_ft_sam_steps_along_the_gradient_at_the_moved_weights(trainer):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    images, labels = torch.rand(6, 1, 2, 2), torch.randint(0, 3, (6,))
    module = ready(FTSAM(copy.deepcopy(network), rho=0.5, label_smoothing=0.1), trainer)
    module.training_step((images, labels), 1).backward()
    moved = [p.clone() for p in module.model.parameters()]
    module.on_after_backward()
    linear = network[1]
    loss = nn.functional.cross_entropy(network(images), labels, label_smoothing=0.1)
    gradients = torch.autograd.grad(loss, [linear.weight, linear.bias])
    norm = sum((w.abs() * g).pow(2).sum() for w, g in zip(network.parameters(), gradients, strict=True)).sqrt()
    with torch.no_grad():
        for weight, gradient in zip(network.parameters(), gradients, strict=True):
            weight.add_(0.5 * weight**2 * gradient / norm)
    nn.functional.cross_entropy(network(images), labels, label_smoothing=0.1).backward()
    for mine, theirs, was in zip(module.model.parameters(), network.parameters(), moved, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
        torch.testing.assert_close(was, theirs)
        assert not torch.equal(mine, theirs)  # moved back


def test_ft_sam_s_second_pass_sees_the_moved_weights_under_autocast(network, trainer):
    images, labels = torch.rand(6, 1, 8, 8), torch.randint(0, 10, (6,))
    losses = []
    for rho in (0.0, 5.0):
        module = ready(FTSAM(copy.deepcopy(network), rho=rho), trainer).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # keeps half-precision copies of weights for one context
            losses.append(module.training_step((images, labels), 1).item())
    assert losses[1] > losses[0] + 0.05


def test_ft_sam_leaves_the_statistics_of_the_second_pass_alone(network, trainer):
    images, labels = torch.rand(6, 1, 8, 8), torch.randint(0, 10, (6,))
    plain = copy.deepcopy(network).train()
    plain(images)
    module = ready(FTSAM(network, rho=5.0), trainer).train()
    module.training_step((images, labels), 1)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(dict(network.named_buffers())[name], value)
    with pytest.raises(ValueError, match="Expected `rho` to be in"):
        FTSAM(network, rho=-1.0)


def scaled(network, masks, deltas, xis):
    """A copy of a network whose BatchNorm weights and biases are changed in place."""
    changed = copy.deepcopy(network)
    norms = [module for module in changed.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm, mask, delta, xi in zip(norms, masks, deltas, xis, strict=True):
            norm.weight.mul_(mask + delta)
            norm.bias.mul_(1 + xi)
    return changed


def test_anp_s_loss_is_the_equation_at_the_worst_perturbation(network, trainer):
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    module = ready(ANP(network, epsilon=0.3, alpha=0.25), trainer).eval()
    with torch.no_grad():
        for mask in module.masks:
            mask.uniform_(0.2, 1.0)
    images, labels = torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))
    worst = {}
    find = module._worst
    module._worst = lambda *args: worst.setdefault("noise", find(*args))
    loss = module.training_step((images, labels), 1)
    deltas, xis = worst["noise"]
    zeros = [torch.zeros_like(mask) for mask in module.masks]
    entropies = [
        nn.functional.cross_entropy(scaled(network, module.masks, *noise)(images), labels)
        for noise in ((zeros, zeros), (deltas, xis))
    ]
    torch.testing.assert_close(loss, 0.25 * entropies[0] + 0.75 * entropies[1])
    assert max(float(noise.abs().max()) for noise in (*deltas, *xis)) <= 0.3 + 1e-6
    random = [[(torch.rand_like(mask) * 2 - 1) * 0.3 for mask in module.masks] for _ in range(2)]
    assert entropies[1] > nn.functional.cross_entropy(scaled(network, module.masks, *random)(images), labels)


def test_anp_prunes_what_its_masks_say_and_trains_nothing_else(network, trainer, clean_digits):
    before = copy.deepcopy(network.state_dict())
    module = ANP(network, lr=0.0001, threshold=0.5)
    with torch.no_grad():
        module.masks[1][2] = 0.1
    trainer().fit(module, clean_digits)
    after, norm = network.state_dict(), module.norms[1]
    for name, value in before.items():
        wanted = value.clone()
        if name in (f"{norm}.weight", f"{norm}.bias"):
            wanted[2] = 0.0
        torch.testing.assert_close(after[name], wanted)


def test_bad_arguments_of_anp():
    with pytest.raises(ValueError, match="Expected `model` to be a network with BatchNorm layers that have weights"):
        ANP(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    with pytest.raises(ValueError, match=r"Expected `alpha` to be in \[0, 1\], but got 2"):
        ANP(SmallCNN(), alpha=2)


def test_features_are_cut_as_long_as_accuracy_allows():
    linear = nn.Linear(4, 4, bias=False)
    nn.init.eye_(linear.weight)
    features, labels = torch.eye(4).repeat_interleave(5, dim=0), torch.arange(4).repeat_interleave(5)
    padded = torch.cat([features, torch.ones(3, 4)]), torch.cat([labels, torch.full((3,), -1)])
    # Without input k, the five images of class k have equal logits and go to class 0.
    assert keep_mask(linear, *padded, [3, 2, 1, 0], drop=0.0).tolist() == [1, 1, 1, 1]
    assert keep_mask(linear, *padded, [3, 2, 1, 0], drop=0.25).tolist() == [1, 1, 1, 0]
    assert keep_mask(linear, *padded, [3, 2, 1, 0], drop=0.5).tolist() == [1, 1, 0, 0]
    assert keep_mask(linear, *padded, [3, 2, 1, 0], drop=1.0).tolist() == [1, 0, 0, 0]


def test_fine_pruning_cuts_the_sleeping_feature_and_keeps_it_cut(network, trainer, clean_digits):
    norm = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)][-1]
    with torch.no_grad():
        norm.weight[5], norm.bias[5] = 0.0, -1.0  # asleep under a ReLU
    module = FinePruning(network, max_drop=1.0)
    trainer(max_epochs=2).fit(module, clean_digits)
    assert module.kept[5] == 0
    assert module.kept.sum() == 1  # all accuracy may go, so the liveliest stays alone
    assert (network.fc.weight[:, module.kept == 0] == 0).all()
    with pytest.raises(ValueError, match="Expected `model` to be a network with a linear layer"):
        FinePruning(nn.Conv2d(1, 10, 8))


def test_sau_s_unlearning_loss_image_by_image():
    logits, answers = torch.randn(4, 3), torch.tensor([0, 2, 1, 0])
    fooled = torch.tensor([True, False, True, True])
    total = 0.0
    for one, answer, counts in zip(logits, answers, fooled, strict=True):
        if counts:
            others = [math.exp(one[k]) for k in range(3) if k != answer]
            total -= math.log(sum(others) / (sum(others) + math.exp(one[answer])))
    assert unlearning_loss(logits, answers, fooled).item() == pytest.approx(total / 4, rel=1e-4)
    certain = torch.tensor([[-20.0, 20.0]], requires_grad=True)
    unlearning_loss(certain, torch.tensor([0]), torch.tensor([True])).backward()
    assert (certain.grad == 0).all()  # forgotten is forgotten


def test_sau_s_perturbations_fool_both_networks_alike(trainer):
    torch.manual_seed(0)
    module = ready(SAU(SmallCNN(width=8, in_channels=1), epsilon=0.5, step_size=0.1, steps=20), trainer).eval()
    with torch.no_grad():
        for weight in module.model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    images, labels = torch.rand(32, 1, 8, 8), torch.randint(0, 10, (32,))
    before = [network(images).argmax(dim=1) for network in (module.model, module.suspicious)]
    perturbations = module.craft(images, labels, before)
    assert perturbations.abs().max() <= 0.5 + 1e-6

    def both_wrong(shift):
        new = [network(images + shift).argmax(1) for network in (module.model, module.suspicious)]
        return ((new[0] == new[1]) & (new[0] != before[0]) & (new[1] != before[1])).float().mean()

    noise = 0.5 * torch.randn_like(images).sign()
    assert both_wrong(perturbations) > both_wrong(noise)
    logits = [network(images + noise) for network in (module.model, module.suspicious)]
    wanted = 0.0
    for i in range(32):  # one image at a time
        answers = [one[i].argmax() for one in logits]
        done = [answer != old[i] for answer, old in zip(answers, before, strict=True)]
        for one, stop in zip(logits, done, strict=True):
            wanted -= 0.0 if stop else 0.01 / 2 * nn.functional.cross_entropy(one[i : i + 1], labels[i : i + 1])
        if not (done[0] and done[1] and answers[0] == answers[1]):
            p, q = (one[i].softmax(dim=0) for one in logits)
            m = (p + q) / 2
            wanted += ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    torch.testing.assert_close(module._crafting_loss(logits, before, labels), wanted / 32)


def test_sau_leaves_batchnorm_statistics_alone_and_uses_adam(network, trainer, clean_digits):
    before = {name: value.clone() for name, value in network.named_buffers()}
    module = SAU(network, steps=1)
    trainer().fit(module, clean_digits)
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    assert isinstance(module.optimizers(use_pl_optimizer=False), torch.optim.Adam)
    with pytest.raises(ValueError, match="Expected `unlearning` to be at least 0, but got -1"):
        SAU(network, unlearning=-1)


def test_the_hypergradient_of_a_quadratic_game_in_closed_form():
    torch.manual_seed(0)
    root, cross = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    curvature = root @ root.T + torch.eye(3, dtype=torch.float64)
    theta = torch.randn(2, dtype=torch.float64, requires_grad=True)
    unused = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    inverse = torch.linalg.inv(curvature)
    best = inverse @ cross @ theta.detach()  # minimises d'Ad/2 - d'B theta
    rate = 1.0 / float(torch.linalg.eigvalsh(curvature).max())

    def outer(d):
        return (d**2).sum() + (theta**3).sum()

    value, (gradient, none) = hypergradient(
        outer, lambda d: d - rate * (curvature @ d - cross @ theta), best, [theta, unused], iterations=500
    )
    wanted = 3 * theta**2 + cross.T @ inverse @ (2 * best)
    torch.testing.assert_close(gradient, wanted.detach())
    assert none.item() == 0
    assert value.item() == pytest.approx(float(outer(best)))
    one = hypergradient(outer, lambda d: d - rate * (curvature @ d - cross @ theta), best, [theta], iterations=1)[1][0]
    torch.testing.assert_close(one, (3 * theta**2 + rate * cross.T @ (2 * best)).detach())


def test_i_bau_finds_a_perturbation_that_hurts_and_keeps_the_statistics(network, trainer, clean_digits):
    before = {name: value.clone() for name, value in network.named_buffers()}
    module = IBAU(network, penalty=0.0, portion=0.5)
    trainer(max_epochs=2).fit(module, clean_digits)
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    assert module.perturbation.shape == (1, 1, 8, 8)
    images = torch.rand(64, 1, 8, 8)
    with torch.no_grad():
        answers = network(images).argmax(dim=1)
        hurt = nn.functional.cross_entropy(network(images + module.perturbation), answers)
        plain = nn.functional.cross_entropy(network(images), answers)
    assert hurt > plain
    with pytest.raises(ValueError, match=r"Expected `portion` to be in \(0, 1\], but got 0"):
        IBAU(network, portion=0)


def test_anp_leaves_weights_alone_while_it_trains_masks(network, clean_digits, trainer):
    before = {name: value.clone() for name, value in network.named_parameters()}
    module = ANP(network, threshold=0.0)

    class Look(pl.Callback):
        def on_train_batch_end(self, *args):
            assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())

    trainer(max_epochs=1, callbacks=[Look()]).fit(module, clean_digits)
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
