"""What mkdocs does with each page beside its own: formulas as MathML, pictures by palette.

mkdocs calls ``on_page_content``. Formulas, which ``pymdownx.arithmatex`` has marked, become MathML,
which browsers show without a script. Of a ``<picture>`` the theme shows the variant that fits the
palette, which readers may choose.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
PICTURE = re.compile(
    r"<picture>\s*<source [^>]*srcset=\"(?P<dark>[^\"]+)\"[^>]*>\s*"
    r"<img src=\"(?P<light>[^\"]+)\"(?P<rest>[^>]*)>\s*</picture>"
)


def on_page_content(content: str, **kwargs: Any) -> str:
    """Returns the page with MathML in place of LaTeX, and both variants of a picture."""
    content = PICTURE.sub(
        r'<img src="\g<light>#only-light"\g<rest>><img src="\g<dark>#only-dark"\g<rest>>', content
    )
    content = DISPLAY.sub(lambda match: mathml(match[1], "block"), content)
    return INLINE.sub(lambda match: mathml(match[1], "inline"), content)


def mathml(latex: str, display: str) -> str:
    """Returns one formula."""
    return str(convert(html.unescape(latex).strip(), display=display))
