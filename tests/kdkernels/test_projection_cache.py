"""ProjectionCache: projections of states come back, a kill loses nothing, and another alpha, head or teacher is refused."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

pytest.importorskip("safetensors", reason="the cache's shards are safetensors files")
from kdkernels import (
    ContrastCache,
    LMHead,
    ProjectionCache,
    ProjectionSettings,
    fused_linear_caad_loss,
    fused_linear_projected_loss,
    project_cache,
    project_teacher,
    projection_cache,
)
from kdkernels.shards import CorruptCacheError

V, H_S, H_T = 50, 6, 8
NAMES = ("a", "b", "c", "d", "e")


def head(width, seed, **post):
    return LMHead(torch.randn(V, width, generator=torch.Generator().manual_seed(seed)), **post)


TEACHER, STUDENT = head(H_T, 0, softcap=5.0), head(H_S, 1, logit_scale=0.5)


@pytest.fixture
def states(tmp_path):
    generator = torch.Generator().manual_seed(2)
    with ContrastCache.writer(tmp_path / "states", fingerprint={"t": 1}, hidden_size=H_T, dtype=torch.float32) as writer:
        for number, name in enumerate(NAMES):
            audio, text = torch.randn(2, number + 1, H_T, generator=generator)
            writer.add(name, audio, text, torch.randint(0, V, (number + 1,), generator=generator), content=f"of {name}")
    return ContrastCache(tmp_path / "states")


@pytest.fixture
def groups_of_two(monkeypatch):
    """Two samples a group, one sample a shard."""
    monkeypatch.setattr(projection_cache, "_GROUP_TOKENS", 2)


def project(states, folder, **options):
    options = {"teacher_head": TEACHER, "student_head": STUDENT, "top_k": 7, "shard_mib": 1e-6, **options}
    return project_cache(states, folder, **options)


def test_the_head_of_another_teacher_is_refused(tmp_path):
    ContrastCache.writer(tmp_path / "states", fingerprint={}, hidden_size=H_T, teacher_head=TEACHER).close()
    with pytest.raises(ValueError, match="teacher_head: expected that of the teacher whose states"):
        project(ContrastCache(tmp_path / "states"), tmp_path / "p", teacher_head=head(H_T, 3, softcap=5.0))
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("contrast", ["paths", "none", "zeros"])
def test_the_loss_is_that_from_the_states(states, tmp_path, contrast):
    assert project(states, tmp_path / "p", contrast=contrast, alpha=1.5, temperature=1.3, plausibility=0.01) == 5
    cache = ProjectionCache(tmp_path / "p", fingerprint={"t": 1})
    assert list(cache) == list(NAMES) and cache.content("b") == "of b" and cache.rows("e") == 5 and cache.top_k == 7
    order = ["d", "a", "d"]
    held, exact = cache.get(order), states.get(order)
    assert torch.equal(held.target, exact.target) and torch.equal(held.lengths, exact.lengths)
    assert held.position.tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3]
    text = {"paths": exact.text_hidden, "none": None, "zeros": torch.zeros_like(exact.text_hidden)}[contrast]
    hidden = torch.randn(len(exact.target), H_S, requires_grad=True)
    loss = fused_linear_projected_loss(hidden, STUDENT.weight, held.projection, held.target)
    expected = fused_linear_caad_loss(
        hidden, STUDENT.weight, exact.audio_hidden, text, target=exact.target, temperature=1.3, plausibility=0.01,
        alpha=0.0 if text is None else 1.5, **TEACHER.keywords("teacher"), student_logit_scale=0.5,
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(x, hidden)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_what_is_stored_is_bitwise_what_was_made_and_bf16_rounds_the_tail_alone(states, tmp_path):
    exact = states.get(NAMES)
    made = project_teacher(
        exact.audio_hidden, exact.text_hidden, student_weight=STUDENT.weight, student_logit_scale=0.5, top_k=7,
        **TEACHER.keywords("teacher"),
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        project(states, folder, tail_dtype=dtype)
        held = ProjectionCache(folder).get(NAMES).projection
        for name, x in made.tensors().items():
            assert torch.equal(held.tensors()[name], x.to(dtype) if name == "tail" else x), name
        for name in ("temperature", "student_logit_scale", "vocab_size", "student_fingerprint"):
            assert getattr(held, name) == getattr(made, name)
    size = ProjectionCache.estimate_bytes(tokens=15, hidden_size=H_S, top_k=7)
    assert size == 15 * (7 * 8 + H_S * 4 + 3 * 4 + 8 + 4) <= ProjectionCache(tmp_path / str(torch.float32)).bytes


def test_after_a_kill_the_same_call_goes_on_with_the_same_bits(states, tmp_path, groups_of_two, monkeypatch):
    project(states, tmp_path / "whole")
    calls = []

    class Killed(BaseException):
        pass

    def kill_before_the_last(self, *arguments, **options):
        calls.append(arguments[0])
        if len(calls) == 4:  # the second sample of the second group
            raise Killed
        return add(self, *arguments, **options)

    add = projection_cache.ProjectionCacheWriter.add
    monkeypatch.setattr(projection_cache.ProjectionCacheWriter, "add", kill_before_the_last)
    with pytest.raises(Killed):
        project(states, tmp_path / "parts")
    assert list(ProjectionCache(tmp_path / "parts")) == ["a", "b", "c"]
    (tmp_path / "parts" / "shard-0-00001.safetensors").unlink()  # the writer keeps the good shards
    assert project(states, tmp_path / "parts") == 3
    whole, parts = (ProjectionCache(tmp_path / name).get(NAMES).projection.tensors() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert project(states, tmp_path / "parts") == 0


@pytest.mark.parametrize("other_part", [False, True])
def test_a_sample_that_has_changed_is_refused(states, tmp_path, groups_of_two, other_part):
    project(states, tmp_path / "p")
    with ContrastCache.writer(tmp_path / "again", fingerprint={"t": 1}, hidden_size=H_T, dtype=torch.float32) as writer:
        for name in NAMES:
            held = states.get([name])
            content = f"of {name}" + (", heard again" if name == "c" else "")
            writer.add(name, held.audio_hidden, held.text_hidden, held.target, content=content)
    again = ContrastCache(tmp_path / "again")
    with pytest.raises(ValueError, match=r"got another 'c' in .*/p \(content 'of c', now 'of c, heard again'\); write into"):
        for part in range(2 if other_part else 1):
            project(again, tmp_path / "p", parts=2 if other_part else 1, part=part)
    assert project(states, tmp_path / "p") == 0


def test_processes_share_the_groups(states, tmp_path, groups_of_two):
    written = [project(states, tmp_path / "p", part=part, parts=2) for part in (0, 1)]
    cache = ProjectionCache(tmp_path / "p")
    assert min(written) > 0 and sum(written) == 5 and sorted(cache) == list(NAMES)
    assert {path.name.split("-")[1] for path in (tmp_path / "p").glob("shard-*")} == {"0", "1"}
    assert project(states, tmp_path / "p") == 0  # one process alone does not write what the other has


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"alpha": 1.0}, "alpha 2.0, not 1.0"),
        ({"temperature": 1.0}, "temperature 2.0, not 1.0"),
        ({"plausibility": 0.1}, "plausibility None, not 0.1"),
        ({"contrast": "none"}, "alpha 2.0, not 0.0; contrast paths, not none"),
        ({"student_head": head(H_S, 3, logit_scale=0.5)}, "the student head [0-9a-f]{12}, not [0-9a-f]{12}"),
        ({"teacher_head": head(H_T, 3)}, "the teacher head [0-9a-f]{12}, not"),
        ({"top_k": 3}, "top_k: the cache .* has another; expected 3, got 7"),
        ({"tail_dtype": torch.bfloat16}, "dtype: the cache .* has another; expected bfloat16, got float32"),
        ({"student_head": head(H_S, 1, softcap=3.0)}, "student_head.softcap: expected None"),
        ({"part": 2, "parts": 2}, "part: expected a number from 0 to parts - 1, got 2 of 2"),
    ],
)
def test_what_is_refused(states, tmp_path, change, says):
    project(states, tmp_path / "p")
    with pytest.raises(ValueError, match=says):
        project(states, tmp_path / "p", **change)


def test_another_teacher_and_another_kind_of_cache_are_refused(states, tmp_path):
    project(states, tmp_path / "p")
    with pytest.raises(ValueError, match=r"fingerprint: the cache .* was made from something else; t: expected 2, got 1"):
        ProjectionCache(tmp_path / "p", fingerprint={"t": 2})
    with pytest.raises(ValueError, match=r"expected a projection cache of format 1 in .*states, got None"):
        ProjectionCache(tmp_path / "states")
    with pytest.raises(ValueError, match=r"expected a contrast cache of format 2 in .*, got None"):
        ContrastCache(tmp_path / "p")
    with pytest.raises(ValueError, match="contrast: expected one of paths, none, zeros, got 'audio'"):
        project(states, tmp_path / "q", contrast="audio")


def test_folders_beside_the_states_are_found(states, tmp_path):
    for alpha in (1, 2):
        project(states, states.folder / f"alpha{alpha}", alpha=alpha)
    assert [path.name for path in ProjectionCache.beside(states.folder)] == ["alpha1", "alpha2"]
    assert ProjectionCache.beside(states.folder / "alpha1") == [states.folder / "alpha1"]
    assert list(ContrastCache(states.folder)) == list(NAMES)  # which they do not disturb


def test_some_tokens_with_their_places_and_a_divergence(tmp_path):
    generator = torch.Generator().manual_seed(0)
    projection = project_teacher(
        torch.randn(3, H_T, generator=generator), None, student_weight=STUDENT.weight, alpha=0.0, top_k=2,
        student_logit_scale=0.5, **TEACHER.keywords("teacher"),
    )  # fmt: skip
    settings = ProjectionSettings(projection.student_fingerprint, V, alpha=0, student_logit_scale=0.5, contrast="none")
    options = {"fingerprint": {}, "settings": settings, "hidden_size": H_S, "top_k": 4, "divergence": True}
    target, apart = torch.tensor([7, 8, 9]), torch.tensor([0.1, 0.2, 0.3])
    with ProjectionCache.writer(tmp_path, **options) as writer:
        writer.add("a", projection, target, position=torch.tensor([0, 5, 6]), divergence=apart)
        for change, says in (
            ({"divergence": None}, r"divergence: expected shape \(3,\), got None"),
            ({"divergence": apart / 0}, "divergence: expected finite values"),
            ({"target": target[:2]}, r"target: expected shape \(n,\) as the projection's tokens \(3,\)"),
            ({"position": target[:2]}, r"position: expected shape \(3,\), got \(2,\)"),
            ({"projection": dataclasses.replace(projection, temperature=1.0)}, "projection.temperature: expected 2.0"),
        ):
            with pytest.raises(ValueError, match=says):
                writer.add("b", **{"projection": projection, "target": target, "divergence": apart, **change})
    with pytest.raises(ValueError, match="writer: expected an open one, got one that is closed"):
        writer.add("late", projection, target, divergence=apart)
    held = ProjectionCache(tmp_path)["a"]
    assert held.position.tolist() == [0, 5, 6] and torch.equal(held.divergence, apart)
    assert torch.equal(held.projection.ids[:, :2], projection.ids) and bool((held.projection.ids[:, 2:] == -1).all())


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"divergence": 1}, TypeError, "divergence: expected a bool, got int"),
        ({"settings": {}}, TypeError, "settings: expected ProjectionSettings, got dict"),
        ({"hidden_size": True}, ValueError, "hidden_size: expected a positive int, got True"),
        ({"fingerprint": {"x": float("nan")}}, TypeError, "fingerprint: expected JSON values only"),
    ],
)
def test_a_refused_writer_leaves_no_header(tmp_path, change, error, says):
    options = {"fingerprint": {}, "settings": ProjectionSettings("", V), "hidden_size": H_S}
    with pytest.raises(error, match=says):
        ProjectionCache.writer(tmp_path, **{**options, **change})
    ProjectionCache.writer(tmp_path, **options).close()
    assert len(ProjectionCache(tmp_path)) == 0


def test_settings_that_no_file_can_hold(tmp_path):
    with pytest.raises(ValueError, match="student_fingerprint: expected a string that UTF-8 can hold"):
        ProjectionSettings("\udcff", V)
    settings = ProjectionSettings("", torch.tensor(V).numpy()[()], temperature=2)  # NumPy's numbers are numbers
    ProjectionCache.writer(tmp_path, fingerprint={}, settings=settings, hidden_size=H_S).close()
    assert ProjectionCache(tmp_path).settings == ProjectionSettings("", V)


def test_a_damaged_shard_is_named(states, tmp_path):
    project(states, tmp_path / "p")
    bad = tmp_path / "p" / "shard-0-00002.safetensors"
    data = bytearray(bad.read_bytes())
    data[-3] ^= 1
    bad.write_bytes(data)
    with pytest.raises(CorruptCacheError, match=f"{re.escape(str(bad))} is altered: expected sha256"):
        ProjectionCache(tmp_path / "p")


@pytest.mark.parametrize("field", ["hidden_size", "top_k", "dtype", "divergence", "settings"])
def test_a_damaged_header_is_named(states, tmp_path, field):
    project(states, tmp_path / "p")
    path = tmp_path / "p" / "cache.json"
    path.write_text(path.read_text().replace(f'"{field}":', '"other":'))
    with pytest.raises(CorruptCacheError, match=r"cache\.json is damaged: expected fingerprint, hidden_size, top_k"):
        ProjectionCache(tmp_path / "p")
