"""The command line ``fluxd``.

``commands`` declares it, ``one_shot`` draws once, ``prompt`` line by line, ``drawing``
gets the pictures, ``terminal`` shows them, ``console`` and ``startup`` tell how things
stand. Everything heavy is imported inside the commands.
"""

from app.cli.commands import cli, main

__all__ = ["cli", "main"]
