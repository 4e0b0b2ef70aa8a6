"""A node beside a PACS: it receives studies, diagnoses them and sends the answers back; extra
``serve``.

A study that was acknowledged is on disk and in a journal, and ends as answered or as visibly failed
with retries going on, whatever is killed, full or down meanwhile.
"""

from ..lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".config": ["ServeConfig", "read_config"],
        ".journal": ["Journal"],
        ".node": ["Node"],
    },
)
