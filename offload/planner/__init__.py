"""Reckons how a model would be trained on a machine, before anything is downloaded, bought or run.

Takes a model's configuration, a `Machine` and budgets; answers with homes, windows, predicted times, peaks
and wear, or with what is lacking and the nearest plan that fits. Pure: no file, no weight, no device.
"""

from .document import to_document, to_json
from .model import ModelFacts, config_of_shape, describe_config, describe_model
from .plan import Lack, TrainingPlan
from .question import Question, default_budgets
from .search import Answer, Suggestion, plan_training
from .shapes import SHAPES, find_shape

__all__ = [
    "SHAPES",
    "Answer",
    "Lack",
    "ModelFacts",
    "Question",
    "Suggestion",
    "TrainingPlan",
    "config_of_shape",
    "default_budgets",
    "describe_config",
    "describe_model",
    "find_shape",
    "plan_training",
    "to_document",
    "to_json",
]
