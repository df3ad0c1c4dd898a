"""Hold the teacher in 8 bits (pip install bitsandbytes): python examples/by_feature/quantized_teacher.py"""

from datasets import load_dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from hf_semckd import SemCKDConfig, SemCKDTrainer

TEACHER = "textattack/bert-base-uncased-SST-2"

tokenizer = AutoTokenizer.from_pretrained(TEACHER)
data = load_dataset("stanfordnlp/sst2", split="train")
data = data.map(lambda rows: tokenizer(rows["sentence"], truncation=True), batched=True)

small = AutoConfig.from_pretrained(TEACHER, num_hidden_layers=4)

trainer = SemCKDTrainer(
    model=AutoModelForSequenceClassification.from_config(small),
    teacher_model=TEACHER,
    args=SemCKDConfig(
        output_dir="outputs/quantized_teacher", teacher_dtype="8bit", learning_rate=5e-4, report_to="none"
    ),
    train_dataset=data,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()
