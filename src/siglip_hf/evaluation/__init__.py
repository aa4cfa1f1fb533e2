"""How well a model tells pictures and texts apart."""

from siglip_hf.evaluation.retrieval import RetrievalRecall, retrieval_recall
from siglip_hf.evaluation.run import Evaluation, evaluate, with_truth
from siglip_hf.evaluation.zero_shot import ClassAccuracy, ZeroShotAccuracy, name_classes, zero_shot_accuracy

__all__ = [
    "ClassAccuracy",
    "Evaluation",
    "RetrievalRecall",
    "ZeroShotAccuracy",
    "evaluate",
    "name_classes",
    "retrieval_recall",
    "with_truth",
    "zero_shot_accuracy",
]
