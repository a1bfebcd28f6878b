"""The ways a stage can end badly. Each carries its exit code; none of them shows a traceback."""


class PosttrainError(Exception):
    """A failure that the person at the terminal can act on. `str(error)` is the whole message."""

    exit_code = 2


class UserFault(PosttrainError):
    """Config, data or a missing file: the user's to mend. Exit 2."""


def faults_in(what: str, faults: list[str], most: int = 5) -> UserFault:
    """The fault of a file with many: what they are, the first `most`, and how many more there are."""
    more = f"\n  ... and {len(faults) - most} more" if len(faults) > most else ""
    return UserFault(f"{what}\n  " + "\n  ".join(faults[:most]) + more)


class WontFit(PosttrainError):
    """Not enough GPU memory or disk. Exit 3."""

    exit_code = 3


class CheckFailed(PosttrainError):
    """A gate, a verification or a safety stop failed: NaN, merged != adapter, template mismatch. Exit 4."""

    exit_code = 4


class Interrupted(PosttrainError):
    """Ctrl-C or SIGTERM; what was done so far is saved and the same command goes on. Exit 130."""

    exit_code = 130
