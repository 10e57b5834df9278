"""From trained networks to the checkpoint that ships.

python -m demo.finish --out .models/fluxd-demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

from demo.architecture import DEMO, build_modules
from demo.export import export_checkpoint
from demo.run import load
from fluxcore.errors import FluxError
from fluxcore.weights.layout import check_free


def main() -> None:
    """Read the command line and write the directory, which must not exist yet."""
    parser = argparse.ArgumentParser(description="Write the trained model as a checkpoint.")
    parser.add_argument("--vae", type=Path, default=Path(".models/training/vae.pt"))
    parser.add_argument("--networks", type=Path, default=Path(".models/training/sizes.pt"))
    parser.add_argument("--tokenizer", type=Path, default=Path(".models/training/tokenizer"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    transformer, text_encoder, vae = build_modules(DEMO)
    try:
        check_free(arguments.out)
        load(arguments.networks, transformer=transformer, text_encoder=text_encoder)
        load(arguments.vae, vae=vae)
        export_checkpoint(arguments.out, DEMO, transformer, text_encoder, vae, arguments.tokenizer)
    except FluxError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
