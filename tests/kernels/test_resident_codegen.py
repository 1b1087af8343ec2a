"""What the compiler makes of `lars_resident`: its budget, and what a step sends for when."""

import re

import pytest

from bench import assembly, resident_model, walk
from bench.codegen import Build, Row, Spec, build, measure, resident_specialisations
from bench.sass import LATENCY
from lars_fused.kernels.tuning import RESIDENT_ROWS
from tests.kernels.builds import FLOOR, label, positions, sleeps_in_the_poll
from tests.kernels.test_codegen import kept_rows, plain_layout, row_key

pytestmark = pytest.mark.codegen

ROW, TARGET = RESIDENT_ROWS["sm_9"], "sm_90"
# A build takes two to four seconds: `make fuzz` makes the other cases.
QUICK = ("w=fp32 g=fp32 v=fp32", "w=fp32 g=bf16 v=fp32 copy=bf16")
CASES = [
    pytest.param((spec, TARGET), marks=[FLOOR] if spec.case in QUICK else [FLOOR, pytest.mark.slow])
    for spec in resident_specialisations(TARGET)
]


@pytest.fixture(scope="module", params=CASES, ids=label)
def made(request: pytest.FixtureRequest) -> Build:
    return build(*request.param)


def fp32() -> Build:
    return build(resident_specialisations(TARGET)[0], TARGET)


def ring_bytes(spec: Spec) -> int:
    values = dict(spec.constexprs)
    width = values["W_DT"].primitive_bitwidth + values["G_DT"].primitive_bitwidth
    return int(values["SLOTS"] * values["CHUNK"] * width // 8)


def test_only_an_architecture_with_a_row_has_builds() -> None:
    assert resident_specialisations("sm_80") == resident_specialisations("gfx942") == []


def test_all_programs_of_the_row_are_resident_and_nothing_spills(made: Build) -> None:
    assert_in_budget(made.spec, measure(made))


def assert_in_budget(spec: Spec, row: Row) -> None:
    assert (row.spills, row.stack) == (0, 0)
    assert row.registers <= 235  # the most that any case took with triton 3.6.0 or 3.7.1
    # Beside the ring 96 bytes at most: three float64 a warp, to add up partial sums.
    assert 0 <= row.shared - ring_bytes(spec) <= 96
    assert row.resident >= ROW.programs


def test_kept_table_matches_the_compiler(made: Build) -> None:
    row = measure(made)
    kept = [line for line in kept_rows() if row_key(line) == row_key(row)]
    assert kept == [row], "run `python -m bench.codegen` and look at what changed"


@FLOOR
def test_kept_table_has_every_build_within_its_budget() -> None:
    rows = {row.case: row for row in kept_rows() if row.kernel == "lars_resident"}
    specs = {spec.case: spec for spec in resident_specialisations(TARGET)}
    assert rows.keys() == specs.keys(), "run `python -m bench.codegen`"
    for case, row in rows.items():
        assert row.target == TARGET
        assert_in_budget(specs[case], row)


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


def test_every_atomic_of_the_protocol_is_there_and_nothing_is_ordered(made: Build) -> None:
    """A fence would wait for all that a worker has sent for."""
    seen = assembly.atomics(made.assembly)
    assert {op: seen[op] for op in seen if not op.startswith("ld.")} == {
        "atom.global.gpu.relaxed.add.u64": 1,  # its number among the programs
        # Tagged sums; publication by a finisher, and of a tensor's only chunk by its worker.
        "atom.global.gpu.relaxed.exch.b64": 3,
    }
    assert not re.findall(r"\b(?:fence|membar)\b.*|\.(?:acquire|release|acq_rel)\b", made.assembly)
    assert not re.findall(r"\b(?:MEMBAR|FENCE|CCTL)\b.*", made.machine)
    assert measure(made).poll == "volatile"


def test_nobody_waits_for_the_answer_of_a_store(made: Build) -> None:
    exchanges = re.findall(rf"{walk.PUBLISH}\S* PT, (\w+),", made.machine)
    assert exchanges == 3 * ["RZ"]


def test_a_step_begins_with_what_the_next_one_reads(made: Build) -> None:
    """w, g and momentum go into L2 by three instructions of one thread, before it sums anything.

    They stand before the wait for this step's copies; ptxas moves that ahead of them.
    """
    blocks = [block.lines for block in assembly.control_flow(made.assembly)]
    (lines,) = [lines for lines in blocks if positions(lines, r"cp\.async\.wait_group")]
    (waits,) = positions(lines, r"cp\.async\.wait_group")
    sent = positions(lines, r"^@sends cp\.async\.bulk\.prefetch\.L2\.global")
    assert len(sent) == made.assembly.count("cp.async.bulk.prefetch") == 3
    assert max(sent) < waits
    lines = walk.held_path(made)
    (waits,) = positions(lines, walk.WAIT)
    sent = positions(lines, r"^@U?P\d UBLKPF\.L2")
    sums = [n for n in positions(lines, r"\bLDS\.") if n > waits]
    assert len(sent) == 3
    assert max(sent) < min(sums)
    assert max(sent) < min(n for n in positions(lines, r"\bLDGSTS\b") if n > waits)


def test_a_program_that_waits_for_a_ratio_sleeps_between_polls(made: Build) -> None:
    assert ROW.backoff > 0
    assert sleeps_in_the_poll(made) == [ROW.backoff]


def test_the_model_counts_on_what_is_compiled() -> None:
    """Within 5 percent: Triton's patch releases differ by a few instructions."""
    found, step = walk.held(fp32()), resident_model.HELD
    for name, counted in {
        "norm_issued": step.norm, "norm_waits": step.norm_waits, "update_issued": step.update,
        "update_waits": step.update_waits, "end_issued": step.end, "end_waits": step.end_waits,
        "publication": step.publish, "turn": step.turn,
    }.items():  # fmt: skip
        assert getattr(found, name) == pytest.approx(counted, rel=0.05), name


def test_kept_figures_are_those_of_what_is_compiled(made: Build) -> None:
    found = walk.line(made.spec, TARGET)
    kept = [x for x in walk.kept("lars_resident") if x["case"] == made.spec.case]
    assert kept == [found], "run `python -m bench.walk` and look at what changed"


def test_a_step_is_paced_by_dram() -> None:
    """A step of one program takes fewer cycles than DRAM needs for the bytes of both.

    With prefetched momentum also where all is of 16 bits: ptxas takes momentum apart in the step
    that sends for it. In fp32 even both programs one after the other are faster than DRAM.
    """
    lines = {x["case"]: x for x in walk.kept("lars_resident")}
    assert {*lines} == {spec.case for spec in resident_specialisations(TARGET)}
    for case, x in lines.items():
        parts = ("norm", "update", "end")
        assert int(x["step"]) == sum(
            int(x[f"{p}_{of}"]) for p in parts for of in ("issued", "waits")
        )
        assert x["pace"] == "dram", case
        # Words and rows one after the other where types differ in size: twice an L2 hit.
        assert int(x["end_waits"]) <= 2 * LATENCY["descriptor"], case
        assert int(x["step"]) <= 2397  # the most of any case
    first = lines["w=fp32 g=fp32 v=fp32"]
    assert 2 * int(first["step"]) < int(first["dram"])
