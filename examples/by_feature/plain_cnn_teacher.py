"""Learn from a plain PyTorch CNN that returns nothing but logits: python examples/by_feature/plain_cnn_teacher.py"""

import torch
from datasets import load_dataset
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_semckd import SemCKDConfig, SemCKDTrainer, inspect_models


class Teacher(nn.Module):
    """Three stages of two convolutions each; the stages are found in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(self.stage(*widths) for widths in ((3, 16), (16, 32), (32, 64)))
        self.classifier = nn.Linear(64, 10)

    @staticmethod
    def stage(inputs: int, outputs: int) -> nn.Module:
        first = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            pixel_values = stage(pixel_values)
        return self.classifier(pixel_values.mean((2, 3)))


def to_tensors(rows):
    pictures = [torch.frombuffer(bytearray(row.convert("RGB").tobytes()), dtype=torch.uint8) for row in rows["img"]]
    return {"pixel_values": [row.view(32, 32, 3).permute(2, 0, 1) / 255 for row in pictures], "labels": rows["label"]}


data = load_dataset("uoft-cs/cifar10", split="train").with_transform(to_tensors)
teacher = Teacher()  # torch.load your own weights here
sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
student = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=10))

print(inspect_models(student, teacher, {"pixel_values": torch.stack([data[n]["pixel_values"] for n in range(2)])}))
trainer = SemCKDTrainer(
    model=student,
    teacher_model=teacher,
    args=SemCKDConfig(output_dir="outputs/plain_cnn_teacher", remove_unused_columns=False, report_to="none"),
    train_dataset=data,
)
trainer.train()
trainer.save_model()
