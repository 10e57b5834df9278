"""FluxPipeline: a loaded model and its stages.

The stages are public and can be called one by one; ``run`` strings them together
and hands control back after every slice, ``generate`` runs them through. All but
``prepare`` must be called from one thread, the one that owns the device.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fluxcore.bundled import bundled_model
from fluxcore.config import TEXT_TOKENS, CheckpointConfig, read_checkpoint_config
from fluxcore.params import GenerationParams
from fluxcore.pipeline.conditioning import Conditioning, ConditioningCache
from fluxcore.pipeline.denoise import (
    DenoiseInputs,
    DenoiseStep,
    Denoising,
    Inpainting,
    Velocity,
    denoise,
)
from fluxcore.pipeline.embedding_store import EmbeddingStore
from fluxcore.pipeline.encoded import NO_REFERENCES, EncodedJob, EncodedReferences
from fluxcore.pipeline.joint_steps import COUNTS, Batching, JointSteps
from fluxcore.pipeline.latents import Grid, draw_noise, pack
from fluxcore.pipeline.load import Components, default_side_px, load_components
from fluxcore.pipeline.pictures import (
    PictureDecoder,
    fit_inpainted,
    fit_reference,
    to_picture,
    to_pixels,
    to_token_mask,
    with_lines,
)
from fluxcore.pipeline.residency import settle_residency
from fluxcore.pipeline.resolve import resolve
from fluxcore.pipeline.result import GenerationResult, ModelInfo, PreparedJob
from fluxcore.pipeline.run import Run, begin_together
from fluxcore.pipeline.tables import KEPT_STEPS, Modulations, RopeTables
from fluxcore.runtime import (
    Compile,
    KernelChoice,
    Precision,
    Runtime,
    choose_runtime,
    keep_compiled,
    translated_errors,
)
from fluxcore.text import TokenizedPrompt
from fluxcore.weights import LoadProgress, component_identity

if TYPE_CHECKING:
    from fluxcore.drawn import DrawnPicture

CONDITIONING_CACHE_BYTES = 256 * 2**20
WARM_UP_PROMPT = "warm up"
GRAPHED_TOKENS = 4096
"""Image tokens of 1024x1024. With more of them a GPU is busy for longer than launching takes."""


class FluxPipeline:
    """A FLUX.2 [klein] model, resident on one device.

    Attributes:
        info: what was loaded.
        runtime: device, dtypes and their rules.
        config: the architecture.
        conditioning_cache: recent text embeddings, with hit and miss counters.
        conditioning_store: where they outlive the process, if they do.
        joint: steps of several pictures as one.
        faults: how often ``forget`` was called.
    """

    def __init__(
        self,
        components: Components,
        runtime: Runtime,
        conditioning_cache_bytes: int,
        store: EmbeddingStore | None = None,
        batching: Batching = "off",
    ) -> None:
        self.info: ModelInfo = components.info
        self.config: CheckpointConfig = components.config
        self.runtime = runtime
        self.tokenizer = components.tokenizer
        self.text_encoder = components.text_encoder
        self.transformer = components.transformer
        self.vae = components.vae
        self.stream = components.stream
        # What a base model steers away from where a request does not say.
        empty = () if self.info.is_distilled else (self.tokenizer.encode("").key,)
        self.faults = 0
        self.conditioning_store = store
        self.conditioning_cache = ConditioningCache(conditioning_cache_bytes, empty, store)
        self.rope_tables = RopeTables(
            self.config.transformer, runtime.device, runtime.dtypes.angles
        )
        self.modulations = Modulations(
            self.transformer.modulation,
            lambda levels: runtime.placed(levels, torch.float32),
            # Where their weights are streamed, they are read ahead for each picture.
            0 if runtime.residency == "low" else KEPT_STEPS,
        )
        # The networks as this device runs them. Layers whose weights come and go run as they are.
        self._embeddings_of: Callable[..., Tensor] = self.text_encoder
        self._velocity_of: Callable[..., Tensor] = self.transformer
        if runtime.residency == "resident":
            runtime.compile_blocks(self.text_encoder.layers, sizes_vary=False)
            self._embeddings_of = runtime.graphed(self.text_encoder, TEXT_TOKENS)
        if runtime.residency != "low":
            runtime.compile_blocks(self.transformer.double_blocks)
            runtime.compile_blocks(self.transformer.single_blocks)
            self._velocity_of = runtime.graphed(self.transformer, GRAPHED_TOKENS)
        self.joint = JointSteps(lambda *args: self._velocity_of(*args), runtime, batching)
        decoder = PictureDecoder(self.vae, runtime.dtypes.vae, self._layout)
        runtime.compile_blocks((decoder,))
        self._bytes_of: Callable[..., tuple[Tensor, ...]] = runtime.graphed(
            with_lines(decoder, runtime.deflate) if runtime.filters_pictures else decoder,
            GRAPHED_TOKENS,
        )

    @property
    def begins_ahead(self) -> bool:
        """Whether a job's prompt and first step can be queued behind another job's last work.

        Not where the encoder's layers come from the host: queueing then takes as long as the work.
        """
        return self.runtime.runs_ahead and self.runtime.residency == "resident"

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        progress: Callable[[LoadProgress], None] | None = None,
        residency: str = "auto",
        conditioning_cache_bytes: int = CONDITIONING_CACHE_BYTES,
        conditioning_store: Path | None = None,
        conditioning_store_bytes: int = 0,
        precision: Precision = "bf16",
        kernels: KernelChoice = "auto",
        compile_networks: Compile = "off",
        compiled_store: Path | None = None,
        cuda_graphs: int = 24,
        batching: Batching = "off",
    ) -> FluxPipeline:
        """Load a checkpoint directory onto a device.

        Args:
            path: a directory in the layout of black-forest-labs/FLUX.2-klein-4B; None
                for the bundled model, which draws shapes.
            device: auto, cpu, cuda, cuda:N or mps.
            dtype: auto, float32, bfloat16 or float16.
            progress: called after every tensor.
            residency: auto, resident, balanced or low: how much stays on the device.
            conditioning_cache_bytes: bound of the text-embedding cache.
            conditioning_store: directory in which embeddings outlive the process.
            conditioning_store_bytes: bound of that directory; 0 keeps none.
            precision: bf16, which multiplies in dtype, or fp8 (CUDA) or int8 (CPU); of the
                transformer, and in fp8 of the text encoder, where its layers stay.
            kernels: auto, plain or fused, which differ on CUDA and on CPUs with AMX.
            compile_networks: auto, on or off. The first picture waits for the compiler.
            compiled_store: directory in which compiled code outlives the process; None leaves
                that to PyTorch.
            cuda_graphs: recordings of launches that are kept at most; 0 makes none.
            batching: off, exact or fast: whether steps of pictures of one size are taken as one
                where a trial shows that to be faster; with exact, only where each picture stays
                the same bit for bit.

        Raises:
            CheckpointError: the directory cannot be used; names the file.
            DeviceUnavailableError: no such device or dtype here.
            OutOfMemoryError: the weights do not fit.
        """
        runtime = choose_runtime(
            device,
            dtype,
            precision=precision,
            kernels=kernels,
            compile_networks=compile_networks,
            cuda_graphs=cuda_graphs,
        )
        if runtime.compiles and compiled_store is not None:
            keep_compiled(compiled_store)
        with translated_errors():
            directory = bundled_model() if path is None else Path(path)
            config = read_checkpoint_config(directory)
            runtime = settle_residency(residency, config, runtime, default_side_px(config.vae))
            components = load_components(directory, runtime, progress)
        store = None
        if conditioning_store is not None and conditioning_store_bytes:
            store = EmbeddingStore(
                conditioning_store,
                conditioning_store_bytes,
                shape=(1, TEXT_TOKENS, components.config.text_encoder.conditioning_width),
                dtype=runtime.dtypes.residual or runtime.dtypes.weights,
                placed=runtime.placed,
                begin_to_host=runtime.begin_to_host,
                decides={
                    "weights": component_identity(directory / "text_encoder"),
                    "precision of the encoder": runtime.encoder_precision,
                    # Else, where the weights lie changes no value.
                    **replace(runtime, residency="resident").describe(),
                },
            )
        return cls(components, runtime, conditioning_cache_bytes, store, batching)

    def warm_up(
        self,
        sizes: Sequence[tuple[int, int]] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Draw one picture of one step of each (width, height), so that first jobs are not slow.

        Args:
            sizes: None for the model's default size.
            progress: called with (sizes done, sizes wanted).
        """
        if sizes is None:
            sizes = ((self.info.default_side_px, self.info.default_side_px),)
        # Even where the store knows this prompt: it is the encoder that is to be warm.
        self._encode_anew(self.tokenizer.encode(WARM_UP_PROMPT))
        if not self.info.is_distilled:
            self.encode_prompt("")
        pictures = [
            GenerationParams(prompt=WARM_UP_PROMPT, width=width, height=height, steps=1, seed=0)
            for width, height in sizes
        ]
        for done, params in enumerate(pictures):
            if progress is not None:
                progress(done, len(sizes))
            self.generate(params)
        if progress is not None:
            progress(len(sizes), len(sizes))
        for params in pictures:
            self._try_joining(params)

    @torch.inference_mode()
    def _try_joining(self, params: GenerationParams) -> None:
        """Find out which numbers of pictures of this size are better drawn side by side."""
        job = self.prepare(params)
        picture = self.denoising(job, 0, EncodedJob(*self.encode_text(job), NO_REFERENCES))
        self.joint.trial(picture.calls()[0], max(COUNTS))

    def prepare(self, params: GenerationParams) -> PreparedJob:
        """Check a request against the model and fill in defaults; no device work.

        Raises:
            InvalidParamsError: naming the field.
        """
        seed = secrets.randbits(32) if params.seed is None else params.seed
        return resolve(params, self.info, seed)

    @torch.inference_mode()
    def encode_prompt(self, text: str) -> Conditioning:
        """Text to embeddings, from the cache where it has them."""
        tokens = self.tokenizer.encode(text)
        found = self.conditioning_cache.get(tokens.key)
        hit = found is not None
        if found is None:
            found = self._encode_anew(tokens)
        return Conditioning(found, tokens.count, tokens.cut, cache_hit=hit)

    @torch.inference_mode()
    def _encode_anew(self, tokens: TokenizedPrompt) -> Tensor:
        """What the text encoder makes of a prompt; kept. Shapes: [1, 512, 3 D]."""
        # The count behind the ids, so that one copy brings both.
        told = torch.from_numpy(np.array([[*tokens.ids, tokens.count]], np.int64))
        with translated_errors():
            placed = self.runtime.placed(told, torch.int64)
            embeddings = self._embeddings_of(placed[:, :-1], placed[0, -1:])
        self.conditioning_cache.put(tokens.key, embeddings)
        return embeddings

    def encode_text(self, job: PreparedJob) -> tuple[Conditioning, Conditioning | None]:
        """The job's prompt and, where guidance is on, what to steer away from."""
        params = job.params
        positive = self.encode_prompt(params.prompt)
        if params.guidance is None:
            return positive, None
        return positive, self.encode_prompt(params.negative_prompt or "")

    @torch.inference_mode()
    def encode_references(self, job: PreparedJob) -> EncodedReferences:
        """References to latents; with a mask, the first is the picture to paint in."""
        count = len(job.request.references)
        return EncodedReferences.joined([self.encode_reference(job, i) for i in range(count)])

    @torch.inference_mode()
    def encode_reference(self, job: PreparedJob, index: int) -> tuple[Tensor, Grid]:
        """One of them. Shapes: [1, h w, C]."""
        reference = job.request.references[index]
        painted = index == 0 and job.request.mask is not None
        fitted = fit_inpainted(reference) if painted else fit_reference(reference)
        with translated_errors():
            latents = self.vae.encode(self._to_vae(to_pixels(fitted)))  # [1, C, h, w]
        packed = pack(latents).to(self.runtime.dtypes.weights)  # [1, h w, C]
        return packed, (latents.shape[2], latents.shape[3])

    @torch.inference_mode()
    def denoise(
        self,
        job: PreparedJob,
        image_index: int = 0,
        encoded: EncodedJob | None = None,
    ) -> Iterator[DenoiseStep]:
        """Noise to latents of one picture, yielding after every step.

        Args:
            encoded: prompt and references; encoded here when not given.
        """
        if encoded is None:
            encoded = EncodedJob(*self.encode_text(job), self.encode_references(job))
        inputs = self._denoise_inputs(job, image_index, encoded)
        params = job.params
        with translated_errors():
            yield from denoise(
                self.transformer, inputs, params.sigmas, params.start_step, self.joint.velocities
            )

    @torch.inference_mode()
    def denoising(self, job: PreparedJob, image_index: int, encoded: EncodedJob) -> Denoising:
        """One picture before its first step."""
        inputs = self._denoise_inputs(job, image_index, encoded)
        params = job.params
        with translated_errors():
            return Denoising(self.transformer, inputs, params.sigmas, params.start_step)

    def decode(self, latents: Tensor, width: int, height: int) -> DrawnPicture:
        """Latents to a picture on the host.

        Shapes: latents [1, h w, C], h = height / 16, w = width / 16.

        Raises:
            DeviceFaultError: the device returned something that is no picture.
        """
        return self.begin_decode(latents, width, height)()

    def begin_decode(self, latents: Tensor, width: int, height: int) -> Callable[[], DrawnPicture]:
        """As ``decode``, but queued where that can be.

        Returns:
            What waits for the picture; it raises what ``decode`` does.
        """
        with torch.inference_mode(), translated_errors():
            drawn = self._bytes_of(latents.contiguous(), *_grid(width, height))
            copied = self.runtime.begin_to_host(*drawn)

        def finish() -> DrawnPicture:
            with translated_errors():
                return to_picture(*copied())

        return finish

    def run(self, params: GenerationParams, *, alone: bool = False) -> Run:
        """The whole job in slices: yields after each, returns the result.

        Closing it abandons the job.

        Args:
            alone: no other job is there whose steps may be taken with its first ones.
        """
        return Run(self, params, alone=alone)

    def is_recorded(self, call: Velocity) -> bool:
        """Whether a step is launched at once: no recording, which waits for the device, is due."""
        return self.runtime.has_recorded(self.transformer, call)

    def share(self, run: Run, count: int) -> float:
        """Time of a step of one of so many jobs like this one, taken as one, of its time alone.

        Measured where it is not known. 1 where they are better taken one by one.
        """
        run.try_joining(count)
        return run.share(count)

    def begin_together(self, runs: Sequence[Run]) -> bool:
        """Take one step of several jobs of one size and schedule, all at the same step, as one.

        The next slice of each shows it.

        Returns:
            False where they are not alike, and were left as they are.
        """
        return begin_together(runs)

    def generate(
        self,
        params: GenerationParams,
        on_step: Callable[[DenoiseStep, int], None] | None = None,
    ) -> GenerationResult:
        """Draw the pictures that ``params`` asks for.

        Args:
            on_step: called with every step and the index of its picture.

        Raises:
            InvalidParamsError: the request does not fit the model.
            OutOfMemoryError: it does not fit into memory.
            DeviceFaultError: the device failed twice.
        """
        work = self.run(params, alone=True)
        while True:
            try:
                progress = next(work)
            except StopIteration as stop:
                result: GenerationResult = stop.value
                return result
            if on_step is not None and progress.denoise_step is not None:
                on_step(progress.denoise_step, progress.image_index)

    def forget(self) -> None:
        """Drop what is kept for reuse, in which a fault of the device may have been kept.

        What was queued for a run before its first slice is then done anew.
        """
        self.faults += 1
        self.rope_tables.clear()
        self.modulations.clear()
        self.conditioning_cache.clear()

    def _denoise_inputs(
        self, job: PreparedJob, image_index: int, encoded: EncodedJob
    ) -> DenoiseInputs:
        params, references = job.params, encoded.references
        dtype = self.runtime.dtypes.weights
        grid = _grid(params.width, params.height)
        channels = self.config.transformer.in_channels
        pinned = self.runtime.copies_from_pinned
        drawn = draw_noise(params.seeds[image_index], channels, grid, pinned=pinned)
        noise = self.runtime.placed(drawn.transpose(1, 2), dtype).transpose(1, 2).contiguous()
        inpainting = None
        if job.request.mask is not None:
            assert references.first is not None, "a mask comes with a picture"
            mask = to_token_mask(job.request.mask, (params.width, params.height))
            inpainting = Inpainting(references.first, noise, self.runtime.placed(mask, dtype))
        return DenoiseInputs(
            noise=noise,
            modulations=self.modulations.get(params.sigmas, params.start_step),
            references=references.tokens,
            positive=encoded.positive.embeddings,
            negative=None if encoded.negative is None else encoded.negative.embeddings,
            guidance=params.guidance or 1.0,
            pe=self.rope_tables.get(grid, references.grids),
            inpainting=inpainting,
        )

    def _to_vae(self, x: Tensor) -> Tensor:
        """Onto the device, in the VAE's dtype and memory layout. Shapes: [B, C, h, w]."""
        x = x.to(self.runtime.dtypes.vae).to(self.runtime.device)
        return x.contiguous(memory_format=self._layout)

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.runtime.channels_last else torch.contiguous_format


def _grid(width: int, height: int) -> Grid:
    return height // 16, width // 16
