"""Model definitions, one module per architecture family, and what they share."""

from pyllama.models.hparams import Hparams, ModelError, RopeOptions
from pyllama.models.model import ARCHITECTURES, Model, SequenceInput, load

__all__ = ["ARCHITECTURES", "Hparams", "Model", "ModelError", "RopeOptions", "SequenceInput", "load"]
