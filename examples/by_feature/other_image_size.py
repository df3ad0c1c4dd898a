"""Show a teacher larger pictures than the student sees: python examples/by_feature/other_image_size.py"""

from datasets import load_dataset
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification

from hf_semckd import SemCKDConfig, SemCKDTrainer

TEACHER = "nateraw/vit-base-patch16-224-cifar10"

theirs = AutoImageProcessor.from_pretrained(TEACHER)
own = AutoImageProcessor.from_pretrained(TEACHER, size={"height": 32, "width": 32})


def prepare(rows):
    pictures = [row.convert("RGB") for row in rows["img"]]
    # teacher_pixel_values goes to the teacher as its pixel_values; patches are compared where they lie.
    return {
        "pixel_values": own(pictures, return_tensors="pt")["pixel_values"],
        "teacher_pixel_values": theirs(pictures, return_tensors="pt")["pixel_values"],
        "labels": rows["label"],
    }


data = load_dataset("uoft-cs/cifar10", split="train").with_transform(prepare)
small = {"image_size": 32, "patch_size": 8, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3}
student = ViTForImageClassification(ViTConfig(**small, intermediate_size=192, num_labels=10))

trainer = SemCKDTrainer(
    model=student,
    teacher_model=TEACHER,
    args=SemCKDConfig(output_dir="outputs/other_image_size", remove_unused_columns=False, report_to="none"),
    train_dataset=data,
    processing_class=own,
)
trainer.train()
trainer.save_model()
