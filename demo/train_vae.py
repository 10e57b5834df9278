"""Train the autoencoder on rendered scenes.

    torchrun --nproc-per-node 2 -m demo.train_vae --out .models/training

The loss is the squared error of the pixels, a little of the absolute one, and the
divergence of the latents from noise, weighted so that few channels carry much: a
latent space in which denoising is easy is worth more than the last decibel. After
training, the latents' mean and variance per channel become the batch-norm statistics.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from demo.architecture import DEMO, build_modules
from demo.render import SceneBatch, render
from demo.run import Average, Curve, Gradients, Run, load, save, set_lr, trapezoid
from demo.scenes import random_scene
from fluxcore.models import AutoEncoder

SIZES = ((256, 256), (256, 256), (256, 256), (128, 128), (256, 256))
HELD_OUT_SEED = 999_983


class Scenes(IterableDataset[SceneBatch]):
    """Endless batches of scenes; ``pixels`` decides how many a batch has."""

    def __init__(self, pixels: int, *, seed: int, rank: int) -> None:
        self.pixels, self.seed, self.rank = pixels, seed, rank

    def __iter__(self) -> Iterator[SceneBatch]:
        torch.set_num_threads(1)
        info = get_worker_info()
        step, stride = (0, 1) if info is None else (info.id, info.num_workers)
        while True:
            rng = random.Random(f"{self.seed}/{self.rank}/{step}")
            width, height = SIZES[step % len(SIZES)]
            count = max(1, self.pixels // (width * height))
            yield SceneBatch.of([random_scene(rng, width, height) for _ in range(count)])
            step += stride


class Loss(torch.nn.Module):
    """Encode, sample, decode, compare. Shapes: pixels [B, 3, H, W] in [-1, 1] -> 3 scalars."""

    def __init__(self, vae: AutoEncoder, divergence: float) -> None:
        super().__init__()
        self.vae, self.divergence = vae, divergence

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        moments = self.vae.encoder(pixels)
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        if self.vae.post_quant_conv is not None:
            latents = self.vae.post_quant_conv(latents)
        difference = self.vae.decoder(latents).float() - pixels
        squared = difference.square().mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = squared + 0.02 * difference.abs().mean() + self.divergence * divergence
        return loss, squared, divergence


def held_out_pixels(count: int, size: int, device: torch.device) -> Tensor:
    """Pictures that training never saw. Shapes: -> [count, 3, size, size] in [0, 1]."""
    rng = random.Random(HELD_OUT_SEED)
    scenes = [random_scene(rng, size, size, held_out=True) for _ in range(count)]
    return render(SceneBatch.of(scenes).to(device))


@torch.no_grad()
def reconstruction_psnr(vae: AutoEncoder, pixels: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio, in dB, 8-bit pixels.

    Shapes: pixels [N, 3, H, W] in [0, 1].
    """
    ratios = []
    for part in pixels.split(32):
        wanted = (part * 255).round()
        drawn = vae.decode(vae.encode(wanted / 127.5 - 1)).float()
        drawn = ((drawn / 2 + 0.5).clamp(0, 1) * 255).round()
        error = (drawn - wanted).square().mean(dim=(1, 2, 3)).clamp_min(1e-3)
        ratios.append(10 * (255**2 / error).log10())
    return float(torch.cat(ratios).mean())


@torch.no_grad()
def measure_latents(vae: AutoEncoder, batches: Iterator[SceneBatch], count: int) -> None:
    """Set the batch-norm statistics from ``count`` batches of 256x256 pictures."""
    vae.latent_mean.zero_()
    vae.latent_variance.fill_(1.0 - vae.config.batch_norm_eps)
    found: list[Tensor] = []
    while len(found) < count:
        batch = next(batches)
        if (batch.width, batch.height) == (256, 256):
            latents = vae.encode(render(batch) * 2 - 1).float()
            found.append(latents.transpose(0, 1).flatten(1).double())  # [4 C, B h w]
    values = torch.cat(found, dim=1)
    vae.latent_mean.copy_(values.mean(dim=1))
    vae.latent_variance.copy_(values.var(dim=1))


def train(arguments: argparse.Namespace) -> None:
    """The whole run."""
    run = Run.start(arguments.seed)
    vae = build_modules(DEMO)[2].to(run.device)
    if arguments.resume:
        load(arguments.resume, vae=vae)
    loss_of = Loss(vae, arguments.divergence)
    optimiser = torch.optim.AdamW(
        vae.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.0
    )
    gradients, average = Gradients([vae], run, 1.0), Average([vae], 0.998)
    curve = Curve(arguments.out / "vae.jsonl", run)
    step_of = torch.compile(loss_of, dynamic=False) if arguments.compile else loss_of
    scenes = Scenes(arguments.batch * 256 * 256, seed=arguments.seed, rank=run.rank)
    batches = iter(DataLoader(scenes, batch_size=None, num_workers=arguments.workers))
    step, progress = 0, 0.0
    torch.manual_seed(arguments.seed + run.rank)
    while progress < 1.0:
        if step % 20 == 0:
            progress = run.progress(step, arguments.steps, arguments.seconds)
        set_lr([optimiser], trapezoid(progress, step, 200, 0.4))
        pixels = render(next(batches).to(run.device)) * 2 - 1
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        gradients.clear()
        with torch.autocast(run.device.type, torch.bfloat16):
            loss, squared, divergence = step_of(pixels)
        loss.backward()
        norm = gradients.finish()
        optimiser.step()
        average.update()
        if step % 100 == 0:
            decibel = -10 * (squared.detach() / 4).log10()
            values = {"loss": loss.detach(), "train_psnr": decibel, "kl": divergence.detach()}
            curve.add(step, **values, norm=norm)
        step += 1
    average.swap()
    if run.is_first:
        on_device = (batch.to(run.device) for batch in batches)
        measure_latents(vae, on_device, 20)
        vae.to(torch.bfloat16).float()  # what will be on disk is what is measured
        psnr = reconstruction_psnr(vae, held_out_pixels(256, 256, run.device))
        deviation = vae.latent_variance.sqrt()
        run.say(
            f"held-out PSNR {psnr:.2f} dB at 256x256; deviation of latents "
            f"{deviation.min():.3f} to {deviation.max():.3f}, "
            f"{int((deviation > 0.3).sum())} of {len(deviation)} above 0.3"
        )
        curve.add(step, held_out_psnr=psnr)
        save(arguments.out / "vae.pt", vae=vae)
    run.end()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demo's autoencoder.")
    parser.add_argument("--out", type=Path, default=Path(".models/training"))
    parser.add_argument("--resume", type=Path, help="a vae.pt to go on from")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seconds", type=float, default=1e9, help="end after so long")
    parser.add_argument("--batch", type=int, default=64, help="256x256 pictures per GPU")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--divergence", type=float, default=5e-4)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
