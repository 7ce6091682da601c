"""The self-test of the op library runs here and notices a wrong op."""

import masked_vit_kernels
import pytest
from masked_vit_kernels import selftest


def test_every_op_agrees_with_the_reference(capsys):
    assert selftest.main(["--seed", "7", "--rounds", "1", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "seed 7" in text and "all ops agree" in text
    for check in selftest.CHECKS:
        assert check.__name__.removeprefix("check_") in text


def test_a_wrong_op_is_noticed(monkeypatch, capsys):
    right = masked_vit_kernels.varlen_attention
    monkeypatch.setattr(
        masked_vit_kernels,
        "varlen_attention",
        lambda *args, **options: right(*args, **options) * 1.1,
    )
    monkeypatch.setattr(selftest, "CHECKS", (selftest.check_attention,))
    assert selftest.main(["--seed", "1", "--rounds", "3", "--device", "cpu"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.gpu
def test_every_op_agrees_on_the_gpu():
    assert selftest.main(["--seed", "3", "--rounds", "10", "--device", "cuda"]) == 0
