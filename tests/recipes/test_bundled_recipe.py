"""The recipe of the bundled pair, end to end on a few kilobytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.bundled import sources
from recipes.bundled.budget import Budget, Stage, load_checkpoint, stage_at
from recipes.bundled.card import write_card
from recipes.bundled.distill import DraftTrainer, make_generated
from recipes.bundled.evaluate import evaluate, stream_nats
from recipes.bundled.export import check_pair, export_pair
from recipes.bundled.loop import Settings
from recipes.bundled.loss import LossKernels, label_loss, teacher_loss
from recipes.bundled.model import TinyLlama, config_from
from recipes.bundled.optim import OptimConfig, orthogonalise, rate_factor
from recipes.bundled.tokenizer import render
from recipes.bundled.train import TargetTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer


def weights(path: Path) -> dict[str, torch.Tensor]:
    saved = load_checkpoint(path)
    assert saved is not None
    return saved["model"]


def test_an_interrupted_run_ends_in_the_same_weights(settings: Settings, tmp_path: Path) -> None:
    TargetTrainer(settings).run()
    whole = weights(tmp_path / "target.pt")
    (tmp_path / "target.pt").unlink()
    TargetTrainer(settings).run(stop_after=3)
    continued = TargetTrainer(settings)
    assert continued.step == 3
    continued.run()
    parts = weights(tmp_path / "target.pt")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_exported_pair_loads_and_computes_what_was_trained(settings: Settings, data: Path, tmp_path: Path) -> None:
    TargetTrainer(settings).run()
    make_generated(settings)
    DraftTrainer(settings).run()
    export_pair(tmp_path, tmp_path / "export")
    for name in ("target", "draft"):
        folder = tmp_path / "export" / name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        saved = load_checkpoint(tmp_path / f"{name}.pt")
        assert saved is not None
        ours = TinyLlama(config_from(saved["shape"]), torch.float32)
        ours.load_state_dict({key: value.bfloat16().float() for key, value in saved["model"].items()})
        ids = torch.tensor([tokenizer("the water turns the wheel quietly").input_ids])
        with torch.no_grad():
            assert torch.allclose(model(ids).logits, ours.logits(ours.hidden(ids)), atol=1e-4)
    result = evaluate(tmp_path / "export", tmp_path)
    assert 0.0 < result["bits_per_byte"]["target"]["eltec_eng"] < 8.0
    assert 0.0 <= result["acceptance"]["all"]["greedy"] <= 1.0
    (tmp_path / "evaluation.json").write_text(json.dumps(result), encoding="utf-8")
    card = write_card(data, tmp_path, tmp_path / "export")
    for name, origin, licence in sources.attributions(data):
        assert name in card
        assert origin in card
        assert licence in card


def test_the_chat_template_renders_the_training_format(settings: Settings, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    talk = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello.")]
    messages = [{"role": role, "content": content} for role, content in talk]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == render(talk)
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == render(talk[:2]) + "<|assistant|>\n"
    text = "def f(x):\n    return 'naïve' # 123\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_only_permitted_rows_can_be_read(data: Path) -> None:
    table = sources.read_table(data)
    closed = sources.Source("closed", "text/closed.txt.xz", "documents")
    assert not table[closed.file].may_train
    for refused in (closed, sources.Source("absent", "text/absent.txt.xz", "documents")):
        with pytest.raises(sources.NotPermitted):
            sources.read_source(data, refused)
    assert sources.read_source(data, dataclasses.replace(closed, file=sources.TEXTS[0].file))


def test_a_row_that_loses_its_permission_stops_the_recipe(data: Path, tmp_path: Path) -> None:
    table = (data / "README.md").read_text(encoding="utf-8")
    for folder in ("text", "instruct"):
        (tmp_path / folder).symlink_to(data / folder)
    (tmp_path / "README.md").write_text(table.replace("| yes |", "| no |", 1), encoding="utf-8")
    with pytest.raises(sources.NotPermitted):
        sources.load_texts(tmp_path)


def test_every_source_read_is_attributed_and_nothing_else(data: Path) -> None:
    listed = [name for name, _, _ in sources.attributions(data)]
    assert listed == [source.name for source in (*sources.TEXTS, *sources.PAIRS)] + [sources.STDLIB]
    permitted = {file for file, row in sources.read_table(data).items() if row.may_train}
    assert {source.file for source in (*sources.TEXTS, *sources.PAIRS)} == permitted


def test_tests_and_foreign_packages_are_no_part_of_the_library(tmp_path: Path) -> None:
    for name in ("abc.py", "test/a.py", "site-packages/b.py", "idlelib/c.py", "json/d.py", "json/tests/e.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n", encoding="utf-8")
    kept = {path.relative_to(tmp_path).as_posix() for path in sources.stdlib_files(tmp_path)}
    assert kept == {"abc.py", "json/d.py"}


def test_an_oversized_draft_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    shape = config_from({"vocab_size": 400, **config["target"]})
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="1/8"):
        check_pair(shape, shape, tmp_path)


def test_the_chunked_losses_have_the_gradients_of_the_plain_ones() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1500, 16, requires_grad=True)
    head = torch.randn(50, 16, requires_grad=True)
    labels, rows = torch.randint(0, 50, (1500,)), torch.full((1500,), 1.0 / 1500)
    taught = torch.randn(1500, 50)
    kernels = LossKernels(compiled=False)
    logits = hidden @ head.t()
    plain = torch.nn.functional.cross_entropy(logits, labels) + 0.01 * torch.logsumexp(logits, -1).pow(2).mean()
    mixed = 0.9 * torch.softmax(taught, -1) + 0.1 * torch.nn.functional.one_hot(labels, 50)
    soft = torch.nn.functional.cross_entropy(logits, mixed)
    ours_soft, same = teacher_loss(hidden, head, labels, rows, kernels, lambda a, b: taught[a:b], 0.9)
    assert int(same) == int((logits.argmax(-1) == taught.argmax(-1)).sum())
    for ours, wanted in ((label_loss(hidden, head, labels, rows, kernels, 0.01), plain), (ours_soft, soft)):
        got = torch.autograd.grad(ours, (hidden, head))
        expected = torch.autograd.grad(wanted, (hidden, head), retain_graph=True)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))
    assert torch.allclose(ours_soft, soft, atol=1e-4)


def test_muon_updates_are_close_to_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((2, 32, 64), (2, 64, 32)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
        assert values.min() > 0.4
        assert values.max() < 1.4


def test_the_budget_holds_whatever_the_pace() -> None:
    now = [100.0]
    budget = Budget(2.0, spent=30.0, clock=lambda: now[0])
    assert budget.progress(0) == 0.25
    now[0] += 1000.0
    assert budget.progress(1) == 1.0
    with pytest.raises(ValueError, match="at most"):
        Budget(151.0)
    stages = [Stage(0.0, 32, 64, "a"), Stage(0.5, 64, 64, "b")]
    assert [stage_at(stages, at).mix for at in (0.0, 0.49, 0.5, 1.0)] == ["a", "a", "b", "b"]


def test_rates_rise_hold_and_fall() -> None:
    optim = OptimConfig(0.02, 0.003, 10, 0.5, 0.1, 0.0, 1.0, 0.0)
    assert rate_factor(optim, 0, 0.0) == pytest.approx(0.1)
    assert rate_factor(optim, 50, 0.3) == 1.0
    assert rate_factor(optim, 90, 1.0) == pytest.approx(0.1)


def test_every_token_but_the_first_is_scored_once() -> None:
    class Uniform:
        device = torch.device("cpu")

        def __call__(self, ids: torch.Tensor) -> Any:
            return type("Output", (), {"logits": torch.zeros(*ids.shape, 4)})

    for length in (2, 9, 33, 100):
        nats = stream_nats(Uniform(), torch.zeros(length, dtype=torch.long), window=16, rows=2)
        assert nats == pytest.approx((length - 1) * torch.log(torch.tensor(4.0)).item(), rel=1e-5)
