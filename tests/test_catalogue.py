"""The catalogue holds every launch that the audit and the C library held before it was one list."""

from collections import Counter

import pytest
import torch
from masked_vit_kernels.attention.config import WIDEST_TUNED
from masked_vit_kernels.audit.budgets import BUDGETS
from masked_vit_kernels.catalogue import all_cases, audit_cases, library_cases
from masked_vit_kernels.catalogue.attention import launches_of
from masked_vit_kernels.catalogue.sizes import HEAD_DIMS
from masked_vit_kernels.compile import Specialized, specialize_launch
from masked_vit_kernels.launch import CAPABILITIES

# Cases of the C library when it had a list of its own; attention's follow the launch tables.
LIBRARY = {
    "invert_rows": 2, "gather_rows": 36, "scatter_rows": 72, "scatter_fill_gradient": 36,
    "sum_rows_by_place": 36, "patch_rows": 36, "embed_visible_patches": 28, "add_position": 90,
    "add_position_backward": 54, "assemble_predictor_tokens": 14,
    "assemble_predictor_tokens_backward": 12, "prediction_loss": 60,
    "prediction_loss_backward": 60, "loss_finish": 21, "ema_update": 6,
    "adamw_ema_gradient_norm": 3, "adamw_ema_update": 5, "adamw_ema_decide": 2,
}  # fmt: skip
# What only the audit had: other patches and normalised float images, a wide predictor, and the
# attention of float32 and of the widest heads at four lengths.
ONLY_AUDITED = {
    "patch_rows": 13, "embed_visible_patches": 15, "assemble_predictor_tokens": 7,
    "assemble_predictor_tokens_backward": 6, "attention_forward": 32, "attention_backward": 32,
}
# Targets normalised over an image's patches or not at all came later, for the audit alone.
# So did L1 and cosine, tubelets of clips, and heads that share keys.
ADDED = {
    "image_statistics": 3, "prediction_loss": 6 + 6, "prediction_loss_backward": 6 + 6,
    "patch_rows": 2, "embed_visible_patches": 2, "attention_forward": 20, "attention_backward": 20,
}  # fmt: skip
FLOAT8 = {80: 0, 90: 6, 100: 6}  # copies of weights, which start with Ada
CORE_LAUNCHES = {80: 36, 90: 52, 100: 39}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_case_was_lost_when_two_lists_became_one(capability):
    library = Counter(case.op for case in library_cases(capability))
    attention = {op: library.pop(op) for op in ("attention_forward", "attention_backward")}
    assert library == LIBRARY
    assert min(attention.values()) >= 2 * 2 * len(HEAD_DIMS)  # dtypes, with maps and without
    others = Counter(case.op for case in all_cases(capability) if not case.in_library)
    assert others == Counter(ONLY_AUDITED) + Counter(ADDED) + Counter(
        float8_copies=FLOAT8[capability]
    )
    assert sum(case.core for case in audit_cases(capability)) >= CORE_LAUNCHES[capability]


def _text(specialized: Specialized) -> str:
    """What the compiler is given, apart from the kernel's source."""
    source = specialized.src
    return repr((source.name, source.signature, source.constants, source.attrs,
                 sorted(specialized.options.items(), key=str)))  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_attention_the_audit_compiled_is_in_the_catalogue(capability):
    """All dtypes and head dims at four lengths: the audit's loops before the catalogue."""
    held = {
        _text(specialize_launch(case.launch, capability))
        for case in audit_cases(capability)
        if case.name.startswith("attention")
    }
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim in (*HEAD_DIMS, 128):
            for longest in (64, 128, 256, 512):
                for launch in launches_of(dtype, head_dim, longest, capability):
                    assert _text(specialize_launch(launch, capability)) in held


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_cases_have_budgets_and_names_of_their_own(capability):
    cases = list(audit_cases(capability))
    assert {case.budget for case in cases} <= set(BUDGETS)
    assert max(Counter(case.name for case in cases).values()) == 1
    keys = Counter((case.op, *case.keys.values()) for case in library_cases(capability))
    assert max(keys.values()) == 1


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_kernel_is_judged_alike_wherever_it_is_listed(capability):
    """Two lists once held the two-phase backward of D=80 on sm_80 to different budgets."""
    budgets: dict[str, set[str]] = {}
    for case in audit_cases(capability):
        if case.name.startswith("attention"):
            text = _text(specialize_launch(case.launch, capability))
            budgets.setdefault(text, set()).add(case.budget)
            if case.launch.arguments["HEAD_DIM"] <= WIDEST_TUNED and "float32" not in case.name:
                two_phase = case.launch.arguments.get("KIND") == "two_phase"
                assert case.budget == ("matmul_two_phase" if two_phase else "matmul")
    assert {len(found) for found in budgets.values()} == {1}
