"""Which task a teacher and the columns are about."""

import pytest
from datasets import Audio, ClassLabel, Features, Image, List, Value
from recipe_parts import bert_config
from transformers import BertConfig, GPT2Config, T5Config

from hf_semckd.errors import ConfigurationError
from hf_semckd.recipes.schema import DataOptions
from hf_semckd.recipes.tasks import find_task, task_columns
from hf_semckd.recipes.tasks.text import TextClassification

STRING, NUMBER, NAMED = Value("string"), Value("int64"), ClassLabel(names=["a", "b"])
TEXT = {"text": STRING, "label": NAMED}
ANSWERS = {"question": STRING, "context": STRING, "answers": {"text": [STRING], "answer_start": [NUMBER]}}


def with_head(config, name=None):
    config.architectures = None if name is None else [name]
    return config


@pytest.mark.parametrize(
    ("config", "features", "expected"),
    [
        (with_head(bert_config(), "BertForSequenceClassification"), TEXT, "text-classification"),
        (with_head(bert_config()), TEXT, "text-classification"),
        (with_head(bert_config(), "BertModel"), {"image": Image(), "label": NAMED}, "image-classification"),
        (with_head(bert_config()), {"tokens": List(STRING), "tags": List(NAMED)}, "token-classification"),
        (with_head(bert_config()), ANSWERS, "question-answering"),
        (with_head(BertConfig(), "BertForQuestionAnswering"), ANSWERS, "question-answering"),
        (with_head(GPT2Config(), "GPT2LMHeadModel"), TEXT, "text-generation"),
        (with_head(GPT2Config(), "GPT2ForSequenceClassification"), TEXT, "text-classification"),
        (with_head(GPT2Config()), {"text": STRING}, "text-generation"),
        (with_head(T5Config(), "T5ForConditionalGeneration"), {"source": STRING, "target": STRING},
         "text2text-generation"),
        (with_head(T5Config()), {"source": STRING, "target": STRING}, "text2text-generation"),
        (with_head(bert_config()), {"text": STRING, "target": STRING}, "text-classification"),
        # The same end of a name is that of sounds too: the columns tell.
        (with_head(bert_config(), "Wav2Vec2ForSequenceClassification"), {"audio": Audio(), "label": NAMED},
         "audio-classification"),
        (with_head(bert_config(), "ASTForAudioClassification"), {"audio": Audio(), "label": NAMED},
         "audio-classification"),
    ],
)  # fmt: skip
def test_the_head_and_the_columns_tell_the_task(config, features, expected):
    assert find_task(config, Features(features), DataOptions()).name == expected


def test_a_task_that_is_named_is_taken():
    options = DataOptions(task="text-generation")
    assert find_task(with_head(bert_config()), Features(TEXT), options).name == "text-generation"


def test_what_cannot_be_told_is_refused():
    with pytest.raises(ConfigurationError, match="(?s)not told by the teacher.*columns x.*set task to one of"):
        find_task(with_head(bert_config()), Features({"x": NUMBER}), DataOptions())
    with pytest.raises(ConfigurationError, match=r"(?s)not clear.*x \(int64\).*input_columns and label_column"):
        task_columns(TextClassification, Features({"x": NUMBER}), DataOptions())


REVIEWS = Features({"review": Value("string"), "verdict": Value("string")})
NAMED = DataOptions(input_columns=["review"], label_column="verdict")


def test_texts_are_no_sounds_where_both_columns_are_named():
    """Heads for classes of sounds and of texts have one name."""
    config = BertConfig(architectures=["BertForSequenceClassification"])
    assert find_task(config, REVIEWS, NAMED).name == "text-classification"


def test_texts_are_no_images_and_no_lists_of_words_where_both_columns_are_named_and_there_is_no_head():
    assert find_task(BertConfig(), REVIEWS, NAMED).name == "text-classification"
