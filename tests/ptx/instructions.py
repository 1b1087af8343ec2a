"""Semantics of the PTX instructions that Triton makes of our kernels (PTX ISA, chapter 9).

An instruction is compiled once into a function of a group of threads: `effect(cta, group, mask)`
with `group` a slice of the program's threads and `mask` those of them that take part, or None for
all. Registers hold one number a thread. An instruction that is not known raises at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any
Effect = Callable[[Any, slice, Array], None]
TYPES: dict[str, Any] = {
    **{f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
       for kind, letter in (("b", "u"), ("u", "u"), ("s", "i"), ("f", "f"))
       for bits in (16, 32, 64)},
    "pred": np.dtype(bool),
}  # fmt: skip


class Unknown(NotImplementedError):
    """An instruction without semantics here."""


def operands(text: str) -> list[str]:
    """Split at commas outside of braces and brackets."""
    parts = re.split(r",(?![^{\[]*[}\]])", text)
    return [part.strip() for part in parts if part.strip()]


def constant(text: str, dtype: Any) -> Any:
    """The value of an immediate: an integer, or the bits of a float."""
    if text[:2] in ("0f", "0d"):
        bits = np.array(int(text[2:], 16), "u4" if text[1] == "f" else "u8")
        return bits.view(dtype)[()]
    value = int(text, 0)
    if dtype.kind == "b":
        return np.bool_(value)
    return np.array(value & ((1 << (8 * dtype.itemsize)) - 1), f"u{dtype.itemsize}").view(dtype)[()]


def reader(text: str, dtype: Any) -> Callable[[Any, slice], Array]:
    """How to read an operand: register, special register, symbol or immediate."""
    if text == "global_smem":
        return lambda cta, group: dtype.type(0)
    if text.startswith("%") and "." in text:  # %tid.x
        return lambda cta, group: cta.special(text, group).astype(dtype)
    if text.startswith("%"):
        return lambda cta, group: cta.register(text)[group].view(dtype)
    value = constant(text, dtype)
    return lambda cta, group: value


def put(cta: Any, name: str, group: slice, mask: Array, value: Array) -> None:
    """Write the threads that take part."""
    target = cta.register(name)[group]
    value = np.asarray(value)
    if value.dtype != target.dtype:
        value = value.view(target.dtype) if value.ndim else np.array([value]).view(target.dtype)[0]
    if mask is None:
        target[...] = value
    else:
        np.copyto(target, value, where=mask)


# ------------------------------------------------------------------------------- arithmetic


def _shift(right: bool) -> Callable[[Array, Array], Array]:
    def shift(a: Array, by: Array) -> Array:
        bits = 8 * a.dtype.itemsize
        by = np.minimum(by, bits)  # PTX clamps; numpy leaves it undefined
        half = (by // 2).astype(a.dtype)
        rest = (by - by // 2).astype(a.dtype)
        return (a >> half) >> rest if right else (a << half) << rest

    return shift


def _fused(a: Array, b: Array, c: Array) -> Array:
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b + c).astype(a.dtype)


COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
    # u: also true where an operand is NaN
    "neu": np.not_equal, "geu": lambda a, b: ~(a < b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "ltu": lambda a, b: ~(a >= b),
}  # fmt: skip
PLAIN: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "neg": np.negative, "abs": np.abs, "div": np.divide, "sqrt": np.sqrt, "fma": _fused,
    "shl": _shift(False), "shr": _shift(True),
    "selp": lambda a, b, p: np.where(p, a, b),
    "mov": lambda a: a,
}  # fmt: skip
# Modifiers that change nothing here: rounding to nearest is numpy's own.
_NEUTRAL = {"rn", "lo", "uni"}


def _plain(name: str, dtype: Any, args: list[str]) -> Effect:
    function = PLAIN[name]
    kinds = [dtype] * (len(args) - 1)
    if name == "selp":
        kinds[2] = TYPES["pred"]
    if name in ("shl", "shr"):
        kinds[1] = TYPES["u32"]
    readers = [reader(a, k) for a, k in zip(args[1:], kinds, strict=True)]

    def effect(cta: Any, group: slice, mask: Array) -> None:
        values = [np.asarray(read(cta, group)) for read in readers]
        result = function(*values)
        put(cta, args[0], group, mask, np.asarray(result, dtype))

    return effect


def _pairs(name: str, args: list[str]) -> Effect:
    """Two fp32 numbers in one 64-bit register (Blackwell)."""
    function, readers = PLAIN[name], [reader(a, TYPES["b64"]) for a in args[1:]]

    def effect(cta: Any, group: slice, mask: Array) -> None:
        values = [np.ascontiguousarray(read(cta, group)).view("f4") for read in readers]
        put(cta, args[0], group, mask, function(*values).astype("f4").view("u8"))

    return effect


def _wide(name: str, dtype: Any, args: list[str]) -> Effect:
    """mul.wide and mad.wide: 32-bit factors, 64-bit product."""
    double = np.dtype(f"{dtype.kind}8")
    a, b = (reader(x, dtype) for x in args[1:3])
    c = reader(args[3], double) if name == "mad" else None

    def effect(cta: Any, group: slice, mask: Array) -> None:
        product = np.multiply(a(cta, group), b(cta, group), dtype=double)
        put(cta, args[0], group, mask, product if c is None else product + c(cta, group))

    return effect


def _mad(dtype: Any, args: list[str]) -> Effect:
    a, b, c = (reader(x, dtype) for x in args[1:])
    return lambda cta, group, mask: put(
        cta, args[0], group, mask, a(cta, group) * b(cta, group) + c(cta, group)
    )


def _setp(parts: list[str], args: list[str]) -> Effect:
    compare, dtype = COMPARE[parts[0]], TYPES[parts[1]]
    a, b = reader(args[1], dtype), reader(args[2], dtype)
    return lambda cta, group, mask: put(
        cta, args[0], group, mask, compare(a(cta, group), b(cta, group))
    )


def _bfe(dtype: Any, args: list[str]) -> Effect:
    a = reader(args[1], dtype)
    at, length = int(args[2], 0), int(args[3], 0)
    field = dtype.type((1 << length) - 1)
    return lambda cta, group, mask: put(
        cta, args[0], group, mask, (a(cta, group) >> dtype.type(at)) & field
    )


def _funnel(args: list[str]) -> Effect:
    """shf.l.wrap: the upper half of (high, low) shifted left."""
    low, high = (reader(x, TYPES["u32"]) for x in args[1:3])
    by = int(args[3], 0) & 31

    def effect(cta: Any, group: slice, mask: Array) -> None:
        both = (high(cta, group).astype("u8") << np.uint64(32)) | low(cta, group)
        put(cta, args[0], group, mask, ((both << np.uint64(by)) >> np.uint64(32)).astype("u4"))

    return effect


# ------------------------------------------------------------------------------- conversions


def _to_bf16(x: Array) -> Array:
    bits = np.asarray(x, np.float32).view("u4").astype("u8")
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype("u2")


def _convert(x: Array, source: str, target: str) -> Array:
    if source == "bf16":
        return (x.astype("u4") << np.uint32(16)).view("f4")
    if target == "bf16":
        return _to_bf16(x)
    return x.astype(TYPES[target])


def _cvt(parts: list[str], args: list[str]) -> Effect:
    target, source = [p for p in parts if p not in _NEUTRAL]
    if target in ("bf16x2", "f16x2"):
        high, low = (reader(x, TYPES[source]) for x in args[1:])

        def pack(cta: Any, group: slice, mask: Array) -> None:
            halves = [
                _convert(x(cta, group), source, target[:-2]).view("u2").astype("u4")
                for x in (high, low)
            ]
            put(cta, args[0], group, mask, (halves[0] << np.uint32(16)) | halves[1])

        return pack
    read = reader(args[1], TYPES["b16"] if source == "bf16" else TYPES[source])

    def effect(cta: Any, group: slice, mask: Array) -> None:
        put(cta, args[0], group, mask, _convert(read(cta, group), source, target))

    return effect


def _mov(dtype: Any, args: list[str]) -> Effect:
    """Also of a register from its halves, and of halves from a register."""
    if args[0].startswith("{"):
        names = operands(args[0][1:-1])
        part = np.dtype(f"u{dtype.itemsize // len(names)}")
        read = reader(args[1], np.dtype(f"u{dtype.itemsize}"))

        def unpack(cta: Any, group: slice, mask: Array) -> None:
            lanes = np.ascontiguousarray(read(cta, group)).view(part).reshape(-1, len(names))
            for i, name in enumerate(names):
                if name != "_":
                    put(cta, name, group, mask, np.ascontiguousarray(lanes[:, i]))

        return unpack
    if args[1].startswith("{"):
        names = operands(args[1][1:-1])
        part = np.dtype(f"u{dtype.itemsize // len(names)}")
        readers = [reader(n, part) for n in names]

        def pack(cta: Any, group: slice, mask: Array) -> None:
            columns = np.broadcast_arrays(*(r(cta, group) for r in readers))
            whole = np.ascontiguousarray(np.stack(columns, -1)).view(f"u{dtype.itemsize}")[..., 0]
            put(cta, args[0], group, mask, whole)

        return pack
    return _plain("mov", dtype, args)


# ------------------------------------------------------------------------------- memory


def _address(text: str) -> Callable[[Any, slice], Array]:
    base, _, offset = text.strip("[] ").partition("+")
    base, step = base.strip(), int(offset or "0", 0)
    if base == "global_smem":
        return lambda cta, group: np.full(cta.lanes(group), step, "i8")
    return lambda cta, group: cta.register(base)[group].astype("i8") + step


def _names(text: str) -> list[str]:
    return operands(text[1:-1]) if text.startswith("{") else [text]


def _load(parts: list[str], args: list[str]) -> Effect:
    if "param" in parts:
        at = int(re.search(r"_param_(\d+)", args[1])[1])
        return lambda cta, group, mask: put(cta, args[0], group, mask, cta.parameters[at])
    names, address, dtype = _names(args[0]), _address(args[1]), TYPES[parts[-1]]
    space = "shared" if "shared" in parts else "global"

    def effect(cta: Any, group: slice, mask: Array) -> None:
        taking = cta.taking(group, mask)
        found = cta.memory(space).read(address(cta, group)[taking], dtype, len(names))
        for i, name in enumerate(names):
            target = cta.register(name)
            value = np.zeros(cta.lanes(group), dtype)
            value[taking] = found[:, i]
            if target.dtype.itemsize > dtype.itemsize:  # ld.shared.s32 into 64 bits
                value = value.astype(f"{dtype.kind}{target.dtype.itemsize}")
            put(cta, name, group, mask, value)

    return effect


def _store(parts: list[str], args: list[str]) -> Effect:
    address, dtype = _address(args[0]), TYPES[parts[-1]]
    readers = [reader(name, dtype) for name in _names(args[1])]
    space = "shared" if "shared" in parts else "global"

    def effect(cta: Any, group: slice, mask: Array) -> None:
        taking = cta.taking(group, mask)
        columns = [np.broadcast_to(r(cta, group), cta.lanes(group))[taking] for r in readers]
        cta.memory(space).write(address(cta, group)[taking], np.stack(columns, -1))

    return effect


def _atomic(parts: list[str], args: list[str]) -> Effect:
    operation = {"add": lambda old, x: old + x, "exch": lambda old, x: x}[parts[-2]]
    dtype, address = TYPES[parts[-1]], _address(args[1])
    read = reader(args[2], dtype)

    def effect(cta: Any, group: slice, mask: Array) -> None:
        memory = cta.memory("global")
        where, values = address(cta, group), np.broadcast_to(read(cta, group), cta.lanes(group))
        for lane in np.flatnonzero(cta.taking(group, mask)):
            one = slice(lane, lane + 1)
            old = memory.read(where[one], dtype, 1)
            with np.errstate(over="ignore"):
                memory.write(where[one], operation(old, values[one, None]).astype(dtype))
            alone = np.zeros(cta.lanes(group), bool)
            alone[lane] = True
            put(cta, args[0], group, alone, np.full(cta.lanes(group), old[0, 0]))

    return effect


def _copy_async(args: list[str]) -> Effect:
    """cp.async from global to shared memory: so many bytes, zeros beyond those of the source."""
    target, source, size = _address(args[0]), _address(args[1]), int(args[2], 0)
    given = reader(args[3], TYPES["u32"]) if len(args) > 3 else None
    count = size // 4

    def effect(cta: Any, group: slice, mask: Array) -> None:
        taking = cta.taking(group, mask)
        there = np.full(cta.lanes(group), True) if given is None else given(cta, group) == size
        if given is not None and ((given(cta, group) % size)[taking] != 0).any():
            raise Unknown("cp.async of a part of its source")
        to, at = target(cta, group), source(cta, group)

        def copy() -> None:
            found = np.zeros((cta.lanes(group), count), "u4")
            chosen = taking & there
            found[chosen] = cta.memory("global").read(at[chosen], np.dtype("u4"), count)
            cta.memory("shared").write(to[taking], found[taking])

        cta.copies(group).begin(copy)

    return effect


def _copy_order(parts: list[str], args: list[str]) -> Effect:
    """cp.async.commit_group, cp.async.wait_group n."""
    if parts[-1] == "commit_group":
        return lambda cta, group, mask: cta.copies(group).commit()
    left = int(args[0], 0)
    return lambda cta, group, mask: cta.copies(group).wait(left)


def _shuffle(mode: str, args: list[str]) -> Effect:
    """shfl.sync: each thread gets the value of the lane of its warp that differs by a mask (bfly),
    or that it names (idx).
    """
    read, other = reader(args[1], TYPES["b32"]), reader(args[2], TYPES["u32"])

    def effect(cta: Any, group: slice, mask: Array) -> None:
        if mask is not None:
            warps = mask.reshape(-1, 32)
            if not (warps.all(1) | ~warps.any(1)).all():
                raise RuntimeError("a shuffle without all threads of its warp")
        here = np.arange(cta.lanes(group))
        lane = here % 32 ^ other(cta, group) if mode == "bfly" else other(cta, group) % 32
        put(cta, args[0], group, mask, read(cta, group)[here // 32 * 32 + lane])

    return effect


def _redux(args: list[str]) -> Effect:
    """redux.sync.add: every thread of a warp gets the sum over the warp."""
    read = reader(args[1], TYPES["u32"])

    def effect(cta: Any, group: slice, mask: Array) -> None:
        if mask is not None and not mask.all():
            raise RuntimeError("a reduction without all threads of its warp")
        with np.errstate(over="ignore"):
            total = read(cta, group).reshape(-1, 32).sum(1, dtype="u4")
        put(cta, args[0], group, mask, np.repeat(total, 32))

    return effect


def compile_instruction(opcode: str, text: str) -> Effect | None:
    """The effect of one instruction; None for what only concerns caches."""
    name, *parts = opcode.split(".")
    args = operands(text)
    if name in ("createpolicy", "prefetch", "nanosleep") or "prefetch" in parts:
        return None
    kept = [p for p in parts if p not in _NEUTRAL]
    if name in ("ld", "st", "atom", "cvt", "setp"):
        makers = {"ld": _load, "st": _store, "atom": _atomic, "cvt": _cvt, "setp": _setp}
        return makers[name](parts, args)
    if opcode.startswith("cp.async."):
        order = parts[-1] in ("commit_group", "wait_group")
        return _copy_order(parts, args) if order else _copy_async(args)
    if name == "shfl" and kept[0] == "sync" and kept[1] in ("bfly", "idx"):
        return _shuffle(kept[1], args)
    if opcode == "redux.sync.add.s32":
        return _redux(args)
    if opcode == "shf.l.wrap.b32":
        return _funnel(args)
    if kept == ["f32x2"]:
        return _pairs(name, args)
    if kept[:1] == ["wide"]:
        return _wide(name, TYPES[kept[1]], args)
    dtype = TYPES.get(kept[-1] if kept else "")
    if dtype is None or len(kept) != 1:
        raise Unknown(f"{opcode} {text}")
    if name == "mad":
        return _mad(dtype, args)
    if name == "bfe":
        return _bfe(dtype, args)
    if name == "mov":
        return _mov(dtype, args)
    if name in PLAIN:
        return _plain(name, dtype, args)
    raise Unknown(f"{opcode} {text}")
