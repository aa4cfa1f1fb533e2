"""Linear classifiers on frozen embeddings, compared by cross-validation.

Three kinds: the nearest class mean, logistic regression, and the zero-shot classifier of the texts; and blends of the
last with the first two. A blend of weights is a linear classifier again, as in WiSE-FT (Wortsman et al. 2022,
arXiv:2109.01903); that class means help a zero-shot classifier is Tip-Adapter's finding (Zhang et al. 2022,
arXiv:2207.09519).

Shapes: N pictures, C classes, E embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from siglip_hf.extras import missing

#: Inverse strengths of the penalty of the logistic regression that are tried, and shares of the zero-shot classifier.
PENALTIES = (0.001, 0.01, 0.1, 1.0)
SHARES = (0.0, 0.25, 0.5, 0.75)

ZERO_SHOT = "zero-shot"

# Pictures that candidates are compared on. The chosen one is fitted to all.
_MOST_COMPARED = 5_000
# A spread of less is none, as of pictures that are all the same.
_LEAST = 1e-6


@dataclass(frozen=True)
class Linear:
    """A classifier of unit embeddings.

    Attributes:
        weight: (C, E).
        bias: (C,).
    """

    weight: np.ndarray
    bias: np.ndarray

    def logits(self, embeds: np.ndarray) -> np.ndarray:
        """(N, C) of embeddings (N, E)."""
        return embeds @ self.weight.T + self.bias

    def scaled(self, factor: float) -> Linear:
        """The classifier whose logits are `factor` times as large."""
        return Linear(self.weight * factor, self.bias * factor)


@dataclass(frozen=True)
class Candidate:
    """What a kind of classifier reached on pictures that it had not been fitted to.

    Attributes:
        name: the kind, its penalty and its share of the zero-shot classifier.
        accuracy: share of pictures whose class it gave.
        log_loss: mean of minus the logarithm of the right class's probability, in nats, calibrated.
        factor: of the logits, for probabilities that hold.
        logits: (n, C) of the pictures compared, not calibrated.
    """

    name: str
    accuracy: float
    log_loss: float
    factor: float
    logits: np.ndarray


@dataclass(frozen=True)
class FewShot:
    """The best classifier, and how it was found.

    Attributes:
        classifier: fitted to all pictures; its softmax is the calibrated probability.
        means: (C, E) mean of each class's embeddings, scaled to length 1.
        candidates: all that were compared, best first.
        compared: numbers of the pictures that they were compared on, (n,).
        nearest: (n,) largest cosine of these with a mean of a class, of pictures of other folds.
        nearest_other: (n,) the same without the picture's own class, as if that had not been taught.
    """

    classifier: Linear
    means: np.ndarray
    candidates: list[Candidate]
    compared: np.ndarray
    nearest: np.ndarray
    nearest_other: np.ndarray

    @property
    def best(self) -> Candidate:
        """The candidate that the classifier is."""
        return self.candidates[0]


def check_sklearn() -> None:
    """Refuses to begin what would fail at its end.

    Raises:
        ImportError: if scikit-learn is missing, with what to type.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise missing("learning classes needs scikit-learn", "learn") from error


def fit_few_shot(embeds: np.ndarray, truth: np.ndarray, texts: np.ndarray, *, folds: int = 5, seed: int = 0) -> FewShot:
    """Compares the candidates and fits the best.

    It is chosen by the log loss, which tells more of a few pictures than their accuracy does.

    Args:
        embeds: (N, E) unit embeddings of pictures.
        truth: (N,) number of each one's class; each class has two pictures or more.
        texts: (C, E) unit embeddings of the classes' names.
        folds: parts that the pictures are cut into; no more than the smallest class has pictures.
        seed: of the cut.
    """
    check_sklearn()
    from sklearn.model_selection import StratifiedKFold

    compared = _some_of_each(truth, _MOST_COMPARED, seed)
    x, y = embeds[compared], truth[compared]
    folds = max(2, min(folds, int(np.bincount(y).min())))
    logits: dict[str, np.ndarray] = {}
    nearest, nearest_other = np.empty(len(x), np.float32), np.empty(len(x), np.float32)
    for kept, held in StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y):
        for name, classifier in _candidates(x[kept], y[kept], texts):
            logits.setdefault(name, np.empty((len(x), len(texts)), np.float32))[held] = classifier.logits(x[held])
        cosines = x[held] @ class_means(x[kept], y[kept]).T  # (n, C)
        nearest[held] = cosines.max(axis=1)
        cosines[np.arange(len(held)), y[held]] = -np.inf
        nearest_other[held] = cosines.max(axis=1)
    found = [_judge(name, values, y) for name, values in logits.items()]
    candidates = sorted(found, key=lambda one: (one.log_loss, one.name != ZERO_SHOT))
    best = candidates[0]
    fitted = next(one for name, one in _candidates(embeds, truth, texts, best.name) if name == best.name)
    return FewShot(fitted.scaled(best.factor), class_means(embeds, truth), candidates, compared, nearest, nearest_other)


def class_means(embeds: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Means (C, E) of the embeddings (N, E) of each class, scaled to length 1."""
    means = _means(embeds, truth)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def _means(embeds: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.stack([embeds[truth == number].mean(axis=0) for number in range(truth.max() + 1)])


def _some_of_each(truth: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Numbers of about `most` pictures, at least two of each class, in their order."""
    order = np.random.default_rng(seed).permutation(len(truth))
    each = max(2, most // (int(truth.max()) + 1))
    return np.sort(np.concatenate([order[truth[order] == number][:each] for number in range(truth.max() + 1)]))


def _candidates(x: np.ndarray, y: np.ndarray, texts: np.ndarray, only: str = "") -> Iterator[tuple[str, Linear]]:
    """Every classifier of these pictures by its name; of the kind that begins with `only` if that is given."""
    zero_shot = Linear(texts, np.zeros(len(texts), np.float32))
    spread = max(zero_shot.logits(x).std(), _LEAST)
    yield ZERO_SHOT, zero_shot
    kinds = {f"logistic regression C={penalty:g}": penalty for penalty in PENALTIES} | {"class means": 0.0}
    wanted = {kind: penalty for kind, penalty in kinds.items() if not only or only.partition(" + ")[0] == kind}
    regressions = _logistic_regressions(x, y, [penalty for penalty in wanted.values() if penalty])
    for kind, penalty in wanted.items():
        few_shot = next(regressions) if penalty else _nearest_mean(x, y)
        # Logits of equal spread, so that a share means the same for every kind.
        few_shot = few_shot.scaled(1 / max(few_shot.logits(x).std(), _LEAST))
        for share in SHARES:
            name = f"{kind} + {share:.0%} {ZERO_SHOT}" if share else kind
            weight = (1 - share) * few_shot.weight + share / spread * texts
            yield name, Linear(weight.astype(np.float32), ((1 - share) * few_shot.bias).astype(np.float32))


def _nearest_mean(x: np.ndarray, y: np.ndarray) -> Linear:
    """The nearest mean by Euclidean distance: ||x - m||^2 = ||x||^2 - 2 (x m - ||m||^2 / 2)."""
    means = _means(x, y)
    return Linear(means, -(means**2).sum(axis=1) / 2)


def _logistic_regressions(x: np.ndarray, y: np.ndarray, penalties: Sequence[float]) -> Iterator[Linear]:
    """One for each penalty, each begun where the one before ended."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    centre, scale = x.mean(axis=0), 1 / np.sqrt(max(x.var(axis=0).mean(), _LEAST))
    model = LogisticRegression(warm_start=True)
    for penalty in penalties:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # stopped early is a stronger penalty, compared as such
            model.set_params(C=penalty).fit((x - centre) * scale, y)
        weight, bias = model.coef_ * scale, model.intercept_ - model.coef_ @ (centre * scale)
        if len(weight) == 1:  # two classes: the second one's, relative to the first
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        yield Linear(weight.astype(np.float32), bias.astype(np.float32))


def _judge(name: str, logits: np.ndarray, truth: np.ndarray) -> Candidate:
    """Accuracy, and the log loss under the factor that makes it least (Guo et al. 2017, arXiv:1706.04599)."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    rows = np.arange(len(truth))
    # The right class's target is a little less than 1, as Platt has it: few pictures, all right, prove no certainty.
    slack = 1 / (len(truth) + 2)
    values = logits.astype(np.float64) / max(float(logits.std()), 1e-12)

    def loss(log_factor: float) -> float:
        log_probability = log_softmax(np.exp(log_factor) * values, axis=1)
        return float(-((1 - slack) * log_probability[rows, truth] + slack * log_probability.mean(axis=1)).mean())

    log_factor = float(minimize_scalar(loss, bounds=(-5.0, 7.0), method="bounded").x)
    probability = log_softmax(np.exp(log_factor) * values, axis=1)[rows, truth]
    factor = float(np.exp(log_factor)) / max(float(logits.std()), 1e-12)
    accuracy = float((logits.argmax(axis=1) == truth).mean())
    return Candidate(name, accuracy, float(-probability.mean()), factor, logits)
