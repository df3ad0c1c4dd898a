"""Keys, rows and lookups of the teacher cache; whole trainings with it are in `test_caching.py`."""

import logging
from pathlib import Path

import pytest
import torch
from kept import named
from makers import distiller, vit

from hf_semckd.data.columns import CACHED
from hf_semckd.errors import InputError
from hf_semckd.features.targets import LayerTarget, TeacherTargets, TokenChoice
from hf_semckd.teacher.cache.cache import (
    CachingCollator,
    TeacherCache,
    lookup_of,
    right_padded_lengths,
    sample_keys,
    teacher_fingerprint,
    token_count,
    weights_digest,
)
from hf_semckd.teacher.cache.rows import to_batch, to_outputs, to_rows
from hf_semckd.teacher.cache.shard import KEY_BYTES
from hf_semckd.teacher.cache.store import TensorStore
from hf_semckd.teacher.outputs import TeacherOutputs


def sentences(count: int = 10) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        ids = torch.randint(1, 30, (3 + index % 5,), generator=generator)
        rows.append({"input_ids": ids, "labels": torch.tensor(index % 3)})
    return rows


def pad(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.stack([row["labels"] for row in rows])}


def test_another_teacher_is_another_cache() -> None:
    teacher = vit()
    before = weights_digest(teacher)
    assert weights_digest(vit()) == before
    with torch.no_grad():
        teacher.classifier.bias[0] += 1e-6
    assert weights_digest(teacher) != before
    # The same weights compute something else.
    teacher = vit()
    teacher.config.layer_norm_eps *= 2
    assert weights_digest(teacher) != before


def test_another_choice_of_outputs_is_another_cache() -> None:
    before = teacher_fingerprint("weights", [1, 2], True, "tokens")
    assert teacher_fingerprint("weights", [1, 2], True, "tokens") == before
    others = [
        ("other", [1, 2], True, "tokens"),
        ("weights", [1], True, "tokens"),
        ("weights", [2, 1], True, "tokens"),
        ("weights", [12], True, "tokens"),
        ("weights", [1, 2], False, "tokens"),
        ("weights", [1, 2], True, "grids"),
    ]
    assert len({before, *(teacher_fingerprint(*other) for other in others)}) == len(others) + 1


def test_keys_follow_the_content_and_not_the_padding() -> None:
    rows = sentences(4)
    wide = pad([*rows, {"input_ids": torch.arange(1, 15), "labels": torch.tensor(0)}])
    narrow = pad(rows)
    del wide["labels"], narrow["labels"]
    narrow_keys = sample_keys(narrow, right_padded_lengths(narrow))
    assert sample_keys(wide, right_padded_lengths(wide))[:4] == narrow_keys
    assert len(set(narrow_keys)) == 4
    narrow["input_ids"][0, 0] += 1
    changed = sample_keys(narrow, right_padded_lengths(narrow))
    assert changed[0] != narrow_keys[0]
    assert changed[1:] == narrow_keys[1:]


def test_left_padding_is_part_of_the_key() -> None:
    ids = torch.tensor([[0, 5, 6]])
    left = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    assert right_padded_lengths(left) is None
    right = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert sample_keys(left, None) != sample_keys(right, right_padded_lengths(right))


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with caplog.at_level(logging.WARNING, logger="hf_semckd.teacher.cache.store"):
        trainer = distiller(tmp_path / "out", {"teacher_cache_dir": str(tmp_path / "cache")})
        trainer.train()
    assert trainer.state.global_step == 3
    assert sum("not stored any more" in record.message for record in caplog.records) == 1


# ---- Keys ----------------------------------------------------------------------------------------------------------


def test_keys_have_the_length_that_the_store_takes_and_tell_samples_apart() -> None:
    pixels = torch.arange(4 * 3 * 2 * 2).view(4, 3, 2, 2).float()
    keys = sample_keys({"pixel_values": pixels}, None)
    assert {len(key) for key in keys} == {KEY_BYTES}
    assert len(set(keys)) == 4
    assert sample_keys({"pixel_values": pixels[[2, 0]]}, None) == [keys[2], keys[0]]


@pytest.mark.parametrize(
    "changed",
    [
        {"pixel_values": torch.zeros(1, 2).double()},
        {"pixel_values": torch.zeros(1, 2).half()},
        {"pixel_values": torch.zeros(1, 2, 1)},
        {"pixel_values": torch.zeros(1, 1, 2)},
        {"pixel_values": -torch.zeros(1, 2)},
        {"other": torch.zeros(1, 2)},
        {"pixel_values": torch.zeros(1, 2), "interpolate": True},
        {"pixel_values": torch.zeros(1, 2), "more": torch.zeros(1)},
    ],
    ids=["double", "half", "shape", "shape", "sign of zero", "name", "constant", "tensor"],
)
def test_keys_follow_type_shape_name_and_company(changed) -> None:
    base = sample_keys({"pixel_values": torch.zeros(1, 2)}, None)
    assert sample_keys(changed, None) != base
    assert sample_keys({"pixel_values": torch.zeros(1, 2)}, None) == base


@pytest.mark.parametrize("name", ["pixel_values", "decoder_input_ids", "input_values"])
def test_what_is_as_long_as_the_text_by_accident_counts_as_a_whole(name) -> None:
    """Three channels, three decoder tokens: the mask of the text says nothing about them."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    inputs = {"input_ids": mask * 5, "attention_mask": mask, name: torch.zeros(2, 3, 4)}
    before = sample_keys(inputs, right_padded_lengths(inputs))
    inputs[name][0, 2] = 1
    after = sample_keys(inputs, right_padded_lengths(inputs))
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_what_stands_in_the_padding_is_not_part_of_the_key() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    inputs = {"input_ids": torch.full((2, 3), 5), "token_type_ids": torch.ones(2, 3).long(), "attention_mask": mask}
    before = sample_keys(inputs, right_padded_lengths(inputs))
    inputs["input_ids"][0, 2], inputs["token_type_ids"][0, 2] = 9, 0
    assert sample_keys(inputs, right_padded_lengths(inputs)) == before
    inputs["token_type_ids"][1, 2] = 0
    assert sample_keys(inputs, right_padded_lengths(inputs))[1] != before[1]


def test_a_sample_is_another_one_where_nothing_is_cut() -> None:
    """Among left-padded ones its rows are stored uncut: one batch cannot hold both kinds."""
    ids = torch.tensor([[5, 6, 7], [0, 5, 6]])
    together = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    alone = {name: value[:1] for name, value in together.items()}
    assert right_padded_lengths(alone) == [3]
    assert sample_keys(together, right_padded_lengths(together))[0] != sample_keys(alone, [3])[0]


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        ([[1, 1, 0], [1, 0, 0]], [2, 1]),
        ([[1, 1, 1]], [3]),
        ([[0, 0, 0], [1, 0, 0]], [0, 1]),
        ([[0, 1, 1]], None),
        ([[1, 0, 1]], None),
        ([[1, 1, 0], [0, 1, 1]], None),
    ],
)
def test_lengths_are_known_where_padding_follows(mask, lengths) -> None:
    assert right_padded_lengths({"attention_mask": torch.tensor(mask)}) == lengths


def test_there_are_no_lengths_and_no_width_without_a_mask_of_tokens() -> None:
    for inputs in ({}, {"attention_mask": torch.ones(2, 4, 3)}, {"attention_mask": None}):
        assert right_padded_lengths(inputs) is None
        assert token_count(inputs) is None


# ---- Rows ----------------------------------------------------------------------------------------------------------


def sampled(width: int, limit: int, counts: list[int]) -> TeacherTargets:
    """Return what a selection keeps of samples: the first chosen tokens, then zeros."""
    kept = min(width, limit)
    mask = torch.arange(kept) < torch.tensor(counts).clamp(max=limit).unsqueeze(1)
    choice = TokenChoice(torch.arange(kept).expand(len(counts), kept) * mask, mask)
    tokens = [torch.randn(len(counts), kept, 4) * mask.unsqueeze(-1) for _ in range(2)]
    return TeacherTargets(tuple(LayerTarget(tokens=entry, choice=choice) for entry in tokens))


def targets_of(**kinds: torch.Tensor) -> TeacherTargets:
    """Return targets of one layer."""
    return TeacherTargets((LayerTarget(**kinds),))


def stored_and_read(
    targets: TeacherTargets, lengths: list[int] | None, width: int, to: int, logits: torch.Tensor | None = None
) -> TeacherOutputs:
    """Return what comes back from rows in a batch of another width."""
    rows = to_rows(TeacherOutputs(logits, targets), lengths, width)
    return to_outputs(to_batch(rows, to), max(len(part.layers) for part in (targets, *targets.parts)))


def assert_equal(first: TeacherTargets, second: TeacherTargets) -> None:
    left, right = named(first), named(second)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_rows_hold_nothing_of_the_padding() -> None:
    logits, whole, mask = torch.randn(2, 5, 7), torch.randn(2, 5, 4), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    targets = TeacherTargets.of_whole([whole], mask)
    rows = to_rows(TeacherOutputs(logits, targets), [5, 2], 5)
    assert [value.shape[0] for value in rows[1].values()] == [2, 2, 2]
    back = stored_and_read(targets, [5, 2], 5, 8, logits)
    for found, value in ((back.logits, logits), (back.features.whole(0), whole), (back.features.mask, mask)):
        assert found.shape[:2] == (2, 8)
        assert torch.equal(found[0, :5], value[0])
        assert torch.equal(found[1, :2], value[1, :2])
        assert not found[1, 2:].any()


@pytest.mark.parametrize(("width", "limit"), [(9, 4), (4, 4), (4, 9), (9, 9)])
def test_chosen_tokens_come_back_as_they_were(width, limit) -> None:
    torch.manual_seed(0)
    targets = sampled(width, limit, [width, 2, 3])
    rows = to_rows(TeacherOutputs(None, targets), [width, 2, 3], width)
    # Positions, mask, and the tokens of both layers.
    assert [len(row) for row in rows] == [4, 4, 4]
    assert [{value.shape[0] for value in row.values()} for row in rows] == [{min(width, limit)}, {2}, {3}]
    back = stored_and_read(targets, [width, 2, 3], width, width).features
    assert_equal(back, targets)
    assert back.layers[0].choice is back.layers[1].choice


def test_chosen_tokens_of_narrow_and_wide_batches_make_one() -> None:
    torch.manual_seed(0)
    narrow, wide = sampled(3, 4, [3, 2]), sampled(9, 4, [9, 1])
    rows = to_rows(TeacherOutputs(None, narrow), [3, 2], 3) + to_rows(TeacherOutputs(None, wide), [9, 1], 9)
    layer = to_outputs(to_batch(rows, 9), 2).features.layers[1]
    assert layer.choice.mask.sum(1).tolist() == [3, 2, 4, 1]
    assert torch.equal(layer.tokens[:2, :3], narrow.layers[1].tokens)
    assert torch.equal(layer.tokens[2:], wide.layers[1].tokens)


def test_chosen_tokens_of_left_padded_samples_come_back_as_they_were() -> None:
    torch.manual_seed(0)
    targets = sampled(9, 4, [9, 2])
    assert_equal(stored_and_read(targets, None, 9, 9).features, targets)


def test_unsampled_tokens_are_filled_up_to_the_width_of_the_batch() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    tokens = torch.randn(2, 3, 4) * mask.unsqueeze(-1)
    layer = stored_and_read(targets_of(tokens=tokens, choice=TokenChoice(mask=mask)), [2, 1], 3, 8).features.layers[0]
    assert layer.tokens.shape == (2, 8, 4) and layer.choice.positions is None
    assert layer.choice.mask.tolist() == [[1, 1] + [0] * 6, [1] + [0] * 7]


def test_layers_of_two_layouts_and_joined_losses_come_back_apart() -> None:
    """As many tokens in both layouts, of which one has no mask: widths alone would not tell what is cut."""
    torch.manual_seed(0)
    first, other = sampled(3, 4, [3, 2]), TokenChoice(torch.arange(3).expand(2, 3))
    free = LayerTarget(tokens=torch.randn(2, 3, 5), choice=other, mean=torch.randn(2, 3), summary=torch.randn(2, 3))
    mixed = TeacherTargets((*first.layers, free, LayerTarget()))
    whole = TeacherTargets.of_whole([torch.randn(2, 3, 5)] * 4, torch.tensor([[1, 1, 1], [1, 1, 0]]), used=[3])
    whole.layers[3].whole[1, 2] = 0
    back = stored_and_read(TeacherTargets(parts=(mixed, whole)), [3, 2], 3, 3).features
    assert_equal(back, TeacherTargets(parts=(mixed, whole)))
    assert [len(part.layers) for part in back.parts] == [4, 4] and back.layers == ()


@pytest.mark.parametrize(
    "outputs",
    [
        TeacherOutputs(torch.randn(2, 3)),
        TeacherOutputs(None, targets_of(mean=torch.randn(2, 3))),
        TeacherOutputs(None, targets_of(summary=torch.randn(2, 3))),
        TeacherOutputs(None, targets_of(grid=torch.randn(2, 3, 2, 2))),
        TeacherOutputs(None, targets_of(whole=torch.randn(2, 3, 5, 5))),
        TeacherOutputs(None, targets_of(whole=torch.randn(2, 3))),
        TeacherOutputs(torch.randn(2)),
    ],
    ids=["logits 2", "mean 2", "summary 2", "grid 4", "whole 4", "whole 2", "logits 1"],
)
def test_what_has_as_many_channels_as_there_are_tokens_is_not_cut(outputs) -> None:
    back = to_outputs(to_batch(to_rows(outputs, [1, 2], 3), 6), 1)
    assert (back.logits is None) == (outputs.logits is None)
    assert outputs.logits is None or torch.equal(back.logits, outputs.logits)
    assert_equal(back.features, outputs.features)


def test_no_rows_make_no_batch() -> None:
    assert to_batch([], 4) == {}


# ---- Cache and collator --------------------------------------------------------------------------------------------


def test_a_lookup_tells_who_is_there(tmp_path: Path) -> None:
    cache = TeacherCache(TensorStore(tmp_path / "teacher"), lambda batch: {"pixel_values": batch["pixel_values"]})
    batch = {"pixel_values": torch.randn(3, 2), "labels": torch.zeros(3)}
    logits = torch.randn(3, 5)
    keys = cache.keys(batch)[1:]
    cache.store.write(keys, cache.rows(TeacherOutputs(logits[1:]), {"pixel_values": logits[1:]}, keys))
    found = cache.look_up(batch)
    assert found.present == [False, True, True]
    assert torch.equal(found.values["logits"], logits[1:])


def test_the_teachers_own_columns_are_what_counts(tmp_path: Path) -> None:
    cache = TeacherCache(TensorStore(tmp_path / "teacher"), dict)
    batch = {"input_ids": torch.tensor([[1]]), "teacher_input_ids": torch.tensor([[2]])}
    assert cache.keys(batch) == cache.keys({**batch, "input_ids": torch.tensor([[3]])})
    assert cache.keys(batch) != cache.keys({**batch, "teacher_input_ids": torch.tensor([[3]])})


def test_features_are_stored_in_the_cache_s_precision_and_logits_and_positions_are_not(tmp_path: Path) -> None:
    cache = TeacherCache(TensorStore(tmp_path / "teacher"), dict, dtype=torch.float16)
    choice = TokenChoice(torch.arange(4).view(2, 2))
    targets = targets_of(mean=torch.randn(2, 4), tokens=torch.randn(2, 2, 4), choice=choice)
    row = cache.rows(TeacherOutputs(torch.randn(2, 3), targets), {"x": torch.zeros(2)}, [b"", b""])[0]
    assert {name: value.dtype for name, value in row.items()} == {
        "logits": torch.float32,
        "0.mean": torch.float16,
        "0.tokens.0": torch.float16,
        "0.positions": torch.int64,
    }


def test_outputs_with_several_rows_a_sample_are_refused(tmp_path: Path) -> None:
    cache = TeacherCache(TensorStore(tmp_path / "teacher"), dict)
    with pytest.raises(InputError, match=r"8 rows of `0\.mean` for 2 samples"):
        outputs = TeacherOutputs(torch.zeros(2, 4), targets_of(mean=torch.zeros(8, 3)))
        cache.rows(outputs, {"x": torch.zeros(2, 4, 5)}, [b"", b""])


@pytest.mark.parametrize("in_thread", [True, False])
def test_the_collator_adds_the_lookup_and_nothing_else(in_thread: bool, tmp_path: Path) -> None:
    cache = TeacherCache(TensorStore(tmp_path / "teacher"), lambda batch: {"x": batch["x"]})
    samples = {"x": torch.randn(2, 3), "labels": torch.zeros(2)}
    cache.store.write(cache.keys(samples)[:1], [{"logits": torch.ones(4)}])
    batch = CachingCollator(lambda rows: rows, cache, in_thread=in_thread)(samples)
    assert {name: value for name, value in batch.items() if name != CACHED} == samples
    found = lookup_of(batch, cache)
    assert found is not None
    assert found.present == [True, False]
    assert found.values["logits"].tolist() == [[1.0] * 4]
    assert lookup_of(samples, cache) is None


def test_where_a_teacher_was_loaded_from_is_not_part_of_its_name() -> None:
    teacher = vit()
    before = weights_digest(teacher)
    teacher.config._name_or_path = "/elsewhere"
    assert weights_digest(teacher) == before
    assert weights_digest(teacher.double()) != before


class Scaled(torch.nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.register_buffer("shift", torch.full((1,), gain), persistent=False)
        torch.manual_seed(0)
        self.body = torch.nn.Linear(3, 3)


def test_what_a_plain_model_holds_besides_weights_is_part_of_its_digest() -> None:
    from hf_semckd.teacher.cache.cache import weights_digest

    assert weights_digest(Scaled(1.0)) == weights_digest(Scaled(1.0)) != weights_digest(Scaled(50.0))
    changed = Scaled(1.0)
    changed.shift.fill_(7)
    assert weights_digest(changed) != weights_digest(Scaled(1.0))
    assert weights_digest(Scaled(1.0).train()) == weights_digest(Scaled(1.0).eval())


def test_an_adapters_scale_and_whether_it_is_on_are_part_of_the_digest() -> None:
    peft = pytest.importorskip("peft")
    from makers import vit

    from hf_semckd.teacher.cache.cache import weights_digest

    def adapted(alpha: int) -> torch.nn.Module:
        settings = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["query", "q_proj"], init_lora_weights=False)
        model = vit()
        torch.manual_seed(4)
        return peft.get_peft_model(model, settings)

    assert weights_digest(adapted(2)) == weights_digest(adapted(2)) != weights_digest(adapted(64))
    off = adapted(2)
    off.base_model.disable_adapter_layers()
    assert weights_digest(off) != weights_digest(adapted(2))
