"""How samplers are called, and settings that are refused."""

import re

import numpy as np
import pytest
import torch
from mask_checks import draw_keys

from ijepa.masks.multiblock import MultiBlockSampler
from ijepa.masks.strategies import BlockSampler, RandomSampler, RasterizedSampler


def test_generator_gives_the_keys():
    sampler = MultiBlockSampler((14, 14))
    first = sampler(6, generator=torch.Generator().manual_seed(1))
    again = sampler(6, torch.Generator().manual_seed(1))
    other = sampler(6, torch.Generator().manual_seed(2))
    assert torch.equal(first.context, again.context) and torch.equal(first.targets, again.targets)
    assert not torch.equal(first.target_rows[:50], other.target_rows[:50])
    torch.manual_seed(3)
    default = sampler(6)
    torch.manual_seed(3)
    assert torch.equal(default.context, sampler(6).context)
    assert not torch.equal(default.context[:50], sampler(6).context[:50])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either batch_size or keys"),
        ({"batch_size": 2, "keys": draw_keys(2)}, "either batch_size or keys"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"keys": draw_keys(4).reshape(2, 2)}, r"keys must be uint64 of shape \(B,\)"),
        ({"keys": np.arange(4)}, "keys must be uint64"),
    ],
)
def test_bad_calls(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiBlockSampler((8, 8))(**arguments)


REFUSED = [
    (MultiBlockSampler, {"grid": (0, 4)}, "grid"),
    (MultiBlockSampler, {"grid": (1, 1), "num_targets": 1}, "grid"),
    (MultiBlockSampler, {"grid": (1, 9), "batching": "truncate"}, "grid"),
    (RasterizedSampler, {"grid": (1, 8)}, "grid"),
    (MultiBlockSampler, {"context_scale": (0.85, 1.2)}, "context_scale"),
    (MultiBlockSampler, {"target_scale": (0.2, 0.15)}, "target_scale"),
    (MultiBlockSampler, {"target_scale": (-0.1, 0.2)}, "target_scale"),
    (MultiBlockSampler, {"target_aspect": (0.0, 1.5)}, "target_aspect"),
    (MultiBlockSampler, {"num_targets": 0}, "num_targets"),
    (MultiBlockSampler, {"grid": (6, 6), "num_targets": 100_000}, "num_targets"),
    (MultiBlockSampler, {"target_scale": (0.7, 0.8), "num_targets": 60}, "num_targets"),
    (MultiBlockSampler, {"min_context": 0}, "min_context"),
    (MultiBlockSampler, {"min_context": 150}, "min_context"),
    (MultiBlockSampler, {"min_context": 150, "batching": "truncate"}, "min_context"),
    (MultiBlockSampler, {"target_scale": (0.5, 1.0), "num_targets": 1}, "target_scale"),
    (MultiBlockSampler, {"grid": (4, 4), "min_context": 10}, "min_context"),
    (MultiBlockSampler, {"grid": (6, 6), "batching": "truncate", "min_context": 30}, "min_context"),
    (
        MultiBlockSampler,
        {"context_scale": (0.2, 0.3), "target_scale": (0.3, 0.4), "batching": "truncate"},
        "target_scale",
    ),
    (BlockSampler, {"scale": 1.0}, "scale"),
    (BlockSampler, {"scale": 1.3}, "scale"),
    (BlockSampler, {"scale": -0.1}, "scale"),
    (RandomSampler, {"scale": 0.0}, "scale"),
    (RandomSampler, {"scale": 1.0}, "scale"),
]


@pytest.mark.parametrize(("sampler", "settings", "name"), REFUSED)
def test_refused_settings_come_with_one_that_works(sampler, settings, name):
    """The error names the value, and putting its advice in the value's place cures it."""
    settings = {"grid": (14, 14), **settings}
    with pytest.raises(ValueError) as error:
        sampler(**settings)
    message = str(error.value)
    assert message.startswith(f"{name}={settings[name]}: "), message
    advice = re.search(r"the nearest .*that will do: (.+)$", message).group(1)
    numbers = [float(number) for number in re.findall(r"[\d.]+", advice)]
    kind = int if name in ("grid", "num_targets", "min_context") else float
    value = tuple(map(kind, numbers))
    batch = sampler(**{**settings, name: value if len(value) > 1 else value[0]})(4)
    assert batch.batch_size == 4


def test_unknown_batching_lists_the_known():
    with pytest.raises(ValueError, match=r"one of \['packed', 'truncate'\], got 'dense'"):
        MultiBlockSampler((8, 8), batching="dense")
