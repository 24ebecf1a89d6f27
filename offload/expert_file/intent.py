"""The formats chosen for an expert file, written to its folder before any expert is converted.

When an interrupted conversion is started again, what the choice was based on may have changed: the free
memory, measured bandwidths, this program's version. The conversion then continues with the intent that was
written. It stays beside the finished file, since a repair removes the manifest for a while, and is deleted
only with the folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_local.cache.errors import ExpertFileError, MoeLocalError
from moe_local.cache.files import parse_json, write_atomically
from moe_local.offload.expert_file.expert_file import checksum_of
from moe_local.offload.expert_file.expert_shard import disk_errors
from moe_local.offload.options import LoadOptions
from moe_local.offload.quantize.mix import Mix, is_mixed

logger = logging.getLogger(__name__)

INTENT = "intent.json"

VERSION = 1


@dataclass(frozen=True, slots=True)
class Intent:
    """The formats to which a checkpoint's experts are converted in one folder, and how they were chosen.

    Validated when made: raises ExpertFileError if `experts` and `mix` contradict each other.
    """

    model: str
    """The name that the user gave the model."""
    fingerprint: str
    """The checkpoint's fingerprint."""
    experts: str
    """In canonical spelling: "mixed:3.5", or the one format that "auto" has chosen."""
    mix: Mix | None = None
    """The format of each expert, for "mixed:BITS"."""
    budget: str | None = None
    """The options that experts "auto" had to fit, as LoadOptions.budget; None: asked for by name."""
    text: str | None = None
    """Names the text by which the mix was chosen (Sensitivity.text); None: by the weights alone."""

    def __post_init__(self) -> None:
        if self.mix is None if is_mixed(self.experts) else self.mix is not None:
            raise ExpertFileError(f"experts {self.experts} {'without' if self.mix is None else 'with'} a mix")
        if self.mix is not None and self.mix.name != self.experts:
            raise ExpertFileError(f"experts {self.experts} with a mix that is called {self.mix.name}")

    def keep(self, folder: Path) -> None:
        """Write the intent durably to `folder`. Raises DoesNotFitError or ExpertFileError on failure."""
        fields = self._fields()
        with disk_errors(folder / INTENT):
            write_atomically(folder / INTENT, [json.dumps(fields | {"checksum": checksum_of(fields)}), "\n"])

    @classmethod
    def read(cls, folder: Path, fingerprint: str, *, say: bool = False) -> Intent | None:
        """The intent in `folder` for the checkpoint with this fingerprint.

        None if there is none, or if it is damaged, of another version or of another checkpoint. With `say`
        these cases are logged, since the conversion that was begun cannot be continued then.
        """
        path, why = folder / INTENT, "damaged"
        try:
            fields = parse_json(path.read_bytes())
            if fields["version"] != VERSION:
                why = f"of version {str(fields['version'])[:20]}, not {VERSION}"
            elif fields.pop("checksum") == checksum_of(fields):
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
