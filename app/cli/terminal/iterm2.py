"""iTerm2's inline images: iTerm2, WezTerm, mintty and others.

Source: https://iterm2.com/documentation-images.html.
"""

from __future__ import annotations

import base64


def encode(file: bytes, columns: int, rows: int) -> bytes:
    """Show a picture file over so many cells, from the cursor on."""
    keys = f"inline=1;size={len(file)};width={columns};height={rows};preserveAspectRatio=0"
    return b"\x1b]1337;File=" + keys.encode() + b":" + base64.b64encode(file) + b"\x07"
