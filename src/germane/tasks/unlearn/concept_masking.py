"""Concept masking: the words that carry an answer are found, masked, and the masked answers learned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from germane.core.errors import RecordsError
from germane.core.evidence import Table
from germane.core.generation import continue_texts
from germane.core.objective import IGNORED, Task
from germane.core.records import Row, read_rows
from germane.method import method
from germane.tasks.unlearn._templates import answered, with_rows
from germane.tasks.unlearn._unlearner import FineTuned, Pair, Work, batch_of, mean_loss

MASK = "***"
_RANKED = 50  # words kept of a subject's ranking
_NAME = 4  # letters from which a part of the subject's name is masked
_WORD = re.compile(r"[^\W\d_][\w'\-]*")
_TOGETHER = 8  # points of the path that are in memory together

STOP_WORDS = (
    "a", "about", "after", "all", "also", "am", "an", "and", "any", "are", "as", "at", "be", "because",
    "been", "before", "but", "by", "can", "could", "did", "do", "does", "for", "from", "had", "has", "have",
    "he", "her", "him", "his", "how", "i", "if", "in", "into", "is", "it", "its", "me", "more", "my", "no",
    "not", "of", "on", "or", "our", "out", "she", "so", "some", "than", "that", "the", "their", "them",
    "then", "there", "these", "they", "this", "those", "to", "up", "was", "we", "were", "what", "when",
    "where", "which", "who", "why", "will", "with", "would", "yes", "you", "your",
)  # fmt: skip


@dataclass(frozen=True)
class Attribution:
    """What each token of an answer adds to the answer's log-probability.

    Attributes:
        values: (answer tokens,) in nats, one for each token of the answer.
        score: Log-probability of the answer.
        baseline: The same with the baseline in place of the answer's embeddings.
    """

    values: Tensor
    score: float
    baseline: float

    @property
    def error(self) -> float:
        """How far the values' sum is from the difference of the two, which it is in the limit."""
        return float(self.values.sum()) - (self.score - self.baseline)


@dataclass(frozen=True)
class Answer:
    """An answer to a forget prompt.

    Attributes:
        prompt: Its tokens; none where the record is a text.
        tokens: Of the answer, without an end.
        subject: Whom or what it is about, or "".
    """

    prompt: list[int]
    tokens: list[int]
    subject: str


@method(
    "unlearn/concept-masking", paper="2405.15662", code="ChangWenhan/Concept_Inference_Unlearn_official",
    needs=("language model",),
)  # fmt: skip
class ConceptMasking(FineTuned):
    """Learn the model's own answers with their most telling words masked.

    Chang et al., "Class Machine Unlearning for Complex Data via Concepts Inference and Data Poisoning",
    2024: the branch for language models. The model answers each forget prompt; integrated gradients say
    what each token of the answer adds to its log-probability sum_t log p(x_t | x_<t), on the straight way
    from a baseline whose answer embeddings are those of the padding token. Tokens make words; of each
    answer the positive words are divided by their sum, and these shares are added up by subject. In every
    answer the first `words` words of the subject's ranking, and the parts of the subject's name of at
    least four letters, become ***; the model is fine-tuned on the prompts with these answers, and on the
    records to keep. A text without a prompt is its own answer.

    The step's facts hold the largest completeness error: how far attributions are from adding up.

    Use it to make a language model leave out names and facts while it keeps the form of its answers.
    Not to have it decline: `unlearn/refusal` trains on answers of that kind, the paper's other style. Nor
    where something must be gone from the weights: the model learns what to say, not what it does not know.

    Differs from the code: the points of the path have trapezoid weights, as the mean over both ends is a
    biased sum (`rule=mean` is that); words are found in the decoded text, not by the marks of one
    tokenizer; an answer none of whose words is positive counts all of them alike, where the code skips it
    and so leaves answers of one word unmasked; the list of stop words is ours; fine-tuning is germane's,
    of all weights unless `lora_rank` is set, and records to keep are a term of the loss, not mixed in. The
    last token of an answer predicts nothing, so its own word never ranks by it.
    """

    uses_retain: ClassVar[bool] = True

    answers: Literal["own", "given"] = Field(
        default="own", description="mask the model's answers to the prompts, or those of the records"
    )
    new_tokens: int = Field(default=64, gt=0, description="longest answer of the model, in tokens")
    words: int = Field(default=5, gt=0, description="ranked words masked in an answer")
    subject: str = Field(
        default="subject", description="field with whom a record is about; without, all are ranked together"
    )
    stop_words: list[str] = Field(default=list(STOP_WORDS), description="words never masked for their rank")
    points: int = Field(default=32, gt=1, description="of the path of integrated gradients")
    rule: Literal["trapezoid", "mean"] = Field(default="trapezoid", description="weights of these points")
    baseline: Literal["pad", "zero"] = Field(
        default="pad", description="where the path begins: the padding token's embedding, or zeros"
    )
    weight: float = Field(default=1.0, ge=0, description="of the loss on the records to keep")
    learning_rate: float = Field(default=1e-5, gt=0, description="of the optimiser")
    _masked: Any = PrivateAttr(default=None)

    def begin(self, work: Work) -> None:
        super().begin(work)
        task = work.forget
        work.model.eval()
        answers = self._answers(task)
        start = None if self.baseline == "zero" else int(task.tokenizer.pad_token_id or 0)
        shares, errors = [], []
        for answer in answers:
            found = integrated_gradients(
                work.model, answer.prompt, answer.tokens, start, self.points, self.rule
            )
            shares.append(word_shares(task.tokenizer, answer.tokens, found.values.tolist()))
            errors.append(abs(found.error))
        rankings = ranked([answer.subject for answer in answers], shares)
        self._masked = with_rows(task, self._learned(task, answers, rankings))
        self._report(work, rankings, max(errors))

    def _answers(self, task: Task) -> list[Answer]:
        """What is to be masked: of a text the text, else the model's or the record's answer."""
        raw = read_rows(task.data)
        parts = [_prompt_and_answer(row) for row in task.rows]
        subjects = [str(raw[number].get(self.subject, "") or "") for number in task.origin]
        end = task.tokenizer.eos_token_id
        given = [[token for token in answer if token != end] for _, answer in parts]
        asked = [number for number, (prompt, _) in enumerate(parts) if prompt]
        if self.answers == "own" and asked:
            texts = [task.tokenizer.decode(parts[number][0], skip_special_tokens=True) for number in asked]
            room = min(self.new_tokens, task.longest - 1)
            written = continue_texts(task.model, task.tokenizer, texts, room)
            for number, text in zip(asked, written, strict=True):
                own = task.tokenizer(text, add_special_tokens=False)["input_ids"]
                given[number] = own or given[number]
        answers = [
            Answer(prompt[-max(task.longest - len(tokens), 1) :], tokens[: task.longest - 1], name)
            for (prompt, _), tokens, name in zip(parts, given, subjects, strict=True)
        ]
        for number, answer in enumerate(answers):
            if len(answer.prompt) + len(answer.tokens) < 2 or not answer.tokens:
                raise RecordsError(
                    f"{task.data.path}, record {task.origin[number] + 1}: has no answer to be masked."
                )
        return answers

    def _learned(
        self, task: Task, answers: Sequence[Answer], rankings: dict[str, list[tuple[str, float]]]
    ) -> list[Row]:
        """The prompts with masked answers."""
        end = [] if task.tokenizer.eos_token_id is None else [int(task.tokenizer.eos_token_id)]
        rows = []
        for answer in answers:
            text = str(task.tokenizer.decode(answer.tokens))
            listed = [word for word, _ in rankings.get(answer.subject, [])]
            masked = self.mask(text, listed, answer.subject)
            tokens = [*task.tokenizer(masked, add_special_tokens=False)["input_ids"], *end]
            prompt = answer.prompt[-max(task.longest - len(tokens), 1) :]
            rows.append(answered(prompt, tokens[: task.longest - len(prompt)]))
        return rows

    def mask(self, text: str, listed: Sequence[str], subject: str) -> str:
        """The answer without its first `words` words of the list, and without the subject's name."""
        stop = {word.lower() for word in self.stop_words}
        present = [word for word in listed if word.lower() not in stop and _place(word).search(text)]
        names = [part for part in _WORD.findall(subject) if len(part) >= _NAME]
        return mask_words(text, [*present[: self.words], *names])

    def _report(self, work: Work, rankings: dict[str, list[tuple[str, float]]], error: float) -> None:
        """The rankings, once however many strengths are tried."""
        title = "Words that carry the answers"
        if any(table.title == title for table in work.step.tables):
            return
        work.step.facts["completeness_error"] = error
        rows: list[list[str | float | int | None]] = [
            [subject or "all", word, round(share, 4)]
            for subject, words in rankings.items()
            for word, share in words[: self.words]
        ]
        work.step.tables.append(Table(title=title, columns=["subject", "word", "share"], rows=rows))

    def pairs(self, work: Work, epoch: int) -> Iterator[Pair]:
        for pair in super().pairs(work, epoch):
            yield Pair(
                batch_of(self._masked, pair.forget_rows), pair.retain, pair.forget_rows, pair.retain_rows
            )

    def loss(self, work: Work, pair: Pair) -> Tensor:
        value = mean_loss(work.forget, pair.forget)
        if pair.retain is None or not self.weight:
            return value
        return value + self.weight * mean_loss(work.kept(), pair.retain)


def integrated_gradients(
    model: Any,
    prompt: Sequence[int],
    answer: Sequence[int],
    baseline: int | None,
    points: int = 32,
    rule: Literal["trapezoid", "mean"] = "trapezoid",
) -> Attribution:
    """What each answer token's embedding adds to the answer's log-probability.

    The embeddings of the answer go from the baseline's (a token's, or zeros) to their own in a straight
    line; the prompt's stay. The log-probability is of the answer itself at every point. Without a prompt
    the first token is not predicted, so only its embedding counts.

    Source: Sundararajan et al., "Axiomatic Attribution for Deep Networks", 2017.

    Args:
        model: A causal language model; left as it is.
        prompt: (prompt tokens,) numbers; may be empty.
        answer: (answer tokens,) numbers.
        baseline: The token to begin from, or None for embeddings of zeros.
        points: On the line, both ends included.
        rule: Weights of the points: trapezoid, or all alike.
    """
    tokens = torch.tensor([[*prompt, *answer]], device=model.device)
    layer, start = model.get_input_embeddings(), len(prompt)
    with torch.no_grad():
        whole = layer(tokens)
        begin = whole.clone()
        begin[:, start:] = 0.0 if baseline is None else layer(torch.tensor(baseline, device=model.device))
    line = torch.linspace(0.0, 1.0, points, device=model.device)
    weights = torch.full_like(line, 1 / points)
    if rule == "trapezoid":
        weights = torch.full_like(line, 1 / (points - 1))
        weights[0] = weights[-1] = 0.5 / (points - 1)
    total, scores = torch.zeros_like(whole[0], dtype=torch.float32), []
    for places, shares in zip(line.split(_TOGETHER), weights.split(_TOGETHER), strict=True):
        embedded = (begin + places[:, None, None].to(whole) * (whole - begin)).requires_grad_(True)
        score = _log_probability(model, embedded, tokens, start)
        gradient = torch.autograd.grad(score.sum(), embedded)[0].float()
        total += (shares[:, None, None] * gradient).sum(dim=0)
        scores += score.tolist()
    values = ((whole - begin)[0].float() * total).sum(dim=-1)[start:]
    return Attribution(values.cpu(), scores[-1], scores[0])


def _log_probability(model: Any, embedded: Tensor, tokens: Tensor, start: int) -> Tensor:
    """(points,) log-probability of the tokens from `start` on, at each point."""
    logits = model(inputs_embeds=embedded).logits.float()
    first = max(start, 1)
    targets = tokens[:, first:].expand(len(embedded), -1)
    predictions = logits[:, first - 1 : -1].log_softmax(dim=-1)
    found: Tensor = predictions.gather(2, targets[:, :, None])[:, :, 0].sum(dim=1)
    return found


def word_shares(tokenizer: Any, tokens: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    """Of each word of an answer, in lower case, its share of all that is positive.

    A word has the sum of its tokens' values; negative sums count as 0. Where none is positive, as in an
    answer of one token, which predicts nothing after it, all words have the same share.

    Args:
        tokenizer: The model's own.
        tokens: Of the answer.
        values: One for each token.
    """
    ends = [len(tokenizer.decode(tokens[: number + 1])) for number in range(len(tokens))]
    sums: dict[str, float] = {}
    for found in _WORD.finditer(tokenizer.decode(tokens)):
        value, start = 0.0, 0
        for end, part in zip(ends, values, strict=True):
            if start < found.end() and end > found.start():
                value += part
            start = end
        word = found.group().lower()
        sums[word] = sums.get(word, 0.0) + max(value, 0.0)
    total = sum(sums.values())
    if not total:
        return dict.fromkeys(sums, 1 / max(len(sums), 1))
    return {word: value / total for word, value in sums.items()}


def ranked(
    subjects: Sequence[str], shares: Sequence[dict[str, float]]
) -> dict[str, list[tuple[str, float]]]:
    """Of each subject its words with their shares added over its answers, the largest first."""
    sums: dict[str, dict[str, float]] = {}
    for subject, words in zip(subjects, shares, strict=True):
        mine = sums.setdefault(subject, {})
        for word, share in words.items():
            mine[word] = mine.get(word, 0.0) + share
    return {
        subject: sorted(words.items(), key=lambda item: -item[1])[:_RANKED]
        for subject, words in sums.items()
    }


def mask_words(text: str, words: Sequence[str]) -> str:
    """The text with every whole word of the list, in any case, replaced by ***; long ones first."""
    for word in sorted(set(words), key=lambda word: (-len(word), word)):
        text = _place(word).sub(MASK, text)
    return text


def _place(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![^\W\d_]){re.escape(word)}(?![^\W\d_])", re.IGNORECASE)


def _prompt_and_answer(row: Row) -> tuple[list[int], list[int]]:
    """The tokens of a record before and from the first that is a target; a text has no prompt."""
    start = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
    return row["input_ids"][:start], row["input_ids"][start:]
