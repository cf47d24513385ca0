"""The contact sheet."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from passl.visualize.sheet import contact_sheet


def test_classes_are_columns(tmp_path: Path) -> None:
    for name, color, count in (("a", "red", 3), ("b", "blue", 1)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 10), color).save(tmp_path / "images" / name / f"{number}.png")
    sheet = Image.open(contact_sheet(tmp_path / "images", tmp_path / "out/sheet.png", per_class=2, side=10))
    assert sheet.size == (2 * 12 + 2, 2 * 12 + 2)
    colors = {(x, y): sheet.getpixel((3 + 12 * x, 3 + 12 * y)) for x in (0, 1) for y in (0, 1)}
    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    assert colors == {(0, 0): red, (0, 1): red, (1, 0): blue, (1, 1): white}
