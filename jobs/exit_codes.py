"""Exit codes of `redux`."""

EXIT_FAULT = 1
"""A fault that may pass: `redux submit --retries` tries again."""

EXIT_MISUSE = 2
"""Something that the user has to change first."""

EXIT_INTERRUPTED = 130
"""Stopped by a signal: 128 + SIGINT, as a shell reports it."""
