"""Operations of a step against PyTorch's counter."""

from dataclasses import replace

import pytest
from masked_vit_kernels import cpu_linear, reference
from small_steps import CONFIG, draw
from torch.utils.flop_counter import FlopCounterMode

from ijepa import IJEPA, vit
from ijepa.cost.flops import count_tokens, step_flops


def counted_products(monkeypatch):
    """Matrix products that the counter sees: attention sequence by sequence, layers by F.linear."""

    def qkvpacked(qkv, cu_seqlens, max_seqlen, packing=None):
        return reference.varlen_attention(*qkv.unbind(1), cu_seqlens, cu_seqlens)[0]

    def kvpacked(q, kv, cu_q, cu_k, max_q, max_k, packing_q=None, packing_k=None):
        return reference.varlen_attention(q, *kv.unbind(1), cu_q, cu_k)[0]

    monkeypatch.setattr(vit, "varlen_attention_qkvpacked", qkvpacked)
    monkeypatch.setattr(vit, "varlen_attention_kvpacked", kvpacked)
    monkeypatch.setattr(cpu_linear, "ONEDNN_DTYPES", frozenset())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prune_predictor": False, "prune_target": False},
        {"share_predictor": True},
        {"share_predictor": True, "predictor_depth": 1},
        {"target": "pixels"},
        {"target_masking": "input"},
        {"target_norm": "instance"},
    ],
    ids=str,
)
def test_operations_are_those_that_pytorch_counts(settings, monkeypatch):
    """Exactly: every matrix product of the step is in the arithmetic and nothing else."""
    counted_products(monkeypatch)
    config = replace(CONFIG, **settings)
    model, (images, masks) = IJEPA(config), draw(config)
    with FlopCounterMode(display=False) as forward:
        loss = model(images, masks)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    parts = step_flops(config, count_tokens(masks)).values()
    planned = masks.batch_size * sum(p.forward for p in parts)
    assert planned == pytest.approx(forward.get_total_flops(), rel=1e-12)
    counted = forward.get_total_flops() + backward.get_total_flops()
    planned = masks.batch_size * sum(p.total for p in parts)
    assert planned == pytest.approx(counted, rel=1e-12)
