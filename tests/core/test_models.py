import json

import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file

from germane.core.checkpoint import Checkpoint
from germane.core.effect import judge_change, weight_change
from germane.core.errors import CheckpointError, RecordsError
from germane.core.models import load_model
from germane.core.objective import Task
from germane.core.records import Data, read_rows
from germane.core.rows import RowClassifier, RowConfig


@pytest.fixture
def rows_folder(tmp_path):
    torch.manual_seed(0)
    config = RowConfig(features=["a", "b"], hidden=[3], means=[1.0, 2.0], scales=[2.0, 4.0], num_labels=2)
    RowClassifier(config).save_pretrained(tmp_path / "rows")
    return tmp_path / "rows"


def test_rows_by_hand(rows_folder):
    model = load_model(str(rows_folder)).model
    weights = load_file(rows_folder / "model.safetensors")
    inputs = (torch.tensor([3.0, 6.0]) - torch.tensor([1.0, 2.0])) / torch.tensor([2.0, 4.0])
    hidden = (weights["layers.0.weight"] @ inputs + weights["layers.0.bias"]).clamp(min=0)
    expected = weights["classifier.weight"] @ hidden + weights["classifier.bias"]
    torch.testing.assert_close(model(torch.tensor([[3.0, 6.0]])).logits[0], expected)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": 1, "label": 0}, "has no field 'b'"),
        ({"a": 1, "b": "nan", "label": 0}, "NaN or infinite"),
        ({"a": 1, "b": 2, "label": 5}, "label 5 is none of the model's 2"),
    ],
)
def test_rows_that_cannot_be_read(rows_folder, tmp_path, row, message):
    (tmp_path / "bad.jsonl").write_text(json.dumps(row))
    data = Data(name="bad", path=str(tmp_path / "bad.jsonl"))
    loaded = load_model(str(rows_folder))
    with pytest.raises(RecordsError, match=message):
        Task(data, read_rows(data), loaded.model, loaded.processor)


def test_a_model_of_several_files_is_saved_whole(tmp_path):
    model = transformers.LlamaForCausalLM(zoo.llama_config())
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    zoo.tokenizer().save_pretrained(tmp_path / "a")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    load_model(str(tmp_path / "a")).save(tmp_path / "b")
    before, after = (Checkpoint(tmp_path / name) for name in "ab")
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in before.tensors)
    load_model(str(tmp_path / "b"))


def test_a_model_is_saved_in_the_dtype_it_was_loaded_from(tmp_path):
    model = transformers.LlamaForCausalLM(zoo.llama_config()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "a")
    zoo.tokenizer().save_pretrained(tmp_path / "a")
    loaded = load_model(str(tmp_path / "a"))
    assert loaded.model.dtype == torch.float32
    loaded.save(tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    assert loaded.model.dtype == torch.float32


def test_missing_tensors_are_not_made_up(tmp_path, rows_folder):
    weights = load_file(rows_folder / "model.safetensors")
    del weights["layers.0.bias"]
    save_file(weights, rows_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .* 'layers.0.bias'"):
        load_model(str(rows_folder))


def image_model(folder):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, num_labels=2,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)


def test_images_from_numbers_and_from_files_are_the_same(tmp_path):
    from PIL import Image

    image_model(tmp_path / "model")
    pixels = torch.randint(0, 255, (8, 8, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy().astype("uint8")).save(tmp_path / "one.png")
    rows = [{"image": pixels.tolist(), "label": 1}, {"image": "one.png", "label": 1}]
    (tmp_path / "images.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = Data(name="images", path=str(tmp_path / "images.jsonl"))
    loaded = load_model(str(tmp_path / "model"))
    task = Task(data, read_rows(data), loaded.model, loaded.processor)
    losses = task.losses(next(task.batches(2)), "cross-entropy")
    assert losses[0].item() == pytest.approx(losses[1].item())
    assert task.score("result").n == 2


@pytest.mark.parametrize("value", ["nowhere.png", [[1, 2], [3, 999]], [1, 2]])
def test_images_that_are_none(tmp_path, value):
    image_model(tmp_path / "model")
    (tmp_path / "images.jsonl").write_text(json.dumps({"image": value, "label": 1}))
    data = Data(name="images", path=str(tmp_path / "images.jsonl"))
    loaded = load_model(str(tmp_path / "model"))
    with pytest.raises(RecordsError, match="record 1"):
        Task(data, read_rows(data), loaded.model, loaded.processor)


def test_the_change_of_weights_by_hand(tmp_path, rows_folder):
    loaded = load_model(str(rows_folder))
    loaded.save(tmp_path / "same")
    assert (
        judge_change(weight_change(Checkpoint(rows_folder), Checkpoint(tmp_path / "same"))).code
        == "no-effect"
    )
    with torch.no_grad():
        loaded.model.classifier.weight.mul_(1.5)
    loaded.save(tmp_path / "moved")
    change = weight_change(Checkpoint(rows_folder), Checkpoint(tmp_path / "moved"))
    assert next(iter(change.most.items())) == ("classifier.weight", pytest.approx(0.5))
    assert judge_change(change).code == "changed"


def test_long_texts_are_cut_into_pieces_only_where_asked(tmp_path):
    model = transformers.LlamaForCausalLM(zoo.llama_config())
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": " ".join(zoo.WORDS[:20])}))
    data = Data(name="long", path=str(tmp_path / "long.jsonl"), max_tokens=8)
    cut, whole = (
        Task(data, read_rows(data), model, zoo.tokenizer(), split=split) for split in (False, True)
    )
    assert [len(row["input_ids"]) for row in cut.rows] == [8]
    assert sum(len(row["input_ids"]) for row in whole.rows) == len(
        zoo.tokenizer()(" ".join(zoo.WORDS[:20]))["input_ids"]
    )
    assert set(whole.origin) == {0}
