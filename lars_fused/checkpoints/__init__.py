"""Optimizer checkpoints: lossless loading, and conversion from other optimizers."""

from .convert import convert_state_dict

__all__ = ["convert_state_dict"]
