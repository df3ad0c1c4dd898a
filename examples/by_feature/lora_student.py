"""Train the adapters of a LoRA student (pip install peft): python examples/by_feature/lora_student.py"""

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_semckd import SemCKDConfig, SemCKDTrainer

TEACHER = STUDENT = "textattack/bert-base-uncased-SST-2"

tokenizer = AutoTokenizer.from_pretrained(STUDENT)
data = load_dataset("stanfordnlp/sst2", split="train")
data = data.map(lambda rows: tokenizer(rows["sentence"], truncation=True), batched=True)

student = AutoModelForSequenceClassification.from_pretrained(STUDENT)
student = get_peft_model(student, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))

trainer = SemCKDTrainer(
    model=student,
    teacher_model=TEACHER,
    args=SemCKDConfig(output_dir="outputs/lora_student", learning_rate=1e-3, report_to="none"),
    train_dataset=data,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()  # the adapters alone
