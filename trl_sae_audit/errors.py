"""The exceptions a user meets: a sentence that names what is wrong and what to do."""

from .text import sanitize_excerpt


class AuditError(ValueError):
    """Raised when the tool cannot do what was asked; its message says why and what to do about it.

    What it quotes from a file may come from anybody, so that no control character of it reaches the terminal.
    """

    def __str__(self) -> str:
        return sanitize_excerpt(super().__str__())


class NoDictionaryError(AuditError):
    """Raised when there is no SAE for a model to choose from.

    Attributes:
        reason: the message without its advice.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason} {advice}")
        self.reason = reason


class DirectoryTakenError(AuditError):
    """Raised when a directory holds the record of another run or another audit, or another writer is at work in it."""


class RecordWriteError(AuditError):
    """Raised when a run's record cannot be written at the moment; what was written before it stays as it is.

    Attributes:
        reason: what the operating system, or the state of the directory, has against it; the same as long as the
            cause is.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
