"""The picture by which ``fluxd doctor`` knows the bundled model; to be made anew with new weights.

python -m demo.known_picture
"""

from __future__ import annotations

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.bundled import KNOWN_PICTURE, KNOWN_PROMPT, KNOWN_SEED


def main() -> None:
    """Draw it in float32 on the CPU and put it into the package."""
    pipe = FluxPipeline.load(device="cpu", dtype="float32")
    result = pipe.generate(GenerationParams(prompt=KNOWN_PROMPT, seed=KNOWN_SEED))
    result.images[0].save(KNOWN_PICTURE, optimize=True)
    print(KNOWN_PICTURE)


if __name__ == "__main__":
    main()
