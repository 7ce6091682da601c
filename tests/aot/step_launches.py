"""Every kernel launch of a training step, recorded on a machine without a GPU.

The model and the trainer run on the CPU with two substitutions: ops take their Triton path, and
`KernelLaunch.run` writes the launch down in place of running it. Values are then garbage, shapes,
dtypes, strides and so the launches are those of the real step.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from masked_vit_kernels import launch
from masked_vit_kernels.launch import KernelLaunch

from ijepa import IJEPA, MultiBlockSampler, Trainer
from ijepa.recipes import load_recipe


@contextlib.contextmanager
def recorded_launches(capability: int):
    """A list that fills with the launches of every op called inside, on CPU tensors."""
    launches: list[KernelLaunch] = []

    def record(made: KernelLaunch) -> None:
        if 0 not in made.grid:
            launches.append(made)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(KernelLaunch, "run", record))
        stack.enter_context(mock.patch.object(launch, "_INTERPRETED", True))
        for name in ("attention.forward", "attention.backward", "tokens.patch_embed"):
            stack.enter_context(
                mock.patch(f"masked_vit_kernels.{name}.table_capability", lambda _: capability)
            )
        yield launches


def step_launches(recipe_name: str, precision: str, capability: int) -> list[KernelLaunch]:
    """One step of a recipe's model, two blocks deep, on four images."""
    recipe = load_recipe(
        recipe_name,
        {"model.depth": 2, "model.predictor_depth": 2, "train.precision": precision,
         "train.steps": 10, "data.path": "."},
    )  # fmt: skip
    torch.manual_seed(0)
    model = IJEPA(recipe.model)
    schedule = recipe.in_steps(recipe.train.batch_size).schedule
    trainer = Trainer(model, recipe.optim, schedule, precision=precision)
    height, width = recipe.model.image_size
    images = torch.randint(0, 256, (4, 3, height, width), dtype=torch.uint8)
    masks = MultiBlockSampler(recipe.model.grid)(4, generator=torch.Generator().manual_seed(0))
    with recorded_launches(capability) as launches:
        trainer.step(images, masks)
    return launches
