"""What a moving average may be given: lists of tensors, or two modules matched by name."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

_WRAPPER_PREFIXES = ("_orig_mod.", "module.")  # of torch.compile and DistributedDataParallel
_REMEDY = "give tensors, or two modules, which are matched by name"


def check_momentum(momentum: object) -> None:
    """The momentum must be a number or a 0-d tensor in [0, 1]; the value of a tensor on a GPU is
    not waited for.

    Raises:
        TypeError: it is neither.
        ValueError: it lies outside: NaN would become that of every average.
    """
    if isinstance(momentum, Tensor):
        if momentum.numel() != 1:
            raise ValueError(f"momentum must be 0-d, got a tensor of shape {tuple(momentum.shape)}")
        if not momentum.is_cpu or torch.compiler.is_compiling():
            return
    elif not isinstance(momentum, numbers.Real):
        raise TypeError(f"momentum must be a float or a 0-d tensor, got a {_kind(momentum)}")
    if not 0.0 <= float(momentum) <= 1.0:
        raise ValueError(f"momentum must lie in [0, 1], got {float(momentum)}")


def tensor_list(name: str, tensors: object) -> list[Tensor]:
    """The sequence as a list.

    Raises:
        TypeError: it is none, or holds something else than tensors.
    """
    if isinstance(tensors, nn.Module | Mapping | str) or not isinstance(tensors, Iterable):
        raise TypeError(f"{name} must be a list of tensors, got a {_kind(tensors)}: {_REMEDY}")
    listed = list(tensors)
    for position, tensor in enumerate(listed):
        if not isinstance(tensor, Tensor):
            kind = _kind(tensor)
            raise TypeError(f"{name}[{position}] must be a tensor, got a {kind}: {_REMEDY}")
    return listed


def pair_list(pairs: object) -> list[tuple[Tensor, Tensor]]:
    """(target, source) tensors of a list of pairs or of one pair of modules.

    Of modules, parameters and floating-point buffers; integer buffers (counters) have no average.

    Raises:
        TypeError: something else.
        ValueError: the modules' names differ.
    """
    if isinstance(pairs, nn.Module | Mapping | Tensor | str) or not isinstance(pairs, Iterable):
        raise TypeError(
            "ema must be a list of (target, source) tensors or one such pair of modules, got a "
            f"{_kind(pairs)}"
        )
    pairs = list(pairs)
    if len(pairs) == 2 and all(isinstance(entry, nn.Module) for entry in pairs):
        matched = match_by_name(*pairs)
        return [pair for pair in matched if pair[0].is_floating_point()]
    for position, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                f"ema pair {position} must be (target, source), got a {_kind(pair)}: {_REMEDY}"
            )
        tensor_list(f"ema pair {position}", pair)
    return [(target, source) for target, source in pairs]


def _kind(value: object) -> str:
    return "module" if isinstance(value, nn.Module) else type(value).__name__


def match_by_name(target: nn.Module, source: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(target, source) parameters and buffers of one name, wrappers' prefixes removed.

    Raises:
        ValueError: a name that only one of the two has; nothing is ever left out in silence.
    """
    ours, theirs = _named_tensors(target), _named_tensors(source)
    alone = sorted(ours.keys() ^ theirs.keys())
    if alone:
        raise ValueError(f"these names occur in only one of target and source: {alone[:8]}")
    return [(tensor, theirs[name]) for name, tensor in ours.items()]


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    return {_plain_name(name): tensor for name, tensor in named}


def _plain_name(name: str) -> str:
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name
