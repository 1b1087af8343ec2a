"""`LARS`, a `torch.optim.Optimizer`: groups, hyper-parameters, checkpoints. Steps: `_engine`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import options as table
from ._engine import callers, members, parameters, validate
from ._engine.engine import Engine
from ._engine.tensors import Scaling
from .checkpoints.load import Restore
from .layer_stats import LayerStats
from .options import Options, Settings


class _Overlap(Protocol):
    def step(self, closure: Callable[[], Any] | None) -> None: ...


class LARS(Optimizer):
    r"""Layer-wise Adaptive Rate Scaling, all layers in one kernel launch.

    With w weight, g gradient, v momentum buffer, γ `lr`, μ `momentum`, τ `dampening`,
    β `weight_decay`, η `trust_coefficient`, ε `eps`, N(·) the L2 norm of one parameter tensor::

        d = g + βw                                       maximize: g is negated first
        q = η N(w) / D    D = N(g) + βN(w) + ε           denominator="sum"
                          D = N(d) + ε                   denominator="decayed"
                          D = N(g) + ε                   denominator="gradient"
        q = min(q/γ, 1)                                  trust_clip=True
        v = μv + (1-τ)γq·d    w = w - v                  lr_in_momentum=True (the paper)
        v = μv + (1-τ)q·d     w = w - γv                 lr_in_momentum=False (torch.optim.SGD)

    A tensor's first step takes v = γq·d (or q·d), without dampening, as `torch.optim.SGD` does.
    nesterov: w = w - (γq·d + μv), or w = w - γ(q·d + μv). With momentum 0 there is no buffer.
    q = 1 where N(w) or the norm in D is 0, or where `adapt` is False. Arithmetic is at
    least fp32 (float64 for float64 parameters), whatever the storage dtype, and each stored value
    is rounded once. `p.grad` is never written.

    Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks",
    arXiv:1708.03888 (2017), Algorithm 1. `lars_fused.conventions` holds the settings that
    reproduce other implementations: `LARS(params, lr, **conventions.MAE)`.

    Args:
        params: parameters, named parameters, or groups of them as dicts. float32, float16,
            bfloat16 (kernels) or float64 (portable path); any shape and strides. DTensors
            (`fully_shard`, tensor parallelism): norms of whole layers, one all-reduce per step.
        lr: γ, a float >= 0 or a 1-element tensor; the kernel reads one on the parameters' device.
        momentum: μ in [0, 1].
        weight_decay: β >= 0.
        trust_coefficient: η >= 0.
        eps: ε >= 0, added to D.
        dampening: τ in [0, 1].
        nesterov: Nesterov momentum; requires momentum > 0 and dampening 0.
        denominator: "sum", "decayed" or "gradient".
        lr_in_momentum: whether γ is inside the buffer; the two differ once γ changes.
        trust_clip: LARC's clipping; applies only to tensors that are adapted.
        decay_zero_norm: False drops the decay where q = 1 because of a zero norm.
        adapt: False means plain SGD with momentum (biases, normalisation); see `param_groups`.
        maximize: maximize the objective.
        momentum_dtype: storage dtype of the buffers, for the whole optimizer. float64 parameters
            keep float64 buffers.
        master_weights: keep fp32 masters of fp16 and bf16 parameters in the state.
        capturable: allow CUDA graph capture of step(); give lr as a tensor on the device to change
            it between replays.
        exclude_ndim: tensors of at most this many dimensions are neither adapted nor decayed,
            whatever their group says; from 1 on also those named as biases, where there are names.
            For frameworks that make the groups themselves: 1 leaves out what `param_groups` would,
            but for normalisation weights of more dimensions. The groups stay as they are.
        backend: "auto" (kernels wherever they can run, else the portable path), "triton" or
            "torch"; `optimizer.backend` reports which one is in use, `backend_report()` why.

    State of a parameter: `momentum_buffer`, and `master_param` with master_weights. A first step
    with learning rates of 0 and gradients of 0 only allocates it, which is how
    torch.distributed.checkpoint asks for it. To tell, a first step with learning rates of 0 reads
    the gradients, once: on a GPU the host then waits for it.

    GradScaler's scale and overflow flag are read in the kernel. Gradients that were unscaled and
    clipped before the step work too. Lightning's Trainer and Fabric always unscale and clip before.

    Raises:
        ValueError, TypeError: for bad hyper-parameters, here, in add_param_group and in step().
        RuntimeError: in step() for tensors that cannot be updated, before anything is modified.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = LARS(model.parameters(), lr=1.0, weight_decay=5e-4)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    # GradScaler sets the attributes `grad_scale` and `found_inf` for the time of a step(). They may
    # have no value otherwise, not even None: GradScaler multiplies its scale by one that is there.
    _step_supports_amp_scaling = callers.ReadsScale()
    grad_scale: Tensor
    found_inf: Tensor

    # Set by `distributed.overlap_with_backward`, which takes over step() from then on.
    _overlap: _Overlap | None = None
    _constructed = False

    @callers.keyword_only
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        dampening: float = 0.0,
        nesterov: bool = False,
        denominator: str = "sum",
        lr_in_momentum: bool = True,
        trust_clip: bool = False,
        decay_zero_norm: bool = True,
        adapt: bool = True,
        maximize: bool = False,
        momentum_dtype: torch.dtype = torch.float32,
        master_weights: bool = False,
        capturable: bool = False,
        exclude_ndim: int = -1,
        backend: str = "auto",
    ):
        defaults = table.pick(locals())._asdict()
        table.check(defaults, "LARS: ")
        settings = Settings(momentum_dtype, master_weights, capturable, exclude_ndim, backend)
        table.check_settings(settings, "LARS: ")
        self._engine = Engine(settings)
        super().__init__(params, table.plain(defaults))
        self._constructed = True

    # ------------------------------------------------------------- groups and pickling

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its hyper-parameters default to the optimizer's."""
        if isinstance(param_group, dict):
            where = f"LARS: param_groups[{len(self.param_groups)}]: "
            for name, value in self._settings._asdict().items():
                if param_group.get(name, value) != value:
                    raise ValueError(
                        f"{where}{name}={param_group[name]!r} is not a per-group option; "
                        f"the optimizer has {name}={value!r}"
                    )
            param_group = {k: v for k, v in param_group.items() if k not in Settings._fields}
            table.check({**self.defaults, **param_group}, where)
            param_group = table.plain(param_group)
            validate.check_members(param_group, self.param_groups)
            param_group = members.adopt(
                param_group, self.param_groups, self._engine.origins, alike=self._constructed
            )
        super().add_param_group(param_group)
        self._engine.layers.note(self.param_groups[-1])
        self._engine.forget()

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        return {**kept, "state": self._engine.taken_state(self.state), "_engine": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy carries the settings instead of the engine. Torch's own load_state_dict also calls
        # this, with state and groups only: captured graphs then keep their tables.
        settings = state.pop("_engine", None)
        super().__setstate__(state)
        if settings is not None or "_engine" not in self.__dict__:
            self._engine = Engine(settings or Settings())
        self._constructed = True
        self._engine.begin_with_new_state()
        for group in self.param_groups:
            for name in Options._fields:
                group.setdefault(name, self.defaults[name])

    @property
    def _settings(self) -> Settings:
        return self._engine.settings

    def __repr__(self) -> str:
        settings = {**self._settings._asdict(), "backend": self.backend}
        lines = "".join(f"    {name}: {value}\n" for name, value in settings.items())
        return f"{super().__repr__()[:-1]}{lines})"

    # ------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients on.

        Returns:
            What the closure returned, or None.
        """
        if self._overlap is not None:
            self._overlap.step(closure)
            return None
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(
                    f"LARS: step() was given closure={table.shown(closure)}; must be a function "
                    "without arguments that returns the loss, or None"
                )
            with torch.enable_grad():
                loss = closure()
        # Dynamo would trace into the interpreter; its wrapper is left out where it is not tracing.
        (self._step_untraced if torch.compiler.is_compiling() else self._step)()
        return loss

    # torch.optim uses the same lazy form, which does not import dynamo.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _step_untraced(self) -> None:
        self._step()

    def _step(self) -> None:
        scaling = Scaling(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        self._engine.step(self.param_groups, self.state, scaling)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _step_part(self, grads: Mapping[int, Tensor], grad_scale: Tensor | None) -> None:
        """Take part of a step: update the parameters with these ids from these gradients."""
        self._engine.step_part(self.param_groups, self.state, grads, Scaling(grad_scale))

    # ------------------------------------------------------------------ inspection

    @property
    def backend(self) -> str:
        """The backend in use: "triton", "torch", or "triton+torch" for a mixture of both.

        After a step, the one that ran; before the first step, the one expected for the devices.
        `backend_report` says which tensors each of them updated, and why.
        """
        return "+".join(sorted(self._engine.backends(self.param_groups), reverse=True))

    def backend_report(self) -> str:
        """Which backend updated which tensors in the last step, and why no other; for people.

        "torch" is three: PyTorch's fused SGD kernel (`fused`, on a CPU), foreach operations
        (`foreach`, on other devices), and what neither can update, in float64 (`reference`).

        Returns:
            One line per backend and reasons, with the first tensors by name; before a step, "".

        Example:
            >>> print(optimizer.backend_report())
            triton: 159 tensors
            fused: 2 tensors (head.weight, head.bias); not triton, since the tensor is
            torch.float64; the kernels support float32, float16 and bfloat16
        """
        return "\n".join(self._engine.report(self.param_groups))

    @property
    def momentum_dtype(self) -> torch.dtype:
        """Storage dtype of the momentum buffers."""
        return self._settings.momentum_dtype

    @property
    def master_weights(self) -> bool:
        """Whether fp16 and bf16 parameters have fp32 masters."""
        return self._settings.master_weights

    @property
    def capturable(self) -> bool:
        """Whether step() may be captured into a CUDA graph."""
        return self._settings.capturable

    @property
    def exclude_ndim(self) -> int:
        """Tensors of at most this many dimensions are neither adapted nor decayed."""
        return self._settings.exclude_ndim

    def layer_stats(self) -> dict[str | int, LayerStats]:
        """The last step's norms and trust ratios, by parameter. Synchronises with the device.

        Returns:
            A dict keyed by parameter name if the optimizer was given names, else by the parameter's
            index in `state_dict()`. A name that an earlier parameter has (two models in one
            optimizer) begins with its group: `param_groups[1].weight`. Parameters without a
            gradient in the last step are missing; after a step that found_inf skipped, the figures
            are those of the step before.
        """
        rows = self._engine.stats()
        keys = parameters.keys(self.param_groups)
        return {keys[i]: LayerStats(*rows[i]) for i in sorted(rows)}

    def _rows_on_device(
        self,
    ) -> list[tuple[list[str | int], list[bool], list[bool], list[bool], Tensor]]:
        """As `layer_stats`, without waiting.

        Returns:
            By launch: keys, whether adapted, whether clipped, whether N(g) is known, rows.
        """
        keys = parameters.keys(self.param_groups)
        return [
            ([keys[i] for i in params], [o.adapt for o in options],
             [o.trust_clip for o in options], known, rows)
            for params, options, known, rows in self._engine.rows_on_device()
        ]  # fmt: skip

    @property
    def _parts_taken(self) -> int:
        """Grows whenever a step is taken, or a part of one; not where one does nothing."""
        return self._engine.prepared.taken

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Like `torch.optim.Optimizer.state_dict`; the class lists the state's keys."""
        whole = self.state
        for group in self.param_groups:
            group.update(table.plain(group))  # numbers of numpy that were set since
        try:
            self.state = self._engine.taken_state(whole, for_checkpoint=True)
            return super().state_dict()
        finally:
            self.state = whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like `torch.optim.Optimizer.load_state_dict`, but without loss of precision.

        Momentum and master weights keep the dtype that they were saved in (torch's own method casts
        them to the parameter's) and never alias the checkpoint's tensors. Hyper-parameters missing
        from the checkpoint keep their values; but groups with momentum must have `lr_in_momentum`,
        which says what it means, unless the optimizer has `lr_in_momentum=False`: the momentum of
        `torch.optim.SGD` is then continued. `convert_state_dict` converts its checkpoint for any.

        Raises:
            ValueError, TypeError: if the checkpoint does not fit; the optimizer is left unchanged.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"LARS: the checkpoint is a {type(state_dict).__name__}; must be the dict that "
                "state_dict() returned"
            )
        with Restore(self, self.master_weights):
            super().load_state_dict(
                state_dict if isinstance(state_dict, dict) else dict(state_dict)
            )
