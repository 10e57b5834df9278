"""``fluxd`` alone: an interactive prompt that draws line by line.

``parsing`` reads a line, ``commands`` are those that begin with ``!``, ``gallery`` holds
the pictures, ``session`` carries out, ``completion`` and ``editor`` are the line itself.
"""

from app.cli.prompt.interact import interact

__all__ = ["interact"]
