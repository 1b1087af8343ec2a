"""The interpreter in a third of its time: what it works out anew at every call is worked out once.

It spends its time not on numbers but on Python: `triton.language` is patched again for each call of
a device function, some sixty a work item, although the launch has already done so and nothing has
undone it; types of blocks are built for each value, with their names; every value gets a shape and
a size of its own; two operands of one type are promoted to that type; and the overflow of every
32-bit sum is computed for an assertion that only a debug build would evaluate. None of it changes
what is computed.
"""

import inspect


class _Nothing:
    def restore(self) -> None:
        """There is nothing to restore."""


def quicken() -> None:
    """Patch triton's interpreter; once in a process, before the first launch."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    _patch_once_a_launch(interpreter)
    _call_builtins_directly(interpreter, core)
    _keep_the_dtypes(interpreter)
    _keep_the_block_types(core)
    _share_shapes(core)
    _unwrap_values_at_once(core)
    _leave_equal_types_alone(TritonSemantic)
    _assert_nothing_of_overflow(interpreter, TritonSemantic)


def _patch_once_a_launch(interpreter) -> None:
    """A device function call patches only modules that its launch has not patched yet."""
    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules_of: dict[object, frozenset[str]] = {}
    patched: set[frozenset[str]] = set()

    def once(fn):
        if fn not in modules_of:
            found = (m.__name__ for m in fn.__globals__.values() if inspect.ismodule(m))
            modules_of[fn] = frozenset(found)
        modules = modules_of[fn]
        if modules in patched:
            return _Nothing()
        patched.add(modules)
        return patch(fn)

    def launch(self, *args, **kwargs):
        patched.clear()
        return call(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launch


def _call_builtins_directly(interpreter, core) -> None:
    """Without the wrapper that only checks that `_semantic` was given."""
    semantic, patch = interpreter.interpreter_semantic, interpreter._patch_attr

    def patch_attr(obj, name, member, builder, scope):
        inner = getattr(member, "__wrapped__", None)
        if inner is None or not core.is_builtin(member):
            patch(obj, name, member, builder, scope)
            return

        def direct(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return inner(*args, **kwargs)

        setattr(direct, core.TRITON_BUILTIN, False)
        scope.set_attr(obj, name, direct)

    interpreter._patch_attr = patch_attr


def _keep_the_dtypes(interpreter) -> None:
    look_up, kept = interpreter._get_np_dtype, {}

    def np_dtype(dtype):
        # By what tells dtypes apart: blocks of every shape share their element's.
        key = dtype.element_ty if dtype.is_block() else dtype
        key = "pointer" if key.is_ptr() else key.name
        if key not in kept:
            kept[key] = look_up(dtype)
        return kept[key]

    interpreter._get_np_dtype = np_dtype


def _keep_the_block_types(core) -> None:
    """One object for each element type and shape: types are never written to."""
    make, kept = core.block_type.__init__, {}

    def new(cls, element_ty, shape):
        key = (element_ty.name, tuple(n if type(n) is int else n.value for n in shape))
        if key not in kept:
            made = kept[key] = object.__new__(cls)
            make(made, element_ty, shape)
        return kept[key]

    core.block_type.__new__ = new
    core.block_type.__init__ = lambda self, element_ty, shape: None


def _share_shapes(core) -> None:
    """Of all scalars, and of all values of one block type."""
    one, empty = core.constexpr(1), core.tuple([])

    def init(self, handle, type):
        self.handle, self.type = handle, type
        if not type.is_block():
            self.dtype = type.scalar
            self.numel, self.shape = one, empty
            return
        self.dtype = type.element_ty
        if (shared := type.__dict__.get("_shared")) is None:
            shape = core.tuple([core.constexpr(n) for n in type.shape])
            shared = type._shared = core.constexpr(type.numel), shape
        self.numel, self.shape = shared

    core.tensor.__init__ = init


def _unwrap_values_at_once(core) -> None:
    """What is neither a constexpr nor a list is itself."""
    unwrap = core._unwrap_if_constexpr
    plain = frozenset({int, float, bool, str, type(None)})
    plain |= {core.tensor, core.dtype, core.pointer_type}

    def at_once(o):
        kind = type(o)
        if kind in plain:
            return o
        return o.value if kind is core.constexpr else unwrap(o)

    core._unwrap_if_constexpr = at_once


def _leave_equal_types_alone(semantic) -> None:
    """Two operands of one type need no promotion and no broadcast; pointers take the long way."""
    check = semantic.binary_op_type_checking_impl
    broadcast = semantic.broadcast_impl_value

    def checked(self, lhs, rhs, *args, **options):
        if type(lhs) is self.tensor and type(rhs) is self.tensor and lhs.type is rhs.type:
            scalar = lhs.dtype
            # A quotient of 16-bit numbers is one of 32 bits.
            if not scalar.is_ptr() and scalar.primitive_bitwidth >= 32:
                return lhs, rhs
        return check(self, lhs, rhs, *args, **options)

    def broadcast_(self, lhs, rhs):
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and left.shape == right.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.binary_op_type_checking_impl = checked
    semantic.broadcast_impl_value = broadcast_


def _assert_nothing_of_overflow(interpreter, semantic) -> None:
    assert not interpreter.interpreter_builder.options.debug
    semantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, binary_op: None
