"""The base class of all sections of a configuration, and the error that a check across keys raises.

Example: in a section x, in which key b needs key a, the check raises conflict("x.b", "needs x.a"), and the user reads
"configs/hh.yaml:12: x.b needs x.a".
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """The rules of every section: no unknown keys, no silent conversions, no later changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


@dataclass(frozen=True)
class Words:
    """How `--help` and the error messages write a type."""

    text: str


# A function of the user, which rmcore.host.imports imports when it is needed.
ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"), Words("module:function")]


def conflict(key: str, text: str) -> PydanticCustomError:
    """The error that a check across keys raises: the key with the mistake, and the rest of the sentence."""
    return PydanticCustomError("conflict", "{key} {text}", {"key": key, "text": text})
