"""A table of what distillation makes of two models: their layers, how these are compared, and which logits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..data.columns import has_own_tokens, teacher_entries
from ..errors import InputError
from ..features.capture import FeatureCapture, remove_capturing_traces
from ..features.geometry import Alignment
from ..features.layers import FeatureSpec
from ..losses.logits import LogitMatch
from ..models.images import fitting_size
from ..models.inputs import InputSelector, evaluating, run_on_inputs
from ..models.loading import ModelSource, TeacherSource, load_model, teacher_list
from ..models.outputs import detects_objects, holds_images, layer_masks, logits_of
from ..models.tables import aligned_lines
from ..models.tasks import Task, head_task, predicts_next_token
from ..teacher.running import teacher_prefix
from .classes import check_same_tokens, match_teachers, vocabulary_size
from .memory import MemoryEstimate, TrainedBytes, teacher_bytes, try_step
from .pair import layers_by_teacher

# Samples of a batch, where `TrainingArguments` does not say.
USUAL_BATCH = 8
COMPARED = {"tokens": "position by position", "grid": "as maps of the smaller size", "mean": "by their averages"}


@dataclass(frozen=True)
class ModelReport:
    """What a small batch tells of one model.

    Attributes:
        name: Its class.
        layers: The layers that are captured, as `student_layers` and `teacher_layers` name them.
        modules: The module that made each of them; empty where that is not known.
        specs: Their kind, size, grid and special tokens.
        logits: Shape of the logits; None where the model returns none.
        task: The kind of its head; None without logits.
        shifts_labels: Whether position n of the logits predicts label n + 1.
        masked: Whether padding is left out of its features.
        detects: Whether it detects objects: the order of its tokens means nothing then.
        problem: Why it has no logits that could be compared, where it has none.
    """

    name: str
    layers: list[str]
    modules: list[str]
    specs: list[FeatureSpec]
    logits: tuple[int, ...] | None
    task: Task | None
    shifts_labels: bool
    masked: bool
    detects: bool
    problem: str = ""

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of the model's table, the heading first."""
        rows: list[tuple[str, ...]] = [("layer", "module", "kind", "size", "grid", "special tokens")]
        for layer, module, spec in zip(self.layers, self.modules, self.specs, strict=True):
            grid, special = "-", "-"
            if spec.grid is not None:
                grid = f"{spec.grid[0]} x {spec.grid[1]}"
                after = spec.length - spec.prefix - spec.grid[0] * spec.grid[1]
                special = f"{spec.prefix} in front" + (f", {after} after" if after else "")
            size = f"{spec.channels} channels, {spec.length} positions"
            rows.append((layer, module or "?", spec.kind, size, grid, "-" if spec.kind == "map" else special))
        return rows


@dataclass(frozen=True)
class PairReport:
    """What `inspect_models` found; printed, it is a table.

    Attributes:
        student, teacher: What was found of each model; of several teachers all layers, and the first one's logits.
        alignments: How every pair of layers is compared, [student layer][teacher layer]: `tokens` position by
            position, `grid` as maps of the smaller size, `mean` by their averages.
        match: How the logits of both are brought to the same classes; None where only features can be distilled.
        problem: Why logits cannot be distilled, where they cannot.
        memory: About what a training takes with AdamW and batches of 8, but for what the feature loss adds; a trainer
            tells that, too, before it starts (logging level INFO).
    """

    student: ModelReport
    teacher: ModelReport
    alignments: Sequence[Sequence[str]]
    match: LogitMatch | None
    problem: str = ""
    memory: MemoryEstimate | None = None

    def __str__(self) -> str:
        """Return both models' layers, how they are compared, and the logits."""
        parts = []
        for role, model in (("Student", self.student), ("Teacher", self.teacher)):
            padding = "padding is left out" if model.masked else "no mask: all positions count"
            parts += [f"{role}: {model.name} ({padding})", *aligned_lines(model.rows(), "  "), ""]
        kinds = {kind for row in self.alignments for kind in row}
        if len(kinds) == 1:
            parts.append(f"Compared: every student layer with every teacher layer, {COMPARED[kinds.pop()]}")
        else:
            pairs = [("", *(f"teacher {name}" for name in self.teacher.layers))]
            pairs += [
                (f"student {name}", *row) for name, row in zip(self.student.layers, self.alignments, strict=True)
            ]
            parts += ["Compared", *aligned_lines(pairs, "  "), ""]
        parts.append(f"Logits: {self._logits()}")
        if self.memory is not None:
            parts += ["", "Memory, about", *self.memory.lines()]
        return "\n".join(parts)

    def _logits(self) -> str:
        if self.match is None:
            return f"not distilled. {self.problem}".strip()
        said = f"{self.student.task}, student {self.student.logits}, teacher {self.teacher.logits}"
        if self.student.shifts_labels:
            said += "; position n predicts label n + 1"
        if self.match.vocabulary is not None:
            said += f"; the first {self.match.vocabulary} classes are compared, which the tokenizer gives out"
        return said + ("; the teacher's classes are put into the student's order" * (self.match.order is not None))


@torch.no_grad()
def inspect_models(
    student: ModelSource,
    teacher: TeacherSource,
    batch: Mapping[str, Any],
    *,
    student_layers: Sequence[int] | Sequence[str] | None = None,
    teacher_layers: Sequence[int] | Sequence[str] | None = None,
    processing_class: Any = None,
) -> PairReport:
    """Run one batch through both models, and return what would be compared in a distillation.

    Neither model is changed: they run in evaluation mode for the moment, and nothing stays on them.

    Args:
        student, teacher: Models, or names or folders to load them from; the teacher may be a list of several.
        batch: As the collator makes it; `teacher_*` entries are the teacher's own. Two different samples at least, or
            special tokens cannot be told from patches of an image.
        student_layers, teacher_layers: Hidden-state indices or module names; None for all blocks.
        processing_class: The student's tokenizer or processor, for vocabularies that were padded differently.

    Raises:
        InputError: When a model cannot take the batch, or a layer is no layer.

    Example:
        >>> print(inspect_models(student, teacher, next(iter(trainer.get_train_dataloader()))))
    """
    learner = load_model(student, "student")
    teachers = [load_model(source, "teacher", like=learner) for source in teacher_list(teacher)]
    asked = zip(teachers, layers_by_teacher(teacher_layers, len(teachers)), strict=True)
    own = _report(learner, "student", batch, student_layers)
    others = [_report(model, "teacher", teacher_entries(batch), layers) for model, layers in asked]
    other = others[0] if len(others) == 1 else _joined(others)
    aligned = not has_own_tokens(batch) and not own.detects
    kinds = [[Alignment.of(s, t, aligned).kind for t in other.specs] for s in own.specs]
    shapes = [report.logits for report in others if report.logits is not None]
    memory = _memory(learner, teachers, batch)
    if own.logits is None or len(shapes) < len(others):
        return PairReport(own, other, kinds, None, own.problem or other.problem, memory)
    try:
        check_same_tokens(own.logits, batch)
        matches = match_teachers(learner, teachers, own.logits, shapes, vocabulary_size(processing_class))
    except InputError as error:
        return PairReport(own, other, kinds, None, str(error).splitlines()[0], memory)
    match = next((match for match in matches if match.order is not None), matches[0])
    return PairReport(own, other, kinds, match, memory=memory)


def _memory(student: nn.Module, teachers: Sequence[nn.Module], batch: Mapping[str, Any]) -> MemoryEstimate:
    """Measure a step of both models, whose loss reads all hidden states and logits; nothing stays on them."""

    def run(model: nn.Module, entries: Mapping[str, Any]) -> list[Tensor]:
        inputs = InputSelector(model)(entries)
        inputs = inputs if model is student else fitting_size(model, inputs)(inputs)
        outputs = model(**inputs, **FeatureCapture(model, None, "").request())
        leaves = tree_leaves(list(outputs.values()) if isinstance(outputs, Mapping) else outputs)
        return [entry for entry in leaves if isinstance(entry, Tensor) and entry.is_floating_point() and entry.dim()]

    def loss_of(made: Mapping[str, Any]) -> Tensor:
        with torch.no_grad(), evaluating(*teachers):
            taught = [run(teacher, teacher_entries(made)) for teacher in teachers]
        learned = [entry for entry in run(student, made) if entry.requires_grad]
        loss = torch.stack([entry.float().log_softmax(-1).square().mean() for entry in learned]).sum()
        # A loss holds them until then.
        del taught
        return loss

    try:
        step = try_step(student, teachers, batch, loss_of, seed=0)
    finally:
        for model in (student, *teachers):
            remove_capturing_traces(model)
    placed = teacher_bytes(teachers)
    return MemoryEstimate(TrainedBytes.of(student), None, placed, step, USUAL_BATCH, accumulates=False)


def _joined(reports: Sequence[ModelReport]) -> ModelReport:
    """Return several teachers as one model, with the layers of all of them."""
    return replace(
        reports[0],
        name=" and ".join(report.name for report in reports),
        layers=[f"{teacher_prefix(n)}{layer}" for n, report in enumerate(reports) for layer in report.layers],
        modules=[module for report in reports for module in report.modules],
        specs=[spec for report in reports for spec in report.specs],
        masked=all(report.masked for report in reports),
        problem=next((report.problem for report in reports if report.problem), ""),
    )


def _report(model: nn.Module, role: str, batch: Mapping[str, Any], layers: Any) -> ModelReport:
    capture, inputs = FeatureCapture(model, layers, role, both_sides=True), InputSelector(model)(batch)
    try:
        with evaluating(model):
            if role == "teacher":
                inputs = fitting_size(model, inputs)(inputs)
            found = run_on_inputs(role, batch, lambda: capture.find(model, inputs))
            shifts = predicts_next_token(model, found.outputs, batch)
    finally:
        remove_capturing_traces(model)
    logits, task, problem = None, None, ""
    try:
        given = logits_of(found.outputs, role)
        logits, task = tuple(given.shape), head_task(model, found.outputs, given, batch)
    except InputError as error:
        problem = str(error).splitlines()[0]
    attention = {"attention_mask": batch.get("attention_mask"), **inputs}
    mask = layer_masks(attention, batch.get("labels"), model, found.features, capture.sides, capture.text_places)
    modules = capture.modules or [""] * len(found.names)
    specs = found.describe(of_image=holds_images(model, inputs))
    name, masked = type(model).__name__, mask is not None
    detects = detects_objects(found.outputs)
    return ModelReport(name, found.names, modules, specs, logits, task, shifts, masked, detects, problem)
