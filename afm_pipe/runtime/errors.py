"""Exceptions that a user sees as one message, without a stack trace."""


class UserError(ValueError):
    """A mistake that the user can fix: the message says what was found, what was expected, and what to do."""


class UnwritableError(UserError):
    """The disk is full or not writable; existing files are intact."""


class NotFiniteError(UserError):
    """A non-finite loss at an update: the run has diverged."""

    def __init__(self, message: str, update: int) -> None:
        super().__init__(message)
        self.update = update


class RankLostError(UserError):
    """Another process of the group ended while this one waited for it."""
