"""LARS as each project computes it: one tensor at a time, in float64, as simple as can be.

Each class is written from its project's equations and shares no code with `lars_fused`. They keep
the state under the project's own key and give the `state_dict()` that the project would give.
"""

import torch

# ruff: noqa: RUF012  (`defaults` are never changed, only merged)


def norm(x):
    return (x * x).sum().sqrt().item()


class Original:
    """Weights and groups, and for each weight that has a gradient one call of `update`."""

    key = "momentum_buffer"
    defaults: dict = {}

    def __init__(self, groups, **defaults):
        """`groups`: dicts whose "params" are tensors; their values are copied."""
        self.groups = [{**self.defaults, **defaults, **group} for group in groups]
        for group in self.groups:
            group["params"] = [p.detach().cpu().double().clone() for p in group["params"]]
        self.state = {}

    @property
    def weights(self):
        return [w for group in self.groups for w in group["params"]]

    def set_lr(self, lr):
        for group in self.groups:
            group["lr"] = lr

    def step(self, grads):
        i = 0
        for group in self.groups:
            for w in group["params"]:
                if grads[i] is not None:
                    v = self.state.get(i)
                    new_w, new_v = self.update(w, grads[i].double(), v, group)
                    w.copy_(new_w)
                    if new_v is not None:
                        self.state[i] = new_v
                i += 1

    def update(self, w, g, v, group):
        raise NotImplementedError

    def state_dict(self):
        groups, at = [], 0
        for group in self.groups:
            n = len(group["params"])
            groups.append({**group, "params": list(range(at, at + n))})
            at += n
        return {"state": {i: {self.key: v.clone()} for i, v in self.state.items()},
                "param_groups": groups}  # fmt: skip


def torch_sgd(w, d, v, o, decay):
    """torch.optim.SGD: momentum of the direction d + decay·w, the learning rate outside of it."""
    d = d + decay * w
    if o.get("momentum", 0) == 0:
        return w - o["lr"] * d, None
    v = d if v is None else o["momentum"] * v + (1 - o.get("dampening", 0)) * d
    move = d + o["momentum"] * v if o.get("nesterov") else v
    return w - o["lr"] * move, v


class Paper(Original):
    """Algorithm 1 of arXiv:1708.03888; ε beside the norms as in the implementations of it."""

    defaults = {"momentum": 0.9, "weight_decay": 0.0, "eta": 0.001, "eps": 1e-8}

    def update(self, w, g, v, o):
        local_rate = 1.0
        if norm(w) > 0 and norm(g) > 0:
            local_rate = o["eta"] * norm(w) / (norm(g) + o["weight_decay"] * norm(w) + o["eps"])
        v = torch.zeros_like(w) if v is None else v
        v = o["momentum"] * v + o["lr"] * local_rate * (g + o["weight_decay"] * w)
        return w - v, v


class Sgd(Original):
    defaults = {"momentum": 0.0, "weight_decay": 0.0, "dampening": 0.0, "nesterov": False}

    def update(self, w, g, v, o):
        return torch_sgd(w, g, v, o, o["weight_decay"])


class ApexLarc(Original):
    """apex.parallel.LARC around torch.optim.SGD. What LARC itself is given, SGD does not save."""

    defaults = Sgd.defaults

    def __init__(self, groups, trust_coefficient=0.02, clip=True, eps=1e-8, **defaults):
        super().__init__(groups, **defaults)
        self.trust_coefficient, self.clip, self.eps = trust_coefficient, clip, eps

    def update(self, w, g, v, o):
        w_norm, g_norm, beta = norm(w), norm(g), o["weight_decay"]
        if w_norm != 0 and g_norm != 0:
            rate = self.trust_coefficient * w_norm / (g_norm + w_norm * beta + self.eps)
            if self.clip:
                rate = 1.0 if o["lr"] == 0 else min(rate / o["lr"], 1.0)
            g = rate * (g + beta * w)
        return torch_sgd(w, g, v, o, decay=0)


class TorchLars(Original):
    """torchlars.LARS around torch.optim.SGD."""

    defaults = Sgd.defaults

    def __init__(self, groups, eps=1e-8, trust_coef=0.001, **defaults):
        super().__init__(groups, **defaults)
        self.eps, self.trust_coef = eps, trust_coef

    def update(self, w, g, v, o):
        rate = 1.0
        if norm(w) > 0 and norm(g) > 0:
            denominator = norm(g) + o["weight_decay"] * norm(w) + self.eps
            rate = self.trust_coef * norm(w) / denominator
        return torch_sgd(w, (g + o["weight_decay"] * w) * rate, v, o, decay=0)


class Timm(Original):
    """timm.optim.Lars; groups without weight decay are left alone unless always_adapt."""

    defaults = {
        "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "trust_coeff": 0.001,
        "eps": 1e-8, "trust_clip": False, "always_adapt": False,
    }  # fmt: skip

    def update(self, w, g, v, o):
        beta = o["weight_decay"]
        if beta != 0 or o["always_adapt"]:
            ratio = 1.0
            if norm(w) > 0 and norm(g) > 0:
                ratio = o["trust_coeff"] * norm(w) / (norm(g) + norm(w) * beta + o["eps"])
            if o["trust_clip"]:
                ratio = 1.0 if o["lr"] == 0 else min(ratio / o["lr"], 1.0)
            g = (g + beta * w) * ratio
        return torch_sgd(w, g, v, o, decay=0)


class Mae(Original):
    """LARS of MAE and MoCo v3."""

    key = "mu"
    defaults = {"momentum": 0.9, "weight_decay": 0, "trust_coefficient": 0.001}

    def update(self, w, g, mu, o):
        if w.ndim > 1:
            g = self.adapted(w, g + o["weight_decay"] * w, o["trust_coefficient"])
        return self.move(w, g, mu, o)

    @staticmethod
    def adapted(w, d, eta):
        return d * (eta * norm(w) / norm(d)) if norm(w) > 0 and norm(d) > 0 else d

    @staticmethod
    def move(w, d, mu, o):
        mu = o["momentum"] * (torch.zeros_like(w) if mu is None else mu) + d
        return w - o["lr"] * mu, mu


class Barlow(Mae):
    """LARS of Barlow Twins (flags) and VICReg (functions or None)."""

    defaults = {
        "momentum": 0.9, "weight_decay": 0, "eta": 0.001, "weight_decay_filter": False,
        "lars_adaptation_filter": False,
    }  # fmt: skip

    def update(self, w, g, mu, o):
        def left_out(rule):
            return rule(w) if callable(rule) else bool(rule) and w.ndim == 1

        if not left_out(o["weight_decay_filter"]):
            g = g + o["weight_decay"] * w
        if not left_out(o["lars_adaptation_filter"]):
            g = self.adapted(w, g, o["eta"])
        return self.move(w, g, mu, o)


class Dino(Mae):
    """LARS of DINO: what has one dimension is left out, whatever the filters say."""

    defaults = {
        "momentum": 0.9, "weight_decay": 0, "eta": 0.001, "weight_decay_filter": None,
        "lars_adaptation_filter": None,
    }  # fmt: skip

    def update(self, w, g, mu, o):
        if w.ndim != 1:
            g = self.adapted(w, g + o["weight_decay"] * w, o["eta"])
        return self.move(w, g, mu, o)


class SimClr(Original):
    """SimCLR's LARSOptimizer, classic momentum; the groups say what its patterns would."""

    defaults = {"momentum": 0.9, "weight_decay": 0.0, "eeta": 0.001, "use_nesterov": False,
                "adapted": True}  # fmt: skip

    def update(self, w, g, v, o):
        g = g + o["weight_decay"] * w
        ratio = 1.0
        if o["adapted"] and norm(w) > 0 and norm(g) > 0:
            ratio = o["eeta"] * norm(w) / norm(g)
        scaled = ratio * o["lr"] * g
        v = o["momentum"] * (torch.zeros_like(w) if v is None else v) + scaled
        return w - (o["momentum"] * v + scaled if o["use_nesterov"] else v), v


class RocmFusedLars(Original):
    """apex.optimizers.FusedLARS of ROCm: the buffer holds what is added to the weight."""

    defaults = {
        "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False,
        "trust_coefficient": 0.001, "eps": 0.0, "is_skipped": False,
    }  # fmt: skip

    def update(self, w, g, v, o):
        rate = o["lr"]
        if not o["is_skipped"] and norm(w) > 0 and norm(g) > 0:
            below = norm(g) + o["weight_decay"] * norm(w) + o["eps"]
            rate = rate * o["trust_coefficient"] * norm(w) / below
        step = rate * (g + o["weight_decay"] * w)
        v = o["momentum"] * (torch.zeros_like(w) if v is None else v) - step
        return w + (o["momentum"] * v - step if o["nesterov"] else v), v
