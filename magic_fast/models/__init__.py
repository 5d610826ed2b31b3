"""What a tensor is: the one room that knows models (docs/models.md)."""

from magic_fast.models.assign import roles_of
from magic_fast.models.choice import TensorChoice
from magic_fast.models.model_roles import ModelRoles, Source, StackFields
from magic_fast.models.quantised import Quantisation, quantisation_of
from magic_fast.models.roles import MAPS, Block, Experts, Kind, Role, Step, Tensors

__all__ = [
    "MAPS",
    "Block",
    "Experts",
    "Kind",
    "ModelRoles",
    "Quantisation",
    "Role",
    "Source",
    "StackFields",
    "Step",
    "TensorChoice",
    "Tensors",
    "quantisation_of",
    "roles_of",
]
