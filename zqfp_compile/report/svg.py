"""Inline SVG by hand, not by matplotlib: no dependency, sharp at every width, in the reader's colours.

Coordinates along x are percentages and colours are CSS classes, so one picture serves wide and narrow pages,
light and dark; 210 layers take tens of kilobytes. Names come from an untrusted model: they are escaped here.
"""

from __future__ import annotations

from markupsafe import Markup, escape


def picture(content: str, height: float, kind: str, title: str, description: str = "") -> Markup:
    """Return an ``<svg>`` as wide as its place.

    Args:
        content: Elements, made by the functions below: numbers and escaped names only.
        height: Pixels.
        kind: CSS class.
        title: What it shows; the name that a screen reader says.
        description: The numbers in words, for whoever does not see it.
    """
    described = f"<desc>{escape(description)}</desc>" if description else ""
    return Markup(
        f'<svg class="{kind}" width="100%" height="{height:g}" role="img">'
        f"<title>{escape(title)}</title>{described}{content}</svg>"
    )


def box(
    kind: str, x: float, y: float, width: float, height: float, title: str, *, radius: int | None = None
) -> str:
    """Return a rectangle with a tooltip; ``x`` and ``width`` are percent, the rest pixels."""
    rounded = "" if radius is None else f' rx="{radius}"'
    return (
        f'<rect class="{kind}" x="{x:.3f}%" y="{y:.1f}" width="{width:.3f}%" height="{height:.1f}"{rounded}>'
        f"<title>{escape(title)}</title></rect>"
    )


def label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    """Return text whose baseline is at ``y`` pixels; ``anchor`` says which end of it is at ``x`` percent."""
    return f'<text x="{x:.3f}%" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def base_line(y: float) -> str:
    """Return a line across the whole width."""
    return f'<line x1="0" x2="100%" y1="{y:g}" y2="{y:g}"/>'
