"""The one description of the tables that host and kernels share."""

import ast
from pathlib import Path

import pytest

from lars_fused.kernels import layout

pytestmark = pytest.mark.cpu


def test_it_imports_neither_torch_nor_triton_nor_anything_but_types():
    tree = ast.parse(Path(layout.__file__).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert set(imported) <= {"typing"}


def test_words_of_a_row_are_distinct_and_fit():
    rows = {
        layout.TENSOR_WORDS: "W_AT G_AT V_AT COPY_AT NUMEL SLOT GROUP FLAGS",
        layout.GROUP_WORDS: "LR LR_AT MOMENTUM KEEP DECAY TRUST EPS SWITCHES",
        layout.WATCH_WORDS: "LAST_EPOCH LOST_EPOCH",
        3: "W2 G2 D2",
    }
    for words, names in rows.items():
        values = [getattr(layout, name) for name in names.split()]
        assert sorted(values) == list(range(len(values))), names
        assert len(values) <= words


def test_every_field_of_an_item_keeps_its_limits():
    most = (layout.MAX_TENSORS - 1, layout.MAX_CHUNKS - 1, layout.MAX_GROUPS - 1)
    word = layout.pack_item(layout.BOTH, *most)
    assert word == 2**63 - 1
    assert layout.unpack_item(word) == (layout.BOTH, *most[:2])
    for field in range(3):
        values = [value + (field == n) for n, value in enumerate(most)]
        with pytest.raises(ValueError, match="must be in"):
            layout.pack_item(layout.NORM, *values)
