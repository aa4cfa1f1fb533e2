"""How well a model tells pictures and texts apart."""

from siglip_hf.evaluation.clip_benchmark import Benchmark, as_clip_benchmark, open_benchmark
from siglip_hf.evaluation.retrieval import RetrievalRecall, retrieval_recall
from siglip_hf.evaluation.run import Evaluation, evaluate, with_truth
from siglip_hf.evaluation.zero_shot import ClassAccuracy, ZeroShotAccuracy, name_classes, zero_shot_accuracy

__all__ = [
    "Benchmark",
    "ClassAccuracy",
    "Evaluation",
    "RetrievalRecall",
    "ZeroShotAccuracy",
    "as_clip_benchmark",
    "evaluate",
    "name_classes",
    "open_benchmark",
    "retrieval_recall",
    "with_truth",
    "zero_shot_accuracy",
]
