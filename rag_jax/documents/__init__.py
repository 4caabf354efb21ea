"""Documents to passages: files to Markdown, Markdown to pieces of so many tokens, copies dropped.

Imports `files` and `untrusted` alone. What reads the formats of others comes with the extra `documents`.
"""
