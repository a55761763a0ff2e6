"""Experiments of the paper as data: what to run, and which numbers were published. One YAML file an experiment."""

from cats_llm.recipes.compare import Comparison, compare
from cats_llm.recipes.load import find, names, smoke_data
from cats_llm.recipes.recipe import (
    BenchPlan,
    CalibrationSection,
    EvaluationPlan,
    Expected,
    FinetuningPlan,
    Quantity,
    Recipe,
    ThresholdPlan,
)

__all__ = [
    "BenchPlan",
    "CalibrationSection",
    "Comparison",
    "EvaluationPlan",
    "Expected",
    "FinetuningPlan",
    "Quantity",
    "Recipe",
    "ThresholdPlan",
    "compare",
    "find",
    "names",
    "smoke_data",
]
