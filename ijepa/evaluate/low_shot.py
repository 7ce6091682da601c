"""Low-shot probes: few labels a class, and logistic regression (paper Tables 6 to 12).

The paper does not say by which solver. VISSL's protocol is taken: standardised features and
multinomial logistic regression with C = n / lambda, n being the number of labelled images. Needs
scikit-learn (extra `eval`).
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from ijepa.counter_rng import derive_keys, random_bits

LAMBDAS = (1.0, 0.1, 0.01, 0.001)
_STREAM = 0x10057
_ITERATIONS = 1000


def draw_per_class(labels: np.ndarray, count: int, classes: int, seed: int) -> np.ndarray:
    """Numbers of `count` images of each class, in ascending order, by a draw of this seed.

    Raises:
        ValueError: a class has fewer images.
    """
    if count < 1:
        raise ValueError(f"labels a class must be at least 1, got {count}")
    there = np.bincount(labels, minlength=classes)
    if there.min() < count:
        scarce = int(there.argmin())
        raise ValueError(
            f"class {scarce} has {there[scarce]} images, fewer than {count} labels a class"
        )
    key = derive_keys(seed, _STREAM).reshape(1)
    order = random_bits(key, len(labels))[0].argsort(kind="stable")
    chosen = [order[labels[order] == label][:count] for label in range(classes)]
    return np.sort(np.concatenate(chosen))


def listed_images(file: Path, names: list[str]) -> np.ndarray:
    """Numbers of the images that a list names, one file name a line, as 1percent.txt of SimCLR.

    Args:
        names: of the images; a line means the one with the same last part.

    Raises:
        ValueError: no such list, or names of it that no image has.
    """
    try:
        wanted = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the list {file} cannot be read: {error}") from None
    wanted = [Path(line).name for line in wanted if line]
    number = {Path(name).name: place for place, name in enumerate(names)}
    if len(number) < len(names):
        raise ValueError(f"{len(names) - len(number)} images share their file name with others")
    unknown = [name for name in wanted if name not in number]
    if unknown or not wanted:
        found = f"{len(unknown)} of {len(wanted)} names in {file} are of no image"
        raise ValueError(f"{found}, as {unknown[0]}" if unknown else f"the list {file} is empty")
    return np.sort(np.array([number[name] for name in set(wanted)]))


def logistic_accuracies(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    lambdas: tuple[float, ...] = LAMBDAS,
) -> dict[float, float]:
    """lambda -> accuracy in [0, 1] on the test rows.

    Args:
        train_features, test_features: (n, D) and (m, D).
        train_labels, test_labels: (n,) and (m,) integers.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: labels of one class alone.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            f"low-shot probes need scikit-learn (pip install 'ijepa[eval]'): {error}"
        ) from None
    if len(np.unique(train_labels)) < 2:
        raise ValueError("a low-shot probe needs labels of at least two classes")
    scaler = StandardScaler().fit(np.asarray(train_features, dtype=np.float64))
    train, test = scaler.transform(train_features), scaler.transform(test_features)
    accuracies = {}
    for strength in lambdas:
        model = LogisticRegression(C=len(train) / strength, max_iter=_ITERATIONS)
        with warnings.catch_warnings():
            # Few images in many dimensions can be told apart without error: there the weights grow
            # for ever, and where they stop growing no longer changes what is predicted.
            warnings.simplefilter("ignore")
            model.fit(train, train_labels)
        accuracies[strength] = float(model.score(test, test_labels))
    return accuracies
