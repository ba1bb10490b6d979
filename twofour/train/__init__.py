"""The PyTorch side: prune, fine-tune with the masks held, export."""

from twofour.train.export import export_onnx
from twofour.train.recover import Progress, Schedule, evaluate, finetune, load_checkpoint, predict
from twofour.train.sparsify import LayerReport, Sparsifier

__all__ = [
    "LayerReport",
    "Progress",
    "Schedule",
    "Sparsifier",
    "evaluate",
    "export_onnx",
    "finetune",
    "load_checkpoint",
    "predict",
]
