"""The pipeline on a tiny model: same seeds, same bytes; slices, warnings and the cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

from fluxcore import FluxPipeline, GenerationParams
from fluxcore.errors import InvalidParamsError
from fluxcore.params import MAX_SEED
from fluxcore.pipeline import ConditioningCache, DenoiseStep, GenerationResult, Progress

Encoded = list[int]


def params(prompt: str = "a red fox", **fields: Any) -> GenerationParams:
    return GenerationParams(
        prompt=prompt, **{"width": 64, "height": 64, "steps": 2, "seed": 7, **fields}
    )


def painting(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pixels(result: GenerationResult) -> list[bytes]:
    return [image.tobytes() for image in result.images]


def finish(work: Generator[Progress, None, GenerationResult]) -> GenerationResult:
    while True:
        try:
            next(work)
        except StopIteration as stop:
            result: GenerationResult = stop.value
            return result


@pytest.fixture
def pipe(tiny_pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> FluxPipeline:
    """The shared model, with an empty cache of its own."""
    monkeypatch.setattr(tiny_pipeline, "conditioning_cache", ConditioningCache(2**28))
    return tiny_pipeline


@pytest.fixture(scope="module")
def base(tiny_base_checkpoint: Path) -> FluxPipeline:
    return FluxPipeline.load(tiny_base_checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def encodings(pipe: FluxPipeline, base: FluxPipeline) -> Iterator[Encoded]:
    """Grows with every run of a text encoder, by the prompt's number of tokens."""
    calls: Encoded = []

    def count(_: Any, inputs: tuple[torch.Tensor, ...], __: Any) -> None:
        calls.append(int(inputs[1].item()))

    hooks = [p.text_encoder.register_forward_hook(count) for p in (pipe, base)]
    yield calls
    for hook in hooks:
        hook.remove()


def test_the_same_seed_gives_the_same_bytes(pipe: FluxPipeline) -> None:
    first = pipe.generate(params())
    assert first.images[0].size == (64, 64)
    assert first.images[0].mode == "RGB"
    assert len(set(pixels(first)[0])) > 100, "the picture has no content to compare"
    assert pixels(pipe.generate(params())) == pixels(first)
    pipe.conditioning_cache.clear()
    assert pixels(pipe.generate(params())) == pixels(first)


def test_a_model_that_is_loaded_again_draws_the_same_bytes(
    pipe: FluxPipeline, tiny_checkpoint: Path
) -> None:
    again = FluxPipeline.load(str(tiny_checkpoint), device="cpu", dtype="float32")
    assert pixels(again.generate(params())) == pixels(pipe.generate(params()))


def test_each_choice_changes_the_picture(pipe: FluxPipeline) -> None:
    requests = [
        params(),
        params(prompt="a blue fox"),
        params(seed=8),
        params(steps=3),
        params(schedule="linear"),
        params(schedule="power"),
        params(schedule="power", power_alpha=3.0),
        params(references=(painting(64, 64),)),
        params(references=(painting(80, 64),)),
        params(references=(painting(64, 64), painting(80, 64))),
        params(references=(painting(80, 64), painting(64, 64))),
    ]
    assert len({pixels(pipe.generate(request))[0] for request in requests}) == len(requests)


@pytest.mark.parametrize("kind", ["text", "references", "inpainting"])
def test_picture_i_of_n_is_the_single_picture_of_its_seed(pipe: FluxPipeline, kind: str) -> None:
    extra: dict[str, Any] = {}
    if kind != "text":
        extra["references"] = (painting(70, 90), painting(64, 64, 1))
    if kind == "inpainting":
        mask = Image.new("L", (70, 90))
        mask.paste(255, (0, 0, 40, 90))
        extra |= {"mask": mask, "width": None, "height": None}
    together = pipe.generate(params(n=3, **extra))
    assert together.seeds == [7, 8, 9]
    assert len(set(pixels(together))) == 3
    for i, seed in enumerate(together.seeds):
        assert pixels(pipe.generate(params(seed=seed, **extra))) == [pixels(together)[i]]


def test_picture_i_of_n_of_a_guided_model_is_its_single_picture(base: FluxPipeline) -> None:
    together = base.generate(params(n=2, negative_prompt="fog"))
    alone = base.generate(params(seed=8, negative_prompt="fog"))
    assert pixels(together)[1] == pixels(alone)[0]


def test_guidance_and_the_negative_prompt_count_on_a_base_model(base: FluxPipeline) -> None:
    requests = [
        params(guidance=1.0),
        params(guidance=2.0),
        params(guidance=4.0),
        params(guidance=4.0, negative_prompt="fog"),
    ]
    drawn = [pixels(base.generate(request))[0] for request in requests]
    assert len(set(drawn)) == len(requests)
    assert pixels(base.generate(params()))[0] == drawn[2], "4.0 is the default"
    assert pixels(base.generate(params(negative_prompt="")))[0] == drawn[2]


def test_seeds_are_drawn_where_none_is_given_and_told(pipe: FluxPipeline) -> None:
    first, second = (pipe.generate(params(seed=None, n=2)) for _ in range(2))
    assert first.seeds != second.seeds
    assert first.seeds[1] == first.seeds[0] + 1
    assert pixels(pipe.generate(params(seed=first.seeds[1])))[0] == pixels(first)[1]


def test_the_largest_seed_draws(pipe: FluxPipeline) -> None:
    result = pipe.generate(params(seed=MAX_SEED - 1, n=2))
    assert result.seeds == [MAX_SEED - 1, MAX_SEED]
    assert len(set(pixels(result))) == 2


@pytest.mark.parametrize(("width", "height"), [(64, 128), (112, 64), (80, 80)])
def test_pictures_have_the_size_that_was_asked_for(
    pipe: FluxPipeline, width: int, height: int
) -> None:
    result = pipe.generate(params(width=width, height=height, steps=1))
    assert result.images[0].size == (width, height)
    assert (result.params.width, result.params.height) == (width, height)


def test_a_painted_picture_has_the_size_of_its_reference_in_whole_tokens(
    pipe: FluxPipeline,
) -> None:
    fields = {"width": None, "height": None, "references": (painting(100, 90),)}
    mask = Image.new("L", (100, 90), 255)
    result = pipe.generate(params(mask=mask, strength=0.5, **fields))
    assert result.images[0].size == (96, 80)
    assert result.params.start_step == 1


def test_an_all_black_mask_gives_the_picture_back(pipe: FluxPipeline) -> None:
    """Through the VAE and back, that is."""
    picture = painting(80, 64)
    fields = {"width": None, "height": None, "references": (picture,)}
    kept = pipe.generate(params(mask=Image.new("L", (80, 64)), **fields)).images[0]
    job = pipe.prepare(params(mask=Image.new("L", (80, 64)), **fields))
    latents = pipe.encode_references(job).first
    assert latents is not None
    assert pipe.decode(latents, 80, 64).pixels.tobytes() == kept.tobytes()


def test_the_stages_one_by_one_make_the_same_picture(pipe: FluxPipeline) -> None:
    expected = pipe.generate(params(n=2))
    job = pipe.prepare(params(n=2))
    for i in range(2):
        steps = list(pipe.denoise(job, image_index=i))
        assert [step.index for step in steps] == [1, 2]
        picture = pipe.decode(steps[-1].latents, 64, 64)
        assert picture.pixels.tobytes() == pixels(expected)[i]


def test_images_are_made_for_those_who_ask(
    pipe: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Image.Image] = []
    plain = Image.Image.__init__

    def noted(image: Image.Image) -> None:
        made.append(image)
        plain(image)

    monkeypatch.setattr(Image.Image, "__init__", noted)
    result = pipe.generate(params(n=2))
    assert not made
    assert [image.tobytes() for image in result.images] == [
        picture.pixels.tobytes() for picture in result.pictures
    ]
    assert made and all(a is b for a, b in zip(result.images, result.images, strict=True))


def test_the_last_step_s_preview_is_the_picture(pipe: FluxPipeline) -> None:
    """Both sums are the same but for rounding: at most 1 of 255."""
    last = list(pipe.denoise(pipe.prepare(params())))[-1]
    preview, final = (
        pipe.decode(latents, 64, 64).pixels.astype(int)
        for latents in (last.predicted_clean(), last.latents)
    )
    assert np.abs(preview - final).max() <= 1


def test_a_prompt_is_told_with_its_tokens(pipe: FluxPipeline) -> None:
    first = pipe.encode_prompt("a red fox")
    assert first.embeddings.shape == (1, 512, 192)
    assert first.embeddings.dtype == torch.float32
    assert torch.isfinite(first.embeddings).all()
    assert (first.token_count, first.truncated_tokens, first.cache_hit) == (17, 0, False)
    second = pipe.encode_prompt("a red fox")
    assert second.cache_hit
    assert second.embeddings is first.embeddings
    assert not pipe.encode_prompt("a red fox ").cache_hit
    assert (pipe.conditioning_cache.hits, pipe.conditioning_cache.misses) == (1, 2)


def test_prompts_that_are_the_same_tokens_share_their_embeddings(pipe: FluxPipeline) -> None:
    pipe.encode_prompt("caf\u00e9")
    assert pipe.encode_prompt("cafe\u0301").cache_hit


def test_the_encoder_runs_once_per_prompt(pipe: FluxPipeline, encodings: Encoded) -> None:
    first = pipe.generate(params(n=3))
    assert len(encodings) == 1
    assert encodings[0] == first.prompt_tokens == pipe.encode_prompt("a red fox").token_count
    assert not first.cache_hit
    assert pipe.generate(params(seed=1)).cache_hit
    assert len(encodings) == 1


def test_a_cache_of_0_bytes_still_encodes_once_per_job(
    pipe: FluxPipeline, encodings: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pixels(pipe.generate(params(n=3)))
    monkeypatch.setattr(pipe, "conditioning_cache", ConditioningCache(0))
    for job in range(1, 3):
        result = pipe.generate(params(n=3))
        assert pixels(result) == expected
        assert not result.cache_hit
        assert len(encodings) == 1 + job
    assert pipe.conditioning_cache.bytes_used == 0


def test_a_guided_job_encodes_both_prompts_once(
    base: FluxPipeline, encodings: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "conditioning_cache", ConditioningCache(2**28))
    base.generate(params(n=2, negative_prompt="fog"))
    assert len(encodings) == 2
    base.generate(params(prompt="a cat", negative_prompt="fog"))
    assert len(encodings) == 3
    base.generate(params(guidance=1.0, prompt="a dog", negative_prompt="hail"))
    assert len(encodings) == 4, "an unguided job has no use for the negative prompt"


def test_the_cache_is_as_large_as_it_was_ordered(tiny_checkpoint: Path) -> None:
    one = 512 * 192 * 4
    small = FluxPipeline.load(
        tiny_checkpoint, device="cpu", dtype="float32", conditioning_cache_bytes=2 * one
    )
    for prompt in ("a", "b", "c"):
        small.encode_prompt(prompt)
    cache = small.conditioning_cache
    assert (cache.bytes_limit, cache.bytes_used, cache.entries) == (2 * one, 2 * one, 2)
    assert not small.encode_prompt("a").cache_hit


def test_progress_comes_in_the_order_of_the_work(pipe: FluxPipeline) -> None:
    request = params(n=2, references=(painting(64, 64), painting(64, 96)))
    told = list(pipe.run(request))
    before = [("text", 0), ("references", 0), ("references", 0)]
    picture = [("denoise", 1), ("denoise", 2), ("decode", 2)]
    assert [(p.stage, p.step) for p in told] == [*before, *picture, *picture]
    assert [p.image_index for p in told] == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert {p.steps for p in told} == {2}
    for p in told:
        assert (p.denoise_step is not None) == (p.stage == "denoise")
        if p.denoise_step is not None:
            assert p.denoise_step.index == p.step


def test_every_step_is_shown_to_the_caller(pipe: FluxPipeline) -> None:
    seen: list[tuple[int, int]] = []

    def on_step(step: DenoiseStep, image_index: int) -> None:
        seen.append((image_index, step.index))

    pipe.generate(params(n=2, steps=3), on_step=on_step)
    assert seen == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]


def test_the_result_tells_times_memory_and_what_was_used(pipe: FluxPipeline) -> None:
    result = pipe.generate(params())
    assert list(result.timings) == ["text", "denoise", "decode", "total"]
    stages = [time for stage, time in result.timings.items() if stage != "total"]
    assert result.timings["total"] == pytest.approx(sum(stages))
    assert min(stages) > 0
    assert result.peak_bytes > pipe.info.weight_bytes
    assert result.warnings == []
    assert result.params == pipe.prepare(params()).params
    with_reference = pipe.generate(params(references=(painting(64, 64),)))
    assert list(with_reference.timings) == ["text", "references", "denoise", "decode", "total"]


def test_a_job_can_be_abandoned_after_any_slice(pipe: FluxPipeline) -> None:
    request = params(n=2, references=(painting(64, 64),))
    expected = pixels(pipe.generate(params()))
    slices = len(list(pipe.run(request)))
    for done in range(slices):
        work = pipe.run(request)
        for _ in range(done):
            next(work)
        work.close()
        with pytest.raises(StopIteration):
            next(work)
    assert pixels(pipe.generate(params())) == expected
    assert not torch.is_inference_mode_enabled()


def test_jobs_can_take_turns(pipe: FluxPipeline) -> None:
    requests = [
        params(n=2),
        params(prompt="a cat", width=96, steps=3, references=(painting(64, 64),)),
        params(prompt="a dog", seed=3),
    ]
    expected = [pixels(pipe.generate(request)) for request in requests]
    waiting = {i: pipe.run(request) for i, request in enumerate(requests)}
    found: dict[int, list[bytes]] = {}
    while waiting:
        for i, work in list(waiting.items()):
            try:
                next(work)
            except StopIteration as stop:
                found[i] = pixels(stop.value)
                del waiting[i]
            assert not torch.is_inference_mode_enabled()
    assert [found[i] for i in range(3)] == expected


def test_the_times_of_a_job_leave_out_what_runs_between_its_slices(pipe: FluxPipeline) -> None:
    """A job's stages lie within its own slices, whatever another job does meanwhile."""
    own_s, results = [0.0, 0.0], []
    runs = [pipe.run(params(steps=3, seed=1)), pipe.run(params(steps=3, seed=2))]
    while len(results) < 2:
        for i, run in enumerate(runs):
            began_s = time.perf_counter()
            try:
                next(run)
            except StopIteration as end:
                results.append(end.value)
            own_s[i] += time.perf_counter() - began_s
            time.sleep(0.02)
    for result, spent_s in zip(results, own_s, strict=True):
        assert 0 < result.timings["total"] <= spent_s * 1000
        assert result.timings["total"] == pytest.approx(
            sum(ms for stage, ms in result.timings.items() if stage != "total")
        )


def test_a_job_may_run_on_another_thread_than_the_one_that_loaded(pipe: FluxPipeline) -> None:
    expected = pixels(pipe.generate(params()))
    found: list[list[bytes]] = []
    thread = threading.Thread(target=lambda: found.append(pixels(pipe.generate(params()))))
    thread.start()
    thread.join()
    assert found == [expected]


LONG = "~" * 600
"""More single-character tokens than fit; the template takes 14 more."""


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": LONG}, ["the prompt is too long: its last 102 tokens were not used"]),
        ({"guidance": 3.0}, ["guidance has no effect on a distilled model"]),
        ({"negative_prompt": "fog"}, ["negative_prompt has no effect on a distilled model"]),
        (
            {"prompt": LONG, "guidance": 3.0, "n": 2},
            [
                "guidance has no effect on a distilled model",
                "the prompt is too long: its last 102 tokens were not used",
            ],
        ),
    ],
)
def test_what_was_not_used_is_said_with_the_result(
    pipe: FluxPipeline, fields: dict[str, Any], words: list[str]
) -> None:
    for _ in range(2):  # the second time from the cache
        result = pipe.generate(params(**{"steps": 1, **fields}))
        assert result.warnings == words


def test_a_cut_negative_prompt_is_said_too(base: FluxPipeline) -> None:
    result = base.generate(params(steps=1, negative_prompt=LONG))
    assert result.warnings == ["the negative_prompt is too long: its last 102 tokens were not used"]
    assert base.generate(params(steps=1, guidance=1.0, prompt="a cat")).warnings == []


def test_a_prompt_that_is_cut_draws_what_fits(pipe: FluxPipeline) -> None:
    cut = pipe.encode_prompt(LONG)
    assert (cut.token_count, cut.truncated_tokens) == (512, 102)
    assert pixels(pipe.generate(params(LONG))) == pixels(pipe.generate(params(LONG + "~ fox")))


def test_a_request_that_does_not_fit_the_model_fails_before_any_work(
    pipe: FluxPipeline, encodings: Encoded
) -> None:
    request = GenerationParams(prompt="a", references=(painting(5600, 700),))
    with pytest.raises(InvalidParamsError, match="2048"):
        pipe.prepare(request)
    with pytest.raises(InvalidParamsError, match="2048"):
        pipe.generate(request)
    assert encodings == []


def test_preparing_does_no_device_work(pipe: FluxPipeline, encodings: Encoded) -> None:
    calls: list[int] = []
    hooks = [
        network.register_forward_hook(lambda *_: calls.append(1))
        for network in (pipe.transformer, pipe.vae.encoder, pipe.vae.decoder)
    ]
    pipe.prepare(params(LONG, references=(painting(64, 64),)))
    for hook in hooks:
        hook.remove()
    assert (calls, encodings) == ([], [])


def test_warming_up_draws_each_size_and_tells(pipe: FluxPipeline) -> None:
    told: list[tuple[int, int]] = []
    tokens: list[int] = []
    hook = pipe.transformer.register_forward_hook(
        lambda _, __, output: tokens.append(output.shape[1])
    )
    pipe.warm_up(sizes=((64, 64), (64, 80)), progress=lambda *done: told.append(done))
    assert told == [(0, 2), (1, 2), (2, 2)]
    assert tokens == [16, 20], "one step each"
    pipe.warm_up()
    hook.remove()
    assert tokens[2:] == [32 * 32], "512 x 512, which this model draws by default"


@pytest.mark.parametrize(("dtype", "mean"), [("bfloat16", 5.0), ("float16", 0.5)])
def test_narrow_dtypes_draw_nearly_the_same_picture(
    pipe: FluxPipeline,
    tiny_narrow: dict[str, FluxPipeline],
    dtype: str,
    mean: float,
) -> None:
    """Mean difference of the bytes measured: 0.88 in bfloat16, 0.09 in float16."""
    request = params(width=128, height=96, steps=4, references=(painting(64, 80),))
    exact, found = (
        np.asarray(p.generate(request).images[0]).astype(int) for p in (pipe, tiny_narrow[dtype])
    )
    assert np.abs(exact - found).mean() < mean
    assert exact.std() > 30


@pytest.mark.parametrize("steps", [1, 3])
def test_networks_are_called_on_contiguous_tensors(pipe: FluxPipeline, steps: int) -> None:
    """A compiled or recorded form fits one layout; one for each step would be compiled anew."""
    seen: list[bool] = []

    def look(_: Any, inputs: tuple[Any, ...]) -> None:
        seen.extend(leaf.is_contiguous() for leaf in tree_leaves(inputs) if torch.is_tensor(leaf))

    networks = (pipe.text_encoder, pipe.transformer, *pipe.transformer.double_blocks)
    hooks = [network.register_forward_pre_hook(look) for network in networks]
    for request in (
        params(LONG, steps=steps),
        params(LONG, steps=steps, references=(painting(96, 64),), width=64, height=80),
        params(
            LONG,
            steps=steps,
            references=(painting(96, 64),),
            mask=painting(96, 64).convert("L"),
            width=None,
            height=None,
        ),
    ):
        pipe.generate(request)
    for hook in hooks:
        hook.remove()
    assert seen
    assert all(seen)
