"""Distill a causal language model into a shallower one: python examples/by_feature/causal_lm.py"""

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from hf_semckd import SemCKDConfig, SemCKDTrainer

TEACHER, STUDENT, DATA = "openai-community/gpt2", "distilbert/distilgpt2", "stanfordnlp/sst2"

tokenizer = AutoTokenizer.from_pretrained(TEACHER)
tokenizer.pad_token = tokenizer.eos_token
text = load_dataset(DATA, split="train").select_columns("sentence")
tokens = text.map(lambda rows: tokenizer(rows["sentence"]), batched=True, remove_columns="sentence")

# Which position predicts which token is found from the student's own loss; the logits are compared at temperature 1.
trainer = SemCKDTrainer(
    model=AutoModelForCausalLM.from_pretrained(STUDENT),
    teacher_model=TEACHER,
    args=SemCKDConfig(output_dir="outputs/causal_lm", num_train_epochs=1, learning_rate=1e-4, report_to="none"),
    train_dataset=tokens,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()
