"""The commands that use an encoder: `ijepa embed | neighbours | eval | convert`."""

from __future__ import annotations

from typing import TypeVar

import tyro

from ijepa.downstream.options import (
    ConvertOptions,
    EmbedOptions,
    EvalOptions,
    FinetuneOptions,
    KnnOptions,
    LinearOptions,
    LowshotOptions,
    NeighboursOptions,
    ResumeOptions,
)
from ijepa.recipes import check_known

Options = TypeVar("Options")
EVAL_USAGE = """\
ijepa eval PROTOCOL SOURCE --data TASK [--path PATH] [options]: what an encoder's features are worth

  knn        nearest neighbours on frozen features
  linear     linear probes on frozen features, by the paper's protocols
  lowshot    logistic regression on few labels
  finetune   encoder and head trained together; goes on with: ijepa eval finetune --resume FOLDER

SOURCE is a run's folder, one of its checkpoints, a released .pth.tar, or what ijepa convert wrote.
Options of each: ijepa eval PROTOCOL --help
"""


def embed_command(arguments: list[str]) -> int:
    """`ijepa embed SOURCE FOLDER --out DIR`."""
    options = _parsed(EmbedOptions, "embed", arguments)
    from ijepa.downstream.embed_folder import embed_folder

    embed_folder(options)
    return 0


def neighbours_command(arguments: list[str]) -> int:
    """`ijepa neighbours DIR QUERY`."""
    options = _parsed(NeighboursOptions, "neighbours", arguments)
    from ijepa.downstream.embed_folder import show_neighbours

    show_neighbours(options)
    return 0


def convert_command(arguments: list[str]) -> int:
    """`ijepa convert SOURCE OUT --to FORM`."""
    options = _parsed(ConvertOptions, "convert", arguments)
    from ijepa.interop.convert import convert, how_to_open, model_name

    config = convert(
        options.source, options.out, options.to, network=options.network,
        num_heads=options.num_heads,
    )  # fmt: skip
    what = "three networks" if options.to == "released" else options.network.replace("_", " ")
    print(f"{options.out}: {model_name(config)}, {what}, for {options.to}. Read it with")
    print(f"  {how_to_open(options.out, options.to, config)}")
    return 0


def eval_command(arguments: list[str]) -> int:
    """`ijepa eval knn | linear | lowshot | finetune SOURCE --data TASK`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(EVAL_USAGE, end="")
        return 0
    kinds: dict[str, type[EvalOptions]] = {
        "knn": KnnOptions,
        "linear": LinearOptions,
        "lowshot": LowshotOptions,
        "finetune": FinetuneOptions,
    }
    protocol, *rest = arguments
    check_known([protocol], list(kinds), "unknown protocol")
    if protocol == "finetune":
        return _finetune(rest)
    options = _parsed(kinds[protocol], f"eval {protocol}", rest)
    from ijepa.downstream.evaluation import evaluate

    evaluate(options)
    return 0


def _finetune(arguments: list[str]) -> int:
    if "--resume" in arguments:
        again = _parsed(ResumeOptions, "eval finetune", arguments)
        from ijepa.downstream.finetune.run import resume

        resume(again.resume, path=again.path, workers=again.workers, device=again.device)
        return 0
    options = _parsed(FinetuneOptions, "eval finetune", arguments)
    from ijepa.downstream.finetune.run import finetune

    finetune(options)
    return 0


def _parsed(kind: type[Options], command: str, arguments: list[str]) -> Options:
    return tyro.cli(kind, args=arguments, prog=f"ijepa {command}")
