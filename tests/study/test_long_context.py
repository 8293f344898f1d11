"""LongBench's and RULER's formats, on small files made here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlearn.model import Decoder, ModelConfig
from kvlearn.study.long_context import (
    classification,
    code_similarity,
    count_share,
    encode_bytes,
    evaluate_folder,
    read_folder,
    rouge_l,
    token_f1,
    without_middle,
)


class Scripted(Decoder):
    """A decoder that answers with given text, padded, and keeps the prompts that it was given."""

    def __init__(self, *answers: str) -> None:
        super().__init__(ModelConfig(d_model=8, n_layers=1, n_heads=1))
        self.answers, self.prompts = list(answers), list[str]()

    def generate(self, tokens: Tensor, n_new: int, **_: Any) -> Tensor:
        self.prompts.append(bytes(tokens[0].tolist()).decode())
        answer = encode_bytes(self.answers.pop(0).ljust(n_new))[:n_new]
        return torch.cat((tokens, torch.tensor([answer])), dim=1)

    def table(self, length: int, **_: Any) -> list[dict[str, Any]]:
        return [{"stored": 2 * length}]


def write(path: Path, *lines: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def longbench(**changes: Any) -> dict[str, Any]:
    return {"context": "ctx", "input": "who?", "answers": ["Ann Lee"], "all_classes": None} | changes


def test_longbench_is_read_with_the_folders_prompts_and_scored_by_its_metrics(tmp_path: Path) -> None:
    write(tmp_path / "hotpotqa.jsonl", longbench(), longbench(answers=["Bob", "Ann"]))
    write(tmp_path / "trec.jsonl", longbench(answers=["Food"], all_classes=["Food", "Animal"]))
    write(tmp_path / "dataset2prompt.json", {"hotpotqa": "{context} Q: {input} A:"})
    write(tmp_path / "dataset2maxlen.json", {"hotpotqa": 16, "trec": 20})
    model = Scripted("the Ann.", "Ann", "Food\nType: Animal")
    hotpot, trec = evaluate_folder(model, tmp_path, max_length=100)
    assert model.prompts == ["ctx Q: who? A:"] * 2 + ["ctx\n\nwho?\n"]
    assert hotpot["score"] == pytest.approx((2 / 3 + 1) / 2)
    assert trec["score"] == 1.0  # only the first line counts
    assert (hotpot["benchmark"], hotpot["examples"], hotpot["truncated"]) == ("LongBench", 2, 0.0)
    assert hotpot["bytes_stored"] == 2 * (14 + 16)


def test_ruler_wants_every_answer_but_in_question_answering_one(tmp_path: Path) -> None:
    example = {"index": 0, "input": "Find it.", "outputs": ["123", "456"], "length": 9}
    write(tmp_path / "niah_multivalue" / "validation.jsonl", {**example, "answer_prefix": " It is"})
    write(tmp_path / "qa_1.jsonl", example)
    model = Scripted("... 456", "... 456")
    rows = {row["dataset"]: row for row in evaluate_folder(model, tmp_path, max_length=100)}
    assert rows["niah_multivalue"]["score"] == 0.5
    assert rows["qa_1"]["score"] == 1.0
    assert sorted(model.prompts) == ["Find it.", "Find it. It is"]


def test_a_prompt_that_is_too_long_loses_its_middle(tmp_path: Path) -> None:
    write(tmp_path / "vt.jsonl", {"input": "begin" + 50 * "x" + "end", "outputs": ["1"]})
    write(tmp_path / "dataset2maxlen.json", {"vt": 4})
    model = Scripted("1")
    (row,) = evaluate_folder(model, tmp_path, max_length=14)
    assert model.prompts == ["beginxxend"]
    assert (row["mean_length"], row["truncated"]) == (10, 1.0)
    assert without_middle([1, 2, 3], 3) == [1, 2, 3]
    assert without_middle([1, 2, 3, 4, 5], 3) == [1, 2, 5]


def test_a_decoder_of_the_course_is_evaluated(tmp_path: Path) -> None:
    write(tmp_path / "niah_single_1.jsonl", {"input": "The number is 7. The number is", "outputs": ["7"]})
    write(tmp_path / "dataset2maxlen.json", {"niah_single_1": 5})
    model = Decoder(ModelConfig(d_model=16, n_layers=2, n_heads=2, layers=("window", "linear"))).eval()
    (row,) = evaluate_folder(model, tmp_path, max_length=24, chunk=8)
    assert row["score"] in (0.0, 1.0)
    assert row["bytes_stored"] == model.table(24, dtype=torch.bfloat16)[-1]["stored"]


def test_data_sets_that_need_a_segmenter_get_no_score(tmp_path: Path) -> None:
    write(tmp_path / "dureader.jsonl", longbench())
    model = Scripted("Ann Lee")
    assert evaluate_folder(model, tmp_path, max_length=100)[0]["score"] is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"input": "?", "answers": []}, "qasper.jsonl, line 1: expected a key 'context'"),
        ({"outputs": ["1"]}, "qasper.jsonl, line 1: expected a key 'input'"),
        (
            {"input": "?", "outputs": "12"},
            "qasper.jsonl, line 1: outputs: expected a list of texts, got '12'",
        ),
        (
            {"input": "?", "context": "", "answers": []},
            r"qasper.jsonl, line 1: answers: expected a list of texts, got \[\]",
        ),
    ],
)
def test_a_line_without_a_key_is_named(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    write(tmp_path / "qasper.jsonl", line)
    with pytest.raises(ValueError, match=message):
        list(read_folder(tmp_path))


def test_a_folder_without_data_and_an_answer_without_room_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder: expected \*\.jsonl"):
        list(read_folder(tmp_path))
    write(tmp_path / "vt.jsonl", {"input": "x", "outputs": ["1"]})
    model = Scripted()
    with pytest.raises(ValueError, match="max_length: expected more than the 64 tokens"):
        evaluate_folder(model, tmp_path, max_length=64)


def test_the_metrics_by_hand() -> None:
    assert token_f1("The cat sat.", "a cat") == pytest.approx(2 * 1 / (2 + 1))
    assert token_f1("dog", "cat") == 0.0
    assert rouge_l("a b c d", "b x d") == pytest.approx(2 * 2 / 7)
    assert rouge_l("d b", "b d") == pytest.approx(2 * 1 / 4)
    assert count_share("3, or 4, or 3", "Paragraph 3") == pytest.approx(2 / 3)
    assert count_share("none", "3") == 0.0
    assert code_similarity("# a comment\nreturn x\n", "return x") == 1.0
    assert classification("Food or Animal", "Food", ["Food", "Animal", "Plant"]) == 0.5
    assert classification("Animal food", "Animal food", ["Animal", "Animal food"]) == 1.0
    assert classification("Plant", "Food", ["Food", "Plant"]) == 0.0
