"""Formulas as SVG, drawn while the site is built: no script, no fonts, the same picture in every browser.

A Python-Markdown extension on top of ``pymdownx.arithmatex`` with ``generic``, which finds them.
"""

from __future__ import annotations

from html import unescape
from typing import Any
from xml.etree.ElementTree import Element

import ziamath
from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor

SIZE = 20  # in the units of the drawing
SCALE = 1.15  # beside the site's text: its letters are larger than the formulas' at the same size

ziamath.config.svg2 = False  # glyphs in place instead of references by ids, which other formulas of a page share
ziamath.config.precision = 1


class SVGTreeprocessor(Treeprocessor):
    def run(self, root: Element) -> None:
        for place in root.iter():
            if place.get("class") == "arithmatex":
                latex = " ".join(unescape(place.text or "").split())[2:-2].strip()  # without \( \) or \[ \]
                place.text = None
                place.append(drawn(latex, inline=place.tag == "span"))


def drawn(latex: str, inline: bool) -> Element:
    """The drawing; on its line if inline. Screen readers get the LaTeX."""
    svg = ziamath.Latex(latex, size=SIZE, inline=inline).svgxml()
    _, top, width, height = (float(value) * SCALE / SIZE for value in svg.attrib["viewBox"].split())
    for name in ("width", "height", "xmlns:xlink"):
        del svg.attrib[name]
    for part in svg.iter():
        if part.get("fill") == "black":  # all of it, in the colour of the text around it
            del part.attrib["fill"]
    style = f"width: {width:.2f}em; height: {height:.2f}em; vertical-align: {-top - height:.2f}em"
    svg.attrib |= {"fill": "currentColor", "role": "img", "aria-label": latex, "style": style}
    return svg


class Formulas(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(SVGTreeprocessor(md), "formulas", 0)


def makeExtension(**kwargs: Any) -> Formulas:
    return Formulas(**kwargs)
