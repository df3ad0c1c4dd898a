import pytest
import transformers
from hub_clients import image_processor, tokenizer
from makers import bert
from transformers import BertForSequenceClassification

from hf_semckd.publishing.heads import HEADS, class_names_of, head_of, processor_class


@pytest.mark.parametrize(
    ("name", "auto_class", "tag"),
    [
        ("BertForSequenceClassification", "AutoModelForSequenceClassification", "text-classification"),
        ("Wav2Vec2ForSequenceClassification", "AutoModelForAudioClassification", "audio-classification"),
        ("Wav2Vec2ForCTC", "AutoModelForCTC", "automatic-speech-recognition"),
        ("WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
        ("BartForConditionalGeneration", "AutoModelForSeq2SeqLM", "text2text-generation"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM", "text-generation"),
        ("DetrForObjectDetection", "AutoModelForObjectDetection", "object-detection"),
        ("SegformerForSemanticSegmentation", "AutoModelForSemanticSegmentation", "image-segmentation"),
        ("BertForMaskedLM", "AutoModelForMaskedLM", "fill-mask"),
        ("CLIPModel", "AutoModel", None),
    ],
)
def test_a_head_has_the_auto_class_and_the_task_of_its_modality(name, auto_class, tag):
    head = head_of([name])
    assert (head.auto_class, head.pipeline_tag) == (auto_class, tag)


def test_transformers_has_every_auto_class():
    assert all(hasattr(transformers, auto_class) for _, auto_class, _ in HEADS)


def test_a_class_of_ones_own_has_the_head_of_the_one_it_is_derived_from():
    class Mine(BertForSequenceClassification):
        pass

    model = Mine(bert().config)
    assert head_of(class_names_of(model)).auto_class == "AutoModelForSequenceClassification"


def test_under_peft_the_model_in_it_counts():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"]))
    assert head_of(class_names_of(wrapped)).auto_class == "AutoModelForSequenceClassification"


def test_a_processor_has_an_auto_class_and_anything_else_none():
    assert (
        processor_class(tokenizer()) == "AutoTokenizer" and processor_class(image_processor()) == "AutoImageProcessor"
    )
    assert processor_class(object()) is None and processor_class(None) is None
