"""The base of all errors that a user can correct."""


class UserError(Exception):
    """An input is missing or wrong; the message is one sentence that names it, its value and what is allowed."""
