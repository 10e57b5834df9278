"""Accepted jobs that outlive the process: their records, their pictures, their running.

Knows nothing of HTTP. Everything that touches the disk happens on threads of its
own, so that neither the event loop nor the engine's worker ever waits for one.
"""
