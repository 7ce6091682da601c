"""What a profiler saw of two ranks: gradients travel while the backward pass is still running."""

from __future__ import annotations

import dataclasses

import torch
from rank_cases import CONFIG, make_trainer, on_ranks, step
from torch.profiler import ProfilerActivity, profile

from ijepa.train.parallel import replicated

WIDER = dataclasses.replace(CONFIG, width=64, depth=3, heads=4)


def profiled_step() -> dict:
    """(nanoseconds from, to) of the two backward passes of a step and of its all-reduces, and how
    many elements those had."""
    replicated.BUCKET_MEGABYTES = 0.1  # of 0.6 MB: as many buckets as a large model has of 25
    trainer = make_trainer(WIDER, parallel="ddp")
    for number in range(2):  # buckets are put in the order of the gradients after the first
        step(trainer, number, 2)
    whole = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    backward = torch.Tensor.backward

    def marked(self, *arguments, **options):
        with torch.profiler.record_function("backward pass"):
            backward(self, *arguments, **options)

    torch.Tensor.backward = marked  # type: ignore[method-assign]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        step(trainer, 2, 2)
    found: dict = {"backward": [], "buckets": [], "elements": 0, "parameters": whole}
    for event in seen.profiler.kineto_results.events():
        times = [event.start_ns(), event.start_ns() + event.duration_ns()]
        if event.name() == "backward pass":
            found["backward"].append(times)
        elif event.name() == "gloo:all_reduce" and event.shapes() and event.shapes()[0]:
            found["buckets"].append(times)
            found["elements"] += event.shapes()[0][0]
    return found


def test_buckets_leave_before_the_backward_pass_ends(tmp_path):
    for found in on_ranks(profiled_step, 2, tmp_path):
        assert len(found["backward"]) == 2
        start, end = found["backward"][1]
        assert found["elements"] == found["parameters"]  # every gradient travels once a step
        begun = sorted(begin for begin, _ in found["buckets"])
        assert len(begun) >= 4
        assert begun[0] > start  # not while micro-batches add up
        assert begun[len(begun) // 2] < end - (end - start) // 10, found
