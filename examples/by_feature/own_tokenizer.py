"""Give a teacher with another tokenizer texts of its own: python examples/by_feature/own_tokenizer.py"""

from datasets import load_dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_semckd import SemCKDConfig, SemCKDTrainer
from hf_semckd.data import TeacherStudentCollator

TEACHER, STUDENT, DATA = "textattack/roberta-base-SST-2", "textattack/bert-base-uncased-SST-2", "stanfordnlp/sst2"

tokenizer, theirs = AutoTokenizer.from_pretrained(STUDENT), AutoTokenizer.from_pretrained(TEACHER)


def tokenize(rows):
    own = tokenizer(rows["sentence"], truncation=True)
    # Columns named teacher_... go to the teacher, under the name that follows.
    other = {f"teacher_{name}": values for name, values in theirs(rows["sentence"], truncation=True).items()}
    return {**own, **other}


data = load_dataset(DATA, split="train").map(tokenize, batched=True)
small = AutoConfig.from_pretrained(STUDENT, num_hidden_layers=4)

trainer = SemCKDTrainer(
    model=AutoModelForSequenceClassification.from_config(small),
    teacher_model=TEACHER,
    args=SemCKDConfig(output_dir="outputs/own_tokenizer", learning_rate=5e-4, report_to="none"),
    train_dataset=data,
    data_collator=TeacherStudentCollator(
        student_collator=DataCollatorWithPadding(tokenizer), teacher_collator=DataCollatorWithPadding(theirs)
    ),
)
trainer.train()
trainer.save_model()
