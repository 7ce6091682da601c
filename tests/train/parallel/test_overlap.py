"""What a profiler saw of two ranks: gradients travel while the backward pass is still running."""

from __future__ import annotations

import dataclasses

import torch
from rank_cases import CONFIG, make_trainer, on_ranks, step
from torch.profiler import ProfilerActivity, profile

from ijepa.train.parallel import replicated

WIDER = dataclasses.replace(CONFIG, width=64, depth=6, heads=4)


def profiled_step(accumulate: int) -> dict:
    """(microseconds from, to) of the backward passes and of the buckets' all-reduces of a step."""
    replicated.BUCKET_MEGABYTES = 0.25  # of 1.2 MB: as many buckets as a large model has of 25
    trainer = make_trainer(WIDER, parallel="ddp")
    for number in range(2):  # buckets are put in the order of the gradients after the first
        step(trainer, number, accumulate)
    whole_gradients = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    backward = torch.Tensor.backward

    def marked(self, *arguments, **options):
        with torch.profiler.record_function("backward pass"):
            backward(self, *arguments, **options)

    torch.Tensor.backward = marked
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        step(trainer, 2, accumulate)
    torch.Tensor.backward = backward
    found = {"backward": [], "buckets": [], "elements": 0}
    for event in seen.events():
        times = [event.time_range.start, event.time_range.end]
        if event.name == "backward pass":
            found["backward"].append(times)
        elif event.name == "gloo:all_reduce" and event.input_shapes[0]:  # no scalar
            found["buckets"].append(times)
            found["elements"] += event.input_shapes[0][0]
    found["share"] = found["elements"] / whole_gradients
    return found


def profiled_steps() -> list:
    return [profiled_step(1), profiled_step(2)]


def test_buckets_leave_before_the_backward_pass_ends(tmp_path):
    for once, accumulated in on_ranks(profiled_steps, 2, tmp_path):
        for found, micro_batches in ((once, 1), (accumulated, 2)):
            assert len(found["backward"]) == micro_batches
            start, end = found["backward"][-1]
            assert found["share"] == 1.0, found  # every gradient travels once a step
            assert len(found["buckets"]) >= 4
            early = [begin for begin, _ in found["buckets"] if begin < end - 0.2 * (end - start)]
            assert len(early) >= 2, found
            assert all(begin >= start for begin, _ in found["buckets"])  # no_sync before the last
