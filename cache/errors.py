"""Every error that a user can cause. This module imports nothing, so that all others can import it.

A message is one line: what failed, the actual value, the limit, and what to do about it.
`exit_code` is what the command line returns (docs/cli.md lists them).
"""

SHOWN = 60
"""Characters of a wrong value in an error."""


def shown(value: object) -> str:
    """A wrong value, short enough for a line of an error."""
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class MoeLocalError(Exception):
    """Base of all errors that a user of moe-local can cause or encounter."""

    exit_code = 1


class OptionError(MoeLocalError, ValueError):
    """An argument, flag or environment variable has a value that is not allowed."""

    exit_code = 2


class ContextLengthError(OptionError):
    """A prompt has more tokens than the context holds."""


class DoesNotFitError(MoeLocalError):
    """The model does not fit the memory or disk budget."""

    exit_code = 3


class ModelNotFoundError(MoeLocalError):
    """There is no such alias, Hub repository or folder."""

    exit_code = 4


class BusyError(MoeLocalError):
    """There are more requests at once than can be answered or queued."""


class CheckpointError(MoeLocalError):
    """A checkpoint is incomplete, damaged, or not a Mixture-of-Experts model."""


class ExpertFileError(MoeLocalError):
    """An expert file is damaged or belongs to another checkpoint, revision or format."""


class TransferError(MoeLocalError):
    """Loading an expert into its slot failed: a read or copy error, or a time-out."""


class RoutesError(MoeLocalError):
    """A file of recorded routes cannot be read, is damaged, or does not hold what is asked of it."""
