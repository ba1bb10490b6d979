"""Does the network still do its job: accuracy and the gate, and a model against its engine."""

from twofour.evaluate.blame import Blame, Blamed
from twofour.evaluate.budget import Budget, BudgetOptions, Mixed
from twofour.evaluate.compare import BlameOptions, CompareOptions, Comparison, Scores, compare
from twofour.evaluate.differences import Difference
from twofour.evaluate.layers import LayerDifference, Layers
from twofour.evaluate.sensitivity import Scanner, SensitivityOptions, sensitivity

__all__ = [
    "Blame",
    "BlameOptions",
    "Blamed",
    "Budget",
    "BudgetOptions",
    "CompareOptions",
    "Comparison",
    "Difference",
    "LayerDifference",
    "Layers",
    "Mixed",
    "Scanner",
    "Scores",
    "SensitivityOptions",
    "compare",
    "sensitivity",
]
