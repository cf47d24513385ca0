"""Several runs of `passl-train` in one process, or in the processes of one launch, which takes its time to start.

Each line of the file that is its argument is a JSON list of the arguments of one run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from passl.cli import train_main

if __name__ == "__main__":
    for line in Path(sys.argv[1]).read_text().splitlines():
        train_main(json.loads(line))
