"""The one exception for what the user can fix."""


class UserError(Exception):
    """A mistake in input or configuration: one line that names the thing, its value and the fix."""
