"""The command line ``fluxd``.

``commands`` declares it, ``one_shot`` draws pictures in this process, ``terminal``
shows progress. Everything heavy is imported inside the commands.
"""

from app.cli.commands import cli, main

__all__ = ["cli", "main"]
