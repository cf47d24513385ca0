"""Everything is in pyproject.toml but for the recipes, which the wheel puts under share/passl/configs."""

from pathlib import Path

from setuptools import setup

folders = sorted({recipe.parent for recipe in Path("configs").rglob("*.yaml")})
setup(data_files=[(f"share/passl/{folder}", sorted(map(str, folder.glob("*.yaml")))) for folder in folders])
