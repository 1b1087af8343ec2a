"""The one exception whose text is meant for the user: a single line that names the remedy."""

from __future__ import annotations


class StudyError(Exception):
    """A request that cannot be met, or a file that cannot be read or written.

    The command line prints the text as it is and exits with status 1.
    """
