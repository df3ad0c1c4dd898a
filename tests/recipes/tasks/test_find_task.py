"""Which task the teacher's head and the columns tell."""

from datasets import Features, Value
from transformers import BertConfig

from hf_semckd.recipes.schema import DataOptions
from hf_semckd.recipes.tasks import find_task

REVIEWS = Features({"review": Value("string"), "verdict": Value("string")})
NAMED = DataOptions(input_columns=["review"], label_column="verdict")


def test_texts_are_no_sounds_where_both_columns_are_named():
    """Heads for classes of sounds and of texts have one name."""
    config = BertConfig(architectures=["BertForSequenceClassification"])
    assert find_task(config, REVIEWS, NAMED).name == "text-classification"


def test_texts_are_no_images_and_no_lists_of_words_where_both_columns_are_named_and_there_is_no_head():
    assert find_task(BertConfig(), REVIEWS, NAMED).name == "text-classification"
