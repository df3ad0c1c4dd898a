"""Students made from their teacher: equal to it where nothing is cut, else to it with blocks removed by hand."""

import copy

import pytest
import torch
from makers import bert, distiller, images, texts, vit
from matrix.cells import FIRST_TASK, case, outputs_of
from torch import nn

from hf_semckd import make_student
from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.models.importance import block_changes, even_blocks
from hf_semckd.models.sizes import find_depths

QUICK = {"bert", "llama", "gpt2", "t5", "swin", "resnet", "wav2vec2", "dinov2", "longformer"}
# Their configurations count no blocks (albert shares one), or blocks of two kinds take turns.
REFUSED = {"albert", "mobilenet_v1", "mobilenet_v2", "mobilevit", "swiftformer", "llama4_text"}
# What a block does depends on its number, or on how many there are: a block elsewhere is another one.
BY_NUMBER = {"diffllama", "esmc", "minicpm3", "ultrabert", "beam", "flint", "olmo_hybrid"}
# Their forwards count blocks by themselves, so that none can be removed by hand.
COUNTED = {"flaubert", "xlm", "lfm3", "regnet"}
FAMILIES = [
    pytest.param(family, id=family, marks=() if family in QUICK else (pytest.mark.matrix, pytest.mark.slow))
    for family in sorted(FIRST_TASK)
    if family not in REFUSED
]


def cut_by_hand(model, depths, kept):
    """Return a copy whose lists hold some of their blocks; its configuration stays as it is."""
    made = copy.deepcopy(model)
    for depth, blocks in zip(depths, kept, strict=True):
        for name in depth.lists:
            parent, _, own = name.rpartition(".")
            holder = made.get_submodule(parent)
            old = getattr(holder, own)
            members = [old[k] for k in blocks]
            setattr(holder, own, nn.Sequential(*members) if isinstance(old, nn.Sequential) else nn.ModuleList(members))
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_cut_the_student_is_the_teacher(family):
    model, inputs = case(family)
    student = make_student(model, num_layers=[depth.size.value for depth in find_depths(model)], report=False)
    assert student is not model and torch.equal(outputs_of(student, inputs), outputs_of(model, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_the_teacher_without_some_blocks_and_loads_as_it_is(family, tmp_path):
    model, inputs = case(family)
    before, depths = outputs_of(model, inputs), find_depths(model)
    counts = [max(depth.size.value - 1, 1) for depth in depths]
    student = make_student(model, num_layers=counts, report=False)
    assert [depth.size.value for depth in find_depths(student)] == [count for count in counts if count > 1]
    if family not in BY_NUMBER | COUNTED:
        kept = [
            range(count) if depth.size.index is not None else even_blocks(depth.size.value, count)
            for depth, count in zip(depths, counts, strict=True)
        ]
        expected = outputs_of(cut_by_hand(model, depths, kept), inputs)
        torch.testing.assert_close(outputs_of(student, inputs), expected, rtol=0, atol=1e-6)
    assert torch.equal(outputs_of(model, inputs), before)
    student.save_pretrained(tmp_path)
    loaded, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(outputs_of(loaded, inputs), outputs_of(student, inputs))


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_families_that_cannot_be_cut_are_refused_by_name(family):
    model, _ = case(family)
    with pytest.raises(InputError, match=f"(?s){type(model).__name__} cannot be cut.*what to do"):
        make_student(model, num_layers=2, report=False)


@pytest.mark.parametrize(
    ("count", "kept", "expected"), [(12, 6, [0, 2, 4, 7, 9, 11]), (12, 3, [0, 6, 11]), (6, 1, [0])]
)
def test_blocks_are_evenly_spaced(count, kept, expected):
    assert list(even_blocks(count, kept)) == expected


def test_the_budget_of_parameters_is_kept_and_used():
    teacher = vit(12, 32)
    whole = sum(entry.numel() for entry in teacher.parameters())
    student = make_student(teacher, parameters=0.5, report=False)
    counted = {
        n: sum(e.numel() for e in make_student(teacher, num_layers=n, report=False).parameters()) for n in (5, 6)
    }
    assert student.config.num_hidden_layers == max(n for n, size in counted.items() if size <= 0.5 * whole)
    with pytest.raises(ConfigurationError, match=r"(?s)is as small.*a share of 0\.\d\d at least"):
        make_student(teacher, parameters=0.01, report=False)


def test_a_latency_that_nothing_meets_is_refused_and_one_that_all_meet_cuts_nothing():
    teacher, batch = bert(4), {"input_ids": torch.ones(1, 6, dtype=torch.long)}
    assert make_student(teacher, latency_ms=1e6, batch=batch, report=False).config.num_hidden_layers == 4
    with pytest.raises(ConfigurationError, match=r"(?s)as fast on this machine.*ms at least"):
        make_student(teacher, latency_ms=1e-6, batch=batch, report=False)
    with pytest.raises(ConfigurationError, match="there is none"):
        make_student(teacher, latency_ms=5, report=False)


def test_blocks_that_change_nothing_go_first():
    teacher, batch = vit(5, 16), {"pixel_values": torch.randn(4, 3, 16, 16)}
    with torch.no_grad():
        for block in (1, 3):
            for name, entry in teacher.vit.layers[block].named_parameters():
                if "layernorm" not in name:
                    entry.zero_()
    changes = block_changes(teacher, find_depths(teacher)[0], batch)
    assert max(changes[1], changes[3]) < 1e-6 < min(changes[0], changes[2], changes[4])
    student = make_student(teacher, num_layers=3, importance="change", batch=batch, report=False)
    torch.testing.assert_close(outputs_of(student, batch), outputs_of(teacher, batch), rtol=1e-5, atol=1e-6)


def test_a_random_start_shares_nothing_but_the_size():
    teacher = vit(4)
    teacher.config._name_or_path = "alice/teacher-1"
    student = make_student(teacher, num_layers=2, init="random", report=False)
    assert student.name_or_path == student.config._name_or_path == ""
    assert make_student(teacher, num_layers=2, report=False).config._name_or_path == "alice/teacher-1"
    assert student.config.num_hidden_layers == 2
    assert not torch.equal(student.classifier.weight, teacher.classifier.weight)


def test_the_table_says_what_was_kept(capsys):
    make_student(vit(4), num_layers=2)
    said = capsys.readouterr().out
    assert "num_hidden_layers  4        2        0, 3" in said and "%" in said


@pytest.mark.parametrize("asked", [0, 5, [2, 2], [7]])
def test_impossible_numbers_are_refused_with_what_is_possible(asked):
    with pytest.raises(ConfigurationError, match=r"(?s)no such number of blocks.*from 1 to 4"):
        make_student(bert(4), num_layers=asked, report=False)


def test_a_hierarchical_teacher_keeps_every_stage():
    model, _ = case("resnet")
    total = sum(depth.size.value for depth in find_depths(model))
    student = make_student(model, num_layers=total - 1, report=False)
    assert len(student.config.depths) == len(model.config.depths)
    assert sum(student.config.depths) == sum(model.config.depths) - 1


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(InputError, match="no configuration counts its blocks"):
        make_student(nn.Linear(2, 2), num_layers=1)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_a_made_student_is_distilled(kind, tmp_path):
    teacher = vit(4, 24, seed=9) if kind == "vit" else bert(4, 24, seed=9)
    student = make_student(teacher, num_layers=2, report=False)
    data = images(8) if kind == "vit" else texts(8)
    trainer = distiller(tmp_path, model=student, teacher_model=teacher, train_dataset=data)
    trainer.train()
    assert trainer.student.config.num_hidden_layers == 2


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_teacher_in_half_precision_keeps_the_precision_of_each_tensor(family, tmp_path):
    model, inputs = case(family)
    model.save_pretrained(tmp_path)
    teacher = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    state = torch.get_rng_state()
    student = make_student(teacher, num_layers=[d.size.value for d in find_depths(teacher)], report=False)
    assert torch.equal(torch.get_rng_state(), state)
    kinds = [dict(m.named_buffers()) | dict(m.named_parameters()) for m in (teacher, student)]
    assert {name: entry.dtype for name, entry in kinds[0].items()} == {n: e.dtype for n, e in kinds[1].items()}
    assert torch.equal(outputs_of(student, inputs), outputs_of(teacher, inputs))
    student.save_pretrained(tmp_path / "student")
    loaded = type(model).from_pretrained(tmp_path / "student", dtype=torch.bfloat16)
    assert torch.equal(outputs_of(loaded, inputs), outputs_of(student, inputs))


@pytest.mark.parametrize("wrong", [{"num_layers": 2.0}, {"num_layers": True}, {"hidden_size": "8"}, {"init": "foo"}])
def test_what_is_no_number_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="whole numbers"):
        make_student(bert(4), **wrong)
