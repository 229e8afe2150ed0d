"""Print the lowest versions that pyproject.toml allows, as constraints for pip: ``python .ci/floors.py``."""

import re
from pathlib import Path

text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text("utf-8")
for name, floor in re.findall(r'"([\w.-]+)>=([\d.]+)"', text[text.index("\n[project]") :]):
    print(f"{name}=={floor}")
