"""How well a model tells pictures and texts apart."""

from siglip_hf.evaluation.measures import (
    ClassAccuracy,
    Evaluation,
    RetrievalRecall,
    ZeroShotAccuracy,
    evaluate,
    retrieval_recall,
    with_truth,
    zero_shot_accuracy,
)

__all__ = [
    "ClassAccuracy",
    "Evaluation",
    "RetrievalRecall",
    "ZeroShotAccuracy",
    "evaluate",
    "retrieval_recall",
    "with_truth",
    "zero_shot_accuracy",
]
