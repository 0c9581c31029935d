"""The error that a user can mend."""


class UserError(Exception):
    """Something given is missing or wrong. The message is one sentence: the thing, its value, what is allowed."""
