"""The interpreter in half its time: what it works out anew at every call is worked out once.

It spends its time not on numbers but on Python: `triton.language` is patched again for each call of
a device function, some sixty a work item, although the launch has already done so and nothing has
undone it; a table of dtypes is built for each array that is looked at; and every scalar gets a
shape and a size of its own. None of it changes what is computed.
"""

import inspect


class _Nothing:
    def restore(self) -> None:
        """There is nothing to restore."""


def quicken() -> None:
    """Patch triton's interpreter; once in a process, before the first launch."""
    from triton.runtime import interpreter

    _patch_once_a_launch(interpreter)
    _keep_the_dtypes(interpreter)
    _share_the_shape_of_scalars()


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


def _share_the_shape_of_scalars() -> None:
    from triton.language import core

    make = core.tensor.__init__
    one, empty = core.constexpr(1), core.tuple([])

    def init(self, handle, type):
        if type.is_block():
            make(self, handle, type)
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = one, empty

    core.tensor.__init__ = init
