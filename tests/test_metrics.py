import pytest
import torch

from nba_lightning.core.metrics import AttackSuccessRate, RobustAccuracy


def by_loop(preds, labels, targets, wanted):
    hits = [p == w for p, y, t, w in zip(preds, labels, targets, wanted, strict=True) if y not in (t, -1)]
    return sum(hits) / len(hits)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    preds, labels, targets = (torch.randint(0, 4, (50,), generator=generator) for _ in range(3))
    labels[::9] = -1
    return preds, labels, targets


@pytest.mark.parametrize(("metric_class", "index"), [(AttackSuccessRate, 2), (RobustAccuracy, 1)])
def test_equals_a_loop_over_samples(batch, metric_class, index):
    metric = metric_class()
    for part in zip(*(tensor.split(7) for tensor in batch), strict=True):
        metric.update(*part)
    preds, labels, targets = (tensor.tolist() for tensor in batch)
    assert float(metric.compute()) == pytest.approx(by_loop(preds, labels, targets, batch[index].tolist()))


@pytest.mark.parametrize("metric_class", [AttackSuccessRate, RobustAccuracy])
def test_two_processes_with_unequal_shares_reduce_to_the_whole(batch, metric_class):
    whole, one, two = metric_class(), metric_class(), metric_class()
    whole.update(*batch)
    one.update(*(tensor[:13] for tensor in batch))
    two.update(*(tensor[13:] for tensor in batch))
    for name, reduction in one._reductions.items():
        setattr(one, name, reduction(torch.stack([getattr(one, name), getattr(two, name)])))
    assert float(one.compute()) == float(whole.compute())


def test_logits_are_taken_as_classes(batch):
    preds, labels, targets = batch
    one, two = AttackSuccessRate(), AttackSuccessRate()
    one.update(preds, labels, targets)
    two.update(torch.nn.functional.one_hot(preds, 4).float(), labels, targets)
    assert float(one.compute()) == float(two.compute())
