"""What an expert file is to hold where that was chosen, kept in its folder before any expert is converted.

What a choice depends on may be another when a conversion that was killed begins again: the memory that is
free, measured bandwidths, this program's version. The intent is what it goes on with all the same. It stays
beside the finished file, since a repair takes the manifest away for a while, and goes with the folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from moe_local.cache.errors import ExpertFileError, MoeLocalError
from moe_local.cache.files import parse_json, write_atomically
from moe_local.offload.expert_file.expert_shard import disk_errors
from moe_local.offload.options import LoadOptions
from moe_local.offload.quantize.mix import Mix, is_mixed

logger = logging.getLogger(__name__)

INTENT = "intent.json"

VERSION = 1


@dataclass(frozen=True, slots=True)
class Intent:
    """What the experts of one checkpoint are to be converted to in one folder, and what that was chosen by.

    Well-formed once it is made: raises ExpertFileError where `experts` and `mix` contradict each other.
    """

    model: str
    """What it was called."""
    fingerprint: str
    """The checkpoint's."""
    experts: str
    """In canonical spelling: "mixed:3.5", or the one format that "auto" has come to."""
    mix: Mix | None = None
    """The format of each expert of a "mixed:BITS"."""
    budget: str | None = None
    """What experts "auto" was to fit, as LoadOptions.budget has it; None: these were asked for by name."""
    text: str | None = None
    """Names the text that the mix was chosen by (Sensitivity.text); None: by the weights alone."""

    def __post_init__(self) -> None:
        if self.mix is None if is_mixed(self.experts) else self.mix is not None:
            raise ExpertFileError(f"experts {self.experts} {'without' if self.mix is None else 'with'} a mix")
        if self.mix is not None and self.mix.name != self.experts:
            raise ExpertFileError(f"experts {self.experts} with a mix that is called {self.mix.name}")

    def keep(self, folder: Path) -> None:
        """Put it, durably, into `folder`. Raises DoesNotFitError or ExpertFileError if that cannot be."""
        fields = self._fields()
        with disk_errors(folder / INTENT):
            write_atomically(folder / INTENT, [json.dumps(fields | {"checksum": _checksum(fields)}), "\n"])

    @classmethod
    def read(cls, folder: Path, fingerprint: str, *, say: bool = False) -> Intent | None:
        """What is kept in `folder` for the checkpoint with this fingerprint.

        None if there is nothing, or something that is damaged, of another version or of another checkpoint;
        of these a line is logged with `say`, since what was begun does not go on then.
        """
        path, why = folder / INTENT, "damaged"
        try:
            fields = parse_json(path.read_bytes())
            if fields["version"] != VERSION:
                why = f"of version {str(fields['version'])[:20]}, not {VERSION}"
            elif fields.pop("checksum") == _checksum(fields):
                found = cls._of(fields)
                if found.fingerprint == fingerprint:
                    return found
                why = "of another checkpoint"
        except FileNotFoundError:
            return None
        except OSError as error:
            why = f"not readable: {error.strerror or error}"
        except MoeLocalError:
            why = "of another version, with formats that are unknown here"
        except (ValueError, LookupError, TypeError, AttributeError):
            pass
        if say:
            logger.warning("%s is %s, so formats are chosen anew", path, why)
        return None

    def _fields(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "experts": self.experts,
            "formats": None if self.mix is None else [list(layer) for layer in self.mix.formats],
            "budget": self.budget,
            "text": self.text,
        }

    @classmethod
    def _of(cls, fields: Mapping[str, Any]) -> Intent:
        """Raises KeyError, TypeError, ValueError, or ExpertFileError or OptionError for what is no intent."""
        experts, rows = str(fields["experts"]), fields["formats"]
        if LoadOptions(experts=experts).experts != experts:
            raise ValueError(f"experts {experts!r} in another spelling")
        mix = None if rows is None else Mix(experts, tuple(tuple(map(str, layer)) for layer in rows))
        return cls(
            str(fields["model"]),
            str(fields["fingerprint"]),
            experts,
            mix,
            _text_or_none(fields["budget"]),
            _text_or_none(fields["text"]),
        )


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)


def _checksum(fields: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(fields, sort_keys=True).encode())
