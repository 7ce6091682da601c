"""The compile audit: core kernels hold their budgets, and the audit sees what it should."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from masked_vit_kernels import audit
from masked_vit_kernels.catalogue import audit_cases
from masked_vit_kernels.compile import compile_launch
from masked_vit_kernels.launch import CAPABILITIES, KernelLaunch, table_capability

CORE = [
    pytest.param(case, capability, id=f"sm_{capability} {case.name}")
    for capability in CAPABILITIES
    for case in audit_cases(capability)
    if case.core
]


@pytest.mark.audit
@pytest.mark.parametrize(("case", "capability"), CORE)
def test_core_kernels_hold_their_budgets(case, capability):
    found = audit.measure(compile_launch(case.launch, capability), capability)
    assert audit.violations(case.budget, found, capability) == []


@triton.jit
def _copy_rows_kernel(x_ptr, y_ptr, stride, WIDTH: tl.constexpr):
    rows = tl.arange(0, 64)
    columns = tl.arange(0, WIDTH)
    offsets = rows[:, None] * stride + columns[None, :]
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets))


def _copy_rows(stride: int) -> KernelLaunch:
    x = torch.empty(4096, dtype=torch.bfloat16, device="meta")
    arguments = {"x_ptr": x, "y_ptr": x, "stride": stride, "WIDTH": 64}
    return KernelLaunch(_copy_rows_kernel, (1,), arguments)


def _measure(launch: KernelLaunch, capability: int = 90) -> audit.Measurement:
    return audit.measure(compile_launch(launch, capability), capability)


@pytest.mark.audit
def test_a_stride_without_a_divisibility_hint_is_seen():
    assert audit.violations("streaming", _measure(_copy_rows(64)), 90) == []
    broken = audit.violations("streaming", _measure(_copy_rows(72)), 90)
    assert any("narrow_accesses" in text for text in broken)
    assert "no 16-byte loads" in broken


@pytest.mark.audit
def test_register_caps_and_spills_are_seen():
    case = next(c for c in audit_cases(90) if c.core and "resident 64x64" in c.name)
    capped = dataclasses.replace(case.launch, max_registers=96)
    found = _measure(capped)
    assert found.registers <= 96 and found.stack_bytes > 0 and found.local_accesses > 0
    assert any("stack_bytes" in text for text in audit.violations(case.budget, found, 90))


def test_loops_are_found_in_machine_code():
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
    .L_x_1:
        /*0010*/                   LDG.E.U16 R2, [R4.64] ;
    .L_x_0:
        /*0020*/                   LDL R3, [R1] ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
    .L_x_2:
        /*0060*/                   BRA `(.L_x_2);
    """
    code = audit.parse_instructions(sass)
    assert [opcode for _, opcode, _ in code] == [
        "MOV", "LDG.E.U16", "LDL", "BRA", "BRA", "EXIT", "BRA",
    ]  # fmt: skip
    assert audit.innermost_loops(code) == [(0x20, 0x30)]


def test_table_capability_without_a_gpu():
    assert table_capability(torch.device("cpu")) == 90
    assert table_capability(torch.device("meta")) in CAPABILITIES


# What ptxas made of two products: the second takes its keys' address from UR6, which a reload
# should have filled; it still holds a pointer. `MISSING` is that reload.
MISSING = "        /*0060*/                   R2UR UR6, R8 ;\n"
SPILLED = f"""
        /*0000*/                   MOV R2, 0x400 ;
        /*0010*/                   S2R R3, SR_CgaCtaId ;
        /*0020*/                   LEA R8, R3, R2, 0x18 ;
        /*0030*/                   R2UR UR4, R8 ;
        /*0040*/                   UMOV UR5, 0x40000040 ;
        /*0050*/                   ULDC.64 UR6, c[0x0][0x230] ;
{MISSING}        /*0070*/                   UMOV UR7, 0x40000040 ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4].tnspB, R24, gsb0 ;
        /*00a0*/                   EXIT ;
"""


def test_a_descriptor_from_a_stale_register_is_seen():
    assert audit.foreign_descriptors(SPILLED) == []
    assert audit.foreign_descriptors(SPILLED.replace(MISSING, "")) == [0x80, 0x90]
    by_thread = MISSING.replace("0060", "0058").replace("R2UR UR6, R8", "S2R R8, SR_TID.X")
    by_thread += MISSING
    assert audit.foreign_descriptors(SPILLED.replace(MISSING, by_thread)) == [0x80, 0x90]


@pytest.mark.parametrize(
    ("shift", "found"), [("0x5", []), ("0x4", [0x80])], ids=["of the warp", "of the thread"]
)
def test_a_descriptor_may_depend_on_the_warp_alone(shift, found):
    number = f"""
        /*0052*/                   S2R R9, SR_TID.X ;
        /*0054*/                   SHF.R.U32.HI R9, RZ, {shift}, R9 ;
        /*0056*/                   R2UR UR4, R9 ;
"""
    assert audit.foreign_descriptors(SPILLED.replace(MISSING, number + MISSING)) == found


@pytest.mark.audit
def test_the_tiles_that_an_h200_computed_wrongly_are_refused():
    """dq was wrong, or an address illegal, in unpipelined programs of D=80."""
    case = next(c for c in audit_cases(90) if "flash_queries" in c.name and "head_dim=80" in c.name)
    unpipelined = dataclasses.replace(
        case.launch, num_stages=1, max_registers=None,
        arguments=case.launch.arguments | {"BLOCK_Q": 64, "BLOCK_K": 64},
    )  # fmt: skip
    assert any("miscompiled" in t for t in audit.violations("matmul", _measure(unpipelined), 90))
