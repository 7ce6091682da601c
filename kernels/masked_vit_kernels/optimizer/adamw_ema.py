"""AdamW and the exponential moving average of a target network in one pass over memory.

For every parameter p with gradient g, moments m and v, and EMA partner t:

    g <- clip * g                                  clip = min(1, max_norm / (norm + 1e-6))
    m <- beta1 * m + (1 - beta1) * g
    v <- beta2 * v + (1 - beta2) * g * g
    p <- (1 - lr * wd) * p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    t <- momentum * t + (1 - momentum) * p         the updated p

A loss or gradient norm that is not finite leaves all of it untouched, the step count t included.
Parameters and targets may be bfloat16 or float16: float32 masters in the optimiser's state then
carry the values and the weights are their rounded copies.

Bytes a parameter, float32 masters, bfloat16 weights and gradients: 38 for the update (p, m, v and
t read and written, g read, two weights written) and 2 for the gradient norm.

CUDA tensors take three Triton launches (`kernels.py`), CPU tensors `cpu.py`. Float8 copies of
weights, where there are any, are rounded anew right after (`float8_copies.py`).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from masked_vit_kernels.float8 import Float8Rows
from masked_vit_kernels.launch import runs_kernels
from masked_vit_kernels.optimizer import cpu as adamw_ema_cpu
from masked_vit_kernels.optimizer.ema_arguments import check_momentum, pair_list
from masked_vit_kernels.optimizer.float8_copies import Float8Copies
from masked_vit_kernels.optimizer.launches import DeviceTables
from masked_vit_kernels.optimizer.multi_tensor import local
from masked_vit_kernels.optimizer.ranks import agree, shard_groups
from masked_vit_kernels.optimizer.slots import (
    WEIGHT_DTYPES,
    GroupValues,
    Plan,
    Slot,
    build_slot,
    build_untrained_slot,
    check_pair,
    complete_state,
    conform,
)

UNTRAINED_MASTERS = "untrained_ema_masters"  # state entry: averages of untrained bf16 partners
COMPILE_FROM_NUMEL = 1 << 24  # CPU: smaller models never repay the seconds that compiling takes


class AdamWEMA(torch.optim.Optimizer):
    """AdamW with decoupled weight decay and a moving average of the updated parameters.

    Its state is exchangeable with `torch.optim.AdamW`'s in both directions.

    Args:
        params: parameters or parameter groups, float32, bfloat16 or float16. Groups may set their
            own lr, betas, eps and weight_decay; LR schedulers work as with any optimiser.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        ema: (target, source) pairs of one shape, or one (target, source) pair of modules, whose
            parameters and floating-point buffers are matched by name. A source is usually a
            parameter of the optimiser; one that is not (a frozen parameter, a buffer) is averaged
            all the same.
        momentum: weight of the old average; an attribute, a float or a 0-d tensor.
        max_grad_norm: clip the global gradient norm to this; None never clips. Gradients
            themselves are left as they are.
        process_group: ranks that must skip a step together (data parallelism). Gradients that are
            DTensor shards are summed over their own mesh besides.
        compile_on_cpu: compile the CPU update; None decides by the number of elements.
        foreach, fused, capturable: accepted for `torch.optim.AdamW`'s sake: all parameters are
            updated together, in one pass, and the step can be captured, whatever is said here.
        amsgrad, maximize, differentiable: False; True is refused, here and in a group.

    Raises:
        TypeError: `ema` is something else, or a value is no number.
        ValueError: a value out of range or a variant that there is not.

    Attributes:
        grad_norm: 0-d float32, the norm before clipping.
        skipped: 0-d bool, the last step did nothing.
        skip_count: 0-d int64, steps that did nothing.
        The three are overwritten in place by every step, on the parameters' device.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        ema: Sequence[tuple[Tensor, Tensor]] | tuple[nn.Module, nn.Module] = (),
        momentum: float | Tensor = 0.996,
        max_grad_norm: float | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        compile_on_cpu: bool | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
    ):
        variants = {"amsgrad": amsgrad, "maximize": maximize, "differentiable": differentiable}
        _refuse_variants(variants)
        _check_hyper_parameters(lr, betas, eps, weight_decay, max_grad_norm)
        check_momentum(momentum)
        self._plan: Plan | None = None
        self._tables: DeviceTables | None = None
        self._captured: list[tuple[Plan, DeviceTables]] = []
        self._float8 = Float8Copies()
        self.momentum = momentum
        self.max_grad_norm = max_grad_norm
        self.process_group = process_group
        self.compile_on_cpu = compile_on_cpu
        self._pairs: list[tuple[Tensor, Tensor]] = []
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.add_ema_pairs(ema)
        device = local(self.param_groups[0]["params"][0]).device
        self._set_status(device, skip_count=0)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group; its EMA pairs, if any, follow by `add_ema_pairs`."""
        _refuse_variants(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            if parameter.dtype not in WEIGHT_DTYPES:
                self.param_groups.pop()
                raise ValueError(
                    f"parameters must be float32, bfloat16 or float16, got {parameter.dtype}"
                )
        self._plan = None

    def add_ema_pairs(
        self, pairs: Sequence[tuple[Tensor, Tensor]] | tuple[nn.Module, nn.Module]
    ) -> None:
        """Average further (target, source) pairs, or those of two modules.

        Raises:
            TypeError: neither pairs of tensors nor two modules.
            ValueError: shapes differ, a tensor occurs twice as target or twice as source, or a
                target is itself a parameter of the optimiser.
        """
        pairs = pair_list(pairs)
        trained = {id(p) for p in self._parameters()}
        targets = {id(target) for target, _ in self._pairs}
        sources = {id(source) for _, source in self._pairs}
        for position, (target, source) in enumerate(pairs):
            check_pair(target, source, position)
            if id(target) in targets or id(source) in sources:
                raise ValueError(f"ema pair {position}: its target or source is already paired")
            if id(target) in trained:
                raise ValueError(f"ema pair {position}: the target is itself being optimised")
            targets.add(id(target))
            sources.add(id(source))
        self._pairs += pairs
        self._plan = None

    def add_float8_copies(self, pairs: Sequence[tuple[Tensor, Float8Rows]]) -> None:
        """Keep a float8 copy of weights (parameters or EMA targets): rounded now and at each step.

        Copies are no part of the optimiser's state: they follow from the weights alone. Whoever
        writes weights from outside, from a checkpoint for instance, calls `refresh_float8_copies`.

        Raises:
            ValueError: a copy of another shape or device, a weight that is sharded or has gaps.
        """
        for weight, copy in pairs:
            self._float8.add(weight, copy)
        self._float8.refresh()

    def refresh_float8_copies(self) -> None:
        """Round every float8 copy anew."""
        self._float8.refresh()

    @torch.no_grad()
    def step(self, closure: Callable | None = None, *, loss: Tensor | None = None):
        """Apply the gradients and move the averages, or nothing where something is not finite.

        Never waits for the device. In a CUDA graph capture it records its launches; before each
        replay call `upload_hyper_parameters`.

        Args:
            closure: recomputes the loss, as in `torch.optim`.
            loss: 0-d tensor, checked for finiteness together with the gradient norm.

        Returns:
            What `closure` returned.
        """
        if isinstance(closure, Tensor):
            raise TypeError("pass the loss by name: step(loss=loss)")
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
            loss = result if loss is None else loss
        if loss is not None and not isinstance(loss, Tensor):
            loss = torch.tensor(float(loss))
        check_momentum(self.momentum)
        plan = self._current_plan()
        gradients = [slot.gradient() for slot in plan.slots]
        for view in plan.staged:
            view.load()
        if runs_kernels(plan.device):
            self._step_on_device(plan, gradients, loss)
        else:
            self._step_on_cpu(plan, gradients, loss)
        for view in plan.staged:
            view.store()
        increment_version(plan.written)
        self._float8.refresh()
        return result

    def master(self, tensor: Tensor) -> Tensor:
        """The float32 tensor that carries the value of a parameter or EMA target.

        It is the tensor itself where that is float32. Checkpoints save it; to load one, copy into
        it and into the tensor.
        """
        self._current_plan()
        if tensor.dtype == torch.float32:
            return tensor
        if tensor in self.state:
            return self.state[tensor]["master"]
        for target, source in self._pairs:
            if target is tensor:
                untrained = self._untrained_masters()
                return untrained.get(id(target), self.state.get(source, {}).get("ema_master"))
        raise KeyError("the tensor is neither a parameter of this optimiser nor an EMA target")

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore a state of this class or of `torch.optim.AdamW`, in float32 whatever the
        parameters' dtype. Graphs captured before hold the old state: capture them again.

        Raises:
            ValueError: the state belongs to a variant (amsgrad, maximize) or does not fit.
        """
        for group in state_dict["param_groups"]:
            _refuse_variants(group)
        super().load_state_dict(state_dict)
        # Optimizer.load_state_dict has cast the state to the parameters' dtype: take it again.
        saved_ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        for parameter, saved_id in zip(self._parameters(), saved_ids, strict=True):
            saved = state_dict["state"].get(saved_id)
            if saved is None:
                continue
            own = self.state[parameter] = {"step": torch.as_tensor(saved["step"]).clone()}
            for name in ("exp_avg", "exp_avg_sq", "master", "ema_master"):
                if name in saved:
                    like = torch.empty_like(parameter, dtype=torch.float32)
                    own[name] = like.copy_(saved[name])
        state: dict = self.state  # keys beside the parameters, which torch's annotation denies
        if UNTRAINED_MASTERS in state:
            state[UNTRAINED_MASTERS] = [t.clone() for t in state[UNTRAINED_MASTERS]]
        self._plan = None

    def upload_hyper_parameters(self) -> None:
        """Send learning rates, weight decays and momentum to the device, without waiting.

        `step` does so by itself except in a graph capture: call this before every replay.
        """
        plan = self._current_plan()
        if runs_kernels(plan.device):
            self._device_tables(plan).upload(
                self._group_values(), self.momentum, self.max_grad_norm
            )

    def __getstate__(self) -> dict:
        kept = ("momentum", "max_grad_norm", "compile_on_cpu", "_pairs", "grad_norm", "skipped")
        return super().__getstate__() | {
            name: getattr(self, name) for name in (*kept, "skip_count")
        }

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("process_group", None)
        self.__dict__.setdefault("_captured", [])
        self.__dict__.setdefault("_float8", Float8Copies())
        self._plan = None

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _untrained_pairs(self) -> list[tuple[Tensor, Tensor]]:
        trained = {id(p) for p in self._parameters()}
        return [pair for pair in self._pairs if id(pair[1]) not in trained]

    def _current_plan(self) -> Plan:
        """The plan, built anew where a tensor was added, loaded or moved since."""
        tensors = self._parameters() + list(chain.from_iterable(self._pairs))
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError(
                "parameters or averages are on the meta device and hold no values: give them some, "
                "for instance by module.to_empty(device=...) and a checkpoint, before the step"
            )
        placement = [local(tensor).data_ptr() for tensor in tensors]
        if self._plan is None or self._plan.placement != placement:
            if _is_capturing():
                raise RuntimeError("take one step before capturing a graph of AdamWEMA.step")
            self._plan = self._build_plan(placement)
        return self._plan

    @torch.no_grad()
    def _build_plan(self, placement: list[int]) -> Plan:
        parameters = self._parameters()
        slots = self._build_slots()
        steps = [self.state[parameter]["step"] for parameter in parameters]
        plan = Plan(slots, steps, placement)
        for parameter, step in zip(parameters, plan.step_views, strict=False):
            self.state[parameter]["step"] = step
        self._shards = shard_groups(parameters)
        self._tables = None
        if self.skipped.device != plan.device:
            self._set_status(plan.device, int(self.skip_count))
        return plan

    def _build_slots(self) -> list[Slot]:
        """Trained parameters in the order of the groups, then the untrained EMA pairs."""
        targets = {id(source): target for target, source in self._pairs}
        slots = []
        for group, members in enumerate(self.param_groups):
            for parameter in members["params"]:
                target = targets.get(id(parameter))
                state = complete_state(self.state[parameter], parameter, target)
                slots.append(build_slot(parameter, group, state, target))
        masters = self._untrained_masters()
        for target, source in self._untrained_pairs():
            slots.append(build_untrained_slot(source, target, masters.get(id(target))))
        return slots

    def _untrained_masters(self) -> dict[int, Tensor]:
        """Averages of low-precision targets whose source is not trained, by the target's id."""
        targets = [t for t, _ in self._untrained_pairs() if t.dtype != torch.float32]
        if targets:
            state: dict = self.state
            held = state.get(UNTRAINED_MASTERS, [])
            held = held + [target.detach() for target in targets[len(held) :]]
            conformed = [conform(m, t) for m, t in zip(held, targets, strict=True)]
            state[UNTRAINED_MASTERS] = conformed
            return {id(t): m for t, m in zip(targets, conformed, strict=True)}
        return {}

    def _set_status(self, device: torch.device, skip_count: int) -> None:
        self.grad_norm = torch.zeros((), device=device)
        self.skipped = torch.zeros((), dtype=torch.bool, device=device)
        self.skip_count = torch.tensor(skip_count, dtype=torch.int64, device=device)

    def _group_values(self) -> list[GroupValues]:
        values = []
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            values.append(
                GroupValues(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
            )
        return values

    def _agrees_with_ranks(self) -> bool:
        return bool(self._shards) or self.process_group is not None

    def _step_on_cpu(self, plan: Plan, gradients: list[Tensor | None], loss: Tensor | None) -> None:
        squares = adamw_ema_cpu.sum_squares([g for g in gradients if g is not None])
        if self._agrees_with_ranks():
            squares, loss = agree(squares, loss, self._shards, self.process_group).unbind()
        grad_norm = math.sqrt(squares)
        finite = math.isfinite(grad_norm) and (loss is None or math.isfinite(loss))
        self.grad_norm.fill_(grad_norm)
        self.skipped.fill_(not finite)
        self.skip_count += not finite
        if not finite:
            return
        compiled = self.compile_on_cpu
        if compiled is None:
            compiled = plan.num_trained_elements >= COMPILE_FROM_NUMEL
        adamw_ema_cpu.step_on_cpu(
            plan.slots,
            gradients,
            plan.step_views,
            [GroupValues(*map(float, values)) for values in self._group_values()],
            grad_norm=grad_norm,
            max_grad_norm=self.max_grad_norm,
            momentum=float(self.momentum),
            compiled=compiled,
        )

    def _step_on_device(
        self, plan: Plan, gradients: list[Tensor | None], loss: Tensor | None
    ) -> None:
        tables = self._device_tables(plan, gradients)
        if _is_capturing():
            self._captured.append((plan, tables))  # a graph keeps no memory alive by itself
            tables.copy_tensor_values(self._group_values(), self.momentum)
        else:
            tables.upload(self._group_values(), self.momentum, self.max_grad_norm)
        column = tables.send_gradients(gradients, _is_capturing())
        squares = tables.sum_squares(column)
        if loss is not None:
            loss = loss.detach().to(plan.device, non_blocking=True)
        if self._agrees_with_ranks():
            total = squares.double().sum()
            squares, loss = agree(total, loss, self._shards, self.process_group).split(1)
        tables.decide(column, squares, loss, (self.grad_norm, self.skipped, self.skip_count))
        tables.update(column)

    def _device_tables(
        self, plan: Plan, gradients: list[Tensor | None] | None = None
    ) -> DeviceTables:
        """The tables for gradients of these dtypes; a missing gradient keeps the dtype it had."""
        if self._tables is not None:
            expected = self._tables.gradient_dtypes
        else:
            expected = [slot.source.flat.dtype for slot in plan.slots]
        if gradients is not None:
            pairs = zip(expected, gradients, strict=True)
            expected = [old if g is None else g.dtype for old, g in pairs]
        if self._tables is None or expected != self._tables.gradient_dtypes:
            if _is_capturing():
                raise RuntimeError("gradients have other dtypes than in the step before capture")
            self._tables = DeviceTables(plan.slots, plan.steps, expected)
        return self._tables


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _refuse_variants(settings: dict) -> None:
    """Raise ValueError where a variant of AdamW is asked for that this optimiser does not have."""
    for name in ("amsgrad", "maximize", "differentiable"):
        if settings.get(name):
            raise ValueError(f"AdamWEMA has no {name}: leave it out, or take torch.optim.AdamW")


def _check_hyper_parameters(lr, betas, eps, weight_decay, max_grad_norm) -> None:
    """Raise ValueError where a value lies outside its range, TypeError where it is no number."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    named = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
    for name, value in {**named, "betas[0]": betas[0], "betas[1]": betas[1]}.items():
        if not isinstance(value, numbers.Real) and not (name == "lr" and isinstance(value, Tensor)):
            raise TypeError(f"{name} must be a number, got {value!r}")
    for name, value in named.items():
        if not isinstance(value, Tensor) and not 0.0 <= value < math.inf:
            expected = "not be negative" if value < 0 else "be finite"
            raise ValueError(f"{name} must {expected}, got {value}")
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} must lie in [0, 1), got {beta}")
    if max_grad_norm is not None and not max_grad_norm > 0.0:
        raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")
