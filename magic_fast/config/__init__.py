"""The YAML that mergekit users have, checked, and resolved into the tensors of the output.

Nothing here imports torch. :class:`MergeConfig` is the document and :func:`resolve_layout` lays it
over the names of the checkpoints. Which method takes which parameter stands in
``magic_fast.methods.registry``.
"""

from magic_fast.config.calibrate import CalibrateConfig
from magic_fast.config.layout import resolve_layout
from magic_fast.config.outputs import ModelView, OutputTensor, Source
from magic_fast.config.schema import MergeConfig

__all__ = [
    "CalibrateConfig",
    "MergeConfig",
    "ModelView",
    "OutputTensor",
    "Source",
    "resolve_layout",
]
