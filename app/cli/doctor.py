"""``fluxd doctor``: what this machine is, whether it computes right, and what to report.

Says what it is about to check before it does so: a fault of a GPU can end the process.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path

from fluxcore.doctor import Finding, Status, checks, guarded
from fluxcore.version import __version__

NAME_WIDTH = 24


def examine(device: str, model: Path | None) -> bool:
    """Run all checks and print what they find. False when there is a fault.

    Raises:
        DeviceUnavailableError: there is no such device.
        CheckpointError: there is no such checkpoint.
    """
    print(f"fluxd {__version__} looks at this machine; a minute or two.\n", flush=True)
    found: list[tuple[str, Finding]] = []
    for name, check in checks(device, model):
        print(f"  {name:<{NAME_WIDTH}}", end="", flush=True)
        began_s = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            finding = guarded(check)
        found.append((name, finding))
        print(f"{finding.status:<9}{time.monotonic() - began_s:5.1f} s", flush=True)
        if finding.status is not Status.OK:
            print(f"    {finding.detail}\n    what to do: {finding.remedy}", flush=True)
    faults = sum(finding.status is Status.FAULT for _, finding in found)
    print(f"\n{_verdict(faults)}\n\nTo report how it went, paste this:\n")
    print("```\n" + "\n".join(_block(found)) + "\n```")
    return faults == 0


def _verdict(faults: int) -> str:
    if faults == 0:
        return "This machine computes what it should."
    return f"{faults} fault{'s' if faults > 1 else ''}: pictures of this machine cannot be trusted."


def _block(found: list[tuple[str, Finding]]) -> list[str]:
    """One line for each finding; none tells whose machine it is."""
    home = str(Path.home())
    lines = [f"fluxd {__version__} doctor"]
    lines += [
        f"{finding.status:<7} {name}: {finding.detail.replace(home, '~')}"
        for name, finding in found
    ]
    return lines
