"""The four methods, ours and stock PyTorch beside each other: time, memory and lines of a step.

    python kernels/examples/compare.py [--device cuda] [--batch 32] [--repeats 20]

A step is loss, gradients, AdamW and where there is a teacher its moving average; ours takes
`AdamWEMA`, stock fused AdamW and `torch._foreach_lerp_`. Both run in turns, eager, and the median
counts. Memory is what autograd keeps for the backward. Lines are those that compute the loss,
without blank lines, comments and docstrings.
"""

from __future__ import annotations

import argparse
import ast
import copy
import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import data2vec
import dinov2
import generated
import mae
import packed_vit
import stock
import torch
import vjepa
from masked_vit_kernels import AdamWEMA
from torch import Tensor, nn

# method -> its module, its model, and what computes its loss: ours and stock
METHODS: dict[str, tuple[Any, type[nn.Module], list[Any], list[Any]]] = {
    "mae": (mae, mae.MAE, [mae.MAE.forward], [stock.mae]),
    "data2vec": (
        data2vec,
        data2vec.Data2Vec,
        [data2vec.Data2Vec.forward, data2vec.Encoder.forward, data2vec.Encoder.targets],
        [stock.data2vec],
    ),
    "dinov2": (
        dinov2,
        dinov2.DINOv2,
        [dinov2.DINOv2.forward, dinov2.Network.embed, dinov2.Network.forward],
        [stock.dinov2],
    ),
    "vjepa": (vjepa, vjepa.VJEPA, [vjepa.VJEPA.forward], [stock.vjepa]),
}
SHARED = (
    [packed_vit.Patches.forward, packed_vit.Block.forward, packed_vit.Blocks.forward],
    [stock.embed, stock.run_blocks, stock.take, stock.put, stock.with_class_token],
)


def batch_of(method: str, batch: int, generator: torch.Generator) -> tuple[Any, ...]:
    """What the method's forward takes; every image hides as many patches, as stock code needs."""
    example = METHODS[method][0]
    if method == "vjepa":
        clips = generated.clips(batch, vjepa.FRAMES, vjepa.SIZE, generator)
        return clips, vjepa.draw_masking(batch, generator, hidden=(8, 8))
    if method == "dinov2":
        crops = dinov2.draw_crops(generated.images(batch, 64, generator), generator)
        return *crops, dinov2.draw_masking(batch, generator)
    return generated.images(batch, example.SIZE, generator), example.draw_masking(batch, generator)


def loss_of(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def averages(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(teacher, student) parameters, none where there is no teacher."""
    if not hasattr(model, "teacher"):
        return []
    student = model.encoder if hasattr(model, "encoder") else model.student
    return list(zip(model.teacher.parameters(), student.parameters(), strict=True))


def our_step(model: nn.Module, inputs: tuple) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamWEMA(trained, lr=1e-4, ema=averages(model), momentum=0.99)

    def step() -> None:
        loss_of(model(*inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def stock_step(model: nn.Module, forward: Callable, inputs: tuple) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    pairs = averages(model)

    def step() -> None:
        loss_of(forward(model, *inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if pairs:
            with torch.no_grad():
                torch._foreach_lerp_([t for t, _ in pairs], [s for _, s in pairs], 0.01)

    return step


def milliseconds(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def kept_bytes(forward: Callable[[], Any]) -> int:
    """Of distinct memory that autograd keeps until the backward, weights aside."""
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = forward()
    kept = sum(storages.values())
    del result
    return kept


def lines(functions: list[Any]) -> int:
    """Of code: without blank lines, comments and docstrings."""
    count = 0
    for function in functions:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function)))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        count += len(ast.unparse(tree).splitlines())
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {given.device}, {torch.get_num_threads()} threads, "
          f"batch {given.batch}, float32")  # fmt: skip
    print("| method | step, ours | stock | kept, ours | stock | lines, ours | stock |")
    print("|---|---|---|---|---|---|---|")
    for method, (_, kind, our_code, stock_code) in METHODS.items():
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        ours = kind().to(given.device)
        theirs, forward = copy.deepcopy(ours), getattr(stock, method)
        inputs = tuple(x.to(given.device) for x in batch_of(method, given.batch, generator))
        kept = (
            kept_bytes(lambda m=ours, i=inputs: m(*i)),
            kept_bytes(lambda m=theirs, i=inputs, f=forward: f(m, *i)),
        )
        steps = our_step(ours, inputs), stock_step(theirs, forward, inputs)
        times: tuple[list[float], list[float]] = ([], [])
        for repeat in range(given.repeats + 3):
            for step, taken in zip(steps, times, strict=True):
                taken.append(milliseconds(step, given.device))
            if repeat == 2:  # so far they warmed up
                for taken in times:
                    taken.clear()
        medians = [statistics.median(taken) for taken in times]
        counts = lines(our_code), lines(stock_code)
        print(
            f"| {method} | {medians[0]:.1f} ms | {medians[1]:.1f} ms | {kept[0] / 1e6:.1f} MB | "
            f"{kept[1] / 1e6:.1f} MB | {counts[0]} | {counts[1]} |"
        )
    print(f"\nshared by all: {lines(SHARED[0])} lines ours, {lines(SHARED[1])} stock")


if __name__ == "__main__":
    main()
