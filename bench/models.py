"""Parameter shapes of the benchmark models, derived from their architectures.

Each function returns `(name, shape)` for every trainable tensor, in the order of
`module.parameters()`, so that a benchmark needs neither the model's library nor its weights.
Buffers (running means) are not listed.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

Shape = tuple[int, ...]
Shapes = list[tuple[str, Shape]]


def adapted(name: str, shape: Shape) -> bool:
    """Whether the layer-wise rate applies: weights yes, biases and normalisation layers no."""
    return len(shape) > 1


def parameters(shapes: Shapes) -> int:
    return sum(prod(shape) for _, shape in shapes)


def _affine(name: str, shape: Shape) -> Shapes:
    """A convolution or a matrix, outputs first, with its bias."""
    return [(f"{name}.weight", shape), (f"{name}.bias", shape[:1])]


def _norm(name: str, width: int) -> Shapes:
    return [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]


# (name, outputs, inputs, kernel) and (name, outputs, inputs): one tower, as torchvision has it
# (Krizhevsky 2014); fc6 sees 256 maps of 6x6.
_ALEXNET_CONVS = (
    ("conv1", 64, 3, 11),
    ("conv2", 192, 64, 5),
    ("conv3", 384, 192, 3),
    ("conv4", 256, 384, 3),
    ("conv5", 256, 256, 3),
)
_ALEXNET_FULL = (("fc6", 4096, 256 * 6 * 6), ("fc7", 4096, 4096), ("fc8", 1000, 4096))


def alexnet() -> Shapes:
    """AlexNet, one tower (torchvision.models.alexnet)."""
    shapes: Shapes = []
    for name, outputs, inputs, kernel in _ALEXNET_CONVS:
        shapes += _affine(name, (outputs, inputs, kernel, kernel))
    for name, outputs, inputs in _ALEXNET_FULL:
        shapes += _affine(name, (outputs, inputs))
    return shapes


def alexnet_bn() -> Shapes:
    """AlexNet with batch normalisation instead of biases in every layer but the last.

    The LARS paper's AlexNet-BN in the widths of `alexnet`; no count of it is published.
    """
    shapes: Shapes = []
    for name, shape in alexnet():
        layer, kind = name.split(".")
        if layer != "fc8" and kind == "bias":
            shapes += _norm(f"{layer}.bn", shape[0])
        else:
            shapes.append((name, shape))
    return shapes


def resnet50() -> Shapes:
    """ResNet-50 (torchvision.models.resnet50): four stages of bottlenecks that widen four times."""
    shapes: Shapes = [("conv1.weight", (64, 3, 7, 7)), *_norm("bn1", 64)]
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            outputs = 4 * width
            shapes += [
                (f"{name}.conv1.weight", (width, inputs, 1, 1)),
                *_norm(f"{name}.bn1", width),
            ]
            shapes += [(f"{name}.conv2.weight", (width, width, 3, 3)), *_norm(f"{name}.bn2", width)]
            shapes += [
                (f"{name}.conv3.weight", (outputs, width, 1, 1)),
                *_norm(f"{name}.bn3", outputs),
            ]
            if block == 0:
                shapes.append((f"{name}.downsample.0.weight", (outputs, inputs, 1, 1)))
                shapes += _norm(f"{name}.downsample.1", outputs)
            inputs = outputs
    return shapes + _affine("fc", (1000, inputs))


# Widths of the nine inception modules (Szegedy et al. 2014, table 1):
# 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool projection.
_INCEPTION = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def googlenet() -> Shapes:
    """GoogLeNet as the LARS paper trains it: BVLC's, without its auxiliary heads.

    It has biases and no batch normalisation. torchvision's differs: normalisation instead of
    biases, and 3x3 kernels instead of 5x5.
    """
    shapes = _affine("conv1.7x7_s2", (64, 3, 7, 7))
    shapes += _affine("conv2.3x3_reduce", (64, 64, 1, 1))
    shapes += _affine("conv2.3x3", (192, 64, 3, 3))
    inputs = 192
    for module, (one, reduce3, three, reduce5, five, pool) in _INCEPTION.items():
        name = f"inception_{module}"
        shapes += _affine(f"{name}.1x1", (one, inputs, 1, 1))
        shapes += _affine(f"{name}.3x3_reduce", (reduce3, inputs, 1, 1))
        shapes += _affine(f"{name}.3x3", (three, reduce3, 3, 3))
        shapes += _affine(f"{name}.5x5_reduce", (reduce5, inputs, 1, 1))
        shapes += _affine(f"{name}.5x5", (five, reduce5, 5, 5))
        shapes += _affine(f"{name}.pool_proj", (pool, inputs, 1, 1))
        inputs = one + three + five + pool
    return shapes + _affine("loss3.classifier", (1000, inputs))


def vit_b_16() -> Shapes:
    """ViT-B/16 at 224x224 (torchvision.models.vit_b_16)."""
    width, depth, hidden, patch, side = 768, 12, 3072, 16, 224
    tokens = (side // patch) ** 2 + 1
    shapes: Shapes = [("class_token", (1, 1, width))]
    shapes += _affine("conv_proj", (width, 3, patch, patch))
    shapes.append(("encoder.pos_embedding", (1, tokens, width)))
    for layer in range(depth):
        name = f"encoder.layers.encoder_layer_{layer}"
        shapes += _norm(f"{name}.ln_1", width)
        shapes.append((f"{name}.self_attention.in_proj_weight", (3 * width, width)))
        shapes.append((f"{name}.self_attention.in_proj_bias", (3 * width,)))
        shapes += _affine(f"{name}.self_attention.out_proj", (width, width))
        shapes += _norm(f"{name}.ln_2", width)
        shapes += _affine(f"{name}.mlp.0", (hidden, width))
        shapes += _affine(f"{name}.mlp.3", (width, hidden))
    return shapes + _norm("encoder.ln", width) + _affine("heads.head", (1000, width))


def bert_large() -> Shapes:
    """BERT-large, uncased: the encoder with its pooler (transformers.BertModel)."""
    width, depth, hidden, vocabulary, positions = 1024, 24, 4096, 30522, 512
    shapes: Shapes = [
        ("embeddings.word_embeddings.weight", (vocabulary, width)),
        ("embeddings.position_embeddings.weight", (positions, width)),
        ("embeddings.token_type_embeddings.weight", (2, width)),
        *_norm("embeddings.LayerNorm", width),
    ]
    for layer in range(depth):
        name = f"encoder.layer.{layer}"
        for projection in ("query", "key", "value"):
            shapes += _affine(f"{name}.attention.self.{projection}", (width, width))
        shapes += _affine(f"{name}.attention.output.dense", (width, width))
        shapes += _norm(f"{name}.attention.output.LayerNorm", width)
        shapes += _affine(f"{name}.intermediate.dense", (hidden, width))
        shapes += _affine(f"{name}.output.dense", (width, hidden))
        shapes += _norm(f"{name}.output.LayerNorm", width)
    return shapes + _affine("pooler.dense", (width, width))


def tiny_tensors(count: int = 10_000) -> Shapes:
    """Many small matrices (8 to 512 elements): measures cost per tensor, not per element."""
    return [(f"tiny.{i}", (8, 1 + i % 64)) for i in range(count)]


def one_large_tensor() -> Shapes:
    """One matrix of 100 million elements: no cache holds it between its norm and its update."""
    return [("large", (10_000, 10_000))]


MODELS: dict[str, Callable[[], Shapes]] = {
    "AlexNet": alexnet,
    "AlexNet-BN": alexnet_bn,
    "ResNet-50": resnet50,
    "GoogLeNet": googlenet,
    "ViT-B/16": vit_b_16,
    "BERT-large": bert_large,
    "10,000 tiny tensors": tiny_tensors,
    "one 100M tensor": one_large_tensor,
}
