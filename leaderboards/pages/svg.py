"""A matplotlib figure as inline SVG for a page with a strict content policy.

matplotlib writes its colours and fonts as `style` attributes, which such a policy drops. They become presentation
attributes; the colours of `INKS` become classes too, so that a dark page can change them. Ids that nothing refers to
are removed, for a page holds several figures.
"""

import io
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree as ET

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
HREF = f"{{{XLINK}}}href"
SERIES = ("#1f6fb4", "#c25700", "#2a8a2a", "#c62f30", "#7e57b5", "#8a5546", "#c2479b", "#666666", "#7f8000", "#0e8a99")
"""Series on light pages; each has a contrast of 3:1 or more on white. The dark ones are in `board.css`."""
INK, GRID, FRONT = "#010101", "#b1b1b1", "#999999"
INKS = {INK: "ink", GRID: "grid", FRONT: "front", **{color: f"c{i}" for i, color in enumerate(SERIES)}}
PLAIN = {"#000000": "ink", "#ffffff": "page", "#d9d9d9": "bar"}
"""The colours of a picture that was drawn for paper."""
KEPT = frozenset(["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-dashoffset", "stroke-linecap"])
KEPT |= {"stroke-linejoin", "stroke-opacity", "fill-opacity", "opacity", "text-anchor", "font-size"}


def inline(figure: Figure, *, salt: str, title: str, about: str, points: Mapping[str, Sequence[str]]) -> Markup:
    """The figure as an `<svg>` element with a name and a description.

    salt: makes the ids of this figure its own. points: gid of a line, `series-<i>`, to the words of each of its
    markers, which a pointer shows. Elements whose gid is `series-<i>` or `series-<i>-<part>` get `data-s="<i>"`.
    """
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return adopted(text.getvalue(), salt=salt, title=title, about=about, points=points)


def adopted(drawn: str, *, salt: str, title: str, about: str, points: Mapping[str, Sequence[str]]) -> Markup:
    """What matplotlib wrote as SVG, made fit for the page as `inline` does; without points it keeps its own size."""
    ET.register_namespace("", SVG)
    root = ET.fromstring(drawn)
    dropped = {f"{{{SVG}}}{tag}" for tag in ("metadata", "style", "title", "desc")}
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in dropped]:
            parent.remove(child)
    for gid, words in points.items():
        _name_points(root, gid, words)
    values = (value for element in root.iter() for value in element.attrib.values())
    used = {ref for value in values for ref in re.findall(r"#([\w-]+)", value)}
    for element in root.iter():
        _plain(element, used)
    for name in ("width", "height", "version") if points else ("version",):
        root.attrib.pop(name, None)
    look = "chart" if points else "chart whole"
    root.attrib |= {"role": "img", "aria-labelledby": f"{salt}-t", "aria-describedby": f"{salt}-d", "class": look}
    for position, (tag, what, suffix) in enumerate((("title", title, "t"), ("desc", about, "d"))):
        child = ET.Element(f"{{{SVG}}}{tag}", {"id": f"{salt}-{suffix}"})
        child.text = what
        root.insert(position, child)
    return Markup(ET.tostring(root, encoding="unicode"))


def _name_points(root: ET.Element, gid: str, words: Sequence[str]) -> None:
    """Wrap each marker of the line `gid` into a group with a title."""
    line = next((e for e in root.iter() if e.get("id") == gid), None)
    if line is None:
        return
    left = iter(words)
    for parent in [e for e in line.iter() if any(child.tag == f"{{{SVG}}}use" for child in e)]:
        for position, mark in enumerate(list(parent)):
            group = ET.Element(f"{{{SVG}}}g", {"class": "point"})
            title = ET.SubElement(group, f"{{{SVG}}}title")
            title.text = next(left, "")
            parent.remove(mark)
            group.append(mark)
            parent.insert(position, group)


def _plain(element: ET.Element, used: set[str]) -> None:
    own = element.attrib
    if HREF in own:
        own["href"] = own.pop(HREF)
    gid = own.get("id", "")
    if gid and gid not in used:
        del own["id"]
    if found := re.fullmatch(r"series-(\d+)(?:-\w+)?", gid):
        own["data-s"] = found[1]
    classes = own.get("class", "").split()
    for part in own.pop("style", "").split(";"):
        name, _, value = (piece.strip() for piece in part.partition(":"))
        if name == "font" and (size := re.search(r"[\d.]+px", value)):
            name, value = "font-size", size[0]
        if name in KEPT:
            own[name] = value
        if name in ("fill", "stroke") and (ink := INKS.get(value) or PLAIN.get(value)):
            classes.append(f"{name}-{ink}")
    if classes:
        own["class"] = " ".join(classes)
