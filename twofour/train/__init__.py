"""The PyTorch side: prune, fine-tune with the masks held, export."""

from twofour.train.recover import Progress, Schedule, evaluate, finetune, predict
from twofour.train.sparsify import LayerReport, Sparsifier

__all__ = [
    "LayerReport",
    "Progress",
    "Schedule",
    "Sparsifier",
    "evaluate",
    "finetune",
    "predict",
]
