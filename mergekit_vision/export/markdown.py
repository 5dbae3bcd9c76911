"""Text that comes from elsewhere, such as a suite's names, as it may stand in Markdown."""

import re


def plain(text: object) -> str:
    r"""Text of one line that Markdown shows as it is: no markup, HTML or link comes of it.

    >>> from mergekit_vision.export.markdown import plain
    >>> plain("<b>*one*\n---")
    '\\<b\\>\\*one\\* ---'
    """
    return re.sub(r"([\\`*_\[\]<>|&~$])", r"\\\1", " ".join(str(text).split()))


def code(text: object) -> str:
    """Text of one line as code.

    >>> from mergekit_vision.export.markdown import code
    >>> code("a`b")
    "`a'b`"
    """
    return f"`{' '.join(str(text).split()).replace('`', chr(39))}`"
