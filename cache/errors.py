"""Every error a user can cause; the lowest module, so that all rooms may raise them.

A message is one line: what failed, the actual value, the limit, and what to do about it.
`exit_code` is what the command line returns (docs/cli.md lists them).
"""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its class if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class MoeLocalError(Exception):
    """Base of all errors a user of moe-local can cause or meet."""

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
    """No such alias, Hub repository or folder."""

    exit_code = 4


class BusyError(MoeLocalError):
    """More is asked for at once than can be answered or may wait."""


class CheckpointError(MoeLocalError):
    """A checkpoint is incomplete, damaged, or not a Mixture-of-Experts model."""


class ExpertFileError(MoeLocalError):
    """An expert file is damaged or belongs to another checkpoint, revision or format."""


class TransferError(MoeLocalError):
    """Bringing an expert to its slot failed: a read or copy error, or a time-out."""


class RoutesError(MoeLocalError):
    """A file of recorded routes cannot be read, is damaged, or does not hold what is asked of it."""
