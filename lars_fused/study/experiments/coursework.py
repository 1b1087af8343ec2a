"""What a coursework on learning rules published, as data: the text that `rules` follows.

"MLP Coursework 2: Learning rules, BatchNorm, and ConvNets" (s1765864): EMNIST Balanced, 100,000
training, 15,800 validation and 15,800 test images in 47 classes, pixels in [0, 1]; a 100-100
multilayer network with Glorot initialisation, mini-batches of 50, 100 epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

BATCH = 50
SGD_RATES = (0.1, 0.03, 0.01, 0.003, 0.001)
RMSPROP_RATES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
RMSPROP_DECAY = 0.9
ADAM_RATES = (0.1, 0.01, 0.001, 0.0001)
ADAM_BETA1 = (0.0, 0.9)
ADAM_BETA2 = (0.9, 0.99, 0.999, 0.9999)
CHOSEN = (0.0001, 0.9, 0.9999)
"""Adam's η, β1 and β2 of sections 4 to 6."""

LARS_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
LARS_MOMENTA = (0.0, 0.9)
LARS_DECAYS = (0.0, 0.0005)
"""Ours: the coursework had no LARS. As many points as Adam's grid."""


@dataclass(frozen=True)
class Published:
    """Accuracies in percent, losses ("error" there); None where the text has no number."""

    validation: float | None = None
    validation_loss: float | None = None
    test: float | None = None
    test_loss: float | None = None
    first_epoch: float | None = None
    epoch: str = ""
    remark: str = ""


RULES = {
    "sgd": Published(remark="numbers only in a picture; over-fits from about epoch 10 at 0.1"),
    "rmsprop": Published(82.7, epoch="6 to 9", remark="at 0.001; ± 0.4; learns nothing from 0.1"),
    "adam": Published(83.5, epoch="10 to 12", remark="0.001, β1 0, β2 0.9999; ± 0.3; also 0.0001"),
    "lars": Published(remark="not in the text"),
}

_DENSE = Published(
    84.2, 0.493, 82.22, 0.547, epoch="7",
    remark="section 6; it \"did have\" batch normalisation, with which section 4 averages 72.3",
)  # fmt: skip
NETWORKS = {
    "mlp": _DENSE,
    "mlp-bn": _DENSE,
    "mlp-bn-frozen": Published(
        72.3, epoch="of 100", remark="section 4; ± 5.6; the library's defect"
    ),
    "conv1": Published(87.44, 0.363, 86.76, 0.397, 83.7, "7", "sections 5 and 6"),
    "conv2": Published(87.1, first_epoch=83.2, epoch="below 10", remark="section 5"),
}
