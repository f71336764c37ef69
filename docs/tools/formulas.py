"""Formulas as SVG, drawn when the site is built: no scripts, no fonts, the same picture in every browser.

A Python-Markdown extension on top of ``pymdownx.arithmatex`` with ``generic``, which finds the formulas.
"""

from __future__ import annotations

from html import unescape
from typing import Any
from xml.etree.ElementTree import Element

import ziamath
from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor

SIZE = 20  # in the units of the drawing
SCALE = 1.15  # to match the site's text, whose letters are larger than the formulas' at the same size

ziamath.config.svg2 = False  # glyphs in place instead of references by id, which other formulas on a page share
ziamath.config.precision = 1


class SVGTreeprocessor(Treeprocessor):
    def run(self, root: Element) -> None:
        for place in root.iter():
            if place.get("class") == "arithmatex":
                latex = " ".join(unescape(place.text or "").split())[2:-2].strip()  # without \( \) or \[ \]
                place.text = None
                place.append(drawn(latex, inline=place.tag == "span"))


def drawn(latex: str, inline: bool) -> Element:
    """The drawing, aligned with the line of text if inline. Screen readers get the LaTeX."""
    svg = ziamath.Latex(latex, size=SIZE, inline=inline).svgxml()
    _, top, width, height = (float(value) * SCALE / SIZE for value in svg.attrib["viewBox"].split())
    for name in ("width", "height", "xmlns:xlink"):
        del svg.attrib[name]
    for part in svg.iter():
        if part.get("fill") == "black":  # so that everything takes the colour of the surrounding text
            del part.attrib["fill"]
    style = f"width: {width:.2f}em; height: {height:.2f}em; vertical-align: {-top - height:.2f}em"
    svg.attrib |= {"fill": "currentColor", "role": "img", "aria-label": latex, "style": style}
    return svg


class Formulas(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(SVGTreeprocessor(md), "formulas", 0)


def makeExtension(**kwargs: Any) -> Formulas:
    return Formulas(**kwargs)
