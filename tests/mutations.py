"""Damaged versions of valid JSON content, for tests of its readers."""

import copy
import json
import math

OTHERS = (None, True, -1, 0.5, math.nan, math.inf, "x", [], {}, [[]], {"x": 1})  # in place of any value


def damaged(content, random, number=150):
    """Copies with one value replaced or left out, each at a random place."""
    for _ in range(number):
        changed = copy.deepcopy(content)
        parent, key = random.choice(list(_places(changed)))
        if isinstance(parent, dict) and random.random() < 0.2:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(random.choice(OTHERS))
        yield changed
    yield from copy.deepcopy(OTHERS)


def damaged_texts(content):
    """Damaged files: truncated anywhere, empty, not text, and nested too deeply for Python to read."""
    text = json.dumps(content).encode()
    yield from (text[: len(text) * part // 5] for part in range(5))
    yield from (b"\xff\xfe" + text, b"[" * 100_000, b"[" * 400 + b"]" * 400, b"null", b'{"format": 1}')


def _places(content):
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key
        # In a long list, such as predictions, the first items are as good as any.
        yield from _places(value[:3] if isinstance(value, list) and len(value) > 20 else value)
