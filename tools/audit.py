"""Known vulnerabilities of the locked packages, by pip-audit: `make audit`. Where PyPI's advisories cannot be reached
that is said, and nothing fails: pip-audit itself counts a package that it could not look up as fine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PIP_AUDIT = "pip-audit==2.10.1"


def audit(locked: Path) -> bool:
    """Tell what is known of the packages of a file; whether none has a known vulnerability."""
    command = [str(Path(sys.executable).with_name("uv")), "tool", "run", "--quiet", PIP_AUDIT]
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    run = subprocess.run([*command, *options, "-r", str(locked)], capture_output=True, text=True, check=False)
    try:
        packages = json.loads(run.stdout)["dependencies"]
    except (ValueError, KeyError):
        sys.stdout.write(f"{locked}: skipped, pip-audit gave no result: {run.stderr.strip()[-300:]}\n")
        return True
    known = [one for one in packages if "vulns" in one]
    bad = [one for one in known if one["vulns"]]
    for one in bad:
        names = ", ".join([f"{found['id']} (fixed in {found['fix_versions']})" for found in one["vulns"]])
        sys.stdout.write(f"{locked}: {one['name']} {one['version']}: {names}\n")
    what = f"{len(bad)} with known vulnerabilities" if known else "skipped, no advisories for any can be reached here"
    sys.stdout.write(f"{locked}: {len(packages)} packages, {len(known)} looked up: {what}\n")
    return not bad


if __name__ == "__main__":
    found = [audit(Path(name)) for name in sys.argv[1:]]
    sys.exit(0 if all(found) else 1)
