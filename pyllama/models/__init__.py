"""Model definitions, one module per architecture family, and what they share."""

from pyllama.models.hparams import Hparams, ModelError, RopeOptions
from pyllama.models.model import ARCHITECTURES, KV_TYPES, Model, SequenceInput, load

__all__ = ["ARCHITECTURES", "KV_TYPES", "Hparams", "Model", "ModelError", "RopeOptions", "SequenceInput", "load"]
