# ruff: noqa: PT009, PT027 (the class is a unittest.TestCase, as torch's machinery needs)
"""PyTorch's own optimizer checks, through its `OptimizerInfo` and `@optims`.

`TestOptimRenewed`, which holds the bodies, is not shipped with torch: they are written anew here.
"""

import copy
import io

import pytest
import torch

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")

from torch.nn import Parameter
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TestCase

from lars_fused import LARS, conventions

pytestmark = [pytest.mark.cpu, pytest.mark.interpret, pytest.mark.gpu]


def inputs(device, dtype=None):
    changes = [
        {}, {"lr": 0.1}, {"lr": torch.tensor(0.1)}, {"weight_decay": 0.1},
        {"momentum": 0.5, "dampening": 0.3}, {"momentum": 0.0},
        {"nesterov": True, "weight_decay": 0.1}, {"maximize": True}, {"adapt": False, "lr": 0.01},
        {**conventions.MAE, "lr": 1.0}, {**conventions.APEX_LARC, "lr": 0.5},
    ]  # fmt: skip
    return [OptimizerInput(params=None, kwargs=dict(c), desc=str(c)) for c in changes]


def error_inputs(device, dtype):
    errors = get_error_inputs_for_all_optims(device, dtype)
    if errors:
        for kwargs, text in (({"momentum": -0.5}, "momentum"), ({"lr": -1.0}, "lr=")):
            bad = OptimizerInput(params=None, kwargs=kwargs, desc=text)
            errors.append(ErrorOptimizerInput(bad, error_type=ValueError, error_regex=text))
    return errors


INFO = OptimizerInfo(
    LARS,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=(
        [lambda o: StepLR(o, gamma=0.9, step_size=10)],
        [lambda o: LinearLR(o, start_factor=0.4, total_iters=4)],
        [lambda o: ExponentialLR(o, gamma=0.9), lambda o: ReduceLROnPlateau(o)],
    ),
    supported_impls=(),
    not_og_supported_flags=(),
    supports_complex=False,
    supports_sparse=False,
)


class TestLARS(TestCase):
    def problem(self, device, dtype, strided=False):
        draw = torch.Generator().manual_seed(3)
        weight, bias = torch.randn(10, 5, generator=draw), torch.randn(10, generator=draw)
        x = torch.randn(5, generator=draw).to(device, dtype)
        if strided:
            weight, bias = (
                torch.stack([t, t], -1).to(device, dtype)[..., 0] for t in (weight, bias)
            )
        params = [Parameter(t.to(device, dtype)) for t in (weight, bias)]
        return params, lambda: (params[0].mv(x) + params[1]).pow(2).sum()

    def train(self, optimizer, loss, steps, schedulers=()):
        def closure():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        values = []
        for _ in range(steps):
            values.append(optimizer.step(closure).item())
            for s in schedulers:
                s.step(*([values[-1]] if isinstance(s, ReduceLROnPlateau) else []))
        return [*values, loss().item()]

    @optims([INFO], dtypes=[torch.float32])
    def test_errors(self, device, dtype, optim_info):
        for error in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            given = error.optimizer_error_input
            params = given.params
            if params is None:
                params = [Parameter(torch.randn(2, 3, device=device, dtype=dtype))]
            assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
            with self.subTest(given.desc):
                warns = issubclass(error.error_type, Warning)
                expect = self.assertWarnsRegex if warns else self.assertRaisesRegex
                with expect(error.error_type, error.error_regex):
                    optim_info.optim_cls(params, **given.kwargs)

    @optims([INFO], dtypes=[torch.float32])
    def test_goes_right_direction(self, device, dtype, optim_info):
        for schedulers in ((), *optim_info.scheduler_inputs):
            given_inputs = optim_info.optim_inputs_func(device=device)
            for given in given_inputs[:1] if schedulers else given_inputs:
                for strided in (False, True):
                    params, loss = self.problem(device, dtype, strided)
                    optimizer = optim_info.optim_cls(params, **copy.deepcopy(given.kwargs))
                    made = [s(optimizer) for s in schedulers]
                    values = self.train(optimizer, loss, 3, made)
                    falls = values[-1] < values[0]
                    self.assertEqual(falls, not given.kwargs.get("maximize"), msg=given.desc)

    @optims([INFO], dtypes=[torch.float32])
    def test_default_arguments_lower_the_loss_in_20_steps(self, device, dtype, optim_info):
        params, loss = self.problem(device, dtype)
        values = self.train(optim_info.optim_cls(params), loss, 20)
        self.assertLess(values[-1], values[0])

    @optims([INFO], dtypes=[torch.float32])
    def test_tensor_lr(self, device, dtype, optim_info):
        results = []
        for lr in (0.25, torch.tensor(0.25), torch.tensor([[0.25]])):
            params, loss = self.problem(device, dtype)
            optimizer = optim_info.optim_cls(params, lr=lr)
            self.train(optimizer, loss, 2)
            if isinstance(lr, torch.Tensor):
                self.assertIs(optimizer.param_groups[0]["lr"], lr)
            results.append(params)
        self.assertEqual(results[0], results[1], rtol=0, atol=0)
        self.assertEqual(results[0], results[2], rtol=0, atol=0)

    @optims([INFO], dtypes=[torch.float32])
    def test_param_groups_lr_and_weight_decay(self, device, dtype, optim_info):
        (weight, bias), loss = self.problem(device, dtype)
        optimizer = optim_info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 0.0}])
        before = bias.detach().clone()
        values = self.train(optimizer, loss, 2)
        self.assertLess(values[-1], values[0])
        self.assertEqual(bias, before, rtol=0, atol=0)
        (weight, bias), loss = self.problem(device, dtype)
        groups = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.5}]
        optimizer = optim_info.optim_cls(groups, weight_decay=0.0)
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        size, before = bias.norm().item(), weight.detach().clone()
        optimizer.step()
        self.assertLess(bias.norm().item(), size)
        self.assertEqual(weight, before, rtol=0, atol=0)

    @optims([INFO], dtypes=[torch.float32])
    def test_no_operation_without_gradients_or_with_zero_gradients(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            for zeros in (False, True):
                if zeros and given.kwargs.get("weight_decay"):
                    continue  # decay moves the weights
                params, _ = self.problem(device, dtype)
                before = [p.detach().clone() for p in params]
                optimizer = optim_info.optim_cls(params, **copy.deepcopy(given.kwargs))
                for p in params:
                    p.grad = torch.zeros_like(p) if zeros else None
                optimizer.step()
                self.assertEqual(params, before, rtol=0, atol=0, msg=given.desc)

    @optims([INFO], dtypes=[torch.float32])
    def test_closure_may_return_none_or_an_int(self, device, dtype, optim_info):
        params, _ = self.problem(device, dtype)
        optimizer = optim_info.optim_cls([p.detach() for p in params])
        self.assertIsNone(optimizer.step(lambda: None))
        self.assertEqual(optimizer.step(lambda: 1), 1)

    @optims([INFO], dtypes=[torch.float32])
    def test_state_dict_weights_only_and_older(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            params, loss = self.problem(device, dtype)
            optimizer = optim_info.optim_cls(params, **copy.deepcopy(given.kwargs))
            self.train(optimizer, loss, 1)
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            others = [Parameter(p.detach().clone()) for p in params]
            twin = optim_info.optim_cls(others, **copy.deepcopy(given.kwargs))
            for flag in ("maximize", "trust_clip"):  # a version that did not know them yet
                saved["param_groups"][0].pop(flag)
            twin.load_state_dict(saved)
            for p, q in zip(params, others, strict=True):
                q.grad = p.grad.clone()
            optimizer.step()
            twin.step()
            self.assertEqual(params, others, rtol=0, atol=0, msg=given.desc)

    @optims([INFO], dtypes=[torch.float32])
    def test_state_dict_with_repeated_groups(self, device, dtype, optim_info):
        params, _ = self.problem(device, dtype)
        optimizer = optim_info.optim_cls(params)
        optimizer.param_groups[0]["params"].append(params[0])  # pytorch#36831
        saved = optimizer.state_dict()
        ids = saved["param_groups"][0]["params"]
        self.assertEqual(ids[0], ids[2])
        self.assertEqual(len(set(ids)), 2)

    @optims([INFO], dtypes=[torch.float32])
    def test_non_empty_state_print_and_deepcopy(self, device, dtype, optim_info):
        for given in optim_info.optim_inputs_func(device=device):
            params, loss = self.problem(device, dtype)
            optimizer = optim_info.optim_cls(params, **copy.deepcopy(given.kwargs))
            self.train(optimizer, loss, 1)
            self.assertEqual(bool(optimizer.state), given.kwargs.get("momentum", 0.9) != 0)
            self.assertIn("LARS (", repr(optimizer))
            twin = copy.deepcopy(optimizer)
            # torch itself adds "differentiable" to what it copies
            self.assertEqual({k: twin.defaults[k] for k in optimizer.defaults}, optimizer.defaults)
            self.assertEqual(twin._step_supports_amp_scaling, optimizer._step_supports_amp_scaling)

    @optims([INFO], dtypes=[torch.float32])
    def test_does_not_step_if_found_inf(self, device, dtype, optim_info):
        """Torch's own check of this never runs: it compares "cuda:0" with "cuda"."""
        for given in optim_info.optim_inputs_func(device=device):
            for earlier in (0, 1):
                params, loss = self.problem(device, dtype)
                optimizer = optim_info.optim_cls(params, **copy.deepcopy(given.kwargs))
                self.train(optimizer, loss, earlier)
                loss().backward()
                before = copy.deepcopy((params, optimizer.state_dict()["state"]))
                optimizer.grad_scale = torch.tensor([2.0], device=device)
                optimizer.found_inf = torch.tensor([1.0], device=device)
                optimizer.step()
                del optimizer.grad_scale, optimizer.found_inf
                after = (params, optimizer.state_dict()["state"])
                self.assertEqual(after, before, rtol=0, atol=0, msg=given.desc)

    @optims([INFO], dtypes=[torch.complex64])
    def test_complex_is_refused(self, device, dtype, optim_info):
        p = Parameter(torch.ones(3, device=device, dtype=dtype))
        p.grad = torch.ones_like(p)
        with self.assertRaisesRegex(RuntimeError, "complex"):
            optim_info.optim_cls([p]).step()


instantiate_device_type_tests(TestLARS, globals(), only_for=("cpu", "cuda"))
