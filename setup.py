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

STUDY = ["matplotlib>=3.7", "scikit-image>=0.22", "scikit-learn>=1.3", "scipy>=1.11", "tqdm>=4.65"]
BENCH = ["matplotlib>=3.7", "pytest>=8", "pytest-benchmark>=4"]
TEST = [
    "build>=1.2",
    "expecttest>=0.2",
    "hypothesis>=6.100",
    "mypy>=1.11",
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-xdist>=3.5",
    "ruff>=0.11",
    "setuptools>=77",
]

setup(
    name="lars_fused",
    version=VERSION[1],
    description="Layer-wise adaptive rate scaling (LARS) for PyTorch in one Triton launch per step",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    # The import package lars_fused.kernels lies beside lars_fused/, not inside it: the name
    # `kernels` on its own belongs to another distribution.
    packages=["lars_fused", "lars_fused.distributed", "lars_fused.kernels", "lars_fused.study"],
    package_dir={"lars_fused": "lars_fused", "lars_fused.kernels": "kernels"},
    package_data={"lars_fused": ["py.typed"]},
    zip_safe=False,
    # Floors, not pins; constraints.txt holds the versions the tests ran with.
    install_requires=[
        "numpy>=1.26",
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
    ],
    extras_require={"study": STUDY, "bench": BENCH, "test": TEST + STUDY},
)
