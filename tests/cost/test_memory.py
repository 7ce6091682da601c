"""Bytes of a step against what autograd and the optimiser keep."""

from dataclasses import replace

import pytest
import torch
from small_steps import CONFIG, draw

from ijepa import IJEPA, ModelConfig
from ijepa.cost.flops import count_tokens
from ijepa.cost.memory import activation_bytes, count_parameters, state_bytes
from ijepa.recipes import load_recipe
from ijepa.train.trainer import Trainer


def kept_for_backward(config, images, masks):
    """Bytes autograd holds at the end of the forward pass, weights and masks left out."""
    model = IJEPA(config)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in mine:
            storages[storage.data_ptr()] = storage  # alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images, masks)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("size", [{}, {"width": 96, "predictor_width": 48, "depth": 5}], ids=str)
def test_activations_are_what_autograd_keeps(size):
    config = replace(CONFIG, **size)
    images, masks = draw(config)
    planned = masks.batch_size * activation_bytes(config, count_tokens(masks), "fp32")
    assert kept_for_backward(config, images, masks) == pytest.approx(planned, rel=0.05)


def test_state_is_what_the_optimiser_keeps():
    model, (images, masks) = IJEPA(CONFIG), draw(CONFIG)
    parameters = count_parameters(CONFIG)
    recipe = load_recipe("shapes-tiny").in_steps(12_000)
    trainer = Trainer(model, recipe.optim, recipe.schedule)
    trainer.step(images, masks)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == parameters["encoder"] + parameters["predictor"]
    held = 2 * sum(p.nbytes for p in trained)  # weights and gradients
    for state in trainer.optimizer.state.values():
        held += sum(value.nbytes for value in state.values() if value.ndim)
    frozen = model.target_encoder.pos_embed.nbytes
    held += sum(p.nbytes for p in model.target_encoder.parameters()) - frozen
    assert held == state_bytes(parameters, "fp32")


@pytest.mark.gpu
def test_peak_memory_on_a_gpu():
    config = ModelConfig(width=384, heads=6, predictor_heads=6)
    images, masks = draw(config, images=64)
    tokens, recipe = count_tokens(masks), load_recipe("shapes-tiny").in_steps(12_000)
    model = IJEPA(config).cuda()
    images, masks = images.cuda(), masks.to("cuda")
    trainer = Trainer(model, recipe.optim, recipe.schedule)
    trainer.step(images, masks)
    torch.cuda.reset_peak_memory_stats()
    trainer.step(images, masks)
    planned = state_bytes(count_parameters(config), "fp32")
    planned += 64 * activation_bytes(config, tokens, "fp32") + images.nbytes
    assert torch.cuda.max_memory_allocated() == pytest.approx(planned, rel=0.15)
