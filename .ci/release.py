"""Refuses what cannot be published yet: says all that is missing, and ends with an error if anything is."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def missing(root: Path) -> list[str]:
    """Return a sentence for each thing that a release of the project in a folder lacks."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = project["version"]
    found = []
    if "Repository" not in project.get("urls", {}):
        found.append(
            "pyproject.toml has no address for the links of the README, which lead nowhere on PyPI without one: "
            'put Repository = "https://..." under [project.urls]'
        )
    changes = re.findall(r"^## (.+)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    if not re.fullmatch(rf"{re.escape(version)} \(\d{{4}}-\d\d-\d\d\)", changes[0]):
        found.append(
            f"CHANGELOG.md begins with {changes[0]!r}: expected {version} and the day, as {version} (2026-01-31)"
        )
    left = sorted(path.name for path in (root / "dist").glob("*") if f"-{version}" not in path.name)
    if left:
        found.append(
            f"dist/ holds files of other versions ({', '.join(left)}), which would be published too: delete them"
        )
    return found


if __name__ == "__main__":
    sys.exit("\n".join(missing(ROOT)) or 0)
