"""Numbers from a frozen model. Importing this package registers every evaluator."""

from passl.evaluators.classification import Classification
from passl.evaluators.copy_detection import CopyDetection
from passl.evaluators.evaluator import Evaluator, evaluate
from passl.evaluators.features import Features
from passl.evaluators.knn import KNN, knn_classify
from passl.evaluators.linear_sweep import LinearSweep
from passl.evaluators.logistic import LogisticRegression
from passl.evaluators.region_extraction import RegionExtraction
from passl.evaluators.retrieval import ImageRetrieval
from passl.evaluators.video_segmentation import VideoSegmentation

__all__ = [
    "KNN",
    "Classification",
    "CopyDetection",
    "Evaluator",
    "Features",
    "ImageRetrieval",
    "LinearSweep",
    "LogisticRegression",
    "RegionExtraction",
    "VideoSegmentation",
    "evaluate",
    "knn_classify",
]
