"""Pictures on terminals.

``detect`` finds out what this terminal can show, by its environment and by asking it
(``query``), through ``tmux`` too. ``kitty``, ``iterm2``, ``sixel`` and ``blocks`` write
a picture in one way each; ``screen`` puts it into its place.
"""

from app.cli.terminal.detect import GRAPHICS_NAMES, Graphics
from app.cli.terminal.screen import Screen, Shown, open_screen

__all__ = ["GRAPHICS_NAMES", "Graphics", "Screen", "Shown", "open_screen"]
