"""A Griffe extension for mkdocstrings (mkdocs.yml): docstrings in Markdown, options with their defaults and help."""

from __future__ import annotations

import ast
import contextlib
from typing import Any

import griffe

from docs.tools.roles import markdown

DECLARATIONS = ("option", "setting")  # functions that take a default and a help text


class MarkdownDocstrings(griffe.Extension):
    """Converts all docstrings of a package when it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        self._convert(pkg)

    def _convert(self, thing: griffe.Object) -> None:
        if isinstance(thing, griffe.Attribute):
            _declared(thing)
        if thing.docstring is not None:
            thing.docstring.value = markdown(thing.docstring.value, lambda label, name: _link(thing, label, name))
        for member in thing.members.values():
            if not member.is_alias:
                self._convert(member)


def _declared(field: griffe.Attribute) -> None:
    """Show ``x: int = option(8, "How many.")`` as ``x: int = 8`` with the text as its docstring."""
    call = field.value
    if isinstance(call, griffe.ExprCall) and str(call.function) in DECLARATIONS:
        field.value = call.arguments[0]
        with contextlib.suppress(ValueError, SyntaxError):  # a text that is assembled when the module is imported
            text = ast.literal_eval(str(call.arguments[1]))
            field.docstring = griffe.Docstring(text, parent=field)


def _link(place: griffe.Object, label: str, name: str) -> str:
    """A link if the name has an entry on the site; otherwise mkdocs-autorefs shows it as code."""
    try:
        target = place.resolve(name)
    except griffe.NameResolutionError:
        target = name
    return f'<autoref identifier="{target}" optional><code>{label}</code></autoref>'
