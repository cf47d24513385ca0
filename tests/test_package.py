"""What `import passl` gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

import passl
from passl.registry import BACKBONES

pytestmark = pytest.mark.smoke


def test_models_are_listed_by_pattern():
    assert passl.list_models() == BACKBONES.names() == sorted(BACKBONES.names())
    assert passl.list_models("vit_*") == ["vit_base", "vit_large", "vit_small", "vit_tiny"]
    resnets = ["resnet101", "resnet152", "resnet18", "resnet34", "resnet50"]
    assert passl.list_models("resnet*") == resnets
    assert passl.list_models("xcit_*_12_p1[6]") == ["xcit_nano_12_p16", "xcit_small_12_p16", "xcit_tiny_12_p16"]
    assert passl.list_models("VIT_*") == []


def test_importing_passl_does_not_import_paddle():
    program = "import sys, passl; print(callable(passl.list_models), *sorted({'paddle', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]
