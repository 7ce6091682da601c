"""The grid of heads against separate PyTorch modules, LARS and SGD against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ijepa.evaluate.confidence import wilson_interval
from ijepa.evaluate.head_optimizer import TRUST, HeadOptimizer, HeadParameter
from ijepa.evaluate.heads import HeadGrid


def parameters(heads=3):
    weight = torch.randn(heads, 4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(heads, 4, dtype=torch.float64, requires_grad=True)
    return [HeadParameter(weight, True), HeadParameter(bias, False)]


def lars_by_the_formula(value, gradients, rates, decay, is_weight, momentum=0.9):
    """One head's parameter after these gradients at these learning rates."""
    velocity = torch.zeros_like(value)
    for gradient, rate in zip(gradients, rates, strict=True):
        change = gradient
        if is_weight:
            change = gradient + decay * value
            if value.norm() > 0:
                change = change * TRUST * value.norm() / change.norm()
        velocity = momentum * velocity + change
        value = value - rate * velocity
    return value


def test_lars_is_its_formula_for_every_head_also_without_decay():
    lr = torch.tensor([0.3, 2.0, 0.3], dtype=torch.float64)
    decay = torch.tensor([5e-4, 0.0, 0.1], dtype=torch.float64)
    params = parameters()
    with torch.no_grad():
        params[0].value[2].zero_()  # a norm of zero: no scaling
    optimizer = HeadOptimizer(params, lr, decay, kind="lars")
    start = [p.value.detach().clone() for p in params]
    steps = [[torch.randn_like(s) for s in start] for _ in range(4)]
    factors = [1.0, 1.0, 0.1, 0.1]
    for gradients, factor in zip(steps, factors, strict=True):
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.value.grad = gradient.clone()
        optimizer.step(factor)
    for number, parameter in enumerate(params):
        for head in range(3):
            expected = lars_by_the_formula(
                start[number][head],
                [gradients[number][head] for gradients in steps],
                [factor * lr[head] for factor in factors],
                decay[head],
                parameter.is_weight,
            )
            found = parameter.value[head].detach()
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_scaling_is_there_without_decay():
    """timm's Lars skips it: the update would then depend on the gradient's length."""
    ends = []
    for length in (1.0, 1000.0):
        torch.manual_seed(0)
        params = parameters(1)
        start = params[0].value.detach().clone()
        optimizer = HeadOptimizer(params, torch.ones(1), torch.zeros(1), kind="lars")
        params[0].value.grad = length * torch.randn_like(start)
        optimizer.step(1.0)
        ends.append(params[0].value.detach())
        assert (ends[-1] - start).norm().item() == pytest.approx(TRUST * start.norm().item())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-12)


def test_sgd_is_torchs_with_nesterov():
    lr, decay = torch.tensor([0.3, 0.02]), torch.tensor([5e-4, 0.1])
    params = parameters(2)
    optimizer = HeadOptimizer(params, lr.double(), decay.double(), kind="sgd")
    theirs = []
    for head in range(2):
        weight, bias = (p.value.detach()[head].clone().requires_grad_() for p in params)
        groups = [
            {"params": [weight], "weight_decay": decay[head].item()},
            {"params": [bias], "weight_decay": 0.0},
        ]
        theirs.append(
            (torch.optim.SGD(groups, lr=lr[head].item(), momentum=0.9, nesterov=True), weight, bias)
        )
    for _ in range(4):
        gradients = [torch.randn_like(p.value) for p in params]
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.value.grad = gradient.clone()
        optimizer.step(1.0)
        for head, (sgd, weight, bias) in enumerate(theirs):
            weight.grad, bias.grad = gradients[0][head].clone(), gradients[1][head].clone()
            sgd.step()
    for head, (_, weight, bias) in enumerate(theirs):
        torch.testing.assert_close(params[0].value[head], weight, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(params[1].value[head], bias, rtol=1e-6, atol=1e-7)


def modules_of(grid, blocks, width):
    """A PyTorch module of each head, with its weights."""
    modules = []
    for group in grid._groups:
        for place in range(group.heads):
            linear = nn.Linear(group.width, group.classes)
            with torch.no_grad():
                linear.weight.copy_(group.weight[place])
                linear.bias.copy_(group.bias[place])
            norm = nn.BatchNorm1d(group.width, eps=1e-5, momentum=0.1)
            modules.append(nn.Sequential(norm, linear) if group.batch_norm else linear)
    return modules


def test_the_grid_trains_as_separate_modules_do():
    width, blocks, classes = 6, 4, 3
    grid = HeadGrid(width, blocks, classes, lrs=(0.1, 0.5), weight_decays=(0.0, 1e-2),
                    optimizer="sgd", seed=3)  # fmt: skip
    assert len(grid.heads) == 16 and len({str(head) for head in grid.heads}) == 16
    modules = modules_of(grid, blocks, width)
    optimizers = []
    for head, module in zip(grid.heads, modules, strict=True):
        linear = module[1] if head.batch_norm else module
        others = [p for p in module.parameters() if p is not linear.weight]
        groups = [
            {"params": [linear.weight], "weight_decay": head.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizers.append(torch.optim.SGD(groups, lr=head.lr, momentum=0.9, nesterov=True))
    for step in range(5):
        features, labels = torch.randn(12, blocks * width) * 2 + 1, torch.randint(classes, (12,))
        losses = grid.train(features, labels, 0.5**step)
        for place, (head, module, sgd) in enumerate(
            zip(grid.heads, modules, optimizers, strict=True)
        ):
            seen = features[:, -width:] if head.layers == "last" else features
            loss = F.cross_entropy(module(seen), labels)
            assert losses[place].item() == pytest.approx(loss.item(), rel=1e-4)
            sgd.zero_grad()
            loss.backward()
            for group in sgd.param_groups:
                group["lr"] = head.lr * 0.5**step
            sgd.step()
    features, labels = torch.randn(200, blocks * width) * 2 + 1, torch.randint(classes, (200,))
    correct = grid.correct(features, labels)
    for place, (head, module) in enumerate(zip(grid.heads, modules, strict=True)):
        seen = features[:, -width:] if head.layers == "last" else features
        with torch.no_grad():
            right = (module.eval()(seen).argmax(dim=1) == labels).sum()
        assert abs(int(correct[place]) - int(right)) <= 1


def test_the_heads_find_a_signal_and_no_more():
    torch.manual_seed(0)
    labels = torch.arange(900) % 3
    features = torch.randn(900, 12)
    features[:, -2] += 3.0 * labels  # in the last block alone
    grid = HeadGrid(3, 4, 3, lrs=(1.0,), weight_decays=(0.0,), optimizer="sgd")
    noise = HeadGrid(3, 4, 3, lrs=(1.0,), weight_decays=(0.0,), optimizer="sgd")
    shuffled = labels[torch.randperm(900)]
    for _ in range(60):
        rows = torch.randint(0, 600, (64,))
        grid.train(features[rows], labels[rows], 0.3)
        noise.train(features[rows], shuffled[rows], 0.3)
    assert (grid.correct(features[600:], labels[600:]) / 300).min() > 0.8
    assert (noise.correct(features[600:], shuffled[600:]) / 300).max() < 0.5


def test_a_grid_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one learning rate"):
        HeadGrid(3, 4, 3, lrs=(), weight_decays=(0.0,), optimizer="sgd")
    with pytest.raises(ValueError, match="kind must be 'lars' or 'sgd'"):
        HeadGrid(3, 4, 3, lrs=(1,), weight_decays=(0.0,), optimizer="adam")


@pytest.mark.parametrize(
    ("accuracy", "images", "low", "high"),
    # 0.5 on 100 and 0.9 on 50 by hand from Wilson's formula; none and all right by its limits
    [(0.5, 100, 0.403832, 0.596168), (0.9, 50, 0.786398, 0.956524), (0.0, 10, 0.0, 0.277533),
     (1.0, 10, 0.722467, 1.0)],
)  # fmt: skip
def test_wilsons_interval(accuracy, images, low, high):
    assert wilson_interval(accuracy, images) == pytest.approx((low, high), abs=1e-5)
    with pytest.raises(ValueError, match="an accuracy in"):
        wilson_interval(accuracy, 0)
