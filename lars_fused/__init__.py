"""LARS for PyTorch: all layers' norms and updates in one Triton launch.

    from lars_fused import LARS

    optimizer = LARS(model.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)

Importing this package needs neither a GPU nor triton.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parent
if not (_ROOT / "kernels").is_dir() and (_ROOT.parent / "kernels" / "lars_step.py").is_file():
    # A checkout that is not installed: `lars_fused.kernels` lies beside the package.
    __path__.append(str(_ROOT.parent))

from . import conventions  # noqa: E402
from .checkpoints import convert_state_dict  # noqa: E402
from .functional import lars_step  # noqa: E402
from .groups import param_groups  # noqa: E402
from .layer_stats import LayerStats  # noqa: E402
from .norms import clip_grad_norm_, multi_tensor_l2norm  # noqa: E402
from .optimizer import LARS  # noqa: E402
from .schedule import WarmupPolynomialLR, scaled_lr  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "LARS",
    "LayerStats",
    "WarmupPolynomialLR",
    "clip_grad_norm_",
    "conventions",
    "convert_state_dict",
    "lars_step",
    "multi_tensor_l2norm",
    "param_groups",
    "scaled_lr",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
