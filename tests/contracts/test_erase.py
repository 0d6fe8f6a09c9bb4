"""What `germane/tasks/erase/_task.py` promises, held against every registered erase method."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import pipelines
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from germane import method as registry
from germane.core.errors import CheckpointError, GermaneError, RecordsError, SettingError
from germane.core.records import Data, read_rows, write_jsonl
from germane.recipe import run_task
from germane.tasks.erase._task import Erase

NAMES = registry.names("erase")
KINDS = {"class": pipelines.by_class, "text": pipelines.by_text}
# What a method needs to run at all, by kind of pipeline.
SETTINGS = {
    ("erase/salun", "class"): {"learning_rate": 1e-3},
    ("erase/salun", "text"): {"anchor": "garage", "learning_rate": 1e-3},
}
WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")
each = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.parametrize("kind", KINDS)


def erase(name: str, kind: str, out: Path, seed: int = 7, settings=None, **changes):
    chosen = {**SETTINGS.get((name, kind), {}), **(settings or {})}
    return run_task("erase", name.split("/")[1], KINDS[kind](**changes), chosen, out, seed=seed)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Each method's result on each kind of pipeline, made once."""
    made = {}

    def get(name, kind):
        if (name, kind) not in made:
            judge = {"judge": str(pipelines.drawings().judge)} if kind == "class" else {}
            out = tmp_path_factory.mktemp("erase") / "out"
            made[name, kind] = erase(name, kind, out, **judge)
        return made[name, kind]

    return get


@each
@both
def test_only_the_weights_of_the_unet_differ(name, kind, results):
    source, folder = Path(KINDS[kind]()["model"]), results(name, kind).folder
    before, after = load_file(source / WEIGHTS), load_file(folder / WEIGHTS)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert any(not torch.equal(before[n], after[n]) for n in before)
    for file in source.rglob("*"):
        if file.is_file() and file.parent.name != "unet":
            assert (folder / file.relative_to(source)).read_bytes() == file.read_bytes()


@each
@both
def test_the_result_opens_in_plain_diffusers(name, kind, results):
    folder = results(name, kind).folder
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if kind == "text":
        images = pipeline("a photo of a dog", num_inference_steps=2, output_type="np").images
        assert images.shape == (1, 16, 16, 3)
    else:
        unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
        assert unet(torch.zeros(1, 1, 8, 8), 3, class_labels=torch.tensor([3])).sample.shape == (1, 1, 8, 8)


@each
@both
def test_images_of_the_concept_move_more_than_others(name, kind, results):
    shift = {s.task: s.value for s in results(name, kind).scores if s.metric == "shift"}
    assert set(shift) == {"the concept", "other images"}
    codes = {finding.code for finding in results(name, kind).findings}
    assert ("not-specific" in codes) == (shift["the concept"] <= shift["other images"])
    if kind == "class":
        assert shift["the concept"] > shift["other images"] > 0


@each
def test_a_judge_tells_what_is_still_drawn(name, results):
    found = {
        (s.subject, s.task): s.value for s in results(name, "class").scores if s.metric == "recognised"
    }
    assert found["result", "the concept"] < found["base", "the concept"]
    assert found["result", "other images"] > 0.5 * found["base", "other images"]


@each
def test_pictures_before_and_after_stand_in_the_result(name, results):
    with Image.open(results(name, "class").folder / "pictures.png") as image:
        assert image.size == (8 * 8 * 8, 4 * 8 * 8)  # 8 images of 8 pixels, 8 times as large; 4 rows


@each
@both
def test_same_seed_same_weights_and_inputs_untouched(name, kind, results, tmp_path):
    source = Path(KINDS[kind]()["model"])
    before = digest(source)
    again = erase(name, kind, tmp_path / "again")
    first, second = (load_file(r.folder / WEIGHTS) for r in (results(name, kind), again))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert digest(source) == before


def digest(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@each
@both
def test_nothing_but_the_result_is_left(name, kind, results):
    source, folder = Path(KINDS[kind]()["model"]), results(name, kind).folder
    left = {path.name for path in folder.iterdir()} - {path.name for path in source.iterdir()}
    assert left == {"evidence.json", "report.html", "pictures.png"}
    assert not (folder.parent / "out.partial").exists()


@pytest.fixture
def broken(tmp_path):
    """A copy of a pipeline, to be damaged."""
    return lambda kind: Path(shutil.copytree(KINDS[kind]()["model"], tmp_path / "broken"))


def refused(error, match, tmp_path, kind="class", **changes):
    with pytest.raises(error, match=match):
        erase(NAMES[0], kind, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["unet", "scheduler", "vae", "text_encoder", "tokenizer"])
def test_a_missing_component_is_refused(part, broken, tmp_path):
    shutil.rmtree(broken("text") / part)
    refused(CheckpointError, f"has no {part}", tmp_path, "text", model=str(tmp_path / "broken"))


def test_a_pickle_is_refused(broken, tmp_path):
    folder = broken("class")
    (folder / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    refused(CheckpointError, "a pickle", tmp_path, model=str(folder))


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    refused(CheckpointError, "has no model_index.json", tmp_path, model=str(pipelines.drawings().judge))


def test_another_kind_of_pipeline_is_refused(broken, tmp_path):
    pipelines.edit_json(broken("class") / "model_index.json", _class_name="DiTPipeline")
    refused(
        CheckpointError, "is a DiTPipeline; germane erases from", tmp_path, model=str(tmp_path / "broken")
    )


def test_a_component_with_code_of_its_own_is_refused(broken, tmp_path):
    pipelines.edit_json(broken("class") / "model_index.json", unet=["my_unet", "UNet2DModel"])
    refused(CheckpointError, "code of 'my_unet'", tmp_path, model=str(tmp_path / "broken"))


def test_a_unet_without_classes_is_refused(broken, tmp_path):
    pipelines.edit_json(broken("class") / "unet" / "config.json", num_class_embeds=None)
    refused(CheckpointError, "no class embeddings", tmp_path, model=str(tmp_path / "broken"))


def test_a_unet_that_lacks_a_tensor_is_refused(broken, tmp_path):
    from safetensors.torch import save_file

    tensors = load_file(broken("class") / WEIGHTS)
    tensors.pop("conv_in.bias")
    save_file(tensors, tmp_path / "broken" / WEIGHTS, {"format": "pt"})
    refused(CheckpointError, "lacks 'conv_in.bias'", tmp_path, model=str(tmp_path / "broken"))


@pytest.mark.parametrize("concept", ["11", "10", "three", "-1"])
def test_a_concept_that_is_no_class_is_refused(concept, tmp_path):
    refused(SettingError, "is no class of the pipeline: 0 to 9", tmp_path, concept=concept)


def test_a_label_outside_the_classes_is_refused(tmp_path):
    rows = rows_of("forget")
    write_jsonl([*rows[:2], {**rows[2], "label": 77}], tmp_path / "odd.jsonl")
    refused(
        RecordsError,
        "record 3: label 77 is no class number from 0 to 10",
        tmp_path,
        forget=str(tmp_path / "odd.jsonl"),
    )


def rows_of(name):
    return read_rows(Data(name=name, path=str(pipelines.drawings().files[name])))


def test_images_of_the_concept_cannot_be_kept(tmp_path):
    write_jsonl([*rows_of("keep")[:2], rows_of("forget")[0]], tmp_path / "keep.jsonl")
    refused(
        RecordsError,
        "record 3: is of 3, which is the concept 3",
        tmp_path,
        keep=str(tmp_path / "keep.jsonl"),
    )


def test_images_of_others_cannot_be_forgotten(tmp_path):
    refused(RecordsError, "is not the concept 4: it belongs to the images to keep", tmp_path, concept="4")


def test_records_without_images_or_prompts_are_refused(tmp_path):
    write_jsonl([{"image": "nowhere.png", "label": 3}], tmp_path / "a.jsonl")
    refused(RecordsError, "there is no image", tmp_path, forget=str(tmp_path / "a.jsonl"))
    write_jsonl([{"image": [[1.0]], "label": 3}], tmp_path / "b.jsonl")
    refused(
        RecordsError, "has no prompt in field 'prompt'", tmp_path, "text", forget=str(tmp_path / "b.jsonl")
    )


def test_a_judge_that_does_not_fit_is_refused(bert, tmp_path):
    refused(CheckpointError, "a judge is a classifier of images", tmp_path, judge=str(bert.members[0]))


def test_a_rate_that_gives_nan_says_at_which_step(tmp_path):
    with pytest.raises(GermaneError, match=r"became (nan|-?inf) in epoch \d+, batch \d+"):
        erase("erase/salun", "class", tmp_path / "out", settings={"learning_rate": 1e30})
    assert not (tmp_path / "out").exists()


def test_records_to_evaluate_on_are_scored_before_and_after(tmp_path):
    test = str(pipelines.drawings().files["test"])
    result = erase(
        NAMES[0], "class", tmp_path / "out", evaluate=[{"name": "test", "path": test, "limit": 20}]
    )
    found = {s.subject: s for s in result.scores if s.metric == "denoising error"}
    assert found["base"].n == found["result"].n == 20
    assert found["base"].value < found["result"].value


def test_the_task_has_its_arguments():
    assert set(Erase.paths) <= set(Erase.model_fields)
