"""Tensors that hold their elements in another one, as torchao's float8 and int8 weights do."""

import torch
from torch.utils._pytree import tree_map


class Wrapped(torch.Tensor):
    """Holds its elements in another tensor, and does what that one does."""

    @staticmethod
    def __new__(cls, inner, offset=0):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride(),
            storage_offset=offset,
        )  # fmt: skip

    def __init__(self, inner, offset=0):
        self.inner = inner

    def __repr__(self):
        return "Wrapped"

    @classmethod
    def refuses(cls, name):
        return False

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if cls.refuses(name):
            raise NotImplementedError(f"{name} of a {cls.__name__}")
        bare = tree_map(lambda x: x.inner if isinstance(x, Wrapped) else x, (args, kwargs or {}))
        result = function(*bare[0], **bare[1])
        if name.endswith("_"):
            return args[0]
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, result)


class ReadOnly(Wrapped):
    @classmethod
    def refuses(cls, name):
        return name == "copy_"


class Deaf(Wrapped):
    """Takes what is written into it, and forgets it."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ == "copy_" and isinstance(args[0], Deaf):
            return args[0]
        return super().__torch_dispatch__(function, types, args, kwargs)
