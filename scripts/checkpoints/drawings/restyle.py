"""One drawing in other hands: other palettes, flat or hatched or empty fills, drawn lines, an unsteady hand, shadows.

Works on the SVG text of an iconify package, whose colours stand in the attributes `fill`, `stroke` and `stop-color`.
Everything is drawn from a seed, so that a build is the same on every machine.
"""

from __future__ import annotations

import colorsys
import random
import re
from collections.abc import Callable

Colour = tuple[float, float, float]  # red, green, blue in 0..1

_PAINT = re.compile(r'\b(fill|stroke|stop-color|flood-color)="(#[0-9a-fA-F]{3,8}|currentColor|black|white)"')
_GRADIENT = re.compile(r"<(linear|radial)Gradient\b(?P<head>[^>]*)>(?P<body>.*?)</\1Gradient>", re.DOTALL)


def parsed(colour: str) -> Colour:
    """A colour of an attribute as numbers; opacity in it is left out."""
    if colour in ("currentColor", "black", "white"):
        return (1.0, 1.0, 1.0) if colour == "white" else (0.13, 0.13, 0.13)
    digits = colour[1:]
    if len(digits) < 6:
        digits = "".join(2 * digit for digit in digits[:3])
    red, green, blue = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return red, green, blue


def written(colour: Colour) -> str:
    """The opposite of `parsed`."""
    return "#" + "".join(f"{round(255 * min(1.0, max(0.0, part))):02x}" for part in colour)


def luminance(colour: Colour) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def _random_colour(source: random.Random, low: float = 0.2, high: float = 1.0) -> Colour:
    return colorsys.hsv_to_rgb(source.random(), source.uniform(0.3, 1.0), source.uniform(low, high))


def _palette(source: random.Random) -> Callable[[Colour], Colour]:
    """A way to change all colours of a drawing, the same for the same colour."""
    kind = source.choice(("keep", "turn", "turn", "clusters", "grey", "two"))
    if kind == "turn":
        turn, richer, lighter = source.random(), source.uniform(0.5, 1.4), source.uniform(0.7, 1.15)

        def change(colour: Colour) -> Colour:
            hue, saturation, value = colorsys.rgb_to_hsv(*colour)
            return colorsys.hsv_to_rgb((hue + turn) % 1, min(1.0, saturation * richer), min(1.0, value * lighter))
    elif kind == "clusters":
        # Colours of one hue and lightness are one material: they change together, the nuances stay.
        seed = source.random()

        def change(colour: Colour) -> Colour:
            hue, saturation, value = colorsys.rgb_to_hsv(*colour)
            drawn = random.Random(f"{seed}/{int(6 * hue) if saturation > 0.15 else 'grey'}/{int(2.99 * value)}")
            return colorsys.hsv_to_rgb((drawn.random() + hue / 6) % 1, drawn.uniform(0.1, 1.0), drawn.uniform(0.4, 1))
    elif kind == "grey":
        contrast = source.uniform(0.6, 1.4)

        def change(colour: Colour) -> Colour:
            level = 0.5 + (luminance(colour) - 0.5) * contrast
            return level, level, level
    elif kind == "two":
        dark, light = _random_colour(source, 0.1, 0.6), _random_colour(source, 0.8)

        def change(colour: Colour) -> Colour:
            level = luminance(colour)
            red, green, blue = (a + (b - a) * level for a, b in zip(dark, light, strict=True))
            return red, green, blue
    else:

        def change(colour: Colour) -> Colour:
            return colour

    return change


def _flattened(svg: str) -> str:
    """Gradients replaced by the mean of their colours, so that a shape has one colour all over."""
    for gradient in _GRADIENT.finditer(svg):
        name = re.search(r'\bid="([^"]+)"', gradient["head"])
        colours = [parsed(colour) for key, colour in _PAINT.findall(gradient["body"]) if key == "stop-color"]
        if name and colours:
            mean = written(tuple(sum(part) / len(colours) for part in zip(*colours, strict=True)))  # type: ignore[arg-type]
            svg = svg.replace(f"url(#{name[1]})", mean)
    return svg


def _box(svg: str) -> tuple[float, float, float, float]:
    """Left, top, width and height of the drawing."""
    match = re.search(r'viewBox="([^"]+)"', svg)
    assert match is not None, "iconify drawings have a viewBox"
    left, top, width, height = (float(part) for part in match[1].split())
    return left, top, width, height


def _hatched(svg: str, source: random.Random, side: float) -> tuple[str, str]:
    """Fills as hatching in their own colours; returns the drawing and the definitions that it needs."""
    step, angle = side * source.uniform(0.03, 0.07), source.uniform(0, 180)
    definitions: dict[str, str] = {}

    def hatch(match: re.Match[str]) -> str:
        key, colour = match[1], written(parsed(match[2]))
        if key != "fill" or luminance(parsed(match[2])) > 0.9:
            return match[0]
        name = f"hatch{colour[1:]}"
        definitions[name] = (
            f'<pattern id="{name}" width="{step}" height="{step}" patternUnits="userSpaceOnUse" '
            f'patternTransform="rotate({angle:.0f})"><path d="M0 {step / 2}H{step}" stroke="{colour}" '
            f'stroke-width="{step * 0.55:.3f}"/></pattern>'
        )
        return f'fill="url(#{name})"'

    return _PAINT.sub(hatch, svg), "".join(definitions.values())


def _filter(source: random.Random, box: tuple[float, float, float, float], unsteady: bool, shadow: bool) -> str:
    """A filter that moves each point a little, as a hand does, or adds a shadow."""
    side, steps = max(box[2:]), []
    if unsteady:
        frequency, scale = source.uniform(2, 6) / side, side * source.uniform(0.01, 0.04)
        steps.append(f'<feTurbulence baseFrequency="{frequency:.5f}" numOctaves="2" seed="{source.randrange(999)}"/>')
        steps.append(
            f'<feDisplacementMap in="SourceGraphic" scale="{scale:.3f}" xChannelSelector="R" yChannelSelector="G"/>'
        )
    if shadow:
        move = side * source.uniform(0.01, 0.05)
        steps.append(
            f'<feDropShadow dx="{move:.3f}" dy="{move:.3f}" stdDeviation="{move / 2:.3f}" flood-opacity="0.5"/>'
        )
    left, top, width, height = box
    area = f'x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"'
    return f'<filter id="hand" filterUnits="userSpaceOnUse" {area}>{"".join(steps)}</filter>'


def restyled(svg: str, seed: str) -> str:
    """The same thing as another hand could have drawn it.

    Args:
        svg: A whole SVG with a viewBox.
        seed: The same seed gives the same hand.
    """
    source = random.Random(seed)
    left, top, width, height = _box(svg)
    side = max(width, height)
    opening, body = svg.split(">", 1)
    # Soft lights and shadows are of the hand that drew it; and resvg 0.5 panics at some of them in another box.
    body = re.sub(r'\sfilter="url\(#[^"]*\)"', "", body.rsplit("</svg>", 1)[0])
    fills = source.choice(("keep", "keep", "flat", "flat", "hatched", "empty"))
    lined = fills == "empty" or source.random() < 0.5
    ink = written(_random_colour(source, 0.0, 0.35) if source.random() < 0.5 else (0.1, 0.1, 0.1))
    change = _palette(source)
    body = _PAINT.sub(lambda match: f'{match[1]}="{written(change(parsed(match[2])))}"', body)
    definitions = ""
    if fills != "keep":
        body = _flattened(body)
    if fills == "hatched":
        body, definitions = _hatched(body, source, side)
    elif fills == "empty":
        empty = source.choice(("#ffffff", "none"))
        body = _PAINT.sub(lambda match: f'fill="{empty}"' if match[1] == "fill" else f'{match[1]}="{ink}"', body)
    line = ""
    if lined:
        stroke = side * source.uniform(0.008, 0.035)
        line = f' stroke="{ink}" stroke-width="{stroke:.3f}" stroke-linejoin="round" stroke-linecap="round"'
    unsteady, shadow = source.random() < 0.4, source.random() < 0.15
    # A line around the outermost shape must not be cut by the edge.
    margin = side * 0.04 if lined or unsteady or shadow else 0.0
    area = (left - margin, top - margin, width + 2 * margin, height + 2 * margin)
    if unsteady or shadow:
        definitions += _filter(source, area, unsteady, shadow)
        line += ' filter="url(#hand)"'
    box = " ".join(f"{number:g}" for number in area)
    opening = re.sub(r'viewBox="[^"]+"', f'viewBox="{box}"', opening)
    return f"{opening}><defs>{definitions}</defs><g{line}>{body}</g></svg>"
