"""`bench/ops/attention_estimate.py`: what of a kernel's machine code is counted, and its waits."""

import importlib
import json
import sys

import pytest
import torch
from masked_vit_kernels import audit

LATENCY, CACHED = 100.0, 10.0

CLEARING = """
    /*0000*/                   ISETP.GE.AND P0, PT, R1, R2, PT ;
    /*0010*/               @P0 BRA `(.L_clear) ;
    /*0020*/                   LDG.E R4, desc[UR4][R2.64] ;
    /*0030*/              @!P1 EXIT ;
    /*0040*/               @P2 BRA `(.L_aside) ;
.L_back:
.L_loop:
    /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], RZ, !UPT ;
    /*0060*/              @!P3 BRA `(.L_loop) ;
    /*0070*/                   STG.E.128 desc[UR4][R2.64], R24 ;
    /*0080*/                   EXIT ;
.L_clear:
    /*0090*/                   STG.E.128 desc[UR4][R2.64], RZ ;
    /*00a0*/               @P3 BRA `(.L_clear) ;
    /*00b0*/                   MUFU.EX2 R9, R9 ;
    /*00c0*/                   EXIT ;
.L_aside:
    /*00d0*/                   IADD3 R5, R5, 0x1, RZ ;
    /*00e0*/                   BRA `(.L_back) ;
.L_end:
    /*00f0*/                   BRA `(.L_end);
    /*0100*/                   NOP;
"""

# The copy for the next iteration goes out after the last product; {flying} groups may be under way.
COPIES = """
    /*0000*/                   LDGSTS.E.BYPASS.128 [R27], desc[UR4][R16.64], P4 ;
    /*0010*/                   LDGDEPBAR ;
    /*0020*/                   LDGSTS.E.BYPASS.128 [R27+0x800], desc[UR4][R16.64], P4 ;
    /*0030*/                   LDGDEPBAR ;
.L_loop:
    /*0040*/                   DEPBAR.LE SB0, {flying} ;
    /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], RZ, !UPT ;
    /*0060*/                   FADD R1, R1, R1 ;
    /*0070*/                   LDGSTS.E.BYPASS.128 [R27], desc[UR4][R16.64], P4 ;
    /*0080*/                   LDGDEPBAR ;
    /*0090*/              @!P3 BRA `(.L_loop) ;
    /*00a0*/                   EXIT ;
"""

# R4 is loaded at the top of each iteration; {named} is named by the third instruction after it.
LOADS = """
    /*0000*/                   IADD3 R2, R2, 0x1, RZ ;
.L_loop:
    /*0010*/               @P1 LDG.E{width} R4, desc[UR4][R2.64] ;
    /*0020*/                   FADD R1, R1, R1 ;
    /*0030*/                   FADD R1, R1, R1 ;
    /*0040*/                   STS [R9], {named} ;
    /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], RZ, !UPT ;
    /*0060*/                   IMAD.WIDE R2, R8, 0x4, R2 ;
    /*0070*/              @!P3 BRA `(.L_loop) ;
    /*0080*/                   EXIT ;
"""

# Two words of one line of memory, {between} after the first was waited for.
NEIGHBOURS = """
    /*0000*/                   LDG.E R4, desc[UR4][R2.64+0x4] ;
    /*0010*/                   FADD R1, R4, R4 ;
    /*0020*/                   {between} ;
    /*0030*/                   LDG.E R5, desc[UR4][R2.64+{offset}] ;
    /*0040*/                   FADD R1, R5, R5 ;
    /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], RZ, !UPT ;
    /*0060*/                   EXIT ;
"""


@pytest.fixture
def flow():
    return importlib.import_module("bench.ops.machine_flow")


@pytest.fixture
def estimate():
    return importlib.import_module("bench.ops.attention_estimate")


def waits(flow, sass):
    """Exposed cycles where every instruction takes one."""
    return flow.exposed_waits(flow.working_code(sass), lambda opcode: 1.0, LATENCY, CACHED)


def test_programs_that_only_clear_are_not_counted(flow):
    kept = [address for address, _, _ in flow.working_code(CLEARING).instructions]
    assert kept == [*range(0x00, 0x90, 0x10), 0xD0, 0xE0]


def test_what_a_program_costs_by_depth(estimate):
    outside, inside, deeper = estimate.count(CLEARING, 4)
    assert (outside.issue, inside.issue) == (9, 2)  # 4 warps on 4 schedulers: a cycle each
    assert (outside.tensor, inside.tensor) == (0, 32)
    assert outside.exponential == 0  # the only MUFU.EX2 clears
    assert deeper == estimate.Cycles()


def test_a_copy_for_the_next_iteration_is_waited_for_at_the_top(flow):
    # issued at 0x70, then LDGDEPBAR and BRA before the wait
    assert waits(flow, COPIES.format(flying="0x0")) == {0: 0.0, 1: LATENCY - 2}


def test_a_copy_that_may_fly_on_is_waited_for_an_iteration_later(flow):
    # two iterations share the latency, less the 8 instructions between issue and wait
    assert waits(flow, COPIES.format(flying="0x1")) == {0: 0.0, 1: (LATENCY - 8) / 2}


def test_waits_lengthen_the_serial_time_alone(estimate, monkeypatch):
    inside = estimate.count(COPIES.format(flying="0x0"), 4)[1]
    assert inside.waiting == estimate.LOAD_LATENCY - 2
    (launch,) = estimate.launches([64] * 3, 2, 32)["forward"]
    outside = estimate.Cycles(exponential=900, issue=900)
    program = estimate.Program(launch, (outside, inside), resident=2)
    monkeypatch.setattr(estimate, "analyse", lambda launch: program)
    times = estimate.estimate(launch, [64] * 3, 2)
    # of a cycle of each of 6 programs
    microseconds = 1e6 * 6 / (estimate.MULTIPROCESSORS * estimate.CLOCK)
    assert times["waiting"] == pytest.approx(inside.waiting * microseconds)
    assert times["issue"] == pytest.approx((900 + inside.issue) * microseconds)
    busy = sum(times[name] for name in ("tensor", "exponential", "issue", "memory"))
    assert times["serial"] == pytest.approx((busy + times["waiting"]) / 2)
    assert times["overlapped"] == times["issue"]


@pytest.mark.parametrize(
    ("width", "named", "cycles"),
    [
        ("", "R4", LATENCY - 2),
        (".128", "R7", LATENCY - 2),
        # not loaded: the next iteration's load waits, before it overwrites R4
        ("", "R5", LATENCY - 6),
        (".64", "R6", LATENCY - 6),
    ],
)
def test_a_load_is_waited_for_where_its_register_is_named(flow, width, named, cycles):
    assert waits(flow, LOADS.format(width=width, named=named)) == {0: 0.0, 1: cycles}


@pytest.mark.parametrize(
    ("between", "offset", "second"),
    [
        ("FADD R8, R1, R1", "0x24", CACHED),
        ("FADD R8, R1, R1", "0x84", LATENCY),  # another line
        ("IMAD.WIDE R2, R8, 0x4, R2", "0x24", LATENCY),  # another address
        ("IADD3 R3, R3, 0x1, RZ", "0x24", LATENCY),  # its upper half
    ],
)
def test_a_line_that_was_loaded_is_cached(flow, between, offset, second):
    assert waits(flow, NEIGHBOURS.format(between=between, offset=offset)) == {0: LATENCY + second}


def test_what_is_not_followed_is_refused(flow):
    for line in ("CALL.REL.NOINC 0x50", "UBLKCP.S.G [UR8], [UR6], UR10", "BRX R2 -0x50"):
        with pytest.raises(ValueError, match=line.split(".")[0].split()[0]):
            flow.working_code(CLEARING.replace("MUFU.EX2 R9, R9", line))
    with pytest.raises(ValueError, match="no matrix product"):
        flow.working_code(CLEARING.replace("HGMMA", "FFMA"))
    with pytest.raises(ValueError, match=r"DEPBAR\.LE SB0, N"):
        waits(flow, COPIES.format(flying="0x0").replace("SB0,", "SB1,"))


def test_clearing_stores_are_found_in_the_real_kernels(estimate, flow):
    sequence = estimate.launches([100, 200], 2, 32)
    for launch in (*sequence["forward"], *sequence["backward"]):
        sass = audit.disassemble(audit.compile_launch(launch, 90).asm["cubin"])
        zeros = [code for code in audit.parse_instructions(sass) if _stores_zero(code)]
        assert zeros
        kept = flow.working_code(sass).instructions
        assert not [code for code in kept if _stores_zero(code)]
        assert sum(code[1].startswith("STG") for code in kept) >= 2  # out and lse, or gradients


def _stores_zero(instruction):
    _, opcode, operands = instruction
    return opcode.startswith("STG.E.128") and operands.strip().endswith("RZ")


def test_predictions_cover_what_is_timed(estimate, monkeypatch):
    filed = json.loads(estimate.PREDICTIONS.read_text())
    assert len(filed["commit"]) >= 7
    found = {(row["shape"], row["direction"]): row for row in filed["predictions"]}
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        for name in ("sizes", "ops.bench_attention"):  # anew, as on a machine with a GPU
            patched.delitem(sys.modules, f"bench.{name}")
        bench_attention = importlib.import_module("bench.ops.bench_attention")
    timed = [(shape.name, part) for _, shape, part in bench_attention.CASES]
    assert sorted(timed) == sorted((shape.name, part) for shape, part in estimate.CASES)
    assert set(found) == {
        (f"{shape.name} {part}", direction)
        for shape, part in estimate.CASES
        for direction in ("forward", "backward")
    }
    for row in found.values():
        assert 0 < row["overlapped_us"] <= row["serial_us"]
        assert row["share_of_floor"] == sorted(row["share_of_floor"])
