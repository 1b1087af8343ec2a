import pytest
import torch
from torch import nn

from lars_fused import LARS, param_groups

pytestmark = pytest.mark.cpu


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(()))


def names(group):
    return [name for name, _ in group["params"]]


def test_splits_by_number_of_dimensions_in_the_models_order():
    adapted, left_out = param_groups(Net(), 1e-4)
    assert names(adapted) == ["conv.weight", "head.weight"]
    assert names(left_out) == [
        "scale",
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "head.bias",
    ]
    assert (adapted["weight_decay"], adapted["adapt"]) == (1e-4, True)
    assert (left_out["weight_decay"], left_out["adapt"]) == (0.0, False)


@pytest.mark.parametrize(
    ("exclude_ndim", "expected"),
    [
        (-1, 7),
        (0, 6),
        (1, 2),
        (2, 1),
    ],
)
def test_exclude_ndim_is_the_largest_that_is_left_out(exclude_ndim, expected):
    groups = param_groups(Net(), 1e-4, exclude_ndim=exclude_ndim)
    assert len(names(groups[0])) == expected
    assert sum(len(names(group)) for group in groups) == 7


@pytest.mark.parametrize(
    "exclude",
    [
        "head.*",
        ["head.weight"],
        lambda name, parameter: name.startswith("head"),
        [lambda name, parameter: parameter.shape == (2, 4)],
        ("*.bias", "head.weight"),
    ],
)
def test_leaves_out_by_name_or_by_function(exclude):
    adapted, left_out = param_groups(Net(), 1e-4, exclude=exclude)
    assert names(adapted) == ["conv.weight"]
    assert "head.weight" in names(left_out)


def test_a_pattern_matches_whole_names_with_case():
    with pytest.raises(ValueError, match="exclude='head' matches no parameter"):
        param_groups(Net(), 1e-4, exclude="head")
    with pytest.raises(ValueError, match=r"exclude='Head\.\*' matches no parameter"):
        param_groups(Net(), 1e-4, exclude=["conv.*", "Head.*"])


def test_takes_pairs_once_and_in_order():
    pairs = (pair for pair in Net().named_parameters())
    assert names(param_groups(pairs, 0.0)[0]) == ["conv.weight", "head.weight"]


def test_tied_weights_appear_once_and_answer_to_every_name():
    net = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    net["head"].weight = net["embed"].weight
    adapted, left_out = param_groups(net, 1e-4)
    assert names(adapted) == ["embed.weight"]
    assert names(left_out) == ["head.bias"]
    (everything,) = param_groups(net, 1e-4, exclude="head.weight")
    assert names(everything) == ["embed.weight", "head.bias"]
    assert everything["adapt"] is False


def test_keeps_frozen_parameters():
    net = Net()
    net.conv.weight.requires_grad_(False)
    assert "conv.weight" in names(param_groups(net, 1e-4)[0])


def test_leaves_out_empty_groups():
    (only,) = param_groups(nn.Linear(2, 2, bias=False), 0.1)
    assert (names(only), only["adapt"]) == (["weight"], True)


def test_the_optimizer_takes_the_groups_and_keeps_the_names():
    net = Net()
    optimizer = LARS(param_groups(net, 0.5), lr=1.0, backend="torch")
    adapted, left_out = optimizer.param_groups
    assert adapted["param_names"] == ["conv.weight", "head.weight"]
    assert left_out["param_names"][0] == "scale"
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = net.norm.weight.detach().clone()
    optimizer.step()
    # Neither decayed nor adapted: exactly w − γg.
    assert torch.equal(net.norm.weight.detach(), before - 1.0)


@pytest.mark.parametrize("value", [-1e-4, float("nan"), float("inf"), True, "0.1", None])
def test_weight_decay_is_checked(value):
    with pytest.raises(ValueError, match=r"param_groups: weight_decay=.* must be a finite number"):
        param_groups(Net(), value)


@pytest.mark.parametrize("value", [-2, 1.0, True, None])
def test_exclude_ndim_is_checked(value):
    with pytest.raises(ValueError, match=r"param_groups: exclude_ndim=.* must be an int >= -1"):
        param_groups(Net(), 0.0, exclude_ndim=value)


@pytest.mark.parametrize("model", [[torch.ones(2)], [("w", 1.0)], [("a", torch.ones(2), 3)]])
def test_elements_must_be_pairs(model):
    with pytest.raises(TypeError, match=r"must be a module or \(name, parameter\) pairs"):
        param_groups(model, 0.0)


def test_other_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="there are no parameters"):
        param_groups(nn.ReLU(), 0.0)
    with pytest.raises(ValueError, match=r"parameter 'weight' has no shape yet"):
        param_groups(nn.LazyLinear(3), 0.0)
    with pytest.raises(ValueError, match="the name 'w' is used for two parameters"):
        param_groups([("w", torch.ones(2)), ("w", torch.ones(3))], 0.0)
    with pytest.raises(TypeError, match=r"exclude=3 is not allowed; must be a name pattern"):
        param_groups(Net(), 0.0, exclude=[3])


class ScaleNorm2d(nn.Module):
    """A normalisation layer that torch does not know."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 4, 1, 1))


def test_biases_and_normalisation_layers_of_any_number_of_dimensions_are_left_out():
    net = nn.ModuleDict({
        "layer": nn.LayerNorm([4, 3, 3]), "rms": nn.RMSNorm([4, 3]), "group": nn.GroupNorm(2, 4),
        "instance": nn.InstanceNorm2d(4, affine=True), "own": ScaleNorm2d(),
        "attend": nn.MultiheadAttention(4, 2, add_bias_kv=True), "conv": nn.Conv2d(3, 4, 3),
        "pre": nn.Sequential(nn.LayerNorm([3, 3]), nn.Linear(3, 3)),
    })  # fmt: skip
    net["conv"].relative_position_bias_table = nn.Parameter(torch.ones(9, 2))
    adapted, left_out = param_groups(net, 1e-4)
    matrices = ["attend.in_proj_weight", "attend.out_proj.weight", "conv.weight", "pre.1.weight"]
    assert names(adapted) == matrices
    assert {"layer.weight", "layer.bias", "rms.weight", "own.gain", "attend.bias_k",
            "attend.bias_v", "conv.relative_position_bias_table",
            "pre.0.weight"} <= set(names(left_out))  # fmt: skip
    # Without the modules the names are all there is to go by.
    assert "attend.bias_k" in names(param_groups(net.named_parameters(), 1e-4)[1])
    # Whoever wants tensors of one dimension adapted wants these, too.
    assert "layer.weight" in names(param_groups(net, 1e-4, exclude_ndim=0)[0])


def test_names_that_the_model_does_not_have_are_passed_over_unless_strict():
    listed = {"head.weight", "pos_embed", "cls_token"}
    adapted, left_out = param_groups(Net(), 1e-4, exclude=listed)
    assert names(adapted) == ["conv.weight"]
    assert "head.weight" in names(left_out)
    with pytest.raises(ValueError, match=r"exclude='(pos_embed|cls_token)' matches no parameter"):
        param_groups(Net(), 1e-4, exclude=listed, strict=True)
    with pytest.raises(ValueError, match=r"exclude='Head\.\*' matches no parameter"):
        param_groups(Net(), 1e-4, exclude=["head.weight", "Head.*"])
    with pytest.warns(UserWarning, match="none of the names in exclude is a parameter's"):
        param_groups(Net(), 1e-4, exclude=["module.head.weight"])
    with pytest.raises(TypeError, match="strict=1 is not allowed"):
        param_groups(Net(), 1e-4, strict=1)


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    groups = param_groups(Net(), numpy.float32(0.5), exclude_ndim=numpy.int64(1))
    assert type(groups[0]["weight_decay"]) is float
