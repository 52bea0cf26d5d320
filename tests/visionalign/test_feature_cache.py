"""Cached features of a frozen vision tower: the same training to the last digit, and nobody looks at an image."""

import contextlib
import copy
import io
import json
import os
import pickle
import shutil
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from tiny_pictures import SEVERAL, TEXT_ONLY, loud, picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from shared.builtin import load_dataset
from shared.data.rows import ROW, Rows
from shared.data.schema import Kind
from shared.errors import DataError, UserError
from shared.objectives.supervised import nll
from shared.policies.token import TokenPolicy
from visionalign import VLMCollator, VLMSFTConfig, VLMSFTTrainer, family_of, feature_cache, feature_store
from visionalign.families import modules, parameters
from visionalign.feature_cache import FeatureCache
from visionalign.feature_rows import image_key
from visionalign.feature_store import FeatureStore
from visionalign.frozen_tower import CAN


def row(*images, answer="red", question="what is it"):
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"images": list(images), "messages": chat}


def rows_for(family):
    """Images of unlike size, one image in two rows; several images, and none, where the family takes that."""
    first = picture(1, 40, 32)
    rows = [row(first), row(picture(2, 32, 40), answer="blue green"), row(first, question="which")]
    if family in SEVERAL:
        rows.append(row(first, picture(3, 48, 34), answer="yellow", question="how many"))
        rows.append(row(picture(4, 64, 30), picture(2, 32, 40), picture(5, 30, 64), question="where ?"))
    if family in TEXT_ONLY or family == "mllama":
        rows.append(row(answer="two", question="how many left"))
    return rows


def tiny_model(path, *frozen):
    model = loud(AutoModelForImageTextToText.from_pretrained(path)).train()
    for part in frozen:
        for parameter in parameters(model, part).values():
            parameter.requires_grad_(False)
    return model


def tiny_collator(path, model, **options):
    processor = AutoProcessor.from_pretrained(path)
    return VLMCollator(processor, family=family_of(model.config), kind=Kind.MESSAGES, **options)


def cache_of(model, collator, folder):
    return FeatureCache(model, collator, Accelerator(cpu=True), folder=folder, batch_size=3)


@contextlib.contextmanager
def nobody_looks(model, collator):
    """Fails where an image is decoded or processed meanwhile, or the vision tower called."""
    called = []
    tower = modules(model, "vision_tower")
    layers = [m for part in tower for m in part.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    hooks = [layer.register_forward_hook(lambda *_: called.append("tower")) for layer in layers]
    process = mock.patch.object(
        type(collator.processor.image_processor), "__call__", lambda *_, **__: called.append("processor")
    )
    decode = mock.patch("visionalign.reading.decode_image", lambda *_, **__: called.append("decoded"))
    assert layers
    with process, decode:
        yield
    for hook in hooks:
        hook.remove()
    assert not called


def descend(model, batches):
    """The losses of plain gradient steps, and the weights behind them."""
    policy, losses = TokenPolicy(model), []
    for batch in batches:
        count = batch.counted_tokens()
        loss, _ = policy.action_objective(model, batch, lambda logp, at, n=count: nll(logp) / n)
        loss.backward()
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.grad is not None):
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
        losses.append(loss.item())
    assert policy.fused
    return losses


@pytest.mark.parametrize("projector", ["trained", "frozen"])
@pytest.mark.parametrize("family", CAN)
def test_losses_and_weights_are_those_without_the_cache(family, projector, tiny, tmp_path):
    path = tiny(family)
    model = tiny_model(path, "vision_tower", *(["projector"] if projector == "frozen" else []))
    own, collator = copy.deepcopy(model), tiny_collator(path, model, pad_to_multiple_of=8)
    rows = Rows(rows_for(family))
    cache = cache_of(model, collator, tmp_path)
    known = cache.known(rows)
    assert cache.tower.past_projector == (projector == "frozen")
    assert (
        len(cache.images)
        == len({key for _, keys in known.keys for key in keys})
        < sum(len(keys) for _, keys in known.keys)
    )

    order = [[2, 0], [len(rows) - 1, 1], list(range(len(rows))), [len(rows) - 1]]
    plain = [collator([rows[at] for at in some]) for some in order]
    light = known.light()
    with nobody_looks(model, collator):
        cached = [cache.collator([light[at] for at in some]) for some in order]
        losses = descend(model, cached)
    for ours, theirs in zip(cached, plain, strict=True):
        assert torch.equal(ours.completion_ids, theirs.completion_ids)
        assert torch.equal(ours.completion_attention, theirs.completion_attention)
        assert torch.equal(ours.completion_mask, theirs.completion_mask)
        assert not any(name.startswith("pixel") for name in ours.model_inputs)
        for name in ours.model_inputs.keys() & theirs.model_inputs.keys():
            left, right = ours.model_inputs[name], theirs.model_inputs[name]
            if left.shape[:2] == ours.completion_ids.shape:  # beside padding it does not matter
                left, right = (each[ours.completion_attention.bool()] for each in (left, right))
            assert torch.equal(left, right), name

    assert losses == pytest.approx(descend(own, plain), abs=1e-6)
    before = AutoModelForImageTextToText.from_pretrained(path).state_dict()
    for name, value in own.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():  # pixels still go the whole way
        seen = [m(**plain[0].model_inputs, input_ids=plain[0].completion_ids).logits for m in (model, own)]
    torch.testing.assert_close(*seen, rtol=0, atol=1e-4)


def test_features_of_a_model_in_half_precision_stay_in_it(tiny, tmp_path):
    path, rows = tiny("qwen3_vl"), Rows(rows_for("qwen3_vl"))
    model = tiny_model(path, "vision_tower").bfloat16()
    own, collator = copy.deepcopy(model), tiny_collator(path, model)
    cache = cache_of(model, collator, tmp_path)
    light = cache.known(rows).light()
    batch = cache.collator([light[at] for at in range(5)])
    assert {batch.model_inputs[name].dtype for name in cache.tower.names} == {torch.bfloat16}
    assert len(cache.tower.names) == 2  # the merger, and that of the deep layers
    plain = collator([rows[at] for at in range(5)])
    assert descend(model, [batch] * 2) == pytest.approx(descend(own, [plain] * 2), rel=5e-3)


# ---- The trainer ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    return load_dataset("builtin/shapes", "train").select(range(32))


def config(folder, **changed):
    options = {
        "per_device_train_batch_size": 8, "learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1, "save_steps": 3,
        "eval_answers": 0, "max_new_tokens": 4, "disable_tqdm": True, "optim": "sgd", "freeze_vision_tower": True,
        "cache_vision_features": True, "vision_cache_dir": str(Path(folder).parent / "features"), **changed,
    }  # fmt: skip
    return VLMSFTConfig(output_dir=str(folder), **options)


def trained(args, rows, resume=None, **kwargs):
    trainer = VLMSFTTrainer("builtin/vlm-small", args, train_dataset=rows, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_alike(left, right):
    for name, value in left.model.state_dict().items():
        torch.testing.assert_close(right.model.state_dict()[name], value, rtol=0, atol=1e-6)


def losses_of(trainer):
    return [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]


def test_a_run_equals_one_without_the_cache_and_never_looks(shapes, tmp_path, capsys):
    from peft import LoraConfig

    held_out = load_dataset("builtin/shapes", "test").select(range(8))
    options = {"eval_strategy": "steps", "eval_steps": 3, "eval_answers": 4}
    dropping = {"r": 4, "lora_dropout": 0.2, "target_modules": r".*language_model.*(q_proj|v_proj)"}
    runs = []
    for cached in (False, True):
        args = config(tmp_path / str(cached), cache_vision_features=cached, **options)
        trainer = VLMSFTTrainer(
            "builtin/vlm-small", args, train_dataset=shapes, eval_dataset=held_out, peft_config=LoraConfig(**dropping)
        )
        trainer.answer_questions, answers = lambda: None, trainer.answer_questions
        with nobody_looks(trainer.model, trainer.data_collator) if cached else contextlib.nullcontext():
            trainer.train()
        runs.append(trainer)
        figures, samples = answers()  # by pixels
        assert "accuracy" in figures and samples[0].images
    assert losses_of(runs[1]) == pytest.approx(losses_of(runs[0]), abs=1e-6)
    assert len(losses_of(runs[0])) == 8
    assert_alike(*runs)
    assert "Vision features of train: 32 images of 32 rows, 32 of them computed" in capsys.readouterr().out


def test_a_resumed_run_takes_what_is_kept_and_equals_one_that_was_not_interrupted(shapes, tmp_path, capsys):
    whole = trained(config(tmp_path / "run"), shapes)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    capsys.readouterr()
    again = trained(config(tmp_path / "run"), shapes, resume=True)
    assert again.state.global_step == 6
    assert "32 images of 32 rows, from" in capsys.readouterr().out
    assert_alike(whole, again)


def test_what_is_kept_is_found_again_only_where_it_holds(tiny, tmp_path):
    path, rows = tiny("llava"), Rows(rows_for("llava"))

    def folders(model, **options):
        cache = cache_of(model, tiny_collator(path, model, **options), tmp_path)
        return cache.images.folder.name, cache.rows.folder.name

    images, tokens = folders(tiny_model(path, "vision_tower"))
    assert folders(tiny_model(path, "vision_tower", "language_model")) == (images, tokens)
    assert folders(tiny_model(path, "vision_tower"), max_length=500)[0] == images
    assert folders(tiny_model(path, "vision_tower"), max_length=500)[1] != tokens
    assert folders(tiny_model(path, "vision_tower"), max_pixels=500)[0] != images
    assert folders(tiny_model(path, "vision_tower", "projector"))[0] != images
    other = tiny_model(path, "vision_tower")
    with torch.no_grad():
        other.model.language_model.norm.weight += 1
    assert folders(other) == (images, tokens)
    with torch.no_grad():
        next(iter(parameters(other, "vision_tower").values())).add_(1e-3)
    assert folders(other)[0] != images

    file = tmp_path / "a.png"
    picture(1).save(file)
    model = tiny_model(path, "vision_tower")
    cache = cache_of(model, tiny_collator(path, model), tmp_path)
    as_file = Rows([row(str(file)), row({"bytes": None, "path": str(file)}), row(file.read_bytes())])
    keys = [images for _, images in cache.known(as_file).keys]
    assert keys[0] == keys[1] != keys[2]
    was, old = file.stat(), file.read_bytes()
    time.sleep(0.02)
    file.write_bytes(old[:-1] + b"x")  # as large, and with its time set back
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert image_key(file) != keys[0][0]
    picture(2, 36, 36).save(file)
    assert cache.known(as_file).keys[0] != keys[0]
    assert cache.known(rows).keys != cache.known(Rows(rows_for("llava")[::-1])).keys


def test_what_stands_for_an_image_in_memory_is_all_that_decoding_sees():
    from PIL import Image

    grey = Image.new("L", (4, 6), 7)
    palette = Image.new("P", (4, 6), 7)
    see_through = palette.copy()
    see_through.info["transparency"] = 7
    half = Image.new("P", (4, 6), 7)
    half.putpalette([0, 0, 0, 128] * 8, "RGBA")
    solid = Image.new("P", (4, 6), 7)
    solid.putpalette([0, 0, 0, 255] * 8, "RGBA")
    turned = Image.frombytes("L", (6, 4), grey.tobytes())
    alike = [grey, palette, see_through, half, solid, turned]
    assert {each.tobytes() for each in alike} == {bytes([7] * 24)}
    assert len({image_key(each) for each in alike}) == len(alike)
    assert image_key(grey.copy()) == image_key(grey)


def test_images_that_come_late_are_kept_and_one_that_breaks_off_is_named(tiny, tmp_path):
    from PIL import Image

    path = tiny("llava")
    model = tiny_model(path, "vision_tower")
    written: list[int] = []
    texts = [row(answer="two", question=f"how many {at}") for at in range(feature_cache.WINDOW + 2)]
    cache = cache_of(model, tiny_collator(path, model), tmp_path)
    with mock.patch.object(feature_store.Writer, "check_space", autospec=True) as check:
        check.side_effect = lambda writer, wanted: written.append(writer.written)
        assert len(cache.known(Rows([*texts, row(picture(1))])).keys) == len(texts) + 1 and len(cache.images) == 1
    assert len(written) == 1 and written[0]  # the room is looked at when there is something to go by

    whole = io.BytesIO()
    picture(2).save(whole, "png")
    short = Image.open(io.BytesIO(whole.getvalue()[:-60]))
    with pytest.raises(DataError, match="row 1: .*cannot be read"):
        cache.known(Rows([row(picture(1)), row(short)]))


def test_rows_that_are_left_out_or_cut_are_so_without_their_images(tiny, tmp_path):
    path = tiny("idefics3")
    model = tiny_model(path, "vision_tower")
    collator = tiny_collator(path, model, on_bad_row="skip", max_length=80)
    long = row(picture(1), question="what " * 90)
    rows = Rows([row(picture(1)), row("missing.png"), long, row(picture(1), answer="red " * 60)])
    cache = cache_of(model, collator, tmp_path)
    light = cache.known(rows).light()
    with nobody_looks(model, collator):
        batch = cache.collator([light[at] for at in range(4)])
        nothing = cache.collator([light[1], light[2]])
    plain = collator([rows[at] for at in range(4)])
    assert torch.equal(batch.completion_ids, plain.completion_ids)
    assert batch.notes == plain.notes and set(batch.notes) == {1, 2, 3}
    assert nothing.counted_tokens() == 0 and not nothing.model_inputs.keys() & {"vision_features"}
    loss, _ = TokenPolicy(model).action_objective(model, nothing, lambda logp, at: nll(logp))
    assert loss.item() == 0

    strict = cache_of(model, tiny_collator(path, model), tmp_path / "other")
    with pytest.raises(DataError, match="row 1: .*cannot be read"):
        strict.known(Rows([row(picture(1)), row("missing.png")]))
    with pytest.raises(DataError, match="row 0: has a video.*cache_vision_features"):
        strict.known(Rows([{**row(picture(1)), "videos": ["a.mp4"]}]))


def test_filling_rows_count_nothing_and_unknown_rows_go_by_pixels(tiny, tmp_path):
    path, rows = tiny("gemma3"), Rows(rows_for("gemma3"))
    model = tiny_model(path, "vision_tower")
    cache = cache_of(model, tiny_collator(path, model), tmp_path)
    known = cache.known(rows)
    share = known.share(1, 4)  # 6 rows for 4 processes
    batch = cache.collator([share[0], share[1]])
    assert batch.completion_mask.any(1).tolist() == [True, True]
    last = known.share(3, 4)
    assert [last[at][ROW] for at in range(2)] == [3, 5]
    assert cache.collator([last[0], last[1]]).completion_mask.any(1).tolist() == [True, False]
    assert "pixel_values" in cache.collator([rows[0]]).model_inputs
    assert known[0].keys() == rows[0].keys()
    assert pickle.loads(pickle.dumps(cache.collator))([share[0]]).model_inputs["vision_features"].shape[1] == 32


def test_a_checkpoint_with_another_tower_is_refused(shapes, tmp_path):
    options = {"max_steps": 3, "save_only_model": True, "cache_vision_features": False, "freeze_vision_tower": False}
    trained(config(tmp_path / "run", **options), shapes)
    with pytest.raises(UserError, match="checkpoint has another vision tower than"):
        trained(config(tmp_path / "run"), shapes, resume=True)
    trained(config(tmp_path / "run", cache_vision_features=False), shapes, resume=True)


@pytest.mark.parametrize("half", [False, True])
def test_how_far_features_may_be_off_is_said_by_the_arithmetic(half, tiny, tmp_path):
    path = tiny("llava")
    model = tiny_model(path, "vision_tower")
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "bf16" if half else "no"
    cache = FeatureCache(model, tiny_collator(path, model), accelerator, folder=tmp_path)
    record = cache.tower.record
    cache.tower.record = lambda inputs: [each * 1.01 for each in record(inputs)]
    refused = contextlib.nullcontext() if half else pytest.raises(UserError, match="sees something else in features")
    with refused:
        cache.known(Rows(rows_for("llava")))


# ---- Refusals ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_kept_is_refused(shapes, tiny, tmp_path, monkeypatch):
    from peft import LoraConfig

    def refused(match, rows=shapes, peft=None, **options):
        with pytest.raises(UserError, match=match):
            VLMSFTTrainer(
                "builtin/vlm-small", config(tmp_path / "run", **options), train_dataset=rows, peft_config=peft
            )

    refused("the vision tower trains .*freeze_vision_tower", freeze_vision_tower=False)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    refused("the vision tower trains .*target_modules", peft=lora, freeze_vision_tower=False)
    refused("streamed", rows=shapes.to_iterable_dataset())
    monkeypatch.setattr(feature_cache, "shards_the_model", lambda: True)
    refused("DeepSpeed, FSDP")
    monkeypatch.undo()

    class Own(VLMCollator):
        pass

    with pytest.raises(UserError, match="data_collator is a Own"):
        feature_cache.check_cache(Rows([]), object.__new__(Own))
    path = tiny("llava_onevision")  # sees an image otherwise beside another
    model = tiny_model(path, "vision_tower")
    with pytest.raises(UserError, match="'llava_onevision'; it works for llava,"):
        cache_of(model, tiny_collator(path, model), tmp_path)


def test_features_that_do_not_lead_to_what_the_model_sees_are_refused(tiny, tmp_path):
    path = tiny("llava")
    model = tiny_model(path, "vision_tower")
    cache = cache_of(model, tiny_collator(path, model), tmp_path)
    record = cache.tower.record
    cache.tower.record = lambda inputs: [each + 1 for each in record(inputs)]
    with pytest.raises(UserError, match="sees something else in features"):
        cache.known(Rows(rows_for("llava")))


# ---- The store -----------------------------------------------------------------------------------------------------


def test_tensors_come_back_bit_for_bit_from_several_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "SEGMENT_BYTES", 1000)
    store, entries = FeatureStore(tmp_path / "a"), {}
    with store.writer() as writer:
        for at, dtype in enumerate((torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8)):
            value = (torch.randn(7, 3, 5) * 10).to(dtype)
            entries[f"k{at}"] = {
                "x": value,
                "none": torch.empty(0, 4).as_strided((0, 4), (0, 0)),
                "one": torch.tensor(3.5),
            }
            writer.add(f"k{at}", entries[f"k{at}"])
    assert not len(store)
    store.refresh()
    assert len(list((tmp_path / "a").glob("*.json"))) > 1
    for opened in (store, pickle.loads(pickle.dumps(store))):
        for key, entry in entries.items():
            for name, value in entry.items():
                assert opened[key][name].dtype == value.dtype and torch.equal(opened[key][name], value)


def test_what_was_broken_off_does_not_count(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path)
    with pytest.raises(KeyboardInterrupt), store.writer() as writer:
        writer.add("whole", {"x": torch.ones(3)})
        raise KeyboardInterrupt
    with store.writer() as writer:
        writer.add("short", {"x": torch.ones(300)})
    short = next(p for p in tmp_path.glob("*.json") if "short" in p.read_text()).with_suffix(".bin")
    short.write_bytes(short.read_bytes()[:-1])
    (tmp_path / "x.json").write_text(json.dumps(["another's"]))
    (tmp_path / "y.bin").write_bytes(b"still being written")
    again = FeatureStore(tmp_path)
    assert "whole" in again and "short" not in again and len(again) == 1

    monkeypatch.setattr(shutil, "disk_usage", lambda _: mock.Mock(free=1e9))
    with store.writer() as writer, pytest.raises(UserError, match="about 2.0 GB more.*vision_cache_dir"):
        writer.check_space(2e9)
    held = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="No space left"), store.writer() as writer:
        writer.add("lost", {"x": torch.ones(3)})
        monkeypatch.setattr(os, "truncate", mock.Mock(side_effect=OSError(28, "No space left")))
    assert {path.name for path in tmp_path.iterdir()} == held  # nothing takes the room that others lack
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="vision_cache_dir"), FeatureStore(blocked / "below").writer() as writer:
        writer.add("k", {"x": torch.ones(1)})
