"""Numbers from a frozen model. Importing this package registers every evaluator."""

from passl.evaluators.classification import Classification
from passl.evaluators.evaluator import Evaluator, evaluate
from passl.evaluators.knn import KNN, knn_classify

__all__ = ["KNN", "Classification", "Evaluator", "evaluate", "knn_classify"]
