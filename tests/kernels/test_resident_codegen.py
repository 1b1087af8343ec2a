"""What the compiler makes of `lars_resident`: its budget, and what a step sends for when."""

import re

import pytest

from bench import assembly, resident_model, walk
from bench.codegen import Build, Spec, build, measure, residents
from lars_fused.kernels.tuning import RESIDENT_ROWS
from tests.kernels.builds import label, positions, sleeps_in_the_poll
from tests.kernels.test_codegen import plain_layout

pytestmark = pytest.mark.codegen

ROW, TARGET = RESIDENT_ROWS["sm_9"], "sm_90"
# A build takes two to four seconds: `make fuzz` makes the other cases.
QUICK = ("w=fp32 g=fp32 v=fp32", "w=fp32 g=bf16 v=fp32 copy=bf16")
CASES = [
    pytest.param((spec, TARGET), marks=[] if spec.case in QUICK else pytest.mark.slow)
    for spec in residents(TARGET)
]


@pytest.fixture(scope="module", params=CASES, ids=label)
def made(request: pytest.FixtureRequest) -> Build:
    return build(*request.param)


def fp32() -> Build:
    return build(residents(TARGET)[0], TARGET)


def ring_bytes(spec: Spec) -> int:
    values = dict(spec.constexprs)
    width = values["W_DT"].primitive_bitwidth + values["G_DT"].primitive_bitwidth
    return int(values["SLOTS"] * values["CHUNK"] * width // 8)


def test_only_an_architecture_with_a_row_has_builds() -> None:
    assert residents("sm_80") == residents("gfx942") == []


def test_all_programs_of_the_row_are_resident_and_nothing_spills(made: Build) -> None:
    row = measure(made)
    assert (row.spills, row.stack) == (0, 0)
    assert row.registers <= 254  # the most that any case took with triton 3.6.0 or 3.7.1
    # Beside the ring 96 bytes at most: three float64 a warp, to add up partial sums.
    assert 0 <= row.shared - ring_bytes(made.spec) <= 96
    assert row.resident >= ROW.programs


def test_no_value_changes_its_layout(made: Build) -> None:
    text = re.sub(r" loc\(.*", "", made.ttgir)
    for line in re.findall(r"ttg\.convert_layout .*", text):
        before, after = re.findall(r"tensor<\w+, (#.*?)>(?= ->|$)", line)
        assert plain_layout(before, text) == plain_layout(after, text), line


def test_no_product_is_fused_with_a_sum(made: Build) -> None:
    assert re.search(r"\bmul\.rn\.f32", made.assembly)
    assert not re.findall(r"\b(?:mul|add|sub)\.f(?:32|64)\S*|\bfma\.rn\.f32\S*", made.assembly)


def test_copies_are_as_wide_as_alignment_allows(made: Build) -> None:
    """Of w and g: two chunks before the loop over steps, and one in it."""
    values, threads = dict(made.spec.constexprs), 32 * made.spec.warps
    width = values["W_DT"].primitive_bitwidth // 8
    turns = values["CHUNK"] * width // (values["W_ALIGN"] * threads)
    copies = len(re.findall(r"cp\.async\.c[ag]\.shared\.global", made.assembly))
    assert copies == 3 * 2 * turns
    assert made.assembly.count("cp.async.commit_group") == 3
    assert made.assembly.count("cp.async.wait_group") == 1


def test_every_ordered_atomic_of_the_protocol_is_there(made: Build) -> None:
    seen = assembly.atomics(made.assembly)
    assert {op: seen[op] for op in seen if not op.startswith("ld.")} == {
        "atom.global.gpu.relaxed.add.u64": 1,  # its number among the programs
        # Sums of a chunk; publication by a worker, of a tensor of one chunk, and by a finisher.
        "atom.global.gpu.relaxed.exch.b64": 3,
    }
    assert measure(made).poll == "volatile"


def test_no_step_waits_for_a_fence(made: Build) -> None:
    """Which would wait for all that the program has on its way."""
    assert "atom" in made.assembly
    assert not re.findall(r"\b(?:fence|membar)\S*|acq_rel|acquire|release", made.assembly)
    assert "MEMBAR" not in made.machine


def test_what_a_step_will_read_is_prefetched_at_its_start(made: Build) -> None:
    """w, g and v, by one thread, before the sums and long before the copies."""
    assert made.assembly.count("@sends cp.async.bulk.prefetch.L2.global") == 3
    lines = walk.held_path(made)
    prefetched, stored = positions(lines, r"\bUBLKPF\.L2\b"), positions(lines, walk.STORED)
    assert len(prefetched) == 3
    assert max(prefetched) < min(stored) < max(positions(lines, r"\bLDGSTS\b"))


def test_a_program_that_waits_for_a_ratio_sleeps_between_polls(made: Build) -> None:
    assert ROW.backoff > 0
    assert sleeps_in_the_poll(made) == [ROW.backoff]


def test_the_model_counts_on_what_is_compiled() -> None:
    """Within 5 percent: Triton's patch releases differ by a few instructions."""
    found, step = walk.held(fp32()), resident_model.HELD
    for name, counted in {
        "norm_issued": step.norm, "sums": step.sums, "update_issued": step.update,
        "end_issued": step.end, "publication": step.publish,
    }.items():  # fmt: skip
        assert getattr(found, name) == pytest.approx(counted, rel=0.05), name
    assert found.exposed == pytest.approx(step.wait, abs=60)  # 1 % of what DRAM needs for a step


def test_kept_figures_are_those_of_what_is_compiled(made: Build) -> None:
    found = walk.line(made.spec, TARGET)
    kept = [x for x in walk.kept("lars_resident") if x["case"] == made.spec.case]
    assert kept == [found], "run `python -m bench.walk` and look at what changed"


def test_a_step_is_paced_by_dram_but_where_it_waits_for_its_own_momentum() -> None:
    """A step of one program takes fewer cycles than DRAM needs for the bytes of both.

    Not where all is of 16 bits: ptxas takes momentum apart in the step that sends for it, which
    waits for DRAM, and there are half as many bytes to wait for. In fp32 even both programs one
    after the other are faster than DRAM.
    """
    lines = {x["case"]: x for x in walk.kept("lars_resident")}
    assert {*lines} == {spec.case for spec in residents(TARGET)}
    waits = {f"w={dtype} g={dtype} v={dtype}" for dtype in ("bf16", "fp16")}
    for case, x in lines.items():
        assert x["pace"] == ("latency" if case in waits else "dram"), case
        assert (int(x["momentum"]) > 0) == (case in waits), case
        assert int(x["step"]) - int(x["momentum"]) <= 2640  # the most of any case
    first = lines["w=fp32 g=fp32 v=fp32"]
    assert 2 * int(first["step"]) < int(first["dram"])
