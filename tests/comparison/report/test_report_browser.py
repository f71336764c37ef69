"""The report in a real browser: small and large screens, keyboard, colours in both schemes, and paper."""

import json
import re
import zlib

import pytest

from hf_ft.comparison.report import write_report
from hf_ft.comparison.results import Results
from tests.browser import chromium, find_chromium
from tests.comparison.report import made_up_results

pytestmark = pytest.mark.slow

PHONE, DESKTOP, PAPER = 360, 1280, 680  # pixels; paper: the width of A4 within its margins
CONTRAST = 4.5  # WCAG 2, AA

# Texts too faint for their background. A canvas converts any colour notation into red, green and blue.
FAINT = """(() => {
  const pen = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d');
  const over = (colors) => {
    pen.clearRect(0, 0, 1, 1);
    for (const color of colors) { pen.fillStyle = color; pen.fillRect(0, 0, 1, 1); }
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faint = [];
  let seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.closest('title, desc, style')) continue;
    seen += 1;
    const layers = [];
    for (let up = element; up; up = up.parentElement) layers.unshift(getComputedStyle(up).backgroundColor);
    const style = getComputedStyle(element);
    const color = element.closest('svg') ? style.fill : style.color;
    const [a, b] = [luminance(over(layers)), luminance(over([...layers, color]))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < LEAST) faint.push([node.data.trim().slice(0, 40), Math.round(100 * ratio) / 100]);
  }
  return {seen, faint};
})()""".replace("LEAST", str(CONTRAST))

# Chart labels that overlap or leave the screen.
CROWDED = """(() => {
  const crowded = [], outside = [];
  for (const chart of document.querySelectorAll('svg[role=img]')) {
    const texts = [...chart.querySelectorAll('text')].filter(t => t.checkVisibility() && t.getBBox().width > 0);
    const boxes = texts.map(t => t.getBoundingClientRect());
    boxes.forEach((a, i) => {
      if (a.left < -0.5 || a.right > innerWidth + 0.5) outside.push(texts[i].textContent);
      boxes.slice(0, i).forEach((b, j) => {
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (across > 1 && down > 4) crowded.push([texts[i].textContent, texts[j].textContent]);
      });
    });
  }
  return {crowded, outside};
})()"""

# How far content extends to the right, except for what scrolls by itself.
WIDTH = """(() => {
  const own = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .plain, svg, .skip'));
  return [document.documentElement.scrollWidth, Math.max(...own.map(e => e.getBoundingClientRect().right))];
})()"""

FOCUSED = """(() => {
  const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
  return {tag: e.tagName, name: e.className, href: e.getAttribute('href') || '', outline: style.outlineStyle,
          left: box.left, label: e.getAttribute('aria-labelledby') || ''};
})()"""


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright", reason="there is no Playwright: pip install playwright")
    if find_chromium() is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with chromium() as opened:
        yield opened


@pytest.fixture
def screen(browser):
    """A new tab."""
    with browser.new_page() as page:
        page.set_default_timeout(120_000)  # a loaded machine takes more than the usual 30 s
        yield page


def show(screen, address, width=DESKTOP, height=900, dark=False):
    """Load a page in a window of this size."""
    screen.emulate_media(color_scheme="dark" if dark else "light")
    screen.set_viewport_size({"width": width, "height": height})
    screen.goto(address)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The addresses of some reports."""
    folder = tmp_path_factory.mktemp("reports")
    contents = {
        "whole": made_up_results.comparison(),
        "hostile": made_up_results.comparison(hostile=True),
        "smallest": made_up_results.smallest(),
        "classes": made_up_results.many_classes(),
        "strategies": made_up_results.many_strategies(),
    }
    for name, content in contents.items():
        write_report(Results.from_dict(json.loads(json.dumps(content))), folder / name)
    return {name: (folder / name / "report.html").as_uri() for name in contents}


@pytest.mark.parametrize("name", ["whole", "hostile", "smallest", "classes", "strategies"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_fits_its_screen(screen, pages, name, width):
    show(screen, pages[name], width)
    scrolled, right = screen.evaluate(WIDTH)
    assert scrolled == width and right <= width + 0.5
    assert screen.evaluate(CROWDED) == {"crowded": [], "outside": []}


@pytest.mark.parametrize("name", ["whole", "hostile"])
def test_loads_nothing_runs_nothing_and_complains_of_nothing(screen, pages, name):
    sent, said = [], []
    screen.on("request", lambda request: sent.append(request.url))
    for kind in ("console", "pageerror", "dialog"):
        screen.on(kind, lambda event: said.append(event))
    show(screen, pages[name])
    assert pages[name] in sent and all(url == pages[name] or url.startswith("data:") for url in sent)
    assert screen.evaluate("document.scripts.length") == 0
    assert said == []


@pytest.mark.parametrize("dark", [False, True])
def test_texts_stand_out_from_their_background(screen, pages, dark):
    show(screen, pages["whole"], dark=dark)
    assert screen.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    screen.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = screen.evaluate(FAINT)
    assert found["seen"] > 1000 and found["faint"] == []
    light = screen.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light is not dark


def test_faint_text_is_found(screen, pages):
    """The measurement itself."""
    show(screen, pages["smallest"])
    screen.evaluate("document.querySelector('h1').style.color = '#888'")
    assert [text for text, _ in screen.evaluate(FAINT)["faint"]] == ["tiny on numbers"]


def test_keyboard(screen, pages):
    show(screen, pages["whole"], PHONE, 740)
    screen.keyboard.press("Tab")
    first = screen.evaluate(FOCUSED)
    assert first["name"] == "skip" and first["left"] >= 0  # it is visible when it has the focus
    screen.keyboard.press("Enter")
    assert screen.evaluate("document.activeElement.id || location.hash") in ("main", "#main")
    stops = []
    for _ in range(60):
        screen.keyboard.press("Tab")
        stops.append(screen.evaluate(FOCUSED))
        if stops[-1]["tag"] == "BODY":
            break
    assert all(stop["outline"] != "none" for stop in stops if stop["tag"] != "BODY")
    regions = [stop["label"] for stop in stops if stop["name"].startswith("scroll")]
    assert {"ranking-2", "cost-4", "tuning-3"} <= set(regions)
    assert any(stop["tag"] == "SUMMARY" for stop in stops)


def test_a_focused_region_scrolls_with_the_arrow_keys(screen, pages):
    show(screen, pages["whole"], PHONE, 740)
    region = "document.querySelector('#ranking .scroll')"
    assert screen.evaluate(f"{region}.focus(), {region}.scrollWidth > {region}.clientWidth")
    first = f"{region}.querySelector('tbody th').getBoundingClientRect().left"
    before = screen.evaluate(first)
    for _ in range(3):
        screen.keyboard.press("ArrowRight")
    screen.evaluate("new Promise(done => setTimeout(done, 400))")  # it scrolls smoothly
    assert screen.evaluate(f"{region}.scrollLeft") > 0
    assert screen.evaluate(first) == pytest.approx(before, abs=1)  # the names stay


def test_paper(screen, pages):
    show(screen, pages["whole"], PAPER, dark=True)
    folded = "[...document.querySelectorAll('details table')].filter(t => t.checkVisibility() && t.offsetHeight > 0)"
    assert screen.evaluate(f"{folded}.length") == 0
    screen.emulate_media(media="print")
    there = screen.evaluate("document.querySelectorAll('details table').length")
    assert screen.evaluate(f"{folded}.length") == there > 5  # collapsed parts are printed
    right = "Math.max(...[...document.querySelectorAll('table, svg, pre')].map(e => e.getBoundingClientRect().right))"
    assert screen.evaluate(right) <= PAPER
    assert screen.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert screen.evaluate(FAINT)["faint"] == []


def test_pdf_has_pages_and_text(screen, pages):
    show(screen, pages["whole"])
    pdf = screen.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    boxes = set(re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf))
    assert {(round(float(w)), round(float(h))) for w, h in boxes} == {(595, 842)}  # A4
    assert len(re.findall(rb"/Type /Page\b", pdf)) >= 8
    shown = 0
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.S):
        try:
            shown += zlib.decompress(stream).count(b"Tj")
        except zlib.error:  # not a compressed one
            continue
    assert shown > 1000
