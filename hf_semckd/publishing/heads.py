"""How a saved model is loaded: its auto class and the task that the Hub lists it under, by its class name."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import BaseImageProcessor, FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto import modeling_auto

from ..models.outputs import base_model

PROCESSORS = (
    (PreTrainedTokenizerBase, "AutoTokenizer"),
    (ProcessorMixin, "AutoProcessor"),
    (BaseImageProcessor, "AutoImageProcessor"),
    (FeatureExtractionMixin, "AutoFeatureExtractor"),
)
# Tables of transformers (MODEL_FOR_..._MAPPING_NAMES), the auto class and the Hub's pipeline tag. A class that is in
# several gets the first, so those of one modality come before those that hold everything.
HEADS = (
    ("AUDIO_CLASSIFICATION", "AutoModelForAudioClassification", "audio-classification"),
    ("CTC", "AutoModelForCTC", "automatic-speech-recognition"),
    ("SPEECH_SEQ_2_SEQ", "AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
    ("VIDEO_CLASSIFICATION", "AutoModelForVideoClassification", "video-classification"),
    ("IMAGE_CLASSIFICATION", "AutoModelForImageClassification", "image-classification"),
    ("OBJECT_DETECTION", "AutoModelForObjectDetection", "object-detection"),
    ("SEMANTIC_SEGMENTATION", "AutoModelForSemanticSegmentation", "image-segmentation"),
    ("DEPTH_ESTIMATION", "AutoModelForDepthEstimation", "depth-estimation"),
    ("SEQUENCE_CLASSIFICATION", "AutoModelForSequenceClassification", "text-classification"),
    ("TOKEN_CLASSIFICATION", "AutoModelForTokenClassification", "token-classification"),
    ("QUESTION_ANSWERING", "AutoModelForQuestionAnswering", "question-answering"),
    ("CAUSAL_LM", "AutoModelForCausalLM", "text-generation"),
    ("SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM", "text2text-generation"),
    ("MASKED_LM", "AutoModelForMaskedLM", "fill-mask"),
    ("IMAGE_TEXT_TO_TEXT", "AutoModelForImageTextToText", "image-text-to-text"),
    ("MULTIPLE_CHOICE", "AutoModelForMultipleChoice", None),
)
# An input of each pipeline that transformers 5 has and that takes a single one.
EXAMPLES = {
    "audio-classification": "recording.wav",
    "automatic-speech-recognition": "recording.wav",
    "depth-estimation": "picture.jpg",
    "image-classification": "picture.jpg",
    "image-segmentation": "picture.jpg",
    "object-detection": "picture.jpg",
    "text-classification": "A sentence to classify.",
    "text-generation": "Once upon a time",
    "token-classification": "A sentence with names in it.",
}


@dataclass(frozen=True)
class Head:
    """The auto class that loads a model, and its pipeline tag on the Hub, or None."""

    auto_class: str
    pipeline_tag: str | None


def head_of(class_names: Sequence[str]) -> Head:
    """Return the head of a model of transformers, by the name of its class or of one that it is derived from."""
    for name in class_names:
        for table, auto_class, tag in HEADS:
            if name in _listed(getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")):
                return Head(auto_class, tag)
    return Head("AutoModel", None)


def class_names_of(model: nn.Module) -> list[str]:
    """Return the names of a model's class and of those that it is derived from, under PEFT of the model in it."""
    return [kind.__name__ for kind in type(base_model(model)).__mro__]


def processor_class(processing_class: object) -> str | None:
    """Return the auto class that loads a processor, or None for none."""
    return next((name for kind, name in PROCESSORS if isinstance(processing_class, kind)), None)


def _listed(table: dict[str, str | tuple[str, ...]]) -> set[str]:
    """Return all class names of a table; some families have several."""
    values = [(value,) if isinstance(value, str) else value for value in table.values()]
    return {name for names in values for name in names}
