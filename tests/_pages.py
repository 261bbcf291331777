"""A page of HTML as tests read it: balanced tags, attributes, text and table rows."""

from __future__ import annotations

import re
from functools import cached_property
from html.parser import HTMLParser

VOID = {"meta", "br", "wbr", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags are balanced, and collects text, attributes and table rows."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"{tag}: an attribute twice"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" in self.stack:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.stack):
            self.rows[-1][-1] += data

    @cached_property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def charts_can_be_scrolled(text: str) -> bool:
    """Whether every chart stands in a figure: on a phone it would shrink until nobody reads it."""
    charts = re.findall(r'(<div class="figure[^>]*>)?<svg class="chart"', text)
    return len(charts) > 0 and all(charts)
