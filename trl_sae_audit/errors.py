"""The one exception a user meets: a sentence that names what is wrong and what to do."""


class AuditError(ValueError):
    """Raised when the tool cannot do what was asked; its message says why and what to do about it."""
