"""`LARS`, a `torch.optim.Optimizer`: state, hyper-parameters, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import agreement, checks, launch
from .active import Active
from .checkpoint import Restore
from .reference import Options

_ENGINE = ("momentum_dtype", "master_weights", "capturable", "backend")
_MAX_STEPPERS = 8


class LayerStats(NamedTuple):
    """What the last step measured of one parameter. Norms are of the whole tensor.

    Of a parameter that is split over ranks (DTensor) only the norm that the denominator is made of
    is known: `decayed_norm` is NaN, or `gradient_norm` with denominator="decayed".
    """

    weight_norm: float
    """N(w) before the step."""
    gradient_norm: float
    """N(g), unscaled."""
    decayed_norm: float
    """N(g + βw)."""
    trust_ratio: float
    """q; 1 where the tensor is not adapted."""
    effective_lr: float
    """γq."""


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
    nesterov: w = w - (γq·d + μv), or w = w - γ(q·d + μv). A momentum of 0 keeps no buffer.
    q = 1 where N(w) or the norm in D is 0, or where `adapt` is False. Arithmetic is in fp32
    registers (float64 in the portable path); each stored value is rounded once. `p.grad` is never
    written.

    Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks",
    arXiv:1708.03888 (2017), Algorithm 1. `lars_fused.conventions` holds the settings that
    reproduce other implementations: `LARS(params, lr, **conventions.MAE)`.

    Args:
        params: parameters, named parameters, or groups of them as dicts. float32, float16,
            bfloat16 (kernels) or float64 (portable path); any shape and strides. DTensors
            (`fully_shard`, tensor parallelism): norms of whole layers, one all-reduce a step.
        lr: γ, a float >= 0 or a 1-element tensor; on the parameters' device the kernel reads it.
        momentum: μ in [0, 1].
        weight_decay: β >= 0.
        trust_coefficient: η >= 0.
        eps: ε >= 0, added to D.
        dampening: τ in [0, 1].
        nesterov: needs momentum and no dampening.
        denominator: "sum", "decayed" or "gradient".
        lr_in_momentum: whether γ is inside the buffer; they differ when γ changes.
        trust_clip: LARC's clipping, only where the ratio was adapted.
        decay_zero_norm: False drops the decay where q = 1 because of a zero norm.
        adapt: False makes it SGD with momentum (biases, normalisation): see `param_groups`.
        maximize: maximize the objective.
        momentum_dtype: storage of the buffers, for the whole optimizer. float64 parameters keep
            float64 buffers.
        master_weights: keep fp32 masters of fp16 and bf16 parameters in the state.
        capturable: allow CUDA graph capture of step(); give lr as a tensor on the device to change
            it between replays.
        backend: "auto" (kernels wherever they can run, else the portable path), "triton" or
            "torch"; `optimizer.backend` says what runs.

    State of a parameter: `momentum_buffer`, and `master_param` with master_weights.

    Raises:
        ValueError, TypeError: for bad hyper-parameters, here, in add_param_group and in step().
        RuntimeError: in step() for tensors that cannot be updated, before anything is changed.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = LARS(model.parameters(), lr=1.0, weight_decay=5e-4)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    # GradScaler sets the attributes `grad_scale` and `found_inf` for the time of a step(). They may
    # have no value otherwise, not even None: GradScaler multiplies its scale by one that is there.
    _step_supports_amp_scaling = True

    # Set by `distributed.overlap_with_backward`, which takes the steps from then on.
    _overlap: Any = None
    _room = _MAX_STEPPERS
    _compared = False  # sharded parameters with those of the other ranks

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        *,
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
        backend: str = "auto",
    ):
        options = Options(
            lr, momentum, weight_decay, trust_coefficient, eps, dampening, nesterov, denominator,
            lr_in_momentum, trust_clip, decay_zero_norm, adapt, maximize,
        )._asdict()  # fmt: skip
        checks.check_options(options)
        checks.check_engine(backend, momentum_dtype, master_weights, capturable)
        engine = dict(
            zip(_ENGINE, (momentum_dtype, master_weights, capturable, backend), strict=True)
        )
        # A captured graph uses the tables and the state of its step whenever it is replayed.
        self._captured: dict[int, Active] = {}
        self._forget()
        super().__init__(params, {**options, **engine})

    # ------------------------------------------------------------- groups and pickling

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its hyper-parameters default to the optimizer's."""
        if isinstance(param_group, dict):
            where = f"LARS: param_groups[{len(self.param_groups)}]: "
            for key in _ENGINE:
                if param_group.get(key, self.defaults[key]) != self.defaults[key]:
                    raise ValueError(
                        f"{where}{key}={param_group[key]!r} is not a per-group option; "
                        f"the optimizer has {key}={self.defaults[key]!r}"
                    )
            checks.check_options({**self.defaults, **param_group}, where)
            checks.check_members(param_group, self.param_groups)
        super().add_param_group(param_group)
        for key in _ENGINE:
            self.param_groups[-1].pop(key, None)
        self._settle()
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in checks.OPTION_NAMES:
                group.setdefault(name, self.defaults[name])
        self.__dict__.setdefault("_captured", {})
        self._forget()

    def _forget(self) -> None:
        """Drop everything that can be rebuilt. Not pickled, not copied."""
        self._ids: list[int] = []
        self._flat: list[Tensor] = []
        self._sizes: list[int] = []
        self._group_of: list[int] = []
        self._values: list[tuple[Any, ...]] = []
        self._options: list[Options] = []
        self._steppers: dict[tuple[bool, ...], Active] = {}
        self._last: Active | None = None
        self._recent: list[Active] = []  # what the last step consisted of
        self._unsure: Active | None = None

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
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    # Dynamo would trace into the interpreter. torch.optim itself uses this lazy form, which does
    # not import dynamo.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _step(self) -> None:
        self._read_params()
        self._read_options()
        grads = [p.grad for p in self._flat]
        active = self._last
        if active is None or not active.same(grads, self._options, self.state):
            active = self._activate(grads)
            if active is None:
                return
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and _readable(found_inf) and found_inf != 0:
            if active.uncommitted:
                self._steppers = {}  # its masters would miss a change of the parameters
            active.batch.grads = []
            return
        self._last, self._recent = active, [active]
        self._run(active, grad_scale, found_inf)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _step_part(self, grads: dict[int, Tensor], grad_scale: Tensor | None) -> None:
        """Update the parameters with these ids, one part of a step, from these gradients."""
        self._read_params()
        self._read_options()
        active = self._activate([grads.get(i) for i in self._ids])
        if active is not None:
            self._recent.append(active)
            self._run(active, grad_scale, None)

    def _run(self, active: Active, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if active.shards and not self._compared:
            for group, split in active.shards.groups():
                agreement.compare(self, group, {id(active.params[i]) for i in split})
            self._compared = True
        active.commit(self.state)
        try:
            active.stepper.run(active.batch, self._options, grad_scale, found_inf)
            if active.dtensors:
                torch.autograd.graph.increment_version(active.params)
        except BaseException:
            # Keep nothing that an interrupted launch may have left half done.
            self._unsure = active
            self._settle()
            self._last, self._recent, self._steppers = None, [], {}
            raise
        finally:
            active.batch.grads = []  # what is held here, zero_grad() could not free
        if active.stepper.captured:
            self._captured[id(active)] = active
        if found_inf is not None:
            self._unsure = active  # whether the first step was taken is known on the device only

    def _read_params(self) -> None:
        members = [group["params"] for group in self.param_groups]
        sizes, flat = list(map(len, members)), list(chain.from_iterable(members))
        if sizes == self._sizes and all(map(is_, flat, self._flat)):
            return
        ids = list(map(id, flat))
        if len(set(ids)) != len(ids):
            twice = next(i for i, p in enumerate(flat) if id(p) in ids[:i])
            raise ValueError(
                f"{checks.describe(f'parameter {twice}', flat[twice])}: is a duplicate; "
                "each parameter may stand once in param_groups"
            )
        self._settle()
        self._last, self._steppers = None, {}
        self._ids, self._flat, self._sizes = ids, flat, sizes
        self._group_of = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]

    def _read_options(self) -> None:
        """Check and take over the hyper-parameters, if any has changed."""
        groups = self.param_groups
        values = [tuple(map(group.__getitem__, checks.OPTION_NAMES)) for group in groups]
        lrs = [value[0] for value in values]  # OPTION_NAMES begins with "lr"
        if not any(isinstance(lr, Tensor) for lr in lrs) and values == self._values:
            return
        for g, group in enumerate(groups):
            checks.check_options(group, f"LARS: param_groups[{g}]: ", read_device=False)
        self._options = [Options(**{k: group[k] for k in Options._fields}) for group in groups]
        self._values = [] if any(isinstance(lr, Tensor) for lr in lrs) else values

    def _activate(self, grads: list[Tensor | None]) -> Active | None:
        """Check every tensor of this step and divide the work; changes nothing."""
        pattern = tuple(g is not None for g in grads)
        if not any(pattern):
            return None
        if any(p.device.type == "cuda" and launch.capturing(p.device) for p in self._flat):
            self._check_capture(pattern)
        known = self._steppers.pop(pattern, None)
        if known is None or not known.same(grads, self._options, self.state):
            self._settle()
            for i, g in enumerate(grads):
                if g is not None:
                    checks.check_writable(self._flat[i], partial(self.label, i))
            # State and tables made here must be writable outside of inference mode too.
            with torch.inference_mode(False), torch.no_grad():
                known = Active(self, grads)
        self._steppers[pattern] = known
        while len(self._steppers) > self._room:
            del self._steppers[next(iter(self._steppers))]
        return known

    def _check_capture(self, pattern: tuple[bool, ...]) -> None:
        if not self.defaults["capturable"]:
            raise RuntimeError(
                "LARS: step() is being captured into a CUDA graph but capturable=False; "
                "construct LARS(..., capturable=True)"
            )
        if pattern not in self._steppers:
            raise RuntimeError(
                "LARS: step() is being captured into a CUDA graph before a step with the same "
                "gradients was run; run one as warm-up, outside of the capture"
            )

    def _settle(self) -> None:
        """Take back the state that was made for a first step which found_inf then skipped."""
        unsure, self._unsure = self._unsure, None
        if unsure is not None and unsure.retract(self.state):
            self._last, self._steppers = None, {}

    def label(self, flat_index: int) -> str:
        """The beginning of a message about one parameter."""
        p, g = self._flat[flat_index], self._group_of[flat_index]
        i = flat_index - self._group_of.index(g)
        names = self.param_groups[g].get("param_names")
        return checks.describe(f"param_groups[{g}]['params'][{i}]", p, names[i] if names else None)

    # --------------------------------------------------------------- what it shows

    @property
    def backend(self) -> str:
        """What runs the parameters: "triton", "torch", or "triton+torch" where devices differ."""
        chosen: str = self.defaults["backend"]
        if chosen != "auto":
            return chosen
        devices = {p.device for group in self.param_groups for p in group["params"]}
        ran = {"torch" if launch.why_not(d) else "triton" for d in devices}
        return "+".join(sorted(ran, reverse=True))

    def layer_stats(self) -> dict[str | int, LayerStats]:
        """The last step's norms and trust ratios, by parameter. Waits for the device.

        Returns:
            By parameter name where the optimizer was given names, else by the parameter's index as
            in `state_dict()`. Parameters without a gradient in the last step are missing; a step
            skipped by found_inf leaves the figures of the step before.
        """
        stats: dict[int, LayerStats] = {}
        for active in self._recent:
            stats |= {active.where[i]: LayerStats(*row) for i, row in active.stepper.figures()}
        names = [n for group in self.param_groups for n in group.get("param_names", ())]
        return {names[i] if names else i: stats[i] for i in sorted(stats)}

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`. Keys of the state: see the class."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, as `torch.optim.Optimizer.load_state_dict`, without loss.

        Momentum and master weights keep the dtype that they were saved in (torch's own method casts
        them to the parameter's) and never alias the checkpoint's tensors. Hyper-parameters that the
        checkpoint does not know stay as they are.

        Raises:
            ValueError: if the checkpoint does not fit; the optimizer is then unchanged.
        """
        with Restore(self):
            super().load_state_dict(state_dict)


def _readable(found_inf: Tensor) -> bool:
    """Whether the host can look at it without waiting for a device."""
    return found_inf.device.type == "cpu"
