"""What this kernel is published as, and where its build lies."""

import pathlib

from kernels.compat import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build"
CONFIG = tomllib.loads((ROOT / "build.toml").read_text())
GENERAL = CONFIG["general"]
REPO_ID, VERSION = GENERAL["hub"]["repo-id"], GENERAL["version"]
FROM_HUB = f"get_kernel({REPO_ID!r}, version={VERSION}, trust_remote_code=True)"
