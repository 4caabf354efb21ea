"""The one exception for what a user can mend."""


class UserError(Exception):
    """A mistake in input or configuration: one line that names the thing, its value and the fix."""
