"""Prompt and generation speed of a model beside the machine's own limits: `python benchmarks/bench.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a checkout needs no installation

from pyllama.bench import main

if __name__ == "__main__":
    raise SystemExit(main())
