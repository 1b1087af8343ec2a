"""`docs/architecture.md` says the truth: the files that it lists are those that know of a thing."""

import re
from pathlib import Path

import pytest

from lars_fused import options

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


def test_the_kernels_read_every_word_of_a_group_in_the_rule_alone_but_for_decayed_sums():
    table = (ROOT / "lars_fused" / "options.py").read_text(encoding="utf-8")
    for name in options.TABLE:
        word = re.search(rf"    {name}: Annotated\[[^@]*?\blayout\.(\w+)", table)[1]
        users = {f for f in knowing(rf"\blayout\.{word}\b") if f.startswith("kernels/")}
        # N(g + βw) is summed before there is a ratio, by the kernels that go over the chunks.
        sums = {"kernels/l2norm.py", "kernels/lars_step.py"} if word == "DECAY" else set()
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


def test_the_walk_enters_five_files_each_once():
    walk = PAGE.split("```")[1]
    files = re.findall(r"^ \d  (lars_fused/[\w/]+\.py)", walk, re.MULTILINE)
    assert len(files) == len(set(files)) <= 5
    # Each file calls the next one, by the name that the page gives it.
    calls = ["self._engine.step(", "step.run(", "part.tables.fill(", "launch.run("]
    for file, call in zip(files, calls, strict=False):
        assert call in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {call}"
