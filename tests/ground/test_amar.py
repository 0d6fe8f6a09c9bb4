"""Soft tokens of retrieved texts: beside the official modules, by hand, trained, and with queries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo
from scripted import replying
from torch import nn
from transformers import LlamaForCausalLM

from germane.core.chat_cache import CachedChat
from germane.core.embedding import Encoder
from germane.core.errors import CheckpointError, GermaneError, RecordsError, SettingError
from germane.core.local_chat import LocalChat
from germane.core.records import write_jsonl
from germane.core.training import Training
from germane.embedded import facts as fact_parts
from germane.embedded import minilm
from germane.method import build
from germane.recipe import run_task
from germane.solver import Passage, Question, Solving
from germane.tasks.ground._aspects import (
    AspectMap,
    AspectSettings,
    RelevanceGate,
    SelfAlignment,
    Texts,
    Vectors,
    embed,
    encode,
)
from germane.tasks.ground._prefixed import Example, ReaderSettings, reading
from germane.tasks.ground._triples import Answering, QueryError, Triples, parse, written
from germane.tasks.ground.amar import aspects

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "amar.json").read_text())
WIDTH, ITEMS, VOCABULARY = 64, 5, 40


def fill(parameters) -> None:
    """The fixture's weights."""
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            place = torch.arange(parameter.numel(), dtype=torch.float64)
            wave = 0.3 * torch.sin(0.7 * place * (number + 1) + number)
            parameter.copy_(wave.view(parameter.shape))


def filled(module: nn.Module) -> nn.Module:
    fill(module.double().parameters())
    return module


def vectors(phase: int, *shape: int) -> torch.Tensor:
    place = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(0.9 * place + phase).view(shape)


def tokens(phase: int, *shape: int) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) * 7 + phase).remainder(VOCABULARY).view(shape)


def embedded() -> nn.Embedding:
    return filled(nn.Embedding(VOCABULARY, WIDTH))


def same(found: torch.Tensor, expected) -> bool:
    return torch.allclose(found[..., ::8], torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_map_is_the_official_one():
    means = torch.stack([embedded()(tokens(phase, 2, ITEMS, 6)).mean(2) for phase in (1, 2, 3)], 1)
    found = filled(AspectMap(WIDTH))(means)
    assert all(same(*pair) for pair in zip(found, FIXTURE["map"], strict=True))


def test_the_alignment_is_the_official_one():
    found, attention = filled(SelfAlignment(WIDTH))([vectors(p, 2, ITEMS, WIDTH) for p in (1, 2, 3)])
    assert all(same(*pair) for pair in zip(found, FIXTURE["align"], strict=True))
    assert torch.allclose(attention.sum(dim=2), torch.ones(2, ITEMS, dtype=torch.float64))


def test_the_gates_are_the_official_ones():
    question, *items = (0.05 * vectors(p, 2, 16 if p == 4 else ITEMS, WIDTH) for p in (4, 1, 2, 3))
    gates = filled(RelevanceGate(WIDTH))(question, torch.ones(2, 16), items)
    expected = torch.tensor(FIXTURE["gates"], dtype=torch.float64).transpose(0, 1)
    assert torch.allclose(gates, expected, atol=1e-6, rtol=0)
    gated = torch.cat([values * gates[:, place, :, None] for place, values in enumerate(items)], 1)
    assert same(gated, FIXTURE["gated"])


def test_padding_of_the_question_has_no_part_in_the_gates():
    gate = filled(RelevanceGate(WIDTH))
    items = [0.05 * vectors(p, 1, ITEMS, WIDTH) for p in (1, 2, 3)]
    question = 0.05 * vectors(4, 1, 6, WIDTH)
    counted = torch.tensor([[1.0, 1, 1, 1, 0, 0]])
    changed = question.clone()
    changed[:, 4:] = 1.0
    assert torch.equal(gate(question, counted, items), gate(changed, counted, items))
    assert torch.allclose(gate(question, counted, items), gate(question[:, :4], counted[:, :4], items))
    assert not torch.allclose(gate(question, counted, items), gate(changed, torch.ones(1, 6), items))


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return fact_parts.make(tmp_path_factory.mktemp("facts"), known=12, forgotten=4, refusing=2)


@pytest.fixture(scope="module")
def chat(facts):
    return LocalChat.load(str(facts.model))


NAMES = ("anna adler", "boris brandt", "clara castro", "david dupont")
JOBS = ("baker", "pilot", "nurse", "farmer")


def asked(number: int, **more) -> Question:
    name, job = NAMES[number], JOBS[number]
    given = {"entities": [name, NAMES[number - 1]], "relations": ["job", "city", "pet"], **more}
    texts = (f"{name} works as a {job} .", f"{NAMES[number - 1]} likes soup .")
    passages = tuple(Passage(str(place), text) for place, text in enumerate(texts, 1))
    return Question(str(number), f"what is the job of {name} ?", (job,), (), passages, given)


def records(**more) -> list[dict]:
    return [
        {
            "id": each.id, "question": each.text, "answer": each.answers[0], **each.more,
            "passages": [passage.text for passage in each.passages], **more,
        }
        for each in map(asked, range(4))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("labelled") / "labelled.jsonl"
    write_jsonl(records(), file)
    return file


def amar(labelled: Path, **settings):
    chosen = {"soft_tokens": 2, "lora_rank": 2, "beams": 2, "max_tokens": 4, "epochs": 1, **settings}
    return build("ground/amar", {"labelled": str(labelled), **chosen})


def test_a_text_is_the_mean_of_its_tokens_and_the_end(chat):
    embedding, words = chat.model.get_input_embeddings(), chat.tokenizer
    lists = [["anna adler"], ["job", "pet"], ["soup"]]

    def vectors_of(settings):
        texts = Texts.stack([encode(words, "what is the job ?", lists, settings)], chat.model.device)
        return embed(embedding, texts)

    found = vectors_of(AspectSettings(items=3, item_tokens=4))
    weight = embedding.weight.detach()
    anna, adler, job, end = (
        weight[words.convert_tokens_to_ids(w)] for w in ("anna", "adler", "job", "<eos>")
    )
    assert torch.allclose(found.items[0, 0, 0], (anna + adler + end) / 3)
    assert torch.allclose(found.items[0, 1, 2], (job + end) / 2)  # from the beginning again
    assert found.counted.tolist() == [[1.0] * 5 + [0.0] * 10 + [1.0]]
    padded = vectors_of(AspectSettings(items=1, item_tokens=4, masked_mean=False))
    assert torch.allclose(padded.items[0, 1, 0], (job + end + 2 * weight[words.pad_token_id]) / 4)
    assert padded.counted.sum() == 16


def test_soft_tokens_mask_and_labels_are_assembled_as_officially():
    config = zoo.llama_config(hidden_size=WIDTH, num_attention_heads=4, vocab_size=VOCABULARY)
    model = LlamaForCausalLM(config).double()
    fill([model.get_input_embeddings().weight])
    chat, assembly = LocalChat(model, zoo.tokenizer()), FIXTURE["assembly"]
    settings = ReaderSettings(items=ITEMS, soft_tokens=assembly["soft"], lora_rank=0)
    read, end = tokens(5, 2, 7).tolist(), assembly["prompt"]
    with reading(chat, settings, 0) as reader:
        parts = reader.aspects.double()
        for part in (parts.map, parts.align, parts.gate):
            fill(part.parameters())
        fill([parts.soft])
        embedding = reader.embedding
        means = torch.stack([embedding(tokens(p, 2, ITEMS, 6)).mean(2) for p in (1, 2, 3)], 1)
        texts = Vectors(means, embedding(tokens(4, 2, 16)), torch.ones(2, 16))
        examples = [
            Example(None, row[:end], row[end:length])
            for row, length in zip(read, assembly["lengths"], strict=True)
        ]
        found, mask, labels = reader._assemble(parts(texts).embeddings, examples)
    assert mask.tolist() == assembly["mask"]
    assert labels.tolist() == assembly["labels"]
    expected = torch.tensor(assembly["embeddings"], dtype=torch.float64) * mask[..., None]
    assert same(found, expected.tolist())


def test_gates_move_only_through_the_frozen_model_and_it_is_as_it_was(chat, labelled):
    before = {name: value.clone() for name, value in chat.model.state_dict().items()}
    modules = [type(module) for module in chat.model.modules()]
    flags = [value.requires_grad for value in chat.model.parameters()]
    answers = amar(labelled).solve(Solving(chat, seed=1), [asked(0)])
    assert answers[0].details["gates"]["entities"][0][0] == NAMES[0]
    after = chat.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [type(module) for module in chat.model.modules()] == modules
    assert [value.requires_grad for value in chat.model.parameters()] == flags


def test_training_teaches_the_answers(chat, labelled):
    method = amar(labelled, epochs=60, learning_rate=3e-3, lora_rank=4, accumulate=1, beams=1, items=2)
    solving = Solving(chat, seed=1)
    answers = method.solve(solving, [asked(number) for number in range(4)])
    assert [answer.text for answer in answers] == list(JOBS)
    assert [call["purpose"] for call in solving.calls] == ["answer"] * 4
    assert all(call["completion_tokens"] == 2 for call in solving.calls)


def test_of_a_frozen_model_only_the_modules_learn(chat, labelled):
    method = amar(labelled, lora_rank=0)
    with reading(chat, ReaderSettings(lora_rank=0), 1) as reader:
        assert all(name.startswith("aspects.") for name in reader.trained())
        example = method._example(reader, asked(0), JOBS[0])
        before = reader.loss([example]).item()
        reader.learn([example], Training(learning_rate=3e-3, epochs=20), 1)
        assert reader.loss([example]).item() < before / 2


def examples(chat, reader) -> list[Example]:
    found = []
    for number in range(3):
        texts = encode(chat.tokenizer, asked(number).text, aspects(asked(number)), reader.settings)
        found.append(Example(texts, list(range(3, 6 + 2 * number)), []))
    return found


def test_together_with_padding_and_with_the_cache_as_alone_and_without(chat):
    with reading(chat, ReaderSettings(soft_tokens=2), 3) as reader, torch.no_grad():
        given = examples(chat, reader)
        together = [each.texts for each in reader.write(given, 6, 3)]
        alone = [reader.write([each], 6, 3)[0].texts for each in given]
        assert together == alone
        rows = []
        for each in given:
            said: list[int] = []
            for _ in range(6):
                prefix = reader._prefix([each]).embeddings
                longer = Example(each.texts, each.prompt + said, [])
                inputs, _, _ = reader._assemble(prefix, [longer])
                said.append(int(reader.model(inputs_embeds=inputs, use_cache=False).logits[0, -1].argmax()))
            rows.append(said)
        texts = [chat.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
        greedy = [each.texts[0] for each in reader.write(given, 6, 1)]
        assert all(text.startswith(short) for text, short in zip(texts, greedy, strict=True))
        assert any(greedy)


def test_what_was_learned_is_kept_and_read_again(facts, labelled, tmp_path):
    settings = {"soft_tokens": 2, "beams": 1, "max_tokens": 4, "items": 2, "lora_rank": 2}
    arguments = {"model": str(facts.model), "questions": str(labelled), "cache": False}
    learning = {**settings, "labelled": str(labelled), "epochs": 3, "learning_rate": 1e-2}
    first = run_task("ground", "amar", arguments, learning, tmp_path / "first", seed=1)
    adapter = first.folder / "adapter"
    assert json.loads((adapter / "adapter.json").read_text())["items"] == 2
    read = {"adapter": str(adapter), "beams": 1, "max_tokens": 4}
    second = run_task("ground", "amar", arguments, read, tmp_path / "second", seed=2)
    files = [(each.folder / "answers.jsonl").read_text() for each in (first, second)]
    assert files[0] == files[1]
    assert not (second.folder / "adapter").exists()
    narrow = LocalChat(zoo.make(LlamaForCausalLM, zoo.llama_config()), zoo.tokenizer())
    with pytest.raises(CheckpointError, match="was trained for another model"):
        build("ground/amar", read).solve(Solving(narrow), [asked(0)])


def test_gates_and_shares_are_said_of_every_text(chat, labelled):
    method = amar(labelled, items=3)
    answer = method.solve(Solving(chat, seed=1), [asked(0)])[0]
    gates = answer.details["gates"]
    assert [text for text, _ in gates["relations"]] == ["job", "city", "pet"]
    assert len(gates["entities"]) == 2  # the third is the first again
    assert len(gates["pairs"]) == 3
    assert all(0 < gate < 1 for _, gate in [*gates["entities"], *gates["relations"]])
    assert sum(share for _, share in answer.details["shares"]) == pytest.approx(1, abs=1e-3)
    assert [use.kept for use in answer.uses] == [True, True]
    short = amar(labelled, items=1).solve(Solving(chat, seed=1), [asked(0)])[0]
    assert [use.kept for use in short.uses] == [True, False]


def test_what_stands_for_the_aspects():
    assert aspects(asked(1)) == [
        ["boris brandt", "anna adler"], ["job", "city", "pet"],
        ["boris brandt works as a pilot .", "anna adler likes soup ."],
    ]  # fmt: skip
    assert aspects(asked(1, subgraphs=["x"]))[2] == ["x"]
    alone = Question("q", "What?", passages=(Passage("1", "A fact.", "Title"),))
    assert aspects(alone) == [["Title: A fact."]] * 3
    with pytest.raises(RecordsError, match="question 1: has no relations"):
        aspects(asked(1, relations=[]))
    with pytest.raises(RecordsError, match="'entities' must be a list of texts"):
        aspects(asked(1, entities="anna"))
    with pytest.raises(RecordsError, match="has no entities; needs lists"):
        aspects(Question("q", "What?"))


def test_what_cannot_be_done_is_refused_before_work(chat, labelled, tmp_path):
    questions = [asked(0)]
    for settings, message in (
        ({}, "needs either labelled"),
        ({"labelled": "a", "adapter": "b"}, "needs either labelled"),
        ({"adapter": str(tmp_path)}, "has no adapter.json"),
        ({"labelled": str(tmp_path / "none.jsonl")}, "no such file"),
        ({"labelled": str(labelled), "triples": str(labelled)}, "'expression' is no query: it lacks"),
    ):
        with pytest.raises(GermaneError, match=message):
            build("ground/amar", settings).check_questions(questions, [])
    with pytest.raises(SettingError, match="scripted is behind a server"):
        amar(labelled).solve(Solving(replying("x")), questions)
    with pytest.raises(SettingError, match="reads 128 tokens at most"):
        amar(labelled, items=40).solve(Solving(chat), questions)
    assert amar(labelled).solve(Solving(CachedChat(chat, tmp_path / "c.sqlite3")), questions)


FACTS = (
    ("Ada", "lives in", "Rome"), ("Ben", "lives in", "Rome"), ("Cleo", "lives in", "Oslo"),
    ("Ada", "works as", "pilot"), ("Ben", "works as", "nurse"), ("Cleo", "works as", "pilot"),
    ("Ada", "born", "1980-05-01"), ("Ben", "born", "1979"), ("Cleo", "born", "1980-11-30"),
    ("Rome", "country", "Italy"), ("Oslo", "country", "Norway"),
)  # fmt: skip


@pytest.fixture(scope="module")
def triples() -> Triples:
    made = Triples()
    for fact in FACTS:
        made.add(*fact)
    return made


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("( JOIN [lives in] [Rome] )", {"Ada", "Ben"}),
        ("(JOIN (R [ lives  in ]) [ada])", {"Rome"}),
        ("( AND ( JOIN [lives in] [Rome] ) ( JOIN [works as] [pilot] ) )", {"Ada"}),
        ("( COUNT ( JOIN [works as] [pilot] ) )", {"2"}),
        ("( COUNT ( JOIN [works as] [judge] ) )", set()),
        ("( ARGMAX ( JOIN [works as] [pilot] ) [born] )", {"Cleo"}),
        ("( ARGMIN ( JOIN [lives in] [Rome] ) [born] )", {"Ben"}),
        ("( JOIN ( R ( JOIN [lives in] [country] ) ) [Cleo] )", {"Norway"}),
        ("( JOIN ( JOIN [lives in] [country] ) [Italy] )", {"Ada", "Ben"}),
        ("( LT [born] [1980] )", {"Ben"}),
        ("( GE [born] [1980-05-01] )", {"Ada", "Cleo"}),
        ("( JOIN [lives in] ( JOIN [country] [Norway] ) )", {"Cleo"}),
        ("( JOIN [flies to] [Rome] )", set()),
    ],
)
def test_queries_find_what_they_ask_for(triples, query, expected):
    assert triples.find(parse(query)) == expected
    assert triples.find(parse(written(parse(query)))) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "Rome", "( JOIN [a] [b]", "( JOIN [a] [b] ) )", "( JOIN [a] )", "( R [a] )", "( COUNT [a] [b] )",
        "( EVAL [a] [b] )", "( JOIN ( AND [a] [b] ) [c] )", "__import__('os')", "( LT [a] ( R [b] ) )",
        "( COUNT " * 5000 + "[a]" + " )" * 5000,
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_what_is_no_query_is_refused(text):
    with pytest.raises(QueryError):
        parse(text)


def test_the_first_beam_that_finds_something_answers(triples):
    answering = Answering(triples, Encoder(minilm()), 3, 20)
    right, wrong = "( JOIN [works as] [nurse] )", "( JOIN [works as] [judge] )"
    assert answering.first(["no query", wrong, right, "( JOIN [lives in] [Oslo] )"])[1] == {"Ben"}
    assert answering.first(["no query"]) == ("", frozenset())


def test_names_that_are_not_known_are_replaced_by_those_most_like_them(triples):
    answering = Answering(triples, Encoder(minilm()), 3, 20)
    query, found = answering.first(["( JOIN [worked as] [nurses] )"])
    assert (query, found) == ("( JOIN [works as] [nurse] )", {"Ben"})
    tried = list(answering.candidates(parse("( JOIN [lives in] [Roma] )")))
    assert len(tried) == 9
    assert written(tried[0]) == "( JOIN [lives in] [Rome] )"
    assert len(list(Answering(triples, answering.encoder, 3, 4).candidates(tried[0]))) == 4


def test_facts_are_read_from_records(tmp_path):
    file = tmp_path / "facts.jsonl"
    write_jsonl([{"subject": "a", "relation": "r", "object": "b"}, {"subject": "a"}], file)
    with pytest.raises(RecordsError, match="record 2: needs 'subject', 'relation' and 'object'"):
        Triples.read(str(file))


def test_a_model_learns_to_write_queries_that_are_answered(tmp_path):
    words = [*"()[]?", "JOIN", "R", "job", "pet", "what", "is", "of", "the", "anna", "boris", "clara"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        zoo.llama_config(hidden_size=64, num_attention_heads=4, tie_word_embeddings=False)
    )
    with torch.no_grad():
        for matrix in filter(lambda each: each.dim() > 1, model.parameters()):
            matrix.mul_(5)  # a frozen model must tell words apart
        model.lm_head.weight.mul_(4)  # and be able to be sure of one
        model.get_input_embeddings().weight.mul_(4)
    chat = LocalChat(model, zoo.tokenizer(words))
    rows = [
        {
            "question": f"what is the job of {name} ?", "answer": job, "entities": [name], "relations": ["job"],
            "subgraphs": [f"{name} job {job}"], "expression": f"( JOIN ( R [ job ] ) [ {name} ] )",
        }
        for name, job in (("anna", "baker"), ("boris", "pilot"))
    ]  # fmt: skip
    write_jsonl(rows, tmp_path / "labelled.jsonl")
    facts = [("anna", "baker"), ("boris", "pilot")]
    write_jsonl(
        [{"subject": name, "relation": "job", "object": job} for name, job in facts],
        tmp_path / "facts.jsonl",
    )
    method = amar(
        tmp_path / "labelled.jsonl", triples=str(tmp_path / "facts.jsonl"), epochs=100, learning_rate=5e-3,
        accumulate=1, max_tokens=12, items=1, lora_rank=4,
    )  # fmt: skip
    questions = [
        Question(row["question"][15:], row["question"], (row["answer"],), (), (), row) for row in rows
    ]
    answers = method.solve(Solving(chat, seed=1), questions)
    assert [answer.text for answer in answers] == ["baker", "pilot"]
    assert answers[0].details["query"] == "( JOIN ( R [job] ) [anna] )"
    assert len(answers[0].details["beams"]) == 2
