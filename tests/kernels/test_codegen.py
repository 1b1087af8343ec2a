"""What the compiler makes of the kernels: a budget for every specialisation on every target.

Nothing here runs on a GPU or reads a clock. `bench/codegen.py` compiles; `python -m bench.codegen`
prints the numbers that these tests hold to their caps.
"""

import csv
import re
from collections import Counter
from dataclasses import fields

import pytest
import triton

from bench import assembly, codegen
from bench.assembly import control_flow
from bench.codegen import RESULTS, TARGETS, Build, Row, Spec, build, measure
from lars_fused._engine import validate
from lars_fused.kernels.tuning import row_for
from tests.kernels.builds import ALL, FLOOR, NVIDIA, builds, fast_blocks, label, values

pytestmark = pytest.mark.codegen

# Registers a thread, on NVIDIA and on AMD: the most that any case took with triton 3.6.0 or 3.7.1
# (bench/results/codegen), rounded up to the 8 that hardware allocates at a time. The cap of
# lars_step is its tuning row's.
REGISTERS = {"lars_update": (64, 104), "l2norm": (80, 96)}
# Bytes. 8: the one 64-bit word that a drawn ticket is handed round in. 64: two float64 a warp, to
# add up two of a tensor's partial sums over four warps at once.
SHARED = {"lars_step": 64, "lars_update": 8, "l2norm": 64}


@pytest.fixture(scope="module", params=builds(ALL), ids=label)
def made(request: pytest.FixtureRequest) -> Build:
    return build(*request.param)


@pytest.fixture
def row(made: Build) -> Row:
    return measure(made)


def loops(made: Build) -> list[tuple[str, ...]]:
    """Loops over a chunk's blocks and tails: innermost ones, without polls and `.cg`.

    On NVIDIA each is one basic block. AMD's compiler cuts a loop into several, but there no loop
    over tickets is launched, so that the outermost ones are meant; tile accesses are `buffer_`.
    """
    if made.target == "gfx942":
        found = assembly.cycles(control_flow(made.assembly))
        return [lines for lines in found if any("buffer_load" in line for line in lines)]
    blocks = control_flow(made.machine)
    found = [b.lines for n, b in enumerate(blocks) if n in b.successors]
    return [lines for lines in found if not any("STRONG" in line for line in lines)]


def is_wide(count: Counter) -> bool:
    wide = sum(n for name, n in count.items() if name[2:] in ("64", "128"))
    return wide > sum(count.values()) - wide


def test_registers_spills_and_shared_memory_stay_in_budget(row: Row) -> None:
    assert_in_budget(row)


def assert_in_budget(row: Row) -> None:
    assert (row.spills, row.stack) == (0, 0)
    assert row.shared <= SHARED[row.kernel]
    if not codegen.launched(row.target, row.kernel):  # compiled for its protocol alone
        return
    assert row.scalar_spills == 0
    if row.kernel == "lars_step":
        assert row.registers <= row_for(row.target).step_registers
    else:
        assert row.registers <= REGISTERS[row.kernel][row.target not in NVIDIA]


def test_as_many_programs_fit_a_multiprocessor_as_tuning_launches(row: Row) -> None:
    assert row.resident >= row_for(row.target).programs


def test_every_dtype_of_the_kernels_is_compiled() -> None:
    for operand, dtypes in zip(("w", "g", "v"), zip(*codegen.CASES, strict=True), strict=False):
        missing = {*validate.STORAGE_DTYPES} - {*dtypes}
        assert not missing, f"add {missing} to CASES of bench/codegen.py as the {operand}"


@pytest.mark.parametrize("target", TARGETS)
def test_a_row_names_as_many_threads_as_its_warps_have(target: str) -> None:
    # One accumulator a thread, and one element a thread in tails: with any other number both work,
    # but move data between threads.
    row = row_for(target)
    assert row.threads == row.num_warps * TARGETS[target].warp_size
    assert row.chunk % row.block == row.block % row.threads == 0


def test_no_value_changes_its_layout(made: Build) -> None:
    # A conversion goes through shared memory with barriers around it. No part of any kernel needs
    # one, the tail and the reductions included. Between two names of one layout nothing moves.
    text = re.sub(r" loc\(.*", "", made.ttgir)
    for line in re.findall(r"ttg\.convert_layout .*", text):
        before, after = re.findall(r"tensor<\w+, (#.*?)>(?= ->|$)", line)
        assert plain_layout(before, text) == plain_layout(after, text), line


def plain_layout(name: str, text: str) -> list[list[int]]:
    """Elements a thread, threads a warp and warps along each axis, the sliced axes left out."""
    if found := re.match(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>$", name):
        return [axes[: int(found[1])] + axes[int(found[1]) + 1 :]
                for axes in plain_layout(found[2], text)]  # fmt: skip
    layout = re.search(rf"^{name} = #ttg\.blocked<(.*)>", text, re.M)
    assert layout, f"{name} is not a blocked layout"
    axes = dict(re.findall(r"(\w+) = \[([\d, ]+)\]", layout[1]))
    names = ("sizePerThread", "threadsPerWarp", "warpsPerCTA")
    return [[int(x) for x in axes[n].split(",")] for n in names]


def test_whole_blocks_are_moved_by_wide_accesses_alone(made: Build) -> None:
    """The loop over whole blocks makes exactly the expected accesses, and no other.

    Found in the machine code, not in what was asked for: the basic blocks that branch to
    themselves and move mostly 64 or 128 bits at a time. The tail's loop moves single elements and
    is not among them. A whole-block loop that lost a hint would no longer be among them either, or
    would hold narrow accesses; both differ from the list, as does a table load left in the loop.
    """
    if not codegen.launched(made.target, made.spec.name):
        return
    counts = [assembly.widths(lines) for lines in loops(made)]
    seen_loops = [dict(count) for count in counts if is_wide(count)]
    threads = row_for(made.target).threads
    assert seen_loops == [dict(c) for c in fast_blocks(made.spec, threads)]


def test_whole_blocks_touch_no_shared_memory(made: Build, row: Row) -> None:
    if row.kernel == "lars_update":  # the drawn ticket is handed round, and nothing else
        assert (row.sts, row.barriers, row.lds) == (1, 1, 1)
    if not codegen.launched(made.target, row.kernel):
        return
    tiles = [lines for lines in loops(made) if is_wide(assembly.widths(lines))]
    assert tiles
    for lines in tiles:
        assert not [x for x in lines if re.search(r"\b(LDS|STS|BAR|ds_read|ds_write|s_barrier)", x)]


def test_no_product_is_fused_with_a_sum(made: Build) -> None:
    # A PTX operation that names its rounding is left alone by ptxas; one that does not may be fused
    # in one kernel and not in another, and their bits would part.
    if made.target == "gfx942":
        assert dict(made.spec.options)["enable_fp_fusion"] is False
        return
    assert re.search(r"\bmul\.rn\.f32", made.assembly)
    free = re.findall(r"\b(?:mul|add|sub)\.f(?:32|64)\S*|\bfma\.rn\.f32\S*", made.assembly)
    assert not free


def test_addresses_are_computed_in_64_bits(made: Build) -> None:
    """No offset comes from 32-bit arithmetic.

    In TTIR: what moves a pointer is a 64-bit sum or product of 64-bit values. A 32-bit value enters
    only where it cannot overflow: an index exactly as it was read, a lane, a constant, or a count
    of elements within one chunk. A chunk's index times CHUNK in 32 bits is none of these.
    """
    code = definitions(made.ttir)
    moves = [text for op, text in code.values() if op == "tt.addptr"]
    assert moves
    for move in moves:
        offset = re.findall(r"%[\w#]+", move)[1]
        if re.search(r"i32>?$", move):
            assert narrow_is_harmless(code, offset), move
        todo, seen = [offset], set()
        while todo:
            name = todo.pop()
            op, text = code.get(name.split("#")[0], ("", ""))
            if name in seen or not op:
                continue
            seen.add(name)
            operands = re.findall(r"%[\w#]+", text)
            if op == "arith.extsi":
                assert narrow_is_harmless(code, operands[0]), f"{name} = {op} {text}"
            elif op.startswith("arith.") or op in ("tt.splat", "loop"):
                todo += operands


def definitions(ttir: str) -> dict[str, tuple[str, str]]:
    """Operation and operands behind every name; a loop's variable is a `loop` of its start."""
    code: dict[str, tuple[str, str]] = {}
    first: list[tuple[str, str]] = []  # of the latest loop, its variables and where they start
    current: dict[str, str] = {}  # a name may return in a later region: the latest is meant
    for line in ttir.splitlines():
        line = re.sub(r" loc\([^()]*(?:\([^()]*\)[^()]*)*\)", "", line)
        left, equals, right = line.partition(" = ")
        right = re.sub(r"%\w+", lambda name: current.get(name[0], name[0]), right)
        if defined := re.match(r"\s*(%\w+)", left) if equals else None:
            name = defined[1]
            current[name] = f"{name}_{len(code)}" if name in code else name
            left = left.replace(name, current[name], 1)
        line = left + equals + right
        if found := re.match(r"\s*(%\w+)(?::\d+)? = \"?([\w.]+)\"? ?(.*)", line):
            code[found[1]] = (found[2], found[3])
            if found[2] in ("scf.while", "scf.for"):
                first = re.findall(r"(%\w+) = (%[\w#]+)", found[3])
                code |= {variable: ("loop", value) for variable, value in first}
        elif line.lstrip().startswith("^bb0("):  # of a loop's body: its variables once more
            for name, (_, value) in zip(re.findall(r"(%\w+):", line), first, strict=False):
                current[name] = f"{name}_{len(code)}" if name in code else name
                code[current[name]] = ("loop", value)
    return code


def narrow_is_harmless(code: dict[str, tuple[str, str]], name: str) -> bool:
    """Whether a 32-bit value is small: an index as it was read, or a count within one chunk."""
    op, _ = code[name.partition("#")[0]]
    as_read = op in ("tt.get_program_id", "arith.trunci", "tt.load")
    return as_read or counts_in_a_chunk(code, name)


def counts_in_a_chunk(code: dict[str, tuple[str, str]], name: str) -> bool:
    """Whether only lanes, constants and min(..., CHUNK) went into a 32-bit value."""
    name, _, result = name.partition("#")
    op, text = code[name]
    operands = re.findall(r"%[\w#]+", text)
    if op in ("tt.make_range", "arith.constant", "arith.cmpi"):
        return True
    if op == "arith.trunci":
        return code[operands[0].partition("#")[0]][0] == "arith.minsi"
    if op == "scf.while":  # what a loop leaves is what it began with, plus counting
        return counts_in_a_chunk(code, re.findall(r" = (%[\w#]+)", text)[int(result or 0)])
    known = ("tt.splat", "loop", "arith.select", "arith.divsi", "arith.muli", "arith.addi")
    return op in known and all(counts_in_a_chunk(code, operand) for operand in operands)


@pytest.mark.parametrize(
    "pair", builds([(s, t) for s, t in ALL if s.name == "lars_step"]), ids=label
)
def test_the_poll_survives_in_a_loop(pair: tuple[Spec, str]) -> None:
    spec, target = pair
    # A loop around a plain load is deleted; one around a volatile load is hoisted on AMD.
    atomic = values(spec)["POLL_ATOMIC"]
    form = "coherent" if target == "gfx942" else "relaxed" if atomic else "volatile"
    assert form in measure(build(spec, target)).poll.split("+")


def test_every_ordered_atomic_of_the_protocol_is_there(made: Build) -> None:
    # Ticket, arrival (it publishes the partial sums and acquires the others') and publication;
    # the counter of the two-launch update. Two tickets: the first, and one drawn ahead.
    ticket, arrival, publish = (
        ("atom.global.gpu.relaxed.add.u64", "atom.global.gpu.acq_rel.add.u32",
         "atom.global.gpu.relaxed.exch.b64")
        if made.target in NVIDIA
        else ("global_atomic_add_x2", "global_atomic_add", "global_atomic_swap_x2")
    )  # fmt: skip
    needed = {
        "lars_step": {ticket: 2, arrival: 1, publish: 1},
        "lars_update": {ticket: 1},
        "l2norm": {arrival: 1},
    }[made.spec.name]
    if made.target == "gfx942" and arrival in needed:
        needed |= {"buffer_wbl2 sc1": 1, "buffer_inv sc1": 1}  # its release and its acquire
    seen = assembly.atomics(made.assembly)
    assert {op: seen[op] for op in seen if not op.startswith("ld.")} == needed


def test_occupancy_formula_on_known_points() -> None:
    # By hand, from the sources that `resident` names.
    assert assembly.resident("sm_80", 8, 32, 0) == 8
    assert assembly.resident("sm_90", 8, 128, 0) == 2
    assert assembly.resident("sm_90", 8, 129, 0) == 1
    assert assembly.resident("sm_90", 4, 40, 0) == 12
    assert (
        assembly.resident("sm_90", 2, 104, 0) == 8
    )  # four warps of 104 in each of four partitions
    assert assembly.resident("sm_80", 4, 16, 81 * 1024) == 2
    assert assembly.resident("sm_90", 4, 16, 0) == 16
    assert assembly.resident("gfx942", 8, 64, 0) == 4
    assert assembly.resident("gfx942", 8, 128, 0) == 2
    assert assembly.resident("gfx942", 4, 129, 0) == 3


def kept_rows() -> list[Row]:
    """The lines of the table that is kept for this version of triton."""
    path = RESULTS / f"{triton.__version__}.csv"
    if not path.exists():
        pytest.skip(f"no table is kept for triton {triton.__version__}")
    first, *lines = path.read_text().splitlines()
    assert first.startswith(f"# triton {triton.__version__}, ")
    numbers = {f.name for f in fields(Row) if f.type == "int"}
    return [
        Row(**{name: int(x) if name in numbers else x for name, x in line.items()})
        for line in csv.DictReader(lines)
    ]


def row_key(row: Row) -> tuple[str, str, str]:
    return row.kernel, row.case, row.target


def test_kept_table_matches_the_compiler(row: Row) -> None:
    kept = [line for line in kept_rows() if row_key(line) == row_key(row)]
    assert kept == [row], "run `python -m bench.codegen` and look at what changed"


@FLOOR
def test_kept_table_has_every_build_within_its_budget() -> None:
    rows = [row for row in kept_rows() if row.kernel != "lars_resident"]
    expected = {(spec.name, spec.case, target) for spec, target in ALL}
    assert {*map(row_key, rows)} == expected, "run `python -m bench.codegen`"
    for row in rows:
        assert_in_budget(row)
        assert row.resident >= row_for(row.target).programs
