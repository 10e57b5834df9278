"""How the bundled model was made: its pictures, its training, its judge.

Stands on fluxcore and is no part of the installed package: the service only ever
sees the checkpoint that comes out.
"""
