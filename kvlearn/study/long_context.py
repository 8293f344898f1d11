"""Long-context tests of the field, read from a local folder: any decoder on LongBench's and RULER's formats.

    scores = evaluate_folder(model, "LongBench/data", max_length=4096)

LongBench: ``DATASET.jsonl``, a line per example with ``context``, ``input``, ``answers``, ``all_classes``;
prompts and lengths of answers from ``dataset2prompt.json`` and ``dataset2maxlen.json`` in the same folder, if
there. Its Chinese data sets need a word segmenter and get a score of None.
RULER: ``TASK.jsonl`` or ``TASK/validation.jsonl``, a line per example with ``input`` and ``outputs``, and
``answer_prefix`` in newer versions. Nothing is downloaded: bring the folder.

A prompt that is too long loses its middle, as LongBench recommends: its instructions are at both ends.
Scores are from 0 to 1. Two are approximations of the published programs: ROUGE-L of whole texts, not by
sentences, and code similarity by difflib's ratio.

Sources: Bai et al., "LongBench" (2023), section 4 and its evaluation program; Hsieh et al., "RULER" (2024),
section 4.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch

from kvlearn import validate
from kvlearn.files import parse_json, read_json
from kvlearn.model import Decoder

Score = Callable[[str, str], float]
DEFAULT_PROMPT = "{context}\n\n{input}\n"
DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class Example:
    """A prompt, and the answers that count, whichever benchmark it is from."""

    prompt: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Examples of one task, how many tokens an answer may have, and the benchmark that they are from."""

    name: str
    benchmark: str
    examples: tuple[Example, ...]
    n_new: int


def encode_bytes(text: str) -> list[int]:
    """A byte per token, as the course's models take it."""
    return list(validate.instance("text", text, str).encode())


def decode_bytes(tokens: Sequence[int]) -> str:
    """The inverse; bytes that are no text become �."""
    validate.instance("tokens", tokens, (list, tuple))
    for token in tokens:
        validate.at_most("tokens", validate.at_least("tokens", token, 0), 255, "a byte")
    return bytes(tokens).decode(errors="replace")


def evaluate_folder(
    model: Decoder,
    folder: str | Path,
    *,
    max_length: int,
    encode: Callable[[str], list[int]] = encode_bytes,
    decode: Callable[[Sequence[int]], str] = decode_bytes,
    limit: int | None = None,
    chunk: int = 512,
) -> list[dict[str, Any]]:
    """A row per data set: mean score, examples, their mean length, the share that lost their middle, bytes.

    Answers are decoded greedily. ``max_length`` counts the prompt's tokens and the answer's; ``limit`` takes
    only so many examples of each set; ``chunk`` tokens of a prompt are fed at a time.

    Raises ValueError where the folder holds no data set, or an answer leaves no room for a prompt.
    """
    max_length, chunk = validate.positive("max_length", max_length), validate.positive("chunk", chunk)
    limit = None if limit is None else validate.positive("limit", limit)
    for name, coder in (("encode", encode), ("decode", decode)):
        validate.function(name, coder)
    rows = []
    for data in read_folder(folder):
        room = max_length - data.n_new
        if room < 2:
            raise ValueError(
                f"max_length: expected more than the {data.n_new} tokens of an answer of {data.name}, "
                f"got {max_length}"
            )
        scores, lengths, cut = list[float](), list[int](), 0
        examples = data.examples[:limit]
        for example in examples:
            tokens = encode(example.prompt)
            cut += len(tokens) > room
            tokens = without_middle(tokens, room)
            prompt = torch.tensor([tokens], device=model.embed.weight.device)
            new = model.generate(prompt, data.n_new, chunk=chunk)[0, len(tokens) :]
            scores.append(score(data, decode(new.tolist()), example))
            lengths.append(len(tokens))
        rows.append(
            {
                "benchmark": data.benchmark,
                "dataset": data.name,
                "score": None if plain_name(data.name) in CHINESE else sum(scores) / len(scores),
                "examples": len(examples),
                "mean_length": sum(lengths) / len(lengths),
                "truncated": cut / len(examples),
                "bytes_stored": model.table(max(lengths) + data.n_new, dtype=torch.bfloat16)[-1]["stored"],
            }
        )
    return rows


def without_middle(tokens: list[int], length: int) -> list[int]:
    """``tokens``, or its first and last ``length`` / 2 where there are more than ``length``."""
    validate.instance("tokens", tokens, list)
    length = validate.at_least("length", length, 2)
    return tokens if len(tokens) <= length else tokens[: length - length // 2] + tokens[-(length // 2) :]


def read_folder(folder: str | Path) -> Iterator[Dataset]:
    """Every data set in ``folder``; the keys of the first line tell the benchmark.

    Raises ValueError that names the file and the key that is missing.
    """
    folder = Path(validate.instance("folder", folder, (str, Path)))
    prompts, n_new = (_options(folder, name) for name in ("dataset2prompt", "dataset2maxlen"))
    paths = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    paths |= {path.parent.name: path for path in sorted(folder.glob("*/validation.jsonl"))}
    if not paths:
        raise ValueError(f"folder: expected *.jsonl or TASK/validation.jsonl in {folder.name}, found none")
    for name, path in paths.items():
        text = enumerate(path.read_bytes().splitlines(), 1)
        lines = [parse_json(f"{path.name}, line {number}", line) for number, line in text if line.strip()]
        if not lines:
            raise ValueError(f"{path.name}: expected at least one example, got none")
        is_ruler = "outputs" in lines[0]
        wanted = ("input", "outputs") if is_ruler else ("context", "input", "answers")
        for number, line in enumerate(lines, 1):
            missing = [key for key in wanted if key not in line]
            if missing:
                raise ValueError(f"{path.name}, line {number}: expected a key {missing[0]!r}")
            answers = line[wanted[-1]]  # a text would be taken for its letters
            if not (isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers)):
                raise ValueError(
                    f"{path.name}, line {number}: {wanted[-1]}: expected a list of texts, got {answers!r}"
                )
        if is_ruler:
            examples = [
                Example(line["input"] + line.get("answer_prefix", ""), tuple(line["outputs"]))
                for line in lines
            ]
        else:
            prompt = prompts.get(plain_name(name), DEFAULT_PROMPT)
            examples = [
                Example(prompt.format(**line), tuple(line["answers"]), tuple(line.get("all_classes") or ()))
                for line in lines
            ]
        yield Dataset(
            name,
            "RULER" if is_ruler else "LongBench",
            tuple(examples),
            validate.positive("dataset2maxlen.json", n_new.get(plain_name(name), DEFAULT_NEW_TOKENS)),
        )


def plain_name(dataset: str) -> str:
    """The name without the _e of LongBench-E, whose data sets have the same prompts and scores."""
    return dataset.removesuffix("_e")


def _options(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    return read_json(path.name, path) if path.exists() else {}


def score(data: Dataset, prediction: str, example: Example) -> float:
    """The score of one prediction, by the metric of its data set."""
    if data.benchmark == "RULER":
        found = [answer.lower() in prediction.lower() for answer in example.answers]
        # Question answering needs one of its answers; all other tasks need each.
        return float(any(found)) if data.name.startswith("qa") else sum(found) / len(found)
    name = plain_name(data.name)
    if name in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    if name in CLASSIFIED:
        return max(classification(prediction, answer, example.classes) for answer in example.answers)
    return max(METRICS.get(name, token_f1)(prediction, answer) for answer in example.answers)


def normalise(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def token_f1(prediction: str, answer: str) -> float:
    """2 P R / (P + R) of the words that both have, P their share of the prediction, R of the answer."""
    ours, theirs = normalise(prediction), normalise(answer)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def rouge_l(prediction: str, answer: str) -> float:
    """F1 of the longest common subsequence of words."""
    ours, theirs = prediction.split(), answer.split()
    row = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for j, other in enumerate(theirs):
            above = row[j + 1]
            row[j + 1] = diagonal + 1 if word == other else max(above, row[j])
            diagonal = above
    return 2 * row[-1] / (len(ours) + len(theirs)) if row[-1] else 0.0


def count_share(prediction: str, answer: str) -> float:
    """The share of the numbers in the prediction that are the number in the answer."""
    numbers, wanted = re.findall(r"\d+", prediction), re.findall(r"\d+", answer)
    return numbers.count(wanted[0]) / len(numbers) if numbers and wanted else 0.0


def code_similarity(prediction: str, answer: str) -> float:
    """Of the answer and the first line of the prediction that is no comment and no fence."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return SequenceMatcher(None, line, answer).ratio()


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the prediction names, if the answer is one of them.

    A class whose name is only a part of the answer's does not count.
    """
    named = [name for name in classes if name in prediction]
    named = [name for name in named if name == answer or name not in answer]
    return 1 / len(named) if answer in named else 0.0


# Every data set that is not here is scored by token_f1, as question answering is.
METRICS: Mapping[str, Score] = {
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_l),
    **dict.fromkeys(("passage_retrieval_en", "passage_count"), count_share),
    **dict.fromkeys(("lcc", "repobench-p"), code_similarity),
}
CLASSIFIED = ("trec",)
CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
FIRST_LINE = ("trec", "triviaqa", "samsum")  # few-shot tasks: a model goes on with further examples
