"""`docs/architecture.md` says the truth: the files that it lists are those that know of a thing."""

import re
import sys
from pathlib import Path

import pytest
import torch

import lars_fused
from lars_fused import options
from lars_fused._engine import launch
from tests.repository import test_imports

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
# What a text may mention without knowing of it: documentation of the public functions.
MENTIONS = {
    "lars_fused/optimizer.py",
    "lars_fused/functional.py",
    "lars_fused/norms.py",
    "lars_fused/monitor.py",
    "lars_fused/distributed/overlap.py",
}


def listed(thing):
    """The files of the list that begins with `**thing**`, up to the next bold word."""
    text = PAGE.split(f"**{thing}**")[1].split("\n**")[0]
    return set(re.findall(r"`([\w/]+\.(?:py|md))`", text))


def code_files():
    files = [*(ROOT / "lars_fused").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in files
        if "study" not in path.relative_to(ROOT).parts
    }


def knowing(pattern):
    return {name for name, text in code_files().items() if re.search(pattern, text)}


def test_every_file_that_the_page_names_exists():
    names = set(re.findall(r"(?:\.\./|`)((?:lars_fused|kernels|tests|docs)/[\w/]+\.\w+)", PAGE))
    assert len(names) > 20
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []


def test_who_may_import_whom_is_drawn_as_it_is_enforced():
    drawn = PAGE.split("## Who may import whom")[1].split("```")[1]
    engine = drawn.split("_engine/")[1].split("functional.py")[0]
    lines = [line.strip().split(", ") for line in engine.splitlines() if "(only" not in line]
    enforced = [
        [name.removeprefix("_engine.") for name in line.split()]
        for line in test_imports.LAYERS.splitlines()
        if line.startswith("_engine.")
    ]
    assert [line for line in lines if line != [""]] == enforced
    for name in test_imports.RANK:
        assert re.search(rf"\b{name.split('.')[-1]}\b", drawn) or "checkpoints." in name, name


# Whether a step is dampened decides alone when it matters which step is a tensor's first; and
# torch's own kernel has an argument of that name.
OF_DAMPENING = {f"lars_fused/_engine/{n}.py" for n in (
    "engine", "prepared_step", "torch_part", "sgd_kernel", "large_tensor",
)}  # fmt: skip


def test_the_files_of_a_hyper_parameter():
    # The kernels know its word, which may have another name.
    lists = {f for f in listed("A hyper-parameter") if f.endswith(".py")}
    words = {"kernels/layout.py", "kernels/lars_rule.py"}
    others = {"lars_fused/conventions.py", "lars_fused/checkpoints/convert.py"}
    found = {
        name: knowing(rf"\b{name}\b") for name in ("trust_clip", "decay_zero_norm", "dampening")
    }
    found["dampening"] -= OF_DAMPENING
    found["trust_clip"] -= {"lars_fused/monitor.py"}  # named in a warning
    for name, files in found.items():
        assert files - others <= lists, name
    assert set().union(*found.values()) | words == lists


def test_the_pages_of_a_hyper_parameter():
    """Pages that name all of them have to name the next one, too."""
    lists = {f for f in listed("A hyper-parameter") if f.endswith(".md")}
    assert {"README.md", "docs/equations.md", "docs/options.md"} <= lists
    for page in ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]:
        text = (ROOT / page).read_text(encoding="utf-8")
        if page == "README.md":
            text = text.split("\n## Semantics\n")[1].split("\n## ")[0]
        # Beside its symbol the README writes a name as words.
        lacking = [
            name for name in options.TABLE
            if not re.search(rf"\b{name}\b|\b{name.replace('_', ' ')}\b", text)
        ]  # fmt: skip
        if page in lists:
            assert not lacking, f"add {lacking} to {page}"
        else:
            assert lacking, f"docs/architecture.md lacks {page}, which names every hyper-parameter"


def test_the_kernels_read_every_word_of_a_group_in_the_rule_alone_but_for_decayed_sums():
    table = (ROOT / "lars_fused" / "options.py").read_text(encoding="utf-8")
    for name in options.TABLE:
        word = re.search(rf"    {name}: Annotated\[[^@]*?\blayout\.(\w+)", table)[1]
        users = {f for f in knowing(rf"\blayout\.{word}\b") if f.startswith("kernels/")}
        # N(g + βw) is summed before there is a ratio, by the kernels that go over the chunks.
        sums = {f"kernels/{n}.py" for n in ("l2norm", "lars_step", "ring")}
        sums = sums if word == "DECAY" else set()
        assert users - {"kernels/layout.py"} == {"kernels/lars_rule.py", *sums}, name


def test_the_files_of_a_convention():
    lists = listed("A convention")
    assert knowing(r"\bTIMM\b") == {f for f in lists if f.endswith(".py")}
    for name in lists:
        assert re.search(r"\bTIMM\b", (ROOT / name).read_text(encoding="utf-8")), name


def test_the_files_of_a_dtype():
    assert knowing(r"\bbfloat16\b") - MENTIONS == listed("A storage dtype")


def test_every_kernel_is_launched_in_one_module_compiled_in_a_table_and_explained():
    kernels = {
        path.stem
        for path in (ROOT / "kernels").glob("*.py")
        if re.search(rf"^def {path.stem}\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(kernels) > 2
    for file, mention in (
        ("lars_fused/_engine/launch.py", r"\b{}\b"),
        ("bench/codegen.py", r'_spec\("{}"'),
        ("kernels/README.md", r"`{}\.py`"),
    ):
        text = (ROOT / file).read_text(encoding="utf-8")
        missing = [name for name in kernels if not re.search(mention.format(name), text)]
        assert not missing, f"add {missing} to {file}"


def walk():
    """The files of the page's walk, in order; and those that it says are called on the way."""
    files = re.findall(r"^ \d  (lars_fused/[\w/]+\.py)", PAGE.split("```")[1], re.MULTILINE)
    called = PAGE.split("calls two more on the way")[1].split("\n\n")[0]
    return files, {f"lars_fused/{name}" for name in re.findall(r"lars_fused/([\w/]+\.py)", called)}


def files_entered(step):
    """For every call within a step, the files of the package on the stack, from the outermost."""
    stacks = set()

    def entered(frame, event, _):
        if event != "call" or not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            return
        files = []
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                name = f"lars_fused/{path.relative_to(PACKAGE).as_posix()}"
                if not files or files[-1] != name:
                    files.append(name)
            frame = frame.f_back
        stacks.add(tuple(reversed(files)))

    sys.setprofile(entered)
    try:
        step()
    finally:
        sys.setprofile(None)
    return stacks


PACKAGE = Path(lars_fused.__file__).parent


@pytest.fixture
def repeated(monkeypatch):
    """Takes two steps, and returns the third. The kernels themselves are not run."""

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(grid)

    launched = []
    monkeypatch.setattr(launch, "why_not", lambda device: None)
    monkeypatch.setattr(launch, "functions", lambda: {"lars_step": Kernel()})
    monkeypatch.setattr(launch, "constants", lambda *_: {})

    def step_of(backend):
        params = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
        for p in params:
            p.grad = torch.randn_like(p)
        groups = [{"params": params[:2]}, {"params": params[2:], "adapt": False}]
        optimizer = lars_fused.LARS(groups, weight_decay=0.1, backend=backend)
        for _ in range(2):
            optimizer.step()
        assert len(launched) == (2 if backend == "triton" else 0)
        return optimizer.step

    return step_of


def test_a_repeated_step_takes_the_walk_that_the_page_draws(repeated):
    files, called = walk()
    assert len(files) == 5
    assert len(called) == 2
    stacks = files_entered(repeated("triton"))
    assert tuple(files) in stacks
    # Whatever is entered is the next file of the walk, or one that is called and returns.
    for stack in stacks:
        way = stack[:-1] if stack[-1] in called else stack
        assert list(way) == files[: len(way)], stack
    assert {stack[-1] for stack in stacks} == {*files, *called}


def test_a_repeated_step_of_torch_operations_takes_the_same_walk_down_to_the_fourth_file(repeated):
    files, called = walk()
    ways = {stack for stack in files_entered(repeated("torch")) if stack[-1] not in called}
    text = PAGE.split("torch operations take a step")[1]
    others = re.findall(r"(lars_fused/_engine/torch_\w+\.py)", text)[:2]
    torch_path = [*files[:3], *others]
    assert {way[:5] for way in ways} == {tuple(torch_path[:n]) for n in range(1, 6)}
