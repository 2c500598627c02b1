"""The one exception that is shown to a person without a stack trace."""


class UserError(ValueError):
    """A mistake the user can mend: the message names what was found, what was expected and what to do."""


class UnwritableError(UserError):
    """A disk that is full or not writable; what was there before is unharmed."""


class NotFiniteError(UserError):
    """A loss that is no longer a number at an update: the training diverged."""

    def __init__(self, message: str, update: int) -> None:
        super().__init__(message)
        self.update = update


class RankLostError(UserError):
    """Another process ended while this one waited for it; that one reported why, or was killed."""
