"""The one exception that is shown to a person without a stack trace."""


class UserError(ValueError):
    """A mistake the user can mend: the message names what was found, what was expected and what to do."""
