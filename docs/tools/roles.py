"""Converts the Sphinx formulas and roles used in docstrings to Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable

_MATH_BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n+\1 +\S.*)*)", re.M)
_MATH = re.compile(r":math:`([^`]*)`")
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([^`]*)`")


def markdown(text: str, link: Callable[[str, str], str] = lambda label, target: f"`{label}`") -> str:
    """Sphinx's formulas and roles in Markdown: formulas between dollars, names as code.

    Args:
        text: a docstring, or a part of one.
        link: makes a reference from the label that readers see and the name as written; by default, code without a
            link.
    """

    def role(match: re.Match[str]) -> str:
        target = match[2]
        return link(target.rpartition(".")[2] if match[1] or target.startswith("hf_ft.") else target, target)

    def block(match: re.Match[str]) -> str:
        lines = [line.strip() for line in match[2].splitlines() if line.strip()]
        return "\n".join(match[1] + line for line in ("$$", *lines, "$$"))

    text = _MATH.sub(lambda m: f"${m[1]}$", _MATH_BLOCK.sub(block, text))
    return _ROLE.sub(role, text).replace("``", "`")
