"""Edits of latents in a model: add, set, scale, ablate, cap, project out; see docs/steering.md."""

from saelab.edits.build import (
    ablate,
    add,
    cap,
    from_yaml,
    project_out,
    scale,
    set_to,
    to_yaml,
)
from saelab.edits.config import EditConfig, TokenPattern, Where
from saelab.edits.latents import Directions, Editable, Handle, LatentEdit, Scales, measure_scales
from saelab.edits.standing import Steering, steer

__all__ = [
    "Directions",
    "EditConfig",
    "Editable",
    "Handle",
    "LatentEdit",
    "Scales",
    "Steering",
    "TokenPattern",
    "Where",
    "ablate",
    "add",
    "cap",
    "from_yaml",
    "measure_scales",
    "project_out",
    "scale",
    "set_to",
    "steer",
    "to_yaml",
]
