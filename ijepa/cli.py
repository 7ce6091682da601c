"""The command line: `ijepa pretrain | embed | neighbours | eval | convert | report | visualize |
ablate | sweep | data | plan | doctor`."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from ijepa import __version__
from ijepa.ablate.commands import ablate_command, sweep_command
from ijepa.config import Recipe
from ijepa.downstream.commands import (
    convert_command,
    embed_command,
    eval_command,
    neighbours_command,
)
from ijepa.downstream.seeing.commands import report_command, visualize_command
from ijepa.recipes import (
    check_known,
    check_setting,
    implied_settings,
    load_recipe,
    recipe_names,
    setting_names,
    with_settings,
)
from ijepa.report.console import RunConsole, say_any_name, stop_listening_to

USAGE = """\
ijepa: self-supervised pretraining of vision transformers by predicting in latent space

  ijepa pretrain --data.path FOLDER [--hours H]     train on your images: a recipe is made for them
                                                    and this machine; --dry-run only prints it
  ijepa pretrain [RECIPE] [--table.key VALUE ...]   train; RECIPE is a name or a TOML file
  ijepa pretrain [RECIPE] --help                    all settings with their values there
  ijepa pretrain --resume RUN_FOLDER                go on where a run stopped
  ijepa embed SOURCE FOLDER --out DIR               features of images by what was learned
  ijepa neighbours DIR QUERY.jpg                    the embedded images nearest to one
  ijepa eval PROTOCOL SOURCE --data TASK            knn, linear, lowshot, finetune: what it is worth
  ijepa convert SOURCE OUT --to transformers        or timm, released, safetensors, onnx
  ijepa report RUN...                               one HTML file: curves, panel, probes, pictures
  ijepa visualize WHAT SOURCE                       masks, pca, attention, neighbours, predictor,
                                                    rcdm: pictures as PNG files
  ijepa ablate TABLE                                the paper's Tables 6 to 14 on small runs
  ijepa sweep RECIPE --vary table.key=value,value   a grid of your own
  ijepa data shard FOLDER OUT                       images as tar files
  ijepa data check PATH                             counts, sizes, unreadable images, colours
  ijepa plan RECIPE --gpus 8 --gpu h200             memory, images/s, days; what sending costs
  ijepa doctor                                      this machine, versions, which op runs where
  ijepa --version

recipes: {recipes}
"""
PLAN_USAGE = """\
ijepa plan RECIPE [options] [--table.key VALUE ...]: what a recipe takes before it is started

  --gpus N          GPUs that share every batch, default 8
  --gpu NAME        {gpus}; default h200
  --mfu SHARE       of the GPU's matmul rate that is reached, 0 to 1, default 0.5
  --num-images N    of the training set, default ImageNet-1k's for a recipe of a folder
  --plot FILE       draw images/s over GPUs

settings: ijepa pretrain RECIPE --help
recipes: {recipes}
"""
DOCTOR_USAGE = "ijepa doctor: this machine, versions, which op runs where; takes no arguments"
# how often a launcher has started this command again
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
DEFAULT_RECIPE = "shapes-tiny"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    say_any_name()
    try:
        return _run(arguments)
    except BrokenPipeError:  # `| head` has what it wanted
        stop_listening_to(sys.stdout)
        return 1
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        _complain(f"ijepa: error: {error}", error)
        return 1
    except KeyboardInterrupt as error:
        _complain("interrupted", error)
        return 130


def _run(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE.format(recipes=", ".join(recipe_names())), flush=True)
        return 0
    if command in ("-V", "--version"):
        print(f"ijepa {__version__}")
        return 0
    check_known([command], list(COMMANDS), "unknown command")
    return COMMANDS[command](rest)


def _complain(message: str, error: BaseException) -> None:
    """The message and what was noted on the error, such as how to go on."""
    for line in (message, *getattr(error, "__notes__", ())):
        print(line, file=sys.stderr)


def pretrain_command(arguments: list[str]) -> int:
    """`ijepa pretrain [RECIPE | --data.path FOLDER [--hours H] [--dry-run]] [--resume RUN_FOLDER]
    [--table.key VALUE ...]`."""
    resume, arguments = _take_option(arguments, "--resume", "a run's folder")
    hours, arguments = _take_option(arguments, "--hours", "a number of hours")
    dry_run = "--dry-run" in arguments
    arguments = [argument for argument in arguments if argument != "--dry-run"]
    if resume is None:
        resume = _begun_before_a_restart(arguments)
    name = None
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    given = _given_settings(arguments)
    proposes = name is None and resume is None and _wants_a_recipe_for_a_folder(arguments, given)
    if (dry_run or hours is not None) and not proposes:
        raise ValueError(
            "--hours and --dry-run are for a recipe that is made for a folder of images: "
            "ijepa pretrain --data.path FOLDER, without a recipe's name"
        )
    if resume is not None:
        recipe, checkpoint = _resumed(resume, name, arguments, given)
    elif proposes:
        recipe, checkpoint = _proposed(arguments, hours, dry_run), None
        if recipe is None:
            return 0
    else:
        name = DEFAULT_RECIPE if name is None else name
        recipe = _override(load_recipe(name, implied_settings(given)), arguments, name)
        checkpoint = None

    # torch is not needed to refuse a bad setting
    from ijepa.train.distributed import launched_rank
    from ijepa.train.pretrain import pretrain
    from ijepa.train.resume import resume_command

    console = RunConsole()
    outcome = pretrain(recipe, checkpoint=checkpoint, console=console)
    if not outcome.finished and launched_rank() == 0:
        told = f"\nStopped and saved. Continue with:\n  {resume_command(outcome.folder)}"
        console.print(told, highlight=False, markup=False, soft_wrap=True)
    return 0


def plan_command(arguments: list[str]) -> int:
    """`ijepa plan RECIPE [--gpus N] [--gpu NAME] [--mfu SHARE] [--num-images N] [--plot FILE]`."""
    if _asks_for_help(arguments):
        from ijepa.cost.gpus import GPUS

        print(PLAN_USAGE.format(gpus=", ".join(GPUS), recipes=", ".join(recipe_names())))
        return 0
    gpus, arguments = _take_option(arguments, "--gpus")
    gpu, arguments = _take_option(arguments, "--gpu")
    mfu, arguments = _take_option(arguments, "--mfu")
    num_images, arguments = _take_option(arguments, "--num-images")
    plot, arguments = _take_option(arguments, "--plot", "a file")
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(
            "ijepa plan needs a recipe: ijepa plan RECIPE [--gpus 8] [--gpu h200] [--mfu 0.5] "
            f"[--num-images N]; recipes: {', '.join(recipe_names())}"
        )
    name, *arguments = arguments
    given = _given_settings(arguments)
    recipe = _override(load_recipe(name, implied_settings(given)), arguments, name)

    from ijepa.cost.plan import plan_recipe, render_plan
    from ijepa.cost.scaling import advice, draw_scaling, render_scaling

    plan = plan_recipe(
        recipe,
        gpu=gpu or "h200",
        gpus=_number("--gpus", gpus, int),
        mfu=_number("--mfu", mfu, float),
        num_images=_number("--num-images", num_images, int),
    )
    console = Console()
    console.print(render_plan(plan))
    if plan.gpus > 1:
        console.print(render_scaling(recipe, plan.gpu, plan.points))
        console.print(advice(plan.points, plan.room), highlight=False, soft_wrap=True)
    if plot is not None:
        draw_scaling(recipe, plan.points, Path(plot))
    return 0


def data_command(arguments: list[str]) -> int:
    """`ijepa data shard FOLDER OUT | check PATH`."""
    from ijepa.data.commands import data_command as run

    return run(arguments)


def doctor_command(arguments: list[str]) -> int:
    """`ijepa doctor`."""
    if _asks_for_help(arguments):
        print(DOCTOR_USAGE)
        return 0
    if arguments:
        raise ValueError(f"ijepa doctor takes no arguments, got {' '.join(arguments)}")
    from ijepa.doctor import run_doctor

    run_doctor(Console())
    return 0


COMMANDS = {
    "pretrain": pretrain_command,
    "embed": embed_command,
    "neighbours": neighbours_command,
    "eval": eval_command,
    "convert": convert_command,
    "report": report_command,
    "visualize": visualize_command,
    "ablate": ablate_command,
    "sweep": sweep_command,
    "data": data_command,
    "plan": plan_command,
    "doctor": doctor_command,
}


def _begun_before_a_restart(arguments: list[str]) -> str | None:
    """The folder of the run that this command began, where torchrun or SLURM has started it again
    after a failure; its train.output has to be given, for other folders have a new number each."""
    restarts = [os.environ.get(name, "0") for name in _RESTARTS]
    output, _ = _take_option(arguments, "--train.output", "a folder")
    if output is None or not any(count.isdigit() and int(count) for count in restarts):
        return None
    from ijepa.train.checkpoint import holds_checkpoint

    return output if holds_checkpoint(Path(output)) else None


def _resumed(folder: str, name: str | None, arguments: list[str], given: list[str]):
    """The checkpoint's recipe with the command line's values, and the checkpoint."""
    from ijepa.train.resume import load_to_resume, saved_recipe

    checkpoint = load_to_resume(Path(folder))
    recipe = with_settings(saved_recipe(checkpoint, name), implied_settings(given))
    return _override(recipe, arguments, f"--resume {folder}"), checkpoint


def _wants_a_recipe_for_a_folder(arguments: list[str], given: list[str]) -> bool:
    return "data.path" in given and "data.source" not in given and not _asks_for_help(arguments)


def _proposed(arguments: list[str], hours: str | None, dry_run: bool) -> Recipe | None:
    """The recipe for `--data.path FOLDER`, written beside where the command runs; None where it is
    only printed."""
    from ijepa.propose.command import propose
    from ijepa.propose.recipe_file import recipe_name, write_beside_others
    from ijepa.train.distributed import launched_with_others

    folder, others = _take_option(arguments, "--data.path", "a folder of images")
    assert folder is not None  # it is among the given settings
    words = shlex.join(["ijepa", "pretrain", "--data.path", folder, "--dry-run"])
    if launched_with_others():
        raise ValueError(
            f"a recipe is made by one process: first `{words} > my.toml`, then pretrain my.toml "
            "under torchrun"
        )
    device, _ = _take_option(others, "--train.device")
    proposal = propose(
        folder,
        hours=_number("--hours", hours, float),
        device=device or "auto",
        override=lambda recipe: _override(recipe, others, f"--data.path {folder}"),
        given=_given_settings(others),
        console=Console(stderr=True),
    )
    if dry_run:
        print(proposal.text, end="")
        return None
    path = write_beside_others(proposal.text, Path.cwd(), recipe_name(folder))
    again = f"`ijepa pretrain {path.name}` begins it again"
    print(f"{proposal.text}\nWritten to {path.name}; {again}.\n", flush=True)
    return dataclasses.replace(proposal.recipe, name=path.stem)


def _override(recipe: Recipe, arguments: list[str], title: str) -> Recipe:
    """The recipe with the command line's values; bad ones end the program with what is valid."""
    return tyro.cli(
        Recipe,
        default=recipe,
        args=arguments,
        prog=f"ijepa pretrain {title}",
        description="Every setting of the recipe, with its value there.",
    )


def _given_settings(arguments: list[str]) -> list[str]:
    """Dotted names of the settings on the command line; unknown ones are refused."""
    given = []
    for argument in arguments:
        if not argument.startswith("--") or argument in ("--help", "--"):
            continue
        key = argument[2:].partition("=")[0].replace("-", "_")
        if key not in setting_names():
            key = key.replace(".no_", ".", 1)  # --data.no-flip
        check_setting(key)
        given.append(key)
    return given


def _asks_for_help(arguments: list[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def _number(option: str, text: str | None, kind: type):
    """The value of a numeric option, None where it is not given."""
    try:
        return None if text is None else kind(text.replace(",", "").replace("_", ""))
    except ValueError:
        whole = "whole " if kind is int else ""
        raise ValueError(f"{option} must be a {whole}number, got {text!r}") from None


def _take_option(
    arguments: list[str], option: str, what: str = "a value"
) -> tuple[str | None, list[str]]:
    """Value of `--option VALUE` or `--option=VALUE`, and the arguments without it."""
    if [argument.partition("=")[0] for argument in arguments].count(option) > 1:
        raise ValueError(f"{option} is given twice")
    for place, argument in enumerate(arguments):
        if argument == option:
            if place + 1 == len(arguments):
                raise ValueError(f"{option} needs {what}")
            return arguments[place + 1], arguments[:place] + arguments[place + 2 :]
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2], arguments[:place] + arguments[place + 1 :]
    return None, arguments


if __name__ == "__main__":
    sys.exit(main())
