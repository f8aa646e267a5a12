"""The bounds that the tools keep."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ToolLimits"]


@dataclass(frozen=True, kw_only=True)
class ToolLimits:
    """How much a tool may take and give. Sizes are in bytes and times in seconds unless a name says otherwise.

    Attributes:
        default_timeout: of a `bash` command that asks for none.
        max_timeout: the longest that a `bash` command may ask for; a longer wish is cut to this.
        file_timeout: of one `read`, `write` or `edit`.
        search_timeout: of one `glob` or `grep`.
        provider_slack: that a sandbox's provider gets to answer, beyond the time that a command may take. Adapters have
            deadlines of their own: this one is for what hangs all the same.
        max_file_bytes: the largest text file that `read` takes whole and that `edit` changes.
        max_image_base64_bytes: the largest image, counted after base64.
        max_pdf_bytes: the largest PDF.
        max_chars: characters of text in one result. The platform moves a result of more than 100,000 characters
            out of the model's sight (https://platform.claude.com/docs/en/managed-agents/tools).
        glob_results: paths in one `glob` result.
        glob_entries: directory entries that one `glob` looks at.
    """

    default_timeout: float = 120.0
    max_timeout: float = 600.0
    file_timeout: float = 60.0
    search_timeout: float = 30.0
    provider_slack: float = 60.0
    max_file_bytes: int = 256 * 1024
    max_image_base64_bytes: int = 5 * 1024 * 1024
    max_pdf_bytes: int = 20 * 1024 * 1024
    max_chars: int = 99_000
    glob_results: int = 200
    glob_entries: int = 50_000
