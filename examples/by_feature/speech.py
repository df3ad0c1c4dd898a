"""Distill a speech recognizer (CTC) into a small one: python examples/by_feature/speech.py"""

from datasets import load_dataset
from transformers import AutoProcessor, Wav2Vec2Config, Wav2Vec2ForCTC

from hf_semckd import SemCKDConfig, SemCKDTrainer

TEACHER = "facebook/wav2vec2-base-960h"

processor = AutoProcessor.from_pretrained(TEACHER)


def prepare(row):
    sound = processor(row["audio"]["array"], sampling_rate=16_000)
    return {"input_values": sound.input_values[0], "labels": processor(text=row["text"]).input_ids}


def collate(rows):
    # Frames that come from padding are left out of every term, by the attention mask.
    sounds = [{"input_values": row["input_values"]} for row in rows]
    texts = processor.pad(labels=[{"input_ids": row["labels"]} for row in rows], return_tensors="pt")
    batch = processor.pad(sounds, return_attention_mask=True, return_tensors="pt")
    return {**batch, "labels": texts.input_ids.masked_fill(texts.attention_mask == 0, -100)}


data = load_dataset("hf-internal-testing/librispeech_asr_dummy", split="validation")
sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
tokens = {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
student = Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, **tokens, ctc_loss_reduction="mean"))

trainer = SemCKDTrainer(
    model=student,
    teacher_model=TEACHER,
    args=SemCKDConfig(output_dir="outputs/speech", num_train_epochs=3, report_to="none"),
    train_dataset=data.map(prepare, remove_columns=data.column_names),
    data_collator=collate,
    processing_class=processor,
)
trainer.train()
trainer.save_model()
