"""Two tokenizers and one data set with the columns of both."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from hf_semckd.data import TeacherStudentCollator

SENTENCES = ["a b c", "b", "c a b a c", "a a", "b c", "c"]


def tokenizer(words: dict[str, int], pad: int) -> PreTrainedTokenizerFast:
    words = {**words, "[PAD]": pad, "[UNK]": 19}
    built = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=built, pad_token="[PAD]", unk_token="[UNK]")


STUDENT = tokenizer({"a": 1, "b": 2, "c": 3}, pad=0)
TEACHER = tokenizer({"a": 11, "b": 12}, pad=7)


def dataset() -> Dataset:
    rows = []
    for index, text in enumerate(SENTENCES):
        theirs = TEACHER(text.replace("c", "a b"))
        rows.append(
            {
                **STUDENT(text, return_token_type_ids=False),
                "teacher_input_ids": theirs["input_ids"],
                "teacher_attention_mask": theirs["attention_mask"],
                "labels": index % 2,
            }
        )
    return Dataset.from_list(rows)


def collator() -> TeacherStudentCollator:
    return TeacherStudentCollator(DataCollatorWithPadding(STUDENT), DataCollatorWithPadding(TEACHER))
