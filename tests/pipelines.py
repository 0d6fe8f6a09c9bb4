"""Tiny pipelines for the tests of erasing, made once a session and never changed."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import zoo
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from germane.embedded import diffusion

BATCHES = 120  # of training: enough for digits that a judge mostly recognises
_keep: list[tempfile.TemporaryDirectory[str]] = []  # folders that stand until the process ends


def _folder() -> Path:
    _keep.append(tempfile.TemporaryDirectory())
    return Path(_keep[-1].name)


@functools.cache
def drawings() -> diffusion.Drawings:
    """A pipeline that draws digits by class, a judge, and images of the threes and of the others."""
    return diffusion.make(_folder(), steps=BATCHES)


@functools.cache
def prompted() -> SimpleNamespace:
    """Stable Diffusion with random weights, and images with prompts."""
    import diffusers
    import transformers

    folder = _folder()
    torch.manual_seed(0)
    words = {
        word: n
        for n, word in enumerate(
            ["<|startoftext|>", "<|endoftext|>", "a", "photo", "of", "church", "garage", "dog"]
        )
    }
    inner = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|startoftext|>", eos_token="<|endoftext|>",
        pad_token="<|endoftext|>", unk_token="<|endoftext|>", model_max_length=8,
    )  # fmt: skip
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    schedule = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=schedule,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    files = {}
    for name, word in (("forget", "church"), ("keep", "dog")):
        pixels = torch.randint(0, 256, (4, 16, 16, 3), generator=generator).tolist()
        files[name] = zoo.write_rows(
            folder / f"{name}.jsonl",
            [{"image": image, "prompt": f"a photo of a {word}"} for image in pixels],
        )
    return SimpleNamespace(pipeline=folder / "pipeline", files=files)


def by_class(**changes):
    """Arguments to erase the threes."""
    made = drawings()
    return {
        "model": str(made.pipeline), "concept": "3",
        "forget": {"name": "forget", "path": str(made.files["forget"]), "limit": 40},
        "keep": str(made.files["keep"]), "absent": diffusion.NO_CLASS, "samples": 4, "steps": 5, "batch": 64, **changes,
    }  # fmt: skip


def by_text(**changes):
    """Arguments to erase the churches."""
    made = prompted()
    return {
        "model": str(made.pipeline), "concept": "church", "forget": str(made.files["forget"]),
        "keep": str(made.files["keep"]), "samples": 2, "steps": 2, **changes,
    }  # fmt: skip


def edit_json(file: Path, **changes):
    """Replace keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
