"""The engines that `tests/engines` trains on, as the files of `examples/accelerate_configs` start them."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launching import ROOT, TESTS, WORLD, run, shared_folder, torchrun

CONFIGS = ROOT / "examples" / "accelerate_configs"
WORKER = TESTS / "engines" / "engine_worker.py"
REFERENCE = "DDP, CPU processes"
CHECKS = (
    "losses",
    "clipped gradients",
    "projections",
    "saved student",
    "best checkpoint",
    "resumed",
    "sharded teacher",
    "models loaded by the engine",
)
BLOCKS = {"vit": "ViTLayer", "next_word": "GPT2Block"}
# The weights that DeepSpeed's own optimizer has on CPUs need a compiler without this.
DEEPSPEED_OPTIMIZER = {
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@dataclass(frozen=True)
class Case:
    """How an engine is started.

    Attributes:
        file: Name of its configuration, or None for torchrun.
        options: Of the launcher; they stand above the file.
        changes: Of the training's arguments.
        nodes: Machines, each of which has its own launcher.
    """

    file: str | None
    options: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    nodes: int = 1

    @property
    def is_deepspeed(self) -> bool:
        """Whether it needs the package deepspeed."""
        return "deepspeed" in self.changes or (self.file or "").startswith("zero")


PORTS = range(20_000, 29_500)
WHOLE_STATE = ("--fsdp_state_dict_type", "FULL_STATE_DICT")
FSDP = {"fsdp_on_cpus": True}
ENGINES = {
    REFERENCE: Case("two_cpu_processes"),
    "DDP": Case("several_gpus"),
    "DDP, two machines": Case("several_nodes", nodes=2),
    "FSDP2, state in parts": Case("fsdp2", changes=FSDP),
    "FSDP2, whole state": Case("fsdp2", WHOLE_STATE, FSDP),
    "ZeRO-1": Case("zero2", ("--zero_stage", "1")),
    "ZeRO-2": Case("zero2"),
    "ZeRO-2, DeepSpeed's optimizer": Case(None, changes={"deepspeed": DEEPSPEED_OPTIMIZER}),
    "ZeRO-3": Case("zero3"),
}


def launch(engine: str, problem: str, tmp_path_factory: Any, request: Any) -> Path:
    """Train a problem on an engine in two processes, once for all tests; return the folder with what came out."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in f"{engine}-{problem}")
    with shared_folder(slug, tmp_path_factory, request) as (folder, empty):
        if empty:
            printed = _start(ENGINES[engine], problem, folder)
            (folder / "output.txt").write_text(printed)
    return folder


def _start(case: Case, problem: str, folder: Path) -> str:
    words = (WORKER, folder, json.dumps({"problem": problem, **case.changes}))
    if case.file is None:
        done = torchrun(*words)
        return f"{done.stdout}{done.stderr}"
    options = (*case.options, "--mixed_precision", "no", "--num_processes", WORLD, "--num_machines", case.nodes)
    if case.file == "fsdp2":
        options = (*options, "--fsdp_transformer_layer_cls_to_wrap", BLOCKS[problem])
    # Not the launcher's own: processes of pytest-xdist may start two trainings at once.
    options = (*options, "--main_process_port", _free_port())
    if case.nodes > 1:
        options = (*options, "--main_process_ip", "127.0.0.1")
    start = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{case.file}.yaml")

    def of_node(rank: int) -> str:
        own = ("--machine_rank", rank) if case.nodes > 1 else ()
        done = run(*start, *options, *own, *words)
        return f"{done.stdout}{done.stderr}"

    with ThreadPoolExecutor() as pool:
        return "\n".join(pool.map(of_node, range(case.nodes)))


def _free_port() -> int:
    """Return a port that nobody listens on, of those that the system gives to nobody by itself."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")
