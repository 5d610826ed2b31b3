"""Names of diffusion models: what the files of diffusers, of the models' authors and of ComfyUI
call one tensor, and what adapters of each convention do (docs/adapters.md).

``names.json`` is generated (``make diffusion-names``): diffusers' own converters, run on tensors of
tagged rows. ``families.json`` says which maps a model is made of, and the prefixes of its parts.
"""

from magic_fast.models.diffusion.families import Meaning, Part, families, meanings, recognised
from magic_fast.models.diffusion.names import Link, Naming

__all__ = ["Link", "Meaning", "Naming", "Part", "families", "meanings", "recognised"]
