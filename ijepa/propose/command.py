"""`ijepa pretrain --data.path FOLDER [--hours H] [--dry-run]`: a recipe where none is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ijepa.config import Recipe
from ijepa.data import folder_source
from ijepa.propose.choices import (
    UNMEASURED_LENGTH,
    Choice,
    SizeChoice,
    choose_size,
    length_choices,
    recipe_of,
    worker_choice,
)
from ijepa.propose.images import ImageFacts, look_at_images
from ijepa.propose.machine import Machine, measure_speed, this_machine
from ijepa.propose.recipe_file import recipe_name, recipe_text
from ijepa.recipes import implied_settings, recipe_to_dict, with_settings
from ijepa.report.progress import telling
from ijepa.train import from_recipe

HOURS = {"cpu": 1.0, "cuda": 8.0}  # where none are given
_MOST_HOURS = 10_000.0
_LENGTH = {"train.steps", "train.epochs"}
_GIVEN = "as given on the command line"


@dataclass(frozen=True)
class Proposal:
    """A recipe and the text of its file."""

    recipe: Recipe
    text: str


def propose(
    path: str,
    *,
    hours: float | None = None,
    device: str = "auto",
    override: Callable[[Recipe], Recipe] = lambda recipe: recipe,
    given: Sequence[str] = (),
    console: Console | None = None,
) -> Proposal:
    """Look at a folder of images and at this machine, and choose every setting.

    Args:
        path: of the images.
        hours: the run may take; default 1 without a GPU, 8 with one.
        device: "auto", "cpu" or "cuda".
        override: puts the settings of the command line into a recipe.
        given: their dotted names.
        console: told what takes a while.

    Raises:
        ValueError: no image there that can be read, hours out of their range, or a name of the
            folder that a recipe cannot hold.
    """
    if hours is not None and not 0 < hours <= _MOST_HOURS:
        raise ValueError(f"--hours must be greater than 0 and at most {_MOST_HOURS:g}, got {hours}")
    folder = str(Path(path).expanduser().absolute())
    try:
        folder.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"the name of {folder!r} is no UTF-8, which a recipe is written in: "
            "make a link to it under another name"
        ) from None
    machine = this_machine(from_recipe.choose_device(device))
    with telling(console, f"Looking at the images in {path}"):
        source = folder_source(path)
        images = look_at_images(source)
    asked = hours
    hours = HOURS[machine.device] if hours is None else hours
    with telling(console, "Taking a few steps of networks that may fit"):
        sized = choose_size(
            images, machine, hours, lambda recipe: measure_speed(recipe, source), path=folder
        )
        choices, speed = sized.choices, sized.speed
        recipe = _overridden(recipe_of([*choices, UNMEASURED_LENGTH]), override, given)
        if any(_changes_speed(key) for key in given):
            speed = measure_speed(recipe, source)
    lengths = length_choices(recipe, images, machine, hours, speed)
    if _LENGTH & set(given):
        lengths = [choice for choice in lengths if choice.key not in _LENGTH]
    choices = [*choices, worker_choice(machine, speed), *lengths]
    recipe = _overridden(recipe_of(choices, recipe_name(path)), override, given)
    choices = _with_given(choices, recipe, given)
    head = _head(images, machine, hours, asked is None, sized)
    return Proposal(recipe, recipe_text(head, choices))


def _overridden(
    recipe: Recipe, override: Callable[[Recipe], Recipe], given: Sequence[str]
) -> Recipe:
    return override(with_settings(recipe, implied_settings(given)))


def _changes_speed(key: str) -> bool:
    table, _, name = key.partition(".")
    changing = {"batch_size", "accumulate", "precision", "device"}
    return table in ("model", "masks") or (table == "train" and name in changing)


def _with_given(choices: list[Choice], recipe: Recipe, given: Sequence[str]) -> list[Choice]:
    """The choices with what was given, and what that implies, in the place of what was chosen."""
    values: dict[str, Any] = recipe_to_dict(recipe)

    def taken(key: str, reason: str) -> Choice:
        table, _, name = key.partition(".")
        return Choice(key, values[table][name], reason)

    reasons = dict.fromkeys(implied_settings(given), "follows from what was given")
    reasons |= {key: _GIVEN for key in given if "." in key}
    kept = [taken(c.key, reasons.pop(c.key)) if c.key in reasons else c for c in choices]
    kept += [taken(key, reason) for key, reason in reasons.items()]
    return [choice for choice in kept if choice.value is not None]


def _head(
    images: ImageFacts,
    machine: Machine,
    hours: float,
    by_default: bool,
    sized: SizeChoice,
) -> list[str]:
    unreadable = f", {images.unreadable} more cannot be read" if images.unreadable else ""
    labels = f", {images.classes} classes" if images.classes else ", no labels"
    default = " (--hours is not given)" if by_default else ""
    why = sized.why_not_larger or "there is no larger one"
    return [
        "Proposed for these images on this machine by ijepa pretrain --data.path.",
        f"Images:  {images.count:,}, the median {images.width}x{images.height} pixels{labels}; "
        f"{images.looked_at:,} were looked at{unreadable}.",
        f"Machine: {machine.label}, {machine.memory / 2**30:,.0f} GiB. "
        f"Time: {hours:g} {'hour' if hours == 1 else 'hours'}{default}.",
        f"Network: {sized.size}, since {why}.",
    ]
