"""A matplotlib figure as a piece of a page: inline SVG in the ink of the page's theme."""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["INK", "figure_svg"]

INK = "#5f6672"  # for text and axes: readable on white and on black, and the page may replace it

_PAGE_INKS = re.compile(rf"{INK}|#000000\b")
_FONT_FAMILY = re.compile(r"font-family: [^;]*;? ?")
_SETTINGS: dict[Any, Any] = {
    "savefig.bbox": None,
    "svg.fonttype": "none",  # text stays text: small, searchable, in the font of the page
    "svg.hashsalt": "latentlab",  # the same figure gets the same ids
}


def figure_svg(figure: Figure | str, label: str = "figure", prefix: str = "") -> str:
    """A figure as inline SVG: the same figure gives the same text.

    Its background is transparent, its text and axes have the colour and font of the page around
    it, and it fills the width it is given.

    Arguments:
        figure: a matplotlib figure, or the text of an SVG from a source you trust.
        label: what it shows, for those who cannot see it; labels of its axes are added.
        prefix: put before every id; give each figure of a page its own.

    Raises:
        ValueError: if a text is not an SVG with a viewBox.

    Example:
        >>> from matplotlib.figure import Figure
        >>> figure_svg(Figure(), label="nothing yet")[:46]
        '<svg xmlns="http://www.w3.org/2000/svg" viewBo'
    """
    text = figure if isinstance(figure, str) else _draw(figure)
    if not isinstance(figure, str):
        shown = "; ".join(str(ax.get_label()) for ax in figure.axes if ax.get_label())
        label = f"{label}: {shown}" if shown else label
    try:
        root = ElementTree.fromstring(text)
        view = root.attrib["viewBox"]
    except (ElementTree.ParseError, KeyError) as error:
        expected = "a figure, or the text of an SVG with a viewBox"
        raise ValueError(f"figure: expected {expected}") from error

    _drop(root, ("metadata", "style"))  # a style sheet in here would style the page as well
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    for node in root.iter():
        if node.get("id") not in used:
            node.attrib.pop("id", None)
        node.tag = _local(node.tag)
        node.attrib = {_local(k): _at_home(_local(k), v, prefix) for k, v in node.items()}
        _share_style(node)
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": view,
        "role": "img",
        "aria-label": label,
        "style": f"width: 100%; max-width: {float(view.split()[2]) * 1.5:.0f}px; height: auto",
        "fill": "currentColor",
        "stroke-linejoin": "round",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _draw(figure: Figure) -> str:
    import matplotlib

    buffer = io.StringIO()
    if figure.get_layout_engine() is not None:
        for ax in figure.axes:  # a layout starts where the last one ended; start it anew
            if ax.get_in_layout() and (place := ax.get_subplotspec()) is not None:
                ax.set_subplotspec(place)
    with warnings.catch_warnings(), matplotlib.rc_context(_SETTINGS):
        # The reader's font draws the text, so that a glyph missing in ours is no loss.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _drop(root: ElementTree.Element, tags: tuple[str, ...]) -> None:
    for parent in list(root.iter()):
        for child in [c for c in parent if _local(c.tag) in tags]:
            parent.remove(child)


def _local(name: str) -> str:
    """A name without its namespace, which inline SVG does not need."""
    return name.rpartition("}")[2]


def _at_home(name: str, value: str, prefix: str) -> str:
    """An attribute as it stands in a page: ids of its own, colours and fonts of the page."""
    if name == "id":
        return prefix + value
    if name == "href":
        return re.sub("^#", f"#{prefix}", value)
    value = value.replace("url(#", f"url(#{prefix}")
    if name == "style":
        value = _FONT_FAMILY.sub("", _PAGE_INKS.sub("currentColor", value))
    return value


def _share_style(group: ElementTree.Element) -> None:
    """Say the style that all markers of a group have in common once."""
    styles = {child.get("style") if _local(child.tag) == "use" else None for child in group}
    style = styles.pop() if len(styles) == 1 and len(group) > 1 else None
    if style is not None and group.get("style") is None:
        group.set("style", _at_home("style", style, ""))
        for child in group:
            del child.attrib["style"]
