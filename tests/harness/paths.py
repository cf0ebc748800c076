"""Where the shared real data lies, for tests that use it; they skip with a reason where it is absent.

`RMCORE_SHARED` names the folder; the default is `shared` beside the checkout.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("RMCORE_SHARED", ROOT.parent / "shared")).resolve()
needs_shared = pytest.mark.skipif(
    not (SHARED / "data").is_dir(), reason=f"needs the shared data folder (looked in {SHARED}; set RMCORE_SHARED)"
)
