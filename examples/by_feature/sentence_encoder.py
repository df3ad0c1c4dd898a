"""Shrink an encoder without labels, from its hidden layers alone: python examples/by_feature/sentence_encoder.py"""

from datasets import load_dataset
from transformers import AutoConfig, AutoModel, AutoTokenizer

from hf_semckd import SemCKDConfig, SemCKDTrainer

TEACHER = "textattack/bert-base-uncased-SST-2"  # any encoder

tokenizer = AutoTokenizer.from_pretrained(TEACHER)
data = load_dataset("stanfordnlp/sst2", split="train").remove_columns("label")
data = data.map(lambda rows: tokenizer(rows["sentence"], truncation=True), batched=True)
teacher = AutoModel.from_pretrained(TEACHER)
student = AutoModel.from_config(AutoConfig.from_pretrained(TEACHER, num_hidden_layers=3))

trainer = SemCKDTrainer(
    model=student,
    teacher_model=teacher,
    args=SemCKDConfig(output_dir="outputs/sentence_encoder", task_weight=0, logit_weight=0, report_to="none"),
    train_dataset=data,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()
