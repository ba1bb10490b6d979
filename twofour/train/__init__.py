"""The PyTorch side: prune, fine-tune with the masks held, export."""

from twofour.train.batchnorm import reestimate_batchnorm
from twofour.train.checkpoint import Progress, load_checkpoint
from twofour.train.distill import Distiller
from twofour.train.experts import MaskedMlp, MixtureOfExperts, balance_loss
from twofour.train.export import export_onnx
from twofour.train.fake_quant import FakeQuant
from twofour.train.fold_batchnorm import fold_batchnorm, freeze_batchnorm
from twofour.train.gradual import Gradual
from twofour.train.permute import permute
from twofour.train.permute_report import PermutationReport
from twofour.train.quantize import Quantizer
from twofour.train.quantize_plan import QuantizerOptions
from twofour.train.reconstruct import ReconstructOptions
from twofour.train.recover import evaluate, finetune, predict
from twofour.train.regularize import Shrink
from twofour.train.report import LayerReport
from twofour.train.schedule import AdamW, Schedule, Sgd
from twofour.train.sensitivity import ScanOptions, sensitivity
from twofour.train.sparsify import Sparsifier
from twofour.train.srste import SrSte

__all__ = [
    "AdamW",
    "Distiller",
    "FakeQuant",
    "Gradual",
    "LayerReport",
    "MaskedMlp",
    "MixtureOfExperts",
    "PermutationReport",
    "Progress",
    "Quantizer",
    "QuantizerOptions",
    "ReconstructOptions",
    "ScanOptions",
    "Schedule",
    "Sgd",
    "Shrink",
    "Sparsifier",
    "SrSte",
    "balance_loss",
    "evaluate",
    "export_onnx",
    "finetune",
    "fold_batchnorm",
    "freeze_batchnorm",
    "load_checkpoint",
    "permute",
    "predict",
    "reestimate_batchnorm",
    "sensitivity",
]
