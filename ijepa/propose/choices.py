"""From images, machine and hours to settings, each with its reason in one line."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ijepa.config import MaskConfig, ModelConfig, Recipe
from ijepa.cost.flops import TokenCounts, sample_tokens, step_flops, total_flops
from ijepa.cost.memory import activation_bytes, count_parameters, state_bytes
from ijepa.propose.images import ImageFacts
from ijepa.propose.machine import Machine, Speed
from ijepa.propose.sizes import SIZES, Size
from ijepa.recipes import recipe_from_dict

Measure = Callable[[Recipe], Speed]

TRAINING_SHARE = 0.85  # of the hours; panels, checkpoints, start and probes take the rest
MOST_PASSES = 1000  # over the images: more of them teach little that is new
PANELS = 12  # over a run, unless
PANEL_SHARE = 0.1  # of its time would be more than these
_MEMORY_SHARE = 0.85  # of the device's, that a step may take by the arithmetic of `ijepa plan`
_BETTER_RATE = 8.0  # of a large network on the same cores, against a small one, at the most
_SHORT_RUN = 20_000  # steps
_PANEL_IMAGES = 512
_DEMO_SEEN = 102_400  # images, repetitions counted


@dataclass(frozen=True)
class Choice:
    """A setting by its dotted name, and why it is so."""

    key: str
    value: Any
    reason: str


UNMEASURED_LENGTH = Choice("train.steps", 1000, "the recipe is timed, not run")


@dataclass(frozen=True)
class SizeChoice:
    """The network that fits, its settings but for the run's length, and why no larger one."""

    size: Size
    choices: list[Choice]
    speed: Speed
    why_not_larger: str


def choose_size(
    images: ImageFacts, machine: Machine, hours: float, measure: Measure, *, path: str
) -> SizeChoice:
    """The largest network that has images and time enough.

    Args:
        measure: takes steps of a recipe on this machine.
        path: of the images.

    Raises:
        ValueError: not even the smallest fits the memory.
    """
    chosen: SizeChoice | None = None
    why = ""
    for size in SIZES:
        choices = _without_length(size, images, machine, path)
        if choices is None:
            why = _no_memory(size, machine)
            break
        if chosen is not None:
            why = _wants_more(size, images) or _hopeless(size, choices, chosen, machine, hours)
            if why:
                break
        speed = measure(_timed(choices))
        seen = affordable(speed, machine, hours)
        if chosen is not None and seen < size.seen:
            why = _too_slow(size, seen, hours)
            break
        chosen = SizeChoice(size, choices, speed, why_not_larger="")
    if chosen is None:
        raise ValueError(f"{why}: write a recipe of your own, see ijepa pretrain --help")
    return SizeChoice(chosen.size, chosen.choices, chosen.speed, why)


def affordable(speed: Speed, machine: Machine, hours: float) -> float:
    """Images that can be seen in the hours."""
    return TRAINING_SHARE * 3600 * hours / _seconds_an_image(speed, machine)


def length_choices(
    recipe: Recipe, images: ImageFacts, machine: Machine, hours: float, speed: Speed
) -> list[Choice]:
    """How long `recipe` trains, and what follows from that; its own length is not looked at."""
    batch = recipe.train.batch_size
    most = affordable(speed, machine, hours)
    seen = min(most, MOST_PASSES * images.count)
    steps = max(int(seen // batch), 1)
    rate = 1 / _seconds_an_image(speed, machine)
    passes = steps * batch / images.count
    takes = steps * batch / rate
    why = f"{_time(takes)} at the {rate:,.0f} images/s measured here, {passes:,.0f} passes"
    if seen < most:
        why += ", more teach little"
    elif steps * batch < _DEMO_SEEN:
        why += f"; little: the demo sees {_DEMO_SEEN:,} images"
    narrow = recipe.model.init == "fan_in"
    warmup = max(steps // 40, 1) if narrow else max(steps // 10, 1)
    short = steps < _SHORT_RUN
    a_second = rate / batch
    one_panel = speed.step * recipe.monitor.images  # about: forward passes and small probes
    panels = min(max(int(PANEL_SHARE * takes / one_panel), 1), PANELS)
    return [
        Choice("train.steps", steps, why),
        Choice("train.checkpoint_every", max(min(int(600 * a_second), steps), 1),
               "about every ten minutes"),
        Choice("schedule.warmup_steps", warmup,
               "a fortieth of the steps, as in the demo" if narrow else
               "a tenth of the steps, as published"),
        Choice("schedule.momentum", 0.99 if short else 0.996,
               f"fewer than {_SHORT_RUN:,} steps: targets must move sooner" if short else
               "as published"),
        Choice("monitor.every", math.ceil(steps / panels), f"{panels} panels over the run"),
    ]  # fmt: skip


def _without_length(
    size: Size, images: ImageFacts, machine: Machine, path: str
) -> list[Choice] | None:
    """All that does not depend on the run's length; None where the memory does not hold it."""
    choices = [
        *_model_choices(size, images),
        *_mask_choices(),
        *_data_choices(images, path),
        *_schedule_choices(size, images),
        *_precision_choices(machine),
        *_monitor_choices(images),
    ]
    batch = _batch_choice(size, images)
    room = _largest_micro_batch(_timed([*choices, batch]), machine)
    accumulate = 1
    while batch.value // accumulate > room and accumulate < batch.value:
        accumulate *= 2
    if room < min(batch.value, 8):
        return None
    choices.append(batch)
    if accumulate > 1:
        why = f"the memory holds about {room:,} images a forward pass"
        choices.append(Choice("train.accumulate", accumulate, why))
    elif machine.device == "cuda":
        choices.append(Choice("train.cuda_graph", True, "one GPU, one micro-batch: less host time"))
    return choices


def _model_choices(size: Size, images: ImageFacts) -> list[Choice]:
    shortest = min(images.height, images.width)
    side = min(max(shortest, 8), size.side)
    patch = max(round(side / size.grid), 1)
    grid = side // patch
    image = patch * grid
    if side < size.side:
        why = f"the median image is {images.width}x{images.height}: no larger one tells more"
    else:
        why = f"as much as {size.label} makes use of; the median is {images.width}x{images.height}"
    choices = [
        Choice("model.image_size", [image, image], why),
        Choice("model.patch_size", [patch, patch], f"{grid}x{grid} patches: room for the masks"),
        Choice("model.width", size.width, f"{size.label}, see the top"),
        Choice("model.depth", size.depth, size.label),
        Choice("model.heads", size.heads, f"of {size.width // size.heads} features each"),
        Choice("model.predictor_width", size.predictor_width, "narrower than the encoder (paper)"),
        Choice("model.predictor_depth", size.predictor_depth, "shallower than the encoder (paper)"),
        Choice("model.predictor_heads", size.predictor_heads,
               f"of {size.predictor_width // size.predictor_heads} features each"),
    ]  # fmt: skip
    if size.narrow:
        std = round(1 / math.sqrt(len(images.mean) * patch * patch), 3)
        weak = 1 / math.sqrt(size.width) / 0.02
        choices += [
            Choice("model.init", "fan_in",
                   f"the published .02 is {weak:.1f} times too weak at width {size.width}"),
            Choice("model.target_norm", "instance",
                   "what all patches of an image share is easy and would drown the rest"),
            Choice("model.patch_init_std", std, "patches weigh as much as positions"),
        ]  # fmt: skip
    else:
        choices += [
            Choice("model.init", "released", "as published for networks of this width"),
            Choice("model.target_norm", "layer", "as published"),
        ]
    sample = f"of {images.looked_at:,} of the images"
    return [
        *choices,
        Choice("model.image_mean", [round(mean, 3) for mean in images.mean], sample),
        Choice("model.image_std", [max(round(std, 3), 0.001) for std in images.std], sample),
    ]


def _mask_choices() -> list[Choice]:
    return [
        Choice("masks.num_targets", 4, "best in the paper's Table 10"),
        Choice("masks.target_scale", [0.15, 0.2], "best in the paper's Table 8"),
        Choice("masks.context_scale", [0.85, 1.0], "best in the paper's Table 9"),
    ]


def _data_choices(images: ImageFacts, path: str) -> list[Choice]:
    return [
        Choice("data.source", "folder", "your images"),
        Choice("data.path", path, f"{images.count:,} images"),
        Choice("data.crop_scale", [0.3, 1.0], "as published: the crop is the only augmentation"),
    ]


def _schedule_choices(size: Size, images: ImageFacts) -> list[Choice]:
    batch = _batch(size, images)
    rate = float(f"{size.peak_lr * math.sqrt(batch / size.batch):.1g}")
    why = f"{size.peak_lr:g} at batch {size.batch}"
    if batch < size.batch:
        why += f", by the root of {batch}/{size.batch}"
    choices = [
        Choice("schedule.peak_lr", rate, why),
        Choice("schedule.start_lr", rate / 100, "a hundredth of the peak"),
    ]
    if size.narrow:
        choices += [
            Choice("schedule.weight_decay", 0.05, "as in the demo"),
            Choice("schedule.final_weight_decay", 0.05, "as in the demo"),
        ]
    else:
        choices += [
            Choice("schedule.weight_decay", 0.04, "as published"),
            Choice("schedule.final_weight_decay", 0.4, "as published"),
        ]
    return choices


def _batch(size: Size, images: ImageFacts) -> int:
    """The size's batch, or the largest power of two that half of the images hold."""
    half = max(images.count // 2, 1)
    return min(size.batch, 1 << (half.bit_length() - 1))


def _batch_choice(size: Size, images: ImageFacts) -> Choice:
    batch = _batch(size, images)
    if batch < size.batch:
        why = f"of {images.count:,} images"
    elif batch <= 64:
        why = "small batches learn more from an image than large ones"
    else:
        why = f"what {size.label} is trained with"
    return Choice("train.batch_size", batch, why)


def _precision_choices(machine: Machine) -> list[Choice]:
    if machine.device == "cpu":
        return [
            Choice("train.device", "cpu", machine.label),
            Choice("train.precision", "fp32", "without a GPU"),
        ]
    return [
        Choice("train.device", "cuda", machine.label),
        Choice("train.precision", "bf16-params", "the fastest; float32 masters are kept"),
        Choice("train.compile", "blocks", "as fast as compiling all of it, in seconds"),
    ]


def worker_choice(machine: Machine, speed: Speed) -> Choice:
    """Loader processes that keep up with the steps."""
    busy = speed.decode / _seconds_an_image(speed, machine)  # cores
    if machine.device == "cpu" and busy < 0.02:
        return Choice("data.workers", 0, "decoding takes 2 % of a core or less")
    workers = max(min(math.ceil(busy) + (machine.device == "cuda"), machine.cores - 1), 1)
    return Choice("data.workers", workers, f"decoding keeps {busy:.1f} cores busy")


def _monitor_choices(images: ImageFacts) -> list[Choice]:
    panel = max(min(images.count, _PANEL_IMAGES), 2)
    enough = images.classes > 1 and images.count >= 5 * images.classes
    if enough:
        why = f"{images.classes} classes, the folders' names: probes at the end"
    elif images.classes:
        why = f"{images.classes} classes are too many for {images.count:,} images"
    else:
        why = "no labels: the images do not all lie in folders of classes"
    return [
        Choice("monitor.images", panel, "that the panel looks at"),
        Choice("monitor.evaluate", enough, why),
    ]


def _timed(choices: Iterable[Choice]) -> Recipe:
    return recipe_of([*choices, UNMEASURED_LENGTH])


def recipe_of(choices: Iterable[Choice], name: str = "proposed") -> Recipe:
    """The recipe that the choices make."""
    values: dict[str, Any] = {"name": name}
    for choice in choices:
        table, key = choice.key.split(".")
        values.setdefault(table, {})[key] = choice.value
    return recipe_from_dict(values, "the proposed recipe")


def _seconds_an_image(speed: Speed, machine: Machine) -> float:
    if machine.device == "cpu":  # the steps take all cores, and decoding some of their time
        return speed.step + speed.decode / machine.cores
    return max(speed.step, speed.decode / max(machine.cores - 1, 1))


def _largest_micro_batch(recipe: Recipe, machine: Machine) -> int:
    parameters = count_parameters(recipe.model)
    room = _MEMORY_SHARE * machine.memory - state_bytes(parameters, recipe.train.precision)
    image = activation_bytes(recipe.model, _tokens_of(recipe), recipe.train.precision)
    return max(int(room // image), 0)


def _no_memory(size: Size, machine: Machine) -> str:
    return f"{size} does not fit into {machine.memory / 2**30:,.0f} GiB of {machine.label}"


def _wants_more(size: Size, images: ImageFacts) -> str:
    """Why the images are too few or too small for a size; "" where they are not."""
    if images.count < size.images:
        return f"{size} wants {size.images:,} images to be worth it, and there are {images.count:,}"
    if 4 * min(images.height, images.width) < size.side:
        return (
            f"{size} is for images of {size.side} pixels, at least a quarter of that, and the "
            f"median is {images.width}x{images.height}"
        )
    return ""


def _hopeless(
    size: Size, choices: list[Choice], chosen: SizeChoice, machine: Machine, hours: float
) -> str:
    """Why a size need not be timed: it would be too slow even at a much better rate."""
    ratio = flops_of(_timed(choices)) / flops_of(_timed(chosen.choices))
    step = chosen.speed.step * ratio
    optimistic = Speed(step / _BETTER_RATE, chosen.speed.decode)
    if affordable(optimistic, machine, hours) >= size.seen:
        return ""
    return _too_slow(size, affordable(Speed(step, chosen.speed.decode), machine, hours), hours)


def flops_of(recipe: Recipe) -> float:
    """Operations an image costs in a step, about."""
    return total_flops(step_flops(recipe.model, _tokens_of(recipe)))


def _tokens_of(recipe: Recipe) -> TokenCounts:
    return _sampled_tokens(recipe.masks, recipe.model.grid)


@functools.cache
def _sampled_tokens(masks: MaskConfig, grid: tuple[int, int]) -> TokenCounts:
    """Drawn once for all the networks that share them."""
    grid_alone = ModelConfig(image_size=grid, patch_size=(1, 1))
    return sample_tokens(Recipe(masks=masks, model=grid_alone), 64)


def _too_slow(size: Size, seen: float, hours: float) -> str:
    digits = float(f"{seen:.2g}")
    return (
        f"{size} would see about {digits:,.0f} images in {_time(3600 * hours)} here, and wants "
        f"{size.seen:,.0f} to be worth it"
    )


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
