"""What reads a model's inputs, whether two read alike, and how long inputs may be."""

import pytest
from makers import bert, gpt2
from recipe_parts import ViTImageProcessor, bert_config, save_bert, save_vit, tokenizer
from transformers import BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification, T5Config

from hf_semckd.errors import InputError
from hf_semckd.recipes.processors import load_processor, longest_input, read_alike
from hf_semckd.recipes.tasks.images import ImageClassification
from hf_semckd.recipes.tasks.sounds import AudioClassification
from hf_semckd.recipes.tasks.text import TextClassification


def test_a_tokenizer_is_loaded_from_a_folder_or_beside_a_configuration(tmp_path):
    folder = save_bert(tmp_path / "model")
    for source in (folder, folder / "config.json"):
        assert load_processor(str(source), TextClassification)("good")["input_ids"] == [2, 4, 3]


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    tokenizer(pad_token=None, eos_token="[SEP]").save_pretrained(tmp_path)
    bert_config().save_pretrained(tmp_path)
    assert load_processor(str(tmp_path), TextClassification).pad_token == "[SEP]"


@pytest.mark.parametrize("config", [bert_config(), RobertaConfig(), T5Config()], ids=lambda entry: entry.model_type)
def test_a_tokenizer_that_knows_no_words_is_none(tmp_path, config):
    """Of a folder without one `AutoTokenizer` makes one for which every text is unknown words."""
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="(?s)no tokenizer for.*save one there"):
        load_processor(str(tmp_path), TextClassification)


def test_what_is_missing_is_named(tmp_path):
    BertForSequenceClassification(bert_config()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="(?s)no image processor.*preprocessor_config.json"):
        load_processor(str(tmp_path), ImageClassification)
    with pytest.raises(InputError, match="no feature extractor"):
        load_processor(str(tmp_path), AudioClassification)


def test_processors_are_compared_by_what_they_make(tmp_path):
    folder = save_vit(tmp_path / "vit")
    one, same = (load_processor(str(folder), ImageClassification) for _ in range(2))
    assert read_alike(one, same)
    assert not read_alike(one, ViTImageProcessor(size={"height": 4, "width": 4}))
    assert read_alike(tokenizer(), tokenizer())
    assert not read_alike(tokenizer(), tokenizer(words=("other",)))
    cased = tokenizer()
    cased.backend_tokenizer.normalizer = None
    assert not read_alike(tokenizer(), cased) and not read_alike(tokenizer(), one)


def roberta():
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=34
        )
    )


@pytest.mark.parametrize(
    ("models", "limit", "expected"),
    [
        ([bert()], 1000, 32),
        ([bert(), bert(max_position_embeddings=20)], 1000, 20),
        ([bert()], 24, 24),
        ([gpt2()], 1000, 32),
        ([roberta()], 1000, 32),
        ([bert(max_position_embeddings=1000)], 10**30, 512),
    ],
)
def test_the_longest_text_is_what_all_models_and_tokenizers_take(models, limit, expected):
    made = tokenizer(length=limit)
    assert longest_input(TextClassification, None, [made], models) == expected
    assert longest_input(TextClassification, 5, [made], models) == 5
    if expected < 512:
        with pytest.raises(InputError, match=f"at most {expected} tokens"):
            longest_input(TextClassification, expected + 1, [made], models)


def test_a_model_takes_the_longest_text_and_no_longer_one():
    import torch

    model = roberta().eval()
    most = longest_input(TextClassification, None, [tokenizer(length=1000)], [model])
    model(torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, most + 1), 5))


def test_sounds_are_counted_in_seconds():
    assert longest_input(AudioClassification, None, [], []) == 10
    assert longest_input(AudioClassification, 3, [], []) == 3
