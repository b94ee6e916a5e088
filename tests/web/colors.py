"""Colors of a page, as the browser has computed them."""

import re

from playwright.sync_api import Page


def color(page: Page, selector: str, what: str = "color") -> tuple[float, ...]:
    value = page.evaluate(f"getComputedStyle(document.querySelector({selector!r})).getPropertyValue({what!r})")
    return tuple(float(part) / 255 for part in re.findall(r"[\d.]+", value)[:3])


def contrast(page: Page, text: str) -> float:
    """Of the text with the page behind it: https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio, AA wants 4.5."""
    dark, light = sorted(map(luminance, (color(page, text), color(page, "body", "background-color"))))
    return (light + 0.05) / (dark + 0.05)


def luminance(rgb: tuple[float, ...]) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))
