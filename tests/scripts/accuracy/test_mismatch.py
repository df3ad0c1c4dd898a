"""scripts/accuracy/mismatch.py: the score by its definition, number by number."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from accuracy.data import Rows
from accuracy.mismatch import measured_mismatch, mismatch_score
from makers import distiller, images

from hf_semckd.errors import InputError


def naive_score(students: Any, teachers: Any, association: Any) -> float:
    """The definition, number by number."""

    def similarity(rows: Any) -> list[list[float]]:
        def norm(r: Any) -> float:
            return math.sqrt(sum(x * x for x in r))

        return [[sum(x * y for x, y in zip(a, b, strict=True)) / (norm(a) * norm(b)) for b in rows] for a in rows]

    total = 0.0
    for s, student in enumerate(students):
        for t, teacher in enumerate(teachers):
            own, theirs = similarity(student.tolist()), similarity(teacher.tolist())
            squares = sum((own[i][j] - theirs[i][j]) ** 2 for i in range(len(own)) for j in range(len(own)))
            total += association[s][t] * math.sqrt(squares)
    return math.log(total / len(students))


def test_the_score_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    students = [torch.randn(5, width, generator=generator) for width in (3, 4)]
    teachers = [torch.randn(5, width, generator=generator) for width in (6, 2, 7)]
    association = torch.rand(2, 3, generator=generator).softmax(-1).numpy()
    score = mismatch_score
    assert score(students, teachers, association) == pytest.approx(naive_score(students, teachers, association))
    scaled = [7 * rows for rows in teachers]
    assert score(students, scaled, association) == pytest.approx(score(students, teachers, association))


def test_layers_that_see_alike_do_not_differ():
    rows = torch.eye(3)
    assert mismatch_score([rows], [2 * rows, torch.ones(3, 2)], np.array([[1.0, 0.0]])) == -math.inf


@pytest.mark.parametrize(("shape", "samples"), [((2, 1), 4), ((1, 2), 4), ((1, 1), 3)])
def test_a_score_of_what_does_not_belong_together_is_refused(shape, samples):
    with pytest.raises(InputError, match="do not belong together"):
        mismatch_score([torch.ones(4, 2)], [torch.ones(samples, 2)], np.ones(shape))


def test_the_score_of_a_run_leaves_it_as_it_is(tmp_path):
    trainer = distiller(tmp_path)
    pixels = torch.stack([images()[index]["pixel_values"] for index in range(6)])
    rows = Rows({"pixel_values": pixels, "labels": torch.zeros(6, dtype=torch.long)}, 3)
    known: dict[Any, Any] = {}
    assert measured_mismatch(trainer, rows, known) is None
    trainer.train()
    before, state = trainer.student.state_dict(), torch.get_rng_state()
    before = {name: value.clone() for name, value in before.items()}
    found = measured_mismatch(trainer, rows, known)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in trainer.student.state_dict().items())
    with torch.no_grad():
        student, teacher = (
            [entry.mean(1) for entry in model(pixel_values=pixels, output_hidden_states=True).hidden_states[1:]]
            for model in (trainer.student.eval(), trainer.teacher)
        )
    assert found == pytest.approx(mismatch_score(student, teacher, trainer.association()), rel=1e-5)
    (kept,) = known.values()
    assert [tuple(entry.shape) for entry in kept] == [tuple(entry.shape) for entry in teacher]
