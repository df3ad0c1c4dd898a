"""Package metadata. Tool settings live in pyproject.toml, tested versions in constraints*.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Read `__version__` without importing the package: that would need torch at build time."""
    text = (ROOT / "hf_semckd" / "version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if found is None:
        raise RuntimeError('hf_semckd/version.py must hold a line like: __version__ = "1.2.3"')
    return found.group(1)


def read_long_description() -> str:
    """Return README.md, or nothing where it is missing (a build from a partial tree)."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


# Every lower bound below except torch's is a version that `make test-minimum` installs: keep constraints-minimum.txt
# in step. torch's is the one transformers itself asks for; it was tried by hand, with Python 3.10.
REQUIRED = [
    "torch>=2.6",
    "transformers>=5.0,<6",
    "accelerate>=1.12",
    "datasets>=4.0",
    "evaluate>=0.4",
    "huggingface-hub>=1.3",
    "safetensors>=0.4.3",
    "numpy>=2.0",
    # Come with datasets, torch and huggingface-hub; imported by name.
    "pyarrow>=16.1",
    "jinja2>=3.1",
    "pyyaml>=6.0",
    # Reads the images of recipes.
    "pillow>=10.1",
]

PLOTS = ["matplotlib>=3.9"]
DEMO = [*PLOTS, "scikit-learn>=1.5", "scipy>=1.13"]
# Recipes that learn from sounds.
AUDIO = ["soundfile>=0.12", "scipy>=1.13"]
# Reads the pretrained image model that scripts/fetch_image_parts.py fetches.
IMAGES = ["onnx>=1.17"]
# Models as ONNX files, and running them.
ONNX = ["onnx>=1.20", "onnxscript>=0.6", "onnxruntime>=1.24.1"]
# ZeRO: gradients, optimizer and weights divided among processes.
ENGINES = ["deepspeed>=0.19"]
TEST = [
    *DEMO,
    *AUDIO,
    *ONNX,
    "pytest>=8.2",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "tensorboard>=2.17",
    "peft>=0.18",
]
# Teachers in 8 or 4 bits.
QUANTIZED = ["bitsandbytes>=0.50", "torchao>=0.18"]
QUALITY = ["ruff>=0.17", "mypy>=2.4", "import-linter>=2.15"]
# markdown-it-py comes with myst-parser; scripts/screenshots.py imports it by name.
DOCS = ["sphinx>=8.1", "myst-parser>=4.0", "markdown-it-py>=3.0", "furo>=2024.8.6"]

EXTRAS = {
    "plots": PLOTS,
    "demo": DEMO,
    "audio": AUDIO,
    "images": IMAGES,
    "onnx": ONNX,
    "engines": ENGINES,
    "quantized": QUANTIZED,
    "test": TEST,
    "quality": QUALITY,
    "docs": DOCS,
    "dev": [*TEST, *QUALITY, *DOCS],
}

setup(
    name="hf-semckd",
    version=read_version(),
    description="Knowledge distillation for Hugging Face models with semantic calibration (SemCKD)",
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["knowledge distillation", "model compression", "SemCKD", "transformers", "pytorch"],
    packages=find_packages(include=["hf_semckd", "hf_semckd.*"]),
    package_data={"hf_semckd": ["*.pyi", "py.typed"], "hf_semckd.publishing": ["*.jinja"]},
    entry_points={"console_scripts": ["hf-semckd = hf_semckd.cli:main"]},
    python_requires=">=3.10",
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    zip_safe=False,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
