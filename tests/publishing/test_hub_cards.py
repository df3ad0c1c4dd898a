"""What a card says of loading is true: its own code runs where this library is not, on an empty cache.

The functions named `client_...` run in a subprocess, because the client reads `HF_ENDPOINT` when it is imported.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_clients import files, image_processor, run, same, tokenizer
from hub_server import HubServer, check_card
from huggingface_hub import ModelCard
from makers import IMAGE, bert, distiller, gpt2, images, texts, vit
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForSequenceClassification

pytestmark = pytest.mark.slow
# Repository, pipeline and base model of each student.
STUDENTS = {
    "text": ("text-classification", None),
    "image": ("image-classification", None),
    "writer": ("text-generation", None),
    "lora": ("text-classification", "tester/base"),
}


def parts(kind: str) -> dict[str, Any]:
    """Return a trainer's parts."""
    if kind == "image":
        return {"model": vit(), "teacher_model": vit(3, 24, seed=9), "processing_class": image_processor()}
    if kind == "writer":
        student = gpt2()
        student.generation_config.max_new_tokens = 4
        data = texts(labels="input", types=False)
        return {"model": student, "teacher_model": gpt2(3, 24, seed=9), "train_dataset": data}
    student = bert()
    if kind == "lora":
        student = AutoModelForSequenceClassification.from_pretrained("tester/base")
        student.config.id2label = {0: "bad", 1: "good", 2: "so so"}
        student = get_peft_model(student, LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))
    return {"model": student, "teacher_model": bert(3, 24, seed=9), "train_dataset": texts()}


def inputs(kind: str) -> dict[str, torch.Tensor]:
    """Return two fixed samples."""
    rows = images(2, seed=8) if kind == "image" else texts(2, seed=8, types=kind != "writer")
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "labels"}


def client_push(folder: str) -> dict[str, Any]:
    """Train each student, push it, and return what it says."""
    logits = {}
    for kind in STUDENTS:
        made = {"processing_class": tokenizer(), **parts(kind)}
        args = {"push_to_hub": True, "hub_model_id": f"tester/{kind}"}
        trainer = distiller(Path(folder) / kind, args=args, **made)
        trainer.train()
        trainer.push_to_hub()
        with torch.no_grad():
            logits[kind] = trainer.student.eval()(**inputs(kind)).logits.tolist()
    return logits


LOADER = """
import json, re, sys
sys.modules["hf_semckd"] = None  # importing it raises
import torch
from huggingface_hub import ModelCard
from transformers import pipeline

seen = {}
for name, task in json.loads(sys.argv[2]).items():
    code = "\\n".join(re.findall(r"```python\\n(.*?)```", str(ModelCard.load(f"tester/{name}")), re.DOTALL))
    scope = {}
    exec(code, scope)
    if name == "lora":
        pipe = pipeline(task, model=scope["model"], tokenizer=scope["tokenizer"])
        scope["answer"] = pipe("w5 w7")
    with torch.no_grad():
        logits = scope["model"].eval()(**torch.load(sys.argv[1])[name]).logits.tolist()
    seen[name] = {"logits": logits, "class": type(scope["model"]).__name__, "answer": scope.get("answer")}
    seen[name]["piped"] = "pipe" in scope
assert not [name for name in sys.modules if name.startswith("hf_semckd.")]
print(json.dumps(seen))
"""


if __name__ == "__main__":
    print("\n" + json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    sys.exit()


class Hub:
    """What one client pushed, what is on the server, and what another client made of it."""

    def __init__(self, server: HubServer, folder: Path):
        bert().save_pretrained(folder / "base")
        server.add_repo("tester/base", files(folder / "base") | {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"})
        self.server = server
        self.pushed = run([__file__, "client_push", str(folder)], server.environment(folder / "one"), folder)
        torch.save({kind: inputs(kind) for kind in STUDENTS}, folder / "samples.pt")
        Image.new("RGB", (IMAGE, IMAGE)).save(folder / "picture.jpg")
        tasks = json.dumps({kind: task for kind, (task, _) in STUDENTS.items()})
        command = ["-c", LOADER, str(folder / "samples.pt"), tasks]
        self.loaded = run(command, server.environment(folder / "two"), folder)

    def card(self, name: str) -> str:
        return self.server.repos[f"tester/{name}"].card


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One server, one process that pushes and one that loads."""
    with HubServer() as server:
        yield Hub(server, tmp_path_factory.mktemp("hub"))
        assert server.errors == []


@pytest.mark.parametrize("name", STUDENTS)
def test_the_code_of_the_card_runs_without_this_library_and_gives_the_student(hub: Hub, name: str) -> None:
    assert same(hub.loaded[name]["logits"], hub.pushed[name])
    assert hub.loaded[name]["piped"] or name == "lora"


@pytest.mark.parametrize("name", STUDENTS)
def test_the_card_is_valid_and_names_task_and_base(hub: Hub, name: str) -> None:
    task, base = STUDENTS[name]
    assert check_card(hub.card(name))[0] == []
    data = ModelCard(hub.card(name)).data
    assert data.pipeline_tag == task and data.base_model == base
    assert data.library_name == ("peft" if name == "lora" else "transformers")
    assert data.to_dict().get("base_model_relation") == ("adapter" if base else None)


def test_an_adapter_is_pushed_without_its_base_model_and_with_its_names_of_classes(hub: Hub) -> None:
    stored = hub.server.repos["tester/lora"].files
    assert "adapter_model.safetensors" in stored and "model.safetensors" not in stored
    assert json.loads(stored["adapter_config.json"])["base_model_name_or_path"] == "tester/base"
    assert hub.loaded["lora"]["class"] == "PeftModelForSequenceClassification"
    assert hub.loaded["lora"]["answer"][0]["label"] in ("bad", "good", "so so")
    assert re.search(r"is a LoRA adapter with [\d,]+ parameters for \[tester/base\]", hub.card("lora"))


def test_the_license_of_a_teacher_that_is_not_known_is_not_claimed(hub: Hub) -> None:
    assert "license" not in ModelCard(hub.card("lora")).data.to_dict()
    assert "tester/base (cc-by-nc-4.0) may restrict the use of this model" in hub.card("lora")
    assert "The license of BertForSequenceClassification is not known" in hub.card("lora")
    assert "may restrict the use" in hub.pushed["output"]
